"""A training step on a few layers of each real mixture of experts: checked, then timed; weights are random, made on the
device.

    python3 benchmarks/bench_train_moe.py [--models qwen3-30b-a3b,glm-4.5-air] [--layers 4] [--tokens 16384] [--steps 5]
    torchrun --nproc_per_node 2 -- benchmarks/bench_train_moe.py ...      the same, sharded
    python3 benchmarks/bench_train_moe.py --models tiny --tokens 256   anywhere, on a CPU too; leaves no record

Per model: (1) two layers at 2,048 tokens: loss and every kind of gradient by the kernels against fp32, with PyTorch's
own bf16 error as the measure; a failed check ends the program. (2) full packs of documents with log-normal lengths:
seconds a pack and an optimiser step, tokens/s, MFU, peak memory. (3) milliseconds of each part, forward and backward
apart from the rest. Every model runs in its own process, so that one that does not fit leaves the others be. Prints a
table and one JSON line; appends a record per model to results/train_moe.json. The figures are those of the slice: head,
loss and embedding weigh more in it than in the whole model.
"""

import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 (the repository root must be on the path first)
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402

import fused_moe_lora  # noqa: E402
import multipack  # noqa: E402
import train_moe  # noqa: E402
from malaysian_sft.account import (  # noqa: E402
    mfu,  # noqa: E402
    train_flops,  # noqa: E402
)
from malaysian_sft.attention import attention_backend  # noqa: E402
from malaysian_sft.fp8 import FP8, SCALE  # noqa: E402
from malaysian_sft.load_base import (  # noqa: E402
    compute_buffers,  # noqa: E402
    reset_adapter,  # noqa: E402
)
from malaysian_sft.lora import local_tensor  # noqa: E402
from malaysian_sft.moe_model import (  # noqa: E402
    SummedCrossEntropy,  # noqa: E402
    allocate,  # noqa: E402
    build_model,  # noqa: E402
    make_mesh,  # noqa: E402
    shard,  # noqa: E402
)
from malaysian_sft.run import (  # noqa: E402
    git_commit,  # noqa: E402
    setup_distributed,  # noqa: E402
)

QWEN3 = dict(
    vocab_size=151936, head_dim=128, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True
)
QWEN3 |= dict(
    rms_norm_eps=1e-6,
    max_position_embeddings=262144,
    tie_word_embeddings=False,
    mlp_only_layers=[],
    decoder_sparse_step=1,
)
GLM = dict(
    vocab_size=151552,
    head_dim=128,
    num_key_value_heads=8,
    n_routed_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
)
GLM |= dict(
    n_shared_experts=1,
    first_k_dense_replace=1,
    attention_bias=True,
    use_qk_norm=False,
    rms_norm_eps=1e-5,
    num_mtp_layers=0,
)
TINY = dict(
    vocab_size=320, hidden_size=64, moe_intermediate_size=32, num_attention_heads=4, head_dim=16, num_key_value_heads=2
)
MODELS = {  # from the published config.json files, but for the number of layers
    "qwen3-30b-a3b": (
        "Qwen3MoeConfig",
        QWEN3 | dict(hidden_size=2048, moe_intermediate_size=768, num_attention_heads=32),
    ),
    "qwen3-235b-a22b": (
        "Qwen3MoeConfig",
        QWEN3 | dict(hidden_size=4096, moe_intermediate_size=1536, num_attention_heads=64),
    ),
    "glm-4.5-air": (
        "Glm4MoeConfig",
        GLM | dict(hidden_size=4096, intermediate_size=10944, moe_intermediate_size=1408, num_attention_heads=96),
    ),
    "tiny": ("Qwen3MoeConfig", QWEN3 | TINY | dict(num_experts=8, num_experts_per_tok=2)),
}

LAYERS = {"qwen3-30b-a3b": 48, "qwen3-235b-a22b": 94, "glm-4.5-air": 46, "tiny": 2}  # of the published models


@dataclass
class Arguments:
    models: str = field(default="qwen3-30b-a3b,glm-4.5-air,qwen3-235b-a22b", metadata={"help": "comma-separated"})
    layers: int = field(default=4, metadata={"help": "decoder layers of the slice"})
    tokens: int = field(default=16384, metadata={"help": "of a pack"})
    steps: int = field(default=5, metadata={"help": "timed packs, after two that are not"})
    activations: str = field(default="none", metadata={"help": "none, selective or full"})
    memory_mode: str | None = field(default=None, metadata={"help": "fast or frugal; default as train_moe.py's"})
    use_dora: bool = field(default=False, metadata={"help": "DoRA in place of LoRA"})
    r: int = field(default=256, metadata={"help": "rank"})
    fast_parts: bool = field(default=True, metadata={"help": "own kernels for norms, rotary and the attention half"})
    check: bool = field(default=True, metadata={"help": "compare with fp32 first"})
    parts: bool = field(default=True, metadata={"help": "time the parts, on one GPU"})
    out: str = field(default=str(ROOT / "results" / "train_moe.json"), metadata={"help": "where records are appended"})


