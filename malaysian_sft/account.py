"""The account of a model, from its config alone: parameters, FLOPs, MFU.

How parameters are counted. The architecture is built by transformers on the meta device (shapes only, well under a
second), and every weight is read off it: no formula per model family that could be wrong for the next one.

How FLOPs are counted (`train_flops`). One multiply-add is 2 FLOPs. For a token and a weight matrix W (out, in) that it
passes:

    forward   y = W x                     2 in out
    backward  dx = W^T dy                 2 in out
    backward  dW = dy x^T                 2 in out, only if W is trained

so a frozen weight costs 4 FLOPs and a trained one 6. LoRA's A and B are trained, W is not: 4 |W| + 6 (|A| + |B|). Of E
routed experts a token passes top_k, so only those count. The head and the router are frozen but pass gradients on, so
they count 4; the embedding is a lookup and counts 0. Causal attention over a document of n tokens scores n (n + 1) / 2
pairs: forward has two products (q k^T and p v), backward four (dv, dp, dq, dk), each 2 head_dim FLOPs a pair and head:
12 heads head_dim pairs in each layer. Norms, activations, rotary, softmax, the optimiser and DoRA's per-step row norms
count nothing. Whatever is computed a second time (checkpointing, flash attention's backward scores, the frugal experts
block) counts nothing either: MFU is what the mathematics needs, over what the machine could have done.
"""

import json
import re
import time
from dataclasses import dataclass
from functools import lru_cache

from fused_moe_lora import why_not_conforming
from malaysian_sft.base_model import UNREADABLE, block_fp8
from malaysian_sft.fp8 import check_arithmetic
from malaysian_sft.lora import NOT_ADAPTED, active_experts, expert_rank

