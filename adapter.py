"""Adapters: which layers get LoRA, and everything that happens to the trained weights afterwards.

    python adapter.py verify  DIR [--base MODEL]              one line per fault, exit code 1 if there is any
    python adapter.py merge   BASE DIR OUT [--workers N]      base + adapter -> an ordinary checkpoint in OUT
    python adapter.py convert DIR OUT --layout stacked|2d     between per-expert tensors and PEFT's target_parameters tensors
    python adapter.py card    DIR [--scores FILE]             (re)write the model card DIR/README.md
    python adapter.py push    DIR OWNER/NAME [--dry_run]      verify, then upload to the hub

An adapter is a PEFT directory: adapter_config.json and adapter_model.safetensors, plus adapter_manifest.json with a checksum per tensor and
a fingerprint of the base. Tensor names are the base checkpoint's; routed experts are two-dimensional, one per expert and projection. fp32
on disk unless asked otherwise: fp32 is what was trained, and rounding B A to bf16 would move the weights by more than many late steps did.

vLLM evaluates an adapter at the base's full speed, without a merged copy on disk, through the load format "merge_adapter" (see
register_vllm_loader):

    LLM(model=BASE, load_format="merge_adapter", model_loader_extra_config={"adapter": DIR})
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "adapter_manifest.json"
PREFIX = "base_model.model."  # PEFT puts it before every name of the base model
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NOT_ADAPTED = {"gate", "router", "shared_expert_gate", "lm_head"}  # linear layers that route or read out stay frozen
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
EXPERT = re.compile(r"^(?P<stack>.+\.experts)\.(?P<index>\d+)\.(?P<projection>gate_proj|up_proj|down_proj)$")
DISK_NAME = re.compile(rf"^{re.escape(PREFIX)}(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?$")
PEFT_PARAMETER = re.compile(r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)\.default\.weight$")
EXPERT_PARAMETER = re.compile(r"^(?P<stack>.+\.experts)\.(?P<projection>gate_proj|up_proj|down_proj)_lora_(?P<part>A|B|magnitude)$")
WRAPPERS = re.compile(r"(?:_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What two configs must share for an adapter to fit; read from the base's config when saving and compared when verifying.
SHAPE_FIELDS = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size num_experts "
    "n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size first_k_dense_replace"
).split()


# ----------------------------------------------------------------------------------------------------------------------------------
# Arguments and targets
# ----------------------------------------------------------------------------------------------------------------------------------


@dataclass
class LoraArguments:
    """The adapter's shape. Scaling is alpha / r, and the same for attention, dense layers and experts."""

    # --lora_r too: torchrun takes "--r" for an abbreviation of its own flags, even after the script's name
    r: int = field(default=256, metadata={"help": "Rank of attention, dense MLP and shared experts.", "aliases": ["--lora_r"]})
    lora_alpha: int | None = field(default=None, metadata={"help": "Default: 2 * r."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA (DoRA), on routed experts too."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before lora_A; routed experts never use it."})
    expert_r: int | None = field(default=None, metadata={"help": "Rank of a routed expert. Default: r // active experts."})
    target_modules: str | None = field(
        default=None, metadata={"help": "Comma-separated names. Default: every linear layer of attention, dense MLP and shared experts."}
    )

    @property
    def alpha(self) -> int:
        """lora_alpha, or 2 * r when it was left out."""
        return 2 * self.r if self.lora_alpha is None else self.lora_alpha

    def expert_rank(self, config) -> int:
        """Rank of one routed expert of a model with this transformers `config`: a token meets r trained columns, as in a dense layer."""
        return self.expert_r if self.expert_r is not None else max(1, self.r // config.num_experts_per_tok)

    def expert_alpha(self, config) -> float:
        """alpha of one routed expert: alpha / r is the same everywhere."""
        alpha = self.alpha * self.expert_rank(config) / self.r
        return int(alpha) if alpha == int(alpha) else alpha


def base_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of every weight of the decoder layers that an adapter may change, by its name in the base checkpoint without ".weight".

    Works on the plain model (also on the meta device) and on one already wrapped by PEFT, wrap_experts, FSDP2 or ZeRO-3: shapes are the
    whole weight's. Stacked experts appear per expert and projection. Experts in another arrangement (transposed, biased) are left out.
    """
    shapes = {}
    for path, module in model.named_modules():
        name = WRAPPERS.sub("", path + ".").removesuffix(".").removeprefix(PREFIX).removesuffix(".base_layer")
        if not LAYER.search(name) or ".lora_" in name:
            continue
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] not in NOT_ADAPTED:
            shapes[name] = (module.out_features, module.in_features)
        elif name.endswith(".experts") and hasattr(module, "gate_up_proj") and not getattr(module, "is_transposed", False):
            down = getattr(module, "down_proj", None)
            if not isinstance(down, nn.Parameter):
                continue
            experts, hidden, inner = getattr(down, "ds_shape", down.shape)
            for e in range(experts):
                shapes |= {f"{name}.{e}.gate_proj": (inner, hidden), f"{name}.{e}.up_proj": (inner, hidden)}
                shapes[f"{name}.{e}.down_proj"] = (hidden, inner)
    return shapes


def lora_targets(model: nn.Module) -> list[str]:
    """Full names of the linear layers that get LoRA: attention, dense MLP, shared experts; no router, routed expert, lm_head, embedding."""
    return [name for name in base_shapes(model) if not EXPERT.match(name)]


@contextlib.contextmanager
def _targets_as_written():
    """Keep PEFT from reading gate_proj, up_proj and down_proj of a mixture of experts as the stacked expert parameters.

    It does so for adapters of the time when experts were modules, but then the dense layers and shared experts, which still have those
    names, get no LoRA at all.
    """
    from peft.utils import transformers_weight_conversion as conversion

    original = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = original


def apply_lora(model: nn.Module, lora_args: LoraArguments):
    """Wrap `model` with PEFT LoRA or DoRA on lora_targets(model), adapter parameters fp32, everything else frozen; returns the PeftModel.

    Routed experts are fused_moe_lora.wrap_experts's, called before; its parameters stay trainable. Works under ZeRO-3's zero.Init and on
    the meta device (then call reset_lora_parameters once the weights are loaded). Raises ValueError when `target_modules` names a layer
    that does not exist.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora_targets(model)
    if lora_args.target_modules:
        wanted = [name.strip() for name in lora_args.target_modules.split(",") if name.strip()]
        for name in wanted:
            if not any(target == name or target.endswith("." + name) for target in targets):
                leaves = sorted({target.rsplit(".", 1)[-1] for target in targets})
                raise ValueError(f"--target_modules {name}: the model has no such linear layer; choose from {', '.join(leaves)}")
        targets = [target for target in targets if any(target == name or target.endswith("." + name) for name in wanted)]
    if not targets:
        raise ValueError(f"{type(model).__name__} has no linear layer named ...layers.N... that LoRA could be applied to")
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
    got = {name.removeprefix(PREFIX).split(".lora_A")[0] for name, _ in peft_model.named_parameters() if ".lora_A." in name}
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
def reset_lora_parameters(model: nn.Module) -> None:
    """Initialise PEFT's layers in fp32: A Kaiming-uniform, B zero, DoRA's magnitude the row norm of W (PEFT's own is in the base's dtype).

    Call it after loading weights into a model that was built on the meta device. ZeRO-3 gathers one layer's base weight at a time.
    """
    for module in model.modules():
        if "default" not in getattr(module, "lora_A", {}) or not hasattr(module, "get_base_layer"):
            continue
        A, B, weight = module.lora_A["default"].weight, module.lora_B["default"].weight, module.get_base_layer().weight
        magnitude = module.lora_magnitude_vector["default"].weight if "default" in module.lora_magnitude_vector else None
        with _gathered([A, B, *([] if magnitude is None else [weight, magnitude])], write=True):
            nn.init.kaiming_uniform_(A, a=5**0.5)
            nn.init.zeros_(B)
            if magnitude is not None:
                magnitude.copy_(torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32))