# ----------------------------------------------------------------------------------------------------------------------
# A slice of a model, and packs
# ----------------------------------------------------------------------------------------------------------------------


def make_config(name, layers):
    class_name, facts = MODELS[name]
    return getattr(transformers, class_name)(**facts, num_hidden_layers=layers, pad_token_id=None)


def build(name, layers, args, dtype, device, mesh=None):
    """(config, ModelWithLoss) with `layers` layers, random weights of the usual size, adapters with a B that is not
    zero."""
    config = make_config(name, layers)
    flags = ["--model_name_or_path", name, "--dtype", dtype, "--activations", args.activations, "--r", str(args.r)]
    flags += ["--use_dora", str(args.use_dora)]
    run, _, lora_args = train_moe.parse(flags)
    run.memory_mode = args.memory_mode
    run.fast_parts = args.fast_parts
    return config, build_run(config, run, lora_args, device, mesh)


def build_run(config, run, lora_args, device, mesh=None):
    """The trainer's model of `config` under its arguments, with weights and adapters as `build` has them."""
    _, model = build_model(config, run, lora_args)
    ring = shard(model, mesh, run, lora_args.use_dora) if mesh is not None else None
    allocate(model.causal_lm, ring, device)
    compute_buffers(model.causal_lm)
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            fill(parameter_name, local_tensor(p))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.zero_()
        if ring is not None:
            for parameter_name, p in model.named_parameters():
                if id(p) in ring.pieces:
                    fill(parameter_name, ring.pieces[id(p)].shard)
        reset_adapter(model.causal_lm, 0, ring)
        for parameter_name, p in model.named_parameters():
            if "lora_B" in parameter_name:
                local_tensor(p).normal_(0.0, 0.01)
    return model


def shortened(config, layers):
    """`config` with its first so many decoder layers."""
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def fill(name, tensor):
    """Random weights of a standard deviation of 0.02, in FP8 by values around 1 and scales of 0.02; ones in norms."""
    if "norm" in name:
        tensor.fill_(1.0)
    elif name.endswith(SCALE):
        tensor.fill_(0.02)
    elif tensor.dtype == FP8:
        for part in tensor.view(len(tensor), -1).split(8):  # a stack of experts at once would take twice its memory
            part.copy_(torch.randn(part.shape, device=part.device))
    else:
        tensor.normal_(0.0, 0.02)


