"""LoRA and DoRA on the routed experts of a mixture-of-experts layer, frozen base, forward and backward.

A drop-in for the experts modules of transformers 5 (`gate_up_proj (E, 2I, H)`, `down_proj (E, H, I)`):

    model = AutoModelForCausalLM.from_pretrained(...)
    wrap_experts(model, r=32, lora_alpha=64)        # every mlp.experts becomes a FusedMoELoRA; returns how many

On a GPU (Ampere or newer) the Triton kernels run, on a CPU the reference: plain PyTorch, any dtype.
Tests: `pytest tests/test_fused_moe_lora.py`; benchmark: `python benchmarks/bench_fused_moe_lora.py`.

Letters: T tokens; E experts; top_k experts a token; S = T * top_k routed rows, sorted by expert; H hidden; I expert intermediate;
r LoRA rank; s = scaling. Per routed row, with x its token's hidden state, w its router weight and dout its token's upstream gradient:

    forward                                       backward, da and dv per unit of router weight
    1  u = s x A1^T        gate and up each       6  dB2 = (w dout)^T v
    2  gate_up = x W1^T + u B1^T                  7  dv = s dout B2
       a = silu(gate) up                          8  da = dout W2 + dv A2;  dw = <a, da>, so that y need not be kept
    3  v = s a A2^T                                  d(gate_up) from w da;  9  dB1 = d(gate_up)^T u;  10  dA2 = (w dv)^T a
    4  y = a W2^T + v B2^T                        11 du = s d(gate_up) B1
    5  out = sum over the token's rows of w y     12 dA1 = du^T x
                                                  13 dx = sum over the token's rows of d(gate_up) W1 + du A1

There is no dW: the base is frozen. DoRA multiplies the outputs of 2 and 4 by magnitude / ||W + s B A||, row by row of W; then y is
kept, and dout is multiplied by the scale before 8 (B2 is, before 7). The reference, the kernels and the launches below keep these
numbers' order.
"""

import inspect
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

WORK_COUNTERS = 32  # for hopper_gemm_kernel's launches on one routing, 16 bytes apart
Y_SLICES, DX_SLICES = 2, 4  # an (S, H) temporary exists one part of its columns at a time; beside dx's are the adapters' gradients
TINY = tl.constexpr(2.0**-60)

# ------------------------------------------------------------------------------------------------------------------------------
# Reference
# ------------------------------------------------------------------------------------------------------------------------------


