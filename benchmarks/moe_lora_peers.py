"""What bench_fused_moe_lora.py compares fused_moe_lora.py with: other implementations of an experts block with LoRA.

Not run by itself. Each entry of PEERS is a function (leaves, fixed, scaling, autotune) that takes the tensors of
`make_inputs` and returns (forward, reads): forward() computes the block and gives (T, H); after out.backward(dout),
reads[name]() gives the gradient that belongs to leaves[name], or to the sum of gate's and up's A under the name
"gate_A+up_A" where a peer has one lora_A for both (SHARED_A).

autotune "short" keeps a benchmark of minutes: axolotl tries only the tiles it lists for Hopper itself, sonic-moe runs
QuACK's default configuration. With "full" both search all they have, which takes ten minutes and more per shape.
"""

import importlib.util
import os
import sys
import tempfile
from functools import partial

import torch
import torch.nn.functional as F


def torch_grouped_mm(leaves, fixed, scaling, autotune):
    """Base and LoRA by torch's grouped_mm, nothing synchronised, LoRA added in place; Liger's SwiGLU kernel if it is
    installed."""
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        swiglu = LigerSiLUMulFunction.apply
    except ImportError:

        def swiglu(gate, up):
            return F.silu(gate) * up

    index, top_k = fixed["index"], fixed["index"].shape[1]
    experts = torch.arange(fixed["down"].shape[0], device=index.device)

    class Gather(torch.autograd.Function):
        """x (T, H) -> rows in sorted order (S, H); the gradient is summed by reading, not by atomics."""

        @staticmethod
        def forward(ctx, x, order, position):
            ctx.position = position
            return x[order // top_k]

        @staticmethod
        def backward(ctx, grad):
            return grad[ctx.position].view(-1, top_k, grad.shape[1]).sum(1), None, None

    class Unsort(torch.autograd.Function):
        """Sorted rows -> token order, a permutation."""

        @staticmethod
        def forward(ctx, y, order, position):
            ctx.order = order
            return y[position]

        @staticmethod
        def backward(ctx, grad):
            return grad[ctx.order], None, None

    def forward():
        chosen, order = index.reshape(-1).sort(stable=True)
        position = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        ends = torch.searchsorted(chosen, experts, right=True).to(torch.int32)

        def mm(a, b):
            return F.grouped_mm(a, b.transpose(1, 2), offs=ends)

        x = Gather.apply(leaves["x"], order, position)
        gate, up = (
            mm(x, weight).add_(mm(mm(x, leaves[f"{name}_A"]), leaves[f"{name}_B"]), alpha=scaling)
            for name, weight in zip(("gate", "up"), fixed["gate_up"].chunk(2, dim=1), strict=True)
        )
        a = swiglu(gate, up)
        y = mm(a, fixed["down"]).add_(mm(mm(a, leaves["down_A"]), leaves["down_B"]), alpha=scaling)
        weights = leaves["top_k_weights"].to(y.dtype)
        return torch.bmm(weights.unsqueeze(1), Unsort.apply(y, order, position).view(*index.shape, -1)).squeeze(1)

    return forward, {name: lambda leaf=leaf: leaf.grad for name, leaf in leaves.items()}


def peft_experts(leaves, fixed, scaling, implementation):
    """transformers' experts module under PEFT's LoRA on parameters (target_parameters), with the values of `leaves` in
    it.

    `implementation` is the name of a function in transformers' experts interface. axolotl and unsloth_zoo work on the
    same two modules, so call this after they have put their own forward in place.
    """
    import peft
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, H, I = fixed["down"].shape  # noqa: E741
    rank = leaves["gate_A"].shape[1]
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E, hidden_act="silu")
    config._experts_implementation = implementation
    with torch.device("meta"):
        host = torch.nn.Module()
        host.experts = Qwen3MoeExperts(config)
    host.experts.gate_up_proj = torch.nn.Parameter(fixed["gate_up"], requires_grad=False)
    host.experts.down_proj = torch.nn.Parameter(fixed["down"], requires_grad=False)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    lora = peft.LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=[], target_parameters=targets)
    model = peft.get_peft_model(host, lora, autocast_adapter_dtype=False)
    # one wrapper per parameter. A is (E r, in), experts outermost; B (out, r E), experts innermost
    wrappers = {module.parameter_name: module for module in model.modules() if hasattr(module, "parameter_name")}
    (gate_up_A, gate_up_B), (down_A, down_B) = (
        [getattr(wrappers[name], part)["default"].weight for part in ("lora_A", "lora_B")]
        for name in ("gate_up_proj", "down_proj")
    )

    def flat_B(B):
        return B.permute(1, 2, 0).reshape(B.shape[1], -1)

    def stacked_B(grad):
        return grad.view(grad.shape[0], rank, E).permute(2, 0, 1)

    with torch.no_grad():
        for parameter, value in (
            (gate_up_A, leaves["gate_A"].reshape(E * rank, H)),
            (gate_up_B, flat_B(torch.cat([leaves["gate_B"], leaves["up_B"]], dim=1))),
            (down_A, leaves["down_A"].reshape(E * rank, I)),
            (down_B, flat_B(leaves["down_B"])),
        ):
            parameter.data = value.to(fixed["down"]).contiguous()
            parameter.requires_grad_()
    leaves.update(
        {"peft_gate_up_A": gate_up_A, "peft_gate_up_B": gate_up_B, "peft_down_A": down_A, "peft_down_B": down_B}
    )
    reads = {
        "x": lambda: leaves["x"].grad,
        "top_k_weights": lambda: leaves["top_k_weights"].grad,
        "gate_A+up_A": lambda: gate_up_A.grad.view(E, rank, H),
        "gate_B": lambda: stacked_B(gate_up_B.grad)[:, :I],
        "up_B": lambda: stacked_B(gate_up_B.grad)[:, I:],
        "down_A": lambda: down_A.grad.view(E, rank, I),
        "down_B": lambda: stacked_B(down_B.grad),
    }
    return model.base_model.model.experts, reads


