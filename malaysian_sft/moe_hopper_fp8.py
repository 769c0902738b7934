"""Grouped products of the experts block in FP8 for Hopper, in Gluon: moe_hopper.py's kernel for E4M3 operands with
block scales.

Same tiles of 128 x 256, same ring, producer and consumers, and a stage has the same bytes: 128 values along K, which is
one block of scales. The tensor cores add up FP8 products in less than fp32, so each step begins at zero, and its result
is added in fp32 to the consumer's sums, times the scales of its rows and of its weights' block. That takes a second set
of registers, so that a step is made in two halves of 128 columns. While one consumer adds, the other one multiplies.
The producer copies the rows' scales into the ring as well; LoRA's products are bf16 and go into the same sums.
"""

from functools import lru_cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from malaysian_sft.fp8 import BLOCK
from malaysian_sft.moe_hopper import (
    descriptor,
    hopper_announce,
    hopper_hand_back,
    hopper_next,
    hopper_rounded,
    hopper_store,
    hopper_swiglu,
    hopper_work,
    multiprocessors,
)
from malaysian_sft.moe_routing import rank_block
from malaysian_sft.moe_swiglu import nonzero


@lru_cache
def fp8_layout(rows):
    """The shared-memory layout of `rows` x 128 values in FP8."""
    return gl.NVMMASharedLayout.get_default_for([rows, BLOCK], gl.float8e4nv)


def fp8_descriptor(matrix, rows):
    """What a bulk copy of `rows` x 128 values of a matrix in FP8 needs."""
    return TensorDescriptor.from_tensor(matrix, [rows, BLOCK], fp8_layout(rows))


