"""A run's plan as a page: parameters, memory, every way to run, time, evaluation. What --dry_run and plan.py print."""

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import torch

from malaysian_sft.account import GIB, attention_width, count_parameters, peak_flops
from malaysian_sft.base_model import load_config
from malaysian_sft.memory import need
from malaysian_sft.planning import GPU_MEMORY_GIB, check_fits, options, this_machine, trainer_flags
from malaysian_sft.tables import text_table
from malaysian_sft.timing import known_rates, lacks, step_time, work

# Scicom-intl/Malaysian-Instructions, all five configs, by the original project's logs: 225,265 conversations in 10,080
# (GLM-4.5) to 10,316 (Llama-3.1) packs of 16,384 that were 86 % full.
DATASET_TOKENS = 144e6


@dataclass
class PlanArguments:
    """What to plan for: plan.py's flags, handed to a trainer's --dry_run in the variable PLAN_ARGUMENTS."""

    gpus: int | None = field(
        default=None, metadata={"help": "GPUs of one node; default: NUM_GPUS, as the launcher starts"}
    )
    nodes: int | None = field(default=None, metadata={"help": "nodes; default: NNODES, as the launcher starts"})
    gpu_memory: float = field(default=GPU_MEMORY_GIB, metadata={"help": "GiB of one GPU"})
    reserve: float = field(default=4.0, metadata={"help": "GiB of every GPU left to CUDA, NCCL and fragmentation"})
    device: str | None = field(
        default=None,
        metadata={
            "help": "device whose rates give the time; default: this machine's, or an H100 or H200 by gpu_memory"
        },
    )
    attention: Literal["varlen_attn", "flash-attn-2", "flash-attn-4"] = field(
        default="varlen_attn",
        metadata={"help": "kernel of attention; varlen_attn is PyTorch's own"},
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
    results: str = field(
        default=str(Path(__file__).resolve().parent.parent / "results"),
        metadata={"help": "directory of measured rates; default: the repository's"},
    )


TRAINERS = ("train_dense.py", "train_moe.py")


def check_launcher(launcher):
    """Raise ValueError if the file `launcher` would do anything but plan when it is run with --dry_run."""
    if not Path(launcher).is_file():
        raise ValueError(f"{launcher}: no such launcher")
    try:
        text = Path(launcher).read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{launcher} is no launcher: not a text file") from None
    starts = [line for line in text.splitlines() if any(name in line for name in TRAINERS) and line.strip()[:1] != "#"]
    if not starts:
        raise ValueError(f"{launcher}: starts neither train_dense.py nor train_moe.py")
    if not all('"$@"' in line for line in starts):
        raise ValueError(f'{launcher}: does not hand its flags to the trainer ("$@" last), so --dry_run would train')


def launcher_number(variable, default):
    """The number in one of a launcher's environment variables, or `default`."""
    word = os.environ.get(variable) or str(default)
    if not (word.isdecimal() and int(word) > 0):
        raise ValueError(f"{variable} is {word!r}: expected a positive number")
    return int(word)


def dry_run(model, revision, epochs, **arguments):
    """Print the plan of the run that a trainer's flags would start; `arguments` are `planning.settle`'s.

    Planned for: what plan.py asks for (PlanArguments, in the variable PLAN_ARGUMENTS); else this machine's GPUs; else,
    without any, the launcher's NUM_GPUS and NNODES with GPUs of 80 GiB, and then nothing is refused. Raises ValueError,
    after printing, for a run that doesn't fit. plan.py --all plans itself, for several machines: for it the run is
    written as JSON to the file that the variable PLAN_RECORD names, and nothing else is done.
    """
    if int(os.environ.get("RANK", 0)):
        return
    if record := os.environ.get("PLAN_RECORD"):
        run = {"model": model, "revision": revision, "epochs": epochs, "arguments": arguments}
        Path(record).write_text(json.dumps(run))
        return
    asked = "PLAN_ARGUMENTS" in os.environ
    wanted = PlanArguments(**json.loads(os.environ.get("PLAN_ARGUMENTS", "{}")))
    machine = this_machine(whole=True)
    no_gpu = machine["gpu_memory_gib"] is None
    if asked or (no_gpu and "WORLD_SIZE" not in os.environ):
        machine["gpus"] = wanted.gpus or launcher_number("NUM_GPUS", machine["gpus"])
        machine["nodes"] = wanted.nodes or launcher_number("NNODES", 1)
    if asked or no_gpu:
        machine["gpu_memory_gib"] = wanted.gpu_memory
    try:
        config = load_config(wanted.config or model, None if wanted.config else revision)
    except ValueError as error:
        raise ValueError(f"{error}; to plan without it, pass plan.py --config FILE") from None
    fixed = {name: value for name, value in arguments.items() if value is not None}
    fixed |= dict(**machine, reserve_gib=wanted.reserve, document_length=wanted.document_length)
    launched = options(config, **fixed)[0]
    plans = options(config, **{name: value for name, value in fixed.items() if name not in FREE})
    if no_gpu and not asked:
        print(
            f"No GPU here: planned for {machine['gpus']} of {machine['gpu_memory_gib']:g} GiB; plan.py LAUNCHER plans"
            " for others.\n"
        )
    print_plan(launched)
    if launched["base_dtype"]:
        in_fp8 = ("base_dtype", "expert_arithmetic")
        plain = options(config, **{name: value for name, value in fixed.items() if name not in in_fp8})[0]
        fits = "fits" if plain["fits"] else "does not fit"
        print(f"\nWithout --base_dtype {launched['base_dtype']}: {need(plain)}, {trainer_flags(plain)}; it {fits}.")
    print()
    print_options(plans, launched)
    print()
    print_run(wanted, launched, config, epochs)
    if not launched["fits"] and plans[0]["fits"]:
        print(f"\nThis launch doesn't fit; with {trainer_flags(plans[0])} it does.")
    if asked or not no_gpu:
        check_fits(launched)


# What a trainer's flags may decide and print_options varies.
FREE = "activations memory_mode micro_batch reduce_every_micro_batch shard_nodes frugal_layers transposed_layers"
FREE = *FREE.split(), "gather_base"


def _table(title, rows, columns=("",)):
    """{name of a row: its cells} as text under a title: names on the left, cells right-aligned below `columns`."""
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(columns))
    return f"{title}\n{text_table(frame)}"