GIB = 2**30
# Dense bf16 tensor-core TFLOP/s (no sparsity, fp32 accumulation) by a word of the name that CUDA reports; the first
# that occurs wins. Sources: NVIDIA's data sheets of each product (which print the sparse figure, twice this, for most
# of them) and, for the workstation and GeForce cards, the GA102 and Ada architecture papers.
PEAK_TFLOPS = (
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.4),  # SXM: "NVIDIA H100 80GB HBM3"
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A10", 125.0),
    ("A10G", 70.0),
    ("L40S", 362.05),
    ("L40", 181.05),
    ("L4", 121.0),
    ("RTX A6000", 154.8),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of the model, or the E like matrices of one projection of an experts block."""

    name: str  # dotted name of the parameter (or of the half of gate_up_proj)
    kind: str  # attention, mlp, shared_expert, expert, router, head, embedding
    layer: int | None  # decoder layer, None outside
    out_features: int
    in_features: int
    copies: int = 1  # E for experts
    active: int = 1  # how many of the copies a token passes: top_k for experts, 0 for the embedding's lookup
    adapted: bool = False  # gets LoRA


@dataclass(frozen=True)
class Architecture:
    """Everything the accounts need to know of a model, read off its meta-device copy by `architecture`."""

    matrices: tuple[Matrix, ...]
    vectors: dict  # layer (None outside the layers) -> parameters in norms and biases
    top_k: int  # routed experts a token passes; 1 for a dense model
    refused: str | None  # why wrap_experts would not take the experts
    stateful: tuple[str, ...]  # classes of layers that carry a state along the sequence, from document to document

    def layers(self):
        """The decoder layers in order: for each, its matrices."""
        numbers = sorted({m.layer for m in self.matrices if m.layer is not None})
        return [[m for m in self.matrices if m.layer == number] for number in numbers]


def architecture(config):
    """Read a transformers causal LM config, or the text part of a composite one, into an `Architecture`. Raises
    ValueError for a config no causal LM class takes."""
    config = config.get_text_config()
    return _architecture(type(config), json.dumps(config.to_dict(), sort_keys=True, default=str))


@lru_cache(maxsize=16)
def _architecture(config_class, config_json):
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{config_class.__name__}: not the config of a causal language model that transformers knows")
    # Constructed directly: from_config would enter DeepSpeed's zero.Init when a ZeRO-3 trainer asks.
    try:
        config = config_class.from_dict(json.loads(config_json))
        with torch.device("meta"):
            model = MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config)
    except UNREADABLE as error:
        what = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(
            f"{config_class.__name__}: transformers cannot build a model of this config ({what})"
        ) from None
    top_k = active_experts(config)
    head = model.get_output_embeddings()
    matrices, vectors, seen = [], {}, set()
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}"
            parts = name.split(".")
            layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
            linear = isinstance(module, torch.nn.Linear)
            row = parameter.dim() == 1 or (not linear and parameter.numel() == max(parameter.shape))
            if row or isinstance(module, torch.nn.Conv1d):
                vectors[layer] = vectors.get(layer, 0) + parameter.numel()
                continue
            shared = id(parameter) in seen  # a tied head holds no memory of its own
            seen.add(id(parameter))
            if parameter.dim() == 3:
                experts, rows, columns = parameter.shape
                halves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
                matrices += [
                    Matrix(
                        f"{module_name}.{half}",
                        "expert",
                        layer,
                        rows // len(halves),
                        columns,
                        experts,
                        top_k,
                        adapted=True,
                    )
                    for half in halves
                ]
            elif isinstance(module, torch.nn.Embedding):
                matrices.append(Matrix(name, "embedding", layer, *parameter.shape, copies=1, active=0))
            elif module is head:
                matrices.append(Matrix(name, "head", layer, *parameter.shape, copies=0 if shared else 1))
            elif not linear or parts[-2] in NOT_ADAPTED:
                matrices.append(Matrix(name, "router", layer, *parameter.shape))
            else:
                kind = "attention" if "attn" in name else "shared_expert" if "shared_expert" in name else "mlp"
                matrices.append(Matrix(name, kind, layer, *parameter.shape, adapted=layer is not None))
    experts = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "experts"}
    reasons = {name: reason for name, module in experts.items() if (reason := why_not_conforming(module))}
    refused = next((f"{name} ({type(experts[name]).__name__}): {reason}" for name, reason in reasons.items()), None)
    return Architecture(tuple(matrices), vectors, top_k, refused, stateful_layers(model))


def stateful_layers(model):
    """Names of the classes, in decoder layers, of mixers with a state: those that convolve, or decay what came before.

    A hint, by what such layers are made of; documents_apart.py decides, on the model itself.
    """
    import torch

    found = {}
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        convolves = any(isinstance(child, torch.nn.Conv1d) for child in module.children())
        if ".layers." in f".{name}" and (convolves or parameters.keys() & {"A_log", "slope_rate", "query_decay"}):
            found[type(module).__name__] = None
    return tuple(found)


def count_parameters(config, r=0, expert_r=None, use_dora=False):
    """Parameters of the model and of its adapter.

    Returns a dict of ints: `total` (the base), `active` (the base with only top_k of the routed experts), `trainable`
    (the adapter), `base` and `adapter` (dicts by kind, which add up to total and trainable), `active_adapter` (what of
    the adapter a token passes). `r` is the rank (0: no adapter); `expert_r` the routed experts' (default r // top_k).
    """
    config = config.get_text_config()
    arch = architecture(config)
    expert_r = expert_rank(config, r, expert_r)
    base = {"norms and biases": sum(arch.vectors.values())}
    adapter, active, active_adapter = {}, base["norms and biases"], 0
    for m in arch.matrices:
        size = m.out_features * m.in_features
        base[m.kind] = base.get(m.kind, 0) + m.copies * size
        active += (m.active if m.kind == "expert" else m.copies) * size
        if m.adapted and r:
            rank = expert_r if m.kind == "expert" else r
            size = rank * (m.in_features + m.out_features) + (m.out_features if use_dora else 0)
            adapter[m.kind] = adapter.get(m.kind, 0) + m.copies * size
            active_adapter += m.active * size
    return {
        "total": sum(base.values()),
        "active": active,
        "trainable": sum(adapter.values()),
        "active_adapter": active_adapter,
        "base": base,
        "adapter": adapter,
    }


def train_flops(config, tokens, sum_squared_lengths, r, expert_r=None, use_dora=False):
    """Useful FLOPs of forward + backward over `tokens` real tokens in documents whose squared lengths add up to
    `sum_squared_lengths`.

    The module's docstring derives it: 4 per frozen weight and token, 6 per adapter weight, causal attention within each
    document; recompute counts nothing, and DoRA (`use_dora`) counts what LoRA does: its norms are per step, its scaling
    is elementwise. `config` is a transformers config, `r` the LoRA rank (0: no adapter), `expert_r` the routed experts'
    (default r // top_k). A sliding window, where the config uses one, caps the pairs a token scores.
    """
    config = config.get_text_config()
    arch = architecture(config)
    expert_r = expert_rank(config, r, expert_r)
    per_token = 0
    for m in arch.matrices:
        per_token += 4 * m.active * m.out_features * m.in_features
        if m.adapted:
            per_token += 6 * m.active * (expert_r if m.kind == "expert" else r) * (m.out_features + m.in_features)
    return float(
        per_token * tokens + 12 * attention_width(config) * attention_pairs(config, tokens, sum_squared_lengths)
    )


def attention_pairs(config, tokens, sum_squared_lengths):
    """Query-key pairs that all layers score, forward, over `tokens` tokens in documents of that sum of squares; a
    sliding window caps a token's."""
    pairs = (sum_squared_lengths + tokens) / 2
    window = getattr(config, "sliding_window", None) or pairs
    return sum(min(pairs, tokens * window if sliding else pairs) for sliding in _sliding_layers(config))


def attention_width(config):
    """Heads x the mean of what a head's two products are wide: of queries and keys, and of values (they differ in
    DeepSeek's latent attention)."""
    heads = config.num_attention_heads
    if latent := getattr(config, "qk_rope_head_dim", None):
        return heads * (latent + config.qk_nope_head_dim + config.v_head_dim) / 2
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _sliding_layers(config):
    """For every layer, whether its attention is windowed."""
    default = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    types = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in types]


