"""Bytes: what a run keeps on a GPU, in host memory and on disk, term by term, from the model's config alone."""

import math

from malaysian_sft.account import GIB, architecture, dense_level
from malaysian_sft.fp8 import scale_shape


def experts_saved_bytes(tokens, top_k, hidden_size, intermediate_size, expert_r, mode, use_dora=False):
    """What a routed-experts block keeps for backward beyond its input and output, in bytes.

    Per routed row (tokens x top_k of them), in bf16: in fast mode gate and silu(gate) up, 2 x 2 intermediate_size
    bytes, the LoRA inner products of gate, up and down, 2 x 3 expert_r, and for DoRA the output before the magnitude, 2
    hidden_size; in both modes 16 bytes of indices and router weights. Frugal mode recomputes the rest.
    """
    kept = 0
    if mode == "fast":
        kept = 2 * intermediate_size + 3 * expert_r + hidden_size * use_dora
    return tokens * top_k * (2 * kept + 16)


def layer_saved_bytes(config, kind, matrices, tokens, policy, mode, r, expert_r, use_dora=False):
    """What one decoder layer (its `matrices`) keeps for backward over `tokens` tokens, in bytes; bf16 unless said
    otherwise.

    full       the layer's input, H a token.
    none       attention half (attention_half.py): input H, queries, keys and values before rotary, in mixtures also
               queries and keys after it, the attention output and its fp32 log-sum-exp per head, r for each LoRA inner
               product, its output H, of which the MLP half's normed input is made again; with DoRA o_proj's output, H.
               MLP half of a dense model (mlp_half.py): gate and up, 2 intermediate_size, and 3 r; with DoRA down's
               output, H. Dense or shared MLP of a mixture, transformers' own: silu(gate) and the product as well, and
               with DoRA every output before the magnitude. Routed experts: `experts_saved_bytes`, the router's fp32
               probabilities, and with DoRA a bf16 copy of the experts' adapter.
    selective  dense: as none, without gate and up. moe: the attention half is recomputed from its input, its normed
               output kept; the MLP half is kept as under none.
    """
    hidden = config.hidden_size
    dense = kind == "dense"
    attention, mlp, experts = 2 * hidden, (policy != "none" and not dense) * hidden, 0
    for m in matrices:
        inner, scaled, down = r * m.adapted, m.out_features * use_dora * m.adapted, "down_proj" in m.name
        if m.kind == "attention":
            last = m.name.endswith("o_proj.weight")
            attention += inner + (m.in_features + scaled if last else m.out_features)
            attention += m.out_features * (not dense and m.name.endswith(("q_proj.weight", "k_proj.weight")))
        elif m.kind in ("mlp", "shared_expert") and dense:
            mlp += inner + (scaled if down else m.out_features * (policy == "none"))
        elif m.kind in ("mlp", "shared_expert"):
            mlp += inner + scaled + (m.in_features if down else m.out_features)
            mlp += m.out_features * ("gate_proj" in m.name)
        elif m.kind == "router":
            mlp += 2 * m.out_features  # fp32
        elif m.kind == "expert":
            experts += 2 * use_dora * m.copies * expert_r * (m.out_features + m.in_features)
            if m.name.endswith("down_proj"):
                experts += experts_saved_bytes(
                    tokens, m.active, m.out_features, m.in_features, expert_r, mode, use_dora
                )
    if policy == "full":
        return tokens * 2 * hidden
    log_sum_exp = 4 * config.num_attention_heads
    kept_attention = 2 * attention + log_sum_exp if policy == "none" or dense else 2 * hidden
    return tokens * (kept_attention + 2 * mlp) + experts


