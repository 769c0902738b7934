"""Grouped products of the experts block for Hopper, in Gluon.

Tiles of 128 x 256, one program per multiprocessor. A producer warpgroup keeps a ring of shared-memory stages full (bulk
tensor copies for weights and plain A, cp.async for gathered A); two consumer warpgroups multiply 64 rows each by the
common 256 columns and write their results out behind the next tile's products. The producer draws work items from a
counter, so that neighbouring items, which share weights, run at the same time: with a fixed assignment the programs
drift apart and the 235B block's GEMMs read three times as much from memory.
"""

from functools import lru_cache

import torch
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

from malaysian_sft.moe_routing import rank_block
from malaysian_sft.moe_swiglu import nonzero


@lru_cache
def shared_layout(rows, columns):
    """The swizzled shared-memory layout that bulk copies and the tensor cores agree on; cached because making one is
    slow."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)


def descriptor(tensor, block):
    """What a bulk copy of `block` (rows, columns) of a bf16 matrix needs."""
    return TensorDescriptor.from_tensor(tensor, block, shared_layout(*block))


@lru_cache
def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_hopper(x, p, tiles):
    """Whether hopper_gemm can take the block's GEMMs: bulk copies want rows of whole 16-byte units, and its ring has no
    masks along K."""
    _, H, I, r = p.sizes  # noqa: E741
    return tiles.hopper is not None and x.dtype == torch.bfloat16 and H % 64 == 0 and I % 128 == 0 and r % 8 == 0


@gluon.jit
def hopper_work(
    item, N, column_tiles, tile_expert_ptr, tile_row_ptr, offsets_ptr, WIDTH: gl.constexpr, GROUP: gl.constexpr
):
    """Expert, first row, first column and row limit of a work item. Up to GROUP row tiles of an expert go side by side
    through its column tiles, so that programs that run together share weights: each weight is read from memory about
    once. Where N is no multiple of WIDTH the last tile begins earlier, over its neighbour, and both write the same
    bits: faster than copies that reach outside."""
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
def hopper_announce(expert, row, column, last, count, work, announced, taken):
    """The producer tells the consumers what comes next, up to two items ahead, so that they need not look it up in
    global memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = count % 2
    mbarrier.wait(taken.index(slot), ((count // 2) & 1) ^ 1)
    work.index(slot * 4).store(gl.full([1], expert, gl.int32, layout))
    work.index(slot * 4 + 1).store(gl.full([1], row, gl.int32, layout))
    work.index(slot * 4 + 2).store(gl.full([1], column // 64, gl.int32, layout))
    work.index(slot * 4 + 3).store(gl.full([1], last, gl.int32, layout))
    mbarrier.arrive(announced.index(slot), count=1)


@gluon.jit
def hopper_producer(
    a_desc, a_ptr, stride_am, row_token_ptr, w_desc, w_rows, u_desc, l0_desc, l1_desc, l_rows,
    tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr, counter_ptr,
    a_smem, w_smem, full, empty, work, announced, taken,
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
                    # U_1's rows follow U_0's
                    tma.async_copy_global_to_shared(u_desc, [i * S + row + 64 * half, r], bar, u)
                desc = l0_desc if i == 0 else l1_desc
                lora = w_smem.index(slot)._reinterpret(
                    gl.bfloat16, [256, BLOCK_R] if K_MAJOR else [BLOCK_R, 256], desc.layout
                )
                if HALVES == 2:
                    for half in gl.static_range(2):
                        # gate's B for the gate half, zeros for the other: columns from R on lie outside the tensor
                        start = r if half == i else R
                        tma.async_copy_global_to_shared(
                            desc, [expert * l_rows + column, start], bar, lora.slice(half * 128, 128)
                        )
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
def hopper_next(count, work, announced, taken):
    """A consumer's count-th item, as the producer announced it: expert (-1 at the end), first row, first column, row
    limit."""
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
    """Write 64 x 128 staged values: by a bulk store that runs on behind, or row by row if not all rows are the
    tile's."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    if row + 64 <= last:
        tma.async_copy_shared_to_global(desc, [row, column], smem)  # leaves out columns that are not the tensor's
    else:
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
        pointers = ptr + gl.expand_dims(rows.to(gl.int64) * stride, 1) + gl.expand_dims(columns, 0)
        gl.store(pointers, smem.load(layout), mask=gl.expand_dims(rows < last, 1) & gl.expand_dims(columns < limit, 0))


@gluon.jit
def hopper_hand_back(held, empty):
    """Give the producer the stage back that results were staged in, once the bulk stores have read them."""
    if held >= 0:
        tma.store_wait(0)
        mbarrier.arrive(empty.index(held), count=1)
    return -1


@gluon.jit
def hopper_sigmoid(x):
    """1 / (1 + exp(-x)) by approximate instructions, also far below bf16's error."""
    return gl.inline_asm_elementwise(
        "{ ex2.approx.ftz.f32 $0, $1; add.ftz.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0; }",
        "=f,f", [x * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


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
    """The fp32 values that x has in bf16. Two at a time, since converting one alone takes the slow unit that
    exponentials need."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 pair; cvt.rn.bf16x2.f32 pair, $3, $2; shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000; }",
        "=f,=f,f,f", [x], dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def hopper_consumer(
    out_desc, out_ptr, stride_om, scale0_ptr, scale1_ptr,
    a_smem, w_smem, o_smem, full, empty, work, announced, taken, multiplied, N, K, R,
    WHO: gl.constexpr, BLOCK_R: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr, K_MAJOR: gl.constexpr,
    HALVES: gl.constexpr, LORAS: gl.constexpr, DORA: gl.constexpr,
):  # fmt: skip
    o_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16]
    )
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

            # all 64 x 256 results go to shared memory at once, half of them into the weights of the last stage, which
            # is held back for it
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


@gluon.jit(do_not_specialize=["S"])
def hopper_gemm_kernel(
    a_desc, a_ptr, stride_am, row_token_ptr, w_desc, w_rows, u_desc, l0_desc, l1_desc, l_rows,
    out_desc, out_ptr, stride_om, scale0_ptr, scale1_ptr,
    tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr, counter_ptr, N, K, R, S,
    BLOCK_R: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr, K_MAJOR: gl.constexpr, HALVES: gl.constexpr,
    LORAS: gl.constexpr, GROUP: gl.constexpr, DORA: gl.constexpr,
):  # fmt: skip
    """Grid (multiprocessors,): grouped_gemm_kernel's out = A W_e^T + U L_e^T, every operand a 2-D matrix with experts
    stacked by rows.

    w_desc: (E * w_rows, K) if K_MAJOR, else K rows of N columns per expert; l_desc likewise with R for K. HALVES = 2:
    columns n of gate and of up (N rows further down in W) make one tile, and out (S, 2N) gets gate and, in up's place,
    a = silu(gate) up.
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
        # every producer thread reports its own cp.async copies
        mbarrier.init(full.index(i), count=129 if GATHER else 1)
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
            tile_expert_ptr, tile_row_ptr, num_tiles_ptr, offsets_ptr, counter_ptr,
            a_smem, w_smem, full, empty, work, announced, taken,
            N, K, R, S,
            BLOCK_R, STAGES, GATHER, K_MAJOR, HALVES, LORAS, GROUP)),
    ], [4, 4], [224, 64])  # fmt: skip


def hopper_gemm(a, weight, out, routing, tiles, *, launch, gather=False, lora, swiglu=False, scales=None):
    """out (S, N) = A W_e^T + U L_e^T by hopper_gemm_kernel. weight, and each of lora's, an (E, N, K) view with K or N
    contiguous.

    swiglu: weight is the whole gate_up_proj, lora has gate's and up's B, and out (S, 2N) gets gate and silu(gate) up,
    the latter after DoRA's scales (gate's and up's (E, N)) if given. launch: a number below WORK_COUNTERS, different
    for every launch on one routing.
    """
    u, loras = lora
    stages, group = tiles.hopper
    halves = 2 if swiglu else 1
    E, N, K = weight.shape[0], weight.shape[1] // halves, weight.shape[2]
    r = loras[0].shape[2]
    block_r = min(64, rank_block(r))
    k_major = weight.stride(2) == 1

    def stacked(view, block_inner):
        """(E, N, inner) view -> a descriptor of it as one matrix, experts stacked along the rows, and the rows from
        expert to expert."""
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
        routing.tile_expert, routing.tile_row, routing.num_tiles, routing.offsets, routing.counters[4 * launch :],
        N, K, r, out.shape[0],
        BLOCK_R=block_r, STAGES=stages, GATHER=gather, K_MAJOR=k_major, HALVES=halves, LORAS=len(loras), GROUP=group,
        DORA=scales is not None, num_warps=4,
    )  # fmt: skip
    return out