def peak_flops(device_name):
    """Dense bf16 FLOP/s of a device by its CUDA name ("NVIDIA H100 80GB HBM3"); None for one the table doesn't know,
    such as "cpu"."""
    for word, tflops in PEAK_TFLOPS:
        if re.search(rf"\b{word}\b(?! (D|Laptop)\b)", device_name, re.IGNORECASE):
            return tflops * 1e12
    return None


def mfu(flops, seconds, gpus, device_name):
    """Model FLOPs utilisation: `flops` useful FLOPs done in `seconds` by `gpus` devices, over their peak. None if the
    peak isn't known."""
    peak = peak_flops(device_name)
    return flops / (seconds * gpus * peak) if peak else None


LEVELS = ("none", "selective", "full")  # of recomputation, in both trainers


def dense_level(policy, layer, frugal_layers):
    """What of layer number `layer` of a dense model is computed again, one of LEVELS: `policy`, in the first
    `frugal_layers` the next one."""
    return LEVELS[min(LEVELS.index(policy) + (layer < frugal_layers), 2)]


def computed_again(kind, policy, frugal_layers, matrix):
    """Whether the backward makes this product (but routed experts') again, under a trainer's activation policy:
    selective is gate and up in dense models, attention in mixtures."""
    if matrix.layer is None:
        return False
    if kind == "dense":
        level = dense_level(policy, matrix.layer, frugal_layers)
        return level == "full" or (level == "selective" and matrix.kind == "mlp" and "down_proj" not in matrix.name)
    return policy == "full" or (policy == "selective" and matrix.kind == "attention")


def scored_again(config, kind, policy, frugal_layers):
    """Share of the layers whose attention scores the backward computes again."""
    if kind == "dense":
        layers = range(config.num_hidden_layers)
        return sum(dense_level(policy, i, frugal_layers) == "full" for i in layers) / len(layers)
    return float(policy != "none")


def recompute_flops(config, policy, mode, r, expert_r, document_length, frugal_layers=0, kind="moe"):
    """FLOPs a token that are computed twice under an activation policy and a memory mode: time, never counted as
    useful."""
    flops = 0
    for m in architecture(config).matrices:
        if m.layer is None:
            continue
        size = m.active * m.out_features * m.in_features
        lora = m.active * (expert_r if m.kind == "expert" else r) * (m.out_features + m.in_features) * m.adapted
        if computed_again(kind, policy, frugal_layers, m):
            flops += 2 * (size + lora)
        if m.kind == "expert" and (mode == "frugal" or m.layer < frugal_layers):
            flops += 2 * m.active * expert_r * m.in_features if m.name.endswith("down_proj") else 2 * (size + lora)
    scores = config.num_hidden_layers * 4 * attention_width(config) * (document_length + 1) / 2
    return flops + scores * scored_again(config, kind, policy, frugal_layers)


def measure_gemm(size=8192, repeats=20, device="cuda"):
    """FLOP/s of a dense bf16 matrix product of `size` on this GPU, as PyTorch runs it: what a perfect step could reach
    of the peak."""
    import torch

    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in "ab")
    for warm in (True, False):
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        if not warm:
            return 2 * size**3 * repeats / (time.perf_counter() - started)


def compare_gemm(device_name, flops):
    """One line for the log after the first step: what `measure_gemm` gave beside the peak that MFU is a share of."""
    peak = peak_flops(device_name)
    share = (
        f"MFU is of the peak of {peak / 1e12:.0f} TFLOP/s, which it reached {flops / peak:.1%} of"
        if peak
        else "its peak is not known"
    )
    return f"a dense bf16 matrix product ran at {flops / 1e12:.0f} TFLOP/s on this {device_name}; {share}"


def check_trainer(config, kind):
    """Raise ValueError if a model of this transformers config is not one for train_dense.py ("dense") or train_moe.py
    ("moe").

    The dense trainer would leave routed experts out without a word, and reads no quantised base.
    """
    block_fp8(config.model_type, config.to_dict(), supported=kind == "moe")
    if (kind == "moe") != any(m.kind == "expert" for m in architecture(config).matrices):
        other = "train_dense.py" if kind == "moe" else "train_moe.py"
        raise ValueError(f"{config.model_type} has {'no ' * (kind == 'moe')}routed experts: train it with {other}")
    if kind == "moe" and architecture(config).refused:
        raise ValueError(f"{config.model_type} cannot be trained: {architecture(config).refused}")


def check_experts(config, arithmetic, base_dtype, capability=None):
    """Raise ValueError unless the routed experts of a model of this config can compute in `arithmetic`; capability: the
    GPU's, None where there is none."""
    for m in architecture(config).matrices:
        if m.kind == "expert" and m.name.endswith("down_proj"):
            check_arithmetic(arithmetic, base_dtype, m.out_features, m.in_features, capability)
