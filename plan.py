"""What a run needs and what it is worth, from the model's config alone: parameters, bytes, FLOPs, time; no weights, no GPU.

    python3 plan.py fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh --gpus 8 --gpu_memory 80

prints the plan to stdout and exits 1 when nothing fits. The trainers call the same functions (`train_flops`, `mfu`, `plan_run`,
`settle`), so a log line's MFU, a trainer's choice of what to recompute and this command can't disagree.

How parameters are counted. The architecture is built by transformers on the meta device (shapes only, well under a second), and
every weight is read off it: no formula per model family that could be wrong for the next one.

How FLOPs are counted (`train_flops`). One multiply-add is 2 FLOPs. For a token and a weight matrix W (out, in) that it passes:

    forward   y = W x                     2 in out
    backward  dx = W^T dy                 2 in out
    backward  dW = dy x^T                 2 in out, only if W is trained

so a frozen weight costs 4 FLOPs and a trained one 6. LoRA's A and B are trained, W is not: 4 |W| + 6 (|A| + |B|). Of E routed
experts a token passes top_k, so only those count. The head and the router are frozen but pass gradients on, so they count 4; the
embedding is a lookup and counts 0. Causal attention over a document of n tokens scores n (n + 1) / 2 pairs: forward has two products
(q k^T and p v), backward four (dv, dp, dq, dk), each 2 head_dim FLOPs a pair and head: 12 heads head_dim pairs in each layer. Norms,
activations, rotary, softmax, the optimiser and DoRA's per-step row norms count nothing. Whatever is computed a second time
(checkpointing, flash attention's backward scores, the frugal experts block) counts nothing either: MFU is what the mathematics needs,
over what the machine could have done.
"""

import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from adapter import NOT_ADAPTED

GIB = 2**30

# Dense bf16 tensor-core TFLOP/s (no sparsity, fp32 accumulation) by a word of the name that CUDA reports; the first that occurs wins.
# Sources: NVIDIA's data sheets of each product (which print the sparse figure, twice this, for most of them) and, for the workstation
# and GeForce cards, the GA102 and Ada architecture papers.
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
    query_key_norm: bool  # queries and keys are normalised per head

    def layers(self):
        """The decoder layers in order: for each, its matrices."""
        numbers = sorted({m.layer for m in self.matrices if m.layer is not None})
        return [[m for m in self.matrices if m.layer == number] for number in numbers]


def architecture(config):
    """Read a transformers causal LM config into an `Architecture`. Raises ValueError for a config no causal LM class takes."""
    return _architecture(type(config), json.dumps(config.to_dict(), sort_keys=True, default=str))


