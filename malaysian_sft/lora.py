"""LoRA: its arguments, which layers get it, start values, and every name it has on disk.

Tensor names are the base checkpoint's with PEFT's prefix and endings; routed experts are two-dimensional, one per
expert and projection.
"""

import contextlib
import math
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from malaysian_sft.disk_names import PROJECTIONS, STACK_OF, attach, common_name, disk_names

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "adapter_manifest.json"
PREFIX = "base_model.model."  # PEFT puts it before every name of the base model
NOT_ADAPTED = {"gate", "router", "shared_expert_gate", "lm_head"}  # linear layers that route or read out stay frozen
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EXPERT = re.compile(r"^(?P<stack>.+\.experts)\.(?P<index>\d+)\.(?P<projection>gate_proj|up_proj|down_proj)$")
DISK_NAME = re.compile(
    rf"^{re.escape(PREFIX)}(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?$"
)
PEFT_PARAMETER = re.compile(r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)\.default\.weight$")
EXPERT_PARAMETER = re.compile(
    r"^(?P<stack>.+\.experts)\.(?P<projection>gate_proj|up_proj|down_proj)_lora_(?P<part>A|B|magnitude)$"
)
WRAPPERS = re.compile(r"(?:_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")


@dataclass
class LoraArguments:
    """The adapter's shape. Scaling is alpha / r, and the same for attention, dense layers and experts."""

    # --lora_r too: torchrun takes "--r" for an abbreviation of its own flags, even after the script's name
    r: int = field(
        default=256, metadata={"help": "Rank of attention, dense MLP and shared experts.", "aliases": ["--lora_r"]}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "Default: 2 * r."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA (DoRA), on routed experts too."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before lora_A; routed experts never use it."})
    expert_r: int | None = field(
        default=None, metadata={"help": "Rank of a routed expert. Default: r // active experts."}
    )
    target_modules: str | None = field(
        default=None,
        metadata={
            "help": "Comma-separated names. Default: every linear layer of attention, dense MLP and shared experts."
        },
    )

    @property
    def alpha(self) -> int:
        """lora_alpha, or 2 * r when it was left out."""
        return 2 * self.r if self.lora_alpha is None else self.lora_alpha

    def expert_rank(self, config) -> int:
        """Rank of one routed expert of a model with this transformers `config`."""
        return expert_rank(config, self.r, self.expert_r)

    def expert_alpha(self, config) -> float:
        """alpha of one routed expert: alpha / r is the same everywhere."""
        alpha = self.alpha * self.expert_rank(config) / self.r
        return int(alpha) if alpha == int(alpha) else alpha


def active_experts(config) -> int:
    """Routed experts that a token passes, by whichever name the family has for it; 1 for a dense model."""
    names = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")
    found = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), 1)
    return max(found) if isinstance(found, list) else found


def expert_rank(config, r, expert_r=None):
    """The LoRA rank of one routed expert: `expert_r`, else r over the active experts (at least 1), so that a token
    meets r trained columns, as in a dense layer. 0 without LoRA (r = 0)."""
    return expert_r if expert_r is not None else max(r // active_experts(config), 1) if r else 0


def adaptable(model: nn.Module) -> dict[tuple, tuple[int, int]]:
    """(out, in) of every weight of the decoder layers that an adapter may change, by the model's own names: (linear
    layer,) or (stack of experts, expert, projection).

    Works on the plain model (also on the meta device) and on one already wrapped by PEFT, wrap_experts, FSDP2 or
    ZeRO-3: shapes are the whole weight's. Experts in another arrangement (transposed, biased) are left out.
    """
    shapes = {}
    for path, module in model.named_modules():
        name = WRAPPERS.sub("", path + ".").removesuffix(".").removeprefix(PREFIX).removesuffix(".base_layer")
        if not LAYER.search(name) or ".lora_" in name:
            continue
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] not in NOT_ADAPTED:
            shapes[(name,)] = (module.out_features, module.in_features)
        elif (
            name.endswith(".experts")
            and hasattr(module, "gate_up_proj")
            and not getattr(module, "is_transposed", False)
        ):
            down = getattr(module, "down_proj", None)
            if not isinstance(down, nn.Parameter):
                continue
            experts, hidden, inner = getattr(down, "ds_shape", down.shape)
            for e in range(experts):
                shapes |= {(name, e, "gate_proj"): (inner, hidden), (name, e, "up_proj"): (inner, hidden)}
                shapes[name, e, "down_proj"] = (hidden, inner)
    return shapes