def random_documents(places, vocabulary, generator):
    """(documents as multipack's, lengths): a pack of log-normal documents, as full as best fit leaves it, four of five
    tokens supervised.

    Like real packs, no two have the same number of tokens; the median document is a fortieth of a pack.
    """
    tokens = places - int(torch.randint(0, max(1, places // 100), (), generator=generator))
    lengths = []
    while sum(lengths) < tokens:
        draw = torch.empty(1).log_normal_(math.log(tokens / 40), 1.0, generator=generator).item()
        lengths.append(min(max(int(draw), 2), tokens - sum(lengths)))
    pack = []
    for n in lengths:
        ids = torch.randint(0, vocabulary, (n,), generator=generator)
        labels = ids.clone()
        labels[: max(1, n // 5)] = multipack.IGNORE
        pack.append({"input_ids": ids, "labels": labels})
    return pack, lengths


def random_pack(places, vocabulary, generator, device):
    """(batch on the device, lengths) of `random_documents`."""
    pack, lengths = random_documents(places, vocabulary, generator)
    return train_moe.to_device(train_moe.to_batch(pack), device), lengths


def loss_and_backward(model, batch):
    loss, _ = model(batch)
    loss = loss / max(1, len(batch["targets"]))
    loss.backward()
    if model.ring is not None:
        model.ring.adapters.finish()
    return loss


# ----------------------------------------------------------------------------------------------------------------------
# Check
# ----------------------------------------------------------------------------------------------------------------------


def reference_forward(self, hidden_states, top_k_index, top_k_weights):
    """FusedMoELoRA.forward by moe_lora_reference, on any device."""
    routed = hidden_states, top_k_index, top_k_weights
    return fused_moe_lora.moe_lora_reference(*routed, self.gate_up_proj, self.down_proj, *self.adapters(), self.scaling)


def gradients(model, batch, reference):
    """(loss, {kind of adapter parameter: all its gradients in fp32, in one vector}) of one batch."""
    forward = reference_forward if reference else fused_moe_lora.FusedMoELoRA.forward
    model.forget_norms()
    with mock.patch.object(fused_moe_lora.FusedMoELoRA, "forward", forward):
        loss = loss_and_backward(model, batch).item()
    kinds = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = ".".join(
                part for part in name.split(".")[-4:] if part not in ("default", "weight", "mlp", "self_attn")
            )
            kinds.setdefault(kind, []).append(p.grad.float().flatten())
            p.grad = None
    return loss, {kind: torch.cat(parts) for kind, parts in kinds.items()}


def check(name, args, device):
    """Exit unless the kernels' gradients are as near to fp32 as PyTorch's bf16 ones; returns the largest relative
    error."""
    config, model = build(name, 2, args, "bfloat16", device)
    batch, _ = random_pack(min(args.tokens, 2048), config.vocab_size, torch.Generator().manual_seed(1), device)
    kernel = gradients(model, batch, reference=False)
    torch_bf16 = gradients(model, batch, reference=True)
    _, wide = build(name, 2, args, "float32", device)
    with torch.no_grad():
        for p, q in zip(wide.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    del model
    truth = gradients(wide, batch, reference=True)

    def errors(found):
        relative = {kind: ((g - truth[1][kind]).norm() / truth[1][kind].norm()).item() for kind, g in found[1].items()}
        return {"loss": abs(found[0] - truth[0]) / truth[0], **relative}

    ours, theirs = errors(kernel), errors(torch_bf16)
    say(
        f"{name}: relative error against fp32, {len(batch['input_ids'][0])} tokens, 2 layers",
        f"{'kernels':>42}{'PyTorch bf16':>14}",
    )
    for kind, error in ours.items():
        verdict = "" if error <= 1.25 * theirs[kind] + 2e-3 else "   too large"
        say(f"    {kind:<60}{error:>12.2e}{theirs[kind]:>14.2e}{verdict}")
    if any(not error <= 1.25 * theirs[kind] + 2e-3 for kind, error in ours.items()):
        sys.exit(f"error: {name}: the kernels' gradients are further from fp32 than PyTorch's")
    return max(ours.values())


# ----------------------------------------------------------------------------------------------------------------------
# Time
# ----------------------------------------------------------------------------------------------------------------------


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(function, device, repeats, before=None):
    """Median wall time of `function` in ms, each call waited for, after two calls that are not timed; `before` runs
    ahead of each."""
    times = []
    for _ in range(repeats + 2):
        if before is not None:
            before()
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def time_steps(model, config, args, device):
    """Packs forward and backward back to back, then optimiser steps; returns a dict of measurements."""
    generator = torch.Generator().manual_seed(2 + dist.get_rank())
    packs = [random_pack(args.tokens, config.vocab_size, generator, device) for _ in range(args.steps + 2)]
    run = train_moe.parse(["--model_name_or_path", "slice"])[0]
    optimizer = train_moe.make_optimizer(model, run)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def update():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()

    for batch, _ in packs[:2]:  # compiles, allocates
        loss_and_backward(model, batch)
        update()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model.forget_norms()  # DoRA's row norms are computed once a step
    times = []
    for batch, _ in packs[2:]:  # as in a step of several micro-batches
        synchronize(device)
        started = time.perf_counter()
        loss_and_backward(model, batch)
        synchronize(device)
        times.append(time.perf_counter() - started)
    seconds = statistics.median_high(times)
    update_ms = milliseconds(update, device, 3)
    middle = sorted(range(len(times)), key=times.__getitem__)[len(times) // 2]  # the pack whose time is the median
    lengths = packs[2 + middle][1]
    tokens, squares = sum(lengths), sum(n * n for n in lengths)
    flops = train_flops(config, tokens, squares, args.r, use_dora=args.use_dora)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    utilisation = mfu(flops, seconds, 1, name)
    return {
        "pack_ms": round(1e3 * seconds, 2),
        "pack_ms_fastest_slowest": [round(1e3 * min(times), 2), round(1e3 * max(times), 2)],
        "optimizer_ms": round(update_ms, 2),
        "tokens_per_second_per_gpu": round(tokens / seconds, 1),
        "mfu": None if utilisation is None else round(utilisation, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None,
    }


def time_parts(model, config, args, device):
    """{part: ms, forward and backward} of the last layer's parts and of the head, each with its own random input."""
    batch, _ = random_pack(args.tokens, config.vocab_size, torch.Generator().manual_seed(1), device)
    tokens = batch["input_ids"].shape[1]
    causal_lm = model.causal_lm
    layer = causal_lm.base_model.layers[-1]
    dtype = layer.mlp.experts.gate_up_proj.dtype

    def hidden():
        return torch.randn(1, tokens, config.hidden_size, dtype=dtype, device=device, requires_grad=True)

    x, flat = hidden(), hidden()[0].detach().requires_grad_()
    with torch.no_grad():
        _, weights, index = layer.mlp.gate(flat)
        rotary = causal_lm.base_model.rotary_emb(x, position_ids=batch["position_ids"])
    weights = weights.detach().requires_grad_()
    attention_kwargs = {key: batch[key] for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
    hidden_at = batch["predicting"]

    def backward(out):
        out.backward(torch.ones_like(out))

    def head():
        selected, head_weight = flat.index_select(0, hidden_at), causal_lm.get_output_embeddings().weight
        SummedCrossEntropy.apply(selected, head_weight, batch["targets"], model.chunk_loss).backward()

    attention = layer.self_attn
    parts = {
        "experts": lambda: backward(layer.mlp.experts(flat, index, weights)),
        "moe block (router, experts, shared)": lambda: backward(layer.mlp(x)),
        "attention module (projections, norms, rotary, kernel)": lambda: backward(
            attention(x, position_embeddings=rotary, attention_mask=None, **attention_kwargs)[0]
        ),
        "attention projections": lambda: projections(attention, x, backward),
        "two layer norms": lambda: backward(layer.post_attention_layernorm(layer.input_layernorm(x))),
        "whole layer": lambda: backward(layer(x, position_embeddings=rotary, attention_mask=None, **attention_kwargs)),
        "head and loss": head,
    }

    def forget_gradients():  # or they would be added up, which is no part of a layer
        for tensor in (x, flat, weights, *model.parameters()):
            tensor.grad = None

    return {
        part: round(milliseconds(function, device, args.steps, forget_gradients), 3) for part, function in parts.items()
    }


def projections(attention, x, backward):
    queries = attention.q_proj(x)
    for out in (queries, attention.k_proj(x), attention.v_proj(x), attention.o_proj(queries.detach().requires_grad_())):
        backward(out)


# ----------------------------------------------------------------------------------------------------------------------
# The record
# ----------------------------------------------------------------------------------------------------------------------


def say(*words):
    if dist.get_rank() == 0:
        print(*words, flush=True)


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(name, args):
    """One model, in this process."""
    device = setup_distributed()
    world = dist.get_world_size()
    record = {
        "model": name,
        "adapter": "dora" if args.use_dora else "lora",
        "activations": args.activations,
        "layers": args.layers,
        "tokens": args.tokens,
        "r": args.r,
        "gpus": world,
        "sharded": world > 1,
        "attention": attention_backend(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": {
            package: version(package) for package in ("torch", "triton", "transformers", "peft", "flash-attn-4")
        },
        "commit": git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    record["mode"] = args.memory_mode or ("frugal" if args.activations == "selective" else "fast")
    if args.check and world == 1:
        record["worst_relative_error"] = check(name, args, device)
        gc.collect()  # modules and their hooks refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
    mesh = make_mesh(device, 1) if world > 1 else None
    config, model = build(name, args.layers, args, "bfloat16", device, mesh)
    record |= time_steps(model, config, args, device)
    if args.parts and world == 1:
        record["parts_ms"] = time_parts(model, config, args, device)
    for key, value in record.items():
        if not isinstance(value, dict):
            say(f"    {key:<56}{value}")
    for key, value in record.get("parts_ms", {}).items():
        say(f"    {key:<56}{value:>10.3f} ms")
    if dist.get_rank() == 0:
        if name != "tiny":
            path = Path(args.out)
            records = json.loads(path.read_text()) if path.exists() else []
            path.write_text(json.dumps([*records, record], indent=1) + "\n")
        print(json.dumps(record), flush=True)
    dist.destroy_process_group()


def main():
    args = transformers.HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    names = args.models.split(",")
    for name in names:
        if name not in MODELS:
            sys.exit(f"error: --models {name}: choose from {', '.join(MODELS)}")
    if len(names) == 1 or "RANK" in os.environ:
        for name in names:
            measure(name, args)
        return
    failed = []
    for name in names:
        flags = [*sys.argv[1:], "--models", name]
        if subprocess.run([sys.executable, __file__, *flags]).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
