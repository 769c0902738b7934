"""What a run needs and what it is worth, from the model's config alone: parameters, bytes, FLOPs, time; no weights, no
GPU.

    python3 plan.py fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh --gpus 8 --gpu_memory 80

prints the plan to stdout and exits 1 when nothing fits. The trainers call the same functions (`train_flops`, `mfu`,
`plan_run`, `settle`), so a log line's MFU, a trainer's choice of what to recompute and this command can't disagree.

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
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from malaysian_sft.account import GIB, architecture, attention_width, count_parameters, peak_flops
from malaysian_sft.base_model import load_config
from malaysian_sft.planning import GPU_MEMORY_GIB, check_fits, options, print_options, print_plan, trainer_flags


def plan_evaluation(config, *, gpu_partition, gpu_memory_gib=80.0, gpu_memory_utilization=0.92, max_model_len=8192):
    """vLLM's memory for one engine over `gpu_partition` GPUs: a dict of bytes per GPU.

    Weights in bf16, split evenly (adapters are merged while loading, so they take nothing); the KV cache's bytes a
    token (keys and values of every layer, heads split until each GPU has one); what gpu_memory_utilization leaves for
    the cache after 3 GiB for activations and CUDA graphs; and how many sequences of max_model_len tokens that is.
    Raises ValueError where the heads don't divide.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % gpu_partition:
        raise ValueError(
            f"--gpu_partition {gpu_partition}: {heads} attention heads can't be split over {gpu_partition} GPUs"
        )
    head_dim = attention_width(config) // heads
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


# Scicom-intl/Malaysian-Instructions, all five configs, by the original project's logs: 225,265 conversations in 10,080
# (GLM-4.5) to 10,316 (Llama-3.1) packs of 16,384 that were 86 % full.
DATASET_TOKENS = 144e6


def schedule(tokens, max_seq_length, global_batch_size, epochs, fill=0.995):
    """Packs and optimiser steps of a run over `tokens` real tokens an epoch, packs being filled to `fill` (multipack's
    goal)."""
    packs = math.ceil(tokens / (max_seq_length * fill))
    steps = math.ceil(packs / global_batch_size)
    return {
        "tokens_per_epoch": int(tokens),
        "packs": packs,
        "steps_per_epoch": steps,
        "steps": math.ceil(steps * epochs),
        "epochs": epochs,
    }


def read_results(directory):
    """Every record of results/*.json (each a list of flat objects), with its file's name under "source"."""
    records = []
    for path in sorted(Path(directory).glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, list):
            records += [{**record, "source": path.name} for record in content if isinstance(record, dict)]
    return records


def expected_time(plan, config, model, tokens, device, records):
    """Hours for `tokens` real tokens from measured rates: {"low", "high", "source"}, or None where nothing fitting was
    measured.

    First choice: training-step records (`mfu`) of this model, adapter and activation policy on this kind of device; the
    time is the run's useful FLOPs over mfu x peak x GPUs, from the best to the worst such record. Records of a few
    layers count too, and the source then says so: on fewer GPUs than planned, what gathering the weights costs is not
    in them. Else records of the experts block alone (`total_ms`, `tokens`): a lower bound, with "high" None. `model` is
    the hub id; a record's `model` must be part of it.
    """
    peak, gpus = peak_flops(device), plan["gpus"] * plan["nodes"]
    wanted = {
        "adapter": "dora" if plan["use_dora"] else "lora",
        "activations": plan["activation_policy"],
        "mode": plan["memory_mode"],
    }
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
    slices = {
        f"{r['layers']} of {layers} layers on {r.get('gpus', 1)} GPUs"
        for r in records
        if r.get("layers", layers) < layers
    }
    return ", ".join([*sorted(names), *sorted(slices)])


READING_SECONDS = 30  # a launcher only sets variables before it starts a trainer
STAND_INS = ("python", "python3", "torchrun", "deepspeed", "accelerate", "srun")


@dataclass
class PlanArguments:
    """Flags of plan.py itself; any other flag is one of the trainer's and overrides the launcher's."""

    gpus: int | None = field(default=None, metadata={"help": "GPUs of one node; default: what the launcher starts"})
    nodes: int | None = field(default=None, metadata={"help": "nodes; default: what the launcher starts"})
    gpu_memory: float = field(default=GPU_MEMORY_GIB, metadata={"help": "GiB of one GPU"})
    reserve: float = field(default=4.0, metadata={"help": "GiB of every GPU left to CUDA, NCCL and fragmentation"})
    device: str = field(
        default="NVIDIA H100 80GB HBM3", metadata={"help": "device whose measured rates in results/ give the time"}
    )
    config: str | None = field(
        default=None, metadata={"help": "config.json or directory to read instead of the launcher's model"}
    )
    dataset_tokens: float = field(
        default=DATASET_TOKENS, metadata={"help": "tokens of one epoch; default: Malaysian-Instructions'"}
    )
    document_length: float = field(default=1900.0, metadata={"help": "mean length of the document that a token is in"})
    gpu_partition: int | None = field(
        default=None, metadata={"help": "evaluation: GPUs of one vLLM engine; default: as few as hold it"}
    )
    results: str = field(default="results", metadata={"help": "directory of measured rates"})


