"""Where every routed row goes: the tables that the kernels of the experts block share, the four kernels that make them,
tile sizes.

Row tiles never cross experts: tile i covers rows tile_row[i] .. tile_row[i] + BLOCK_M - 1 of expert tile_expert[i], cut
at offsets[expert + 1]; num_tiles is a device scalar, so grids are sized by the upper bound S // BLOCK_M + E and the
rest exits at once.

  array            shape    dtype   meaning
  row_token        (S,)     int32   token of a sorted row
  row_weight       (S,)     fp32    router weight of a sorted row
  token_row        (S,)     int32   sorted row of (token, choice)
  offsets          (E+1,)   int32   first sorted row of an expert
  tile_expert      (tiles,) int32   expert of a row tile
  tile_row         (tiles,) int32   first sorted row of a row tile
  order            (E+1,)   int32   experts, most rows first; then how many of them are long: over twice the mean
  counters         (128,)   int32   work items drawn so far, every fourth for one launch of hopper_gemm_kernel
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

WORK_COUNTERS = 32  # for hopper_gemm_kernel's launches on one routing, 16 bytes apart


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one GPU generation, or of one dtype. block_m is common to all kernels because the tile map is made
    once."""

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
    # the same; and where DoRA or a rank over 32 takes more registers
    hopper_swiglu_backward: tuple = (
        (64, 64, 4, 3),
        (32, 64, 4, 4),
    )
    # the same where it quantises, a block of columns at a time
    hopper_swiglu_backward_fp8: tuple = ((32, 128, 4, 3), (16, 128, 8, 6))


AMPERE = Tiles()
HOPPER = Tiles(hopper=(4, 8))
# fp32: twice the bytes
FULL_PRECISION = Tiles(64, (64, 32, 4, 3), (32, 4, 3), (64, 8), (16, 32, 4, 2), (32, 64, 4, 3), (16, 64, 4))
INTERPRETER = Tiles(16, (16, 16, 4, 1), (16, 4, 1), (16, 4), (16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4), 32, 32)


def tiles_for(device, dtype):
    """The tile sizes for a device and a compute dtype; on a CPU, where only the interpreter can run the kernels, tiny
    ones.

    The portable ones fit the 99 KiB of shared memory that a program has on the smallest GPUs since Ampere, at any rank
    up to 256.
    """
    if device.type != "cuda":
        return INTERPRETER
    if dtype == torch.float32:
        return FULL_PRECISION
    return HOPPER if torch.cuda.get_device_capability(device)[0] == 9 else AMPERE


def precision_of(dtype):
    return "ieee" if dtype == torch.float32 else "tf32"  # tf32 only concerns fp32 operands


def rank_block(r):
    return max(16, triton.next_power_of_2(r))


def columns_beside(r, block):
    """`block` columns, fewer if the rank is so large that accumulators of block x r would not stay in registers."""
    return max(16, block * 64 // max(64, rank_block(r)))


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
    """Grid (E,): turn an expert's counts per block into the rows it has in earlier blocks; totals (E,) = all its
    rows."""
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
    """Grid (blocks of BLOCK row tiles,): offsets, order and tile map: a tile belongs to the first expert whose tiles
    end after it."""
    experts = tl.arange(0, BLOCK_E)
    totals = tl.load(totals_ptr + experts, mask=experts < E, other=0)
    starts = tl.cumsum(totals, 0) - totals
    tiles = (totals + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    # of the expert, less the rows that its first tile's number stands for
    first_row = starts - (tile_ends - tiles) * BLOCK_M
    row = tl.sum(tl.where(owner[:, None] == experts[None, :], first_row[None, :], 0), 1) + tile * BLOCK_M
    used = (tile < max_tiles) & (owner < E)
    tl.store(tile_expert_ptr + tile, owner, mask=used)
    tl.store(tile_row_ptr + tile, row, mask=used)
    # an expert's place in the order; there are at least as many row tiles as experts, so that every expert has its turn
    rows = tl.load(totals_ptr + tile, mask=tile < E, other=0)
    others = tl.where(experts < E, totals, -1)
    before = (others[None, :] > rows[:, None]) | (
        (others[None, :] == rows[:, None]) & (experts[None, :] < tile[:, None])
    )
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
    """Grid (blocks of BLOCK routed rows,): a stable counting sort; counts (E, blocks) holds the rows in earlier
    blocks."""
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


def route(top_k_index, top_k_weights, num_experts, tiles):
    """Sort the routed rows by expert, stably, in four tiny kernels; the host never learns a count."""
    index, weight = top_k_index.contiguous(), top_k_weights.contiguous()
    S, top_k, device = index.numel(), index.shape[1], index.device
    num_blocks, max_tiles = triton.cdiv(S, tiles.sort), S // tiles.block_m + num_experts
    block_e = triton.next_power_of_2(num_experts + 1)
    sizes = [
        4 * WORK_COUNTERS,
        num_experts * num_blocks,
        num_experts,
        num_experts + 1,
        S,
        S,
        max_tiles,
        max_tiles,
        1,
        num_experts + 1,
    ]
    # every array begins at a multiple of 16 bytes whatever T is: Triton compiles a kernel anew for each mix of aligned
    # pointers
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
    return Routing(
        index, weight, token_row, row_token, row_weight, offsets, tile_expert, tile_row, num_tiles, counters, order
    )
