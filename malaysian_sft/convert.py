"""An adapter's experts from one layout to the other: a tensor per expert and projection, or PEFT's stacks."""

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

import torch

from malaysian_sft.adapter_files import Adapter, in_groups, is_tokenizer_file
from malaysian_sft.disk_names import common_name
from malaysian_sft.lora import (
    CONFIG,
    DISK_NAME,
    EXPERT,
    MANIFEST,
    PROJECTIONS,
    WEIGHTS,
    disk_name,
    expert_patterns,
    parameter_names,
    short_names,
)
from malaysian_sft.safetensors_files import DTYPES, save_tensors, tensor_checksums, writing


def convert_adapter(directory, out, layout="2d", dtype=None) -> None:
    """Write the adapter in `directory` to `out` with its experts in another layout, without changing what it does.

    layout "2d": one tensor per expert and projection, which vLLM and adapter_config's rank_pattern know. "stacked":
    PEFT's target_parameters, experts.base_layer for gate and up together (of twice the rank, block-diagonal) and
    experts for down. Raises ValueError for DoRA experts, for which PEFT has no stacked form, and for experts that
    differ in rank or are incomplete.
    """
    adapter, out = Adapter(directory).check(), Path(out)
    if (out / CONFIG).exists():
        raise ValueError(f"{out}: holds an adapter already; choose another directory")
    config, dtype = dict(adapter.config), dtype or DTYPES[next(iter(adapter.header.values()))["dtype"]]
    experts = {name: slot for name, slot in adapter.slots.items() if EXPERT.match(name)}
    changes = bool(experts) and (layout == "stacked") != adapter.stacked
    modules = {key: DISK_NAME.match(key)["module"] for key in adapter.header}
    if changes and any(common_name(module) != module for module in modules.values()):
        raise ValueError(f"{adapter.path}: PEFT's stacked layout has other names than this family's checkpoint")
    stacks = {key for key, module in modules.items() if module.endswith((".experts", ".experts.base_layer"))}
    tensors = {key: adapter.tensor(key) for key in adapter.header if not (changes and key in stacks)}
    if len({(slot.rank, slot.scaling) for slot in experts.values() if not adapter.stacked}) > 1:
        raise ValueError(f"{adapter.path}: experts differ in rank or scaling")
    if changes:
        if layout == "stacked":
            tensors, settings = _stack_experts(adapter, tensors, experts)
        else:
            settings = _unstack_experts(adapter, tensors, experts)
        for key in ("rank_pattern", "alpha_pattern"):  # the first that matches counts
            settings[key] |= {
                pattern: value for pattern, value in (config.get(key) or {}).items() if pattern not in settings[key]
            }
        config |= settings
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a conversion that was killed
    try:
        with writing(out):
            part.mkdir(parents=True)
            _write(adapter, part, tensors, config)
            if lost := set(adapter.slots) ^ set(Adapter(part).slots):
                raise ValueError(f"{out}: the conversion lost {', '.join(in_groups(sorted(lost))[:5])}")
            out.mkdir(exist_ok=True)
            for path in sorted(part.iterdir(), key=lambda path: path.name == CONFIG):  # without it, it is no adapter
                os.replace(path, out / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(adapter, directory, tensors, config):
    """The files of an adapter: `tensors`, `config`, and what else `adapter` has."""
    manifest = dict(adapter.manifest)
    manifest["scaling"] = {
        key: config.get(key) for key in ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
    }
    manifest["tensors"] = tensor_checksums(tensors)
    save_tensors(tensors, directory / WEIGHTS)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=0) + "\n")
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    for path in adapter.directory.iterdir():
        if is_tokenizer_file(path.name) or path.name in ("generation_config.json", "README.md"):
            shutil.copyfile(path, directory / path.name)


def _unstack_experts(adapter, tensors, experts) -> dict:
    for name in experts:
        A, B, _ = adapter.factors(name)
        tensors[disk_name(name, "lora_A")], tensors[disk_name(name, "lora_B")] = A.clone(), B.clone()
    shapes = {EXPERT.match(name)["projection"]: (slot.rank, slot.scaling) for name, slot in experts.items()}
    return expert_patterns(shapes, adapter.config.get("use_rslora"))


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
                f"{adapter.path}: {stack} has {', '.join(sorted(found))} only; the stacked layout is written for all"
                " three projections"
            )
        order = range(len(found["down_proj"]))
        A = [torch.cat([found["gate_proj"][e][0], found["up_proj"][e][0]]) for e in order]
        B = [torch.block_diag(found["gate_proj"][e][1], found["up_proj"][e][1]) for e in order]
        for module, As, Bs in (
            (f"{stack}.base_layer", A, B),
            (stack, [found["down_proj"][e][0] for e in order], [found["down_proj"][e][1] for e in order]),
        ):
            tensors[disk_name(module, "lora_A")] = torch.cat(As)
            tensors[disk_name(module, "lora_B")] = torch.stack(Bs, dim=-1).flatten(1)
    slot = next(iter(experts.values()))
    settings = expert_patterns(
        {projection: (slot.rank, slot.scaling) for projection in PROJECTIONS}, adapter.config.get("use_rslora")
    )
    others = {name for name in adapter.slots if not EXPERT.match(name)}
    settings["target_modules"] = short_names([name for name in others if not name.endswith(PROJECTIONS)], others)
    settings["target_parameters"] = [
        *parameter_names(others, others),
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
    ]
    return tensors, settings