def moe_lora_reference(
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up_proj,
    down_proj,
    gate_proj_lora_A,
    gate_proj_lora_B,
    up_proj_lora_A,
    up_proj_lora_B,
    down_proj_lora_A,
    down_proj_lora_B,
    scaling,
    gate_scale=None,
    up_scale=None,
    down_scale=None,
):
    """The experts block in plain PyTorch; autograd gives every gradient. One pair of matrix products per expert that has rows.

    hidden_states (T, H); top_k_index (T, top_k) integers in [0, E); top_k_weights (T, top_k); gate_up_proj (E, 2I, H), gate rows
    first; down_proj (E, H, I); lora_A (E, r, in), lora_B (E, out, r); scaling a float. DoRA: gate_scale and up_scale (E, I),
    down_scale (E, H), each magnitude / ||W + scaling B A|| (see `dora_scale`). Computes in hidden_states' dtype, whatever the
    dtype of the rest; returns (T, H) in that dtype.
    """
    tokens, top_k = top_k_index.shape
    dtype = hidden_states.dtype
    order = top_k_index.reshape(-1).argsort(stable=True)  # (S,) routed rows sorted by expert
    rows_per_expert = torch.bincount(top_k_index.reshape(-1), minlength=gate_up_proj.shape[0]).tolist()
    x_sorted = hidden_states[order // top_k]  # (S, H)

    def project(x, weight, lora_A, lora_B, scale):
        y = F.linear(x, weight.to(dtype)) + scaling * F.linear(F.linear(x, lora_A.to(dtype)), lora_B.to(dtype))
        return y if scale is None else y * scale.to(dtype)

    outputs = []
    for e, x in enumerate(x_sorted.split(rows_per_expert)):
        if x.shape[0] == 0:
            continue
        gate_weight, up_weight = gate_up_proj[e].chunk(2)
        gate = project(x, gate_weight, gate_proj_lora_A[e], gate_proj_lora_B[e], None if gate_scale is None else gate_scale[e])
        up = project(x, up_weight, up_proj_lora_A[e], up_proj_lora_B[e], None if up_scale is None else up_scale[e])
        activation = F.silu(gate) * up  # (rows, I)
        y = project(activation, down_proj[e], down_proj_lora_A[e], down_proj_lora_B[e], None if down_scale is None else down_scale[e])
        outputs.append(y)  # (rows, H)
    y_sorted = torch.cat(outputs) if outputs else hidden_states.new_zeros(0, hidden_states.shape[1])
    y = torch.empty_like(y_sorted).index_copy(0, order, y_sorted).view(tokens, top_k, -1)  # back in token order
    return (y * top_k_weights.to(dtype).unsqueeze(-1)).sum(dim=1)  # (T, H)


# ------------------------------------------------------------------------------------------------------------------------------
# Kernels. Row tiles never cross experts: tile i covers rows tile_row[i] .. tile_row[i] + BLOCK_M - 1 of expert tile_expert[i], cut at
# offsets[expert + 1]; num_tiles is a device scalar, so grids are sized by the upper bound S // BLOCK_M + E and the rest exits at once.
#
#   array            shape    dtype   meaning
#   row_token        (S,)     int32   token of a sorted row
#   row_weight       (S,)     fp32    router weight of a sorted row
#   token_row        (S,)     int32   sorted row of (token, choice)
#   offsets          (E+1,)   int32   first sorted row of an expert
#   tile_expert      (tiles,) int32   expert of a row tile
#   tile_row         (tiles,) int32   first sorted row of a row tile
#   order            (E+1,)   int32   experts, those with most rows first; then how many of them are long: over twice the mean
#   counters         (128,)   int32   work items drawn so far, every fourth for one launch of hopper_gemm_kernel
# ------------------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["S", "num_blocks"])
def count_kernel(index_ptr, S, counts_ptr, num_blocks, E, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Grid (blocks of BLOCK routed rows,): counts (E, blocks) = rows of each expert in each block."""
    block = tl.program_id(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(index_ptr + rows, mask=rows < S, other=BLOCK_E - 1).to(tl.int32)
    counts = tl.histogram(expert, BLOCK_E, mask=rows < S)
    experts = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + experts * num_blocks + block, counts, mask=experts < E)


@triton.jit(do_not_specialize=["num_blocks"])
def scan_kernel(counts_ptr, num_blocks, totals_ptr, BLOCK_B: tl.constexpr):
    """Grid (E,): turn an expert's counts per block into the rows it has in earlier blocks; totals (E,) = all its rows."""
    expert = tl.program_id(0)
    running = 0
    for start in range(0, num_blocks, BLOCK_B):
        blocks = start + tl.arange(0, BLOCK_B)
        counts = tl.load(counts_ptr + expert * num_blocks + blocks, mask=blocks < num_blocks, other=0)
        before = tl.cumsum(counts, 0) - counts + running
        tl.store(counts_ptr + expert * num_blocks + blocks, before, mask=blocks < num_blocks)
        running += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, running)


@triton.jit(do_not_specialize=["S", "max_tiles"])
def tile_kernel(
    totals_ptr, E, S, offsets_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr, max_tiles, counters_ptr, order_ptr,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, COUNTERS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of BLOCK row tiles,): offsets, order and tile map: a tile belongs to the first expert whose tiles end after it."""
    experts = tl.arange(0, BLOCK_E)
    totals = tl.load(totals_ptr + experts, mask=experts < E, other=0)
    starts = tl.cumsum(totals, 0) - totals
    tiles = (totals + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    first_row = starts - (tile_ends - tiles) * BLOCK_M  # of the expert, less the rows that its first tile's number stands for
    row = tl.sum(tl.where(owner[:, None] == experts[None, :], first_row[None, :], 0), 1) + tile * BLOCK_M
    used = (tile < max_tiles) & (owner < E)
    tl.store(tile_expert_ptr + tile, owner, mask=used)
    tl.store(tile_row_ptr + tile, row, mask=used)
    # an expert's place in the order; there are at least as many row tiles as experts, so that every expert has its turn
    rows = tl.load(totals_ptr + tile, mask=tile < E, other=0)
    others = tl.where(experts < E, totals, -1)
    before = (others[None, :] > rows[:, None]) | ((others[None, :] == rows[:, None]) & (experts[None, :] < tile[:, None]))
    tl.store(order_ptr + tl.sum(before.to(tl.int32), 1), tile, mask=tile < E)
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + experts, starts, mask=experts < E)
        tl.store(offsets_ptr + E, S)
        tl.store(num_tiles_ptr, tl.sum(tiles, 0))
        tl.store(order_ptr + E, tl.sum((totals > 2 * S // E).to(tl.int32), 0))
        tl.store(counters_ptr + tl.arange(0, COUNTERS), 0)


@triton.jit(do_not_specialize=["S", "num_blocks"])
def place_kernel(
    index_ptr, weight_ptr, S, top_k, counts_ptr, num_blocks, offsets_ptr, token_row_ptr, row_token_ptr, row_weight_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of BLOCK routed rows,): a stable counting sort; counts (E, blocks) holds the rows in earlier blocks."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    rows = block * BLOCK + lane
    mask = rows < S
    expert = tl.load(index_ptr + rows, mask=mask, other=-1).to(tl.int32)
    earlier = (expert[None, :] == expert[:, None]) & (lane[None, :] < lane[:, None])
    position = tl.sum(earlier.to(tl.int32), 1)
    position += tl.load(counts_ptr + expert * num_blocks + block, mask=mask, other=0)
    position += tl.load(offsets_ptr + expert, mask=mask, other=0)
    tl.store(token_row_ptr + rows, position, mask=mask)
    tl.store(row_token_ptr + position, rows // top_k, mask=mask)
    tl.store(row_weight_ptr + position, tl.load(weight_ptr + rows, mask=mask, other=0.0).to(tl.float32), mask=mask)


@triton.jit
def grouped_gemm_kernel(
    a_ptr, stride_am, a_segment, row_token_ptr,
    w0_ptr, w1_ptr, stride_we, stride_wn, stride_wk,
    u_ptr, u_segment, l0_ptr, l1_ptr, stride_le, stride_ln, stride_lr,
    out_ptr, stride_om, out_segment,
    tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr,
    N, K, R, alpha,
    SEGMENTS: tl.constexpr, JOINED: tl.constexpr, GATHER: tl.constexpr, LORA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles * SEGMENTS * column tiles,): out = alpha (A W_e^T + U L_e^T), one GEMM for all experts.

    A (rows, K), through row_token if GATHER; W (E, N, K) and L (E, N, R) with any strides. SEGMENTS = 2 does two products side by
    side (gate and up): segment i takes w{i}, l{i}, U + i * u_segment, columns of A from i * a_segment, and writes from out +
    i * out_segment; JOINED does both in one tile, which must hold 2N columns. LORA: "no"; "own" adds the segment's U L^T; "both" adds
    U_0 L_0^T + U_1 L_1^T (for dx, to which gate and up both contribute).
    """
    column_tiles = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // (column_tiles * SEGMENTS)
    if tile >= tl.load(num_tiles_ptr):
        return
    segment = (tl.program_id(0) % (column_tiles * SEGMENTS)) // column_tiles
    column = tl.program_id(0) % column_tiles * BLOCK_N
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    row_mask = rows < tl.load(offsets_ptr + expert + 1)
    if GATHER:
        a_rows = tl.load(row_token_ptr + rows, mask=row_mask, other=0).to(tl.int64)
    else:
        a_rows = rows.to(tl.int64)
    columns = column + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    ks = tl.arange(0, BLOCK_K)

    w_ptr = w0_ptr
    l_ptr = l0_ptr
    if SEGMENTS == 2:
        if segment == 1:
            w_ptr = w1_ptr
            l_ptr = l1_ptr
    if JOINED:
        second = columns // N
        column_mask = second < 2
        columns = columns % N
        w_columns = tl.where(second == 0, w0_ptr, w1_ptr) + columns.to(tl.int64) * stride_wn
        out_columns = second * out_segment + columns
    else:
        w_columns = w_ptr + columns.to(tl.int64) * stride_wn
        out_columns = segment * out_segment + columns
    a = a_ptr + segment * a_segment + a_rows[:, None] * stride_am + ks[None, :]
    w = w_columns[None, :] + (expert * stride_we + ks[:, None] * stride_wk)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        k_mask = k + ks < K
        a_tile = tl.load(a, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        w_tile = tl.load(w, mask=column_mask[None, :] & k_mask[:, None], other=0.0)
        acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)
        a += BLOCK_K
        w += BLOCK_K * stride_wk

    if LORA != "no":
        for r in tl.range(0, R, BLOCK_R, num_stages=1):  # a ring for these too would not fit beside the first one on small GPUs
            rs = r + tl.arange(0, BLOCK_R)
            u_mask = row_mask[:, None] & (rs < R)[None, :]
            l_mask = column_mask[None, :] & (rs < R)[:, None]
            l_offsets = expert * stride_le + columns[None, :].to(tl.int64) * stride_ln + rs[:, None] * stride_lr
            u = u_ptr + segment * u_segment + rows.to(tl.int64)[:, None] * R + rs[None, :]
            acc = tl.dot(
                tl.load(u, mask=u_mask, other=0.0), tl.load(l_ptr + l_offsets, mask=l_mask, other=0.0), acc, input_precision=PRECISION
            )
            if LORA == "both":
                u += u_segment
                acc = tl.dot(
                    tl.load(u, mask=u_mask, other=0.0),
                    tl.load(l1_ptr + l_offsets, mask=l_mask, other=0.0),
                    acc,
                    input_precision=PRECISION,
                )
    out = out_ptr + rows.to(tl.int64)[:, None] * stride_om + out_columns[None, :]
    tl.store(out, (acc * alpha).to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def nonzero(x):
    """x, but at least 2^-60 in size. Only gate and a = silu(gate) up are kept, and d(gate) = da up silu'(gate) is had from them as
    da a (1 / gate + 1 - sigmoid(gate)). That loses no precision in a format with fp32's exponents, unless gate or DoRA's scale of up
    is zero, so neither may be."""
    return tl.where(tl.abs(x) < TINY, TINY, x)


@triton.jit
def swiglu_kernel(
    gate_up_ptr, gate_scale_ptr, up_scale_ptr, tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr, INTERMEDIATE,
    DORA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column blocks of I): in gate_up (S, 2I), a = silu(gate) up takes up's place, DoRA's scales (E, I) applied first."""
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

    da (S, I) and dv (S, R) are per unit of router weight. Overwrites gate and a (S, 2I) with the gradients of gate and up (before
    DoRA's scale: of W x + s B A x); writes dB_gate, dB_up (E, I, R), dA_down (E, R, I), DoRA's dscale (E, I), and this block's part
    of d(router weight) = <a, da> to dw (column blocks, S).
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


@triton.jit
def expert_and_block(order_ptr, E, blocks):
    """Expert and column block of a program of a kernel that gathers (T, N) rows expert by expert. The long experts come first, because
    the last of their programs would keep the others waiting; then, for each column block, all other experts: what programs that run
    together gather is a few columns of all tokens, which stay in L2 while a token's top_k experts read them."""
    item = tl.program_id(0)
    longs = tl.load(order_ptr + E)
    rest = item - longs * blocks
    is_long = rest < 0
    place = tl.where(is_long, item // blocks, longs + rest % tl.maximum(E - longs, 1))
    block = tl.where(is_long, item % blocks, rest // tl.maximum(E - longs, 1))
    return tl.load(order_ptr + place).to(tl.int64), block


@triton.jit
def lora_grad_kernel(
    x_ptr, row_token_ptr, row_weight_ptr, y_ptr, y_segment, offsets_ptr, order_ptr, E,
    d0_ptr, d1_ptr, stride_de, stride_dn, stride_dr, N, R,
    SEGMENTS: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (E * column blocks of N,): d{i}_e = X_e^T Y_i, the gradient of an A or a B, X (T, N) gathered through row_token.

    Y (SEGMENTS, S, R), its rows times row_weight if WEIGHTED; d{i} (E, N, R) with any strides.
    """
    expert, block = expert_and_block(order_ptr, E, tl.cdiv(N, BLOCK_N))
    first = tl.load(offsets_ptr + expert)
    last = tl.load(offsets_ptr + expert + 1)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    rs = tl.arange(0, BLOCK_R)
    d0 = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    d1 = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    for start in range(first, last, BLOCK_S):
        rows = start + tl.arange(0, BLOCK_S)
        row_mask = rows < last
        tokens = tl.load(row_token_ptr + rows, mask=row_mask, other=0).to(tl.int64)
        x = tl.load(x_ptr + tokens[:, None] * N + columns[None, :], mask=row_mask[:, None] & column_mask[None, :], other=0.0)
        low_rank = rows.to(tl.int64)[:, None] * R + rs[None, :]
        low_rank_mask = row_mask[:, None] & (rs < R)[None, :]
        y = tl.load(y_ptr + low_rank, mask=low_rank_mask, other=0.0)
        if WEIGHTED:
            weight = tl.load(row_weight_ptr + rows, mask=row_mask, other=0.0)
            y = (y.to(tl.float32) * weight[:, None]).to(x.dtype)
        d0 = tl.dot(tl.trans(x), y, d0, input_precision=PRECISION)
        if SEGMENTS == 2:
            d1 = tl.dot(tl.trans(x), tl.load(y_ptr + y_segment + low_rank, mask=low_rank_mask, other=0.0), d1, input_precision=PRECISION)
    d = expert * stride_de + columns[:, None].to(tl.int64) * stride_dn + rs[None, :] * stride_dr
    mask = column_mask[:, None] & (rs < R)[None, :]
    tl.store(d0_ptr + d, d0.to(d0_ptr.dtype.element_ty), mask=mask)
    if SEGMENTS == 2:
        tl.store(d1_ptr + d, d1.to(d1_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dora_down_kernel(
    dout_ptr, row_token_ptr, row_weight_ptr, v_ptr, y_ptr, scale_ptr, offsets_ptr, order_ptr, dB_ptr, dscale_ptr, N, R,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks of N = H, E): the start of DoRA's backward through the down projection, per unit of router weight.

    y (S, N), saved without its scale, is overwritten with scale * dout, the gradient of W2 a + s B2 A2 a; also dB (E, N, R) = its
    weighted product with v (S, R), and dscale (E, N) = sum of row_weight dout y. The next rows are loaded while these are worked on.
    """
    expert = tl.load(order_ptr + tl.program_id(1)).to(tl.int64)
    first = tl.load(offsets_ptr + expert)
    last = tl.load(offsets_ptr + expert + 1)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    rs = tl.arange(0, BLOCK_R)
    scale = tl.load(scale_ptr + expert * N + columns, mask=column_mask, other=0.0)[None, :]
    dscale = tl.zeros((BLOCK_S, BLOCK_N), dtype=tl.float32)
    dB = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    rows = first + tl.arange(0, BLOCK_S)
    mask = (rows < last)[:, None] & column_mask[None, :]
    tokens = tl.load(row_token_ptr + rows, mask=rows < last, other=0).to(tl.int64)
    next_dout = tl.load(dout_ptr + tokens[:, None] * N + columns[None, :], mask=mask, other=0.0)
    next_y = tl.load(y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=mask, other=0.0)
    for start in range(first, last, BLOCK_S):
        dout = next_dout.to(tl.float32)
        y = next_y.to(tl.float32)
        rows = start + BLOCK_S + tl.arange(0, BLOCK_S)
        mask = (rows < last)[:, None] & column_mask[None, :]
        tokens = tl.load(row_token_ptr + rows, mask=rows < last, other=0).to(tl.int64)
        next_dout = tl.load(dout_ptr + tokens[:, None] * N + columns[None, :], mask=mask, other=0.0)
        next_y = tl.load(y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=mask, other=0.0)

        rows = start + tl.arange(0, BLOCK_S)
        row_mask = rows < last
        weight = tl.load(row_weight_ptr + rows, mask=row_mask, other=0.0)[:, None]
        v = tl.load(v_ptr + rows.to(tl.int64)[:, None] * R + rs[None, :], mask=row_mask[:, None] & (rs < R)[None, :], other=0.0)
        dscale += dout * y * weight
        dy = (dout * scale).to(v.dtype)
        tl.store(y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], dy, mask=row_mask[:, None] & column_mask[None, :])
        dB = tl.dot(tl.trans(dy), (v.to(tl.float32) * weight).to(v.dtype), dB, input_precision=PRECISION)
    tl.store(
        dB_ptr + (expert * N + columns[:, None]) * R + rs[None, :],
        dB.to(dB_ptr.dtype.element_ty),
        mask=column_mask[:, None] & (rs < R)[None, :],
    )
    tl.store(dscale_ptr + expert * N + columns, tl.sum(dscale, 0), mask=column_mask)


@triton.jit
def combine_kernel(
    y_ptr, stride_ys, token_row_ptr, index_ptr, weight_ptr, scale_ptr, out_ptr, stride_ot, N, WIDTH,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, DORA: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (T, column blocks): out (T, N) = sum over a token's choices, in their order, of weight * scale_e * y (S, N). No atomics."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < N
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(token_row_ptr + token * TOP_K + choice).to(tl.int64)
        y = tl.load(y_ptr + row * stride_ys + columns, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weight_ptr + token * TOP_K + choice).to(tl.float32)
        if DORA:
            expert = tl.load(index_ptr + token * TOP_K + choice).to(tl.int64)
            y *= tl.load(scale_ptr + expert * WIDTH + columns, mask=mask, other=0.0)
        acc += y
    tl.store(out_ptr + token * stride_ot + columns, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["S"])
def router_grad_kernel(dw_ptr, token_row_ptr, out_ptr, S, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (blocks of BLOCK,): gradient of the top-k weights, (T, top_k): the column blocks' parts added up, in token order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_row_ptr + index, mask=index < S, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(BLOCKS):
        acc += tl.load(dw_ptr + block * S + row, mask=index < S, other=0.0)
    tl.store(out_ptr + index, acc.to(out_ptr.dtype.element_ty), mask=index < S)


# ------------------------------------------------------------------------------------------------------------------------------
# The same grouped GEMM for Hopper, in Gluon: tiles of 128 x 256, one program per multiprocessor. A producer warpgroup keeps a ring of
# shared-memory stages full (bulk tensor copies for weights and plain A, cp.async for gathered A); two consumer warpgroups multiply 64
# rows each by the common 256 columns and write their results out behind the next tile's products. The producer draws work items from a
# counter, so that neighbouring items, which share weights, run at the same time: with a fixed assignment the programs drift apart and
# the 235B block's GEMMs read three times as much from memory.
# ------------------------------------------------------------------------------------------------------------------------------


@gluon.jit
def hopper_work(item, N, column_tiles, tile_expert_ptr, tile_row_ptr, offsets_ptr, WIDTH: gl.constexpr, GROUP: gl.constexpr):
    """Expert, first row, first column and row limit of a work item. Up to GROUP row tiles of an expert go side by side through its
    column tiles, so that programs that run together share weights: each weight is read from memory about once. Where N is no multiple of
    WIDTH the last tile begins earlier, over its neighbour, and both write the same bits: faster than copies that reach outside."""
    tile = item // column_tiles
    expert = gl.load(tile_expert_ptr + tile)
    first = gl.load(offsets_ptr + expert)
    last = gl.load(offsets_ptr + expert + 1)
    index = (gl.load(tile_row_ptr + tile) - first) // 128
    group = index // GROUP * GROUP
    size = gl.minimum(gl.cdiv(last - first, 128) - group, GROUP)
    local = item - (tile - index + group) * column_tiles
    column = gl.maximum(gl.minimum(local // size * WIDTH, N - WIDTH), 0)
    return expert, first + (group + local % size) * 128, column, last


@gluon.jit
def hopper_producer(
    a_desc, a_ptr, stride_am, row_token_ptr, w_desc, w_rows, u_desc, l0_desc, l1_desc, l_rows,
    tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr, counter_ptr, a_smem, w_smem, full, empty, work, announced, taken,
    N, K, R, S,
    BLOCK_R: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr, K_MAJOR: gl.constexpr, HALVES: gl.constexpr,
    LORAS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = 256 // HALVES
    column_tiles = gl.cdiv(N, WIDTH)
    total = gl.load(num_tiles_ptr) * column_tiles
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    ks = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(0, layout)), 0)
    item = gl.program_id(0)
    expert, row, column, last = hopper_work(
        gl.minimum(item, total - 1), N, column_tiles, tile_expert_ptr, tile_row_ptr, offsets_ptr, WIDTH, GROUP
    )
    if GATHER:
        token0 = gl.load(row_token_ptr + row + lane, mask=row + lane < last, other=0)
        token1 = gl.load(row_token_ptr + row + 64 + lane, mask=row + 64 + lane < last, other=0)
    step = 0
    count = 0
    while item < total:
        hopper_announce(expert, row, column, last, count, work, announced, taken)
        count += 1
        # the next item is drawn, and its coordinates loaded, while this one's copies are under way
        next_item = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        next_expert, next_row, next_column, next_last = hopper_work(
            gl.minimum(next_item, total - 1), N, column_tiles, tile_expert_ptr, tile_row_ptr, offsets_ptr, WIDTH, GROUP
        )
        if GATHER:
            a0 = a_ptr + gl.expand_dims(token0.to(gl.int64) * stride_am, 1) + ks
            a1 = a_ptr + gl.expand_dims(token1.to(gl.int64) * stride_am, 1) + ks
            mask0 = gl.expand_dims(row + lane < last, 1)
            mask1 = gl.expand_dims(row + 64 + lane < last, 1)
            token0 = gl.load(row_token_ptr + next_row + lane, mask=next_row + lane < next_last, other=0)
            token1 = gl.load(row_token_ptr + next_row + 64 + lane, mask=next_row + 64 + lane < next_last, other=0)
        for k in range(0, K, 64):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            bar = full.index(slot)
            w = w_smem.index(slot)
            if GATHER:
                mbarrier.expect(bar, 256 * 64 * 2)
            else:
                mbarrier.expect(bar, (128 + 256) * 64 * 2)
                tma.async_copy_global_to_shared(a_desc, [row, k], bar, a_smem.index(slot * 2))
                tma.async_copy_global_to_shared(a_desc, [row + 64, k], bar, a_smem.index(slot * 2 + 1))
            if HALVES == 2:
                tma.async_copy_global_to_shared(w_desc, [expert * w_rows + column, k], bar, w.slice(0, 128))
                tma.async_copy_global_to_shared(w_desc, [expert * w_rows + N + column, k], bar, w.slice(128, 128))
            elif K_MAJOR:
                tma.async_copy_global_to_shared(w_desc, [expert * w_rows + column, k], bar, w)
            else:
                tma.async_copy_global_to_shared(w_desc, [expert * w_rows + k, column], bar, w)
            if GATHER:
                async_copy.async_copy_global_to_shared(a_smem.index(slot * 2), a0, mask=mask0)
                async_copy.async_copy_global_to_shared(a_smem.index(slot * 2 + 1), a1, mask=mask1)
                async_copy.mbarrier_arrive(bar, increment_count=False)
                a0 += 64
                a1 += 64
            step += 1
        for i in gl.static_range(LORAS):
            for r in range(0, R, BLOCK_R):
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
                bar = full.index(slot)
                mbarrier.expect(bar, (128 + 256) * BLOCK_R * 2)
                for half in gl.static_range(2):
                    u = a_smem.index(slot * 2 + half)._reinterpret(gl.bfloat16, [64, BLOCK_R], u_desc.layout)
                    tma.async_copy_global_to_shared(u_desc, [i * S + row + 64 * half, r], bar, u)  # U_1's rows follow U_0's
                desc = l0_desc if i == 0 else l1_desc
                lora = w_smem.index(slot)._reinterpret(gl.bfloat16, [256, BLOCK_R] if K_MAJOR else [BLOCK_R, 256], desc.layout)
                if HALVES == 2:
                    for half in gl.static_range(2):
                        # gate's B for the gate half, zeros for the other: columns from R on lie outside the tensor
                        start = r if half == i else R
                        tma.async_copy_global_to_shared(desc, [expert * l_rows + column, start], bar, lora.slice(half * 128, 128))
                elif K_MAJOR:
                    tma.async_copy_global_to_shared(desc, [expert * l_rows + column, r], bar, lora)
                else:
                    tma.async_copy_global_to_shared(desc, [expert * l_rows + r, column], bar, lora)
                if GATHER:
                    async_copy.mbarrier_arrive(bar, increment_count=False)
                step += 1
        item, expert, row, column, last = next_item, next_expert, next_row, next_column, next_last
    hopper_announce(-1, row, column, last, count, work, announced, taken)  # the end: the consumers stop


@gluon.jit
def hopper_announce(expert, row, column, last, count, work, announced, taken):
    """The producer tells the consumers what comes next, up to two items ahead, so that they need not look it up in global memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = count % 2
    mbarrier.wait(taken.index(slot), ((count // 2) & 1) ^ 1)
    work.index(slot * 4).store(gl.full([1], expert, gl.int32, layout))
    work.index(slot * 4 + 1).store(gl.full([1], row, gl.int32, layout))
    work.index(slot * 4 + 2).store(gl.full([1], column // 64, gl.int32, layout))
    work.index(slot * 4 + 3).store(gl.full([1], last, gl.int32, layout))
    mbarrier.arrive(announced.index(slot), count=1)


@gluon.jit
def hopper_next(count, work, announced, taken):
    """A consumer's count-th item, as the producer announced it: expert (-1 at the end), first row, first column, row limit."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = count % 2
    mbarrier.wait(announced.index(slot), (count // 2) & 1)
    expert = gl.max(work.index(slot * 4).load(layout), axis=0)
    row = gl.max(work.index(slot * 4 + 1).load(layout), axis=0)
    column = gl.max(work.index(slot * 4 + 2).load(layout), axis=0) * 64
    last = gl.max(work.index(slot * 4 + 3).load(layout), axis=0)
    mbarrier.arrive(taken.index(slot), count=1)
    return expert, row, column, last


@gluon.jit
def hopper_store(smem, desc, ptr, stride, row, column, last, limit):
    """Write 64 x 128 staged values: by a bulk store that runs on behind, or row by row if not all rows are the tile's."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    if row + 64 <= last:
        tma.async_copy_shared_to_global(desc, [row, column], smem)  # leaves out columns that are not the tensor's
    else:
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
        pointers = ptr + gl.expand_dims(rows.to(gl.int64) * stride, 1) + gl.expand_dims(columns, 0)
        gl.store(pointers, smem.load(layout), mask=gl.expand_dims(rows < last, 1) & gl.expand_dims(columns < limit, 0))


@gluon.jit
def hopper_consumer(
    out_desc, out_ptr, stride_om, scale0_ptr, scale1_ptr,
    a_smem, w_smem, o_smem, full, empty, work, announced, taken, multiplied, N, K, R,
    WHO: gl.constexpr, BLOCK_R: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr, K_MAJOR: gl.constexpr, HALVES: gl.constexpr,
    LORAS: gl.constexpr, DORA: gl.constexpr,
):  # fmt: skip
    o_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    u_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_R], gl.bfloat16)
    l_shape: gl.constexpr = [256, BLOCK_R] if K_MAJOR else [BLOCK_R, 256]
    l_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(l_shape, gl.bfloat16)
    steps = gl.cdiv(K, 64)
    lora_steps = LORAS * gl.cdiv(R, BLOCK_R)
    step = 0
    held = -1  # the stage that the last tile's results were staged in
    count = 0
    expert, row, column, last = hopper_next(count, work, announced, taken)
    while expert >= 0:
        row += 64 * WHO
        if row >= last:
            # an expert's last tile with nothing in these 64 rows: only hand the stages back
            held = hopper_hand_back(held, empty)
            for _k in range(steps + lora_steps):
                mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.arrive(empty.index(step % STAGES), count=1)
                step += 1
            mbarrier.arrive(multiplied, count=1)
            mbarrier.wait(multiplied, count & 1)
        else:
            acc = gl.zeros((64, 256), gl.float32, acc_layout)
            for k in range(steps):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), (step // STAGES) & 1)
                if GATHER:
                    fence_async_shared()
                w = w_smem.index(slot)
                if K_MAJOR:
                    w = w.permute((1, 0))
                acc = warpgroup_mma(a_smem.index(slot * 2 + WHO), w, acc, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
                if k > 0:
                    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
                else:
                    held = hopper_hand_back(held, empty)
                step += 1
            for _k in range(lora_steps):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), (step // STAGES) & 1)
                u = a_smem.index(slot * 2 + WHO)._reinterpret(gl.bfloat16, [64, BLOCK_R], u_layout)
                lora = w_smem.index(slot)._reinterpret(gl.bfloat16, l_shape, l_layout)
                if K_MAJOR:
                    lora = lora.permute((1, 0))
                acc = warpgroup_mma(u, lora, acc, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
                step += 1
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))

            # all 64 x 256 results go to shared memory at once, half of them into the weights of the last stage, which is held back for it
            mbarrier.arrive(multiplied, count=1)
            mbarrier.wait(multiplied, count & 1)
            held = (step + STAGES - 1) % STAGES
            left, right = acc.reshape([64, 2, 128]).permute(0, 2, 1).split()
            if HALVES == 2:
                left = hopper_rounded(nonzero(left))
            o0 = o_smem.index(WHO)
            o1 = w_smem.index(held)._reinterpret(gl.bfloat16, [2, 64, 128], o_layout).index(WHO)
            o0.store(left.to(gl.bfloat16))
            if HALVES == 2:
                right = hopper_swiglu(left, right, scale0_ptr, scale1_ptr, expert * N + column, DORA)
            o1.store(right.to(gl.bfloat16))
            fence_async_shared()
            second = column + 128 if HALVES == 1 else column + N
            hopper_store(o0, out_desc, out_ptr, stride_om, row, column, last, N * HALVES)
            hopper_store(o1, out_desc, out_ptr, stride_om, row, second, last, N * HALVES)
        count += 1
        expert, row, column, last = hopper_next(count, work, announced, taken)
    tma.store_wait(0)


@gluon.jit
def hopper_hand_back(held, empty):
    """Give the producer the stage back that results were staged in, once the bulk stores have read them."""
    if held >= 0:
        tma.store_wait(0)
        mbarrier.arrive(empty.index(held), count=1)
    return -1


@gluon.jit
def hopper_swiglu(gate, up, gate_scale_ptr, up_scale_ptr, offset, DORA: gl.constexpr):
    """silu(gate) up, of 64 x 128 values, DoRA's scales (per column, from `offset`) applied first."""
    if DORA:
        columns = gl.arange(0, 128, layout=gl.SliceLayout(0, gate.type.layout))
        gate *= gl.expand_dims(gl.load(gate_scale_ptr + offset + columns), 0)
        up *= gl.expand_dims(nonzero(gl.load(up_scale_ptr + offset + columns)), 0)
        gate = nonzero(gate)
    return gate * hopper_sigmoid(gate) * up


@gluon.jit
def hopper_rounded(x):
    """The fp32 values that x has in bf16. Two at a time, since converting one alone takes the slow unit that exponentials need."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 pair; cvt.rn.bf16x2.f32 pair, $3, $2; shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000; }",
        "=f,=f,f,f", [x], dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["S"])
def hopper_gemm_kernel(
    a_desc, a_ptr, stride_am, row_token_ptr, w_desc, w_rows, u_desc, l0_desc, l1_desc, l_rows,
    out_desc, out_ptr, stride_om, scale0_ptr, scale1_ptr,
    tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr, counter_ptr, N, K, R, S,
    BLOCK_R: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr, K_MAJOR: gl.constexpr, HALVES: gl.constexpr,
    LORAS: gl.constexpr, GROUP: gl.constexpr, DORA: gl.constexpr,
):  # fmt: skip
    """Grid (multiprocessors,): grouped_gemm_kernel's out = A W_e^T + U L_e^T, every operand a 2-D matrix with experts stacked by rows.

    w_desc: (E * w_rows, K) if K_MAJOR, else K rows of N columns per expert; l_desc likewise with R for K. HALVES = 2: columns n of gate
    and of up (N rows further down in W) make one tile, and out (S, 2N) gets gate and, in up's place, a = silu(gate) up.
    """
    w_shape: gl.constexpr = [256, 64] if K_MAJOR else [64, 256]
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(w_shape, gl.bfloat16)
    a_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, 64, 64], a_layout)
    w_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, w_shape[0], w_shape[1]], w_layout)
    o_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16)
    o_smem = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], o_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129 if GATHER else 1)  # every producer thread reports its own cp.async copies
        mbarrier.init(empty.index(i), count=2)
    work = gl.allocate_shared_memory(gl.int32, [8, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    announced = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(announced.index(i), count=1)
        mbarrier.init(taken.index(i), count=2)
    multiplied = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(multiplied, count=2)
    fence_async_shared()
    gl.warp_specialize([
        (hopper_consumer, (
            out_desc, out_ptr, stride_om, scale0_ptr, scale1_ptr,
            a_smem, w_smem, o_smem, full, empty, work, announced, taken, multiplied, N, K, R,
            0, BLOCK_R, STAGES, GATHER, K_MAJOR, HALVES, LORAS, DORA)),
        (hopper_consumer, (
            out_desc, out_ptr, stride_om, scale0_ptr, scale1_ptr,
            a_smem, w_smem, o_smem, full, empty, work, announced, taken, multiplied, N, K, R,
            1, BLOCK_R, STAGES, GATHER, K_MAJOR, HALVES, LORAS, DORA)),
        (hopper_producer, (
            a_desc, a_ptr, stride_am, row_token_ptr, w_desc, w_rows, u_desc, l0_desc, l1_desc, l_rows,
            tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr, counter_ptr, a_smem, w_smem, full, empty, work, announced, taken,
            N, K, R, S,
            BLOCK_R, STAGES, GATHER, K_MAJOR, HALVES, LORAS, GROUP)),
    ], [4, 4], [224, 64])  # fmt: skip


@gluon.jit
def hopper_swiglu_backward_load(
    gate_a_desc, da_desc, u_desc, dv_desc, row, column, INTERMEDIATE, S, slot, pred,
    full, gate_smem, a_smem, da_smem, u_gate_smem, u_up_smem, dv_smem,
):  # fmt: skip
    """Fetch what one step needs: rows of gate, of a and of da, WIDTH columns each, and of gate's u, up's u and dv."""
    BLOCK_S: gl.constexpr = gate_a_desc.block_shape[0]
    WIDTH: gl.constexpr = gate_a_desc.block_shape[1]
    BLOCK_R: gl.constexpr = u_desc.block_shape[1]
    bar = full.index(slot)
    mbarrier.expect(bar, 3 * (WIDTH + BLOCK_R) * BLOCK_S * 2, pred=pred)
    tma.async_copy_global_to_shared(gate_a_desc, [row, column], bar, gate_smem.index(slot), pred=pred)
    tma.async_copy_global_to_shared(gate_a_desc, [row, INTERMEDIATE + column], bar, a_smem.index(slot), pred=pred)
    tma.async_copy_global_to_shared(da_desc, [row, column], bar, da_smem.index(slot), pred=pred)
    tma.async_copy_global_to_shared(u_desc, [row, 0], bar, u_gate_smem.index(slot), pred=pred)
    tma.async_copy_global_to_shared(u_desc, [S + row, 0], bar, u_up_smem.index(slot), pred=pred)
    tma.async_copy_global_to_shared(dv_desc, [row, 0], bar, dv_smem.index(slot), pred=pred)


@gluon.jit
def hopper_reciprocal(x):
    """1 / x by the approximate instruction, whose error is far below bf16's: the exact division takes ten."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def hopper_sigmoid(x):
    """1 / (1 + exp(-x)) by approximate instructions, also far below bf16's error."""
    return gl.inline_asm_elementwise(
        "{ ex2.approx.ftz.f32 $0, $1; add.ftz.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0; }",
        "=f,f", [x * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["S"])
def hopper_swiglu_backward_kernel(
    gate_a_desc, gate_a_ptr, da_desc, u_desc, dv_desc, gate_scale_ptr, up_scale_ptr, row_weight_ptr, offsets_ptr, order_ptr,
    dB_gate_ptr, dB_up_ptr, dA_down_ptr, dw_ptr, dgate_scale_ptr, dup_scale_ptr, S, INTERMEDIATE, R,
    DORA: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """swiglu_backward_kernel for Hopper, INTERMEDIATE a multiple of WIDTH. Grid (INTERMEDIATE / WIDTH, E).

    A stage of shared memory holds one step's rows. Its gate, a and da are overwritten with d(gate), d(up) and w a, which the tensor
    cores then read for dB and dA while bulk stores write the first two out; the stage is filled again a step later.
    """
    BLOCK_S: gl.constexpr = gate_a_desc.block_shape[0]
    WIDTH: gl.constexpr = gate_a_desc.block_shape[1]
    BLOCK_R: gl.constexpr = u_desc.block_shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_R, 16])
    gate_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_S, WIDTH], gate_a_desc.layout)
    a_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_S, WIDTH], gate_a_desc.layout)
    da_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_S, WIDTH], da_desc.layout)
    u_gate_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_S, BLOCK_R], u_desc.layout)
    u_up_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_S, BLOCK_R], u_desc.layout)
    dv_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_S, BLOCK_R], dv_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()

    block = gl.program_id(0)
    column = block * WIDTH
    expert = gl.load(order_ptr + gl.program_id(1))
    first = gl.load(offsets_ptr + expert)
    last = gl.load(offsets_ptr + expert + 1)
    steps = gl.cdiv(last - first, BLOCK_S)
    for i in gl.static_range(STAGES - 1):
        hopper_swiglu_backward_load(
            gate_a_desc, da_desc, u_desc, dv_desc, first + BLOCK_S * i, column, INTERMEDIATE, S, i, i < steps,
            full, gate_smem, a_smem, da_smem, u_gate_smem, u_up_smem, dv_smem,
        )  # fmt: skip
    lane = gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    scale_columns = expert.to(gl.int64) * INTERMEDIATE + columns
    if DORA:
        gate_scale = gl.expand_dims(gl.load(gate_scale_ptr + scale_columns), 0)
        up_scale = nonzero(gl.load(up_scale_ptr + scale_columns))
        dgate_scale = gl.zeros((BLOCK_S, WIDTH), gl.float32, layout)  # summed over rows only once, at the end
        dup_scale = gl.zeros((BLOCK_S, WIDTH), gl.float32, layout)
    dB_gate = gl.zeros((WIDTH, BLOCK_R), gl.float32, acc_layout)
    dB_up = gl.zeros((WIDTH, BLOCK_R), gl.float32, acc_layout)
    dA_down = gl.zeros((WIDTH, BLOCK_R), gl.float32, acc_layout)
    for i in range(steps):
        slot = i % STAGES
        row = first + BLOCK_S * i
        rows = row + lane
        weight = gl.expand_dims(gl.load(row_weight_ptr + rows, mask=rows < last, other=0.0), 1)
        mbarrier.wait(full.index(slot), (i // STAGES) & 1)
        gate = gate_smem.index(slot).load(layout).to(gl.float32)
        a = a_smem.index(slot).load(layout).to(gl.float32)
        da = da_smem.index(slot).load(layout).to(gl.float32)
        if row + BLOCK_S > last:  # the rest are another expert's rows, perhaps overwritten already
            mine = gl.expand_dims(rows < last, 1)
            gate = gl.where(mine, gate, 1.0)
            a = gl.where(mine, a, 0.0)
            da = gl.where(mine, da, 0.0)
        if DORA:
            gate_before = gate
            gate = nonzero(gate * gate_scale)
        sigmoid = hopper_sigmoid(gate)
        dw = gl.sum(a * da, axis=1)
        a *= weight
        share = a * da
        dgate = share * (hopper_reciprocal(gate) + (1.0 - sigmoid))
        dup = da * weight * (gate * sigmoid)
        if DORA:
            dgate_scale += dgate * gate_before
            dup_scale += share  # dup * up, and so up_scale times what is wanted
            dgate *= gate_scale
            dup *= gl.expand_dims(up_scale, 0)
        dgate = dgate.to(gl.bfloat16)
        dup = dup.to(gl.bfloat16)
        dB_gate, dB_up, dA_down = warpgroup_mma_wait(num_outstanding=0, deps=(dB_gate, dB_up, dA_down))  # of the step before
        gate_smem.index(slot).store(dgate)
        a_smem.index(slot).store(dup)
        da_smem.index(slot).store(a.to(gl.bfloat16))
        fence_async_shared()
        dB_gate = warpgroup_mma(gate_smem.index(slot).permute((1, 0)), u_gate_smem.index(slot), dB_gate, is_async=True)
        dB_up = warpgroup_mma(a_smem.index(slot).permute((1, 0)), u_up_smem.index(slot), dB_up, is_async=True)
        dA_down = warpgroup_mma(da_smem.index(slot).permute((1, 0)), dv_smem.index(slot), dA_down, is_async=True)
        dB_gate, dB_up, dA_down = warpgroup_mma_wait(num_outstanding=3, deps=(dB_gate, dB_up, dA_down))
        if row + BLOCK_S <= last:
            tma.async_copy_shared_to_global(gate_a_desc, [row, column], gate_smem.index(slot))
            tma.async_copy_shared_to_global(gate_a_desc, [row, INTERMEDIATE + column], a_smem.index(slot))
        else:
            pointers = gate_a_ptr + gl.expand_dims(rows.to(gl.int64) * (2 * INTERMEDIATE), 1) + gl.expand_dims(columns, 0)
            gl.store(pointers, dgate, mask=gl.expand_dims(rows < last, 1))
            gl.store(pointers + INTERMEDIATE, dup, mask=gl.expand_dims(rows < last, 1))
        # the stage of the step before is free: the tensor cores were waited for above, its bulk stores are now
        tma.store_wait(2)
        ahead = i + STAGES - 1
        hopper_swiglu_backward_load(
            gate_a_desc, da_desc, u_desc, dv_desc, first + BLOCK_S * ahead, column, INTERMEDIATE, S, ahead % STAGES, ahead < steps,
            full, gate_smem, a_smem, da_smem, u_gate_smem, u_up_smem, dv_smem,
        )  # fmt: skip
        gl.store(dw_ptr + block.to(gl.int64) * S + rows, dw, mask=rows < last)  # last, because the fences wait for writes under way
    dB_gate, dB_up, dA_down = warpgroup_mma_wait(num_outstanding=0, deps=(dB_gate, dB_up, dA_down))

    out_columns = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, acc_layout))
    rs = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, acc_layout))
    dB = gl.expand_dims((expert.to(gl.int64) * INTERMEDIATE + out_columns) * R, 1) + gl.expand_dims(rs, 0)
    dA = gl.expand_dims((expert.to(gl.int64) * R + rs) * INTERMEDIATE, 0) + gl.expand_dims(out_columns, 1)
    mask = gl.expand_dims(rs < R, 0)
    gl.store(dB_gate_ptr + dB, dB_gate.to(dB_gate_ptr.dtype.element_ty), mask=mask)
    gl.store(dB_up_ptr + dB, dB_up.to(dB_up_ptr.dtype.element_ty), mask=mask)
    gl.store(dA_down_ptr + dA, dA_down.to(dA_down_ptr.dtype.element_ty), mask=mask)
    if DORA:
        gl.store(dgate_scale_ptr + scale_columns, gl.sum(dgate_scale, axis=0))
        gl.store(dup_scale_ptr + scale_columns, gl.sum(dup_scale, axis=0) / up_scale)
    tma.store_wait(0)


