"""Names of weights in published checkpoints, by transformers' own conversion_mapping: no list of families here.

A mixture's checkpoint has a two-dimensional tensor for each expert and projection, transformers' model two stacks,
`gate_up_proj (E, 2I, H)` and `down_proj (E, H, I)`. What the projections are called differs between families
(gate_proj, up_proj, down_proj; Mixtral's w1, w3, w2), and so may the path before them. An adapter on disk has the
checkpoint's names. In this package names have the checkpoint's path and the common projection: gate_proj, up_proj or
down_proj (`common_name`).
"""

import functools
import re
from typing import NamedTuple

import torch

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
STACK_OF = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
STACKING = ["MergeModulelist", "Concatenate"]  # experts along dimension 0, then gate and up along dimension 1


class Place(NamedTuple):
    """Where a checkpoint's tensor goes: all of a parameter, or one expert's rows of a stack."""

    parameter: str
    expert: int | None = None
    part: int = 0  # of the parts that a stack's rows are made of: 0 gate, 1 up


class DiskNames:
    """The checkpoint's names of one model's weights, both ways.

    places: {name in the checkpoint: Place}; names: the reverse. Raises ValueError for a checkpoint whose experts would
    have to be changed, not only stacked, while they are read.
    """

    def __init__(self, model):
        """model: transformers' own, not adapted yet, also on the meta device. Its names are those that transformers
        would save until `use` is told those of a checkpoint."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model, add_legacy=False)
        self.converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self.renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
        self.own, self.prefix = dict.fromkeys(model.state_dict()), model.base_model_prefix
        self.ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        self.saved = {}
        self.use(checkpoint_names(model))
        self.saved = self.names

    def use(self, keys):
        """Take the names of a checkpoint for the model's."""
        self.places = {key: self.place(key) for key in keys}
        self.names = self.saved | {place: key for key, place in self.places.items()}

    def place(self, key):
        """The Place of a checkpoint's tensor; one that the model does not have for a tensor that it does not use."""
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.own)
        converter = next((c for c in self.converters if pattern in c.source_patterns), None)
        if converter is None or name not in self.own:
            return Place(name)
        operations = [type(operation).__name__ for operation in converter.operations]
        match = re.search(pattern.replace("*", r"(\d+)"), key)
        if operations not in (STACKING, STACKING[:1]) or match is None or not match.groups():
            raise ValueError(
                f"{key}: transformers makes {name} of it by {', '.join(operations)}; only experts that are stacked can"
                " be read here"
            )
        return Place(name, int(match[1]), list(converter.source_patterns).index(pattern))

    def module(self, name, expert=None, projection=None):
        """The checkpoint's name of linear layer `name` of the model, or of one projection of stack `name`; without
        ".weight". A stack that the checkpoint keeps whole has its experts named as the common families do."""
        if projection is None:
            return self.names.get(Place(f"{name}.weight"), f"{name}.weight").removesuffix(".weight")
        parameter, part = STACK_OF[projection]
        if key := self.names.get(Place(f"{name}.{parameter}", expert, part)):
            return key.removesuffix(".weight")
        whole = self.names.get(Place(f"{name}.{parameter}"), f"{name}.{parameter}")
        if not whole.endswith(f".experts.{parameter}"):
            raise ValueError(f"{whole}: experts that a checkpoint keeps whole under this name cannot be adapted")
        return f"{whole.rpartition('.')[0]}.{expert}.{projection}"


def checkpoint_names(model):
    """The names under which transformers saves `model`, found by saving shapes alone."""
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in model.state_dict().items()}
    return list(revert_weight_conversion(model, shapes))


def attach(model):
    """Note the checkpoint's names on a model of transformers before it is adapted; `disk_names` finds them again."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel) and "disk_names" not in vars(model):
        model.disk_names = DiskNames(model)


def disk_names(model):
    """The DiskNames noted on `model`, or on what it wraps; without any, the model's own names."""
    found = (vars(module)["disk_names"] for module in model.modules() if "disk_names" in vars(module))
    return next(found, None) or OwnNames()


class OwnNames(DiskNames):
    """A model whose checkpoint has the model's own names."""

    def __init__(self):
        self.places, self.names, self.ignored = {}, {}, []


@functools.cache
def _projection_of_leaf():
    """{what some family calls an expert's projection: its common name}, read off transformers' conversions."""
    from transformers import CONFIG_MAPPING
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    of_stack = {place: projection for projection, place in STACK_OF.items()}
    found = {projection: projection for projection in PROJECTIONS}
    for model_type in CONFIG_MAPPING:
        for transform in get_checkpoint_conversion_mapping(model_type) or ():
            operations = [type(operation).__name__ for operation in getattr(transform, "operations", ())]
            (target, *others), sources = transform.target_patterns, transform.source_patterns
            if others or operations not in (STACKING, STACKING[:1]) or not re.search(r"\*\.\w+\.weight$", sources[0]):
                continue
            for part, source in enumerate(sources):
                leaf = re.search(r"\*\.(\w+)\.weight$", source)[1]
                projection = of_stack.get((target.rpartition(".")[2], part))
                if projection is not None and found.setdefault(leaf, projection) != projection:
                    raise ValueError(f"{leaf} is {found[leaf]} in one family and {projection} in {model_type}")
    return found


def common_name(name: str) -> str:
    """A module's name in a checkpoint with an expert's projection as it is commonly called: ...experts.3.w1 is
    ...experts.3.gate_proj."""
    match = re.fullmatch(r"(.+\.experts\.\d+\.)(\w+)", name)
    return match[1] + _projection_of_leaf().get(match[2], match[2]) if match else name
