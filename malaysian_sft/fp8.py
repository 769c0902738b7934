"""Frozen weights in FP8: E4M3 values, an fp32 scale for each block of 128 x 128, widened right before they are used.

The layout is that of published FP8 checkpoints, which DeepSeek-V3 began: `weight` (out, in) float8_e4m3fn beside
`weight_scale_inv` (ceil(out / 128), ceil(in / 128)); a weight is its value times its block's scale. The last blocks of
a matrix may be ragged. Storage alone is FP8: products are those of the widened weights, in the compute dtype.
"""

import torch
import torch.nn.functional as F

FP8, LARGEST = torch.float8_e4m3fn, 448.0
BLOCK = 128
SCALE = "_scale_inv"  # ends the name of a weight's scales, in a checkpoint and in a module


def scale_shape(rows, columns):
    """(block rows, block columns) of a matrix, ragged ones included."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


@torch.no_grad()
def quantise(weight):
    """weight (rows, columns) -> (values, FP8, of that shape; scales, fp32, `scale_shape`).

    A block's scale is its largest magnitude / 448, values are rounded to the nearest, ties to even. Rows may be
    quantised in parts, if each part but the last has a multiple of 128.
    """
    rows, columns = weight.shape
    wide = weight.float()
    blocks = F.pad(wide.abs(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    largest = blocks.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax(dim=(1, 3))
    # by a tensor, since a GPU divides by a number as by its inverse, and bits would depend on where this runs
    scales = (largest / torch.full_like(largest, LARGEST)).clamp_min(
        torch.finfo(torch.float32).tiny
    )  # a block of zeros has one too
    return (wide / spread(scales, rows, columns)).to(FP8), scales


def spread(scales, rows, columns, first=0):
    """Each value's scale, (rows, columns), for rows `first` onwards of a matrix with these scales."""
    block = torch.arange(first, first + rows, device=scales.device) // BLOCK
    return scales[block].repeat_interleave(BLOCK, dim=1)[:, :columns]


@torch.no_grad()
def widen(values, scales, first=0):
    """values (rows, columns) in FP8, rows `first` onwards of a matrix with these scales -> their weights in fp32."""
    return values.float() * spread(scales.float(), *values.shape, first)
