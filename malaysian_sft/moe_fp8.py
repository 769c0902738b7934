"""Products of the experts block in FP8, in Triton: activations quantised by rows, weights transposed, grouped products
with block scales.

Both operands of a tensor core's FP8 product lie along K, the dimension that is summed over. The forward's weights do;
dX's sum is over their rows, so for it a layer's bytes are transposed, right before its backward, into the room that the
widened weights would have had (WideRoom), which is half of that. A block of 128 x 128 keeps its scale both ways.
"""

import torch
import triton
import triton.language as tl

from malaysian_sft.fp8 import BLOCK, FP8, Quantised
from malaysian_sft.moe_routing import precision_of, rank_block


@triton.jit
def quantised(x):
    """(x / scale in FP8, scale) of each row of x, fp32: fp8.quantise_rows, to the bit."""
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 1), 448.0), 1.1754943508222875e-38)
    return (x * tl.div_rn(1.0, scale)[:, None]).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["rows"])
def quantise_kernel(
    x_ptr, stride_xm, q_ptr, stride_qm, scale_ptr, stride_sk, rows, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (blocks of rows, columns / BLOCK): x (rows, columns) as FP8 and its scales (columns / BLOCK, rows)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    wide_row = row.to(tl.int64)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + wide_row * stride_xm + column, mask=inside[:, None], other=0.0)
    values, scale = quantised(x.to(tl.float32))
    tl.store(q_ptr + wide_row * stride_qm + column, values, mask=inside[:, None])
    tl.store(scale_ptr + tl.program_id(1).to(tl.int64) * stride_sk + row, scale, mask=inside)