@gluon.jit
def hopper_fp8_producer(
    a_desc, a_ptr, stride_am, a_scale_ptr, stride_ask, row_token_ptr, w_desc, w_rows, u_desc, l0_desc, l1_desc, l_rows,
    tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr, counter_ptr,
    a_smem, w_smem, s_smem, full, empty, work, announced, taken,
    N, K, R, S,
    BLOCK_R: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr, L_K_MAJOR: gl.constexpr, HALVES: gl.constexpr,
    LORAS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = 256 // HALVES
    column_tiles = gl.cdiv(N, WIDTH)
    second = 128 if HALVES == 1 else N  # from a tile's first 128 rows of W to its other 128
    total = gl.load(num_tiles_ptr) * column_tiles
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    lane = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    ks = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, layout)), 0)
    # a thread for the scale of each row
    scale_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    scale_lane = gl.arange(0, 128, layout=scale_layout)
    item = gl.program_id(0)
    expert, row, column, last = hopper_work(
        gl.minimum(item, total - 1), N, column_tiles, tile_expert_ptr, tile_row_ptr, offsets_ptr, WIDTH, GROUP
    )
    if GATHER:
        token0 = gl.load(row_token_ptr + row + lane, mask=row + lane < last, other=0)
        token1 = gl.load(row_token_ptr + row + 64 + lane, mask=row + 64 + lane < last, other=0)
        scale_token = gl.load(row_token_ptr + row + scale_lane, mask=row + scale_lane < last, other=0)
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
        scale_mask = row + scale_lane < last
        if GATHER:
            a0 = a_ptr + gl.expand_dims(token0.to(gl.int64) * stride_am, 1) + ks
            a1 = a_ptr + gl.expand_dims(token1.to(gl.int64) * stride_am, 1) + ks
            scales = a_scale_ptr + scale_token
            mask0 = gl.expand_dims(row + lane < last, 1)
            mask1 = gl.expand_dims(row + 64 + lane < last, 1)
            token0 = gl.load(row_token_ptr + next_row + lane, mask=next_row + lane < next_last, other=0)
            token1 = gl.load(row_token_ptr + next_row + 64 + lane, mask=next_row + 64 + lane < next_last, other=0)
            scale_token = gl.load(
                row_token_ptr + next_row + scale_lane, mask=next_row + scale_lane < next_last, other=0
            )
        else:
            scales = a_scale_ptr + row + scale_lane
        for k in range(0, K, 128):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            bar = full.index(slot)
            if GATHER:
                mbarrier.expect(bar, 256 * 128)
            else:
                mbarrier.expect(bar, (128 + 256) * 128)
                tma.async_copy_global_to_shared(a_desc, [row, k], bar, a_smem.index(slot * 2))
                tma.async_copy_global_to_shared(a_desc, [row + 64, k], bar, a_smem.index(slot * 2 + 1))
            tma.async_copy_global_to_shared(w_desc, [expert * w_rows + column, k], bar, w_smem.index(slot * 2))
            tma.async_copy_global_to_shared(
                w_desc, [expert * w_rows + second + column, k], bar, w_smem.index(slot * 2 + 1)
            )
            if GATHER:
                async_copy.async_copy_global_to_shared(a_smem.index(slot * 2), a0, mask=mask0)
                async_copy.async_copy_global_to_shared(a_smem.index(slot * 2 + 1), a1, mask=mask1)
                a0 += 128
                a1 += 128
            async_copy.async_copy_global_to_shared(s_smem.index(slot), scales, mask=scale_mask)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            scales += stride_ask
            step += 1
        for i in gl.static_range(LORAS):
            for r in range(0, R, BLOCK_R):
                slot = step % STAGES
                mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
                bar = full.index(slot)
                mbarrier.expect(bar, (128 + 256 // HALVES) * BLOCK_R * 2)
                for half in gl.static_range(2):
                    u = a_smem.index(slot * 2 + half)._reinterpret(gl.bfloat16, [64, BLOCK_R], u_desc.layout)
                    # U_1's rows follow U_0's
                    tma.async_copy_global_to_shared(u_desc, [i * S + row + 64 * half, r], bar, u)
                desc = l0_desc if i == 0 else l1_desc
                for half in gl.static_range(2):
                    if HALVES == 1 or half == i:  # gate's B is for the gate half, up's for the other
                        lora = w_smem.index(slot * 2 + half)._reinterpret(
                            gl.bfloat16, [128, BLOCK_R] if L_K_MAJOR else [BLOCK_R, 128], desc.layout
                        )
                        first = column if HALVES == 2 else column + 128 * half
                        if L_K_MAJOR:
                            tma.async_copy_global_to_shared(desc, [expert * l_rows + first, r], bar, lora)
                        else:
                            tma.async_copy_global_to_shared(desc, [expert * l_rows + r, first], bar, lora)
                async_copy.mbarrier_arrive(bar, increment_count=False)
                step += 1
        item, expert, row, column, last = next_item, next_expert, next_row, next_column, next_last
    hopper_announce(-1, row, column, last, count, work, announced, taken)  # the end: the consumers stop


@gluon.jit
def hopper_store_fp8(smem, desc, ptr, stride, row, column, last):
    """Write 64 x 128 staged FP8 values: by a bulk store that runs on behind, or row by row if not all rows are the
    tile's."""
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    if row + 64 <= last:
        tma.async_copy_shared_to_global(desc, [row, column], smem)
    else:
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
        pointers = ptr + gl.expand_dims(rows.to(gl.int64) * stride, 1) + gl.expand_dims(columns, 0)
        gl.store(pointers, smem.load(layout), mask=gl.expand_dims(rows < last, 1))


@gluon.jit
def hopper_quantised(x):
    """(x / scale in FP8, scale) of each row of x, fp32: as quantise_rows, to the bit."""
    scale = gl.maximum(gl.div_rn(gl.max(gl.abs(x), axis=1), 448.0), 1.1754943508222875e-38)
    return (x * gl.expand_dims(gl.div_rn(1.0, scale), 1)).to(gl.float8e4nv), scale


@gluon.jit
def hopper_pinned(x):
    """x, computed where this stands: left to itself the compiler moves sums behind the next product, for which there
    are not enough registers then."""
    return gl.inline_asm_elementwise("", "=f,0", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def hopper_fp8_consumer(
    out_desc, out_ptr, stride_om, scale0_ptr, scale1_ptr, w_scale_ptr, stride_wse, stride_wsn,
    q_desc, q_ptr, stride_qm, q_scale_ptr, stride_qsk,
    a_smem, w_smem, s_smem, o_smem, full, empty, work, announced, taken, multiplied, N, K, R,
    WHO: gl.constexpr, BLOCK_R: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr, L_K_MAJOR: gl.constexpr,
    HALVES: gl.constexpr, LORAS: gl.constexpr, DORA: gl.constexpr,
):  # fmt: skip
    o_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16)
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    lora_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]
    )
    u_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_R], gl.bfloat16)
    l_shape: gl.constexpr = [128, BLOCK_R] if L_K_MAJOR else [BLOCK_R, 128]
    l_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(l_shape, gl.bfloat16)
    zero = gl.zeros((64, 128), gl.float32, layout)
    lora_zero = gl.zeros((64, 128), gl.float32, lora_layout)
    steps = gl.cdiv(K, 128)
    step = 0
    held = -1  # the stage that the last tile's results were staged in
    count = 0
    expert, row, column, last = hopper_next(count, work, announced, taken)
    while expert >= 0:
        row += 64 * WHO
        if row >= last:
            # an expert's last tile with nothing in these 64 rows: only hand the stages back
            held = hopper_hand_back(held, empty)
            for _k in range(steps + LORAS * gl.cdiv(R, BLOCK_R)):
                mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.arrive(empty.index(step % STAGES), count=1)
                step += 1
            mbarrier.arrive(multiplied, count=1)
            mbarrier.wait(multiplied, count & 1)
        else:
            acc0 = gl.zeros((64, 128), gl.float32, layout)
            acc1 = gl.zeros((64, 128), gl.float32, layout)
            block = column // 128
            # where N is 128 there is no second half; what is multiplied for it is never stored
            other = gl.minimum(block + 1, N // 128 - 1) if HALVES == 1 else block + N // 128
            w_scales = w_scale_ptr + expert.to(gl.int64) * stride_wse
            scales0 = w_scales + block * stride_wsn
            scales1 = w_scales + other * stride_wsn
            next0 = gl.load(scales0)
            next1 = gl.load(scales1)
            for k in range(steps):
                w_scale0 = next0
                w_scale1 = next1
                ahead = gl.minimum(k + 1, steps - 1)
                next0 = gl.load(scales0 + ahead)  # so that they are there a step later
                next1 = gl.load(scales1 + ahead)
                slot = step % STAGES
                mbarrier.wait(full.index(slot), (step // STAGES) & 1)
                if GATHER:
                    fence_async_shared()
                a = a_smem.index(slot * 2 + WHO)
                part = warpgroup_mma(a, w_smem.index(slot * 2).permute((1, 0)), zero, use_acc=False, is_async=True)
                scale = s_smem.index(slot).slice(64 * WHO, 64).load(gl.SliceLayout(1, layout))
                part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
                if k == 0:
                    held = hopper_hand_back(held, empty)
                acc0 = hopper_pinned(acc0 + part * gl.expand_dims(scale * w_scale0, 1))
                part = warpgroup_mma(a, w_smem.index(slot * 2 + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
                mbarrier.arrive(empty.index(slot), count=1)
                acc1 += part * gl.expand_dims(scale * w_scale1, 1)
                step += 1
            for i in gl.static_range(LORAS):
                for r in range(gl.cdiv(R, BLOCK_R)):
                    slot = step % STAGES
                    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
                    u = a_smem.index(slot * 2 + WHO)._reinterpret(gl.bfloat16, [64, BLOCK_R], u_layout)
                    l0 = w_smem.index(slot * 2)._reinterpret(gl.bfloat16, l_shape, l_layout)
                    l1 = w_smem.index(slot * 2 + 1)._reinterpret(gl.bfloat16, l_shape, l_layout)
                    if L_K_MAJOR:
                        l0 = l0.permute((1, 0))
                        l1 = l1.permute((1, 0))
                    if HALVES == 1 or i == 0:
                        part = warpgroup_mma(u, l0, lora_zero, use_acc=False, is_async=True)
                        part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
                        acc0 = hopper_pinned(acc0 + gl.convert_layout(part, layout))
                    if HALVES == 1 or i == 1:
                        part = warpgroup_mma(u, l1, lora_zero, use_acc=False, is_async=True)
                        part = warpgroup_mma_wait(num_outstanding=0, deps=(part,))
                        acc1 = hopper_pinned(acc1 + gl.convert_layout(part, layout))
                    if i < LORAS - 1 or r < gl.cdiv(R, BLOCK_R) - 1:  # the last stage is held back
                        mbarrier.arrive(empty.index(slot), count=1)
                    step += 1

            # all 64 x 256 results go to shared memory at once, half of them into the weights of the last stage, which
            # is held back for it
            mbarrier.arrive(multiplied, count=1)
            mbarrier.wait(multiplied, count & 1)
            held = (step + STAGES - 1) % STAGES
            if HALVES == 2:
                acc0 = hopper_rounded(nonzero(acc0))
            o0 = o_smem.index(WHO)
            o1 = w_smem.index(held * 2 + WHO)._reinterpret(gl.bfloat16, [64, 128], o_layout)
            o0.store(acc0.to(gl.bfloat16))
            q = a_smem.index(held * 2 + WHO)
            if HALVES == 2:
                acc1 = hopper_rounded(hopper_swiglu(acc0, acc1, scale0_ptr, scale1_ptr, expert * N + column, DORA))
                values, scale = hopper_quantised(acc1)
                q.store(values)
                rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
                gl.store(q_scale_ptr + column // 128 * stride_qsk + rows, scale, mask=rows < last)
            o1.store(acc1.to(gl.bfloat16))
            fence_async_shared()
            after = column + 128 if HALVES == 1 else column + N
            hopper_store(o0, out_desc, out_ptr, stride_om, row, column, last, N * HALVES)
            hopper_store(o1, out_desc, out_ptr, stride_om, row, after, last, N * HALVES)
            if HALVES == 2:
                hopper_store_fp8(q, q_desc, q_ptr, stride_qm, row, column, last)
        count += 1
        expert, row, column, last = hopper_next(count, work, announced, taken)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["S"])
def hopper_fp8_gemm_kernel(
    a_desc, a_ptr, stride_am, a_scale_ptr, stride_ask, row_token_ptr, w_desc, w_rows, w_scale_ptr, stride_wse,
    stride_wsn, u_desc, l0_desc, l1_desc, l_rows, out_desc, out_ptr, stride_om, scale0_ptr, scale1_ptr,
    q_desc, q_ptr, stride_qm, q_scale_ptr, stride_qsk,
    tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr, counter_ptr, N, K, R, S,
    BLOCK_R: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr, L_K_MAJOR: gl.constexpr, HALVES: gl.constexpr,
    LORAS: gl.constexpr, GROUP: gl.constexpr, DORA: gl.constexpr,
):  # fmt: skip
    """Grid (multiprocessors,): out = A W_e^T + U L_e^T as hopper_gemm_kernel, A and W in FP8, W always (E * w_rows, K).

    A's scales (K / 128, rows), W's (E, w_rows / 128, K / 128) by their strides, the last one 1. HALVES = 2: besides
    gate and a = silu(gate) up in out (S, 2N), q (S, N) gets a in FP8, and q_scale (N / 128, S) the scales of its rows.
    """
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], gl.float8e4nv)
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([128, 128], gl.float8e4nv)
    a_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, 64, 128], a_layout)
    w_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, 128, 128], w_layout)
    s_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    o_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16)
    o_smem = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], o_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=129)  # every producer thread reports its own cp.async copies
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
        (hopper_fp8_consumer, (
            out_desc, out_ptr, stride_om, scale0_ptr, scale1_ptr, w_scale_ptr, stride_wse, stride_wsn,
            q_desc, q_ptr, stride_qm, q_scale_ptr, stride_qsk,
            a_smem, w_smem, s_smem, o_smem, full, empty, work, announced, taken, multiplied, N, K, R,
            0, BLOCK_R, STAGES, GATHER, L_K_MAJOR, HALVES, LORAS, DORA)),
        (hopper_fp8_consumer, (
            out_desc, out_ptr, stride_om, scale0_ptr, scale1_ptr, w_scale_ptr, stride_wse, stride_wsn,
            q_desc, q_ptr, stride_qm, q_scale_ptr, stride_qsk,
            a_smem, w_smem, s_smem, o_smem, full, empty, work, announced, taken, multiplied, N, K, R,
            1, BLOCK_R, STAGES, GATHER, L_K_MAJOR, HALVES, LORAS, DORA)),
        (hopper_fp8_producer, (
            a_desc, a_ptr, stride_am, a_scale_ptr, stride_ask, row_token_ptr, w_desc, w_rows,
            u_desc, l0_desc, l1_desc, l_rows,
            tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr, counter_ptr,
            a_smem, w_smem, s_smem, full, empty, work, announced, taken,
            N, K, R, S,
            BLOCK_R, STAGES, GATHER, L_K_MAJOR, HALVES, LORAS, GROUP)),
    ], [4, 4], [216, 72])  # fmt: skip


