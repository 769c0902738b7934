"""The experts block on weights stored in FP8, for bench_fused_moe_lora.py: widened to bf16 before they are used, in the
forward and again in the backward (`--base_dtype fp8`), or multiplied as they are, and transposed for the backward
(`--expert_arithmetic fp8`)."""

import torch

from fused_moe_lora import quantised_stack
from malaysian_sft.fp8 import Quantised, widen
from malaysian_sft.moe_autograd import moe_lora
from malaysian_sft.moe_widen import WideRoom

IN_FP8 = {"fused_moe_lora_widened": "bf16", "fused_moe_lora_fp8": "fp8"}  # implementation -> its arithmetic


def store_in_fp8(fixed):
    """`fixed` with its weights Quantised under "stored", and in fp32 exactly what they stand for in their place."""
    stored = {name: Quantised(*quantised_stack(fixed[name], parts)) for name, parts in (("gate_up", 2), ("down", 1))}
    wide = {name: torch.stack([widen(*pair) for pair in zip(*weight, strict=True)]) for name, weight in stored.items()}
    return {**fixed, **wide, "stored": stored}


def in_fp8(call, implementation, leaves, fixed, mode):
    """(forward, {name of a gradient: function that reads it}), as bench_fused_moe_lora.fused; the room for what is
    widened or transposed is made here."""
    stacks = [(*fixed["stored"]["gate_up"], 2), (*fixed["stored"]["down"], 1)]
    room = WideRoom()

    def widened():
        room.forget(room)  # another layer has been there
        return room.widened(room, stacks, torch.bfloat16)

    def transposed():
        room.forget(room)
        return *fixed["stored"].values(), *room.transposed(room, stacks)

    if IN_FP8[implementation] == "fp8":
        transposed()
        weights = dict(zip(("gate_up", "down"), fixed["stored"].values(), strict=True))

        def forward():
            return call(moe_lora, leaves, fixed | weights, mode=mode, base=transposed)

    else:

        def forward():
            weights = dict(zip(("gate_up", "down"), widened(), strict=True))
            return call(moe_lora, leaves, fixed | weights, mode=mode, base=widened)

        widened()
    return forward, {name: lambda leaf=leaf: leaf.grad for name, leaf in leaves.items()}


def room_mib(implementation, fixed):
    """MiB of the room that all layers share."""
    values = sum(weight.values.numel() for weight in fixed["stored"].values())
    return values * (1 if IN_FP8[implementation] == "fp8" else 2) >> 20