def _gathered(parameters, write=False):
    """The parameters whole: a ZeRO-3 gather where DeepSpeed partitioned them, otherwise nothing to do."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if write else None)


# ----------------------------------------------------------------------------------------------------------------------------------
# From and to a model
# ----------------------------------------------------------------------------------------------------------------------------------


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0


def _adapter_parameters(model):
    """Every adapter parameter as (module, part, projection or None, parameter): the base's module name, the part as named on disk."""
    # not deduplicated: gate and up of an expert may share one lora_A, which is on disk under both names
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = WRAPPERS.sub("", path).removeprefix("module.").removeprefix(PREFIX)
        if match := PEFT_PARAMETER.match(name):
            yield match["module"], match["part"], None, parameter
        elif match := EXPERT_PARAMETER.match(name):
            part = "lora_magnitude_vector" if match["part"] == "magnitude" else f"lora_{match['part']}"
            yield match["stack"], part, match["projection"], parameter


def _disk_name(module: str, part: str) -> str:
    return f"{PREFIX}{module}.{part}" + ("" if part == "lora_magnitude_vector" else ".weight")


def _whole(parameter):
    """The parameter's whole fp32 value; collective for DTensor and ZeRO-3 parameters.

    DeepSpeed trains an fp32 master copy and keeps the parameter itself in bf16: the master is the adapter.
    """
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        if hasattr(parameter, "_z3_optimizer"):
            from deepspeed.utils import safe_get_full_fp32_param

            return safe_get_full_fp32_param(parameter).view(parameter.ds_shape)
        with _gathered([parameter]):
            return parameter.detach().clone()
    if hasattr(parameter, "_hp_mapping") and parameter._hp_mapping is not None:
        return parameter.get_full_hp_param()
    return parameter


@torch.no_grad()
def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every adapter tensor under its name on disk, whole, CPU, fp32. Collective: call it on all ranks; ranks other than 0 get {}.

    Only adapter parameters are gathered, one at a time, so the frozen base is never touched and a device needs room for one of them.
    """
    tensors = {}
    for module, part, projection, parameter in _adapter_parameters(model):
        value = _whole(parameter).detach()
        if _rank() != 0:
            continue
        value = value.to("cpu", torch.float32, copy=True)
        if projection is None:
            tensors[_disk_name(module, part)] = value
        else:  # (E, ...): one tensor per expert, each with its own storage, as safetensors wants
            for e, one in enumerate(value):
                tensors[_disk_name(f"{module}.{e}.{projection}", part)] = one.clone()
    return tensors


@torch.no_grad()
def load_adapter(model: nn.Module, directory) -> None:
    """Load the adapter in `directory` (either layout) into a model that already has LoRA layers of the same shape, in place.

    Works on plain, FSDP2 and zero.Init-partitioned models (before deepspeed.initialize). Raises ValueError naming the first key that has no
    counterpart on the other side, and when rank or scaling differ.
    """
    adapter = Adapter(directory).check()
    missing, shared = set(adapter.slots), {}
    uses = Counter(id(parameter) for *_, parameter in _adapter_parameters(model))
    scalings = _model_scalings(model)
    for module, part, projection, parameter in _adapter_parameters(model):
        if hasattr(parameter, "_z3_optimizer"):
            raise ValueError("load_adapter: load the adapter before deepspeed.initialize, which copies the weights into its optimizer")
        shape = getattr(parameter, "ds_shape", parameter.shape)
        names = [module] if projection is None else [f"{module}.{e}.{projection}" for e in range(shape[0])]
        for name in names:
            if name not in adapter.slots:
                raise ValueError(f"{adapter.path}: no {_disk_name(name, part)}, which the model has")
            missing.discard(name)
            if abs(adapter.slots[name].scaling - scalings[module]) > 1e-6 * scalings[module]:
                raise ValueError(f"{adapter.path}: {name} has scaling {adapter.slots[name].scaling:g}, the model has {scalings[module]:g}")
        values = [adapter.factor(name, part) for name in names]
        if values[0] is None:
            raise ValueError(f"{adapter.path}: no {_disk_name(names[0], part)}, which the model has (the adapter is LoRA, the model DoRA)")
        value = values[0] if projection is None else torch.stack(values)
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{adapter.path}: {_disk_name(names[0], part)} is {tuple(value.shape)}, the model's is {tuple(shape)}")
        if uses[id(parameter)] > 1 and not torch.equal(shared.setdefault(id(parameter), value), value):
            raise ValueError(f"{adapter.path}: {_disk_name(names[0], part)} differs from the projection that the model shares it with")
        _assign(parameter, value)
    if missing:
        raise ValueError(f"{adapter.path}: nothing in the model takes {len(missing)} modules, first {sorted(missing)[0]}")
    if adapter.use_dora and not any(part == "lora_magnitude_vector" for _, part, _, _ in _adapter_parameters(model)):
        raise ValueError(f"{adapter.path}: the adapter is DoRA, the model has no lora_magnitude_vector")


def _assign(parameter, value):
    """Copy a whole tensor into a plain, DTensor or ZeRO-3 parameter."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        # every rank read the file, so each cuts its own shard: no communication
        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None))
        return
    with _gathered([parameter], write=True):
        parameter.copy_(value)


def _model_scalings(model) -> dict[str, float]:
    """alpha / r of each adapted module, by name; a stack of experts counts as one."""
    scalings = {}
    for path, module in model.named_modules():
        name = WRAPPERS.sub("", path + ".").removesuffix(".").removeprefix("module.").removeprefix(PREFIX)
        if hasattr(module, "gate_proj_lora_A"):
            scalings[name] = float(module.scaling)
        elif "default" in getattr(module, "lora_A", {}):
            scalings[name] = float(module.scaling["default"])
    return scalings


# ----------------------------------------------------------------------------------------------------------------------------------
# On disk
# ----------------------------------------------------------------------------------------------------------------------------------


def save_adapter(model, directory, base_model, tokenizer=None, lora_args=None, tensors=None, allow_zero=False, dtype=torch.float32) -> None:
    """Write `model`'s adapter to `directory` (a temporary name, then renamed) and verify it; raises ValueError naming the fault.

    Args:
        base_model: hub id or directory of the base, for the configuration; if its weights are on this machine they are fingerprinted.
        tokenizer: saved beside the adapter, with its chat template.
        lora_args: LoraArguments to check the model against (rank, alpha, DoRA).
        tensors: what adapter_state_dict(model) returned. With it this call is not collective and a rank that holds {} returns at once;
            without it every rank must call, and every rank raises if rank 0 found a fault.
        allow_zero: accept an adapter whose lora_B is still zero (a save before the first step).
        dtype: torch.float32 (what was trained) or torch.bfloat16 (half the bytes, rounded).
    """
    collective = tensors is None
    tensors = adapter_state_dict(model) if collective else tensors
    fault = [f"{directory}: rank 0 could not save the adapter"]
    try:
        if tensors:
            _write_adapter(model, Path(directory), str(base_model), tokenizer, lora_args, tensors, allow_zero, dtype)
        fault = [None]
    except (ValueError, OSError) as error:
        fault = [str(error)]
    finally:  # whatever happened on rank 0, the others must not wait for it
        if collective and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(fault, src=0)
    if fault[0]:
        raise ValueError(fault[0])


def _write_adapter(model, directory, base_model, tokenizer, lora_args, tensors, allow_zero, dtype):
    from safetensors.torch import save_file

    while not hasattr(model, "config") and hasattr(model, "module"):  # DistributedDataParallel, DeepSpeedEngine
        model = model.module
    config = _adapter_config(model, base_model)
    if lora_args is not None:
        for key, value in {"r": lora_args.r, "lora_alpha": lora_args.alpha, "use_dora": lora_args.use_dora}.items():
            if config.get(key) != value:
                raise ValueError(f"{directory}: {key} is {config.get(key)} in the model but {value} in the arguments")
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    manifest = {
        "base_model": base_model,
        "base_config": _shape_fields(getattr(model, "config", None)),
        "base_tensors": _fingerprint(base_model, tensors),
        "scaling": {key: config[key] for key in ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora")},
        "tensors": _checksums(tensors),
    }
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=0) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(temporary)
    (temporary / "README.md").write_text(model_card(directory, config))
    if faults := _verify(temporary, shapes=base_shapes(model), base=None, allow_zero=allow_zero):
        raise ValueError(f"{temporary}: the adapter just saved is not sound: " + "; ".join(faults[:5]))
    if not directory.exists():
        os.replace(temporary, directory)
        return
    # A trainer's own state beside the adapter stays. Without its configuration the directory is no adapter: it goes first and comes last.
    (directory / CONFIG).unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG):
        os.replace(path, directory / path.name)
    temporary.rmdir()