def _gib(terms, digits):
    return {name: [f"{value / GIB:.{digits}f}"] for name, value in terms.items()}


def print_plan(plan):
    """Print a plan of `plan_run`: parameters, memory by term, FLOPs, host memory, disk."""
    counts = plan["parameters"]
    p, adapter = plan, "DoRA" if plan["use_dora"] else "LoRA"
    ranks = f"r {p['r']}" + (f", {p['expert_r']} per routed expert" if p["expert_r"] else "")
    print(f"{p['model_type']}, {adapter} {ranks}; {p['nodes']} x {p['gpus']} GPUs of {p['gpu_memory_gib']:g} GiB")
    print(
        f"A step: {p['nodes'] * p['gpus']} GPUs x {p['micro_batch']} x {p['accumulation']} micro-batches ="
        f" {p['global_batch_size']} packs of {p['max_seq_length']:,} tokens\n"
    )
    kinds = sorted(counts["base"], key=counts["base"].get, reverse=True)
    rows = {kind: (counts["base"][kind], counts["adapter"].get(kind, 0)) for kind in kinds}
    rows["total"] = counts["total"], counts["trainable"]
    rows["active for a token"] = counts["active"], counts["active_adapter"]
    rows = {name: [f"{base:,}", f"{trainable:,}"] for name, (base, trainable) in rows.items()}
    print(_table("Parameters", rows, ("base", "trainable")), end="\n\n")

    terms = plan["gpu_bytes"] | {"peak": plan["peak_bytes"]}
    terms[f"limit ({plan['reserve_gib']:g} reserved)"] = plan["limit_bytes"]
    print(_table(f"Memory of one GPU, GiB, with {trainer_flags(plan)}", _gib(terms, 2)), end="\n\n")
    for title, key in ("Host memory of one node, GiB", "host_bytes"), ("Disk, GiB", "disk_bytes"):
        print(_table(title, _gib(plan[key], 1)), end="\n\n")

    extra = plan["recompute_per_token"] / plan["flops_per_token"]
    print(f"FLOPs a token: {plan['flops_per_token'] / 1e9:.2f} G useful, and {extra:.0%} more recomputed")
    if plan["stateful"]:
        print(
            f"Note: {', '.join(plan['stateful'])} carry a state along the sequence. Training is refused unless their"
            " kernels are installed and keep packed documents apart, which is checked when a run starts."
        )


def print_options(plans, launched):
    """Print every way to run of `options`, with the trainer's flags for each; the best is marked, and the plan
    `launched`."""
    rows = {}
    for p in plans:
        marks = ["best"] * (p is plans[0] and p["fits"]) + ["as launched"] * (p == launched)
        extra = f"+{p['recompute_per_token'] / p['flops_per_token']:.0%}"
        rows[trainer_flags(p)] = [
            f"{p['peak_bytes'] / GIB:.1f}", "yes" if p["fits"] else "no", extra, ", ".join(marks)
        ]  # fmt: skip
    print(_table("Ways to run, best first", rows, ("GiB", "fits", "recomputed", "")))


