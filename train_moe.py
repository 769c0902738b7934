"""Low-rank fine-tuning of a mixture of experts: a written-out loop, LoRA or DoRA on every linear layer and expert.

Run it through a launcher, `bash fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh`, on several GPUs, or alone on one device or
CPU:

    python3 train_moe.py --model_name_or_path MODEL --dataset data/conversations --run_name try --max_seq_length 1024

Output, under outputs/<run_name>/:
    args.json           every argument, the git commit, the data's fingerprint
    log.jsonl           one record a step: loss, grad_norm, learning_rate, tokens_per_second, mfu, peak_gib,
                        data_wait, router load
    checkpoint-<step>/  once an epoch: a verified PEFT adapter; the newest two also hold resume/, for `--resume`
    skipped.jsonl       steps whose loss or gradient was not finite, and their documents

How a step works. The model is transformers' own; the experts of every layer are one FusedMoELoRA (fused_moe_lora.py),
the other linear layers PEFT's, with a faster forward (LoraLinear). Adapters are sharded (FlatAdapters). Frozen weights
are whole on every GPU, or spread by experts and rows, read from the checkpoint by the rank that holds them. Both are
gathered a layer at a time (FrozenRing). Each rank takes every world_size-th pack of the step; the loss is the sum over
all supervised tokens of the step, divided by their number, whatever the number of ranks and micro-batches. Random
numbers are seeded anew for every step, and the order of the data follows from (seed, epoch), so a position in the run
is all that a resumed run must know of either.
"""

import contextlib
import dataclasses
import gc
import math
import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import multipack
from malaysian_sft.account import check_experts, check_trainer, compare_gemm, measure_gemm, mfu, train_flops
from malaysian_sft.base_model import find_base, load_config, load_tokenizer
from malaysian_sft.checkpoints import Checkpointer, newest_checkpoint, recorded_facts, refuse_another_base
from malaysian_sft.conversations import DataArguments
from malaysian_sft.documents_apart import check_documents_apart
from malaysian_sft.flags import check_values, parse_flags
from malaysian_sft.load_base import load_weights, reset_adapter
from malaysian_sft.lora import LoraArguments
from malaysian_sft.memory import compare_peak, need
from malaysian_sft.micro_batches import micro_batches, packs_of_step, to_batch, to_device
from malaysian_sft.moe_model import build_model, make_mesh, shard
from malaysian_sft.pack_graphs import PackGraphs, refuse_graphs
from malaysian_sft.plan_page import dry_run
from malaysian_sft.planning import default_mode, settle, this_machine, trainer_flags
from malaysian_sft.ranks import Stop, on_the_first, one_last_line
from malaysian_sft.run import (
    Log,
    NotFinite,
    batch_arithmetic,
    claim,
    collector_at_rest,
    count_steps,
    is_main,
    learning_rate_factor,
    output_directory,
    refuse_another_run,
    router_record,
    run_facts,
    say,
    setup_distributed,
    write_arguments,
)
from malaysian_sft.watchdog import WAITING


