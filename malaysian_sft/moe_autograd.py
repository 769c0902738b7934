"""The experts block as one autograd function over the kernels."""

import itertools
from typing import NamedTuple

import torch
import triton

from malaysian_sft.fp8 import Quantised, check_arithmetic
from malaysian_sft.moe_fp8 import empty_quantised, grouped_gemm_fp8, quantise_activations
from malaysian_sft.moe_hopper import descriptor, hopper_gemm, on_hopper
from malaysian_sft.moe_hopper_fp8 import hopper_fp8_gemm
from malaysian_sft.moe_hopper_swiglu import hopper_swiglu_backward_kernel
from malaysian_sft.moe_routing import Routing, columns_beside, precision_of, rank_block, route, tiles_for
from malaysian_sft.moe_swiglu import swiglu_backward_kernel, swiglu_kernel
from malaysian_sft.moe_triton import combine, dora_down, grouped_gemm, lora_grad, router_grad_kernel

# An (S, H) temporary exists one part of its columns at a time; beside dx's are the adapters' gradients.
Y_SLICES, DX_SLICES = 2, 4


def column_slices(width, wanted):
    """Split range(width) into `wanted` parts of whole 256-column tiles, so that an (S, H) temporary exists one part at
    a time."""
    step = triton.cdiv(triton.cdiv(width, wanted), 256) * 256
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


class Projection(NamedTuple):
    """The adapter of one projection (gate, up or down) of all experts."""

    lora_A: torch.Tensor  # (E, r, in)
    lora_B: torch.Tensor  # (E, out, r)
    scale: torch.Tensor | None = None  # DoRA: (E, out), magnitude / ||W + scaling B A||

    def cast(self, dtype):
        """As the kernels take it: A and B in `dtype`, the scale in fp32, all contiguous."""
        scale = None if self.scale is None else self.scale.float().contiguous()
        return Projection(self.lora_A.to(dtype).contiguous(), self.lora_B.to(dtype).contiguous(), scale)

    def empty(self):
        """Room for its gradients: A's and B's in their own dtypes, the scale's in fp32."""
        dtypes = self.lora_A.dtype, self.lora_B.dtype, torch.float32
        return Projection(
            *(
                None if t is None else torch.empty(t.shape, dtype=dtype, device=t.device)
                for t, dtype in zip(self, dtypes, strict=True)
            )
        )


class Block(NamedTuple):
    """The operands of one call, adapters in the compute dtype; base weights that are Quantised are multiplied in
    FP8."""

    gate_up_proj: torch.Tensor | Quantised
    down_proj: torch.Tensor | Quantised
    gate: Projection
    up: Projection
    down: Projection
    scaling: float

    @property
    def sizes(self):
        """E, H, I, r."""
        E, H, r = self.down.lora_B.shape
        return E, H, self.down.lora_A.shape[2], r

    @property
    def in_fp8(self):
        return isinstance(self.down_proj, Quantised)


def product(a, weight, out, p, routing, tiles, launches, *, gather=False, lora):
    """out (S, N) = A W_e^T + U L_e^T, by the kernel for this device and these operands; a is Quantised if weight is."""
    common = dict(gather=gather, lora=lora)
    if on_hopper(out, p, tiles):
        gemm = hopper_fp8_gemm if p.in_fp8 else hopper_gemm
        return gemm(a, weight, out, routing, tiles, launch=next(launches), **common)
    if p.in_fp8:
        return grouped_gemm_fp8(a, weight, out, routing, tiles, **common)
    return grouped_gemm(a, [weight], out, routing, tiles, both=len(lora[1]) == 2, **common)


