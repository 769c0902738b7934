"""The MLP half of a dense decoder layer under LoRA or DoRA as one autograd function, and the layer made of both halves.

    out = mlp_half(layer, h, normed, rstd)       out = h + down(silu(gate(normed)) * up(normed))

Kept for the backward: h and its rstd, the LoRA inner products, gate and up; with `recompute`, gate and up are computed
again. The normed input is made again from h, and silu(gate) * up from gate and up.

Letters as in attention_half.py; I = width of gate and up:

    1  u = n A^T, gate, up = n W^T + s u B^T       5  a, dgate, dup from da, gate, up
    2  a = silu(gate) up                           6  dAd = s du^T a, dBd = s dout^T ud
    3  out = h + a Wd^T + s ud Bd^T, ud = a Ad^T   7  dn = dgate Wg + dup Wu + s du A, du = dgate Bg, dup Bu
    4  da = dout Wd + s du Ad, du = dout Bd        8  dA = s du^T n, dB = s dgate^T u; dh = dout + norm'(dn)

A layer's parameters are read when they are used, in the backward too: ZeRO-3 may bring them back to another place.
"""

import types

import torch
import triton
import triton.language as tl
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from malaysian_sft.account import dense_level
from malaysian_sft.attention_half import (
    adapters_of,
    alike,
    attention_half,
    comes_back,
    is_like,
    plain_lora,
    scale_of,
    together,
    why_not_fusable,
)
from malaysian_sft.norm_rope import by_kernel, column_products, rms_norm_backward, rms_norm_forward, scaled


@triton.jit
def silu_mul_kernel(gate_ptr, up_ptr, a_ptr, n, BLOCK: tl.constexpr):
    """Grid (blocks of all n values,): a = silu(gate) up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(a_ptr + at, (gate * tl.sigmoid(gate) * up).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_backward_kernel(gate_ptr, up_ptr, da_ptr, dgate_ptr, dup_ptr, n, BLOCK: tl.constexpr):
    """Grid (blocks of all n values,): dgate and dup, and a in place of da. dgate and dup may take gate's and up's
    place."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    da = tl.load(da_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dtype: tl.constexpr = da_ptr.dtype.element_ty
    tl.store(da_ptr + at, (silu * up).to(dtype), mask=mask)
    tl.store(dgate_ptr + at, (da * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype), mask=mask)
    tl.store(dup_ptr + at, (da * silu).to(dtype), mask=mask)


def swiglu(gate, up):
    """silu(gate) * up, of (T, I) each, contiguous; computed in fp32."""
    if not by_kernel(gate):
        return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)
    a, n, block = torch.empty_like(gate), gate.numel(), 4096
    silu_mul_kernel[(triton.cdiv(n, block),)](gate, up, a, n, BLOCK=block, num_warps=8)
    return a


def swiglu_backward(gate, up, da, in_place):
    """(a, dgate, dup) of a = silu(gate) * up from da (T, I), whose place a takes; in_place: dgate and dup take gate's
    and up's."""
    dgate, dup = (gate, up) if in_place else (torch.empty_like(gate), torch.empty_like(up))
    if by_kernel(gate):
        n, block = gate.numel(), 4096
        silu_mul_backward_kernel[(triton.cdiv(n, block),)](gate, up, da, dgate, dup, n, BLOCK=block, num_warps=8)
        return da, dgate, dup
    wide_gate, wide_up, wide_da = gate.float(), up.float(), da.float()  # gate, up and da themselves in fp32
    sigmoid = wide_gate.sigmoid()
    silu = wide_gate * sigmoid
    found = silu * wide_up, wide_da * wide_up * (sigmoid + silu * (1 - sigmoid)), wide_da * silu
    return tuple(place.copy_(value) for place, value in zip((da, dgate, dup), found, strict=True))


