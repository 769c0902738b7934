"""Is an adapter sound? Files, names, shapes, checksums, finite and trained values, completeness, and the base it
belongs to."""

import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import pandas as pd
import torch

from malaysian_sft.adapter_files import Adapter, expert_faults, in_groups, manifest_faults, read_adapter_config
from malaysian_sft.base_model import base_faults, local_base, shapes_of_base
from malaysian_sft.disk_names import STACK_OF
from malaysian_sft.lora import DISK_NAME, EXPERT, LAYER, MANIFEST
from malaysian_sft.safetensors_files import tensor_checksum
from malaysian_sft.tables import text_table


def verify_adapter(directory, base=None, allow_zero=False) -> list[str]:
    """Faults of the adapter in `directory`, one line each; an empty list means it is sound.

    Checks files, names, shapes, ranks and scaling against the configuration, checksums against the manifest, finite and
    non-zero values, completeness of layers and experts, and the base: `base` (directory or hub id), or the one that the
    configuration names if it is on this machine. allow_zero accepts lora_B that is zero throughout (an adapter saved
    before the first step).
    """
    shapes = None
    try:
        name = base or read_adapter_config(directory).get("base_model_name_or_path")
    except ValueError as error:
        return [str(error)]
    try:
        shapes = shapes_of_base(str(name)) if name and (base or local_base(name)) else None
    except (OSError, ValueError) as error:
        return [f"base {name}: {str(error).splitlines()[0]}"]
    return adapter_faults(Path(directory), shapes, name if shapes is not None else None, allow_zero)


def adapter_faults(directory, shapes, base, allow_zero) -> list[str]:
    """As verify_adapter. alpha / r may differ from layer to layer: PEFT, vLLM and merges take each module's own."""
    try:
        adapter = Adapter(directory)
    except ValueError as error:
        return [str(error)]
    faults = manifest_faults(adapter) + _value_faults(adapter, allow_zero) + expert_faults(adapter)
    if shapes is not None:
        faults += _shape_faults(adapter, shapes)
    if base is not None:
        faults += base_faults(adapter.manifest, base)
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
        checksum = tensor_checksum(tensor) if key in saved else None
        if key in saved and checksum != saved[key]:
            if checksum in owners:
                return f"{name} holds what was saved as {owners[checksum]}: the two were swapped"
            return (
                f"{name} is {'all zeros' if nonzero == 0 else 'not what was saved'} (its checksum differs from"
                f" {MANIFEST})"
            )
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
    """lora_B that is still zero was not trained. A single expert may be: the router can leave it out; a whole layer of
    them may not."""
    if zero_B and all(zero_B.values()):
        return [
            f"{adapter.path}: every lora_B is zero: nothing was trained (allow_zero accepts an adapter saved before the"
            " first step)"
        ]
    layers = defaultdict(list)
    for name, slot in adapter.slots.items():
        match = EXPERT.match(name)
        group = f"{match['stack']}.*.{match['projection']}" if match else name
        layers[group].append(zero_B[slot.B])
    return [
        f"{adapter.path}: {group}: lora_B is all zeros: it was not trained"
        for group, zeros in layers.items()
        if all(zeros)
    ]


def _expected(adapter, shapes) -> set[str]:
    """The base weights that the configuration says are adapted, by PEFT's own matching."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(
        **{
            k: adapter.config.get(k)
            for k in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        }
    )
    if config.target_modules == "all-linear":
        return set(shapes)
    parameters = adapter.config.get("target_parameters") or []
    expected = set()
    for name in shapes:
        match = EXPERT.match(name)
        # PEFT's names are the model's, and the path to the experts may differ from the checkpoint's
        ending = f".experts.{STACK_OF[match['projection']][0]}" if match else None
        by_parameter = any(
            parameter.endswith(ending) if match else f"{name}.weight".endswith("." + parameter)
            for parameter in parameters
        )
        if by_parameter or (config.target_modules and check_target_module_exists(config, name)):
            expected.add(name)
    return expected


def _shape_faults(adapter, shapes) -> list[str]:
    unknown = [name for name in adapter.slots if name not in shapes]
    faults = [f"{adapter.path}: {names} is no linear layer of the base model" for names in in_groups(unknown)]
    for name in adapter.slots:
        if name in shapes and adapter.shape(name) != shapes[name]:
            faults.append(
                f"{adapter.path}: {name} is for a weight of shape {adapter.shape(name)}, the base has {shapes[name]}"
            )
    missing = sorted(_expected(adapter, shapes) - set(adapter.slots))
    return faults + [f"{adapter.path}: {names} is missing" for names in in_groups(missing)]


def norm_table(directory) -> str:
    """A table of lora_B's root mean square times 1e4 per layer and projection (experts: the least, the mean and the
    most of a layer's)."""
    adapter = Adapter(directory)
    cells, columns = defaultdict(lambda: defaultdict(list)), {}
    for name in adapter.slots:
        match, layer = EXPERT.match(name), LAYER.search(name)
        column = (
            f"expert {match['projection']}"
            if match
            else ".".join(name.split(".")[-2:]).replace("self_attn.", "").replace("mlp.", "")
        )
        columns[column] = None
        B = adapter.factor(name, "lora_B")
        cells[int(layer[1]) if layer else -1][column].append(B.square().mean().sqrt().item() * 1e4)
    spreads = {}
    for layer in sorted(cells):
        values = {column: cells[layer].get(column, []) for column in columns}
        spreads[layer] = {
            column: "/".join(f"{v:.2f}" for v in (found if len(found) < 2 else (min(found), mean(found), max(found))))
            for column, found in values.items()
        }
    frame = pd.DataFrame.from_dict(spreads, orient="index", columns=list(columns)).replace("", "-")
    return text_table(frame.rename_axis(columns="layer"))
