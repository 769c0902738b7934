"""An adapter from a model to disk and back: gathered whole from any sharding, written, verified; loaded by name."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
from torch import nn

from malaysian_sft.adapter_files import Adapter
from malaysian_sft.base_model import base_fingerprint, local_base, shape_fields
from malaysian_sft.disk_names import common_name, disk_names
from malaysian_sft.fp8 import BLOCK, FP8
from malaysian_sft.lora import (
    CONFIG,
    EXPERT_PARAMETER,
    LAYER,
    MANIFEST,
    PEFT_PARAMETER,
    PREFIX,
    PROJECTIONS,
    WEIGHTS,
    WRAPPERS,
    adaptable,
    base_shapes,
    disk_name,
    expert_patterns,
    gathered,
    local_part,
    local_tensor,
    lora_scaling,
    parameter_names,
    plain_number,
    short_names,
)
from malaysian_sft.model_card import model_card
from malaysian_sft.safetensors_files import save_tensors, tensor_checksums
from malaysian_sft.verify import adapter_faults


def _rank() -> int:
    return (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )


def _adapter_parameters(model):
    """Every adapter parameter as (module, part, projection or None, parameter): the base's module name, the part as
    named on disk."""
    for path, parameter in model.named_parameters():
        name = WRAPPERS.sub("", path).removeprefix("module.").removeprefix(PREFIX)
        if match := PEFT_PARAMETER.match(name):
            yield match["module"], match["part"], None, parameter
        elif match := EXPERT_PARAMETER.match(name):
            part = "lora_magnitude_vector" if match["part"] == "magnitude" else f"lora_{match['part']}"
            yield match["stack"], part, match["projection"], parameter


def _whole(parameter):
    """The parameter's whole fp32 value; collective for sharded parameters.

    DeepSpeed trains an fp32 master copy and keeps the parameter itself in bf16: the master is the adapter.
    """
    if hasattr(parameter, "sharded"):
        return parameter.sharded.whole(parameter)
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        if hasattr(parameter, "_z3_optimizer"):
            from deepspeed.utils import safe_get_full_fp32_param

            return safe_get_full_fp32_param(parameter).view(parameter.ds_shape)
        with gathered([parameter]):
            return parameter.detach().clone()
    if hasattr(parameter, "_hp_mapping") and parameter._hp_mapping is not None:
        return parameter.get_full_hp_param()
    return parameter


@torch.no_grad()
def adapter_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every adapter tensor under its name on disk, whole, CPU, fp32. Collective: call it on all ranks; ranks other than
    0 get {}.

    Only adapter parameters are gathered, one at a time, so the frozen base is never touched and a device needs room for
    one of them.
    """
    tensors, names = {}, disk_names(model)
    for module, part, projection, parameter in _adapter_parameters(model):
        value = _whole(parameter).detach()
        if _rank() != 0:
            continue
        value = value.to("cpu", torch.float32, copy=True)
        if projection is None:
            tensors[disk_name(names.module(module), part)] = value
        else:  # (E, ...): one tensor per expert, each with its own storage, as safetensors wants
            for e, one in enumerate(value):
                tensors[disk_name(names.module(module, e, projection), part)] = one.clone()
    return tensors