def compute_up(x, p, routing, tiles, launches):
    """1 to 3: u (2, S, r); gate_a (S, 2I), that is gate, DoRA's scale not yet applied, and silu(gate) up, applied; v
    (S, r); and what 4 multiplies: a, or if the products are FP8 it quantised."""
    S, (_, _, I, r) = routing.row_token.numel(), p.sizes  # noqa: E741
    u = grouped_gemm(
        x, [p.gate.lora_A, p.up.lora_A], x.new_empty(2, S, r), routing, tiles, gather=True, alpha=p.scaling
    )
    gate_a, lora = x.new_empty(S, 2 * I), (u, [p.gate.lora_B, p.up.lora_B])
    dora, quantised = p.gate.scale is not None, None
    if on_hopper(x, p, tiles):
        common = dict(launch=next(launches), gather=True, lora=lora)
        common["scales"] = (p.gate.scale, p.up.scale) if dora else None
        if p.in_fp8:
            quantised = empty_quantised(S, I, x.device)
            x8 = quantise_activations(x)
            hopper_fp8_gemm(x8, p.gate_up_proj, gate_a, routing, tiles, quantised=quantised, **common)
        else:
            hopper_gemm(x, p.gate_up_proj, gate_a, routing, tiles, swiglu=True, **common)
    else:
        if p.in_fp8:
            x8 = quantise_activations(x)
            grouped_gemm_fp8(x8, p.gate_up_proj, gate_a, routing, tiles, gather=True, lora=lora, segments=2)
        else:
            halves = [p.gate_up_proj[:, :I], p.gate_up_proj[:, I:]]
            grouped_gemm(x, halves, gate_a, routing, tiles, gather=True, lora=lora)
        block_i, warps = tiles.swiglu
        swiglu_kernel[(routing.tile_expert.numel(), triton.cdiv(I, block_i))](
            gate_a, p.gate.scale if dora else gate_a, p.up.scale if dora else gate_a,
            routing.tile_expert, routing.tile_row, routing.num_tiles, routing.offsets, I,
            DORA=dora, BLOCK_M=tiles.block_m, BLOCK_I=block_i, num_warps=warps,
        )  # fmt: skip
        if p.in_fp8:
            quantised = quantise_activations(gate_a[:, I:])
    v = grouped_gemm(gate_a[:, I:], [p.down.lora_A], x.new_empty(S, r), routing, tiles, alpha=p.scaling)
    return u, gate_a, v, gate_a[:, I:] if quantised is None else quantised


def compute_down(a, v, p, routing, tiles, launches, columns=slice(None)):
    """4: y (S, columns of H), DoRA's scale not yet applied."""
    weight = p.down_proj.outputs(columns) if p.in_fp8 else p.down_proj[:, columns]
    lora_B = p.down.lora_B[:, columns]
    y = v.new_empty(v.shape[0], lora_B.shape[1])
    return product(a, weight, y, p, routing, tiles, launches, lora=(v.unsqueeze(0), [lora_B]))