def base_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """`adaptable` by `common_name` in the base checkpoint, without ".weight"."""
    names = disk_names(model)
    return {common_name(names.module(*place)): shape for place, shape in adaptable(model).items()}


def lora_targets(model: nn.Module) -> list[str]:
    """Full names of the linear layers that get LoRA: attention, dense MLP, shared experts; no router, routed expert,
    lm_head, embedding."""
    return [place[0] for place in adaptable(model) if len(place) == 1]


@contextlib.contextmanager
def _targets_as_written():
    """Keep PEFT from reading gate_proj, up_proj and down_proj of a mixture of experts as the stacked expert parameters.

    It does so for adapters of the time when experts were modules, but then the dense layers and shared experts, which
    still have those names, get no LoRA at all.
    """
    from peft.utils import transformers_weight_conversion as conversion

    original = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = original


def apply_lora(model: nn.Module, lora_args: LoraArguments):
    """Wrap `model` with PEFT LoRA or DoRA on lora_targets(model), adapter parameters fp32, everything else frozen;
    returns the PeftModel.

    Routed experts are fused_moe_lora.wrap_experts's, called before; its parameters stay trainable. Works under ZeRO-3's
    zero.Init and on the meta device (then call reset_lora_parameters once the weights are loaded). Raises ValueError
    when `target_modules` names a layer that does not exist.
    """
    from peft import LoraConfig, get_peft_model

    attach(model)
    base_shapes(model)  # names for all that will be saved: now, not at the first save
    targets = lora_targets(model)
    if lora_args.target_modules:
        wanted = [name.strip() for name in lora_args.target_modules.split(",") if name.strip()]
        for name in wanted:
            if not any(target == name or target.endswith("." + name) for target in targets):
                leaves = sorted({target.rsplit(".", 1)[-1] for target in targets})
                raise ValueError(
                    f"--target_modules {name}: the model has no such linear layer; choose from {', '.join(leaves)}"
                )
        targets = [
            target for target in targets if any(target == name or target.endswith("." + name) for name in wanted)
        ]
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no linear layer named ...layers.N... that LoRA could be applied to"
        )
    experts = {name: parameter for name, parameter in model.named_parameters() if EXPERT_PARAMETER.match(name)}
    config = LoraConfig(
        r=lora_args.r,
        lora_alpha=lora_args.alpha,
        lora_dropout=lora_args.lora_dropout,
        use_dora=lora_args.use_dora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with _targets_as_written():
        peft_model = get_peft_model(model, config)
    got = {
        name.removeprefix(PREFIX).split(".lora_A")[0] for name, _ in peft_model.named_parameters() if ".lora_A." in name
    }
    if got != set(targets):
        raise ValueError(f"PEFT adapted other layers than asked for: {sorted(got ^ set(targets))[:6]}")
    for parameter in experts.values():
        parameter.requires_grad_(True)
    for name, parameter in peft_model.named_parameters():
        if PEFT_PARAMETER.match(name):
            parameter.data = parameter.data.float()
    if not any(parameter.is_meta for parameter in peft_model.parameters()):
        reset_lora_parameters(peft_model)
    return peft_model


@torch.no_grad()
def start_lora(name, lora_A, lora_B, magnitude=None, row_norms=None):
    """Start values of one adapter, or of a stack of them along dimension 0: A Kaiming-uniform over its own fan-in, B
    zero, DoRA's magnitude the fp32 row norms of W.

    Plain tensors, or sharded ones, where every rank draws the whole A and keeps its part: with equal random states the
    start does not depend on the number of ranks. Raises ValueError, with `name`, for rows of zeros under
    DoRA, which divides by their norm.
    """
    bound = 1 / math.sqrt(lora_A.shape[-1])  # Kaiming-uniform with a = sqrt(5)
    dtype = local_tensor(lora_A).dtype
    whole = torch.empty(lora_A.shape, dtype=dtype, device=lora_A.device).uniform_(-bound, bound)
    local_tensor(lora_A).copy_(local_part(whole, lora_A))
    local_tensor(lora_B).zero_()
    if magnitude is not None:
        if (row_norms == 0).any():
            raise ValueError(
                f"--use_dora: {name} has rows of zeros, and DoRA divides by their norm; train it with LoRA"
            )
        local_tensor(magnitude).copy_(local_part(row_norms.contiguous(), magnitude))


@torch.no_grad()
def reset_lora_parameters(model: nn.Module) -> None:
    """Start values of PEFT's layers, in fp32 (PEFT's own magnitude is in the base's dtype).

    Call it after loading weights into a model that was built on the meta device. ZeRO-3 gathers one layer's base weight
    at a time.
    """
    for name, module in model.named_modules():
        if "default" not in getattr(module, "lora_A", {}) or not hasattr(module, "get_base_layer"):
            continue
        A, B, weight = module.lora_A["default"].weight, module.lora_B["default"].weight, module.get_base_layer().weight
        dora = "default" in module.lora_magnitude_vector
        magnitude = module.lora_magnitude_vector["default"].weight if dora else None
        with gathered([A, B, *([weight, magnitude] if dora else [])], write=True):
            norms = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32) if dora else None
            start_lora(name, A, B, magnitude, norms)