class GatedMLP(torch.autograd.Function):
    """Steps 1 to 8, (T, H) -> (T, H). `normed` has no gradient of its own: h's is the sum of both ways.

    facts: (modules gate, up and down, weight of the norm, its eps, scaling, recompute); scales: DoRA's of gate and up
    side by side (2 I,) and of down (H,), fp32, or None. Kept with DoRA: the output of down as well.
    """

    @staticmethod
    def forward(ctx, h, normed, rstd, facts, scale, down_scale, *adapters):
        (*_, down), _, _, scaling, recompute = facts
        A, A_down, *B = together(adapters, 2, h.dtype)
        u = normed @ A.T  # (T, 2 r)
        gate, up = gate_and_up(normed, u, B[:2], facts, scale)
        a = swiglu(gate, up)
        kept = [] if recompute else [gate, up]
        del gate, up
        u_down = a @ A_down.T  # (T, r)
        if down_scale is None:
            out, y = torch.addmm(h, a, down.weight.T), None
            out.addmm_(u_down, B[2].T, alpha=scaling)
            out = out if down.bias is None else out.add_(down.bias)
        else:
            y = (a @ down.weight.T).addmm_(u_down, B[2].T, alpha=scaling)
            y = scaled(y, down_scale, out=y)
            out = h + y
        ctx.adapters = adapters if comes_back(adapters) else None
        kept_adapters = [] if ctx.adapters else [A, A_down, *B]
        ctx.save_for_backward(h, rstd, u, u_down, scale, down_scale, y, *kept_adapters, *kept)
        ctx.facts, ctx.dtypes = facts, [adapter.dtype for adapter in adapters]
        return out

    @staticmethod
    def backward(ctx, dout):
        h, rstd, u, u_down, scale, down_scale, y, *rest = ctx.saved_tensors
        kept_adapters, kept = rest[:5], rest[5:]
        if ctx.adapters:
            kept_adapters, kept = together(ctx.adapters, 2, h.dtype), rest
        A, A_down, B_gate, B_up, B_down = kept_adapters
        del rest
        (gate_proj, up_proj, down), norm_weight, eps, scaling, _ = ctx.facts
        dout = dout.contiguous()
        n, _, _ = rms_norm_forward(h, norm_weight, eps, rstd=rstd)
        gate, up = kept or gate_and_up(n, u, (B_gate, B_up), ctx.facts, scale)
        if kept and scale is None:  # they are written over; a second backward is refused, not wrong
            torch.autograd.graph.increment_version(kept)
        del kept
        dscale = ddown_scale = None
        d = dout
        if down_scale is not None:
            ddown_scale, d = column_products(dout, y) / down_scale, scaled(dout, down_scale)
        du = d @ B_down  # (T, r)
        da = (d @ down.weight).addmm_(du, A_down, alpha=scaling)
        a, dgate, dup = swiglu_backward(gate, up, da, in_place=scale is None)
        grad_A_down, grad_B_down = (du.T @ a).mul_(scaling), (d.T @ u_down).mul_(scaling)
        del a, da
        if scale is not None:
            dscale = torch.cat([column_products(dgate, gate), column_products(dup, up)]) / scale
            gate_scale, up_scale = (part.contiguous() for part in scale.chunk(2))
            dgate, dup = scaled(dgate, gate_scale, out=dgate), scaled(dup, up_scale, out=dup)
        du = torch.empty_like(u)
        for part, dpart, b in zip(du.chunk(2, 1), (dgate, dup), (B_gate, B_up), strict=True):
            torch.mm(dpart, b, out=part)
        grads_B = [(dpart.T @ inner).mul_(scaling) for dpart, inner in zip((dgate, dup), u.chunk(2, 1), strict=True)]
        grads_A = (du.T @ n).mul_(scaling).chunk(2)
        grads = [*grads_A, grad_A_down, *grads_B, grad_B_down]
        grads = [grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
        dn = (du @ (A * scaling)).addmm_(dgate, gate_proj.weight).addmm_(dup, up_proj.weight)
        return rms_norm_backward(dn, h, norm_weight, rstd, dout), None, None, None, dscale, ddown_scale, *grads


def gate_and_up(n, u, B, facts, scale):
    """(gate, up) (T, I) from the normed input n (T, H), its LoRA inner products u (T, 2 r), B of both, and DoRA's scale
    (2 I,) or None."""
    modules, *_, scaling, _ = facts
    found = []
    scales = (None, None) if scale is None else scale.chunk(2)
    for module, inner, b, part in zip(modules[:2], u.chunk(2, 1), B, scales, strict=True):
        y = n @ module.weight.T if module.bias is None else torch.addmm(module.bias, n, module.weight.T)
        y.addmm_(inner, b.T, alpha=scaling)
        found.append(y if part is None else scaled(y, part.contiguous(), out=y))
    return found


def mlp_half(layer, h, normed, rstd):
    """h + MLP(normed), (T, H); h, normed and rstd as `attention_half` returns them."""
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    projections = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    bases = [module.get_base_layer() for module in projections]
    facts = bases, norm.weight, norm.variance_epsilon, projections[0].scaling["default"], layer.recompute == "selective"
    scales = scale_of(projections[:2]), scale_of(projections[2:])
    return GatedMLP.apply(h, normed.detach(), rstd, facts, *scales, *adapters_of(projections))


# ----------------------------------------------------------------------------------------------------------------------
# In place of transformers' layer
# ----------------------------------------------------------------------------------------------------------------------


def dense_layer(layer, hidden, position_embeddings, boundaries, longest):
    """A decoder layer over packed documents, (T, H) -> (T, H); arguments as attention_half's."""
    kept = layer.recompute != "full"
    half = attention_half(layer, hidden, position_embeddings, boundaries, longest, rotate_again=kept)
    return mlp_half(layer, *half)


def dense_forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False,
                  position_embeddings=None, cu_seq_lens_q=None, max_length_q=None, **kwargs):  # fmt: skip
    """A decoder layer's forward over one row of packed documents; with a mask or a cache, transformers' own."""
    if attention_mask is not None or past_key_values is not None or cu_seq_lens_q is None:
        kwargs |= dict(cu_seq_lens_q=cu_seq_lens_q, max_length_q=max_length_q, position_ids=position_ids)
        kwargs |= dict(past_key_values=past_key_values, use_cache=use_cache, position_embeddings=position_embeddings)
        return type(self).forward(self, hidden_states, attention_mask=attention_mask, **kwargs)
    inputs = self, hidden_states[0], position_embeddings, cu_seq_lens_q, max_length_q
    if self.recompute != "full" or not torch.is_grad_enabled():
        return dense_layer(*inputs)[None]
    # inside the layer's forward, so that ZeRO-3, which hangs on modules' calls, sees one forward and one backward
    again = torch.utils.checkpoint.checkpoint(dense_layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return again[None]


def why_not_dense(layer):
    """What keeps a decoder layer from `dense_forward`, in words; None if nothing does."""
    if (reason := why_not_fusable(layer)) is not None:
        return reason
    mlp = layer.mlp
    if not is_like(mlp, llama.LlamaMLP):
        return f"{type(mlp).__name__}.forward is not down(act(gate) * up)"
    if not isinstance(mlp.act_fn, (torch.nn.SiLU, SiLUActivation)):
        return f"its activation is {type(mlp.act_fn).__name__}"
    projections = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if not all(plain_lora(module) for module in projections):
        return "a projection has no LoRA, or dropout"
    if not alike(projections):
        return "projections differ in rank or scaling"
    if mlp.gate_proj.use_dora["default"] and any(module.get_base_layer().bias is not None for module in projections):
        return "a projection of its MLP has DoRA and a bias"
    return None


def fuse_dense_layer(layer):
    """Give a dense decoder layer the fused forward, with `recompute`, "none"; returns None, or in words
    why it stays as transformers wrote it."""
    if (reason := why_not_dense(layer)) is None:
        layer.recompute = "none"
        layer.forward = types.MethodType(dense_forward, layer)
    return reason


def set_recompute(causal_lm, policy, frugal_layers=0):
    """Have the backward of every layer compute again what `dense_level` says: nothing; gate and up (selective); or all
    (full), as layers that are not fused do for selective too."""
    layers = causal_lm.base_model.layers
    levels = [dense_level(policy, i, frugal_layers) for i in range(len(layers))]
    if any(level != "none" and not hasattr(layer, "recompute") for layer, level in zip(layers, levels, strict=True)):
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    for layer, level in zip(layers, levels, strict=True):
        fused = hasattr(layer, "recompute")
        layer.gradient_checkpointing = not fused and level != "none"
        if fused:
            layer.recompute = level