@dataclass
class TrainingArguments:
    """The run. The defaults are the experiment's; a launcher names its model and itself."""

    model_name_or_path: str = field(metadata={"help": "hub id or directory of the base model"})
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub model"})
    run_name: str = field(
        default="train_moe", metadata={"help": "the experiment's only name; a launcher passes its file name"}
    )
    output_dir: str | None = field(default=None, metadata={"help": "default: outputs/<run_name>"})
    num_train_epochs: int = field(default=3, metadata={"help": "passes over the data; a checkpoint after each"})
    max_steps: int | None = field(
        default=None,
        metadata={"help": "steps of the run and of its schedule, in place of num_train_epochs, fewer or more"},
    )
    global_batch_size: int = field(
        default=32, metadata={"help": "packs in one optimiser step, over all ranks and micro-batches"}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "peak of the schedule"})
    warmup_steps: int = field(
        default=50,
        metadata={
            "help": "linear warm-up, its first step at 1/warmup_steps of the peak, then linear decay to the last step"
        },
    )
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's, on lora_A and lora_B"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "clip the gradient's global norm to this"})
    router_aux_loss_coef: float = field(default=0.0, metadata={"help": "weight of the load-balancing loss; 0: off"})
    seed: int = field(default=42, metadata={"help": "of the adapter's start, the packs, their order, dropout"})
    dtype: Literal["bfloat16", "float32"] = field(
        default="bfloat16", metadata={"help": "of the base weights and the arithmetic"}
    )
    base_dtype: Literal["fp8", "none"] | None = field(
        default=None,
        metadata={
            "help": (
                "fp8: routed experts' frozen weights are stored in FP8, as the checkpoint has them or quantised while"
                " loading, and widened when they are used (docs/fp8.md). none, the default: stored as dtype"
            )
        },
    )
    expert_arithmetic: Literal["bf16", "fp8"] = field(
        default="bf16",
        metadata={
            "help": (
                "of routed experts' frozen weights; bf16: in dtype, whatever it is. fp8, with --base_dtype fp8 alone:"
                " as they are stored, with activations and gradients quantised (docs/fp8.md)"
            )
        },
    )
    activations: Literal["auto", "none", "selective", "full"] = field(
        default="auto",
        metadata={
            "help": (
                "what the backward recomputes: nothing; attention and norms (and see memory_mode); or whole layers. The"
                " less, the faster, and the more memory. auto: by plan.py, the least that fits the GPU; without a GPU,"
                " full"
            )
        },
    )
    memory_mode: Literal["fast", "frugal"] | None = field(
        default=None,
        metadata={
            "help": (
                "experts keep gate and up for the backward, or recompute them. Default: what fits, as activations auto"
            )
        },
    )
    fast_parts: bool = field(
        default=True,
        metadata={"help": "own kernels for norms, rotary and the attention half; False: as transformers wrote them"},
    )
    frugal_layers: int | None = field(
        default=None,
        metadata={"help": "layers whose experts are frugal whatever memory_mode says. Default: as few as fit"},
    )
    transposed_layers: int | None = field(
        default=None,
        metadata={"help": "layers that keep experts computing in FP8 transposed too. Default: as many as fit"},
    )
    gather_base: bool | None = field(
        default=None,
        metadata={
            "help": "spread the frozen weights over the GPUs and gather each layer when it is needed, or keep all on"
            " each, which is faster and takes more memory. Default: spread only where it must be"
        },
    )
    shard_nodes: int = field(
        default=1, metadata={"help": "nodes that share one copy of the model; every further set of nodes holds another"}
    )
    reduce_every_micro_batch: bool | None = field(
        default=None,
        metadata={
            "help": (
                "inside a node, reduce gradients after each micro-batch: slower, and saves a whole fp32 adapter. "
                "Default: only where it must, as activations auto"
            )
        },
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": (
                "pad every pack to --max_seq_length and launch its forward and backward as two CUDA graphs, where the"
                " host is slower than the GPU (pack_graphs.py)"
            )
        },
    )
    save_steps: int | None = field(
        default=None, metadata={"help": "checkpoint every so many steps as well as every epoch"}
    )
    max_skipped_steps: int = field(
        default=3,
        metadata={"help": "steps in a row without a finite loss and gradient, each skipped, that end the run"},
    )
    resume: bool = field(default=False, metadata={"help": "continue from the newest complete checkpoint of this run"})
    start_anew: bool = field(
        default=False, metadata={"help": "put what a run of this name left aside, and start at the first step"}
    )
    prepare_only: bool = field(default=False, metadata={"help": "tokenise and pack, print the report, and stop"})
    dry_run: bool = field(
        default=False, metadata={"help": "print what the run needs on this machine, and stop before anything is loaded"}
    )
    ignore_plan: bool = field(default=False, metadata={"help": "start even if plan.py expects the run not to fit"})
    ddp_timeout: int = field(default=600, metadata={"help": WAITING})
    report_to: Literal["wandb", "trackio", "none"] = field(default="wandb", metadata={"help": "experiment tracker"})
    project: str = field(default="malaysian-sft", metadata={"help": "the tracker's project"})

    def __post_init__(self):
        self.output_dir = output_directory(self)
        self.base_dtype = None if self.base_dtype == "none" else self.base_dtype
        if self.max_steps is not None and not self.max_steps > 0:
            raise ValueError(f"--max_steps {self.max_steps}: expected a positive number")
        check_values(self)