def gathered(parameters, write=False):
    """The parameters whole: a ZeRO-3 gather where DeepSpeed partitioned them, otherwise nothing to do."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)


def disk_name(module: str, part: str) -> str:
    return f"{PREFIX}{module}.{part}" + ("" if part == "lora_magnitude_vector" else ".weight")


def scaling_divisor(r, use_rslora=False):
    """What alpha is divided by: the rank, or its square root for rsLoRA, as in PEFT."""
    return math.sqrt(r) if use_rslora else r


def lora_scaling(alpha, r, use_rslora=False) -> float:
    """The factor s of s B A. Every scaling of this repository that is not PEFT's own comes from here."""
    return alpha / scaling_divisor(r, use_rslora)


def expert_patterns(shapes: dict, rslora=False, names=None) -> dict:
    """rank_pattern and alpha_pattern for experts of {projection: (rank, scaling)}: for the names on disk, which vLLM
    takes too, and for PEFT's stacks. names: {projection: pattern of the names on disk}, by default the common ones."""
    ranks, alphas = {}, {}
    for projection, (rank, scaling) in shapes.items():
        fused = 1 if projection == "down_proj" else 2  # PEFT puts gate and up together
        on_disk = names[projection] if names else rf"mlp\.experts\.\d+\.{projection}"
        for pattern, r in ((on_disk, rank), (rf"mlp\.experts\.{STACK_OF[projection][0]}", fused * rank)):
            ranks[pattern], alphas[pattern] = r, plain_number(scaling * scaling_divisor(r, rslora))
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def plain_number(number):
    return int(number) if float(number).is_integer() else float(number)


def short_names(adapted, present) -> list[str]:
    """Last names ("q_proj") where every layer of that name is adapted, whole names otherwise."""
    return _endings(adapted, present, 1)


def parameter_names(linears, present) -> list[str]:
    """The target_parameters of gate, up and down of dense layers and shared experts
    ("shared_experts.up_proj.weight")."""
    return [f"{name}.weight" for name in _endings([name for name in linears if name.endswith(PROJECTIONS)], present, 2)]


def _endings(adapted, present, parts) -> list[str]:
    def ending(name):
        return ".".join(name.split(".")[-parts:])

    names = set()
    for short in {ending(name) for name in adapted}:
        ours = {name for name in adapted if ending(name) == short}
        names |= {short} if ours == {name for name in present if ending(name) == short} else ours
    return sorted(names)


def local_tensor(tensor):
    """The part of `tensor` that this rank holds: the tensor itself unless FlatAdapters or FSDP2 have sharded it."""
    if hasattr(tensor, "sharded"):
        return tensor.sharded.local()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def local_part(whole, like):
    """This rank's part of the plain tensor `whole`, laid out as the parameter `like`; no communication."""
    if hasattr(like, "sharded"):
        return like.sharded.part(whole)
    if not hasattr(like, "to_local"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