def transformers_peft(leaves, fixed, scaling, autotune):
    """grouped_mm on W + s B A, which PEFT forms in every forward."""
    experts, reads = peft_experts(leaves, fixed, scaling, "grouped_mm")
    return lambda: experts(leaves["x"], fixed["index"], leaves["top_k_weights"]), reads


def without_init(package):
    """Make `package` importable without running its __init__, where that needs a project's every dependency and we need
    one module.

    Raises ModuleNotFoundError if it is not installed.
    """
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    sys.modules[package] = importlib.util.module_from_spec(spec)


def axolotl_scattermoe(leaves, fixed, scaling, autotune):
    """axolotl's fused ScatterMoE + LoRA kernels, taking PEFT's A and B as axolotl's plugin has them do."""
    without_init("axolotl.integrations.kernels")
    from axolotl.integrations.kernels.libs.scattermoe_lora.experts import register_scattermoe_experts
    from axolotl.integrations.kernels.libs.scattermoe_lora.kernels import autotune_profiles

    register_scattermoe_experts()
    if autotune == "short":
        # axolotl cuts its forward search to the tiles that won on this GPU, but only for the shapes it has seen
        _, H, I = fixed["down"].shape  # noqa: E741
        autotune_profiles._FWD_SHAPES.update({(2 * I, H), (H, I)})
    experts, reads = peft_experts(leaves, fixed, scaling, "scattermoe")
    return lambda: experts(leaves["x"], fixed["index"], leaves["top_k_weights"]), reads


def unsloth_zoo(leaves, fixed, scaling, autotune):
    """unsloth_zoo's experts forward on torch's grouped_mm with separate LoRA products; eager, as unsloth runs the MoE
    block in training."""
    # not the working folder
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", os.path.join(tempfile.gettempdir(), "unsloth_compiled_cache"))
    without_init("unsloth_zoo")
    without_init("unsloth_zoo.temporary_patches")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
    from unsloth_zoo.temporary_patches import moe_utils

    moe_utils.patch_param_wrapper_for_moe()
    Qwen3MoeExperts.forward = moe_utils.get_forward_moe_backend()
    backend = sys.modules[Qwen3MoeExperts.forward.__module__].select_moe_backend()
    if backend != "grouped_mm":
        raise RuntimeError(f"unsloth_zoo chose {backend} instead of grouped_mm")
    experts, reads = peft_experts(leaves, fixed, scaling, "grouped_mm")
    # its MoE block hands the router's weights over in the dtype of the activations
    return lambda: experts(leaves["x"], fixed["index"], leaves["top_k_weights"].to(leaves["x"].dtype)), reads


def sonic_moe(leaves, fixed, scaling, autotune):
    """SonicMoE, which has no LoRA: on W + s B A formed in every forward, dA and dB by autograd from its dW."""
    from sonicmoe import functional
    from sonicmoe.enums import ActivationType

    if autotune == "short":
        for module in (functional.forward, functional.backward):
            for name in ("gemm", "gemm_gated", "gemm_dgated"):
                if hasattr(module, name):
                    setattr(module, name, partial(getattr(module, name), tuned=False))

    index = fixed["index"]
    tokens, top_k = index.shape
    E = fixed["down"].shape[0]

    def forward():
        gate_up_B = torch.cat([leaves["gate_B"], leaves["up_B"]], dim=1)
        w1 = torch.baddbmm(fixed["gate_up"], gate_up_B, leaves["gate_A"], alpha=scaling).permute(1, 2, 0)  # (2I, H, E)
        # (H, I, E)
        w2 = torch.baddbmm(fixed["down"], leaves["down_B"], leaves["down_A"], alpha=scaling).permute(1, 2, 0)
        # the body of sonicmoe's moe_TC_softmax_topk_layer behind its router
        frequency, offsets = (torch.empty(n, dtype=torch.int32, device=index.device) for n in (E, E + 1))
        gather, scatter, reverse = (
            torch.empty(tokens * top_k, dtype=torch.int32, device=index.device) for _ in range(3)
        )
        functional.TC_topk_router_metadata_triton(index.int(), E, frequency, offsets, gather, scatter, reverse)
        routing = (gather, scatter, reverse, None, False)
        a, h = functional._UpProjection.apply(
            leaves["x"], w1, None, offsets, tokens * top_k, top_k, *routing, ActivationType.SWIGLU, False, True
        )
        return functional._DownProjection.apply(
            a, h, w2, None, leaves["top_k_weights"], offsets, tokens, top_k, *routing, ActivationType.SWIGLU
        )

    reads = {name: lambda leaf=leaf: leaf.grad for name, leaf in leaves.items() if name not in ("gate_A", "up_A")}
    return forward, {**reads, "gate_A+up_A": lambda: leaves["gate_A"].grad}


PEERS = {
    "torch_grouped_mm": torch_grouped_mm,
    "transformers_peft": transformers_peft,
    "axolotl_scattermoe": axolotl_scattermoe,
    "unsloth_zoo": unsloth_zoo,
    "sonic_moe": sonic_moe,
}
SHARED_A = set(PEERS) - {"torch_grouped_mm"}
# what has to be installed for it
NEEDS = {
    "transformers_peft": ("transformers", "peft"),
    "axolotl_scattermoe": ("axolotl", "transformers", "peft"),
    "unsloth_zoo": ("unsloth_zoo", "transformers", "peft"),
    "sonic_moe": ("sonic-moe", "quack-kernels", "nvidia-cutlass-dsl"),
}