def plan_arguments(args, data_args, lora_args):
    """plan.py's arguments that these flags stand for; None is left for it to choose."""
    return dict(
        kind="moe",
        max_seq_length=data_args.max_seq_length,
        global_batch_size=args.global_batch_size,
        r=lora_args.r,
        expert_r=lora_args.expert_r,
        use_dora=lora_args.use_dora,
        activations=None if args.activations == "auto" else args.activations,
        memory_mode=args.memory_mode,
        reduce_every_micro_batch=args.reduce_every_micro_batch,
        frugal_layers=args.frugal_layers,
        transposed_layers=args.transposed_layers,
        gather_base=args.gather_base,
        shard_nodes=args.shard_nodes,
        base_dtype=args.base_dtype,
        expert_arithmetic=args.expert_arithmetic,
    )


# Without a GPU, or in fp32, which plan.py does not know.
UNPLANNED = {"activations": "full", "reduce_every_micro_batch": False, "frugal_layers": 0, "gather_base": True}
UNPLANNED["transposed_layers"] = 0


def settle_memory(config, args, data_args, lora_args):
    """(args, with what the flags leave open about memory chosen; the plan, None where plan.py has none).

    The plan is the same on every rank: that of the GPU with the least memory. Raises ValueError, before anything is
    loaded, for a run that can't fit. A run may be resumed with other choices: they decide what is computed twice, not
    what is computed.
    """
    machine = this_machine()
    planned = None
    if machine["gpu_memory_gib"] is not None and args.dtype == "bfloat16":
        memory = torch.tensor(machine["gpu_memory_gib"], dtype=torch.float64)
        dist.all_reduce(memory, dist.ReduceOp.MIN)
        machine["gpu_memory_gib"] = memory.item()
        planned = settle(config, ignore=args.ignore_plan, **machine, **plan_arguments(args, data_args, lora_args))
        say(f"{trainer_flags(planned)}: {need(planned)}")
    chosen = planned or UNPLANNED
    open_choices = {name: chosen[name] for name in UNPLANNED if getattr(args, name) in (None, "auto")}
    settled = dataclasses.replace(args, **open_choices)
    mode = args.memory_mode or chosen.get("memory_mode") or default_mode("moe", settled.activations)
    return dataclasses.replace(settled, memory_mode=mode), planned


COLLECT_EVERY = 100  # steps; see collector_at_rest


