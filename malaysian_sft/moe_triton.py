"""Portable kernels of the experts block, in Triton: grouped products, the gradients of A and B, DoRA, the weighted sum
over choices."""

import triton
import triton.language as tl

from malaysian_sft.fp8 import BLOCK
from malaysian_sft.moe_fp8 import empty_quantised, quantise_activations, quantised
from malaysian_sft.moe_routing import columns_beside, precision_of, rank_block


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

    A (rows, K), through row_token if GATHER; W (E, N, K) and L (E, N, R) with any strides. SEGMENTS = 2 does two
    products side by side (gate and up): segment i takes w{i}, l{i}, U + i * u_segment, columns of A from i * a_segment,
    and writes from out + i * out_segment; JOINED does both in one tile, which must hold 2N columns. LORA: "no"; "own"
    adds the segment's U L^T; "both" adds U_0 L_0^T + U_1 L_1^T (for dx, to which gate and up both contribute).
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
        # a ring for these too would not fit beside the first one on small GPUs
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            rs = r + tl.arange(0, BLOCK_R)
            u_mask = row_mask[:, None] & (rs < R)[None, :]
            l_mask = column_mask[None, :] & (rs < R)[:, None]
            l_offsets = expert * stride_le + columns[None, :].to(tl.int64) * stride_ln + rs[:, None] * stride_lr
            u = u_ptr + segment * u_segment + rows.to(tl.int64)[:, None] * R + rs[None, :]
            acc = tl.dot(
                tl.load(u, mask=u_mask, other=0.0),
                tl.load(l_ptr + l_offsets, mask=l_mask, other=0.0),
                acc,
                input_precision=PRECISION,
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


def grouped_gemm(a, weights, out, routing, tiles, *, gather=False, lora=None, both=False, alpha=1.0):
    """out = alpha (A W_e^T + U L_e^T) over all experts; see grouped_gemm_kernel.

    a (rows, K), or (rows, 2K) if each of two segments reads its own half. weights: one (E, N, K) view, or two of equal
    strides for two segments. out (S, N), or (S, 2N), or (2, S, N). lora: (U (segments, S, R), [L (E, N, R), ...]).
    both: one product, two LoRA terms.
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
        BLOCK_M=tiles.block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=min(64, rank_block(r)),
        PRECISION=precision_of(a.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@triton.jit
def expert_and_block(order_ptr, E, blocks):
    """Expert and column block of a program of a kernel that gathers (T, N) rows expert by expert. The long experts come
    first, because the last of their programs would keep the others waiting; then, for each column block, all other
    experts: what programs that run together gather is a few columns of all tokens, which stay in L2 while a token's
    top_k experts read them."""
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
    """Grid (E * column blocks of N,): d{i}_e = X_e^T Y_i, the gradient of an A or a B, X (T, N) gathered through
    row_token.

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
        x = tl.load(
            x_ptr + tokens[:, None] * N + columns[None, :], mask=row_mask[:, None] & column_mask[None, :], other=0.0
        )
        low_rank = rows.to(tl.int64)[:, None] * R + rs[None, :]
        low_rank_mask = row_mask[:, None] & (rs < R)[None, :]
        y = tl.load(y_ptr + low_rank, mask=low_rank_mask, other=0.0)
        if WEIGHTED:
            weight = tl.load(row_weight_ptr + rows, mask=row_mask, other=0.0)
            y = (y.to(tl.float32) * weight[:, None]).to(x.dtype)
        d0 = tl.dot(tl.trans(x), y, d0, input_precision=PRECISION)
        if SEGMENTS == 2:
            d1 = tl.dot(
                tl.trans(x),
                tl.load(y_ptr + y_segment + low_rank, mask=low_rank_mask, other=0.0),
                d1,
                input_precision=PRECISION,
            )
    d = expert * stride_de + columns[:, None].to(tl.int64) * stride_dn + rs[None, :] * stride_dr
    mask = column_mask[:, None] & (rs < R)[None, :]
    tl.store(d0_ptr + d, d0.to(d0_ptr.dtype.element_ty), mask=mask)
    if SEGMENTS == 2:
        tl.store(d1_ptr + d, d1.to(d1_ptr.dtype.element_ty), mask=mask)


def lora_grad(x, y, d, routing, tiles, weighted=False):
    """d{i} (E, N, r), any strides, = X^T Y_i with X (T, N) gathered, Y (segments, S, r), its rows times the router
    weights if weighted."""
    E, N, r = d[0].shape
    block_s, block_n, warps, stages = tiles.lora_grad
    block_n = columns_beside(r, block_n)
    lora_grad_kernel[(triton.cdiv(N, block_n) * E,)](
        x, routing.row_token, routing.row_weight, y, y.stride(0), routing.offsets, routing.order, E,
        d[0], d[-1], *d[0].stride(), N, r,
        SEGMENTS=len(d), WEIGHTED=weighted,
        BLOCK_S=block_s, BLOCK_N=block_n, BLOCK_R=rank_block(r), PRECISION=precision_of(x.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


@triton.jit(do_not_specialize=["S"])
def dora_down_kernel(
    dout_ptr, row_token_ptr, row_weight_ptr, v_ptr, y_ptr, scale_ptr, offsets_ptr, order_ptr, dB_ptr, dscale_ptr, N, R,
    q_ptr, q_scale_ptr, S,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    QUANTISE: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks of N = H, E): the start of DoRA's backward through the down projection, per unit of router
    weight.

    y (S, N), saved without its scale, is overwritten with scale * dout, the gradient of W2 a + s B2 A2 a; also dB (E,
    N, R) = its weighted product with v (S, R), and dscale (E, N) = sum of row_weight dout y. The next rows are loaded
    while these are worked on. QUANTISE, BLOCK_N then 128: that gradient goes to q (S, N) as FP8 and its scales (N /
    128, S), and y stays.
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
        v = tl.load(
            v_ptr + rows.to(tl.int64)[:, None] * R + rs[None, :], mask=row_mask[:, None] & (rs < R)[None, :], other=0.0
        )
        dscale += dout * y * weight
        dy = (dout * scale).to(v.dtype)
        place = rows.to(tl.int64)[:, None] * N + columns[None, :]
        mask_now = row_mask[:, None] & column_mask[None, :]
        if QUANTISE:
            values, row_scale = quantised(dy.to(tl.float32))
            tl.store(q_ptr + place, values, mask=mask_now)
            tl.store(q_scale_ptr + tl.program_id(0).to(tl.int64) * S + rows, row_scale, mask=row_mask)
        else:
            tl.store(y_ptr + place, dy, mask=mask_now)
        dB = tl.dot(tl.trans(dy), (v.to(tl.float32) * weight).to(v.dtype), dB, input_precision=PRECISION)
    tl.store(
        dB_ptr + (expert * N + columns[:, None]) * R + rs[None, :],
        dB.to(dB_ptr.dtype.element_ty),
        mask=column_mask[:, None] & (rs < R)[None, :],
    )
    tl.store(dscale_ptr + expert * N + columns, tl.sum(dscale, 0), mask=column_mask)


def dora_down(dout, v, y, scale, dB, dscale, routing, tiles, in_fp8=False):
    """dB (E, H, r) and dscale (E, H); y (S, H) becomes scale * dout of each row's token: see dora_down_kernel. Returns
    that: y, or with in_fp8 it quantised."""
    E, H, r = dB.shape
    block_s, block_n, warps = tiles.dora_down
    block_n = columns_beside(r, block_n)
    fused = in_fp8 and block_n == BLOCK
    q = empty_quantised(*y.shape, y.device) if fused else (y, y)
    dora_down_kernel[(triton.cdiv(H, block_n), E)](
        dout, routing.row_token, routing.row_weight, v, y, scale, routing.offsets, routing.order, dB, dscale, H, r,
        *q, y.shape[0],
        BLOCK_S=block_s, BLOCK_N=block_n, BLOCK_R=rank_block(r), PRECISION=precision_of(dout.dtype), QUANTISE=fused,
        num_warps=warps,
    )  # fmt: skip
    return q if fused else quantise_activations(y) if in_fp8 else y


@triton.jit
def combine_kernel(
    y_ptr, stride_ys, token_row_ptr, index_ptr, weight_ptr, scale_ptr, out_ptr, stride_ot, N, WIDTH,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, DORA: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (T, column blocks): out (T, N) = sum over a token's choices, in their order, of weight * scale_e * y (S, N).
    No atomics."""
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


def combine(y, routing, out, tiles, weighted, scale=None):
    """out (T, N) = sum over a token's choices of [router weight] [DoRA scale] y (S, N)."""
    tokens, top_k = routing.index.shape
    block = min(triton.next_power_of_2(out.shape[1]), tiles.combine)
    combine_kernel[(tokens, triton.cdiv(out.shape[1], block))](
        y, y.stride(0), routing.token_row, routing.index, routing.weight, y if scale is None else scale,
        out, out.stride(0),
        out.shape[1], out.shape[1], TOP_K=top_k, WEIGHTED=weighted, DORA=scale is not None, BLOCK_N=block,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["S"])
def router_grad_kernel(dw_ptr, token_row_ptr, out_ptr, S, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (blocks of BLOCK,): gradient of the top-k weights, (T, top_k): the column blocks' parts added up, in token
    order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(token_row_ptr + index, mask=index < S, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in range(BLOCKS):
        acc += tl.load(dw_ptr + block * S + row, mask=index < S, other=0.0)
    tl.store(out_ptr + index, acc.to(out_ptr.dtype.element_ty), mask=index < S)