def _adapter_config(model, base_model) -> dict:
    """PEFT's LoraConfig for what `model` holds, such that PEFT, too, finds every tensor of the directory.

    PEFT since transformers 5 knows experts as stacked parameters: it fuses gate and up of our per-expert tensors into one of twice the rank
    and takes gate_proj, up_proj and down_proj in target_modules for these. Dense layers and shared experts of such a model are therefore
    named as target_parameters, which saves them under the same names and shapes.
    """
    from peft import LoraConfig

    linears, experts = {}, {}
    for name, module in model.named_modules():
        name = WRAPPERS.sub("", name + ".").removesuffix(".").removeprefix(PREFIX)
        if hasattr(module, "gate_proj_lora_A"):
            experts[name] = module
        elif "default" in getattr(module, "lora_A", {}):
            linears[name] = module
    if not linears and not experts:
        raise ValueError("the model has no LoRA layers: call wrap_experts and apply_lora first")
    expert_shapes = {(module.r, float(module.lora_alpha), module.use_dora) for module in experts.values()}
    linear_shapes = {(m.r["default"], float(m.lora_alpha["default"]), m.use_dora["default"]) for m in linears.values()}
    if len(expert_shapes) > 1 or len(linear_shapes) > 1:
        raise ValueError(f"layers differ in (rank, alpha, DoRA): {sorted(linear_shapes | expert_shapes)}; one shape for all is expected")
    r, alpha, dora = next(iter(linear_shapes or expert_shapes))
    present = set(base_shapes(model))
    if not any(EXPERT.match(name) for name in present):
        settings = {"target_modules": _short_names(linears, present)}
    else:
        settings = {"target_modules": _short_names([name for name in linears if not name.endswith(PROJECTIONS)], present)}
        settings["target_parameters"] = _parameter_names(linears, present)
    if experts:
        expert_r, expert_alpha, expert_dora = next(iter(expert_shapes))
        if expert_dora != dora:
            raise ValueError("experts and the other layers must agree on use_dora")
        settings["target_parameters"] += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        settings |= _expert_patterns({projection: (expert_r, expert_alpha / expert_r) for projection in PROJECTIONS})
    dropout = 0.0 if experts else max((getattr(module.lora_dropout["default"], "p", 0.0) for module in linears.values()), default=0.0)
    config = LoraConfig(
        r=r,
        lora_alpha=_plain(alpha),
        lora_dropout=dropout,
        use_dora=dora,
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
        **settings,
    )
    return _config_dict(config)


def _expert_patterns(shapes: dict, rslora=False) -> dict:
    """rank_pattern and alpha_pattern for experts of {projection: (rank, scaling)}: for our and vLLM's names and for PEFT's stacks."""
    ranks, alphas = {}, {}
    for projection, (rank, scaling) in shapes.items():
        fused = 1 if projection == "down_proj" else 2  # PEFT puts gate and up together
        stack = "down_proj" if projection == "down_proj" else "gate_up_proj"
        for pattern, r in ((rf"mlp\.experts\.\d+\.{projection}", rank), (rf"mlp\.experts\.{stack}", fused * rank)):
            ranks[pattern], alphas[pattern] = r, _plain(scaling * (r**0.5 if rslora else r))
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def _plain(number):
    return int(number) if float(number).is_integer() else float(number)


def _config_dict(config) -> dict:
    """A LoraConfig as what its save_pretrained writes."""
    values = config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def _short_names(adapted, present) -> list[str]:
    """Last names ("q_proj") where every layer of that name is adapted, whole names otherwise."""
    return _endings(adapted, present, 1)


def _parameter_names(linears, present) -> list[str]:
    """The target_parameters of gate, up and down of dense layers and shared experts ("shared_experts.up_proj.weight")."""
    return [f"{name}.weight" for name in _endings([name for name in linears if name.endswith(PROJECTIONS)], present, 2)]


def _endings(adapted, present, parts) -> list[str]:
    def ending(name):
        return ".".join(name.split(".")[-parts:])

    names = set()
    for short in {ending(name) for name in adapted}:
        ours = {name for name in adapted if ending(name) == short}
        names |= {short} if ours == {name for name in present if ending(name) == short} else ours
    return sorted(names)


def _shape_fields(config) -> dict:
    return {} if config is None else {key: getattr(config, key) for key in SHAPE_FIELDS if getattr(config, key, None) is not None}


def _checksum(tensor) -> str:
    """The first 64 bits of a tensor's sha256: enough to notice damage or a swap, small enough for 70,000 expert tensors."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()[:16]


def _checksums(tensors) -> dict[str, str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(_checksum, tensors.values()), strict=True))


def read_header(path) -> tuple[dict, int]:
    """({name: {"dtype", "shape", "data_offsets"}}, first data byte) of a safetensors file; ValueError if it is damaged or cut short."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: truncated: its header is longer than the file ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise ValueError(f"{path}: not a safetensors file (its header is not JSON)") from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((info["data_offsets"][1] for info in header.values()), default=0)
    if size != expected:
        raise ValueError(f"{path}: truncated or damaged: {size:,} bytes, its header asks for {expected:,}")
    return header, 8 + length


@dataclass
class Slot:
    """Where the adapter of one two-dimensional base weight is found: its tensors' names and, in PEFT's stacked layout, the part of them."""

    A: str
    B: str
    magnitude: str | None
    rank: int
    scaling: float
    expert: int | None = None  # set in the stacked layout: A is (E * stack_rank, in), B (out, stack_rank * E), expert fastest
    stack_rank: int = 0
    ranks: slice = field(default_factory=lambda: slice(None))  # of the stack's rank
    rows: slice = field(default_factory=lambda: slice(None))  # of the stack's out: gate first, up second


