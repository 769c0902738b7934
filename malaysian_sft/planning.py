"""A plan of one run, every way to run that the trainers offer, and the choice between them."""

import bisect
import inspect
import itertools
import os
import sys

from malaysian_sft.account import (
    GIB,
    architecture,
    check_experts,
    check_trainer,
    count_parameters,
    recompute_flops,
    train_flops,
)
from malaysian_sft.lora import expert_rank
from malaysian_sft.memory import disk_bytes, gpu_bytes, host_bytes

# What each trainer offers: activation policies, the least recomputation first, each with the memory modes of the
# experts block that are worth having with it, the trainer's default first.
CHOICES = {
    "dense": {"none": ("fast",), "selective": ("fast",), "full": ("fast",)},
    "moe": {"none": ("fast", "frugal"), "selective": ("frugal", "fast"), "full": ("fast",)},
}
MODES = {"dense": ("fast",), "moe": ("fast", "frugal")}
# Of a GPU's memory: how far a plan may be off (tests hold it to that), so what fits with this to spare is chosen first.
SPARE = 0.04
# What gathering frozen weights costs beside recomputation, as a share of a step's FLOPs: two H200 took 25 % longer.
GATHERING = 0.2
GPU_MEMORY_GIB = 80.0  # of a GPU, where none is at hand to ask
# Tokens of a micro-batch from which a larger one gains nothing: 1,024 rows for each of 128 experts at top-8.
FULL_TOKENS = 16384


def default_mode(kind, activations):
    """The memory mode of the experts block that a trainer couples with a choice of activations."""
    return CHOICES[kind][activations][0]


def plan_run(
    config,
    *,
    kind,
    gpus,
    nodes=1,
    gpu_memory_gib=GPU_MEMORY_GIB,
    reserve_gib=4.0,
    max_seq_length=16384,
    micro_batch=1,
    global_batch_size=32,
    r=256,
    expert_r=None,
    use_dora=False,
    activations="full",
    memory_mode=None,
    reduce_every_micro_batch=False,
    shard_nodes=1,
    zero3=True,
    gather_base=True,
    frugal_layers=0,
    base_dtype=None,
    expert_arithmetic="bf16",
    transposed_layers=0,
    document_length=1900.0,
):
    """The bytes and FLOPs of one way to run, as a dict that `print_plan` prints and `check_fits` judges.

    kind: "dense" (train_dense.py, DeepSpeed ZeRO-3) or "moe" (train_moe.py). gpus is per node. micro_batch is
    packs of max_seq_length tokens per GPU and forward (train_moe.py: 1); global_batch_size packs per optimiser step.
    activations: none, selective or full; memory_mode of the experts block: fast or frugal, by default what
    the trainer couples with the policy. zero3: False for a dense model without DeepSpeed, whole on every GPU.
    gather_base: layers' frozen weights are sharded and gathered as they are needed, instead of whole on every GPU;
    frugal_layers: the first so many layers have frugal experts whatever memory_mode says; in a dense model they
    recompute what the next policy would. base_dtype: "fp8" (moe) for routed experts stored in FP8,
    expert_arithmetic: "fp8" for those that compute so too; transposed_layers: the first so many layers, whole on every
    GPU, keep those transposed too, which the backward multiplies with.
    reserve_gib of every GPU are left to the CUDA context, NCCL and fragmentation. document_length: mean length
    of the document that a token is in (sum of squared lengths / sum of lengths), for attention. The rest as
    train_moe.py's flags of that name.

    Keys: the arguments; accumulation; parameters (count_parameters); gpu_bytes by term (`gpu_bytes` says what and why),
    peak_bytes, limit_bytes, fits; host_bytes and disk_bytes by term; flops_per_token (useful), recompute_per_token.
    Raises ValueError for a batch that the GPUs don't divide, an unknown kind, policy or mode, or a config without the
    kind's layers.
    """
    config = config.get_text_config()
    _check_choice("kind", kind, CHOICES)
    _check_choice("activations", activations, CHOICES[kind])
    _check_choice("memory_mode", memory_mode, (None, *MODES[kind]))
    check_trainer(config, kind)
    check_experts(config, expert_arithmetic, base_dtype)
    gathers = gather_base and gpus * shard_nodes > 1
    if transposed_layers and (expert_arithmetic != "fp8" or gathers):
        what = "a base that is gathered layer by layer" if gathers else "--expert_arithmetic bf16"
        raise ValueError(f"--transposed_layers {transposed_layers}: {what} has no use for them; expected 0")
    plan = {name: value for name, value in locals().items() if name not in ("config", "gathers")}
    plan |= {
        "model_type": config.model_type,
        "expert_r": expert_rank(config, r, expert_r) if kind == "moe" else None,
        "memory_mode": memory_mode or default_mode(kind, activations),
        "gather_base": gathers,
        "parameters": count_parameters(config, r, expert_r, use_dora),
        "stateful": architecture(config).stateful,
    }
    if nodes % shard_nodes:
        raise ValueError(f"{nodes} nodes are no multiple of --shard_nodes {shard_nodes}")
    if global_batch_size % (gpus * nodes * micro_batch):
        raise ValueError(
            f"a step of {global_batch_size} packs is no multiple of {gpus * nodes} GPUs x {micro_batch} packs each"
        )
    return plan | _account(config, plan)