# ------------------------------------------------------------------------------------------------------------------------------
# Launching the kernels
# ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one GPU generation, or of one dtype. block_m is common to all kernels because the tile map is made once."""

    block_m: int = 128
    wide: tuple = (128, 64, 8, 3)  # BLOCK_N, BLOCK_K, warps, stages: gate_up, down, da, dx
    narrow: tuple = (64, 8, 3)  # BLOCK_K, warps, stages: u, v, dv, du, whose N is the LoRA rank
    swiglu: tuple = (64, 8)  # BLOCK_I, warps
    swiglu_backward: tuple = (16, 64, 4, 4)  # BLOCK_S, BLOCK_I, warps, stages
    lora_grad: tuple = (64, 128, 4, 4)  # BLOCK_S, BLOCK_N, warps, stages
    dora_down: tuple = (16, 128, 4)  # BLOCK_S, BLOCK_N, warps
    combine: int = 512
    sort: int = 128
    hopper: tuple | None = None  # stages, row tiles that share weights
    hopper_swiglu_backward: tuple = ((64, 64, 4, 3), (32, 64, 4, 4))  # the same; and where DoRA or a rank over 32 takes more registers


AMPERE = Tiles()
HOPPER = Tiles(hopper=(4, 8))
FULL_PRECISION = Tiles(64, (64, 32, 4, 3), (32, 4, 3), (64, 8), (16, 32, 4, 2), (32, 64, 4, 3), (16, 64, 4))  # fp32: twice the bytes
INTERPRETER = Tiles(16, (16, 16, 4, 1), (16, 4, 1), (16, 4), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4), 32, 32)