def read_launcher(launcher, overrides=()):
    """Which trainer a launcher starts, with which flags: {"script", "flags": {name: value}, "gpus", "nodes"}.

    bash itself reads the launcher: it runs with stand-ins for python, torchrun and the like, which only write down
    their arguments, so arrays, variables and defaults come out as in a real run and nothing is trained. `overrides`
    follow the launcher as "$@". gpus and nodes are None where the launcher leaves them to the machine ("auto"). Raises
    ValueError if the launcher fails or starts no train_dense.py or train_moe.py.
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
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=READING_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{launcher}: still busy after {READING_SECONDS} s, though every trainer in it was replaced"
            ) from None
        if run.returncode:
            raise ValueError(f"{launcher}: bash stopped with {run.returncode}: {run.stderr.strip()[-300:]}")
        calls = [call.split("\0")[:-1] for call in record.read_text().split("\n\0") if call]
    for call in reversed(calls):
        script = next((i for i, word in enumerate(call) if Path(word).name in ("train_dense.py", "train_moe.py")), None)
        if script is not None:
            starter, flags = _flags(call[1:script]), _flags(call[script + 1 :])
            gpus, nodes = starter.get("nproc_per_node", starter.get("num_gpus", "1")), starter.get("nnodes", "1")
            counts = {
                "gpus": int(gpus) if gpus.isdecimal() else None,
                "nodes": int(nodes) if nodes.isdecimal() else None,
            }
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
    "shard_nodes": (int, "shard_nodes"),
    "num_train_epochs": (float, None),
    "model_name_or_path": (str, None),
}


def plan_flags(flags):
    """plan_run's arguments from a trainer's flags (strings by name). Raises ValueError for a value that isn't of the
    flag's type."""
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
    """(plan as launched, every way to run best first, config, model name, epochs) of a launcher with `overrides`, the
    trainer's flags behind it. Raises ValueError for flags that nobody knows.
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
        name: wanted.pop(name)
        for name in ("activation_policy", "micro_batch", "reduce_every_micro_batch", "shard_nodes")
        if name in wanted
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
        f"Run: {run['tokens_per_epoch']:,} tokens an epoch = {run['packs']:,} packs = {run['steps_per_epoch']:,} steps;"
        f" {epochs:g} epochs = {run['steps']:,} steps, {plan['flops_per_token'] * run['tokens_per_epoch'] * epochs:.3g}"
        " useful FLOPs"
    )
    hours = expected_time(
        plan, config, model, run["tokens_per_epoch"] * epochs, arguments.device, read_results(arguments.results)
    )
    if hours is None:
        print(f"Time: nothing measured yet in {arguments.results}/ for this model on {arguments.device}")
    elif hours["high"] is None:
        print(f"Time: more than {hours['low']:.1f} hours, the experts blocks alone ({hours['source']})")
    else:
        print(f"Time: {hours['low']:.1f} to {hours['high']:.1f} hours ({hours['source']})")
    partitions = (
        [arguments.gpu_partition]
        if arguments.gpu_partition
        else [n for n in (1, 2, 4, 8) if config.num_attention_heads % n == 0]
    )
    engines = [plan_evaluation(config, gpu_partition=n, gpu_memory_gib=arguments.gpu_memory) for n in partitions]
    print_evaluation(next((vllm for vllm in engines if vllm["fits"]), engines[-1]))


def print_evaluation(vllm):
    """Print a plan of `plan_evaluation`."""
    answers = f"{vllm['sequences']:.0f} answers of {vllm['max_model_len']:,} at once"
    cache = f"KV cache {vllm['cache_bytes'] / GIB:.1f} GiB = {vllm['cache_tokens']:,} tokens, {answers}"
    if not vllm["fits"]:
        cache = "no room for a KV cache: raise --gpu_partition"
    print(
        f"Evaluation, vLLM, GPUs an engine: {vllm['gpu_partition']}; weights {vllm['weights_bytes'] / GIB:.1f} GiB a"
        f" GPU; {cache}"
    )


def main():
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        PlanArguments, description="What a launcher's run needs, before it starts.", allow_abbrev=False
    )
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