class Adapter:
    """An adapter directory, read lazily, as (A, B, magnitude, scaling) per two-dimensional base weight, whichever layout it is stored in.

    Attributes: config (adapter_config.json), header, slots ({base weight name without ".weight": Slot}), use_dora, stacked, used (how often
    each slot was merged), manifest (what save_adapter recorded; {} for an adapter that others wrote). Rank, alpha and DoRA come from the
    config. Raises ValueError naming the file and the key for anything that does not fit.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        self.path = self.directory / WEIGHTS
        self.config = _read_config(self.directory)
        if not self.path.is_file():
            raise ValueError(f"{self.directory}: no {WEIGHTS}")
        self.header, _ = read_header(self.path)
        self.use_dora = bool(self.config.get("use_dora"))
        self.manifest = self._read_manifest()
        self.checksums, self._checked = self.manifest.get("tensors", {}), set()
        self.used = Counter()
        self.stacked, self._stacks = False, {}
        self.slots: dict[str, Slot] = {}
        modules = defaultdict(dict)
        for key, info in self.header.items():
            match = DISK_NAME.match(key)
            if not match:
                raise ValueError(
                    f"{self.path}: {key} is not a LoRA tensor ({PREFIX}<layer>.lora_A.weight, lora_B or lora_magnitude_vector)"
                )
            if info["dtype"] not in DTYPES:
                raise ValueError(f"{self.path}: {key} is {info['dtype']}; expected one of {', '.join(DTYPES)}")
            modules[match["module"]][match["part"]] = key
        if not modules:
            raise ValueError(f"{self.path}: holds no tensors")
        for module, parts in sorted(modules.items()):
            self._add(module, parts)

    def _add(self, module, parts):
        for part in ("lora_A", "lora_B") + (("lora_magnitude_vector",) if self.use_dora else ()):
            if part not in parts:
                raise ValueError(f"{self.path}: {_disk_name(module, part)} is missing")
        if "lora_magnitude_vector" in parts and not self.use_dora:
            raise ValueError(f"{self.path}: {parts['lora_magnitude_vector']} is DoRA's, but {CONFIG} says use_dora false")
        A, B, magnitude = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
        a, b = self.header[A]["shape"], self.header[B]["shape"]
        if module.endswith((".experts", ".experts.base_layer")):
            return self._add_stack(module, A, B, a, b)
        rank, scaling = self.rank_and_scaling(module)
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise ValueError(f"{self.path}: {module}: lora_A {a} and lora_B {b} do not have the rank {rank} that {CONFIG} gives")
        if magnitude and self.header[magnitude]["shape"] != [b[0]]:
            raise ValueError(f"{self.path}: {magnitude} is {self.header[magnitude]['shape']}, expected [{b[0]}]")
        self.slots[module] = Slot(A, B, magnitude, rank, scaling)

    def _add_stack(self, module, A, B, a, b):
        """PEFT nests its wrappers: experts.base_layer is gate_up and experts is down, unless only one of the two was trained."""
        if self.use_dora:
            raise ValueError(f"{self.path}: {A}: PEFT has no DoRA on stacked experts")
        stack = module.removesuffix(".base_layer")
        named = [name.rsplit(".", 1)[-1] for name in self.config.get("target_parameters") or []]
        both = f"{PREFIX}{stack}.base_layer.lora_A.weight" in self.header
        kind = "gate_up_proj" if module != stack or (not both and "gate_up_proj" in named) else "down_proj"
        rank, scaling = self.rank_and_scaling(f"{stack}.{kind}")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % rank:
            raise ValueError(f"{self.path}: {module}: stacked lora_A {a} and lora_B {b} do not have the rank {rank} that {CONFIG} gives")
        self.stacked = True
        inner, half = b[0] // 2, rank // 2
        disjoint = kind == "gate_up_proj" and rank % 2 == 0 and self._block_diagonal(B, rank)
        for e in range(a[0] // rank):
            if kind == "down_proj":
                self.slots[f"{stack}.{e}.down_proj"] = Slot(A, B, None, rank, scaling, e, rank)
                continue
            for projection, rows, ranks in (("gate", slice(0, inner), slice(0, half)), ("up", slice(inner, None), slice(half, None))):
                slot = Slot(A, B, None, half if disjoint else rank, scaling, e, rank, ranks if disjoint else slice(None), rows)
                self.slots[f"{stack}.{e}.{projection}_proj"] = slot

    def _block_diagonal(self, key, rank) -> bool:
        """True if gate and up of a stacked lora_B use different halves of the rank, as they do when two adapters were put together."""
        B = self.stored(key).unflatten(1, (rank, -1))
        inner, half = B.shape[0] // 2, rank // 2
        return not B[:inner, half:].any() and not B[inner:, :half].any()

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """Rank and alpha / r (alpha / sqrt r for rsLoRA) of a module by PEFT's rule: the first pattern that ends its name wins."""

        def lookup(patterns, default):
            for pattern, value in (self.config.get(patterns) or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            return self.config[default]

        rank, alpha = lookup("rank_pattern", "r"), lookup("alpha_pattern", "lora_alpha")
        return rank, alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    @functools.cached_property
    def _file(self):
        from safetensors import safe_open

        return safe_open(self.path, framework="pt")

    def stored(self, key: str) -> torch.Tensor:
        """One tensor as it is on disk."""
        return self._file.get_tensor(key)

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, compared with its checksum when it is first read; ValueError if it is not what was saved."""
        value = self._file.get_tensor(key)
        if key in self.checksums and key not in self._checked:
            if _checksum(value) != self.checksums[key]:
                raise ValueError(f"{self.path}: {key} is not what was saved (its checksum differs from {MANIFEST})")
            self._checked.add(key)
        return value

    def factor(self, name: str, part: str) -> torch.Tensor | None:
        """lora_A (r, in), lora_B (out, r) or lora_magnitude_vector (out,; None for LoRA) of one base weight in fp32."""
        slot = self.slots[name]
        if part == "lora_magnitude_vector":
            return self.tensor(slot.magnitude).float() if slot.magnitude else None
        key = slot.A if part == "lora_A" else slot.B
        value = self.tensor(key) if slot.expert is None else self._recent(key)
        if slot.expert is not None and part == "lora_A":
            value = value.unflatten(0, (-1, slot.stack_rank))[slot.expert, slot.ranks]
        elif slot.expert is not None:
            value = value.unflatten(1, (slot.stack_rank, -1))[slot.rows, slot.ranks, slot.expert]
        return value.float().contiguous()

    def _recent(self, key) -> torch.Tensor:
        """One of the last four stacks read: the experts of a layer are asked for one after another."""
        if key not in self._stacks:
            while len(self._stacks) >= 4:
                del self._stacks[next(iter(self._stacks))]
            self._stacks[key] = self.tensor(key)
        return self._stacks[key]

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(A (r, in), B (out, r), magnitude (out,) or None) of one base weight in fp32."""
        return self.factor(name, "lora_A"), self.factor(name, "lora_B"), self.factor(name, "lora_magnitude_vector")

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of the base weight that a slot is for."""
        slot = self.slots[name]
        out, features = self.header[slot.B]["shape"][0], self.header[slot.A]["shape"][1]
        return (len(range(*slot.rows.indices(out))), features)

    def pieces(self, name: str, shape) -> list[tuple[str, int, int]]:
        """The parts of base tensor `name` that the adapter changes: (slot, first row, row after the last) of it seen as (rows, in).

        A stack of experts (E, out, in) counts as E * out rows. Raises ValueError if the shapes do not fit.
        """
        plain, shape = name.removesuffix(".weight"), tuple(shape)
        found = []
        if plain in self.slots:
            found = [(plain, 0, shape[0])]
        elif plain.endswith((".experts.gate_up_proj", ".experts.down_proj")) and len(shape) == 3:
            stack, kind = plain.rsplit(".", 1)
            parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            height = shape[1] // len(parts)
            for e in range(shape[0]):
                for i, part in enumerate(parts):
                    if (slot := f"{stack}.{e}.{part}") in self.slots:
                        found.append((slot, e * shape[1] + i * height, e * shape[1] + (i + 1) * height))
        for slot, first, last in found:
            if self.shape(slot) != (last - first, shape[-1]):
                ours = self.shape(slot)
                raise ValueError(f"{self.path}: {slot} is for {ours}, {name} of the base is {shape}: another base model's adapter?")
        return found

    def _read_manifest(self) -> dict:
        path = self.directory / MANIFEST
        try:
            return json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None

    def check(self, base=None) -> "Adapter":
        """Itself; raises ValueError if names or scaling are not those in the manifest, experts are missing, or `base` is another base."""
        if faults := _manifest_faults(self) + _expert_faults(self):
            raise ValueError("; ".join(faults[:5]))
        if base is not None and (faults := base_faults(self.manifest, str(base))):
            raise ValueError(f"{self.directory}: {'; '.join(faults)} (any_base merges regardless)")
        return self

    def identity(self) -> str:
        """A checksum of the configuration and the tensors, to tell one adapter from another."""
        digest = hashlib.sha256((self.directory / CONFIG).read_bytes())
        manifest = self.directory / MANIFEST
        if manifest.is_file():
            digest.update(manifest.read_bytes())
        else:
            with open(self.path, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()[:16]


def _read_config(directory) -> dict:
    """adapter_config.json; ValueError if it is missing or asks for something that this module does not merge."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory}: no {CONFIG}: not an adapter directory")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise ValueError(f"{path}: {key} is {config.get(key)!r}; expected a positive number")
    for key in (
        "lora_bias",
        "fan_in_fan_out",
        "modules_to_save",
        "layer_replication",
        "use_qalora",
        "use_bdlora",
        "trainable_token_indices",
    ):
        if config.get(key):
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias={config['bias']!r} is not supported")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().split("_")[0] in ("pissa", "olora", "corda", "loftq"):
        raise ValueError(f"{path}: init_lora_weights={init!r} changed the base weights: convert the adapter to plain LoRA with PEFT first")
    return config