def tiles_for(device, dtype):
    """The tile sizes for a device and a compute dtype; on a CPU, where only the interpreter can run the kernels, tiny ones.

    The portable ones fit the 99 KiB of shared memory that a program has on the smallest GPUs since Ampere, at any rank up to 256.
    """
    if device.type != "cuda":
        return INTERPRETER
    if dtype == torch.float32:
        return FULL_PRECISION
    return HOPPER if torch.cuda.get_device_capability(device)[0] == 9 else AMPERE


class Routing(NamedTuple):
    """Where every routed row goes; the arrays are tabulated above the kernels."""

    index: torch.Tensor
    weight: torch.Tensor
    token_row: torch.Tensor
    row_token: torch.Tensor
    row_weight: torch.Tensor
    offsets: torch.Tensor
    tile_expert: torch.Tensor
    tile_row: torch.Tensor
    num_tiles: torch.Tensor
    counters: torch.Tensor
    order: torch.Tensor


def route(top_k_index, top_k_weights, num_experts, tiles):
    """Sort the routed rows by expert, stably, in four tiny kernels; the host never learns a count."""
    index, weight = top_k_index.contiguous(), top_k_weights.contiguous()
    S, top_k, device = index.numel(), index.shape[1], index.device
    num_blocks, max_tiles = triton.cdiv(S, tiles.sort), S // tiles.block_m + num_experts
    block_e = triton.next_power_of_2(num_experts + 1)
    sizes = [4 * WORK_COUNTERS, num_experts * num_blocks, num_experts, num_experts + 1, S, S, max_tiles, max_tiles, 1, num_experts + 1]
    # every array begins at a multiple of 16 bytes whatever T is: Triton compiles a kernel anew for each mix of aligned pointers
    room = [triton.cdiv(size, 4) * 4 for size in sizes]
    ints = torch.empty(sum(room), dtype=torch.int32, device=device)
    arrays = [part[:size] for part, size in zip(ints.split(room), sizes, strict=True)]
    counters, counts, totals, offsets, token_row, row_token, tile_expert, tile_row, num_tiles, order = arrays
    row_weight = torch.empty(S, dtype=torch.float32, device=device)
    count_kernel[(num_blocks,)](index, S, counts, num_blocks, num_experts, BLOCK=tiles.sort, BLOCK_E=block_e)
    scan_kernel[(num_experts,)](counts, num_blocks, totals, BLOCK_B=min(1024, triton.next_power_of_2(num_blocks)))
    tile_kernel[(triton.cdiv(max_tiles, 64),)](
        totals, num_experts, S, offsets, tile_expert, tile_row, num_tiles, max_tiles, counters, order,
        BLOCK_M=tiles.block_m, BLOCK=64, BLOCK_E=block_e, COUNTERS=4 * WORK_COUNTERS,
    )  # fmt: skip
    place_kernel[(num_blocks,)](
        index, weight, S, top_k, counts, num_blocks, offsets, token_row, row_token, row_weight, BLOCK=tiles.sort
    )  # fmt: skip
    return Routing(index, weight, token_row, row_token, row_weight, offsets, tile_expert, tile_row, num_tiles, counters, order)


