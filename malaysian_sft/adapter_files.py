"""An adapter directory, read lazily, as one (A, B, magnitude, scaling) per two-dimensional base weight, whichever
layout it has on disk.

A directory holds adapter_config.json and adapter_model.safetensors as PEFT writes them, plus adapter_manifest.json with
a checksum per tensor and a fingerprint of the base. fp32 on disk unless asked otherwise: fp32 is what was trained.
"""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from malaysian_sft.base_model import base_faults
from malaysian_sft.disk_names import common_name
from malaysian_sft.lora import (
    CONFIG,
    DISK_NAME,
    EXPERT,
    MANIFEST,
    PREFIX,
    PROJECTIONS,
    WEIGHTS,
    disk_name,
    lora_scaling,
)
from malaysian_sft.safetensors_files import DTYPES, read_header, tensor_checksum


@dataclass
class Slot:
    """Where the adapter of one two-dimensional base weight is found: its tensors' names and, in PEFT's stacked layout,
    the part of them."""

    A: str
    B: str
    magnitude: str | None
    rank: int
    scaling: float
    expert: int | None = (
        None  # set in the stacked layout: A is (E * stack_rank, in), B (out, stack_rank * E), expert fastest
    )
    stack_rank: int = 0
    ranks: slice = field(default_factory=lambda: slice(None))  # of the stack's rank
    rows: slice = field(default_factory=lambda: slice(None))  # of the stack's out: gate first, up second


