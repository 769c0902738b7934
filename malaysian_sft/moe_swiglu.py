"""SwiGLU in the experts block, forward and backward, in Triton; the backward also sums the gradients that need it."""

import triton
import triton.language as tl

TINY = tl.constexpr(2.0**-60)


@triton.jit
def nonzero(x):
    """x, but at least 2^-60 in size. Only gate and a = silu(gate) up are kept, and d(gate) = da up silu'(gate) is had
    from them as da a (1 / gate + 1 - sigmoid(gate)). That loses no precision in a format with fp32's exponents, unless
    gate or DoRA's scale of up is zero, so neither may be."""
    return tl.where(tl.abs(x) < TINY, TINY, x)


@triton.jit
def swiglu_kernel(
    gate_up_ptr, gate_scale_ptr, up_scale_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr, INTERMEDIATE,
    DORA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column blocks of I): in gate_up (S, 2I), a = silu(gate) up takes up's place, DoRA's scales (E,
    I) applied first."""
    tile = tl.program_id(0)
    if tile >= tl.load(num_tiles_ptr):
        return
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    column_mask = columns < INTERMEDIATE
    mask = (rows < tl.load(offsets_ptr + expert + 1))[:, None] & column_mask[None, :]
    rows = rows.to(tl.int64)[:, None]
    gate_ptr = gate_up_ptr + rows * (2 * INTERMEDIATE) + columns[None, :]
    up_ptr = gate_ptr + INTERMEDIATE
    computed = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    gate = nonzero(computed)
    tl.store(gate_ptr, gate.to(gate_up_ptr.dtype.element_ty), mask=mask & (gate != computed))
    up = tl.load(up_ptr, mask=mask, other=0.0).to(tl.float32)
    if DORA:
        gate *= tl.load(gate_scale_ptr + expert * INTERMEDIATE + columns, mask=column_mask, other=0.0)[None, :]
        up *= nonzero(tl.load(up_scale_ptr + expert * INTERMEDIATE + columns, mask=column_mask, other=0.0))[None, :]
        gate = nonzero(gate)
    tl.store(up_ptr, (gate * tl.sigmoid(gate) * up).to(gate_up_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S"])
def swiglu_backward_kernel(
    da_ptr, gate_a_ptr, u_ptr, u_segment, dv_ptr, gate_scale_ptr, up_scale_ptr, row_weight_ptr, offsets_ptr, order_ptr,
    dB_gate_ptr, dB_up_ptr, dA_down_ptr, dw_ptr, dgate_scale_ptr, dup_scale_ptr, S, INTERMEDIATE, R,
    DORA: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks of I, E): everything that needs a, d(gate) and d(up), in one sweep over the expert's rows.

    da (S, I) and dv (S, R) are per unit of router weight. Overwrites gate and a (S, 2I) with the gradients of gate and
    up (before DoRA's scale: of W x + s B A x); writes dB_gate, dB_up (E, I, R), dA_down (E, R, I), DoRA's dscale (E,
    I), and this block's part of d(router weight) = <a, da> to dw (column blocks, S).
    """
    block = tl.program_id(0)
    expert = tl.load(order_ptr + tl.program_id(1)).to(tl.int64)
    first = tl.load(offsets_ptr + expert)
    last = tl.load(offsets_ptr + expert + 1)
    columns = block * BLOCK_I + tl.arange(0, BLOCK_I)
    column_mask = columns < INTERMEDIATE
    rs = tl.arange(0, BLOCK_R)
    dB_gate = tl.zeros((BLOCK_I, BLOCK_R), dtype=tl.float32)
    dB_up = tl.zeros((BLOCK_I, BLOCK_R), dtype=tl.float32)
    dA_down = tl.zeros((BLOCK_I, BLOCK_R), dtype=tl.float32)
    if DORA:
        gate_scale = tl.load(gate_scale_ptr + expert * INTERMEDIATE + columns, mask=column_mask, other=0.0)[None, :]
        up_scale = nonzero(tl.load(up_scale_ptr + expert * INTERMEDIATE + columns, mask=column_mask, other=0.0))
        dgate_scale = tl.zeros((BLOCK_S, BLOCK_I), dtype=tl.float32)  # summed over rows only once, at the end
        dup_scale = tl.zeros((BLOCK_S, BLOCK_I), dtype=tl.float32)
    dtype: tl.constexpr = da_ptr.dtype.element_ty
    for start in range(first, last, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)
        row_mask = rows < last
        rows = rows.to(tl.int64)
        mask = row_mask[:, None] & column_mask[None, :]
        low_rank = rows[:, None] * R + rs[None, :]
        low_rank_mask = row_mask[:, None] & (rs < R)[None, :]
        offsets = rows[:, None] * (2 * INTERMEDIATE) + columns[None, :]
        gate = tl.load(gate_a_ptr + offsets, mask=mask, other=1.0).to(tl.float32)
        a = tl.load(gate_a_ptr + offsets + INTERMEDIATE, mask=mask, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + rows[:, None] * INTERMEDIATE + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(row_weight_ptr + rows, mask=row_mask, other=0.0)
        u_gate = tl.load(u_ptr + low_rank, mask=low_rank_mask, other=0.0)
        u_up = tl.load(u_ptr + u_segment + low_rank, mask=low_rank_mask, other=0.0)
        dv = tl.load(dv_ptr + low_rank, mask=low_rank_mask, other=0.0).to(tl.float32) * weight[:, None]
        if DORA:
            gate_before = gate
            gate = nonzero(gate * gate_scale)
        sigmoid = tl.sigmoid(gate)
        share = a * da
        tl.store(dw_ptr + block.to(tl.int64) * S + rows, tl.sum(share, 1), mask=row_mask)
        share *= weight[:, None]
        dgate = share * (1.0 / gate + (1.0 - sigmoid))
        dup = da * weight[:, None] * (gate * sigmoid)
        if DORA:
            dgate_scale += dgate * gate_before
            dup_scale += share  # dup * up, and so up_scale times what is wanted
            dgate *= gate_scale
            dup *= up_scale[None, :]
        dgate = dgate.to(dtype)
        dup = dup.to(dtype)
        tl.store(gate_a_ptr + offsets, dgate, mask=mask)
        tl.store(gate_a_ptr + offsets + INTERMEDIATE, dup, mask=mask)
        dB_gate = tl.dot(tl.trans(dgate), u_gate, dB_gate, input_precision=PRECISION)
        dB_up = tl.dot(tl.trans(dup), u_up, dB_up, input_precision=PRECISION)
        dA_down = tl.dot(tl.trans(a.to(dtype)), dv.to(dtype), dA_down, input_precision=PRECISION)
    mask = column_mask[:, None] & (rs < R)[None, :]
    dB = (expert * INTERMEDIATE + columns[:, None]) * R + rs[None, :]
    tl.store(dB_gate_ptr + dB, dB_gate.to(dB_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(dB_up_ptr + dB, dB_up.to(dB_up_ptr.dtype.element_ty), mask=mask)
    dA = (expert * R + rs[None, :]) * INTERMEDIATE + columns[:, None]
    tl.store(dA_down_ptr + dA, dA_down.to(dA_down_ptr.dtype.element_ty), mask=mask)
    if DORA:
        tl.store(dgate_scale_ptr + expert * INTERMEDIATE + columns, tl.sum(dgate_scale, 0), mask=column_mask)
        tl.store(dup_scale_ptr + expert * INTERMEDIATE + columns, tl.sum(dup_scale, 0) / up_scale, mask=column_mask)