def precision_of(dtype):
    return "ieee" if dtype == torch.float32 else "tf32"  # tf32 only concerns fp32 operands


def rank_block(r):
    return max(16, triton.next_power_of_2(r))


def columns_beside(r, block):
    """`block` columns, fewer if the rank is so large that accumulators of block x r would not stay in registers."""
    return max(16, block * 64 // max(64, rank_block(r)))


def grouped_gemm(a, weights, out, routing, tiles, *, gather=False, lora=None, both=False, alpha=1.0):
    """out = alpha (A W_e^T + U L_e^T) over all experts; see grouped_gemm_kernel.

    a (rows, K), or (rows, 2K) if each of two segments reads its own half. weights: one (E, N, K) view, or two of equal strides for two
    segments. out (S, N), or (S, 2N), or (2, S, N). lora: (U (segments, S, R), [L (E, N, R), ...]). both: one product, two LoRA terms.
    """
    E, N, K = weights[0].shape
    segments = len(weights)
    u, ls = lora if lora is not None else (a, weights[:1])
    r = ls[0].shape[2]
    own_halves = segments == 2 and a.shape[1] == 2 * K
    narrow = lora is None and N <= 128
    joined = narrow and segments == 2 and not own_halves and N <= 64
    block_n, block_k, warps, stages = (rank_block(2 * N if joined else N), *tiles.narrow) if narrow else tiles.wide
    grid_segments = 1 if joined else segments
    grouped_gemm_kernel[(routing.tile_expert.numel() * grid_segments * triton.cdiv(N, block_n),)](
        a, a.stride(0), K if own_halves else 0, routing.row_token,
        weights[0], weights[-1], *weights[0].stride(),
        u, routing.row_token.numel() * r, ls[0], ls[-1], *ls[0].stride(),
        out, out.stride(-2), 0 if segments == 1 else out.stride(0) if out.dim() == 3 else N,
        routing.tile_expert, routing.tile_row, routing.num_tiles, routing.offsets,
        N, K, r, alpha,
        SEGMENTS=grid_segments, JOINED=joined, GATHER=gather, LORA="no" if lora is None else "both" if both else "own",
        BLOCK_M=tiles.block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=min(64, rank_block(r)), PRECISION=precision_of(a.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def hopper_gemm(a, weight, out, routing, tiles, *, launch, gather=False, lora, swiglu=False, scales=None):
    """out (S, N) = A W_e^T + U L_e^T by hopper_gemm_kernel. weight, and each of lora's, an (E, N, K) view with K or N contiguous.

    swiglu: weight is the whole gate_up_proj, lora has gate's and up's B, and out (S, 2N) gets gate and silu(gate) up, the latter after
    DoRA's scales (gate's and up's (E, N)) if given. launch: a number below WORK_COUNTERS, different for every launch on one routing.
    """
    u, loras = lora
    stages, group = tiles.hopper
    halves = 2 if swiglu else 1
    E, N, K = weight.shape[0], weight.shape[1] // halves, weight.shape[2]
    r = loras[0].shape[2]
    block_r = min(64, rank_block(r))
    k_major = weight.stride(2) == 1

    def stacked(view, block_inner):
        """(E, N, inner) view -> a descriptor of it as one matrix, experts stacked along the rows, and the rows from expert to expert."""
        rows, columns, row_stride = (1, 2, view.stride(1)) if k_major else (2, 1, view.stride(2))
        pitch = view.stride(0) // row_stride
        matrix = view.as_strided(((E - 1) * pitch + view.shape[rows], view.shape[columns]), (row_stride, 1))
        return descriptor(matrix, [256 // halves, block_inner] if k_major else [block_inner, 256]), pitch

    w_desc, w_rows = stacked(weight, 64)
    lora_descs = [stacked(view, block_r) for view in loras]
    gate_scale, up_scale = scales if scales is not None else (out, out)
    hopper_gemm_kernel[(multiprocessors(a.device.index),)](
        descriptor(a, [64, 64]), a, a.stride(0), routing.row_token, w_desc, w_rows,
        descriptor(u.view(-1, r), [64, block_r]), lora_descs[0][0], lora_descs[-1][0], lora_descs[0][1],
        descriptor(out, [64, 128]), out, out.stride(0), gate_scale, up_scale,
        routing.tile_expert, routing.tile_row, routing.num_tiles, routing.offsets, routing.counters[4 * launch :], N, K, r, out.shape[0],
        BLOCK_R=block_r, STAGES=stages, GATHER=gather, K_MAJOR=k_major, HALVES=halves, LORAS=len(loras), GROUP=group,
        DORA=scales is not None, num_warps=4,
    )  # fmt: skip
    return out


@lru_cache
def shared_layout(rows, columns):
    """The swizzled shared-memory layout that bulk copies and the tensor cores agree on; cached because making one is slow."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


def descriptor(tensor, block):
    """What a bulk copy of `block` (rows, columns) of a bf16 matrix needs."""
    return TensorDescriptor.from_tensor(tensor, block, shared_layout(*block))


@lru_cache
def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_hopper(x, p, tiles):
    """Whether hopper_gemm can take the block's GEMMs: bulk copies want rows of whole 16-byte units, and its ring has no masks along K."""
    H, I, r = p.down.shape[1], p.down.shape[2], p.gate_A.shape[1]  # noqa: E741
    return tiles.hopper is not None and x.dtype == torch.bfloat16 and H % 64 == 0 and I % 128 == 0 and r % 8 == 0


def combine(y, routing, out, tiles, weighted, scale=None):
    """out (T, N) = sum over a token's choices of [router weight] [DoRA scale] y (S, N)."""
    tokens, top_k = routing.index.shape
    block = min(triton.next_power_of_2(out.shape[1]), tiles.combine)
    combine_kernel[(tokens, triton.cdiv(out.shape[1], block))](
        y, y.stride(0), routing.token_row, routing.index, routing.weight, y if scale is None else scale, out, out.stride(0),
        out.shape[1], out.shape[1], TOP_K=top_k, WEIGHTED=weighted, DORA=scale is not None, BLOCK_N=block,
    )  # fmt: skip
    return out


def column_slices(width, wanted):
    """Split range(width) into `wanted` parts of whole 256-column tiles, so that an (S, H) temporary exists one part at a time."""
    step = triton.cdiv(triton.cdiv(width, wanted), 256) * 256
    return [slice(start, min(start + step, width)) for start in range(0, width, step)]


class Block(NamedTuple):
    """The operands of one call, adapters in the compute dtype."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_A: torch.Tensor
    gate_B: torch.Tensor
    up_A: torch.Tensor
    up_B: torch.Tensor
    down_A: torch.Tensor
    down_B: torch.Tensor
    gate_scale: torch.Tensor | None
    up_scale: torch.Tensor | None
    down_scale: torch.Tensor | None
    scaling: float


def compute_up(x, p, routing, tiles, launch):
    """1 to 3: u (2, S, r); gate_a (S, 2I), that is gate, DoRA's scale not yet applied, and silu(gate) up, applied; v (S, r)."""
    S, r, I = routing.row_token.numel(), p.gate_A.shape[1], p.down.shape[2]  # noqa: E741
    u = grouped_gemm(x, [p.gate_A, p.up_A], x.new_empty(2, S, r), routing, tiles, gather=True, alpha=p.scaling)
    gate_a, lora = x.new_empty(S, 2 * I), (u, [p.gate_B, p.up_B])
    if on_hopper(x, p, tiles):
        scales = None if p.gate_scale is None else (p.gate_scale, p.up_scale)
        hopper_gemm(x, p.gate_up, gate_a, routing, tiles, launch=launch, gather=True, lora=lora, swiglu=True, scales=scales)
    else:
        grouped_gemm(x, [p.gate_up[:, :I], p.gate_up[:, I:]], gate_a, routing, tiles, gather=True, lora=lora)
        dora, (block_i, warps) = p.gate_scale is not None, tiles.swiglu
        swiglu_kernel[(routing.tile_expert.numel(), triton.cdiv(I, block_i))](
            gate_a, p.gate_scale if dora else gate_a, p.up_scale if dora else gate_a,
            routing.tile_expert, routing.tile_row, routing.num_tiles, routing.offsets, I,
            DORA=dora, BLOCK_M=tiles.block_m, BLOCK_I=block_i, num_warps=warps,
        )  # fmt: skip
    return u, gate_a, grouped_gemm(gate_a[:, I:], [p.down_A], x.new_empty(S, r), routing, tiles, alpha=p.scaling)


def compute_down(gate_a, v, p, routing, tiles, launch, columns=slice(None)):
    """4: y (S, columns of H), DoRA's scale not yet applied."""
    a = gate_a[:, p.down.shape[2] :]
    weight, lora = p.down[:, columns], (v.unsqueeze(0), [p.down_B[:, columns]])
    y = a.new_empty(a.shape[0], weight.shape[1])
    if on_hopper(a, p, tiles):
        return hopper_gemm(a, weight, y, routing, tiles, launch=launch, lora=lora)
    return grouped_gemm(a, [weight], y, routing, tiles, lora=lora)


def lora_grad(x, y, d, routing, tiles, weighted=False):
    """d{i} (E, N, r), any strides, = X^T Y_i with X (T, N) gathered, Y (segments, S, r), its rows times the router weights if weighted."""
    E, N, r = d[0].shape
    block_s, block_n, warps, stages = tiles.lora_grad
    block_n = columns_beside(r, block_n)
    lora_grad_kernel[(triton.cdiv(N, block_n) * E,)](
        x, routing.row_token, routing.row_weight, y, y.stride(0), routing.offsets, routing.order, E, d[0], d[-1], *d[0].stride(), N, r,
        SEGMENTS=len(d), WEIGHTED=weighted,
        BLOCK_S=block_s, BLOCK_N=block_n, BLOCK_R=rank_block(r), PRECISION=precision_of(x.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def swiglu_backward(da, gate_a, u, dv, p, routing, grads, tiles):
    """gate_a (S, 2I) becomes the gradient of gate and up, from da (S, I) and dv (S, r) per unit of router weight; fills grads: of gate's
    and up's B, of down's A, of gate's and up's DoRA scale (or None, None). Returns d(router weight) in parts, (column blocks, S) fp32,
    to be added up."""
    dB_gate, dB_up, dA_down, *dscales = grads
    dora = p.gate_scale is not None
    scales, dscales = ((p.gate_scale, p.up_scale), dscales) if dora else ((da, da), (da, da))
    (S, I), E, r = da.shape, p.down.shape[0], dv.shape[1]  # noqa: E741
    on_tensor_cores = on_hopper(da, p, tiles) and r <= 64
    if on_tensor_cores:
        block_s, block_i, warps, stages = tiles.hopper_swiglu_backward[dora or r > 32]
    else:
        block_s, block_i, warps, stages = tiles.swiglu_backward
        block_i = columns_beside(r, block_i)
    dw_parts = torch.empty(triton.cdiv(I, block_i), S, dtype=torch.float32, device=da.device)
    after = routing.row_weight, routing.offsets, routing.order, dB_gate, dB_up, dA_down, dw_parts, *dscales, S, I, r
    grid = (dw_parts.shape[0], E)
    if on_tensor_cores:
        tile, rank = [block_s, block_i], [block_s, rank_block(r)]
        hopper_swiglu_backward_kernel[grid](
            descriptor(gate_a, tile), gate_a, descriptor(da, tile), descriptor(u.view(-1, r), rank), descriptor(dv, rank),
            *scales, *after, DORA=dora, STAGES=stages, num_warps=warps,
        )  # fmt: skip
    else:
        swiglu_backward_kernel[grid](
            da, gate_a, u, u.stride(0), dv, *scales, *after,
            DORA=dora, BLOCK_S=block_s, BLOCK_I=block_i, BLOCK_R=rank_block(r), PRECISION=precision_of(da.dtype),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dw_parts


def dora_down(dout, v, y, scale, dB, dscale, routing, tiles):
    """dB (E, H, r) and dscale (E, H); y (S, H) becomes scale * dout of each row's token: see dora_down_kernel."""
    E, H, r = dB.shape
    block_s, block_n, warps = tiles.dora_down
    block_n = columns_beside(r, block_n)
    dora_down_kernel[(triton.cdiv(H, block_n), E)](
        dout, routing.row_token, routing.row_weight, v, y, scale, routing.offsets, routing.order, dB, dscale, H, r,
        BLOCK_S=block_s, BLOCK_N=block_n, BLOCK_R=rank_block(r), PRECISION=precision_of(dout.dtype), num_warps=warps,
    )  # fmt: skip


class FusedExperts(torch.autograd.Function):
    """The block with hand-written backward. Saved in "fast" mode: gate, a, u, v (and for DoRA y); in "frugal": where rows go, no more."""

    @staticmethod
    def forward(ctx, x, top_k_weights, gate_A, gate_B, up_A, up_B, down_A, down_B, gate_scale, up_scale, down_scale, frozen):
        top_k_index, gate_up_proj, down_proj, scaling, mode = frozen
        x = x.contiguous()
        tiles = tiles_for(x.device, x.dtype)
        adapters = [t.to(x.dtype).contiguous() for t in (gate_A, gate_B, up_A, up_B, down_A, down_B)]
        scales = [None if t is None else t.float().contiguous() for t in (gate_scale, up_scale, down_scale)]
        p = Block(gate_up_proj, down_proj, *adapters, *scales, scaling)
        routing = route(top_k_index, top_k_weights, gate_up_proj.shape[0], tiles)
        u, gate_a, v = compute_up(x, p, routing, tiles, launch=0)
        out, y = torch.empty_like(x), None
        if p.down_scale is None:
            for i, columns in enumerate(column_slices(x.shape[1], Y_SLICES)):
                combine(compute_down(gate_a, v, p, routing, tiles, 1 + i, columns), routing, out[:, columns], tiles, weighted=True)
        else:
            y = compute_down(gate_a, v, p, routing, tiles, launch=1)
            combine(y, routing, out, tiles, weighted=True, scale=p.down_scale)
        kept = (u, v, gate_a, y) if mode == "fast" else (None, None, None, None)
        ctx.save_for_backward(x, *kept, *routing, *p[:-1])
        ctx.scaling, ctx.dtypes, ctx.spent = scaling, [t.dtype for t in (gate_A, gate_B, up_A, up_B, down_A, down_B)], False
        return out

    @staticmethod
    def backward(ctx, dout):
        if ctx.spent:
            raise RuntimeError("FusedMoELoRA's backward overwrites what it saved: backward twice through one forward is not supported")
        ctx.spent = True
        x, u, v, gate_a, y, *rest = ctx.saved_tensors
        routing, p = Routing(*rest[:11]), Block(*rest[11:], ctx.scaling)
        tiles, dout = tiles_for(x.device, x.dtype), dout.contiguous()
        E, H, I = p.down.shape  # noqa: E741
        S, r = routing.row_token.numel(), p.gate_A.shape[1]
        dora = p.gate_scale is not None
        grads = [torch.empty(t.shape, dtype=dtype, device=x.device) for t, dtype in zip(p[2:8], ctx.dtypes, strict=True)]
        dgate_A, dgate_B, dup_A, dup_B, ddown_A, ddown_B = grads
        dscales = [torch.empty_like(scale) for scale in p[8:11]] if dora else [None, None, None]

        if gate_a is None:
            u, gate_a, v = compute_up(x, p, routing, tiles, launch=10)
            y = compute_down(gate_a, v, p, routing, tiles, launch=11) if dora else None

        # 6 to 8, dout read through row_token
        if dora:
            dora_down(dout, v, y, p.down_scale, ddown_B, dscales[2], routing, tiles)
            dy, gather = y, False
            # for 7 the scale is put on the small B2 instead: the same product, but of dout, which is top_k times smaller than dy
            B2 = torch.mul(p.down_B, p.down_scale.unsqueeze(-1), out=torch.empty_like(p.down_B))
        else:
            lora_grad(dout, v.unsqueeze(0), [ddown_B], routing, tiles, weighted=True)
            dy, gather, B2 = dout, True, p.down_B
        dv = grouped_gemm(dout, [B2.transpose(1, 2)], x.new_empty(S, r), routing, tiles, gather=True, alpha=p.scaling)
        del B2
        lora = (dv.unsqueeze(0), [p.down_A.transpose(1, 2)])
        da = x.new_empty(S, I)
        if on_hopper(x, p, tiles):
            hopper_gemm(dy, p.down.transpose(1, 2), da, routing, tiles, launch=12, gather=gather, lora=lora)
        else:
            grouped_gemm(dy, [p.down.transpose(1, 2)], da, routing, tiles, gather=gather, lora=lora)
        del dy, y

        # 9 and 10 with SwiGLU's backward
        dw_parts = swiglu_backward(da, gate_a, u, dv, p, routing, (dgate_B, dup_B, ddown_A, *dscales[:2]), tiles)
        del da, dv
        dweights = torch.empty_like(routing.weight)
        router_grad_kernel[(triton.cdiv(S, 1024),)](
            dw_parts, routing.token_row, dweights, S, BLOCKS=dw_parts.shape[0], BLOCK=1024
        )  # fmt: skip
        del dw_parts

        # 11 to 13
        dgate_up = gate_a  # which it has become
        lora_B = [p.gate_B.transpose(1, 2), p.up_B.transpose(1, 2)]
        du = grouped_gemm(dgate_up, lora_B, x.new_empty(2, S, r), routing, tiles, alpha=p.scaling)
        lora_grad(x, du, [dgate_A.transpose(1, 2), dup_A.transpose(1, 2)], routing, tiles)
        dx = torch.empty_like(x)
        for i, columns in enumerate(column_slices(H, DX_SLICES)):
            lora = (du, [p.gate_A[:, :, columns].transpose(1, 2), p.up_A[:, :, columns].transpose(1, 2)])
            weight = p.gate_up[:, :, columns].transpose(1, 2)
            part = x.new_empty(S, weight.shape[1])
            if on_hopper(x, p, tiles):
                hopper_gemm(dgate_up, weight, part, routing, tiles, launch=13 + i, lora=lora)
            else:
                grouped_gemm(dgate_up, [weight], part, routing, tiles, lora=lora, both=True)
            combine(part, routing, dx[:, columns], tiles, weighted=False)
            del part  # before the next one is allocated
        return dx, dweights, *grads, *dscales, None


def moe_lora(
    hidden_states,
    top_k_index,
    top_k_weights,
    gate_up_proj,
    down_proj,
    gate_proj_lora_A,
    gate_proj_lora_B,
    up_proj_lora_A,
    up_proj_lora_B,
    down_proj_lora_A,
    down_proj_lora_B,
    scaling,
    gate_scale=None,
    up_scale=None,
    down_scale=None,
    mode="fast",
):
    """The experts block by the kernels: `moe_lora_reference`'s signature and result. Base weights must have hidden_states' dtype.

    mode: "fast" keeps gate, silu(gate) up and the LoRA inner products for the backward, "frugal" recomputes them. Router weights are
    used in fp32. Raises ValueError unless hidden_states and base weights are all bf16 or all fp32 (fp16 has too few exponents, see
    `nonzero`).
    """
    if hidden_states.dtype != gate_up_proj.dtype or hidden_states.dtype != down_proj.dtype:
        raise ValueError(
            f"hidden_states are {hidden_states.dtype}, base weights {gate_up_proj.dtype} and {down_proj.dtype}; expected one dtype"
        )
    if hidden_states.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"hidden_states are {hidden_states.dtype}; the kernels compute in torch.bfloat16 or torch.float32")
    frozen = (top_k_index, gate_up_proj.detach().contiguous(), down_proj.detach().contiguous(), scaling, mode)
    adapters = gate_proj_lora_A, gate_proj_lora_B, up_proj_lora_A, up_proj_lora_B, down_proj_lora_A, down_proj_lora_B
    return FusedExperts.apply(hidden_states, top_k_weights, *adapters, gate_scale, up_scale, down_scale, frozen)


# ------------------------------------------------------------------------------------------------------------------------------
# DoRA norms
# ------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def squared_row_norms(weight):
    """||W||^2 of every output row: weight (E, out, in) -> (E, out) fp32, one expert at a time so that no fp32 copy of W exists."""
    return torch.stack([w.float().square().sum(dim=-1) for w in weight])


@torch.no_grad()
def dora_norm(weight, weight_norms_squared, lora_A, lora_B, scaling):
    """||W + s B A|| of every output row, without forming W + s B A.

    weight (E, out, in), weight_norms_squared (E, out) fp32, lora_A (E, r, in), lora_B (E, out, r) -> (E, out) fp32, detached as
    in the DoRA paper (arXiv 2402.09353, section 4.3): ||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>.
    """
    lora_A32, lora_B32 = lora_A.float(), lora_B.float()
    weight_A = torch.bmm(weight, lora_A.to(weight.dtype).transpose(1, 2)).float()  # (E, out, r)
    gram_A = torch.bmm(lora_A32, lora_A32.transpose(1, 2))  # (E, r, r)
    cross = (weight_A * lora_B32).sum(dim=-1)
    square = (torch.bmm(lora_B32, gram_A) * lora_B32).sum(dim=-1)
    return (weight_norms_squared + 2 * scaling * cross + scaling**2 * square).clamp_min_(0).sqrt_()


# ------------------------------------------------------------------------------------------------------------------------------
# Module
# ------------------------------------------------------------------------------------------------------------------------------


class FusedMoELoRA(nn.Module):
    """Routed experts with a frozen base and trainable LoRA (or DoRA) on gate, up and down of every expert.

    Parameters, experts in dimension 0 so that FSDP2 shards whole experts: `gate_up_proj (E, 2I, H)` and `down_proj (E, H, I)`
    frozen; `{gate,up,down}_proj_lora_A (E, r, in)`, `{gate,up,down}_proj_lora_B (E, out, r)` and for DoRA
    `{gate,up,down}_proj_lora_magnitude (E, out)` fp32 and trainable. `forward(hidden_states, top_k_index, top_k_weights)` is the
    signature of transformers' experts modules.

    mode: "fast" keeps gate, silu(gate) up and the LoRA inner products for the backward, "frugal" recomputes them. shared_A: gate and up
    use one lora_A (the parameter is registered under both names). cache_norms: DoRA's row norms are computed once and kept until
    `forget_norms()`, which the training loop then has to call after every optimiser step; by default every forward computes them.
    """

    def __init__(
        self,
        num_experts,
        hidden_size,
        intermediate_size,
        r,
        lora_alpha,
        use_dora=False,
        mode="fast",
        shared_A=False,
        cache_norms=False,
        dtype=None,
        device=None,
    ):
        super().__init__()
        if mode not in ("fast", "frugal"):
            raise ValueError(f'mode is {mode!r}; expected "fast" or "frugal"')
        if r < 1:
            raise ValueError(f"r is {r}; the rank of an expert must be at least 1")
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self.use_dora, self.mode, self.shared_A, self.cache_norms = use_dora, mode, shared_A, cache_norms

        def frozen(*shape):
            return nn.Parameter(torch.empty(num_experts, *shape, dtype=dtype, device=device), requires_grad=False)

        def trainable(*shape):
            return nn.Parameter(torch.empty(num_experts, *shape, dtype=torch.float32, device=device))

        self.gate_up_proj = frozen(2 * intermediate_size, hidden_size)
        self.down_proj = frozen(hidden_size, intermediate_size)
        for name, out_features, in_features in self.projections():
            shared = shared_A and name == "up_proj"
            self.register_parameter(f"{name}_lora_A", self.gate_proj_lora_A if shared else trainable(r, in_features))
            self.register_parameter(f"{name}_lora_B", trainable(out_features, r))
            if use_dora:
                self.register_parameter(f"{name}_lora_magnitude", trainable(out_features))
        self.forget_norms()
        self._weight_norms = None
        self.register_load_state_dict_post_hook(FusedMoELoRA._after_load)

    def projections(self):
        """(name, output features, input features) of the three projections of an expert."""
        H, I = self.hidden_size, self.intermediate_size  # noqa: E741
        return ("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)

    def extra_repr(self):
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, r={self.r}, "
            f"lora_alpha={self.lora_alpha}, use_dora={self.use_dora}, mode={self.mode!r}, shared_A={self.shared_A}"
        )

    @torch.no_grad()
    def reset_lora_parameters(self):
        """Start values: A Kaiming-uniform per expert over its own fan-in, B zero, magnitude the fp32 row norm of W.

        Works on plain tensors and on FSDP2's sharded ones, where every rank draws the whole A and keeps its part: with equal
        random states the start does not depend on the number of ranks. Call it once the base weights are loaded.
        """
        for name, _, in_features in self.projections():
            lora_A = getattr(self, f"{name}_lora_A")
            if not (self.shared_A and name == "up_proj"):
                bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = sqrt(5)
                whole = torch.empty(lora_A.shape, dtype=lora_A.dtype, device=lora_A.device).uniform_(-bound, bound)
                local_tensor(lora_A).copy_(local_part(whole, lora_A))
            local_tensor(getattr(self, f"{name}_lora_B")).zero_()
        if self.use_dora:
            gate_up_norms = squared_row_norms(local_tensor(self.gate_up_proj)).sqrt()
            gate_norms, up_norms = gate_up_norms.chunk(2, dim=1)
            local_tensor(self.gate_proj_lora_magnitude).copy_(gate_norms)
            local_tensor(self.up_proj_lora_magnitude).copy_(up_norms)
            local_tensor(self.down_proj_lora_magnitude).copy_(squared_row_norms(local_tensor(self.down_proj)).sqrt())
        self._after_load()

    def _after_load(self, *_):
        self.forget_norms()
        self._weight_norms = None

    def forget_norms(self):
        """Drop the cached ||W + s B A||: to be called after an optimiser step when the module was made with cache_norms=True."""
        self._norms = None

    def _dora_scales(self):
        if not self.use_dora:
            return None, None, None
        if self._weight_norms is None:
            self._weight_norms = squared_row_norms(self.gate_up_proj), squared_row_norms(self.down_proj)
        if self._norms is None or not self.cache_norms:
            gate_weight, up_weight = self.gate_up_proj.chunk(2, dim=1)
            gate_squares, up_squares = self._weight_norms[0].chunk(2, dim=1)
            self._norms = (
                dora_norm(gate_weight, gate_squares, self.gate_proj_lora_A, self.gate_proj_lora_B, self.scaling),
                dora_norm(up_weight, up_squares, self.up_proj_lora_A, self.up_proj_lora_B, self.scaling),
                dora_norm(self.down_proj, self._weight_norms[1], self.down_proj_lora_A, self.down_proj_lora_B, self.scaling),
            )
        magnitudes = self.gate_proj_lora_magnitude, self.up_proj_lora_magnitude, self.down_proj_lora_magnitude
        return tuple(magnitude.float() / norm for magnitude, norm in zip(magnitudes, self._norms, strict=True))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """hidden_states (T, H), top_k_index (T, top_k), top_k_weights (T, top_k) -> (T, H) in hidden_states' dtype."""
        block, options = (moe_lora, {"mode": self.mode}) if hidden_states.is_cuda else (moe_lora_reference, {})
        return block(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            self.down_proj,
            self.gate_proj_lora_A,
            self.gate_proj_lora_B,
            self.up_proj_lora_A,
            self.up_proj_lora_B,
            self.down_proj_lora_A,
            self.down_proj_lora_B,
            self.scaling,
            *self._dora_scales(),
            **options,
        )


def local_tensor(tensor):
    """The part of `tensor` that this rank holds: the tensor itself unless FSDP2 has sharded it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_part(whole, like):
    """This rank's part of the plain tensor `whole`, laid out as the parameter `like`; no communication."""
    if not hasattr(like, "to_local"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


def why_not_conforming(experts):
    """What keeps `experts` from being replaced by FusedMoELoRA, in words; None if it conforms."""
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not isinstance(gate_up, torch.Tensor) or not isinstance(down, torch.Tensor):
        names = ", ".join(name for name, _ in experts.named_parameters()) or "no parameters"
        return f"it holds {names}; expected stacked gate_up_proj (E, 2I, H) and down_proj (E, H, I)"
    differences = []
    if getattr(experts, "is_transposed", False):
        differences.append("its weights are transposed (E, in, out)")
    if not getattr(experts, "is_concatenated", True):
        differences.append("gate and up rows are interleaved")
    biases = [name for name, _ in experts.named_parameters() if name.endswith("bias")]
    if getattr(experts, "has_bias", False) or biases:
        differences.append(f"it has biases ({', '.join(biases)})")
    if not getattr(experts, "has_gate", True):
        differences.append("it has no gate")
    shapes_fit = gate_up.dim() == 3 and down.dim() == 3 and tuple(gate_up.shape) == (down.shape[0], 2 * down.shape[2], down.shape[1])
    if not differences and not shapes_fit:
        differences.append(f"shapes {tuple(gate_up.shape)} and {tuple(down.shape)} are not (E, 2I, H) and (E, H, I)")
    activation = getattr(experts, "act_fn", None)
    gate_function = getattr(type(experts), "_apply_gate", None)
    if gate_function is not None and gate_function.__name__ != "_default_apply_gate":
        differences.append(f"it has its own gating function ({type(experts).__name__}._apply_gate)")
    elif activation is not None and not (isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"):
        differences.append(f"its activation is {type(activation).__name__}, not SiLU")
    arguments = list(inspect.signature(type(experts).forward).parameters)[1:]
    if not differences and arguments != ["hidden_states", "top_k_index", "top_k_weights"]:
        differences.append(f"its forward takes ({', '.join(arguments)}), not (hidden_states, top_k_index, top_k_weights)")
    return "; ".join(differences) or None


def wrap_experts(model, r, lora_alpha, use_dora=False, mode="fast", shared_A=False, cache_norms=False):
    """Replace every `...mlp.experts` of `model` by a FusedMoELoRA that holds the same base weights; returns how many.

    Works on the meta device too: then call `reset_lora_parameters()` of each once the weights are loaded. Raises ValueError, and
    changes nothing, if an experts module does not conform (saying what differs) or if there is none. Nothing but the experts is
    touched: freeze the rest of the model yourself, or leave that to adapter.apply_lora.
    """
    found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"}
    found = {name: module for name, module in found.items() if not isinstance(module, FusedMoELoRA)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no module named experts that is not yet wrapped")
    for name, module in found.items():
        reason = why_not_conforming(module)
        if reason:
            raise ValueError(f"{name} ({type(module).__name__}) cannot be wrapped: {reason}")
    for name, module in found.items():
        num_experts, hidden_size, intermediate_size = module.down_proj.shape
        base = dict(dtype=module.gate_up_proj.dtype, device="meta")
        fused = FusedMoELoRA(
            num_experts, hidden_size, intermediate_size, r, lora_alpha, use_dora, mode, shared_A, cache_norms, **base
        ).train(module.training)
        if not module.gate_up_proj.is_meta:
            # to_empty would also allocate the base: materialise the adapters alone, then take the base over without a copy
            lora = {n: torch.empty_like(p, device=module.gate_up_proj.device) for n, p in fused.named_parameters() if "lora" in n}
            base_weights = {"gate_up_proj": module.gate_up_proj, "down_proj": module.down_proj}
            if shared_A:
                lora["up_proj_lora_A"] = lora["gate_proj_lora_A"]
            fused.load_state_dict({**base_weights, **lora}, assign=True)
            fused.gate_up_proj.requires_grad_(False)
            fused.down_proj.requires_grad_(False)
            if shared_A:
                fused.up_proj_lora_A = fused.gate_proj_lora_A
            fused.reset_lora_parameters()
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, fused)
    return len(found)