@torch.no_grad()
def load_adapter(model: nn.Module, directory) -> None:
    """Load the adapter in `directory` (either layout) into a model that already has LoRA layers of the same shape, in
    place.

    Works on plain, FSDP2 and zero.Init-partitioned models (before deepspeed.initialize). Raises ValueError naming the
    first key that has no counterpart on the other side, and when rank or scaling differ.
    """
    adapter, disk = Adapter(directory).check(), disk_names(model)
    missing = set(adapter.slots)
    scalings = _model_scalings(model)
    for module, part, projection, parameter in _adapter_parameters(model):
        if hasattr(parameter, "_z3_optimizer"):
            raise ValueError(
                "load_adapter: load the adapter before deepspeed.initialize, which copies the weights into its"
                " optimizer"
            )
        shape = getattr(parameter, "ds_shape", parameter.shape)
        places = [(module,)] if projection is None else [(module, e, projection) for e in range(shape[0])]
        names = [common_name(disk.module(*place)) for place in places]
        for name in names:
            if name not in adapter.slots:
                raise ValueError(f"{adapter.path}: no {disk_name(name, part)}, which the model has")
            missing.discard(name)
            if abs(adapter.slots[name].scaling - scalings[module]) > 1e-6 * scalings[module]:
                raise ValueError(
                    f"{adapter.path}: {name} has scaling {adapter.slots[name].scaling:g}, the model has"
                    f" {scalings[module]:g}"
                )
        values = [adapter.factor(name, part) for name in names]
        if values[0] is None:
            raise ValueError(
                f"{adapter.path}: no {disk_name(names[0], part)}, which the model has (the adapter is LoRA, the model"
                " DoRA)"
            )
        value = values[0] if projection is None else torch.stack(values)
        if tuple(value.shape) != tuple(shape):
            raise ValueError(
                f"{adapter.path}: {disk_name(names[0], part)} is {tuple(value.shape)}, the model's is {tuple(shape)}"
            )
        _assign(parameter, value)
    if missing:
        raise ValueError(
            f"{adapter.path}: nothing in the model takes {len(missing)} modules, first {sorted(missing)[0]}"
        )
    if adapter.use_dora and not any(part == "lora_magnitude_vector" for _, part, _, _ in _adapter_parameters(model)):
        raise ValueError(f"{adapter.path}: the adapter is DoRA, the model has no lora_magnitude_vector")


def _assign(parameter, value):
    """Copy a whole tensor into a plain, flat-sharded, DTensor or ZeRO-3 parameter."""
    if hasattr(parameter, "sharded"):
        local_tensor(parameter).copy_(local_part(value, parameter))
        return
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        # every rank read the file, so each cuts its own shard: no communication
        value = value.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None))
        return
    with gathered([parameter], write=True):
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


def save_adapter(
    model, directory, base_model, tokenizer=None, lora_args=None, tensors=None, allow_zero=False, dtype=torch.float32
) -> None:
    """Write `model`'s adapter to `directory` (a temporary name, then renamed) and verify it; raises ValueError naming
    the fault.

    Args:
        base_model: hub id or directory of the base, for the configuration; weights on this machine are fingerprinted.
        tokenizer: saved beside the adapter, with its chat template.
        lora_args: LoraArguments to check the model against (rank, alpha, DoRA).
        tensors: what adapter_state_dict(model) returned. With it this is not collective, a rank that holds {} returns;
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
    save_tensors(tensors, temporary / WEIGHTS)
    manifest = {
        "base_model": base_model,
        "base_config": shape_fields(getattr(model, "config", None)),
        "base_tensors": base_fingerprint(base_model, tensors),
        **base_quantisation(model),
        "scaling": {
            key: config[key] for key in ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
        },
        "tensors": tensor_checksums(tensors),
    }
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=0) + "\n")
    if tokenizer is not None:
        _write_tokenizer(tokenizer, temporary)
    _write_generation_config(model, base_model, temporary)
    (temporary / "README.md").write_text(model_card(directory, config))
    if faults := adapter_faults(temporary, shapes=base_shapes(model), base=None, allow_zero=allow_zero):
        raise ValueError(f"{temporary}: the adapter just saved is not sound: " + "; ".join(faults[:5]))
    if not directory.exists():
        os.replace(temporary, directory)
        return
    # A trainer's own state beside the adapter stays. Without its configuration the directory is no adapter: it goes
    # first and comes last.
    (directory / CONFIG).unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG):
        os.replace(path, directory / path.name)
    temporary.rmdir()


def _write_tokenizer(tokenizer, directory):
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # tokenizers raises Exception itself, and no class below it, for a disk that is full
        if type(error) is not Exception:
            raise
        raise OSError(f"{directory}: the tokenizer cannot be written ({error})") from None


def base_quantisation(model) -> dict:
    """The manifest's entry for a base that was quantised, by its checkpoint or, its routed experts alone, while it was
    loaded; {} for another. What an adapter is merged into must be what it was trained on."""
    checkpoint = bool(getattr(getattr(model, "config", None), "quantization_config", None))
    stored = any(parameter.dtype == FP8 for parameter in model.parameters())
    if not (checkpoint or stored):
        return {}
    found = {"quantised": "checkpoint" if checkpoint else "while loading", "format": "float8_e4m3fn"}
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return {"base_quantisation": found | {"weight_block_size": [BLOCK, BLOCK], "widened_to": dtype}}


def _write_generation_config(model, base_model, directory):
    """The base's own: one that transformers derives from a config has one end of turn where models have several, and no
    sampling values. What the model carries, if the base is not on this machine."""
    base = local_base(base_model)
    if base is not None and (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", directory / "generation_config.json")
    elif base is None and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)


def _check_scalings(modules):
    """Raises ValueError where a layer trains with another factor than the alpha / r that its configuration will say,
    such as rsLoRA's."""
    for name, module in modules.items():
        r, alpha, scaling = (
            value["default"] if isinstance(value, dict) else value
            for value in (module.r, module.lora_alpha, module.scaling)
        )
        if not math.isclose(scaling, lora_scaling(alpha, r), rel_tol=1e-6):
            raise ValueError(
                f"{name} trains with scaling {scaling:g}, its alpha / r is {lora_scaling(alpha, r):g}: rsLoRA and other"
                " scalings are not saved; wrap the model with use_rslora=False"
            )