def hopper_fp8_gemm(a, weight, out, routing, tiles, *, launch, gather=False, lora, quantised=None, scales=None):
    """out (S, N) = A W_e^T + U L_e^T by hopper_fp8_gemm_kernel. a: (values (rows, K), scales (K / 128, rows)); weight:
    (values (E, N, K), scales (E, N / 128, K / 128)), views with K contiguous; lora as hopper_gemm's.

    quantised: (values (S, N), scales (N / 128, S)) to fill. Then weight is the whole gate_up_proj, lora has gate's and
    up's B, and out (S, 2N) gets gate and silu(gate) up, the latter after DoRA's scales if given. launch: as
    hopper_gemm's.
    """
    (values, value_scales), (w, w_scales), (u, loras) = a, weight, lora
    stages, group = tiles.hopper
    halves = 1 if quantised is None else 2
    E, N, K = w.shape[0], w.shape[1] // halves, w.shape[2]
    r = loras[0].shape[2]
    block_r = min(64, rank_block(r))
    pitch = w.stride(0) // w.stride(1)
    w_matrix = w.as_strided(((E - 1) * pitch + w.shape[1], K), (w.stride(1), 1))
    l_k_major = loras[0].stride(2) == 1

    def stacked(view):
        """LoRA's (E, N, r) view -> a descriptor of it as one matrix, and the rows from expert to expert."""
        rows, columns, row_stride = (1, 2, view.stride(1)) if l_k_major else (2, 1, view.stride(2))
        between = view.stride(0) // row_stride
        matrix = view.as_strided(((E - 1) * between + view.shape[rows], view.shape[columns]), (row_stride, 1))
        return descriptor(matrix, [128, block_r] if l_k_major else [block_r, 128]), between

    lora_descs = [stacked(view) for view in loras]
    q, q_scales = quantised if quantised is not None else (values, value_scales)
    gate_scale, up_scale = scales if scales is not None else (out, out)
    hopper_fp8_gemm_kernel[(multiprocessors(values.device.index),)](
        fp8_descriptor(values, 64), values, values.stride(0), value_scales, value_scales.stride(0), routing.row_token,
        fp8_descriptor(w_matrix, 128), pitch, w_scales, w_scales.stride(0), w_scales.stride(1),
        descriptor(u.view(-1, r), [64, block_r]), lora_descs[0][0], lora_descs[-1][0], lora_descs[0][1],
        descriptor(out, [64, 128]), out, out.stride(0), gate_scale, up_scale,
        fp8_descriptor(q, 64), q, q.stride(0), q_scales, q_scales.stride(0),
        routing.tile_expert, routing.tile_row, routing.num_tiles, routing.offsets, routing.counters[4 * launch :],
        N, K, r, out.shape[0],
        BLOCK_R=block_r, STAGES=stages, GATHER=gather, L_K_MAJOR=l_k_major, HALVES=halves, LORAS=len(loras),
        GROUP=group, DORA=scales is not None, num_warps=4,
    )  # fmt: skip
    return out