# ----------------------------------------------------------------------------------------------------------------------------------
# Verify
# ----------------------------------------------------------------------------------------------------------------------------------


def verify_adapter(directory, base=None, allow_zero=False) -> list[str]:
    """Faults of the adapter in `directory`, one line each; an empty list means it is sound.

    Checks files, names, shapes, ranks and scaling against the configuration, checksums against the manifest, finite and non-zero values,
    completeness of layers and experts, and the base: `base` (directory or hub id), or the one that the configuration names if it is on this
    machine. allow_zero accepts lora_B that is zero throughout (an adapter saved before the first step).
    """
    shapes = None
    try:
        name = base or _read_config(directory).get("base_model_name_or_path")
    except ValueError as error:
        return [str(error)]
    try:
        shapes = _shapes_of_base(str(name)) if name and (base or local_base(name)) else None
    except (OSError, ValueError) as error:
        return [f"base {name}: {str(error).splitlines()[0]}"]
    return _verify(Path(directory), shapes, name if shapes is not None else None, allow_zero)


def _shapes_of_base(name) -> dict[str, tuple[int, int]]:
    """base_shapes of a model from its config alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return base_shapes(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name)))


def _verify(directory, shapes, base, allow_zero) -> list[str]:
    try:
        adapter = Adapter(directory)
    except ValueError as error:
        return [str(error)]
    faults = _manifest_faults(adapter) + _value_faults(adapter, allow_zero) + _expert_faults(adapter)
    scalings = {round(slot.scaling, 6) for slot in adapter.slots.values()}
    if len(scalings) > 1:
        faults.append(f"{directory / CONFIG}: alpha / r differs from layer to layer: {sorted(scalings)}; servers assume one scaling")
    if shapes is not None:
        faults += _shape_faults(adapter, shapes)
    if base is not None:
        faults += base_faults(adapter.manifest, base)
    return faults


def _manifest_faults(adapter) -> list[str]:
    faults = []
    for key, value in adapter.manifest.get("scaling", {}).items():
        if adapter.config.get(key) != value:
            faults.append(f"{adapter.directory / CONFIG}: {key} is {adapter.config.get(key)}, it was {value} when the adapter was saved")
    if saved := adapter.checksums:
        faults += [f"{adapter.path}: {key} is missing" for key in saved if key not in adapter.header]
        faults += [f"{adapter.path}: {key} was not there when the adapter was saved" for key in adapter.header if key not in saved]
    return faults


def _value_faults(adapter, allow_zero) -> list[str]:
    saved = adapter.checksums
    owners = {checksum: key for key, checksum in saved.items()}
    zero_B = {}

    def check(key):
        tensor, name = adapter.stored(key), f"{adapter.path}: {key}"
        nonzero = tensor.count_nonzero().item()
        part = DISK_NAME.match(key)["part"]
        if part == "lora_B":
            zero_B[key] = nonzero == 0
        if not torch.isfinite(tensor).all():
            return f"{name} has {(~torch.isfinite(tensor)).sum().item():,} values that are not finite"
        checksum = _checksum(tensor) if key in saved else None
        if key in saved and checksum != saved[key]:
            if checksum in owners:
                return f"{name} holds what was saved as {owners[checksum]}: the two were swapped"
            return f"{name} is {'all zeros' if nonzero == 0 else 'not what was saved'} (its checksum differs from {MANIFEST})"
        if part == "lora_A" and (tensor == 0).all(dim=1).any():
            return f"{name} has rows of zeros: a part of it was lost before it was saved"
        if part == "lora_magnitude_vector" and nonzero < tensor.numel():
            return f"{name} has zeros: a part of it was lost before it was saved"
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        faults = [fault for fault in pool.map(check, adapter.header) if fault]
    if not allow_zero:
        faults += _zero_faults(adapter, zero_B)
    return faults


def _zero_faults(adapter, zero_B) -> list[str]:
    """lora_B that is still zero was not trained. A single expert may be: the router can leave it out; a whole layer of them may not."""
    if zero_B and all(zero_B.values()):
        return [f"{adapter.path}: every lora_B is zero: nothing was trained (allow_zero accepts an adapter saved before the first step)"]
    layers = defaultdict(list)
    for name, slot in adapter.slots.items():
        match = EXPERT.match(name)
        group = f"{match['stack']}.*.{match['projection']}" if match else name
        layers[group].append(zero_B[slot.B])
    return [f"{adapter.path}: {group}: lora_B is all zeros: it was not trained" for group, zeros in layers.items() if all(zeros)]


def _expert_faults(adapter) -> list[str]:
    """Every layer must have the same experts, 0 to E - 1, with all three projections."""
    layers = defaultdict(set)
    for name in adapter.slots:
        if match := EXPERT.match(name):
            layers[match["stack"]].add((int(match["index"]), match["projection"]))
    projections = {projection for found in layers.values() for _, projection in found}
    count = 1 + max((e for found in layers.values() for e, _ in found), default=-1)
    faults = []
    for stack, found in layers.items():
        for e in range(count):
            if lost := [p for p in PROJECTIONS if p in projections and (e, p) not in found]:
                faults.append(f"{adapter.path}: expert {e} of {stack} has no {', '.join(lost)}")
    return faults


def _expected(adapter, shapes) -> set[str]:
    """The base weights that the configuration says are adapted, by PEFT's own matching."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(
        **{k: adapter.config.get(k) for k in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")}
    )
    if config.target_modules == "all-linear":
        return set(shapes)
    parameters = adapter.config.get("target_parameters") or []
    expected = set()
    for name in shapes:
        match = EXPERT.match(name)
        stacked = match and f"{match['stack']}.{'down_proj' if match['projection'] == 'down_proj' else 'gate_up_proj'}"
        by_parameter = any((stacked or name + ".weight").endswith("." + parameter) for parameter in parameters)
        if by_parameter or (config.target_modules and check_target_module_exists(config, name)):
            expected.add(name)
    return expected


def _shape_faults(adapter, shapes) -> list[str]:
    faults = []
    unknown = [name for name in adapter.slots if name not in shapes]
    faults += [f"{adapter.path}: {name} is no linear layer of the base model" for name in unknown]
    for name in adapter.slots:
        if name in shapes and adapter.shape(name) != shapes[name]:
            faults.append(f"{adapter.path}: {name} is for a weight of shape {adapter.shape(name)}, the base has {shapes[name]}")
    return faults + [f"{adapter.path}: {name} is missing" for name in sorted(_expected(adapter, shapes) - set(adapter.slots))]


def base_faults(manifest, base, revision=None) -> list[str]:
    """How `base`, a directory or hub id, differs from what an adapter's manifest recorded of its base, in lines; [] if it does not."""
    from transformers import AutoConfig

    trained_on, faults = manifest.get("base_model"), []
    found = _shape_fields(AutoConfig.from_pretrained(base, revision=revision))
    for key, value in manifest.get("base_config", {}).items():
        if found.get(key) != value:
            faults.append(f"base {base}: {key} is {found.get(key)}; the adapter was trained on {trained_on}, where it is {value}")
    recorded = manifest.get("base_tensors", {})
    directory = local_base(base)
    if recorded and directory and not faults:
        now = _row_checksums(directory, list(recorded))
        for name, checksum in recorded.items():
            if now.get(name) != checksum:
                faults.append(f"base {base}: {name} is not that of {trained_on}: this is another base model's adapter")
                break
    return faults