def empty_quantised(rows, columns, device):
    """Room for activations (rows, columns)."""
    scales = torch.empty(columns // BLOCK, rows, dtype=torch.float32, device=device)
    return Quantised(torch.empty(rows, columns, dtype=FP8, device=device), scales)


def quantise_activations(x):
    """x (rows, columns), rows contiguous, as Quantised."""
    rows, columns = x.shape
    out = empty_quantised(rows, columns, x.device)
    quantise_kernel[(triton.cdiv(rows, 32), columns // BLOCK)](
        x, x.stride(0), out.values, out.values.stride(0), out.scales, out.scales.stride(0), rows,
        BLOCK_M=32, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def transpose_kernel(values_ptr, out_ptr, rows, columns, BLOCK: tl.constexpr):
    """Grid (blocks of BLOCK x BLOCK of all matrices,): out (matrices, columns, rows) = values (matrices, rows, columns)
    transposed, bytes, both sides multiples of BLOCK."""
    column_blocks = columns // BLOCK
    blocks = rows // BLOCK * column_blocks
    matrix = (tl.program_id(0) // blocks).to(tl.int64) * rows * columns
    block = tl.program_id(0) % blocks
    row = block // column_blocks * BLOCK + tl.arange(0, BLOCK)
    column = block % column_blocks * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + matrix + row[:, None] * columns + column[None, :])
    tl.store(out_ptr + matrix + column[:, None] * rows + row[None, :], tl.trans(values))


@torch.no_grad()
def transpose_weights(weight, out=None):
    """Quantised weights (E, rows, columns) as (E, columns, rows), into `out`, bytes, if given."""
    values = weight.values.contiguous().view(torch.uint8)
    E, rows, columns = values.shape
    out = torch.empty_like(values) if out is None else out
    out = out.view(E, columns, rows)
    transpose_kernel[(E * (rows // BLOCK) * (columns // BLOCK),)](values, out, rows, columns, BLOCK=BLOCK, num_warps=8)
    return Quantised(out.view(FP8), weight.scales.transpose(1, 2).contiguous())


@triton.jit
def grouped_gemm_fp8_kernel(
    a_ptr, stride_am, a_scale_ptr, stride_ask, row_token_ptr,
    w_ptr, w_segment, stride_we, stride_wn, w_scale_ptr, w_scale_segment, stride_wse, stride_wsn,
    u_ptr, u_segment, l0_ptr, l1_ptr, stride_le, stride_ln, stride_lr,
    out_ptr, stride_om,
    tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr,
    N, K, R,
    SEGMENTS: tl.constexpr, GATHER: tl.constexpr, BOTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles * SEGMENTS * N / BLOCK,): out = A W_e^T + U L_e^T, A and W in FP8, one GEMM for all experts.

    As grouped_gemm_kernel, N and K multiples of BLOCK, K contiguous in W. Each step along K is one block of scales: its
    products are summed by the tensor cores, then scaled and added in fp32. SEGMENTS = 2: gate and up, the latter
    w_segment further in W and N columns further in out; BOTH: U_0 L_0^T + U_1 L_1^T.
    """
    column_tiles = N // BLOCK
    tile = tl.program_id(0) // (column_tiles * SEGMENTS)
    if tile >= tl.load(num_tiles_ptr):
        return
    segment = (tl.program_id(0) % (column_tiles * SEGMENTS)) // column_tiles
    block = tl.program_id(0) % column_tiles
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    row_mask = rows < tl.load(offsets_ptr + expert + 1)
    if GATHER:
        a_rows = tl.load(row_token_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    else:
        a_rows = rows.to(tl.int64)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    ks = tl.arange(0, BLOCK)
    a = a_ptr + a_rows[:, None] * stride_am + ks[None, :]
    w = w_ptr + segment * w_segment + expert * stride_we + columns[None, :].to(tl.int64) * stride_wn + ks[:, None]
    a_scales = a_scale_ptr + a_rows
    w_scales = w_scale_ptr + segment * w_scale_segment + expert * stride_wse + block * stride_wsn
    acc = tl.zeros((BLOCK_M, BLOCK), dtype=tl.float32)
    for _k in range(0, K, BLOCK):
        a_tile = tl.load(a, mask=row_mask[:, None], other=0.0)
        scale = tl.load(a_scales, mask=row_mask, other=0.0) * tl.load(w_scales)
        acc += tl.dot(a_tile, tl.load(w)) * scale[:, None]
        a += BLOCK
        w += BLOCK
        a_scales += stride_ask
        w_scales += 1

    l_ptr = l0_ptr
    if SEGMENTS == 2:
        if segment == 1:
            l_ptr = l1_ptr
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        rs = r + tl.arange(0, BLOCK_R)
        u_mask = row_mask[:, None] & (rs < R)[None, :]
        l_mask = (rs < R)[:, None]
        l_offsets = expert * stride_le + columns[None, :].to(tl.int64) * stride_ln + rs[:, None] * stride_lr
        u = u_ptr + segment * u_segment + rows.to(tl.int64)[:, None] * R + rs[None, :]
        acc = tl.dot(
            tl.load(u, mask=u_mask, other=0.0),
            tl.load(l_ptr + l_offsets, mask=l_mask, other=0.0),
            acc,
            input_precision=PRECISION,
        )
        if BOTH:
            acc = tl.dot(
                tl.load(u + u_segment, mask=u_mask, other=0.0),
                tl.load(l1_ptr + l_offsets, mask=l_mask, other=0.0),
                acc,
                input_precision=PRECISION,
            )
    out = out_ptr + rows.to(tl.int64)[:, None] * stride_om + (segment * N + columns)[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])


def grouped_gemm_fp8(a, weight, out, routing, tiles, *, gather=False, lora, segments=1):
    """out (S, N), or (S, 2N) of two segments, = A W_e^T + U L_e^T; see grouped_gemm_fp8_kernel. a: Quantised
    activations; weight: Quantised, (E, N, K) or (E, 2N, K); lora: (U, [L, ...]), two of one segment are added up."""
    u, ls = lora
    E, N, K = weight.values.shape
    N, r = N // segments, ls[0].shape[2]
    grouped_gemm_fp8_kernel[(routing.tile_expert.numel() * segments * (N // BLOCK),)](
        a.values, a.values.stride(0), a.scales, a.scales.stride(0), routing.row_token,
        weight.values, N * weight.values.stride(1), *weight.values.stride()[:2],
        weight.scales, N // BLOCK * weight.scales.stride(1), *weight.scales.stride()[:2],
        u, routing.row_token.numel() * r, ls[0], ls[-1], *ls[0].stride(),
        out, out.stride(0),
        routing.tile_expert, routing.tile_row, routing.num_tiles, routing.offsets,
        N, K, r,
        SEGMENTS=segments, GATHER=gather, BOTH=segments == 1 and len(ls) == 2,
        BLOCK_M=tiles.block_m, BLOCK=BLOCK, BLOCK_R=min(64, rank_block(r)), PRECISION=precision_of(out.dtype),
        num_warps=8 if tiles.block_m > 64 else 4, num_stages=2,
    )  # fmt: skip
    return out