@lru_cache(maxsize=16)
def _architecture(config_class, config_json):
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{config_class.__name__}: not the config of a causal language model that transformers knows")
    config = config_class.from_dict(json.loads(config_json))
    # Constructed directly: from_config would enter DeepSpeed's zero.Init when a ZeRO-3 trainer asks.
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config)
    top_k = getattr(config, "num_experts_per_tok", None) or 1
    head = model.get_output_embeddings()
    matrices, vectors, seen = [], {}, set()
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}"
            parts = name.split(".")
            layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
            if parameter.dim() == 1:
                vectors[layer] = vectors.get(layer, 0) + parameter.numel()
                continue
            shared = id(parameter) in seen  # a tied head holds no memory of its own
            seen.add(id(parameter))
            if parameter.dim() == 3:
                experts, rows, columns = parameter.shape
                halves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
                matrices += [
                    Matrix(f"{module_name}.{half}", "expert", layer, rows // len(halves), columns, experts, top_k, adapted=True)
                    for half in halves
                ]
            elif isinstance(module, torch.nn.Embedding):
                matrices.append(Matrix(name, "embedding", layer, *parameter.shape, copies=1, active=0))
            elif module is head:
                matrices.append(Matrix(name, "head", layer, *parameter.shape, copies=0 if shared else 1))
            elif not isinstance(module, torch.nn.Linear) or parts[-2] in NOT_ADAPTED:
                matrices.append(Matrix(name, "router", layer, *parameter.shape))
            else:
                kind = "attention" if "attn" in name else "shared_expert" if "shared_expert" in name else "mlp"
                matrices.append(Matrix(name, kind, layer, *parameter.shape, adapted=layer is not None))
    query_key_norm = any("q_norm" in name for name, _ in model.named_modules())
    return Architecture(tuple(matrices), vectors, top_k, query_key_norm)


def expert_rank(config, r, expert_r=None):
    """The LoRA rank of one routed expert: `expert_r`, or r over the active experts (at least 1), as the launchers train."""
    return expert_r if expert_r is not None else max(r // architecture(config).top_k, 1) if r else 0


def count_parameters(config, r=0, expert_r=None, use_dora=False):
    """Parameters of the model and of its adapter.

    Returns a dict of ints: `total` (the base), `active` (the base with only top_k of the routed experts), `trainable` (the adapter),
    `base` and `adapter` (dicts by kind, which add up to total and trainable), `active_adapter` (what of the adapter a token passes).
    `r` is the rank (0: no adapter); `expert_r` the routed experts' (default r // top_k).
    """
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
    """Useful FLOPs of forward + backward over `tokens` real tokens in documents whose squared lengths add up to `sum_squared_lengths`.

    The module's docstring derives it: 4 per frozen weight and token, 6 per adapter weight, causal attention within each document;
    recompute counts nothing, and DoRA (`use_dora`) counts what LoRA does: its norms are per step, its scaling is elementwise. `config` is a
    transformers config, `r` the LoRA rank (0: no adapter), `expert_r` the routed experts' (default r // top_k). A sliding window, where
    the config uses one, caps the pairs a token scores.
    """
    arch = architecture(config)
    expert_r = expert_rank(config, r, expert_r)
    per_token = 0
    for m in arch.matrices:
        per_token += 4 * m.active * m.out_features * m.in_features
        if m.adapted:
            per_token += 6 * m.active * (expert_r if m.kind == "expert" else r) * (m.out_features + m.in_features)
    pairs = (sum_squared_lengths + tokens) / 2
    window = getattr(config, "sliding_window", None) or pairs
    width = _attention_width(config)
    attention = sum(12 * width * min(pairs, tokens * window if sliding else pairs) for sliding in _sliding_layers(config))
    return float(per_token * tokens + attention)


def _attention_width(config):
    """heads x head_dim: the width of q, and of the attention's output."""
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _sliding_layers(config):
    """For every layer, whether its attention is windowed."""
    default = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    types = getattr(config, "layer_types", None) or [default] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in types]


def peak_flops(device_name):
    """Dense bf16 FLOP/s of a device by its CUDA name ("NVIDIA H100 80GB HBM3"); None for one the table doesn't know, such as "cpu"."""
    for word, tflops in PEAK_TFLOPS:
        if re.search(rf"\b{word}\b(?! (D|Laptop)\b)", device_name, re.IGNORECASE):
            return tflops * 1e12
    return None


def mfu(flops, seconds, gpus, device_name):
    """Model FLOPs utilisation: `flops` useful FLOPs done in `seconds` by `gpus` devices, over their peak. None if the peak isn't known."""
    peak = peak_flops(device_name)
    return flops / (seconds * gpus * peak) if peak else None


# ----------------------------------------------------------------------------------------------------------------------------------
# Memory
# ----------------------------------------------------------------------------------------------------------------------------------

# What each trainer offers: activation policies, the least recomputation first, each with the memory modes of the experts block that are
# worth having with it, the trainer's default first.
CHOICES = {
    "dense": {"none": ("fast",), "full": ("fast",)},
    "moe": {"none": ("fast", "frugal"), "selective": ("frugal", "fast"), "full": ("fast",)},
}
MODES = {"dense": ("fast",), "moe": ("fast", "frugal")}
SPARE = 0.1  # of a GPU's memory: how far a plan may be off (tests hold it to that), so what fits with this to spare is chosen first
FULL_TOKENS = 16384  # tokens of a micro-batch from which a larger one gains nothing: 1,024 rows for each of 128 experts at top-8


def experts_saved_bytes(tokens, top_k, hidden_size, intermediate_size, expert_r, mode, use_dora=False, shared_A=False):
    """What a routed-experts block keeps for backward beyond its input and output, in bytes.

    Per routed row (tokens x top_k of them), in bf16: in fast mode gate and silu(gate) up, 2 x 2 intermediate_size bytes, the LoRA
    inner products of gate, up and down, 2 x 3 expert_r (2 x 2 expert_r where gate and up share one A), and for DoRA the output before
    the magnitude, 2 hidden_size; in both modes 16 bytes of indices and router weights. Frugal mode recomputes the rest.
    """
    kept = 0
    if mode == "fast":
        kept = 2 * intermediate_size + (2 if shared_A else 3) * expert_r + hidden_size * use_dora
    return tokens * top_k * (2 * kept + 16)


def layer_saved_bytes(config, kind, matrices, tokens, policy, mode, r, expert_r, use_dora=False, repeated_heads=False):
    """What one decoder layer (its `matrices`) keeps for backward over `tokens` tokens, in bytes; bf16 unless said otherwise.

    full       the layer's input, H a token.
    none       attention half: input H, normed input H, every projection's output except o_proj's, queries and keys once more where they
               are normalised (keys and values as wide as the queries with repeated_heads), the attention output and its fp32
               log-sum-exp per head, r for each LoRA inner product. MLP half: its input H, normed input H, and for a dense or shared
               MLP gate, up and their product, 3 intermediate_size, and 3 r (moe: silu(gate) as well, as transformers' own MLP does;
               dense models run Liger's); for routed experts `experts_saved_bytes` and the router's fp32 probabilities. DoRA keeps
               the output before the magnitude of every adapted layer, and a bf16 copy of the experts' adapter, which FSDP then
               gathers in fp32.
    selective  the attention half is recomputed from its input and normed input; the MLP half is kept as under none.
    """
    hidden, norms, width = config.hidden_size, architecture(config).query_key_norm, _attention_width(config)
    attention, mlp, experts = 2 * hidden, 2 * hidden, 0  # elements a token; bytes
    for m in matrices:
        inner = (r + m.out_features * use_dora) * m.adapted
        if m.kind == "attention":
            repeated = repeated_heads and m.name.endswith(("k_proj.weight", "v_proj.weight"))
            attention += inner + (width if repeated or m.name.endswith("o_proj.weight") else m.out_features)
            attention += m.out_features * (norms and m.name.endswith(("q_proj.weight", "k_proj.weight")))
        elif m.kind in ("mlp", "shared_expert"):
            mlp += inner + (m.in_features if "down_proj" in m.name else m.out_features)
            mlp += m.out_features * (kind == "moe" and "gate_proj" in m.name)
        elif m.kind == "router":
            mlp += 2 * m.out_features  # fp32
        elif m.kind == "expert":
            experts += 2 * use_dora * m.copies * expert_r * (m.out_features + m.in_features)
            if m.name.endswith("down_proj"):
                experts += experts_saved_bytes(tokens, m.active, m.out_features, m.in_features, expert_r, mode, use_dora)
    if policy == "full":
        return tokens * 2 * hidden
    log_sum_exp = 4 * config.num_attention_heads
    kept_attention = 2 * attention + log_sum_exp if policy == "none" else 2 * 2 * hidden
    return tokens * (kept_attention + 2 * mlp) + experts


def layer_working_bytes(config, matrices, tokens, mode, use_dora=False):
    """The most that one layer's forward or backward holds for a moment beyond what is kept, in bytes; bf16.

    Routed experts, per routed row: in the forward half of H, as the output is made from half of its columns at a time (with DoRA it is
    whole, and kept unless in frugal mode); in the backward intermediate_size, the gradient of silu(gate) up; in frugal mode also
    2 intermediate_size, gate and silu(gate) up. A dense or shared MLP: two of (tokens, intermediate_size), the LoRA's share of a
    projection's output or the gradient of the product. And four of (tokens, H): the residual stream's gradient, the two norms', the
    attention's.
    """
    width = 0
    for m in matrices:
        if m.kind in ("mlp", "shared_expert") and "down_proj" in m.name:
            width = max(width, 2 * m.in_features)
        if m.kind == "expert" and m.name.endswith("down_proj"):
            hidden, frugal = m.out_features, mode == "frugal"
            forward, backward = (hidden * frugal, m.in_features + hidden * frugal) if use_dora else (hidden // 2, m.in_features)
            width = max(width, m.active * (max(forward, backward) + 2 * m.in_features * frugal))
    return 2 * tokens * (width + 4 * config.hidden_size)


def loss_bytes(config, kind, tokens):
    """Head and loss in bytes, at most, if every token is supervised; bf16.

    moe: the last layer's output, the final norm's, what of it is supervised and its gradient (tokens, H), and 1,024 rows of logits and of
    their gradient. dense, Liger's fused linear cross entropy: the final norm's output and its gradient (tokens, H), and one chunk of
    logits, as many rows, a power of two, as take the room of the hidden states.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    if kind == "moe":
        return 2 * (4 * tokens * hidden + 2 * min(1024, tokens) * vocabulary)
    rows = math.ceil(tokens / math.ceil(vocabulary / hidden))
    return 2 * (2 * tokens * hidden + min(2 ** math.ceil(math.log2(rows)), tokens) * vocabulary)


def gpu_bytes(config, plan):
    """Bytes of one GPU by term at the moment when they are most; `plan` is plan_run's dict before the bytes are in it.

    That moment is in the backward of one of the layers, when it and all before it still keep their activations and the gradients of the
    one after it are being reduced, or in the loss. Which one is found by trying all; the terms are those of that moment alone.

    dense: DeepSpeed ZeRO-3 over all ranks; without it, as on one. bf16 base and adapter, fp32 master adapter, gradient and two Adam
    moments are all sharded; whole parameters live up to DeepSpeed's stage3_max_live_parameters (1e9) or one layer, whichever is more, and
    its prefetch.
    moe: FSDP2 over the GPUs of shard_nodes nodes, copies beyond. bf16 base, fp32 adapter and Adam moments are sharded (with cpu_offload:
    on the host). One layer is whole in use, with its gather's buffer and the next one's; embedding and head through the step; what is
    gathered is bf16, DoRA's adapter fp32. Over several micro-batches the adapter's fp32 gradient stays whole until the last one, unless
    every micro-batch reduces it. Reducing takes a layer's gradient in bf16 and two fp32 buffers.
    """
    arch, counts, kind, dora = architecture(config), plan["parameters"], plan["kind"], plan["use_dora"]
    r, expert_r, policy, mode = plan["r"], plan["expert_r"], plan["activation_policy"], plan["memory_mode"]
    base, adapter = counts["total"], counts["trainable"]
    tokens = plan["micro_batch"] * plan["max_seq_length"]
    layers = arch.layers()
    layer_base = max(sum(m.copies * m.out_features * m.in_features for m in layer) for layer in layers)
    layer_adapter = max(
        sum(m.copies * (expert_r if m.kind == "expert" else r) * (m.out_features + m.in_features) for m in layer if m.adapted)
        for layer in layers
    )
    reduction = 2 * 4 * config.hidden_size**2 if kind == "dense" else 10 * layer_adapter  # ds3.json's "auto" bucket
    moments, kept = [], 0
    for number, layer in enumerate(layers):
        own, everything = (
            layer_saved_bytes(config, kind, layer, tokens, p, mode, r, expert_r, dora, plan["repeated_heads"]) for p in (policy, "none")
        )
        kept += own
        moment = {
            "kept activations": kept,
            "one layer's temporaries and recompute": everything - own + layer_working_bytes(config, layer, tokens, mode, dora),
            "gradient reduction": reduction if number < len(layers) - 1 else 0,
        }
        moments.append(moment)
    moments.append({"kept activations": kept, "head and loss": loss_bytes(config, kind, tokens)})
    if kind == "dense":
        shard = plan["gpus"] * plan["nodes"] if plan["zero3"] else 1
        live = min(max(10**9, layer_base + layer_adapter) + config.hidden_size**2, base + adapter)  # ds3.json's prefetch
        terms = {
            "frozen base, bf16 shard": 2 * base / shard,
            "adapter, bf16 and fp32 master": 6 * adapter / shard,
            "adapter gradient, fp32": 4 * adapter / shard,
            "Adam moments, fp32": 8 * adapter / shard,
            "gathered parameters": 2 * live if shard > 1 else 0,
        }
    else:
        shard = plan["gpus"] * plan["shard_nodes"]
        whole = plan["accumulation"] > 1 and not plan["reduce_every_micro_batch"]
        on_gpu = 0 if plan["cpu_offload"] else 1
        terms = {
            "frozen base, bf16 shard": on_gpu * 2 * base / shard,
            "adapter, fp32": on_gpu * 4 * adapter / shard,
            "Adam moments, fp32": on_gpu * 8 * adapter / shard,
            "adapter gradient, fp32": 0 if whole else on_gpu * 4 * adapter / shard,
            "whole adapter gradient while accumulating": 4 * adapter if whole else 0,
            "gathered layers": (3 if shard > 1 else 1) * (2 * layer_base + (4 if dora else 2) * layer_adapter),
            "gathered embedding and head": 2 * sum(counts["base"].get(k, 0) for k in ("embedding", "head")),
        }
        if dora:
            terms["DoRA norms of experts, fp32"] = 8 * sum(m.copies * m.out_features for m in arch.matrices if m.kind == "expert")
    terms |= max(moments, key=lambda moment: sum(moment.values()))
    return {name: int(value) for name, value in terms.items() if value}


def recompute_flops(config, policy, mode, r, expert_r, document_length):
    """FLOPs a token that are computed twice under an activation policy and a memory mode: time, never counted as useful."""
    flops = 0
    for m in architecture(config).matrices:
        if m.layer is None:
            continue
        size = m.active * m.out_features * m.in_features
        lora = m.active * (expert_r if m.kind == "expert" else r) * (m.out_features + m.in_features) * m.adapted
        if policy == "full" or (policy == "selective" and m.kind == "attention"):
            flops += 2 * (size + lora)
        if mode == "frugal" and m.kind == "expert":
            flops += 2 * m.active * expert_r * m.in_features if m.name.endswith("down_proj") else 2 * (size + lora)
    if policy != "none":
        flops += config.num_hidden_layers * 4 * _attention_width(config) * (document_length + 1) / 2
    return flops


# ----------------------------------------------------------------------------------------------------------------------------------
# A plan
# ----------------------------------------------------------------------------------------------------------------------------------


def plan_run(
    config,
    *,
    kind,
    gpus,
    nodes=1,
    gpu_memory_gib=80.0,
    reserve_gib=4.0,
    max_seq_length=16384,
    micro_batch=1,
    global_batch_size=32,
    r=256,
    expert_r=None,
    use_dora=False,
    activation_policy="full",
    memory_mode=None,
    reduce_every_micro_batch=False,
    cpu_offload=False,
    shard_nodes=1,
    zero3=True,
    repeated_heads=False,
    document_length=1900.0,
):
    """The bytes and FLOPs of one way to run, as a dict that `print_plan` prints and `check_fits` judges.

    kind: "dense" (train_dense.py, DeepSpeed ZeRO-3) or "moe" (train_moe.py, FSDP2). gpus is per node. micro_batch is packs of
    max_seq_length tokens per GPU and forward (train_moe.py: 1); global_batch_size packs per optimiser step. activation_policy: none,
    selective (moe) or full; memory_mode of the experts block: fast or frugal, by default what the trainer couples with the policy.
    zero3: False for a dense model without DeepSpeed, whole on every GPU. repeated_heads: attention by a kernel that wants a key and a
    value for every query head (`this_machine` says if its does).
    reserve_gib of every GPU are left to the CUDA context, NCCL and fragmentation. document_length: mean length of the document that a
    token is in (sum of squared lengths / sum of lengths), for attention. The rest as train_moe.py's flags of that name.

    Keys: the arguments; accumulation; parameters (count_parameters); gpu_bytes by term (`gpu_bytes` says what and why), peak_bytes,
    limit_bytes, fits; host_bytes and disk_bytes by term; flops_per_token (useful), recompute_per_token. Raises ValueError for a batch
    that the GPUs don't divide, an unknown kind, policy or mode, or a config without the kind's layers.
    """
    policies = CHOICES.get(kind, {})
    for name, value, known in (
        ("kind", kind, CHOICES),
        ("activation_policy", activation_policy, policies),
        ("memory_mode", memory_mode, (None, *MODES.get(kind, ()))),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(filter(None, known))}")
    plan = {
        "model_type": config.model_type,
        "kind": kind,
        "gpus": gpus,
        "nodes": nodes,
        "gpu_memory_gib": gpu_memory_gib,
        "reserve_gib": reserve_gib,
        "max_seq_length": max_seq_length,
        "micro_batch": micro_batch,
        "global_batch_size": global_batch_size,
        "r": r,
        "expert_r": expert_rank(config, r, expert_r) if kind == "moe" else None,
        "use_dora": use_dora,
        "activation_policy": activation_policy,
        "memory_mode": memory_mode or policies[activation_policy][0],
        "reduce_every_micro_batch": reduce_every_micro_batch,
        "cpu_offload": cpu_offload,
        "shard_nodes": shard_nodes,
        "zero3": zero3,
        "repeated_heads": repeated_heads,
        "document_length": document_length,
        "parameters": count_parameters(config, r, expert_r, use_dora),
    }
    check_trainer(config, kind)
    if nodes % shard_nodes:
        raise ValueError(f"{nodes} nodes are no multiple of --shard_nodes {shard_nodes}")
    if global_batch_size % (gpus * nodes * micro_batch):
        raise ValueError(f"a step of {global_batch_size} packs is no multiple of {gpus * nodes} GPUs x {micro_batch} packs each")
    plan["accumulation"] = global_batch_size // (gpus * nodes * micro_batch)
    plan["gpu_bytes"] = gpu_bytes(config, plan)
    plan["peak_bytes"] = sum(plan["gpu_bytes"].values())
    plan["limit_bytes"] = int((gpu_memory_gib - reserve_gib) * GIB)
    plan["fits"] = plan["peak_bytes"] <= plan["limit_bytes"]
    plan["host_bytes"], plan["disk_bytes"] = host_bytes(plan), disk_bytes(plan)
    plan["flops_per_token"] = train_flops(config, 1, document_length, r, expert_r, use_dora)
    plan["recompute_per_token"] = recompute_flops(config, activation_policy, plan["memory_mode"], r, plan["expert_r"], document_length)
    return plan


def host_bytes(plan):
    """Host memory of one node by term, in bytes; 3 GiB a rank for Python, CUDA and the libraries.

    moe: a rank reads its shards in pieces, eight of 32 MiB at a time. dense: transformers maps the whole checkpoint into every rank, which
    is page cache, shared by the ranks of a node and given back under pressure. To save, rank 0 gathers the adapter in fp32, and moe
    copies the resume state, adapter and Adam moments, to write it in the background.
    """
    base, adapter = plan["parameters"]["total"], plan["parameters"]["trainable"]
    terms = {"processes": 3 * GIB * plan["gpus"], "whole adapter on rank 0 while saving, fp32": 4 * adapter}
    if plan["kind"] == "dense":
        return {**terms, "checkpoint in page cache while loading (can be evicted)": 2 * base}
    terms["read buffers while loading"] = plan["gpus"] * 8 * 32 * 2**20
    terms["resume state while it is written, fp32"] = 12 * adapter // plan["shard_nodes"]
    if plan["cpu_offload"]:
        terms["base, adapter, its gradient and Adam moments (cpu_offload)"] = (2 * base + 16 * adapter) // plan["shard_nodes"]
    return terms


def disk_bytes(plan):
    """Disk by term, in bytes: train_moe.py keeps one resume state, the Trainer one per checkpoint."""
    base, adapter = plan["parameters"]["total"], plan["parameters"]["trainable"]
    state = "resume state of every checkpoint, fp32" if plan["kind"] == "dense" else "resume state of the newest checkpoint, fp32"
    return {"base checkpoint, bf16": 2 * base, "adapter of every checkpoint, fp32": 4 * adapter, state: 12 * adapter}


def options(config, *, kind, gpus, nodes=1, global_batch_size=32, activation_policy=None, memory_mode=None, **arguments):
    """A plan for every way a trainer can run: activation policy with its memory modes, and micro-batch (dense) or whether every
    micro-batch reduces gradients and how many nodes share a copy (moe); best first. An argument that is given (as for plan_run) stays.

    Best: fits, gathers weights inside a node, leaves SPARE of the memory, recomputes least, reduces least often, fills the GPU
    (FULL_TOKENS tokens in a micro-batch, then the smallest such). What doesn't fit follows, the nearest to fitting first.
    """
    per_gpu = max(global_batch_size // (gpus * nodes), 1)
    policies = CHOICES.get(kind, {}) if activation_policy is None else {activation_policy: CHOICES.get(kind, {}).get(activation_policy, ())}
    pairs = [(p, mode) for p, modes in policies.items() for mode in ([memory_mode] if memory_mode else modes or [None])]
    ways = {
        "micro_batch": [n for n in range(1, per_gpu + 1) if per_gpu % n == 0] if kind == "dense" else [1],
        "reduce_every_micro_batch": [False, True] if kind == "moe" and per_gpu > 1 else [False],
        "shard_nodes": [n for n in range(1, nodes + 1) if nodes % n == 0] if kind == "moe" else [1],
    }
    ways |= {name: [arguments.pop(name)] for name in ways.keys() & arguments.keys()}
    fixed = dict(kind=kind, gpus=gpus, nodes=nodes, global_batch_size=global_batch_size, **arguments)
    plans = [
        plan_run(config, **fixed, activation_policy=policy, memory_mode=mode, **dict(zip(ways, values, strict=True)))
        for (policy, mode), *values in itertools.product(pairs or [("full", None)], *ways.values())
    ]

    def order(p):
        if not p["fits"]:
            return True, p["peak_bytes"]
        tokens = p["micro_batch"] * p["max_seq_length"]
        small = max(FULL_TOKENS - tokens, 0)
        tight = p["peak_bytes"] > (1 - SPARE) * p["limit_bytes"]
        return False, p["shard_nodes"], tight, p["recompute_per_token"], p["reduce_every_micro_batch"], small, p["micro_batch"]

    return sorted(plans, key=order)


def trainer_flags(plan):
    """The trainer's flags that make it run as `plan` says."""
    if plan["kind"] == "dense":
        return f"--gradient_checkpointing {plan['activation_policy'] == 'full'} --per_device_train_batch_size {plan['micro_batch']}"
    reduce = " --reduce_every_micro_batch True" if plan["reduce_every_micro_batch"] else ""
    share = f" --shard_nodes {plan['shard_nodes']}" if plan["shard_nodes"] > 1 else ""
    return f"--activations {plan['activation_policy']} --memory_mode {plan['memory_mode']}{reduce}{share}"


def best_policy(config, **arguments):
    """The plan to run with: the first of `options` (its arguments are those of `plan_run`). Raises ValueError if none fits."""
    plan = options(config, **arguments)[0]
    check_fits(plan)
    return plan


def this_machine(whole=False):
    """Where this process runs, as plan_run's arguments: {"gpus": of one node, "nodes", "gpu_memory_gib": None without a GPU,
    "repeated_heads": where attention is PyTorch's own, before 2.12}.

    By torchrun's variables, which every rank reads alike; without them one GPU, or with `whole` all GPUs of the machine.
    """
    import torch
    from torch.nn.attention.varlen import varlen_attn

    from multipack import attention_backend

    cuda = torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", torch.cuda.device_count() or 1 if whole else 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    device = int(os.environ.get("LOCAL_RANK", 0))
    return {
        "gpus": local,
        "nodes": world // local,
        "gpu_memory_gib": torch.cuda.get_device_properties(device).total_memory / GIB if cuda else None,
        "repeated_heads": cuda
        and attention_backend("cuda") == "varlen_attn"
        and "enable_gqa" not in inspect.signature(varlen_attn).parameters,
    }


def settle(config, ignore=False, **arguments):
    """The plan that a trainer runs with: `best_policy`'s, of the arguments that are not None; those that are None are chosen.

    Where nothing fits it raises ValueError, naming the largest terms and what to change; with `ignore` it prints that as a warning and
    returns the plan that comes nearest to fitting.
    """
    plan = options(config, **{name: value for name, value in arguments.items() if value is not None})[0]
    try:
        check_fits(plan)
    except ValueError as error:
        if not ignore:
            raise ValueError(f"{error} This is an estimate: --ignore_plan True runs all the same.") from None
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"warning: {error}", file=sys.stderr)
    return plan


def dry_run(config, **arguments):
    """Print, on rank 0, the plan of the run that these flags would start on this machine; `arguments` are `settle`'s.

    Without a GPU it is that of GPUs of 80 GiB, and nothing is refused. Raises ValueError, after printing, for a run that doesn't fit.
    """
    machine = this_machine(whole=True)
    no_gpu = machine["gpu_memory_gib"] is None
    if no_gpu:
        machine["gpu_memory_gib"] = PlanArguments.gpu_memory
    if int(os.environ.get("RANK", 0)):
        return
    arguments = {name: value for name, value in {**arguments, **machine}.items() if value is not None}
    plan = options(config, **arguments)[0]
    if no_gpu:
        print(f"No GPU here: planned for {machine['gpus']} of {machine['gpu_memory_gib']:g} GiB; plan.py LAUNCHER plans for others.\n")
    print_plan(plan)
    if not no_gpu:
        check_fits(plan)


def check_fits(plan):
    """Raise ValueError, naming the largest terms and what to change, if `plan` needs more memory than a GPU has."""
    if plan["fits"]:
        return
    largest = sorted(plan["gpu_bytes"].items(), key=lambda item: -item[1])[:3]
    terms = ", ".join(f"{name} {value / GIB:.1f} GiB" for name, value in largest)
    need, limit = plan["peak_bytes"] / GIB, plan["limit_bytes"] / GIB
    raise ValueError(
        f"{need:.1f} GiB a GPU are needed and {limit:.1f} are there ({plan['gpu_memory_gib']:g} less {plan['reserve_gib']:g} reserved), "
        f"with {trainer_flags(plan)} and {plan['micro_batch']} x {plan['max_seq_length']:,} tokens. Largest: {terms}. "
        f"{_remedy(plan, largest[0][0])}"
    )


def _remedy(plan, term):
    """What to change when `term` is the largest of a plan that doesn't fit."""
    if term == "whole adapter gradient while accumulating":
        return "Pass --reduce_every_micro_batch True, take more GPUs, or lower --lora_r."
    if "activations" in term or "temporaries" in term or "loss" in term:
        recompute = "" if plan["activation_policy"] == "full" else " or recompute more (activation policy full)"
        return f"Lower --max_seq_length{recompute}."
    if "dapter" in term or "Adam" in term:
        return "Lower --lora_r, or take more GPUs."
    spread = " to shard over (--shard_nodes)" if plan["kind"] == "moe" else ""
    return f"Take more GPUs{spread}, GPUs with more memory, or a smaller model."


def need(plan):
    """The planned peak in words: "41.5 GiB of 80 a GPU planned"."""
    return f"{plan['peak_bytes'] / GIB:.1f} GiB of {plan['gpu_memory_gib']:.1f} a GPU planned"


def compare_peak(plan, measured_bytes):
    """One line for the log after the first step: the measured peak (torch.cuda.max_memory_allocated) beside the plan's."""
    predicted = plan["peak_bytes"]
    return (
        f"peak memory: measured {measured_bytes / GIB:.2f} GiB, planned {predicted / GIB:.2f} GiB ({measured_bytes / predicted - 1:+.1%})"
    )


def measure_gemm(size=8192, repeats=20, device="cuda"):
    """FLOP/s of a dense bf16 matrix product of `size` on this GPU, as PyTorch runs it: what a perfect step could reach of the peak."""
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
    share = f"MFU is of the peak of {peak / 1e12:.0f} TFLOP/s, which it reached {flops / peak:.1%} of" if peak else "its peak is not known"
    return f"a dense bf16 matrix product ran at {flops / 1e12:.0f} TFLOP/s on this {device_name}; {share}"


def plan_evaluation(config, *, gpu_partition, gpu_memory_gib=80.0, gpu_memory_utilization=0.92, max_model_len=8192):
    """vLLM's memory for one engine over `gpu_partition` GPUs: a dict of bytes per GPU.

    Weights in bf16, split evenly (adapters are merged while loading, so they take nothing); the KV cache's bytes a token (keys and values
    of every layer, heads split until each GPU has one); what gpu_memory_utilization leaves for the cache after 3 GiB for activations
    and CUDA graphs; and how many sequences of max_model_len tokens that is. Raises ValueError where the heads don't divide.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % gpu_partition:
        raise ValueError(f"--gpu_partition {gpu_partition}: {heads} attention heads can't be split over {gpu_partition} GPUs")
    head_dim = _attention_width(config) // heads
    weights = 2 * count_parameters(config)["total"] / gpu_partition
    kv_token = 2 * 2 * config.num_hidden_layers * max(kv_heads // gpu_partition, 1) * head_dim
    cache = gpu_memory_gib * gpu_memory_utilization * GIB - weights - 3 * GIB
    return {
        "gpu_partition": gpu_partition,
        "weights_bytes": int(weights),
        "kv_bytes_per_token": kv_token,
        "cache_bytes": int(cache),
        "cache_tokens": max(int(cache // kv_token), 0),
        "sequences": max(cache / kv_token / max_model_len, 0.0),
        "max_model_len": max_model_len,
        "fits": cache >= kv_token * max_model_len,
    }


# ----------------------------------------------------------------------------------------------------------------------------------
# Steps and time
# ----------------------------------------------------------------------------------------------------------------------------------

# Scicom-intl/Malaysian-Instructions, all five configs, by the original project's logs: 225,265 conversations in 10,080 (GLM-4.5) to 10,316
# (Llama-3.1) packs of 16,384 that were 86 % full.
DATASET_TOKENS = 144e6


def schedule(tokens, max_seq_length, global_batch_size, epochs, fill=0.995):
    """Packs and optimiser steps of a run over `tokens` real tokens an epoch, packs being filled to `fill` (multipack's goal)."""
    packs = math.ceil(tokens / (max_seq_length * fill))
    steps = math.ceil(packs / global_batch_size)
    return {"tokens_per_epoch": int(tokens), "packs": packs, "steps_per_epoch": steps, "steps": math.ceil(steps * epochs), "epochs": epochs}


def read_results(directory):
    """Every record of results/*.json (each a list of flat objects), with its file's name under "source"."""
    records = []
    for path in sorted(Path(directory).glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, list):
            records += [{**record, "source": path.name} for record in content if isinstance(record, dict)]
    return records


def expected_time(plan, config, model, tokens, device, records):
    """Hours for `tokens` real tokens from measured rates: {"low", "high", "source"}, or None where nothing fitting was measured.

    First choice: training-step records (`mfu`) of this model, adapter and activation policy on this kind of device; the time is the run's
    useful FLOPs over mfu x peak x GPUs, from the best to the worst such record. Records of a few layers count too, and the source then
    says so: on fewer GPUs than planned, what gathering the weights costs is not in them. Else records of the experts block alone
    (`total_ms`, `tokens`): a lower bound, with "high" None. `model` is the hub id; a record's `model` must be part of it.
    """
    peak, gpus = peak_flops(device), plan["gpus"] * plan["nodes"]
    wanted = {"adapter": "dora" if plan["use_dora"] else "lora", "activations": plan["activation_policy"], "mode": plan["memory_mode"]}
    fitting = [
        r
        for r in records
        if str(r.get("model", "-")).lower().split("/")[-1] in model.lower()
        and all(r.get(key, value) == value for key, value in wanted.items())
        and peak is not None
        and peak_flops(str(r.get("device", ""))) == peak
    ]
    steps = [r for r in fitting if r.get("mfu")]
    if steps:
        hours = [plan["flops_per_token"] * tokens / (r["mfu"] * peak * gpus) / 3600 for r in steps]
        return {"low": min(hours), "high": max(hours), "source": _sources(steps, config.num_hidden_layers)}
    blocks = [r for r in fitting if r.get("implementation") == "fused_moe_lora" and r.get("total_ms")]
    if blocks:
        layers = sum(1 for layer in architecture(config).layers() if any(m.kind == "expert" for m in layer))
        low = min(r["total_ms"] / r["tokens"] for r in blocks) * layers * tokens / gpus / 3.6e6
        return {"low": low, "high": None, "source": _sources(blocks, 0)}
    return None


def _sources(records, layers):
    """The files of `records`, and on what they were measured where that is less than all `layers`."""
    names = {f"results/{r['source']}" for r in records}
    slices = {f"{r['layers']} of {layers} layers on {r.get('gpus', 1)} GPUs" for r in records if r.get("layers", layers) < layers}
    return ", ".join([*sorted(names), *sorted(slices)])


# ----------------------------------------------------------------------------------------------------------------------------------
# Printing
# ----------------------------------------------------------------------------------------------------------------------------------


def _table(rows, title, left=(0,)):
    """Rows of cells under a title; the columns in `left` are aligned left, the others right."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    aligned = [(str.ljust if i in left else str.rjust, width) for i, width in enumerate(widths)]
    lines = [[align(str(cell), width) for cell, (align, width) in zip(row, aligned, strict=True)] for row in rows]
    return "\n".join([title, *("  " + "  ".join(line).rstrip() for line in lines)])


def print_plan(plan, file=None):
    """Print a plan of `plan_run`: parameters, memory by term, FLOPs, host memory, disk."""
    counts = plan["parameters"]
    p, adapter = plan, "DoRA" if plan["use_dora"] else "LoRA"
    ranks = f"r {p['r']}" + (f", {p['expert_r']} per routed expert" if p["expert_r"] else "")
    print(f"{p['model_type']}, {adapter} {ranks}; {p['nodes']} x {p['gpus']} GPUs of {p['gpu_memory_gib']:g} GiB", file=file)
    batch = f"{p['nodes'] * p['gpus']} GPUs x {p['micro_batch']} x {p['accumulation']} micro-batches = {p['global_batch_size']}"
    print(f"A step: {batch} packs of {p['max_seq_length']:,} tokens\n", file=file)
    kinds = sorted(counts["base"], key=counts["base"].get, reverse=True)
    rows = [("", "base", "trainable"), *((k, f"{counts['base'][k]:,}", f"{counts['adapter'].get(k, 0):,}") for k in kinds)]
    rows += [("total", f"{counts['total']:,}", f"{counts['trainable']:,}")]
    rows += [("active for a token", f"{counts['active']:,}", f"{counts['active_adapter']:,}")]
    print(_table(rows, "Parameters"), end="\n\n", file=file)

    rows = [(name, f"{value / GIB:.2f}") for name, value in plan["gpu_bytes"].items()]
    rows += [("peak", f"{plan['peak_bytes'] / GIB:.2f}"), (f"limit ({plan['reserve_gib']:g} reserved)", f"{plan['limit_bytes'] / GIB:.2f}")]
    print(_table(rows, f"Memory of one GPU, GiB, with {trainer_flags(plan)}"), end="\n\n", file=file)
    for title, key in ("Host memory of one node, GiB", "host_bytes"), ("Disk, GiB", "disk_bytes"):
        print(_table([(name, f"{value / GIB:.1f}") for name, value in plan[key].items()], title), end="\n\n", file=file)

    extra = plan["recompute_per_token"] / plan["flops_per_token"]
    print(f"FLOPs a token: {plan['flops_per_token'] / 1e9:.2f} G useful, and {extra:.0%} more recomputed", file=file)


def print_options(plans, launched=None, file=None):
    """Print what of `options` fits, with the trainer's flags for each; the best is marked, and the plan `launched`."""
    rows = [("", "GiB", "fits", "recompute", "flags", "")]
    for p in plans:
        extra = f"+{p['recompute_per_token'] / p['flops_per_token']:.0%}"
        marks = ["best"] * (p is plans[0] and p["fits"]) + ["as launched"] * (p == launched)
        memory, fits = f"{p['peak_bytes'] / GIB:.1f}", "yes" if p["fits"] else "no"
        name = p["activation_policy"] + (f", experts {p['memory_mode']}" if p["kind"] == "moe" else "")
        rows.append((name, memory, fits, extra, trainer_flags(p), f"<- {', '.join(marks)}" if marks else ""))
    print(_table(rows, "Activation policy, memory mode and micro-batch, best first", left=(0, 4, 5)), file=file)


# ----------------------------------------------------------------------------------------------------------------------------------
# Command
# ----------------------------------------------------------------------------------------------------------------------------------

READING_SECONDS = 30  # a launcher only sets variables before it starts a trainer
STAND_INS = ("python", "python3", "torchrun", "deepspeed", "accelerate", "srun")


@dataclass
class PlanArguments:
    """Flags of plan.py itself; any other flag is one of the trainer's and overrides the launcher's."""

    gpus: int | None = field(default=None, metadata={"help": "GPUs of one node; default: what the launcher starts"})
    nodes: int | None = field(default=None, metadata={"help": "nodes; default: what the launcher starts"})
    gpu_memory: float = field(default=80.0, metadata={"help": "GiB of one GPU"})
    reserve: float = field(default=4.0, metadata={"help": "GiB of every GPU left to CUDA, NCCL and fragmentation"})
    device: str = field(default="NVIDIA H100 80GB HBM3", metadata={"help": "device whose measured rates in results/ give the time"})
    config: str | None = field(default=None, metadata={"help": "config.json or directory to read instead of the launcher's model"})
    dataset_tokens: float = field(default=DATASET_TOKENS, metadata={"help": "tokens of one epoch; default: Malaysian-Instructions'"})
    document_length: float = field(default=1900.0, metadata={"help": "mean length of the document that a token is in"})
    gpu_partition: int | None = field(default=None, metadata={"help": "evaluation: GPUs of one vLLM engine; default: as few as hold it"})
    results: str = field(default="results", metadata={"help": "directory of measured rates"})


def read_launcher(launcher, overrides=()):
    """Which trainer a launcher starts, with which flags: {"script", "flags": {name: value}, "gpus", "nodes"}.

    bash itself reads the launcher: it runs with stand-ins for python, torchrun and the like, which only write down their arguments, so
    arrays, variables and defaults come out as in a real run and nothing is trained. `overrides` follow the launcher as "$@".
    gpus and nodes are None where the launcher leaves them to the machine ("auto"). Raises ValueError if the launcher fails or starts no
    train_dense.py or train_moe.py.
    """
    if not Path(launcher).is_file():
        raise ValueError(f"{launcher}: no such launcher")
    with tempfile.TemporaryDirectory() as folder:
        record, functions = Path(folder, "record"), Path(folder, "functions.sh")
        record.touch()
        # The functions win over a launcher's own `source .venv/bin/activate`; the files over `exec` and `env`.
        functions.write_text("".join(f'{name}() {{ "{folder}/{name}" "$@"; }}\n' for name in STAND_INS))
        for name in STAND_INS:
            stand_in = Path(folder, name)
            stand_in.write_text(f"#!/bin/sh\nprintf '%s\\0' {name} \"$@\" >> {record}\nprintf '\\n\\0' >> {record}\n")
            stand_in.chmod(0o755)
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "BASH_ENV": str(functions)}
        command = ["bash", str(launcher), *overrides]
        try:
            run = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=READING_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{launcher}: still busy after {READING_SECONDS} s, though every trainer in it was replaced") from None
        if run.returncode:
            raise ValueError(f"{launcher}: bash stopped with {run.returncode}: {run.stderr.strip()[-300:]}")
        calls = [call.split("\0")[:-1] for call in record.read_text().split("\n\0") if call]
    for call in reversed(calls):
        script = next((i for i, word in enumerate(call) if Path(word).name in ("train_dense.py", "train_moe.py")), None)
        if script is not None:
            starter, flags = _flags(call[1:script]), _flags(call[script + 1 :])
            gpus, nodes = starter.get("nproc_per_node", starter.get("num_gpus", "1")), starter.get("nnodes", "1")
            counts = {"gpus": int(gpus) if gpus.isdecimal() else None, "nodes": int(nodes) if nodes.isdecimal() else None}
            return {"script": Path(call[script]).name, "flags": flags, **counts}
    raise ValueError(f"{launcher}: starts neither train_dense.py nor train_moe.py")


def _flags(words):
    """{"name": "value"} of `--name value`, `--name=value` and bare `--name` ("True"); the last of several wins."""
    flags, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            flags[name] = value or "True"
        elif name:
            flags[name] = word
    return flags


def load_config(name, revision=None):
    """The transformers config of a hub id, a directory or a config.json file. Raises ValueError, in one line, if there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except OSError as error:
        raise ValueError(f"{name}: no config.json found there ({str(error).splitlines()[0]})") from error


def check_trainer(config, kind):
    """Raise ValueError if a model of this transformers config is not one for train_dense.py ("dense") or train_moe.py ("moe").

    The dense trainer would leave routed experts out without a word.
    """
    if (kind == "moe") != any(m.kind == "expert" for m in architecture(config).matrices):
        other = "train_dense.py" if kind == "moe" else "train_moe.py"
        raise ValueError(f"{config.model_type} has {'no ' * (kind == 'moe')}routed experts: train it with {other}")


# What the trainers do unless told otherwise; whatever else `options` varies, they choose by `settle`.
TRAINER_DEFAULTS = {"dense": {"activation_policy": "full", "micro_batch": 1}, "moe": {"shard_nodes": 1}}

# The trainers' flags that a plan depends on: their type, and plan_run's name for each (None: used elsewhere).
PLAN_FLAGS = {
    "r": (int, "r"),
    "lora_r": (int, "r"),
    "expert_r": (int, "expert_r"),
    "use_dora": (bool, "use_dora"),
    "max_seq_length": (int, "max_seq_length"),
    "global_batch_size": (int, "global_batch_size"),
    "per_device_train_batch_size": (int, "micro_batch"),
    "gradient_checkpointing": (bool, "activation_policy"),
    "activations": (str, "activation_policy"),
    "memory_mode": (str, "memory_mode"),
    "reduce_every_micro_batch": (bool, "reduce_every_micro_batch"),
    "cpu_offload": (bool, "cpu_offload"),
    "shard_nodes": (int, "shard_nodes"),
    "num_train_epochs": (float, None),
    "model_name_or_path": (str, None),
}


def plan_flags(flags):
    """plan_run's arguments from a trainer's flags (strings by name). Raises ValueError for a value that isn't of the flag's type."""
    if "target_modules" in flags:
        raise ValueError("--target_modules: plan.py only knows adapters on every linear layer")
    arguments = {}
    for flag, (kind, name) in PLAN_FLAGS.items():
        if flag not in flags or name is None:
            continue
        text = flags[flag]
        if (flag, text) == ("activations", "auto"):
            continue
        truth = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(text.lower())
        if (kind is int and not text.isdecimal()) or (kind is bool and truth is None):
            raise ValueError(f"--{flag} {text}: expected {'an integer' if kind is int else 'True or False'}")
        arguments[name] = truth if kind is bool else kind(text)
    if "gradient_checkpointing" in flags:
        arguments["activation_policy"] = "full" if arguments["activation_policy"] else "none"
    return arguments


def plan_launcher(arguments, launcher, overrides=()):
    """(plan as launched, every way to run best first, config, model name, epochs) of a launcher with `overrides`, the trainer's flags
    behind it. Raises ValueError for flags that nobody knows.
    """
    own = read_launcher(launcher)
    for flag in _flags(overrides).keys() - own["flags"].keys() - PLAN_FLAGS.keys() - {"target_modules"}:
        raise ValueError(f"--{flag}: neither a flag of plan.py nor one that changes a plan")
    reading = read_launcher(launcher, overrides) if overrides else own
    gpus, nodes = arguments.gpus or reading["gpus"], arguments.nodes or reading["nodes"]
    if gpus is None or nodes is None:
        raise ValueError(f"{launcher}: leaves the number of GPUs or nodes to the machine; pass --gpus and --nodes")
    model = reading["flags"].get("model_name_or_path", "")
    try:
        config = load_config(arguments.config or model)
    except ValueError as error:
        raise ValueError(f"{error}; pass one with --config FILE") from None
    kind = "moe" if reading["script"] == "train_moe.py" else "dense"
    wanted = plan_flags(reading["flags"])
    way = {
        name: wanted.pop(name) for name in ("activation_policy", "micro_batch", "reduce_every_micro_batch", "shard_nodes") if name in wanted
    }
    wanted |= dict(
        kind=kind,
        zero3="deepspeed" in reading["flags"],
        gpus=gpus,
        nodes=nodes,
        gpu_memory_gib=arguments.gpu_memory,
        reserve_gib=arguments.reserve,
        document_length=arguments.document_length,
    )
    epochs = float(reading["flags"].get("num_train_epochs", 3))
    launched = options(config, **wanted, **TRAINER_DEFAULTS[kind] | way)[0]
    return launched, options(config, **wanted), config, model, epochs


def print_run(arguments, plan, config, model, epochs):
    """Print tokens, steps, time and the evaluation of a plan."""
    run = schedule(arguments.dataset_tokens, plan["max_seq_length"], plan["global_batch_size"], epochs)
    print(
        f"Run: {run['tokens_per_epoch']:,} tokens an epoch = {run['packs']:,} packs = {run['steps_per_epoch']:,} steps; "
        f"{epochs:g} epochs = {run['steps']:,} steps, {plan['flops_per_token'] * run['tokens_per_epoch'] * epochs:.3g} useful FLOPs"
    )
    hours = expected_time(plan, config, model, run["tokens_per_epoch"] * epochs, arguments.device, read_results(arguments.results))
    if hours is None:
        print(f"Time: nothing measured yet in {arguments.results}/ for this model on {arguments.device}")
    elif hours["high"] is None:
        print(f"Time: more than {hours['low']:.1f} hours, the experts blocks alone ({hours['source']})")
    else:
        print(f"Time: {hours['low']:.1f} to {hours['high']:.1f} hours ({hours['source']})")
    partitions = [arguments.gpu_partition] if arguments.gpu_partition else [n for n in (1, 2, 4, 8) if config.num_attention_heads % n == 0]
    engines = [plan_evaluation(config, gpu_partition=n, gpu_memory_gib=arguments.gpu_memory) for n in partitions]
    print_evaluation(next((vllm for vllm in engines if vllm["fits"]), engines[-1]))


def print_evaluation(vllm):
    """Print a plan of `plan_evaluation`."""
    answers = f"{vllm['sequences']:.0f} answers of {vllm['max_model_len']:,} at once"
    cache = f"KV cache {vllm['cache_bytes'] / GIB:.1f} GiB = {vllm['cache_tokens']:,} tokens, {answers}"
    if not vllm["fits"]:
        cache = "no room for a KV cache: raise --gpu_partition"
    print(f"Evaluation, vLLM, GPUs an engine: {vllm['gpu_partition']}; weights {vllm['weights_bytes'] / GIB:.1f} GiB a GPU; {cache}")


def main():
    from transformers import HfArgumentParser

    parser = HfArgumentParser(PlanArguments, description="What a launcher's run needs, before it starts.", allow_abbrev=False)
    parser.add_argument("launcher", help="a launcher of this repository, such as ds3-qwen3-32b-lora-256.sh")
    arguments, positional, overrides = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    try:
        launched, plans, config, model, epochs = plan_launcher(arguments, positional.launcher, overrides)
        print_plan(launched)
        print()
        print_options(plans, launched)
        print()
        print_run(arguments, launched, config, model, epochs)
        if not launched["fits"] and plans[0]["fits"]:
            print(f"\nThis launch doesn't fit; with {trainer_flags(plans[0])} it does.")
        check_fits(launched)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