def local_base(name) -> Path | None:
    """The directory of a base model that is on this machine, given as a directory or a hub id; None if it is not."""
    if os.path.isfile(os.path.join(name, "config.json")):
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(str(name), "config.json")
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def _fingerprint(base_model, keys) -> dict[str, str]:
    """Checksums of the first row of up to 16 adapted base weights, to tell apart bases of the same shape; {} if the base is not here."""
    directory = local_base(base_model)
    modules = sorted({DISK_NAME.match(key)["module"] for key in keys})
    modules = [module for module in modules if not EXPERT.match(module)]
    chosen = [modules[i * len(modules) // 16] for i in range(16)] if len(modules) > 16 else modules
    return _row_checksums(directory, [f"{module}.weight" for module in dict.fromkeys(chosen)]) if directory else {}


def _row_checksums(directory, names) -> dict[str, str]:
    """Checksum of each named weight's first row in bf16: a base saved in fp32 equals its bf16 copy. Names not found are left out."""
    from safetensors import safe_open

    wanted, checksums = set(names), {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in wanted & set(file.keys()):
                checksums[name] = _checksum(file.get_slice(name)[:1].to(torch.bfloat16))
    return checksums


def norm_table(directory) -> str:
    """A table of lora_B's root mean square times 1e4 per layer and projection (experts: the least, the mean and the most of a layer's)."""
    adapter = Adapter(directory)
    cells, columns = defaultdict(lambda: defaultdict(list)), {}
    for name in adapter.slots:
        match, layer = EXPERT.match(name), LAYER.search(name)
        column = f"expert {match['projection']}" if match else ".".join(name.split(".")[-2:]).replace("self_attn.", "").replace("mlp.", "")
        columns[column] = None
        B = adapter.factor(name, "lora_B")
        cells[int(layer[1]) if layer else -1][column].append(B.square().mean().sqrt().item() * 1e4)
    rows = [["layer", *columns]]
    for layer in sorted(cells):
        row = [str(layer)]
        for column in columns:
            values = cells[layer].get(column)
            spread = [min(values), sum(values) / len(values), max(values)] if values and len(values) > 1 else values or []
            row.append("/".join(f"{value:.2f}" for value in spread) or "-")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


# ----------------------------------------------------------------------------------------------------------------------------------
# Convert
# ----------------------------------------------------------------------------------------------------------------------------------


def convert_adapter(directory, out, layout="2d", dtype=None) -> None:
    """Write the adapter in `directory` to `out` with its experts in another layout, without changing what it does.

    layout "2d": one tensor per expert and projection, which vLLM and adapter_config's rank_pattern know. "stacked": PEFT's
    target_parameters, experts.base_layer for gate and up together (of twice the rank, block-diagonal) and experts for down. Raises
    ValueError for DoRA experts, for which PEFT has no stacked form, and for experts that differ in rank or are incomplete.
    """
    from safetensors.torch import save_file

    adapter, out = Adapter(directory).check(), Path(out)
    if (out / CONFIG).exists():
        raise ValueError(f"{out}: holds an adapter already; choose another directory")
    config, dtype = dict(adapter.config), dtype or DTYPES[next(iter(adapter.header.values()))["dtype"]]
    tensors = {
        key: adapter.tensor(key)
        for key in adapter.header
        if not DISK_NAME.match(key)["module"].endswith((".experts", ".experts.base_layer"))
    }
    experts = {name: slot for name, slot in adapter.slots.items() if EXPERT.match(name)}
    if len({(slot.rank, slot.scaling) for slot in experts.values() if not adapter.stacked}) > 1:
        raise ValueError(f"{adapter.path}: experts differ in rank or scaling")
    if experts and (layout == "stacked") != adapter.stacked:
        if layout == "stacked":
            tensors, settings = _stack_experts(adapter, tensors, experts)
        else:
            settings = _unstack_experts(adapter, tensors, experts)
        for key in ("rank_pattern", "alpha_pattern"):  # the first that matches counts
            settings[key] |= {pattern: value for pattern, value in (config.get(key) or {}).items() if pattern not in settings[key]}
        config |= settings
    out.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    manifest = dict(adapter.manifest)
    manifest["scaling"] = {key: config.get(key) for key in ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora")}
    manifest["tensors"] = _checksums(tensors)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / MANIFEST).write_text(json.dumps(manifest, indent=0) + "\n")
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    for path in adapter.directory.iterdir():
        if _is_tokenizer_file(path.name) or path.name in ("generation_config.json", "README.md"):
            shutil.copyfile(path, out / path.name)


def _unstack_experts(adapter, tensors, experts) -> dict:
    for name in experts:
        A, B, _ = adapter.factors(name)
        tensors[_disk_name(name, "lora_A")], tensors[_disk_name(name, "lora_B")] = A.clone(), B.clone()
    shapes = {EXPERT.match(name)["projection"]: (slot.rank, slot.scaling) for name, slot in experts.items()}
    return _expert_patterns(shapes, adapter.config.get("use_rslora"))


def _stack_experts(adapter, tensors, experts) -> tuple[dict, dict]:
    """The stacks of PEFT: A (E * r, in) expert-major; B (out, r * E) expert fastest."""
    if adapter.use_dora:
        raise ValueError(f"{adapter.path}: PEFT has no DoRA on stacked experts; merge the adapter instead")
    tensors = {key: tensor for key, tensor in tensors.items() if not EXPERT.match(DISK_NAME.match(key)["module"])}
    layers = defaultdict(lambda: defaultdict(dict))
    for name in experts:
        match = EXPERT.match(name)
        layers[match["stack"]][match["projection"]][int(match["index"])] = adapter.factors(name)[:2]
    for stack, found in layers.items():
        if set(found) != set(PROJECTIONS):
            raise ValueError(
                f"{adapter.path}: {stack} has {', '.join(sorted(found))} only; the stacked layout is written for all three projections"
            )
        order = range(len(found["down_proj"]))
        A = [torch.cat([found["gate_proj"][e][0], found["up_proj"][e][0]]) for e in order]
        B = [torch.block_diag(found["gate_proj"][e][1], found["up_proj"][e][1]) for e in order]
        for module, As, Bs in (
            (f"{stack}.base_layer", A, B),
            (stack, [found["down_proj"][e][0] for e in order], [found["down_proj"][e][1] for e in order]),
        ):
            tensors[_disk_name(module, "lora_A")] = torch.cat(As)
            tensors[_disk_name(module, "lora_B")] = torch.stack(Bs, dim=-1).flatten(1)
    slot = next(iter(experts.values()))
    settings = _expert_patterns({projection: (slot.rank, slot.scaling) for projection in PROJECTIONS}, adapter.config.get("use_rslora"))
    others = {name for name in adapter.slots if not EXPERT.match(name)}
    settings["target_modules"] = _short_names([name for name in others if not name.endswith(PROJECTIONS)], others)
    settings["target_parameters"] = [*_parameter_names(others, others), "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return tensors, settings


# ----------------------------------------------------------------------------------------------------------------------------------
# Merge
# ----------------------------------------------------------------------------------------------------------------------------------

CHUNK = 1 << 24  # values merged at a time: 64 MiB in fp32, so that memory does not depend on the model


def merged_rows(weight, A, B, magnitude, scaling) -> torch.Tensor:
    """Rows of W + s B A, or of DoRA's m (W + s B A) / ||W + s B A||, the norm per row, in fp32.

    weight (rows, in), A (r, in), B (rows, r), magnitude (rows,) or None.
    """
    merged = torch.addmm(weight.float(), B, A, alpha=scaling)
    if magnitude is not None:
        merged *= (magnitude / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
    return merged


@torch.no_grad()
def merge_tensor(adapter: Adapter, name: str, weight: torch.Tensor, dtype=None, device=None) -> torch.Tensor:
    """Base tensor `name` with the adapter merged in; `weight` itself if the adapter does not change it. Counts in adapter.used.

    The maths is fp32 on `device` (default: where weight is), the result of `dtype` (default: weight's), cast last.
    """
    pieces = adapter.pieces(name, weight.shape)
    if not pieces:
        return weight
    if weight.dtype not in DTYPES.values():
        raise ValueError(f"{name} of the base is {weight.dtype}: quantised; merge into the bf16 checkpoint it was made from")
    flat = weight.to(device=device or weight.device, dtype=torch.float32, copy=True).reshape(-1, weight.shape[-1])
    for slot, first, last in pieces:
        A, B, magnitude = (None if factor is None else factor.to(flat.device) for factor in adapter.factors(slot))
        flat[first:last] = merged_rows(flat[first:last], A, B, magnitude, adapter.slots[slot].scaling)
        adapter.used[slot] += 1
    return flat.reshape(weight.shape).to(dtype or weight.dtype)


def unused_faults(adapter: Adapter, used: Counter) -> list[str]:
    """Adapter modules that were not merged exactly once: a sentence for each kind, naming the first eight."""
    unused = sorted(set(adapter.slots) - set(used))
    twice = sorted(name for name, count in used.items() if count > 1)
    faults = []
    if unused:
        faults.append(f"{len(unused)} adapter modules match nothing in the base: {', '.join(unused[:8])}")
    if twice:
        faults.append(f"{len(twice)} adapter modules match more than one base tensor: {', '.join(twice[:8])}")
    return faults


def merge_adapter(base, adapter, out, workers: int | None = None, any_base: bool = False, log=print) -> None:
    """Write base + adapter as an ordinary checkpoint to directory `out`: the base's shards, names and dtypes, and its configuration files.

    Each shard is streamed through `workers` processes (default: one per core, at most 8 and one per shard) in blocks of rows, so memory
    stays at a few hundred MB a process for any model. Run again after an interruption and finished shards are kept. Raises ValueError when
    the base is quantised or not safetensors, when a key of the adapter does not change exactly one base tensor, or when `out` holds another
    merge.
    """
    directory, out = _download_base(base), Path(out)
    adapter = Adapter(adapter).check(None if any_base else directory)
    _refuse_quantised(directory, json.loads((directory / "config.json").read_text()))
    shards = _shards(directory)
    used, total = Counter(), 0
    for shard in shards:
        header, _ = read_header(shard)
        total += shard.stat().st_size
        for name, info in header.items():
            for slot, _, _ in adapter.pieces(name, info["shape"]):
                if info["dtype"] not in DTYPES:
                    raise ValueError(f"{shard}: {name} is {info['dtype']}: quantised; merge into the bf16 checkpoint it was made from")
                used[slot] += 1
    if faults := unused_faults(adapter, used):
        raise ValueError(f"{adapter.path}: {'; '.join(faults)}")
    _claim(out, base, adapter)
    for path in out.glob("*.safetensors.*.tmp"):  # of a merge that was killed
        path.unlink()
    todo = [shard for shard in shards if not (out / shard.name).exists()]
    done, start = total - sum(shard.stat().st_size for shard in todo), time.perf_counter()
    if done:
        log(f"{len(shards) - len(todo)} of {len(shards)} shards are already merged")
    workers = min(workers or min(os.cpu_count() or 1, 8), max(1, len(todo)))
    fresh = 0
    for shard in _run(workers, [(shard, out / shard.name, adapter.directory) for shard in todo]):
        fresh += shard.stat().st_size
        rate = fresh / 1e9 / (time.perf_counter() - start)
        log(f"{(done + fresh) / 1e9:.2f} of {total / 1e9:.2f} GB merged  {rate:.2f} GB/s  {shard.name}")
    _copy_configuration(directory, adapter.directory, out)


def _run(workers, jobs):
    """Merge the shards in `workers` processes (in this one if 1); yields each shard when it is finished."""
    if workers <= 1:
        for job in jobs:
            yield _merge_shard(*job)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        for future in as_completed([pool.submit(_merge_shard, *job) for job in jobs]):
            yield future.result()


@torch.no_grad()
def _merge_shard(source: Path, target: Path, adapter_directory) -> Path:
    """One shard, byte for byte the base's layout; written to a temporary name and renamed."""
    adapter = Adapter(adapter_directory)
    header, start = read_header(source)
    temporary = target.with_name(target.name + f".{os.getpid()}.tmp")
    with open(source, "rb") as reader, open(temporary, "wb") as writer:
        writer.write(reader.read(start))
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            begin, end = info["data_offsets"]
            reader.seek(start + begin)
            pieces = adapter.pieces(name, info["shape"])
            if not pieces:
                _copy_bytes(reader, writer, end - begin)
                continue
            features, dtype = info["shape"][-1], DTYPES[info["dtype"]]
            row = 0
            for slot, first, last in pieces:
                _copy_bytes(reader, writer, (first - row) * features * dtype.itemsize)
                _merge_rows(reader, writer, adapter, slot, last - first, features, dtype)
                row = last
            _copy_bytes(reader, writer, end - begin - row * features * dtype.itemsize)
        writer.flush()
        os.fsync(writer.fileno())
    os.replace(temporary, target)
    return source


def _copy_bytes(reader, writer, count):
    while count:
        block = reader.read(min(count, 1 << 24))
        writer.write(block)
        count -= len(block)


def _merge_rows(reader, writer, adapter, slot, rows, features, dtype):
    A, B, magnitude = adapter.factors(slot)
    step = max(1, CHUNK // features)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        raw = bytearray(reader.read(count * features * dtype.itemsize))
        weight = torch.frombuffer(raw, dtype=dtype).view(count, features)
        part = None if magnitude is None else magnitude[first : first + count]
        merged = merged_rows(weight, A, B[first : first + count], part, adapter.slots[slot].scaling).to(dtype)
        writer.write(merged.contiguous().flatten().view(torch.uint8).numpy().data)


def _download_base(base) -> Path:
    """The directory of a base given as one or as a hub id, downloaded if it is not on this machine."""
    if os.path.isfile(os.path.join(base, "config.json")):
        return Path(base)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(base), ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*", "consolidated*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"base {base}: neither a model directory nor on the hub ({str(error).splitlines()[0]})") from None


def _shards(directory) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    raise ValueError(f"{directory}: no model.safetensors and no model.safetensors.index.json; save the base as safetensors first")


def _refuse_quantised(name, config: dict) -> None:
    if method := config.get("quantization_config"):
        kind = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", method)
        raise ValueError(f"{name}: the base is quantised ({kind}); an adapter merges into the bf16 checkpoint it was made from")


def _claim(out, base, adapter):
    """Mark `out` as this merge, or refuse it if it is another's."""
    out.mkdir(parents=True, exist_ok=True)
    mark, ours = out / "merge.json", {"base": str(base), "adapter": str(adapter.directory), "adapter_identity": adapter.identity()}
    if mark.is_file():
        theirs = json.loads(mark.read_text())
        if (theirs["base"], theirs["adapter_identity"]) != (ours["base"], ours["adapter_identity"]):
            raise ValueError(f"{out}: holds a merge of {theirs['adapter']} into {theirs['base']}; delete it or choose another directory")
    elif any(out.glob("*.safetensors")):
        raise ValueError(f"{out}: holds a model already; choose another directory")
    mark.write_text(json.dumps(ours, indent=2) + "\n")


def _is_tokenizer_file(name: str) -> bool:
    return name.startswith(
        ("tokenizer", "vocab.", "merges.", "special_tokens_map", "added_tokens", "chat_template", "spiece", "sentencepiece")
    )


def _copy_configuration(base, adapter, out):
    """Configuration of the base, tokenizer and chat template as trained with; the index last, as the sign that all shards are there."""
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    for path in base.iterdir():
        tokenizer = _is_tokenizer_file(path.name)
        if path.name in ("config.json", "generation_config.json") or (tokenizer and not own_tokenizer) or path.suffix == ".py":
            shutil.copyfile(path, out / path.name)
    for path in adapter.iterdir():
        if path.name == "generation_config.json" or (own_tokenizer and _is_tokenizer_file(path.name)):
            shutil.copyfile(path, out / path.name)
    index = base / "model.safetensors.index.json"
    if index.is_file():
        shutil.copyfile(index, out / index.name)


# ----------------------------------------------------------------------------------------------------------------------------------
# Merge while vLLM loads
# ----------------------------------------------------------------------------------------------------------------------------------


def register_vllm_loader() -> None:
    """Give vLLM the load format "merge_adapter": base tensors get the adapter merged in as they stream from disk into the model.

        LLM(model=BASE, load_format="merge_adapter", model_loader_extra_config={"adapter": DIR})

    vLLM calls this in every process through the entry point in pyproject.toml, once the project is installed (pip install -e . --no-deps).
    Sharding, stacking and casting come after, so it serves any tensor-parallel size, dense or mixture of experts, LoRA or DoRA, at the
    speed of the base. Loading fails, naming the keys, unless each adapter module changed exactly one base tensor in every worker.
    """
    import dataclasses

    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class MergeAdapterLoader(DefaultModelLoader):
        def __init__(self, load_config):
            extra = dict(load_config.model_loader_extra_config or {})
            self.adapter_directory, self.any_base = extra.pop("adapter", None), extra.pop("any_base", False)
            if not self.adapter_directory:
                raise ValueError('load_format "merge_adapter" needs model_loader_extra_config={"adapter": DIRECTORY}')
            super().__init__(dataclasses.replace(load_config, load_format="safetensors", model_loader_extra_config=extra))

        def get_all_weights(self, model_config, model):
            _refuse_quantised(model_config.model, {"quantization_config": getattr(model_config.hf_config, "quantization_config", None)})
            adapter = Adapter(self.adapter_directory).check(None if self.any_base else model_config.model)
            device = next(model.parameters()).device
            for name, weight in super().get_all_weights(model_config, model):
                yield name, merge_tensor(adapter, name, weight, dtype=model_config.dtype, device=device)
            if faults := unused_faults(adapter, self._expected_use(adapter)):
                raise ValueError(f"{adapter.path}: {'; '.join(faults)}")

        def _expected_use(self, adapter):
            """What was merged; with expert parallelism's filter, experts of other ranks count as merged: theirs is another rank's load."""
            if self.local_expert_ids is None:
                return adapter.used
            elsewhere = {n for n in adapter.slots if EXPERT.match(n) and int(EXPERT.match(n)["index"]) not in self.local_expert_ids}
            return adapter.used + Counter(elsewhere - set(adapter.used))

    register_model_loader("merge_adapter")(MergeAdapterLoader)


# ----------------------------------------------------------------------------------------------------------------------------------
# Model card and hub
# ----------------------------------------------------------------------------------------------------------------------------------


def model_card(directory, config: dict, scores: str | None = None) -> str:
    """README.md of an adapter directory: base, data, hyper-parameters and commit from the run's args.json (beside or above), and scores."""
    directory, run = Path(directory), {}
    for path in (folder / "args.json" for folder in (directory, *directory.absolute().parents[:2])):
        if path.is_file():
            run = json.loads(path.read_text())
            break
    arguments, base = run.get("arguments", {}), config.get("base_model_name_or_path")
    kind = "DoRA" if config.get("use_dora") else "LoRA"
    front = ["library_name: peft", f"base_model: {base}", "tags:", "- lora", "- malaysian", "language:", "- ms", "- en"]
    if dataset := arguments.get("dataset"):
        front += ["datasets:", *(f"- {name.strip()}" for name in str(dataset).split(","))]
    lines = ["---", *front, "---", "", f"# {run.get('launcher', directory.absolute().parent.name)}, {directory.name}", ""]
    lines += [
        f"A {kind} adapter of [{base}](https://huggingface.co/{base})." if not os.path.isdir(str(base)) else f"A {kind} adapter of {base}.",
        "",
    ]
    rows = {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        **{f"rank of {k}": v for k, v in (config.get("rank_pattern") or {}).items()},
    }
    rows |= {
        key: value
        for key, value in arguments.items()
        if key not in ("r", "lora_alpha", "use_dora") and isinstance(value, (int, float, str))
    }
    if run.get("commit"):
        rows["commit"] = run["commit"]
    lines += ["| | |", "|---|---|", *(f"| {key} | `{value}` |" for key, value in rows.items()), ""]
    if scores:
        lines += ["## Scores", "", "```", scores.strip(), "```", ""]
    lines += [
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "<this repository>")',
        "```",
        "",
    ]
    if config.get("use_dora"):
        lines += ["vLLM and other servers do not take DoRA adapters: merge it first (`python adapter.py merge`) or load it merged.", ""]
    return "\n".join(lines)


PUSHED = (CONFIG, WEIGHTS, MANIFEST, "README.md", "generation_config.json")


def push_adapter(directory, repository, private=False, dry_run=False, log=print) -> list[str]:
    """Verify the adapter and upload it to the hub as `repository` (OWNER/NAME); returns the files. dry_run lists them and sends nothing."""
    directory = Path(directory)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"{repository!r}: expected OWNER/NAME")
    if faults := verify_adapter(directory):
        raise ValueError("; ".join(faults[:5]))
    files = sorted(path.name for path in directory.iterdir() if path.name in PUSHED or _is_tokenizer_file(path.name))
    for name in files:
        log(f"{(directory / name).stat().st_size:>15,}  {repository}/{name}")
    if dry_run:
        log("dry run: nothing was sent")
        return files
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(folder_path=directory, repo_id=repository, allow_patterns=files, commit_message=f"Upload {directory.name}")
    return files


# ----------------------------------------------------------------------------------------------------------------------------------
# Command
# ----------------------------------------------------------------------------------------------------------------------------------


def _parse(arguments):
    parser = argparse.ArgumentParser(prog="adapter.py", description="Verify, merge, convert, describe and publish adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="one line per fault, exit code 1 if there is any")
    verify.add_argument("directory")
    verify.add_argument("--base", help="base model, directory or hub id (default: the one in the configuration, if it is on this machine)")
    verify.add_argument("--allow_zero", action="store_true", help="accept lora_B that is zero throughout (saved before the first step)")
    merge = commands.add_parser("merge", help="write base + adapter as an ordinary checkpoint")
    merge.add_argument("base")
    merge.add_argument("adapter")
    merge.add_argument("out")
    merge.add_argument("--any_base", action="store_true", help="merge even if the base is not the one that was trained on")
    merge.add_argument("--workers", type=int, help="processes (default: one per core, at most 8)")
    convert = commands.add_parser("convert", help="change the layout of the experts, or the dtype")
    convert.add_argument("directory")
    convert.add_argument("out")
    convert.add_argument("--layout", choices=("2d", "stacked"), default="2d")
    convert.add_argument("--dtype", choices=("float32", "bfloat16"))
    card = commands.add_parser("card", help="(re)write the model card")
    card.add_argument("directory")
    card.add_argument("--scores", help="text file with what calculate_malaymmlu.py printed")
    push = commands.add_parser("push", help="verify and upload to the hub (log in with `hf auth login` first)")
    push.add_argument("directory")
    push.add_argument("repository", help="OWNER/NAME")
    push.add_argument("--private", action="store_true")
    push.add_argument("--dry_run", action="store_true", help="list the files, send nothing")
    return parser.parse_args(arguments)


def main(arguments=None) -> None:
    args = _parse(arguments)
    try:
        if args.command == "verify":
            faults = verify_adapter(args.directory, args.base, args.allow_zero)
            for fault in faults:
                print(f"error: {fault}", file=sys.stderr)
            if faults:
                sys.exit(1)
            print("root mean square of lora_B x 1e4 (experts: least/mean/most)")
            print(norm_table(args.directory))
            print(f"{args.directory}: sound, {len(Adapter(args.directory).slots)} weights adapted")
        elif args.command == "merge":
            merge_adapter(args.base, args.adapter, args.out, args.workers, args.any_base)
        elif args.command == "convert":
            convert_adapter(args.directory, args.out, args.layout, args.dtype and getattr(torch, args.dtype))
        elif args.command == "card":
            card = model_card(args.directory, _read_config(args.directory), Path(args.scores).read_text() if args.scores else None)
            (Path(args.directory) / "README.md").write_text(card)
        else:
            push_adapter(args.directory, args.repository, args.private, args.dry_run)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
