"""Frozen weights in FP8: E4M3 values, an fp32 scale for each block of 128 x 128, widened right before they are used;
and products with activations in FP8, a scale for each block of 1 x 128.

The layout is that of published FP8 checkpoints, which DeepSeek-V3 began: `weight` (out, in) float8_e4m3fn beside
`weight_scale_inv` (ceil(out / 128), ceil(in / 128)); a weight is its value times its block's scale. The last blocks of
a matrix may be ragged. By default storage alone is FP8: products are those of the widened weights, in the compute
dtype. `Fp8Linear` is the definition of the others: both operands FP8, sums fp32.
"""

from typing import NamedTuple

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


class Quantised(NamedTuple):
    """FP8 values and their scales. Weights: (E, out, in) and (E, out / 128, in / 128), sizes in whole blocks.
    Activations, as kernels take them: (rows, columns) and (columns / 128, rows)."""

    values: torch.Tensor
    scales: torch.Tensor

    def outputs(self, part):
        """The weights of some of the outputs, a slice of whole blocks."""
        blocks = slice(*(None if end is None else end // BLOCK for end in (part.start, part.stop)))
        return Quantised(self.values[:, part], self.scales[:, blocks])


@torch.no_grad()
def quantise_rows(x):
    """x (rows, columns) -> (values, FP8, of that shape; scales, fp32, (rows, columns / 128)).

    As `quantise`, but a block is 128 values of a row, and values are multiplied by the scale's inverse, which is what
    kernels can afford.
    """
    blocks = F.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(dim=2)
    scales = (largest / torch.full_like(largest, LARGEST)).clamp_min(torch.finfo(torch.float32).tiny)
    values = (blocks * (torch.ones_like(scales) / scales).unsqueeze(2)).flatten(1)[:, : x.shape[1]]
    return values.to(FP8), scales


def rounded_rows(x, dtype):
    """x as `quantise_rows` leaves it, in `dtype`."""
    values, scales = quantise_rows(x)
    return values.to(dtype) * scales.to(dtype).repeat_interleave(BLOCK, dim=1)[:, : x.shape[1]]


class Fp8Linear(torch.autograd.Function):
    """x W^T with x in FP8, and dx = dy W with dy in FP8, for frozen W (out, in): widened FP8 in fp32 or fp64, in which
    it computes."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return (rounded_rows(x, weight.dtype) @ weight.T).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        return (rounded_rows(dy, weight.dtype) @ weight).to(dy.dtype), None


ARITHMETIC = "bf16", "fp8"


def check_arithmetic(arithmetic, base_dtype, hidden_size, intermediate_size, capability=None):
    """Raise ValueError unless experts of these sizes can compute in `arithmetic`; capability: the GPU's, None on a
    CPU."""
    if arithmetic not in ARITHMETIC:
        raise ValueError(f"--expert_arithmetic {arithmetic}: expected one of {', '.join(ARITHMETIC)}")
    if arithmetic != "fp8":
        return
    if base_dtype != "fp8":
        raise ValueError("--expert_arithmetic fp8 needs experts stored in FP8: add --base_dtype fp8")
    if hidden_size % BLOCK or intermediate_size % BLOCK:
        raise ValueError(
            f"--expert_arithmetic fp8 needs experts whose sizes are multiples of {BLOCK}; the model's are"
            f" {hidden_size} x {intermediate_size}: leave it at bf16"
        )
    if capability is not None and capability < (9, 0):
        raise ValueError(
            f"--expert_arithmetic fp8 needs a Hopper GPU (compute capability 9.0) or newer; this one has"
            f" {'.'.join(map(str, capability))}: leave it at bf16"
        )