class Adapter:
    """An adapter directory, read lazily, as (A, B, magnitude, scaling) per two-dimensional base weight, whichever
    layout it is stored in.

    Attributes: config (adapter_config.json), header, slots ({base weight name without ".weight": Slot}), use_dora,
    stacked, used (how often each slot was merged), manifest (what save_adapter recorded; {} for an adapter that others
    wrote), quantised and widened_to (what it was trained on: `_read_quantisation`). Rank, alpha and DoRA come from the
    config. Raises ValueError naming the file and the key for anything that does not fit.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        self.path = self.directory / WEIGHTS
        self.config = read_adapter_config(self.directory)
        if not self.path.is_file():
            raise ValueError(f"{self.directory}: no {WEIGHTS}")
        self.header, _ = read_header(self.path)
        self.use_dora = bool(self.config.get("use_dora"))
        self.manifest = self._read_manifest()
        self.quantised, self.widened_to = self._read_quantisation()
        self.checksums, self._checked = self.manifest.get("tensors", {}), set()
        self.used = Counter()
        self.stacked, self._stacks = False, {}
        self.slots: dict[str, Slot] = {}
        modules = defaultdict(dict)
        for key, info in self.header.items():
            match = DISK_NAME.match(key)
            if not match:
                raise ValueError(
                    f"{self.path}: {key} is not a LoRA tensor ({PREFIX}<layer>.lora_A.weight, lora_B or"
                    " lora_magnitude_vector)"
                )
            if info["dtype"] not in DTYPES:
                raise ValueError(f"{self.path}: {key} is {info['dtype']}; expected one of {', '.join(DTYPES)}")
            modules[common_name(match["module"])][match["part"]] = key
        if not modules:
            raise ValueError(f"{self.path}: holds no tensors")
        self._file = _open(self.path)
        for module, parts in sorted(modules.items()):
            self._add(module, parts)

    def _add(self, module, parts):
        for part in ("lora_A", "lora_B") + (("lora_magnitude_vector",) if self.use_dora else ()):
            if part not in parts:
                raise ValueError(f"{self.path}: {disk_name(module, part)} is missing")
        if "lora_magnitude_vector" in parts and not self.use_dora:
            raise ValueError(
                f"{self.path}: {parts['lora_magnitude_vector']} is DoRA's, but {CONFIG} says use_dora false"
            )
        A, B, magnitude = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
        a, b = self.header[A]["shape"], self.header[B]["shape"]
        if module.endswith((".experts", ".experts.base_layer")):
            return self._add_stack(module, A, B, a, b)
        rank, scaling = self.rank_and_scaling(DISK_NAME.match(A)["module"])
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise ValueError(
                f"{self.path}: {module}: lora_A {a} and lora_B {b} do not have the rank {rank} that {CONFIG} gives"
            )
        if magnitude and self.header[magnitude]["shape"] != [b[0]]:
            raise ValueError(f"{self.path}: {magnitude} is {self.header[magnitude]['shape']}, expected [{b[0]}]")
        self.slots[module] = Slot(A, B, magnitude, rank, scaling)

    def _add_stack(self, module, A, B, a, b):
        """PEFT nests its wrappers: experts.base_layer is gate_up and experts is down, unless only one of the two was
        trained."""
        if self.use_dora:
            raise ValueError(f"{self.path}: {A}: PEFT has no DoRA on stacked experts")
        stack = module.removesuffix(".base_layer")
        named = [name.rsplit(".", 1)[-1] for name in self.config.get("target_parameters") or []]
        both = f"{PREFIX}{stack}.base_layer.lora_A.weight" in self.header
        kind = "gate_up_proj" if module != stack or (not both and "gate_up_proj" in named) else "down_proj"
        rank, scaling = self.rank_and_scaling(f"{stack}.{kind}")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % rank:
            raise ValueError(
                f"{self.path}: {module}: stacked lora_A {a} and lora_B {b} do not have the rank {rank} that {CONFIG}"
                " gives"
            )
        self.stacked = True
        inner, half = b[0] // 2, rank // 2
        disjoint = kind == "gate_up_proj" and rank % 2 == 0 and self._block_diagonal(B, rank)
        for e in range(a[0] // rank):
            if kind == "down_proj":
                self.slots[f"{stack}.{e}.down_proj"] = Slot(A, B, None, rank, scaling, e, rank)
                continue
            for projection, rows, ranks in (
                ("gate", slice(0, inner), slice(0, half)),
                ("up", slice(inner, None), slice(half, None)),
            ):
                slot = Slot(
                    A, B, None, half if disjoint else rank, scaling, e, rank, ranks if disjoint else slice(None), rows
                )
                self.slots[f"{stack}.{e}.{projection}_proj"] = slot

    def _block_diagonal(self, key, rank) -> bool:
        """True if gate and up of a stacked lora_B use different halves of the rank, as they do when two adapters were
        put together."""
        B = self.stored(key).unflatten(1, (rank, -1))
        inner, half = B.shape[0] // 2, rank // 2
        return not B[:inner, half:].any() and not B[inner:, :half].any()

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """Rank and alpha / r (alpha / sqrt r for rsLoRA) of a module by PEFT's rule: the first pattern that ends its
        name wins."""

        def lookup(patterns, default):
            for pattern, value in (self.config.get(patterns) or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            return self.config[default]

        rank, alpha = lookup("rank_pattern", "r"), lookup("alpha_pattern", "lora_alpha")
        return rank, lora_scaling(alpha, rank, self.config.get("use_rslora"))

    def stored(self, key: str) -> torch.Tensor:
        """One tensor as it is on disk."""
        return self._file.get_tensor(key)

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, compared with its checksum when it is first read; ValueError if it is not what was saved."""
        value = self._file.get_tensor(key)
        if key in self.checksums and key not in self._checked:
            if tensor_checksum(value) != self.checksums[key]:
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
        """The parts of base tensor `name` that the adapter changes: (slot, first row, row after the last) of it seen as
        (rows, in).

        A stack of experts (E, out, in) counts as E * out rows. Raises ValueError if the shapes do not fit.
        """
        plain, shape = common_name(name.removesuffix(".weight")), tuple(shape)
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
                raise ValueError(
                    f"{self.path}: {slot} is for {ours}, {name} of the base is {shape}: another base model's adapter?"
                )
        return found

    def _read_manifest(self) -> dict:
        path = self.directory / MANIFEST
        try:
            manifest = json.loads(path.read_text()) if path.is_file() else {}
        except (RecursionError, ValueError) as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        parts = ("base_config", "base_tensors", "base_quantisation", "scaling", "tensors")
        if not isinstance(manifest, dict) or not all(isinstance(manifest.get(part, {}), dict) for part in parts):
            raise ValueError(f"{path}: no manifest: expected an object with {', '.join(parts)}, each an object")
        return manifest

    def _read_quantisation(self):
        """(where the base was quantised that the adapter was trained on: in its "checkpoint", "while loading" (its
        experts alone) or, None, not at all; the dtype that it was widened to)."""
        found = self.manifest.get("base_quantisation") or {"quantised": None, "widened_to": "bfloat16"}
        places, dtypes = (None, "checkpoint", "while loading"), ("bfloat16", "float32")
        quantised, widened_to = (found.get(key) for key in ("quantised", "widened_to"))
        if quantised not in places or widened_to not in dtypes:
            raise ValueError(f"{self.directory / MANIFEST}: base_quantisation is {found}; this version knows no such")
        return quantised, getattr(torch, widened_to)

    def check(self, base=None) -> "Adapter":
        """Itself; raises ValueError if names or scaling are not those in the manifest, experts are missing, or `base`
        is another base."""
        if faults := manifest_faults(self) + expert_faults(self):
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