def plan_evaluation(config, *, gpu_partition, gpu_memory_gib=80.0, gpu_memory_utilization=0.92, max_model_len=8192):
    """vLLM's memory for one engine over `gpu_partition` GPUs: a dict of bytes per GPU.

    Weights in bf16, split evenly (adapters are merged while loading, so they take nothing); the KV cache's bytes a
    token (keys and values of every layer, heads split until each GPU has one); what gpu_memory_utilization leaves for
    the cache after 3 GiB for activations and CUDA graphs; and how many sequences of max_model_len tokens that is.
    Raises ValueError where the heads don't divide.
    """
    config = config.get_text_config()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % gpu_partition:
        raise ValueError(
            f"--gpu_partition {gpu_partition}: {heads} attention heads can't be split over {gpu_partition} GPUs"
        )
    head_dim = attention_width(config) // heads
    weights = 2 * count_parameters(config)["total"] / gpu_partition
    kv_token = 2 * 2 * config.num_hidden_layers * max(kv_heads // gpu_partition, 1) * head_dim
    if latent := getattr(config, "kv_lora_rank", None):  # DeepSeek keeps the latent, on every GPU
        kv_token = 2 * config.num_hidden_layers * (latent + config.qk_rope_head_dim)
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


def device_name(wanted, gpu_memory_gib):
    """The CUDA name of the device that is planned for: the one asked for, else this machine's if it has the memory that
    is planned for, else the usual one that has."""
    if wanted.device:
        return wanted.device
    if torch.cuda.is_available() and this_machine()["gpu_memory_gib"] == gpu_memory_gib:
        return torch.cuda.get_device_name()
    return "NVIDIA H200" if gpu_memory_gib > 100 else "NVIDIA H100 80GB HBM3"


def run_time(config, plan, run, wanted):
    """The time of a plan: `timing.step_time`'s dict with "hours" of the run (a `schedule`) and of an epoch, their
    "hours_low" and "hours_high", "tokens_per_second" of a GPU, "mfu", "source"; None for a device without its
    rates."""
    device = device_name(wanted, plan["gpu_memory_gib"])
    rates = known_rates(device, read_results(wanted.results))
    done = work(config, plan)
    if rates is None or lacks(done, rates, wanted.attention):
        return None
    time = step_time(done, rates, wanted.attention)
    gpus, hours = plan["gpus"] * plan["nodes"], run["steps"] / 3.6e6
    tokens = run["tokens_per_epoch"] / run["steps_per_epoch"]
    useful = plan["flops_per_token"] * tokens / gpus
    return time | {
        "hours": time["ms"] * hours,
        "hours_low": time["low"] * hours,
        "hours_high": time["high"] * hours,
        "hours_an_epoch": time["ms"] * run["steps_per_epoch"] / 3.6e6,
        "tokens_per_second": tokens / gpus / time["ms"] * 1e3,
        "mfu": useful / (time["ms"] / 1e3) / peak_flops(device) if peak_flops(device) else None,
        "source": rates.origin,
        "device": device,
    }


def print_time(time, wanted, device):
    """Print `run_time`'s dict: the range, the components, and what would shorten the largest."""
    if time is None:
        print(
            f"Time: {wanted.results}/rates.json has not all that this run takes on {device}; measure it there with"
            " `python3 plan.py --measure`, or name another --device"
        )
        return
    share = "" if time["mfu"] is None else f", MFU {time['mfu']:.0%}"
    print(
        f"Time on {time['device']}, attention by {wanted.attention}: {time['hours_low']:.1f} to"
        f" {time['hours_high']:.1f} hours, {time['hours_an_epoch']:.1f} an epoch;"
        f" {time['tokens_per_second']:,.0f} tokens/s a GPU{share}. Rates: {time['source']}\n"
    )
    rows = {name: [f"{ms / 1e3:.2f}", f"{ms / time['ms']:.0%}"] for name, ms in time["components"].items()}
    rows["a step"] = [f"{time['ms'] / 1e3:.2f}", "100%"]
    print(_table("Where a step's time goes, seconds", rows, ("", "share")), end="\n\n")
    print(f"Largest: {time['largest']}. Shorter with {time['shorter']}.")


def print_run(arguments, plan, config, epochs):
    """Print tokens, steps, time and the evaluation of a plan."""
    run = schedule(arguments.dataset_tokens, plan["max_seq_length"], plan["global_batch_size"], epochs)
    print(
        f"Run: {run['tokens_per_epoch']:,} tokens an epoch = {run['packs']:,} packs = {run['steps_per_epoch']:,} steps;"
        f" {epochs:g} epochs = {run['steps']:,} steps, {plan['flops_per_token'] * run['tokens_per_epoch'] * epochs:.3g}"
        " useful FLOPs"
    )
    device = device_name(arguments, plan["gpu_memory_gib"])
    print_time(run_time(config, plan, run, arguments), arguments, device)
    print_evaluation(plan_engine(config, arguments, plan["gpu_memory_gib"]))


def plan_engine(config, arguments, gpu_memory_gib):
    """`plan_evaluation` of as few GPUs an engine as hold the model, or of --gpu_partition."""
    partitions = (
        [arguments.gpu_partition]
        if arguments.gpu_partition
        else [n for n in (1, 2, 4, 8) if config.num_attention_heads % n == 0]
    )
    engines = [plan_evaluation(config, gpu_partition=n, gpu_memory_gib=gpu_memory_gib) for n in partitions]
    return next((vllm for vllm in engines if vllm["fits"]), engines[-1])


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