def make_optimizer(model, args):
    """Fused AdamW on the adapter, its state allocated at once, so that a checkpoint can be read into it."""
    named = {}  # what is updated, in order: the parameters, or this rank's shards of several at a time; a name of each
    for name, p in model.named_parameters():
        if p.requires_grad:
            named.setdefault(p.sharded.flat.shard if hasattr(p, "sharded") else p, name)
    # magnitudes are not decayed: towards zero they would shrink the base weight itself
    decayed = [p for p, name in named.items() if "magnitude" not in name]
    others = [p for p, name in named.items() if "magnitude" in name]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}] if others else [{"params": decayed}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    for p in named:
        step = torch.zeros((), device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def forward_backward(model, batches, supervised, args, device, packs=None, stop=None):
    """Gradients of the step's loss from this rank's batches; returns this rank's [summed loss, summed auxiliary loss],
    or None if `stop`, a Stop, was told to all before the last batch.

    supervised: how many tokens of the whole step, over all ranks, have a loss; packs: how many packs it has, if fewer
    than places. The loss is a mean over the ones, the auxiliary loss over the others. Gradients are sums over ranks.
    """
    packs, ring = packs or dist.get_world_size() * len(batches), model.ring
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        if i and stop is not None and stop.agreed():
            return None
        if ring is not None:  # across copies of the model, gradients are reduced once a step
            ring.adapters.begin(reduces=last or args.reduce_every_micro_batch, last=last)
        loss, auxiliary = model(to_device(batch, device))
        # in this thread: one that autograd starts for the GPU has to ask this one for Python's lock, kernel by kernel
        with torch.autograd.set_multithreading_enabled(False):
            (loss / supervised + auxiliary * (args.router_aux_loss_coef / packs)).backward()
        if ring is not None:
            ring.adapters.finish()
        totals += torch.stack([loss.detach(), auxiliary.detach()])
        del loss, auxiliary  # and with them what autograd kept, before the next is computed or recorded
        gc.collect(1)  # see collector_at_rest
    return totals


@torch.no_grad()
def clip_gradients(parameters, max_norm, mesh):
    """Scale gradients to a global norm of at most `max_norm`; returns the norm before, on the device."""
    gradients = [p.grad for p in parameters]
    squares = torch.nn.utils.get_total_norm(gradients, 2.0).square()
    dist.all_reduce(squares, group=mesh["shard"].get_group())
    norm = squares.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)
    return norm


def refuse_leaks(model, device):
    """Raise ValueError if documents in a pack see each other. Collective."""
    model.eval()
    check_documents_apart(model.causal_lm, lambda pack: model(to_device(to_batch(pack), device)))
    model.train()
    model.forget_norms()  # DoRA's, of the adapter's start: a resumed run's adapter is yet to be read


@torch.no_grad()
def validate(model, dataset, device, stop):
    """Mean loss per supervised token of the held-out packs. Collective."""
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for i in range(0, len(dataset), dist.get_world_size()):
        batch = micro_batches(dataset, range(i, min(i + dist.get_world_size(), len(dataset))), 1)[0]
        totals[0] += model(to_device(batch, device))[0]
        totals[1] += len(batch["targets"])
        stop.beat()
    model.train()
    dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


def parse(argv=None):
    args, data_args, lora_args = parse_flags((TrainingArguments, DataArguments, LoraArguments), argv)
    check_values(lora_args)
    return args, data_args, lora_args


def prepare_only(args, data_args):
    """Fetch the model, tokenise and pack, in this one process; print what is in the data."""
    check_trainer(load_config(args.model_name_or_path, args.model_revision), "moe")
    tokenizer = load_tokenizer(find_base(args.model_name_or_path, args.model_revision))
    dataset = multipack.prepare(data_args, tokenizer, args.model_name_or_path, seed=args.seed)
    print(multipack.format_report(dataset.report))


@dataclass
class StepData:
    """What an optimiser step reads: this rank's batches; packs, documents and their lengths of all ranks."""

    step: int
    batches: list
    packs: int
    documents: np.ndarray
    lengths: np.ndarray


@dataclass
class Run:
    """What an optimiser step works with."""

    args: TrainingArguments
    lora_args: LoraArguments
    config: object
    device: torch.device
    mesh: object
    dataset: multipack.PackedDataset
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    steps_an_epoch: int
    total_steps: int
    micro_batches: int  # of a rank in a step
    stop: Stop
    not_finite: NotFinite
    prepared: StepData | None = None  # of the step to come

    @property
    def parameters(self):
        """What the optimiser updates: those that are trained, or this rank's shards of them."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def load_model(config, args, data_args, lora_args, directory, mesh, device):
    """(PeftModel, ModelWithLoss) with the base's weights and the adapter's start values, sharded. Collective."""
    peft_model, model = build_model(config, args, lora_args)
    refuse_graphs(model, args, lora_args, device)
    ring = shard(model, mesh, args, lora_args.use_dora)
    load_weights(model.causal_lm, directory, device, ring)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    reset_adapter(model.causal_lm, args.seed, ring)
    refuse_leaks(model, device)
    model.graphs = PackGraphs(model, data_args.max_seq_length) if args.cuda_graphs else None
    return peft_model, model


def prepare_step(run, step):
    """StepData of step `step` (0-based)."""
    dataset = run.dataset
    indices = packs_of_step(dataset, step, run.steps_an_epoch, run.args.global_batch_size)
    documents = np.concatenate([dataset.packs[i] for i in indices])
    batches = micro_batches(dataset, indices, run.micro_batches)
    return StepData(step, batches, len(indices), documents, dataset.lengths[documents])


def optimizer_step(run, step, checkpoints):
    """Optimiser step `step` (0-based): its record, None if the run was told to stop in the middle of it. Collective."""
    args, world = run.args, dist.get_world_size()
    started = time.perf_counter()  # a step's speed is without the validation and the saving that follow it
    if run.prepared is None or run.prepared.step != step:
        run.prepared = prepare_step(run, step)
    data, run.prepared = run.prepared, None
    supervised = sum(len(batch["targets"]) for batch in data.batches)
    supervised = torch.full((), supervised, dtype=torch.float64, device=run.device)
    dist.all_reduce(supervised)
    data_wait = time.perf_counter() - started

    # random numbers depend on the position alone
    torch.manual_seed(args.seed * 10**9 + step * world + dist.get_rank())
    totals = forward_backward(run.model, data.batches, supervised.clamp(min=1), args, run.device, data.packs, run.stop)
    if totals is None:
        return None
    grad_norm = clip_gradients(run.parameters, args.max_grad_norm, run.mesh)
    if step + 1 < run.total_steps:  # while the GPU works
        run.prepared = prepare_step(run, step + 1)

    # what happened: the step's only wait for the GPU
    totals = torch.cat([totals, (~grad_norm.isfinite()).to(totals)[None], totals.new_tensor([checkpoints.failed()])])
    dist.all_reduce(totals)
    loss, auxiliary, not_finite, save_failed = totals.tolist()
    if save_failed:
        checkpoints.wait()  # raises why
    loss /= max(supervised.item(), 1)
    finite = not not_finite and math.isfinite(loss)
    run.not_finite.see(finite)
    learning_rate = args.learning_rate * learning_rate_factor(step, run.total_steps, args.warmup_steps)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    if finite:
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.model.forget_norms()
    record = {
        "step": step + 1,
        "epoch": round((step + 1) / run.steps_an_epoch, 4),
        "loss": loss,
        "grad_norm": grad_norm.item(),
        "learning_rate": learning_rate,
        **speed(run, data.lengths, int(supervised), time.perf_counter() - started),
        "data_wait": round(data_wait, 4),
        **router_record(run.model.router_load.take()),
    }
    if args.router_aux_loss_coef > 0:
        record["router_aux_loss"] = auxiliary / data.packs
    if not finite:
        record |= {"skipped_steps": run.not_finite.skipped, "documents": data.documents}
    return record


def speed(run, lengths, supervised_tokens, seconds):
    """What a record says of a step's sizes and speed; lengths: of the documents of the whole step, (documents,)."""
    tokens, squares = int(lengths.sum()), int((lengths.astype(np.int64) ** 2).sum())
    lora, cuda = run.lora_args, run.device.type == "cuda"
    flops = train_flops(run.config, tokens, squares, lora.r, lora.expert_r, lora.use_dora)
    device_name = torch.cuda.get_device_name() if cuda else "cpu"
    return {
        "tokens": tokens,
        "supervised_tokens": supervised_tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "mfu": mfu(flops, seconds, dist.get_world_size(), device_name),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
    }


def train_steps(run, step, checkpoints, log, planned):
    """Train from `step` to the last, or until told to stop; returns the step after which it stopped."""
    args, first, saved, cuda = run.args, step, step, run.device.type == "cuda"
    gemm_flops = measure_gemm() if cuda else None
    quiet = not (is_main() and sys.stderr.isatty())
    run.stop.begin_training()
    bar = tqdm(total=run.total_steps, initial=step, desc=args.run_name, unit="step", disable=quiet)
    with collector_at_rest(), bar:
        while step < run.total_steps and not run.stop.agreed():
            record = optimizer_step(run, step, checkpoints)
            if record is None:
                break
            step += 1
            if step % COLLECT_EVERY == 0:
                gc.collect()
            skipped = record.pop("documents", None)
            end_of_epoch, last = step % run.steps_an_epoch == 0, step == run.total_steps
            if run.dataset.validation is not None and (end_of_epoch or last):
                record["validation_loss"] = validate(run.model, run.dataset.validation, run.device, run.stop)
            log.write(record)
            bar.update()
            if step == first + 1 and gemm_flops:
                say(compare_gemm(torch.cuda.get_device_name(), gemm_flops))
            if step == first + 1 and planned:
                say(compare_peak(planned, torch.cuda.max_memory_allocated()))
            if skipped is not None:
                checkpoints.wait()  # too many in a row end the run: what it saved must be there
                run.not_finite.keep(step, record["loss"], record["grad_norm"], skipped)
            if end_of_epoch or last or (args.save_steps and step % args.save_steps == 0):
                checkpoints.save(step)
                run.stop.beat()
                saved = step
    if step > saved:  # told to stop
        checkpoints.save(step)
    run.stop.beat()
    checkpoints.wait()
    return step


def train(args, data_args, lora_args, stop):
    """The run from a published checkpoint to adapters on disk. Raises ValueError for what the user can put right."""
    device = setup_distributed(args.ddp_timeout)
    stop.watch(args.ddp_timeout)
    mesh = make_mesh(device, args.shard_nodes)
    # before looking at what is there: another run may just end
    with on_the_first(lambda: claim(args.output_dir)) or contextlib.nullcontext():
        train_claimed(args, data_args, lora_args, stop, device, mesh)


def train_claimed(args, data_args, lora_args, stop, device, mesh):
    """`train` in a directory that no other run is in."""
    resume_from = newest_checkpoint(args.output_dir, args.resume, say, args.start_anew)
    config = load_config(args.model_name_or_path, args.model_revision)
    check_trainer(config, "moe")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    check_experts(config, args.expert_arithmetic, args.base_dtype, capability)
    args, planned = settle_memory(config, args, data_args, lora_args)
    directory = find_base(args.model_name_or_path, args.model_revision)
    tokenizer = load_tokenizer(directory)
    dataset = multipack.prepare(data_args, tokenizer, args.model_name_or_path, seed=args.seed)
    steps = count_steps(len(dataset), args.global_batch_size, args.num_train_epochs, args.max_steps)
    sizes = len(dataset), data_args.max_seq_length, args.global_batch_size, dist.get_world_size(), 1
    micro, arithmetic = batch_arithmetic(*sizes, *steps)
    say(arithmetic)
    arguments = {
        key: value for group in (args, data_args, lora_args) for key, value in dataclasses.asdict(group).items()
    }
    facts = run_facts(arguments | {"expert_r": lora_args.expert_rank(config)}, dataset.fingerprint, steps[1])
    if resume_from:
        refuse_another_run(facts, *recorded_facts(resume_from))
        refuse_another_base(resume_from, args.model_name_or_path, args.model_revision)

    peft_model, model = load_model(config, args, data_args, lora_args, directory, mesh, device)
    optimizer = make_optimizer(model, args)
    checkpoints = Checkpointer(peft_model, model, optimizer, args, lora_args, tokenizer, facts)
    step = checkpoints.load(resume_from) if resume_from else 0
    not_finite = NotFinite(args.output_dir, args.max_skipped_steps)
    run = Run(args, lora_args, config, device, mesh, dataset, model, optimizer, *steps, micro, stop, not_finite)
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"training {trained:,} of {everything:,} parameters")
    if resume_from:
        say(f"resuming from {resume_from}")
    recorded = arguments, facts, planned, dist.get_world_size(), dataset.report["commits"]
    record = write_arguments(*recorded) if is_main() else None
    log = Log(args, record, step, run.total_steps)
    step = train_steps(run, step, checkpoints, log, planned)
    log.close()
    dist.barrier()
    if step < run.total_steps:
        say(f"stopped by {stop.told or 'a signal'} after step {step}; go on with --resume")
        return stop.leave()
    say(f"done: {args.output_dir}")


def main(argv=None):
    try:
        with one_last_line(), Stop() as stop:
            args, data_args, lora_args = parse(argv)
            if args.dry_run:
                epochs, planned = args.num_train_epochs, plan_arguments(args, data_args, lora_args)
                dry_run(args.model_name_or_path, args.model_revision, epochs, **planned)
            elif args.prepare_only:
                prepare_only(args, data_args)
            else:
                train(args, data_args, lora_args, stop)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