def _account(config, plan):
    """The keys of `plan_run` that follow from the arguments."""
    p = plan = dict(plan)
    p["accumulation"] = p["global_batch_size"] // (p["gpus"] * p["nodes"] * p["micro_batch"])
    p["gpu_bytes"] = gpu_bytes(config, plan)
    p["peak_bytes"] = sum(p["gpu_bytes"].values())
    p["limit_bytes"] = int((p["gpu_memory_gib"] - p["reserve_gib"]) * GIB)
    p["fits"] = p["peak_bytes"] <= p["limit_bytes"]
    p["host_bytes"], p["disk_bytes"] = host_bytes(plan), disk_bytes(plan)
    length, ranks = p["document_length"], (p["r"], p["expert_r"])
    p["flops_per_token"] = train_flops(config, 1, length, *ranks, p["use_dora"])
    p["recompute_per_token"] = recompute_flops(
        config, p["activations"], p["memory_mode"], *ranks, length, p["frugal_layers"], p["kind"]
    )
    return plan


def _check_choice(name, value, known):
    if value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(filter(None, known))}")


def options(config, *, kind, gpus, nodes=1, global_batch_size=32, activations=None, memory_mode=None, **arguments):
    """A plan for every way a trainer can run: activation policy with its memory modes, and micro-batch (dense) or
    whether every micro-batch reduces gradients and how many nodes share a copy (moe); best first. An argument that is
    given (as for plan_run) stays.

    Best: fits, gathers weights inside a node, leaves SPARE of the memory, fills the GPU (FULL_TOKENS tokens in a
    micro-batch), recomputes least, reduces least often, has the smallest micro-batch. What doesn't fit follows, the
    nearest to fitting first.
    """
    per_gpu = max(global_batch_size // (gpus * nodes), 1)
    policies = (
        CHOICES.get(kind, {}) if activations is None else {activations: CHOICES.get(kind, {}).get(activations, ())}
    )
    pairs = [(p, mode) for p, modes in policies.items() for mode in ([memory_mode] if memory_mode else modes or [None])]
    ways = {
        "micro_batch": [n for n in range(1, per_gpu + 1) if per_gpu % n == 0] if kind == "dense" else [1],
        "reduce_every_micro_batch": [False, True] if kind == "moe" and per_gpu > 1 else [False],
        "shard_nodes": [n for n in range(1, nodes + 1) if nodes % n == 0] if kind == "moe" else [1],
        "gather_base": [False, True] if kind == "moe" and gpus * nodes > 1 else [False],
    }
    frugal_layers, transposed_layers = arguments.pop("frugal_layers", None), arguments.pop("transposed_layers", None)
    if transposed_layers and arguments.get("gather_base") is None:
        ways["gather_base"] = [False]
    ways |= {name: [arguments.pop(name)] for name in ways.keys() & arguments.keys()}
    fixed = dict(kind=kind, gpus=gpus, nodes=nodes, global_batch_size=global_batch_size, **arguments)
    fixed |= dict(frugal_layers=frugal_layers or 0, transposed_layers=transposed_layers or 0)
    plans = [
        plan_run(config, **fixed, activations=policy, memory_mode=mode, **dict(zip(ways, values, strict=True)))
        for (policy, mode), *values in itertools.product(pairs or [("full", None)], *ways.values())
    ]
    if frugal_layers is None:
        plans += [better for plan in plans if (better := with_frugal_layers(config, plan)) is not None]
    if transposed_layers is None:
        plans += [better for plan in plans if (better := with_transposed_layers(config, plan)) is not None]

    def order(p):
        if not p["fits"]:
            return True, p["peak_bytes"]
        tokens = p["micro_batch"] * p["max_seq_length"]
        small = max(FULL_TOKENS - tokens, 0)
        tight = p["peak_bytes"] > (1 - SPARE) * p["limit_bytes"]
        return (
            False,
            p["shard_nodes"],
            tight,
            small,
            p["recompute_per_token"] / p["flops_per_token"] + GATHERING * p["gather_base"],
            p["reduce_every_micro_batch"],
            p["micro_batch"],
            -p["transposed_layers"],
        )

    return sorted(plans, key=order)


def with_frugal_layers(config, plan):
    """`plan`, whose layers are fast, with as many frugal ones as leave SPARE of the memory, or None."""
    config = config.get_text_config()
    limit = (1 - SPARE) * plan["limit_bytes"]
    if plan["memory_mode"] != "fast" or plan["activations"] == "full" or plan["peak_bytes"] <= limit:
        return None
    # the peak falls with every layer
    counts = range(1, config.num_hidden_layers)
    found = bisect.bisect_left(
        counts, True, key=lambda count: replanned(config, plan, frugal_layers=count)["peak_bytes"] <= limit
    )
    return replanned(config, plan, frugal_layers=counts[found]) if found < len(counts) else None


def with_transposed_layers(config, plan):
    """`plan`, whose experts compute in FP8 and lie whole on every GPU, with as many layers' experts kept transposed too
    as leave SPARE of the memory, or None."""
    config = config.get_text_config()
    limit = (1 - SPARE) * plan["limit_bytes"]
    if plan["expert_arithmetic"] != "fp8" or plan["gather_base"] or plan["peak_bytes"] > limit:
        return None
    # the peak grows with every layer
    counts = range(1, config.num_hidden_layers + 1)
    count = bisect.bisect_left(
        counts, True, key=lambda count: replanned(config, plan, transposed_layers=count)["peak_bytes"] > limit
    )
    return replanned(config, plan, transposed_layers=count) if count else None


def replanned(config, plan, **other):
    """The plan of `plan`'s arguments, but for those given."""
    names = inspect.signature(plan_run).parameters.keys() - {"config", *other}
    return plan_run(config, **{name: plan[name] for name in names}, **other)


def trainer_flags(plan):
    """The trainer's flags that make it run as `plan` says."""
    frugal = f" --frugal_layers {plan['frugal_layers']}" if plan["frugal_layers"] else ""
    if plan["kind"] == "dense":
        return f"--activations {plan['activations']}{frugal} --per_device_train_batch_size {plan['micro_batch']}"
    reduce = " --reduce_every_micro_batch True" if plan["reduce_every_micro_batch"] else ""
    share = f" --shard_nodes {plan['shard_nodes']}" if plan["shard_nodes"] > 1 else ""
    gather = f" --gather_base {plan['gather_base']}" if plan["gpus"] * plan["nodes"] > 1 else ""
    mode = f"--activations {plan['activations']} --memory_mode {plan['memory_mode']}"
    stored = f" --base_dtype {plan['base_dtype']}" if plan["base_dtype"] else ""
    stored += " --expert_arithmetic fp8" if plan["expert_arithmetic"] == "fp8" else ""
    stored += f" --transposed_layers {plan['transposed_layers']}" if plan["transposed_layers"] else ""
    return f"{mode}{frugal}{gather}{reduce}{share}{stored}"


def best_policy(config, **arguments):
    """The plan to run with: the first of `options` (its arguments are those of `plan_run`). Raises ValueError if none
    fits."""
    plan = options(config, **arguments)[0]
    check_fits(plan)
    return plan


def this_machine(whole=False):
    """Where this process runs, as plan_run's arguments: {"gpus": of one node, "nodes", "gpu_memory_gib": None without a
    GPU}.

    By torchrun's variables, which every rank reads alike; without them one GPU, or with `whole` all GPUs of the
    machine.
    """
    import torch

    cuda = torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", torch.cuda.device_count() or 1 if whole else 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    device = int(os.environ.get("LOCAL_RANK", 0))
    return {
        "gpus": local,
        "nodes": world // local,
        "gpu_memory_gib": torch.cuda.get_device_properties(device).total_memory / GIB if cuda else None,
    }


def settle(config, ignore=False, **arguments):
    """The plan that a trainer runs with: `best_policy`'s, of the arguments that are not None; those that are None are
    chosen.

    Where nothing fits it raises ValueError, naming the largest terms and what to change; with `ignore` it prints that
    as a warning and returns the plan that comes nearest to fitting.
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


def check_fits(plan):
    """Raise ValueError, naming the largest terms and what to change, if `plan` needs more memory than a GPU has."""
    if plan["fits"]:
        return
    largest = sorted(plan["gpu_bytes"].items(), key=lambda item: -item[1])[:3]
    terms = ", ".join(f"{name} {value / GIB:.1f} GiB" for name, value in largest)
    need, limit = plan["peak_bytes"] / GIB, plan["limit_bytes"] / GIB
    raise ValueError(
        f"{need:.1f} GiB a GPU are needed and {limit:.1f} are there ({plan['gpu_memory_gib']:g} less"
        f" {plan['reserve_gib']:g} reserved), with {trainer_flags(plan)} and {plan['micro_batch']} x"
        f" {plan['max_seq_length']:,} tokens. Largest: {terms}. {_remedy(plan, largest[0][0])}"
    )


def _remedy(plan, term):
    """What to change when `term` is the largest of a plan that doesn't fit."""
    if term == "whole adapter gradient while accumulating":
        return "Pass --reduce_every_micro_batch True, take more GPUs, or lower --lora_r."
    if "activations" in term or "temporaries" in term or "loss" in term:
        recompute = "" if plan["activations"] == "full" else " or recompute more (activation policy full)"
        return f"Lower --max_seq_length{recompute}."
    if "dapter" in term or "Adam" in term:
        return "Lower --lora_r, or take more GPUs."
    if "frozen base" in term and plan["kind"] == "moe":
        return "Store the experts in FP8 (--base_dtype fp8, which changes the weights), or take more GPUs."
    spread = " to shard over (--shard_nodes)" if plan["kind"] == "moe" else ""
    return f"Take more GPUs{spread}, GPUs with more memory, or a smaller model."