def swiglu_backward(da, gate_a, u, dv, p, routing, grads, tiles):
    """gate_a (S, 2I) becomes the gradient of gate and up, from da (S, I) and dv (S, r) per unit of router weight; fills
    of `grads` (Projections of gate, up, down) gate's and up's B and scale and down's A. Returns d(router weight) in
    parts, (column blocks, S) fp32, to be added up; and if the products are FP8 and the kernel can, that gradient of
    gate and up quantised, else None."""
    dgate, dup, ddown = grads
    dora = p.gate.scale is not None
    scales, dscales = ((p.gate.scale, p.up.scale), (dgate.scale, dup.scale)) if dora else ((da, da), (da, da))
    S, (E, _, I, r) = da.shape[0], p.sizes  # noqa: E741
    on_tensor_cores = on_hopper(da, p, tiles) and r <= 64
    if on_tensor_cores:
        sizes = tiles.hopper_swiglu_backward_fp8 if p.in_fp8 else tiles.hopper_swiglu_backward
        block_s, block_i, warps, stages = sizes[dora or r > 32]
    else:
        block_s, block_i, warps, stages = tiles.swiglu_backward
        block_i = columns_beside(r, block_i)
    dw_parts = torch.empty(triton.cdiv(I, block_i), S, dtype=torch.float32, device=da.device)
    after = (
        routing.row_weight,
        routing.offsets,
        routing.order,
        dgate.lora_B,
        dup.lora_B,
        ddown.lora_A,
        dw_parts,
        *dscales,
    )
    after += S, I, r
    quantised = empty_quantised(S, 2 * I, da.device) if p.in_fp8 and on_tensor_cores else None
    grid = (dw_parts.shape[0], E)
    if on_tensor_cores:
        tile, rank = [block_s, block_i], [block_s, rank_block(r)]
        hopper_swiglu_backward_kernel[grid](
            descriptor(gate_a, tile), gate_a, descriptor(da, tile),
            descriptor(u.view(-1, r), rank), descriptor(dv, rank),
            *scales, *after, *(quantised or (da, da)),
            DORA=dora, STAGES=stages, QUANTISE=p.in_fp8, num_warps=warps,
        )  # fmt: skip
    else:
        swiglu_backward_kernel[grid](
            da, gate_a, u, u.stride(0), dv, *scales, *after,
            DORA=dora, BLOCK_S=block_s, BLOCK_I=block_i, BLOCK_R=rank_block(r), PRECISION=precision_of(da.dtype),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dw_parts, quantised


class FusedExperts(torch.autograd.Function):
    """The block with hand-written backward. Saved in "fast" mode: gate, a, u, v (and for DoRA y); in "frugal": where
    rows go, no more."""

    @staticmethod
    def forward(ctx, x, top_k_weights, *adapters_and_frozen):
        *adapters, frozen = adapters_and_frozen  # lora_A, lora_B, scale of gate, of up, of down
        top_k_index, gate_up_proj, down_proj, scaling, mode, base = frozen
        x = x.contiguous()
        tiles = tiles_for(x.device, x.dtype)
        p = Block(gate_up_proj, down_proj, *(given.cast(x.dtype) for given in projections(adapters)), scaling)
        routing = route(top_k_index, top_k_weights, p.sizes[0], tiles)
        ctx.launches = itertools.count()  # of kernels that share the routing's work counters; goes on in the backward
        u, gate_a, v, a = compute_up(x, p, routing, tiles, ctx.launches)
        out, y = torch.empty_like(x), None
        if p.down.scale is None:
            for columns in column_slices(x.shape[1], Y_SLICES):
                part = compute_down(a, v, p, routing, tiles, ctx.launches, columns)
                combine(part, routing, out[:, columns], tiles, weighted=True)
                del part  # before the next one is allocated
        else:
            y = compute_down(a, v, p, routing, tiles, ctx.launches)
            combine(y, routing, out, tiles, weighted=True, scale=p.down.scale)
        kept = (u, v, gate_a, y) if mode == "fast" else (None, None, None, None)
        # the adapters as they came: cast again in the backward, which is cheaper than a second copy of them all
        weights = (gate_up_proj, down_proj) if base is None else (None, None)
        ctx.save_for_backward(x, *kept, *routing, *weights, *adapters)
        ctx.scaling, ctx.base, ctx.spent = scaling, base, False
        return out

    @staticmethod
    def backward(ctx, dout):
        if ctx.spent:
            raise RuntimeError(
                "FusedMoELoRA's backward overwrites what it saved: backward twice through one forward is not supported"
            )
        ctx.spent = True
        x, u, v, gate_a, y, *rest = ctx.saved_tensors
        routing, (gate_up_proj, down_proj, *adapters) = (
            Routing(*rest[: len(Routing._fields)]),
            rest[len(Routing._fields) :],
        )
        if ctx.base is not None:
            gate_up_proj, down_proj, *transposed = ctx.base()
        given = projections(adapters)
        p = Block(gate_up_proj, down_proj, *(projection.cast(x.dtype) for projection in given), ctx.scaling)
        dgate, dup, ddown = (projection.empty() for projection in given)
        tiles, dout = tiles_for(x.device, x.dtype), dout.contiguous()
        gate_up_T, down_T = transposed if p.in_fp8 else [w.transpose(1, 2) for w in (gate_up_proj, down_proj)]
        S, (_, H, I, r) = routing.row_token.numel(), p.sizes  # noqa: E741
        dora = p.gate.scale is not None
        if gate_a is None:
            u, gate_a, v, a = compute_up(x, p, routing, tiles, ctx.launches)
            y = compute_down(a, v, p, routing, tiles, ctx.launches) if dora else None
            del a

        # 6 to 8, dout read through row_token
        if dora:
            dy = dora_down(dout, v, y, p.down.scale, ddown.lora_B, ddown.scale, routing, tiles, p.in_fp8)
            gather = False
            # for 7 the scale is put on the small B2 instead: the same product, but of dout, which is top_k times
            # smaller than dy
            B2 = torch.mul(p.down.lora_B, p.down.scale.unsqueeze(-1), out=torch.empty_like(p.down.lora_B))
        else:
            lora_grad(dout, v.unsqueeze(0), [ddown.lora_B], routing, tiles, weighted=True)
            dy, gather, B2 = dout, True, p.down.lora_B
        dv = grouped_gemm(dout, [B2.transpose(1, 2)], x.new_empty(S, r), routing, tiles, gather=True, alpha=p.scaling)
        del B2
        lora = (dv.unsqueeze(0), [p.down.lora_A.transpose(1, 2)])
        da = x.new_empty(S, I)
        dy = quantise_activations(dy) if p.in_fp8 and not dora else dy
        product(dy, down_T, da, p, routing, tiles, ctx.launches, gather=gather, lora=lora)
        del dy, y

        # 9 and 10 with SwiGLU's backward
        dw_parts, factor = swiglu_backward(da, gate_a, u, dv, p, routing, (dgate, dup, ddown), tiles)
        del da, dv
        dweights = torch.empty_like(routing.weight)
        router_grad_kernel[(triton.cdiv(S, 1024),)](
            dw_parts, routing.token_row, dweights, S, BLOCKS=dw_parts.shape[0], BLOCK=1024
        )  # fmt: skip
        del dw_parts

        # 11 to 13
        dgate_up = gate_a  # which it has become
        lora_B = [p.gate.lora_B.transpose(1, 2), p.up.lora_B.transpose(1, 2)]
        du = grouped_gemm(dgate_up, lora_B, x.new_empty(2, S, r), routing, tiles, alpha=p.scaling)
        lora_grad(x, du, [dgate.lora_A.transpose(1, 2), dup.lora_A.transpose(1, 2)], routing, tiles)
        if factor is None:
            factor = quantise_activations(dgate_up) if p.in_fp8 else dgate_up
        dx = torch.empty_like(x)
        for columns in column_slices(H, DX_SLICES):
            lora = (du, [p.gate.lora_A[:, :, columns].transpose(1, 2), p.up.lora_A[:, :, columns].transpose(1, 2)])
            weight = gate_up_T.outputs(columns) if p.in_fp8 else gate_up_T[:, columns]
            part = x.new_empty(S, columns.stop - columns.start)
            product(factor, weight, part, p, routing, tiles, ctx.launches, lora=lora)
            combine(part, routing, dx[:, columns], tiles, weighted=False)
            del part  # before the next one is allocated
        return dx, dweights, *dgate, *dup, *ddown, None


def projections(tensors):
    """Nine tensors as three Projections: gate, up, down."""
    return [Projection(*tensors[i : i + 3]) for i in (0, 3, 6)]


def moe_lora(
    hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate, up, down, scaling, mode="fast", base=None
):
    """The experts block by the kernels: `moe_lora_reference`'s signature and result. Base weights must have
    hidden_states' dtype, or be Quantised: then their products are FP8 (fp8.py).

    mode: "fast" keeps gate, silu(gate) up and the LoRA inner products for the backward, "frugal" recomputes them.
    base: gives (gate_up_proj, down_proj) once more in the backward, where they are not to be kept until then; of
    Quantised weights it must, and besides their transposes (`transpose_weights`).
    Router weights are used in fp32. Raises ValueError unless hidden_states and base weights are all bf16 or all fp32
    (fp16 has too few exponents, see `nonzero`).
    """
    weights = gate_up_proj, down_proj
    in_fp8 = [isinstance(weight, Quantised) for weight in weights]
    if any(in_fp8):
        if not all(in_fp8) or base is None:
            raise ValueError("weights in FP8: expected both, and base, which gives their transposes in the backward")
        check_arithmetic("fp8", "fp8", *down_proj.values.shape[1:])
    elif any(hidden_states.dtype != weight.dtype for weight in weights):
        raise ValueError(
            f"hidden_states are {hidden_states.dtype}, base weights {gate_up_proj.dtype} and {down_proj.dtype};"
            " expected one dtype"
        )
    else:
        weights = [weight.detach().contiguous() for weight in weights]
    if hidden_states.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"hidden_states are {hidden_states.dtype}; the kernels compute in torch.bfloat16 or torch.float32"
        )
    frozen = (top_k_index, *weights, scaling, mode, base)
    return FusedExperts.apply(hidden_states, top_k_weights, *gate, *up, *down, frozen)
