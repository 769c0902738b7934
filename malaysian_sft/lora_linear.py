"""PEFT's LoRA / DoRA linear layer with a forward that stays in the activations' dtype, and DoRA's scale of its rows."""

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from fused_moe_lora import dora_norm, in_place, squared_row_norms
from malaysian_sft.norm_rope import ScaleColumns

TINY = 2.0**-60  # the least size of a scale that something is divided by; bf16 and fp32 lose nothing there


class LoraLinearFunction(torch.autograd.Function):
    """y = x W^T + b + u B^T with u = s x A^T, for a frozen W: forward and backward, two products with W and six of rank
    r.

    Computes in x's dtype. A and B are cast as they are used, so that no second copy of them lives from forward to
    backward.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling):
        rows = x.reshape(-1, x.shape[-1])  # (T, in)
        u = (rows @ lora_A.to(x.dtype).T).mul_(scaling)  # (T, r)
        y = F.linear(rows, weight, bias).addmm_(u, lora_B.to(x.dtype).T)  # (T, out)
        ctx.save_for_backward(rows, u, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        rows, u, weight, lora_A, lora_B = ctx.saved_tensors
        shape, dy = dy.shape[:-1], dy.reshape(-1, dy.shape[-1])  # (T, out)
        du = (dy @ lora_B.to(dy.dtype)).mul_(ctx.scaling)  # (T, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(du, lora_A.to(dy.dtype)).view(*shape, -1)
        return dx, None, None, (du.T @ rows).to(lora_A.dtype), (dy.T @ u).to(lora_B.dtype), None


class LoraLinear(PeftLinear):
    """PEFT's LoRA / DoRA linear layer, its parameters and names unchanged, with a forward that stays in the
    activations' dtype.

    PEFT's own casts the activations to the adapter's fp32, which is several times slower. One adapter, named "default".
    DoRA's ||W + s B A|| is computed once and kept until `forget_norms()`, which has to follow every optimiser step.
    """

    norm = None  # (out,) fp32

    def forward(self, x, *args, **kwargs):
        weight, bias = self.base_layer.weight, self.base_layer.bias
        lora_A, lora_B = self.lora_A["default"].weight, self.lora_B["default"].weight
        scaling, dropout = self.scaling["default"], self.lora_dropout["default"]
        dora = self.use_dora["default"]
        inner_bias = None if dora else bias  # DoRA scales the product, not the bias
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and self.training:
            u = F.linear(dropout(x), lora_A.to(x.dtype))
            y = F.linear(x, weight, inner_bias) + scaling * F.linear(u, lora_B.to(x.dtype))
        else:
            y = LoraLinearFunction.apply(x, weight, inner_bias, lora_A, lora_B, scaling)
        if not dora:
            return y
        y = ScaleColumns.apply(y.view(-1, y.shape[-1]), dora_scale(self)).view(y.shape)
        return y if bias is None else y + bias

    @property
    def has_norms(self):
        return self.use_dora["default"]

    def forget_norms(self):
        """Drop the cached ||W + s B A||."""
        self.norm = None

    def renew_norms(self):
        """||W + s B A|| of the adapter as it is now, where it is cached, if it is."""
        self.norm = in_place([self.norm], [row_norms(self)])[0]


def use_lora_linear(model):
    """Give PEFT's LoRA layers of `model` the forward of LoraLinear; returns them."""
    layers = [module for module in model.modules() if type(module) is PeftLinear]
    for module in layers:
        module.__class__ = LoraLinear
    return layers


def row_norms(layer):
    """||W + s B A|| of the rows, (out,) fp32, of a LoraLinear with DoRA."""
    weight, lora_A, lora_B = (
        part.weight.detach().unsqueeze(0)
        for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    )
    return dora_norm(weight, squared_row_norms(weight), lora_A, lora_B, layer.scaling["default"])[0]


def dora_scale(layer):
    """(out,) fp32, magnitude / ||W + s B A||, of a LoraLinear with DoRA; the norm is detached, as in the DoRA paper
    (arXiv 2402.09353, section 4.3), and kept until `forget_norms`. Not zero, since gradients are divided by it."""
    if layer.norm is None:
        layer.norm = row_norms(layer)
    scale = layer.lora_magnitude_vector["default"].weight.float() / layer.norm
    return torch.where(scale.abs() < TINY, TINY, scale)