def _adapter_config(model, base_model) -> dict:
    """PEFT's LoraConfig for what `model` holds, such that PEFT, too, finds every tensor of the directory.

    PEFT since transformers 5 knows experts as stacked parameters: it fuses gate and up of our per-expert tensors into
    one of twice the rank and takes gate_proj, up_proj and down_proj in target_modules for these. Dense layers and
    shared experts of such a model are therefore named as target_parameters, which saves them under the same names and
    shapes.
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
        raise ValueError(
            f"layers differ in (rank, alpha, DoRA): {sorted(linear_shapes | expert_shapes)}; one shape for all is"
            " expected"
        )
    r, alpha, dora = next(iter(linear_shapes or expert_shapes))
    _check_scalings(linears | experts)
    present = {place[0] for place in adaptable(model) if len(place) == 1}
    if len(present) == len(adaptable(model)):  # no routed experts
        settings = {"target_modules": short_names(linears, present)}
    else:
        settings = {
            "target_modules": short_names([name for name in linears if not name.endswith(PROJECTIONS)], present)
        }
        settings["target_parameters"] = parameter_names(linears, present)
    if experts:
        expert_r, expert_alpha, expert_dora = next(iter(expert_shapes))
        if expert_dora != dora:
            raise ValueError("experts and the other layers must agree on use_dora")
        settings["target_parameters"] += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        shapes = {projection: (expert_r, lora_scaling(expert_alpha, expert_r)) for projection in PROJECTIONS}
        settings |= expert_patterns(shapes, names=_expert_patterns_on_disk(model, next(iter(experts))))
    dropout = (
        0.0
        if experts
        else max((getattr(module.lora_dropout["default"], "p", 0.0) for module in linears.values()), default=0.0)
    )
    config = LoraConfig(
        r=r,
        lora_alpha=plain_number(alpha),
        lora_dropout=dropout,
        use_dora=dora,
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
        **settings,
    )
    return _config_dict(config)


def _expert_patterns_on_disk(model, stack) -> dict:
    """{projection: a pattern of its names on disk, from below the layer}, by those of the first expert of a stack."""
    names = disk_names(model)
    tails = {name: LAYER.split(names.module(stack, 0, name), maxsplit=1)[-1] for name in PROJECTIONS}
    return {name: re.escape(tail).replace(r"experts\.0\.", r"experts\.\d+\.") for name, tail in tails.items()}


def _config_dict(config) -> dict:
    """A LoraConfig as what its save_pretrained writes."""
    values = config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