def layer_working_bytes(config, matrices, tokens, mode, use_dora=False, in_fp8=False):
    """The most that one layer's forward or backward holds for a moment beyond what is kept, in bytes; bf16.

    Routed experts, per routed row: in the forward half of H, as the output is made from half of its columns at a time
    (with DoRA it is whole, and kept unless in frugal mode); in the backward intermediate_size, the gradient of
    silu(gate) up; in frugal mode also 2 intermediate_size, gate and silu(gate) up. In FP8, a byte a value: the forward
    multiplies silu(gate) up as such; the backward dout (with DoRA a row's own), then the gradients of gate and up,
    which are made while bf16's are read and are there beside a quarter of H, of the gradient of x. A dense or shared
    MLP: two of (tokens, intermediate_size): the product and the gradient of it, or in a mixture the LoRA's share of an
    output; with DoRA also the gradients of gate and up. And four of (tokens, H): the residual stream's gradient, the
    two norms', the attention's; in FP8 also the input, or its gradient, in FP8.
    """
    width = 0
    for m in matrices:
        if m.kind in ("mlp", "shared_expert") and "down_proj" in m.name:
            width = max(width, (4 if use_dora and m.kind == "mlp" else 2) * m.in_features)
        if m.kind == "expert" and m.name.endswith("down_proj"):
            hidden, frugal = m.out_features, mode == "frugal"
            forward, backward = (
                (hidden * frugal, m.in_features + hidden * frugal) if use_dora else (hidden // 2, m.in_features)
            )
            if in_fp8:
                forward += m.in_features // 2
                backward = max(backward + hidden // 2 * use_dora, 2 * m.in_features, m.in_features + hidden // 4)
            width = max(width, m.active * (max(forward, backward) + 2 * m.in_features * frugal))
    return 2 * tokens * (width + 4 * config.hidden_size) + tokens * config.hidden_size * in_fp8


def loss_bytes(config, kind, tokens):
    """Head and loss in bytes, at most, if every token is supervised; bf16.

    moe: the last layer's output, the final norm's, what of it is supervised and its gradient (tokens, H), and 1,024
    rows of logits and of their gradient. dense, Liger's fused linear cross entropy: the final norm's output and its
    gradient (tokens, H), and one chunk of logits, as many rows, a power of two, as take the room of the hidden states.
    """
    hidden, vocabulary = config.hidden_size, config.vocab_size
    if kind == "moe":
        return 2 * (4 * tokens * hidden + 2 * min(1024, tokens) * vocabulary)
    rows = math.ceil(tokens / math.ceil(vocabulary / hidden))
    return 2 * (2 * tokens * hidden + min(2 ** math.ceil(math.log2(rows)), tokens) * vocabulary)


def gpu_bytes(config, plan):
    """Bytes of one GPU by term at the moment when they are most; `plan` is plan_run's dict before the bytes are in it.

    That moment is in the backward of one of the layers, when it and all before it still keep their activations and the
    gradients of the one after it are being reduced, or in the loss. Which one is found by trying all; the terms are
    those of that moment alone.
    """
    layers = architecture(config).layers()
    layer_base = max(sum(map(weights, layer)) for layer in layers)
    layer_adapter = max(sum(adapter_size(m, plan) for m in layer) for layer in layers)
    terms = (dense_terms if plan["kind"] == "dense" else moe_terms)(config, plan, layer_base, layer_adapter)
    terms |= max(moments(config, plan, layers, layer_adapter), key=lambda moment: sum(moment.values()))
    return {name: int(value) for name, value in terms.items() if value}


def adapter_size(matrix, plan):
    """Parameters of A and B of one Matrix, all its copies."""
    rank = plan["expert_r"] if matrix.kind == "expert" else plan["r"]
    return matrix.copies * rank * (matrix.out_features + matrix.in_features) * matrix.adapted


def moments(config, plan, layers, layer_adapter):
    """The terms of each layer's backward, and of the loss.

    Reducing takes, in dense models, DeepSpeed's bucket twice (ds3.json's "auto", H x H); in mixtures a layer's gradient
    in bf16 (DoRA: in fp32) and two fp32 buffers, on a single GPU a layer's gradient in bf16 and in fp32, before it
    is added.
    """
    kind, policy, dora = plan["kind"], plan["activations"], plan["use_dora"]
    tokens = plan["micro_batch"] * plan["max_seq_length"]
    reduction = 2 * 4 * config.hidden_size**2 if kind == "dense" else (12 if dora else 10) * layer_adapter
    if kind == "moe" and plan["gpus"] * plan["nodes"] == 1:
        reduction = 6 * layer_adapter
    found, kept = [], 0
    for number, layer in enumerate(layers):
        mode = "frugal" if number < plan["frugal_layers"] else plan["memory_mode"]
        level = dense_level(policy, number, plan["frugal_layers"]) if kind == "dense" else policy
        own, everything = (
            layer_saved_bytes(config, kind, layer, tokens, p, mode, plan["r"], plan["expert_r"], dora)
            for p in (level, "none")
        )
        kept += own
        in_fp8 = plan["expert_arithmetic"] == "fp8"
        temporaries = everything - own + layer_working_bytes(config, layer, tokens, mode, dora, in_fp8)
        moment = {"kept activations": kept, "one layer's temporaries and recompute": temporaries}
        found.append(moment | {"gradient reduction": reduction if number < len(layers) - 1 else 0})
    return [*found, {"kept activations": kept, "head and loss": loss_bytes(config, kind, tokens)}]


def dense_terms(config, plan, layer_base, layer_adapter):
    """What lives throughout a step of train_dense.py: DeepSpeed ZeRO-3 over all ranks; without it, as on one.

    bf16 base and adapter, fp32 master adapter, gradient and two Adam moments are all sharded; whole parameters live up
    to DeepSpeed's stage3_max_live_parameters (1e9) or one layer, whichever is more, its prefetch (H x H), and the
    buffer that a layer is gathered into before it is copied to its parameters.
    """
    base, adapter = plan["parameters"]["total"], plan["parameters"]["trainable"]
    shard = plan["gpus"] * plan["nodes"] if plan["zero3"] else 1
    layer = layer_base + layer_adapter
    live = min(max(10**9, layer) + config.hidden_size**2, base + adapter) + layer
    return {
        "frozen base, bf16 shard": 2 * base / shard,
        "adapter, bf16 and fp32 master": 6 * adapter / shard,
        "adapter gradient, fp32": 4 * adapter / shard,
        "Adam moments, fp32": 8 * adapter / shard,
        "gathered parameters": 2 * live if shard > 1 else 0,
    }


def moe_terms(config, plan, layer_base, layer_adapter):
    """What lives throughout a step of train_moe.py.

    The layers' frozen weights are sharded over the GPUs of shard_nodes nodes, copies beyond, and two layers are whole
    at a time; without gather_base they are whole, as embedding and head are on every GPU. Adapter and Adam moments,
    fp32, are sharded; two layers' adapters are gathered in bf16 (DoRA: fp32), each from a cast of the own shard. Over
    several micro-batches the adapter's fp32 gradient stays whole until the last one, unless every micro-batch reduces
    it. On a single GPU nothing is gathered. Routed experts in FP8 (base_dtype) are sharded and gathered as such, and
    one layer's are widened to bf16; if they compute in FP8 they are transposed instead, but with DoRA also widened at
    times, in the same room, for the norms. transposed_layers of them are kept so.
    """
    counts, dora = plan["parameters"], plan["use_dora"]
    base, adapter = counts["total"], counts["trainable"]
    shard = plan["gpus"] * plan["shard_nodes"]
    alone, gathers = plan["gpus"] * plan["nodes"] == 1, plan["gather_base"] and shard > 1
    whole = plan["accumulation"] > 1 and not plan["reduce_every_micro_batch"] and not alone
    outside = sum(counts["base"].get(k, 0) for k in ("embedding", "head"))
    experts = [m for m in architecture(config).matrices if m.kind == "expert"]

    def in_fp8(matrices):
        """(bytes stored, weights) of those of them that are in FP8."""
        chosen = [m for m in matrices if m.kind == "expert" and plan["base_dtype"] == "fp8"]
        return fp8_bytes(chosen), sum(map(weights, chosen))

    stored, wide = in_fp8(experts)
    by_layer = [in_fp8(layer) for layer in architecture(config).layers()]
    layer_stored, layer_wide = max(by_layer)
    transposed = plan["expert_arithmetic"] == "fp8" and not dora
    return {
        "frozen base, bf16": 2 * (base - outside - wide) / (shard if gathers else 1),
        "frozen experts, FP8": stored / (shard if gathers else 1),
        "a layer's experts widened, bf16": 0 if transposed else 2 * layer_wide,
        "a layer's experts transposed, FP8": layer_wide * transposed,
        "experts kept transposed, FP8": sum(wide for _, wide in by_layer[: plan["transposed_layers"]]),
        "embedding and head": 2 * outside,
        "adapter, fp32": 4 * adapter / shard,
        "Adam moments, fp32": 8 * adapter / shard,
        "adapter gradient, fp32": 0 if whole else 4 * adapter / shard,
        "whole adapter gradient while accumulating": 4 * adapter if whole else 0,
        "two gathered layers": 2 * (2 * (layer_base - layer_wide) + layer_stored) if gathers else 0,
        "gathered adapters": 0 if alone else 2 * (4 if dora else 2) * (layer_adapter + layer_adapter // shard),
        "DoRA norms of experts, fp32": 8 * dora * sum(m.copies * m.out_features for m in experts),
    }


def weights(matrix):
    """Parameters of a Matrix, all its copies."""
    return matrix.copies * matrix.out_features * matrix.in_features


def fp8_bytes(matrices):
    """Bytes of matrices in FP8 (fp8.py): a byte a weight, 4 for the scale of each block."""
    blocks = sum(m.copies * math.prod(scale_shape(m.out_features, m.in_features)) for m in matrices)
    return sum(map(weights, matrices)) + 4 * blocks


def host_bytes(plan):
    """Host memory of one node by term, in bytes; 3 GiB a rank for Python, CUDA and the libraries.

    moe: a rank reads its shards in pieces, eight of 32 MiB at a time. dense: transformers maps the whole checkpoint
    into every rank, which is page cache, shared by the ranks of a node and given back under pressure. To save, rank 0
    gathers the adapter in fp32, and every rank copies its share of the resume state, adapter and Adam moments.
    """
    base, adapter = plan["parameters"]["total"], plan["parameters"]["trainable"]
    terms = {"processes": 3 * GIB * plan["gpus"], "whole adapter on rank 0 while saving, fp32": 4 * adapter}
    sharing = plan["shard_nodes"] if plan["kind"] == "moe" else plan["nodes"] if plan["zero3"] else 1
    terms["resume state while it is written, fp32"] = 12 * adapter // sharing
    if plan["kind"] == "dense":
        return {**terms, "checkpoint in page cache while loading (can be evicted)": 2 * base}
    terms["read buffers while loading"] = plan["gpus"] * 8 * 32 * 2**20
    return terms


def disk_bytes(plan):
    """Disk by term, in bytes: the newest two checkpoints keep their resume state, while a third is written."""
    base, adapter = plan["parameters"]["total"], plan["parameters"]["trainable"]
    state = "resume state of three checkpoints, fp32"
    return {"base checkpoint, bf16": 2 * base, "adapter of every checkpoint, fp32": 4 * adapter, state: 36 * adapter}


def need(plan):
    """The planned peak in words: "41.5 GiB of 80 a GPU planned"."""
    return f"{plan['peak_bytes'] / GIB:.1f} GiB of {plan['gpu_memory_gib']:.1f} a GPU planned"


def compare_peak(plan, measured_bytes):
    """One line for the log after the first step: the measured peak (torch.cuda.max_memory_allocated) beside the
    plan's."""
    predicted = plan["peak_bytes"]
    return (
        f"peak memory: measured {measured_bytes / GIB:.2f} GiB, planned {predicted / GIB:.2f} GiB"
        f" ({measured_bytes / predicted - 1:+.1%})"
    )
