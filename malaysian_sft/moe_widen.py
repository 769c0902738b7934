"""Experts whose frozen weights are stored in FP8: widened right before a product, into room that all layers share.

Widened, a layer's experts are as large as ever, so there is room for one layer's only (`WideRoom`). Where products are
FP8 too, the room holds a layer's transposed bytes for its backward instead. An autograd function must not save what it
got from there for its backward, but ask for it again: FusedExperts does, with `base`, on a GPU, and ReferenceAgain on a
CPU.
"""

import torch
import triton
import triton.language as tl

from malaysian_sft.fp8 import BLOCK, Quantised, scale_shape, widen
from malaysian_sft.moe_autograd import projections
from malaysian_sft.moe_fp8 import transpose_weights


@triton.jit
def widen_kernel(
    values, scales, out,
    rows, columns, block_rows, block_columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: blocks of all matrices, columns fastest, as the scales lie. values: bytes of (matrices, rows, columns)
    E4M3; out: the same shape in any float dtype."""
    block = tl.program_id(0)
    row = block // block_columns % block_rows * BLOCK + tl.arange(0, BLOCK)
    column = block % block_columns * BLOCK + tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    matrix = (block // (block_columns * block_rows)).to(tl.int64)
    at = (matrix * rows + row[:, None]) * columns + column[None, :]
    # E4M3 has a sign, 4 bits of exponent, 3 of mantissa: moved to fp16's places it is 2**-8 of its value, subnormals
    # included. So a device needs no FP8 of its own.
    bits = tl.load(values + at, mask=inside, other=0).to(tl.int16)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    wide = half.to(tl.float32) * 256.0 * tl.load(scales + block)
    wide = tl.where((bits & 0x7F) == 0x7F, float("nan"), wide)
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=inside)


@torch.no_grad()
def widen_stack(values, scales, out):
    """values (matrices, rows, columns) in FP8 with scales (matrices, block rows, block columns), widened into `out`,
    contiguous, of that shape and any float dtype: by the kernel on a GPU, matrix by matrix on a CPU."""
    matrices, rows, columns = values.shape
    if not values.is_cuda:
        for value, scale, target in zip(values, scales, out, strict=True):
            target.copy_(widen(value, scale))
        return
    blocks = scale_shape(rows, columns)
    grid = (matrices * blocks[0] * blocks[1],)
    widen_kernel[grid](
        values.contiguous().view(torch.uint8),
        scales.contiguous(),
        out,
        rows,
        columns,
        *blocks,
        BLOCK=BLOCK,
        num_warps=8,
    )


class WideRoom:
    """Room for the widened, or the transposed, experts of one layer. Layers take turns in it: what it holds is good
    until another asks, or the same one for the other."""

    def __init__(self):
        self.room, self.holder, self.what, self.held = None, None, None, ()

    @torch.no_grad()
    def widened(self, holder, stacks, dtype):
        """The `stacks` of `holder`, [(values (E, out, in), scales (E, parts * n, m), parts)], in `dtype`; parts:
        matrices with blocks of their own that an expert's rows are made of."""
        return self._held(holder, dtype, stacks, dtype.itemsize, lambda *stack: self._widen(*stack, dtype))

    @torch.no_grad()
    def transposed(self, holder, stacks):
        """The `stacks` of `holder`, [(values, scales, parts)], as Quantised weights (E, in, out), to multiply with in
        FP8. Parts have whole blocks."""
        return self._held(
            holder,
            "transposed",
            stacks,
            1,
            lambda room, values, scales, _: transpose_weights(Quantised(values, scales), room),
        )

    def _held(self, holder, what, stacks, width, make):
        """What `make` makes of each stack in its part of the room, `width` bytes a value."""
        if self.holder is holder and self.what == what:  # as in a backward right after a recomputation
            return self.held
        sizes, device = [values.numel() * width for values, _, _ in stacks], stacks[0][0].device
        if self.room is None or self.room.numel() < sum(sizes) or self.room.device != device:
            self.room = None  # before the next one is allocated
            self.room = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        parts = self.room[: sum(sizes)].split(sizes)
        self.held = tuple(make(part, *stack) for part, stack in zip(parts, stacks, strict=True))
        self.holder, self.what = holder, what
        return self.held

    @staticmethod
    def _widen(room, values, scales, parts, dtype):
        matrices = values.unflatten(1, (parts, -1)).flatten(0, 1)  # (E * parts, out / parts, in)
        out = room.view(dtype).view(matrices.shape)
        widen_stack(matrices, scales.unflatten(1, (parts, -1)).flatten(0, 1), out)
        return out.view(values.shape)

    def forget(self, holder):
        """To be called when the weights of `holder` change."""
        if self.holder is holder:
            self.holder = None


class ReferenceAgain(torch.autograd.Function):
    """`block`, moe_lora_reference, over base weights that are asked for again in the backward, where the rest of what
    it computes is made again with them. Its gradients are autograd's through `block`."""

    @staticmethod
    def forward(ctx, block, base, scaling, x, top_k_index, top_k_weights, *adapters):
        ctx.block, ctx.base, ctx.scaling = block, base, scaling
        ctx.save_for_backward(x, top_k_index, top_k_weights, *adapters)
        return block(x, top_k_index, top_k_weights, *base(), *projections(adapters), scaling)

    @staticmethod
    def backward(ctx, gradient):
        needed = ctx.needs_input_grad[3:]
        given = [
            t if t is None else t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=True)
        ]
        x, top_k_index, top_k_weights, *adapters = given
        with torch.enable_grad():
            out = ctx.block(x, top_k_index, top_k_weights, *ctx.base(), *projections(adapters), ctx.scaling)
        found = iter(torch.autograd.grad(out, [t for t, n in zip(given, needed, strict=True) if n], gradient))
        return None, None, None, *(next(found) if n else None for n in needed)