def read_adapter_config(directory) -> dict:
    """adapter_config.json; ValueError if it is missing or asks for something that this module does not merge."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise ValueError(f"{directory}: no {CONFIG}: not an adapter directory")
    try:
        config = json.loads(path.read_text())
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds {type(config).__name__}, expected an object")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    for key in ("r", "lora_alpha"):
        if not _positive(config.get(key)) or (key == "r" and not isinstance(config[key], int)):
            raise ValueError(f"{path}: {key} is {config.get(key)!r}; expected a positive number")
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(path, key, config.get(key) or {})
    for key in ("target_modules", "target_parameters", "exclude_modules"):
        names = config.get(key)
        if not (names is None or isinstance(names, str) or _strings(names)):
            raise ValueError(f"{path}: {key} is {str(names)[:80]!r}; expected names, or a pattern of names")
    _check_layers(path, config)
    if not isinstance(config.get("base_model_name_or_path"), (str, type(None))):
        raise ValueError(f"{path}: base_model_name_or_path is {config['base_model_name_or_path']!r}; expected a string")
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
        raise ValueError(
            f"{path}: init_lora_weights={init!r} changed the base weights: convert the adapter to plain LoRA with PEFT"
            " first"
        )
    return config


def _open(path):
    """The library's reader of a file; ValueError for what it refuses: tensors that overlap, or leave a gap."""
    from safetensors import safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); take it from where it was saved again") from None


def _positive(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _strings(values):
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _check_layers(path, config):
    """What says which layers are adapted, in the forms that PEFT's own matching takes."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            _check_pattern(path, key, config[key])
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    numbers = layers if isinstance(layers, list) else [0 if layers is None else layers]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{path}: layers_to_transform is {str(layers)[:80]!r}; expected numbers of layers")
    if layers is not None and isinstance(config.get("target_modules"), str):
        raise ValueError(f"{path}: layers_to_transform goes with a list of target_modules, not with a pattern")
    if not (pattern is None or isinstance(pattern, str) or _strings(pattern)):
        raise ValueError(f"{path}: layers_pattern is {str(pattern)[:80]!r}; expected names")
    if pattern and layers is None:
        raise ValueError(f"{path}: layers_pattern goes with layers_to_transform, which is not there")
    for name in [pattern] if isinstance(pattern, str) else pattern or []:
        _check_pattern(path, "layers_pattern", name)


def _check_pattern(path, key, pattern):
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{path}: {key} has {pattern!r}, which is no regular expression ({error})") from None


def _check_patterns(path, key, patterns):
    if not isinstance(patterns, dict) or not all(map(_positive, patterns.values())):
        raise ValueError(f"{path}: {key} is {str(patterns)[:80]!r}; expected positive numbers by pattern")
    for pattern in patterns:
        _check_pattern(path, key, pattern)


def manifest_faults(adapter) -> list[str]:
    faults = []
    for key, value in adapter.manifest.get("scaling", {}).items():
        if adapter.config.get(key) != value:
            faults.append(
                f"{adapter.directory / CONFIG}: {key} is {adapter.config.get(key)}, it was {value} when the adapter was"
                " saved"
            )
    if saved := adapter.checksums:
        faults += [f"{adapter.path}: {key} is missing" for key in saved if key not in adapter.header]
        faults += [
            f"{adapter.path}: {key} was not there when the adapter was saved"
            for key in adapter.header
            if key not in saved
        ]
    return faults


def expert_faults(adapter) -> list[str]:
    """Every layer must have the same experts, 0 to E - 1, with all three projections."""
    layers = defaultdict(set)
    for name in adapter.slots:
        if match := EXPERT.match(name):
            layers[match["stack"]].add((int(match["index"]), match["projection"]))
    projections = {projection for found in layers.values() for _, projection in found}
    count = 1 + max((e for found in layers.values() for e, _ in found), default=-1)
    lost = [
        f"{stack}.{e}.{projection}"
        for stack, found in layers.items()
        for projection in PROJECTIONS
        for e in range(count)
        if projection in projections and (e, projection) not in found
    ]
    return [f"{adapter.path}: {names} is missing" for names in in_groups(lost)]


def mixed_ranks(directory) -> str:
    """What a layer's experts that differ in rank within a projection are called, with their ranks; "" without any."""
    ranks = defaultdict(set)
    for name, slot in Adapter(directory).slots.items():
        if match := EXPERT.match(name):
            ranks[f"{match['stack']}.*.{match['projection']}"].add(slot.rank)
    return next((f"{name} have {sorted(found)}" for name, found in ranks.items() if len(found) > 1), "")


def in_groups(names) -> list[str]:
    """Names of modules; of a layer's experts that lack the same, one: "...experts.{0, 3, 7 and 5 more}.up_proj"."""
    found, groups = [], defaultdict(list)
    for name in names:
        if match := EXPERT.match(name):
            groups[match["stack"], match["projection"]].append(int(match["index"]))
        else:
            found.append(name)
    for (stack, projection), experts in groups.items():
        more = f" and {len(experts) - 3} more" if len(experts) > 3 else ""
        few = str(experts[0]) if len(experts) == 1 else "{" + ", ".join(map(str, experts[:3])) + more + "}"
        found.append(f"{stack}.{few}.{projection}")
    return found


def is_tokenizer_file(name: str) -> bool:
    return name.startswith(
        (
            "tokenizer",
            "vocab.",
            "merges.",
            "special_tokens_map",
            "added_tokens",
            "chat_template",
            "spiece",
            "sentencepiece",
        )
    )
