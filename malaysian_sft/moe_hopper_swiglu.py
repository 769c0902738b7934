"""SwiGLU's backward for Hopper, in Gluon: bulk copies in and out, tensor cores for the gradients of A and B."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from malaysian_sft.moe_hopper import hopper_sigmoid
from malaysian_sft.moe_hopper_fp8 import hopper_quantised
from malaysian_sft.moe_swiglu import nonzero


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


@gluon.jit(do_not_specialize=["S"])
def hopper_swiglu_backward_kernel(
    gate_a_desc, gate_a_ptr, da_desc, u_desc, dv_desc, gate_scale_ptr, up_scale_ptr,
    row_weight_ptr, offsets_ptr, order_ptr,
    dB_gate_ptr, dB_up_ptr, dA_down_ptr, dw_ptr, dgate_scale_ptr, dup_scale_ptr, S, INTERMEDIATE, R,
    q_ptr, q_scale_ptr, DORA: gl.constexpr, STAGES: gl.constexpr, QUANTISE: gl.constexpr,
):  # fmt: skip
    """swiglu_backward_kernel for Hopper, INTERMEDIATE a multiple of WIDTH. Grid (INTERMEDIATE / WIDTH, E).

    QUANTISE, WIDTH then 128: d(gate) and d(up) also as FP8, q (S, 2 INTERMEDIATE), and its scales (2 INTERMEDIATE /
    128, S).

    A stage of shared memory holds one step's rows. Its gate, a and da are overwritten with d(gate), d(up) and w a,
    which the tensor cores then read for dB and dA while bulk stores write the first two out; the stage is filled again
    a step later.
    """
    BLOCK_S: gl.constexpr = gate_a_desc.block_shape[0]
    WIDTH: gl.constexpr = gate_a_desc.block_shape[1]
    BLOCK_R: gl.constexpr = u_desc.block_shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, BLOCK_R, 16]
    )
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
        # of the step before
        dB_gate, dB_up, dA_down = warpgroup_mma_wait(num_outstanding=0, deps=(dB_gate, dB_up, dA_down))
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
            pointers = (
                gate_a_ptr + gl.expand_dims(rows.to(gl.int64) * (2 * INTERMEDIATE), 1) + gl.expand_dims(columns, 0)
            )
            gl.store(pointers, dgate, mask=gl.expand_dims(rows < last, 1))
            gl.store(pointers + INTERMEDIATE, dup, mask=gl.expand_dims(rows < last, 1))
        # the stage of the step before is free: the tensor cores were waited for above, its bulk stores are now
        tma.store_wait(2)
        ahead = i + STAGES - 1
        hopper_swiglu_backward_load(
            gate_a_desc, da_desc, u_desc, dv_desc, first + BLOCK_S * ahead, column, INTERMEDIATE, S,
            ahead % STAGES, ahead < steps,
            full, gate_smem, a_smem, da_smem, u_gate_smem, u_up_smem, dv_smem,
        )  # fmt: skip
        # last, because the fences wait for writes under way
        if QUANTISE:
            inside = gl.expand_dims(rows < last, 1)
            q = q_ptr + gl.expand_dims(rows.to(gl.int64) * (2 * INTERMEDIATE), 1) + gl.expand_dims(columns, 0)
            values, scale = hopper_quantised(dgate.to(gl.float32))
            gl.store(q, values, mask=inside)
            gl.store(q_scale_ptr + block.to(gl.int64) * S + rows, scale, mask=rows < last)
            values, scale = hopper_quantised(dup.to(gl.float32))
            gl.store(q + INTERMEDIATE, values, mask=inside)
            up_block = (INTERMEDIATE // WIDTH + block).to(gl.int64)
            gl.store(q_scale_ptr + up_block * S + rows, scale, mask=rows < last)
        gl.store(dw_ptr + block.to(gl.int64) * S + rows, dw, mask=rows < last)
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
