"""Low-rank fine-tuning of a dense model: Hugging Face Trainer, PEFT, DeepSpeed ZeRO-3, Liger's fused cross entropy.

Run it through a launcher, `bash ds3-qwen3-32b-lora-256.sh`, on several GPUs, or alone on one device:

    python3 train_dense.py --model_name_or_path MODEL --dataset data/conversations --run_name try --max_seq_length 1024

Output, under outputs/<run_name>/:
    args.json           every argument, the git commit, the data's fingerprint
    log.jsonl           one record a step: loss, grad_norm, learning_rate, tokens_per_second, mfu, peak_gib; with
                        --validation_share also one an epoch: validation_loss
    checkpoint-<step>/  once an epoch: a verified PEFT adapter; the newest two also hold resume/, for `--resume`
    skipped.jsonl       steps whose loss or gradient was not finite, and their documents
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import (
    Trainer,
    TrainingArguments,
)
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

import multipack
from malaysian_sft.account import check_trainer, compare_gemm, measure_gemm, mfu, train_flops
from malaysian_sft.adapter_state import save_adapter
from malaysian_sft.base_model import load_config, load_tokenizer
from malaysian_sft.checkpoints import Saver, load_state, newest_checkpoint, recorded_facts, refuse_another_base
from malaysian_sft.conversations import DataArguments
from malaysian_sft.dense_model import build_model
from malaysian_sft.documents_apart import check_documents_apart
from malaysian_sft.flags import check_values, parse_flags
from malaysian_sft.lora import LoraArguments
from malaysian_sft.lora_linear import LoraLinear
from malaysian_sft.memory import compare_peak, need
from malaysian_sft.plan_page import dry_run
from malaysian_sft.planning import settle, this_machine, trainer_flags
from malaysian_sft.ranks import Stop, on_the_first, one_last_line, start_deepspeed_on_cpus
from malaysian_sft.run import (
    NotFinite,
    batch_arithmetic,
    claim,
    count_steps,
    finish,
    learning_rate_factor,
    output_directory,
    refuse_another_run,
    run_facts,
    say,
    start_tracker,
    step_line,
    track,
    trim_log,
    write_arguments,
)
from malaysian_sft.trainer_parts import (
    EvenPacks,
    Progress,
    StopWhenTold,
    advance,
    check_deepspeed,
    check_gradients,
    collator,
)
from malaysian_sft.training_state import get_shares
from malaysian_sft.watchdog import WAITING

OWN_TRACKERS = ("wandb", "trackio")  # as train_moe.py's; others are the Trainer's
# flags of TrainingArguments that this trainer has others for
NOT_HERE = {
    "gradient_checkpointing": "pass --activations none, full or auto",
    "gradient_accumulation_steps": "it follows from --global_batch_size",
    "resume_from_checkpoint": "pass --resume",
    "data_seed": "pass --seed",
    "dataloader_drop_last": "every pack is trained on",
    "label_smoothing_factor": "its loss has no smoothing",
}
ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "hub id or directory of the base model"})
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub model"})


@dataclass
class DenseTrainingArguments(TrainingArguments):
    """TrainingArguments with the experiment's hyper-parameters as defaults, and what the launchers add to them."""

    output_dir: str | None = field(default=None, metadata={"help": "default: outputs/<run_name>"})
    run_name: str | None = field(
        default="train_dense", metadata={"help": "the experiment's only name; a launcher passes its file name"}
    )
    project: str = field(default="malaysian-sft", metadata={"help": "wandb project"})
    global_batch_size: int = field(
        default=32, metadata={"help": "packs in one optimiser step, over all ranks and micro-batches"}
    )
    max_skipped_steps: int = field(
        default=3, metadata={"help": "steps in a row whose loss or gradient is not finite that end the run"}
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
    num_train_epochs: float = 3.0
    learning_rate: float = 1e-4
    lr_scheduler_type: str = "linear"
    warmup_steps: int = field(
        default=50,
        metadata={
            "help": "linear warm-up, its first step at 1/warmup_steps of the peak, then linear decay to the last step"
        },
    )
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 1
    bf16: bool = True
    activations: Literal["auto", "none", "selective", "full"] = field(
        default="auto",
        metadata={
            "help": "what the backward recomputes: nothing; gate and up of the MLP; or whole layers. The less, the"
            " faster, and the more memory. auto: by plan.py, the least that fits the GPU; without a GPU, full"
        },
    )
    frugal_layers: int | None = field(
        default=None,
        metadata={"help": "layers that recompute one step more than activations says. Default: as few as fit"},
    )
    fast_parts: bool = field(
        default=True, metadata={"help": "own kernels for whole layers; False: as transformers and PEFT wrote them"}
    )
    ddp_timeout: int = field(default=600, metadata={"help": WAITING})
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False  # it would log the mean of earlier losses in place of one that is not finite
    save_strategy: str = "epoch"
    save_steps: int | None = field(default=None, metadata={"help": "save every so many steps as well as every epoch"})
    report_to: str = field(default="wandb", metadata={"help": "wandb, trackio, none, ..."})
    remove_unused_columns: bool = False
    dataloader_num_workers: int = 0

    def __post_init__(self):
        self.output_dir = output_directory(self)
        check_values(self)
        defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
        for name, instead in NOT_HERE.items():
            if getattr(self, name) not in (None, defaults[name]):
                raise ValueError(f"--{name} {getattr(self, name)} is not for this trainer: {instead}")
        if self.save_steps:
            self.save_strategy = "steps"
        elif self.save_strategy == "steps":
            raise ValueError("--save_strategy steps: expected --save_steps too")
        self.save_steps = self.save_steps or 500  # which transformers wants, and with epochs does not look at
        if self.max_steps != -1 and not self.max_steps > 0:
            raise ValueError(f"--max_steps {self.max_steps}: expected a positive number, or -1 for all epochs")
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(f"--lr_scheduler_type {self.lr_scheduler_type}: its rate is not that of a step")
        if self.optim not in ADAMW:
            raise ValueError(f"--optim {self.optim}: expected one of {', '.join(ADAMW)}, whose state can be saved")
        if self.dry_run:
            return  # what follows would take a device and meet the other processes
        if self.prepare_only:
            self.deepspeed, self.use_cpu = None, True  # one process, no device
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        if not torch.cuda.is_available():
            self.use_cpu = True
            self.ddp_backend = "gloo" if world_size > 1 else None
            if "RANK" in os.environ:
                start_deepspeed_on_cpus(self.ddp_timeout)  # before TrainingArguments, which would pick its own backend
        self.use_liger_kernel = not self.use_cpu  # its Triton kernels need a GPU; on a CPU transformers' own loss runs
        micro = world_size * self.per_device_train_batch_size
        self.gradient_accumulation_steps = max(self.global_batch_size // micro, 1)  # checked by batch_arithmetic
        if world_size == 1 and torch.cuda.device_count() > 1 and not self.prepare_only:
            raise ValueError(
                "one process sees several GPUs: start with `torchrun --nproc_per_node N`, or set CUDA_VISIBLE_DEVICES"
            )
        self.tracker_name, self.report_to = (
            self.report_to,
            ("none" if self.report_to in OWN_TRACKERS else self.report_to),
        )
        super().__post_init__()


class DenseTrainer(Trainer):
    """Trainer that keeps multipack's order, saves verified adapters, and accounts for tokens and FLOPs."""

    def __init__(
        self, *args, lora_args, base_model, facts=None, stop=None, started=None, planned=None, gemm_flops=None, **kwargs
    ):
        """facts: what a resumed run must share; stop: the run's Stop; started(): called when it is about to train."""
        super().__init__(*args, **kwargs)
        for printing in (PrinterCallback, ProgressCallback):
            self.remove_callback(printing)
        self.add_callback(PrinterCallback if self.args.disable_tqdm else Progress)
        self.stop = stop or Stop()
        self.add_callback(StopWhenTold(self, self.stop))
        self.saver = Saver(self.args.output_dir, facts)
        self.not_finite = NotFinite(self.args.output_dir, self.args.max_skipped_steps)
        self.started, self.tracker = started or (lambda: None), None
        self.lora_args, self.base_model = lora_args, base_model
        self.documents_apart = False  # until the first step has looked
        self.with_norms = [module for module in self.model.modules() if isinstance(module, LoraLinear)]
        # plan.py's plan and the measured rate, until they have been printed
        self.planned, self.gemm_flops = planned, gemm_flops

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset or self.train_dataset)  # multipack shuffles, by seed and epoch

    def save_model(self, output_dir=None, _internal_call=False):
        directory = output_dir or self.args.output_dir
        save_adapter(self.model, directory, self.base_model, self.processing_class, self.lora_args)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The schedule of both trainers; another --lr_scheduler_type is transformers'."""
        if self.args.lr_scheduler_type != "linear":
            return super().create_scheduler(num_training_steps, optimizer)
        factor = functools.partial(
            learning_rate_factor, total_steps=num_training_steps, warmup_steps=self.args.warmup_steps
        )
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _get_output_dir(self, trial):
        return str(self.saver.saving)

    def _save_checkpoint(self, model, trial):
        """The Trainer writes adapter and trainer_state.json, the Saver the rest, and publishes them."""
        started = time.perf_counter()
        named, optimizer = self.trained()
        step = self.state.global_step
        self.saver.begin(step, sum(getattr(p, "ds_numel", p.numel()) for p in named.values()))
        with self.saver.or_nothing(step):
            super()._save_checkpoint(model, trial)
        self.saver.finish(step, *get_shares(named, optimizer))
        self.last_log_time += time.perf_counter() - started  # is no part of the next step's speed
        self.stop.beat()

    def forget_norms(self):
        """DoRA's row norms, kept since the adapter's last change."""
        for module in self.with_norms:
            module.forget_norms()

    def trained(self):
        """({name: parameter} of what is trained, their AdamW)."""
        optimizer = self.optimizer.optimizer  # what accelerate wraps: AdamW, or DeepSpeed's own wrapper of it
        if self.is_deepspeed_enabled:
            optimizer = optimizer.optimizer
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}, optimizer

    # The Saver's files take the place of the Trainer's, which are pickles or DeepSpeed's; random numbers are seeded
    # anew for every step, so that a position in the run is all that is to be known of them.
    def _save_optimizer_and_scheduler(self, output_dir):
        pass

    def _save_rng_state(self, output_dir):
        pass

    def _load_rng_state(self, checkpoint):
        pass

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        pass

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_deepspeed_enabled:
            check_gradients(self.model_wrapped)
        if resume_from_checkpoint is not None:
            step = load_state(*self.trained(), resume_from_checkpoint)
            advance(self.lr_scheduler, step)
        self.started()
        return prepared

    def _get_grad_norm(self, model, grad_norm=None):
        """Called between backward and update: a step whose gradient is not finite changes nothing."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        finite = math.isfinite(float(grad_norm))
        self.not_finite.see(finite)
        if not finite:
            model.zero_grad()  # to None: AdamW passes over the parameters. Under DeepSpeed the update is over
        return grad_norm

    def training_step(self, model, inputs, *args, **kwargs):
        if not self.documents_apart:
            model.eval()
            check_documents_apart(self.model.get_base_model(), self.without_logits)
            model.train()
            self.documents_apart = True
        return super().training_step(model, inputs, *args, **kwargs)

    def without_logits(self, pack):
        """The model's forward over a pack in which nothing is supervised, for what happens inside it."""
        batch = self._prepare_inputs(self.data_collator([pack]))
        if self.args.use_liger_kernel:
            return self.model_wrapped(**batch, skip_logits=True)
        del batch["labels"]
        return self.model_wrapped(**batch, logits_to_keep=1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """On a GPU Liger's fused linear cross entropy; on a CPU the head and the loss on supervised positions only.

        There, most of a small model's memory and much of its time would go into logits that no label asks for.
        """
        if self.args.use_liger_kernel or num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.pop("labels")[0, 1:]  # (T - 1,)
        supervised = (labels != -100).nonzero()[:, 0]
        logits = model(**inputs, logits_to_keep=supervised).logits[0]  # (supervised, V)
        loss = F.cross_entropy(logits.float(), labels[supervised], reduction="sum") / num_items_in_batch
        return loss * self.accelerator.num_processes  # gradients are averaged over ranks, the count is over all of them

    @torch.no_grad()
    def evaluate(self, *args, **kwargs):
        """Log, and return, validation_loss: the mean over all supervised tokens of the held-out packs. Collective.

        The Trainer's own evaluation would join several packs into one batch, and weigh batches alike, whatever they
        supervise.
        """
        started = time.perf_counter()
        model, world = self.model_wrapped, self.accelerator.num_processes
        model.eval()
        self.forget_norms()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        packs = EvenPacks(self.eval_dataset, world)  # every rank takes part in every forward
        for i in range(self.accelerator.process_index, len(packs), world):
            batch = self._prepare_inputs(self.data_collator([packs[i]]))
            if self.args.use_liger_kernel:
                batch["skip_logits"] = True  # Liger's own default is to make them all outside of training
            count = (batch["labels"] != multipack.IGNORE).sum()
            # compute_loss multiplies by world
            loss = self.compute_loss(model, batch, num_items_in_batch=count.clamp(min=1)) / world
            totals += torch.stack([loss.double() * count, count.double()])
            self.stop.beat()
        if dist.is_initialized():
            dist.all_reduce(totals)
        metrics = {"validation_loss": (totals[0] / totals[1]).item()}
        self.log(dict(metrics))
        self.last_log_time += time.perf_counter() - started  # is no part of the next step's speed
        return metrics

    def get_decay_parameter_names(self, model):
        """DoRA's magnitudes are not decayed: towards zero they would shrink the base weight itself."""
        return [name for name in super().get_decay_parameter_names(model) if "magnitude" not in name]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Called once before every optimiser step: the place to count the step's real tokens, over all ranks."""
        self.forget_norms()
        steps_an_epoch = math.ceil(len(self.train_dataset) / self.args.global_batch_size)
        first = self.state.global_step % steps_an_epoch * self.args.global_batch_size
        packs = self.train_dataset.packs
        self.documents = np.concatenate(packs.packs[first : first + self.args.global_batch_size])
        lengths = packs.lengths[self.documents]
        self.tokens += int(lengths.sum())
        self.sum_squared_lengths += int((lengths.astype(np.int64) ** 2).sum())
        step, world = self.state.global_step, self.args.world_size
        torch.manual_seed(self.args.seed * 10**9 + step * world + self.args.process_index)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def log(self, logs, start_time=None):
        skipped = "loss" in logs and self.not_finite.in_a_row > 0
        for name in ("train_loss", "total_flos"):  # the Trainer's, wrong of a run that was stopped or resumed
            logs.pop(name, None)
        if "loss" in logs:
            logs |= self.step_statistics()
        if skipped:
            logs["skipped_steps"] = self.not_finite.skipped
        super().log(logs, start_time)
        if self.is_world_process_zero():
            record = {"step": self.state.global_step, **logs}
            with open(os.path.join(self.args.output_dir, "log.jsonl"), "a") as f:
                f.write(json.dumps(record) + "\n")
            if "loss" in logs or "validation_loss" in logs:
                tqdm.write(step_line(record, self.state.max_steps))
            if self.tracker is not None:
                self.tracker = track(self.tracker, rewrite_logs(logs) | {"train/global_step": self.state.global_step})
            self.compare_with_plan()
        loss, norm = logs.get("loss", 0.0), logs.get("grad_norm", 0.0)
        if skipped:
            self.not_finite.keep(self.state.global_step, loss, norm, self.documents)
            # the Trainer adds up losses: what is not a number would stay in the sum
            self._tr_loss, self._total_loss_scalar = torch.zeros_like(self._tr_loss), 0.0
        elif not math.isfinite(loss):
            raise ValueError(
                f"step {self.state.global_step}: loss {loss}, gradient norm {norm}; nothing was saved from this step"
            )

    def compare_with_plan(self):
        """After the first step: the planned peak beside the measured one, and the measured matrix products beside the
        peak of MFU."""
        if self.gemm_flops:
            print(compare_gemm(torch.cuda.get_device_name(), self.gemm_flops), flush=True)
        if self.planned:
            print(compare_peak(self.planned, torch.cuda.max_memory_allocated()), flush=True)
        self.planned = self.gemm_flops = None

    def step_statistics(self):
        """Rates since the previous log line: real tokens per second over all ranks, MFU by plan.py's account, peak
        memory in GiB."""
        now = time.perf_counter()
        seconds, self.last_log_time = now - self.last_log_time, now
        r, use_dora = self.lora_args.r, self.lora_args.use_dora
        flops = train_flops(self.model.config, self.tokens, self.sum_squared_lengths, r, use_dora=use_dora)
        statistics = {"tokens": self.tokens, "tokens_per_second": round(self.tokens / seconds, 1)}
        if torch.cuda.is_available():
            utilisation = mfu(flops, seconds, self.args.world_size, torch.cuda.get_device_name())
            statistics["mfu"] = None if utilisation is None else round(utilisation, 4)
            statistics["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.tokens = self.sum_squared_lengths = 0
        return statistics

    def train(self, *args, **kwargs):
        self.tokens = self.sum_squared_lengths = 0
        self.last_log_time = time.perf_counter()
        return super().train(*args, **kwargs)


def plan_arguments(data_args, lora_args, training_args):
    """plan.py's arguments that these flags stand for."""
    return dict(
        kind="dense",
        max_seq_length=data_args.max_seq_length,
        micro_batch=training_args.per_device_train_batch_size,
        global_batch_size=training_args.global_batch_size,
        r=lora_args.r,
        use_dora=lora_args.use_dora,
        activations=None if training_args.activations == "auto" else training_args.activations,
        frugal_layers=training_args.frugal_layers,
        zero3=bool(training_args.deepspeed),
    )


def check_memory(config, data_args, lora_args, training_args):
    """plan.py's plan of this run, None without a GPU or in fp32, which it does not know. Raises ValueError for a run
    that can't fit."""
    machine = this_machine()
    if machine["gpu_memory_gib"] is None or not training_args.bf16:
        return None
    arguments = plan_arguments(data_args, lora_args, training_args)
    planned = settle(config, ignore=training_args.ignore_plan, **machine, **arguments)
    if training_args.process_index == 0:
        print(f"{trainer_flags(planned)}: {need(planned)}", flush=True)
    return planned


def choose_activations(training_args, planned):
    """Fill in what the flags leave open, from the plan; without one, whole layers are recomputed."""
    chosen = planned or {"activations": "full", "frugal_layers": 0}
    if training_args.activations == "auto":
        training_args.activations = chosen["activations"]
    if training_args.frugal_layers is None:
        training_args.frugal_layers = chosen["frugal_layers"]


def run_arguments(model_args, data_args, lora_args, training_args):
    """Every argument by its name, as args.json has it."""
    arguments = {}
    for group in (model_args, data_args, lora_args):
        arguments |= dataclasses.asdict(group)
    arguments |= {k: v for k, v in training_args.to_dict().items() if not k.endswith("_token")}
    arguments["report_to"] = training_args.tracker_name
    return json.loads(json.dumps(arguments, default=str))


def steps_of(arguments, packs):
    """(steps of an epoch, steps of the run) by these arguments."""
    epochs, max_steps = arguments["num_train_epochs"], arguments["max_steps"]
    return count_steps(len(packs), arguments["global_batch_size"], epochs, max(max_steps, 0))


def parse():
    """(ModelArguments, DataArguments, LoraArguments, DenseTrainingArguments) of the command line."""
    groups = parse_flags((ModelArguments, DataArguments, LoraArguments, DenseTrainingArguments))
    check_values(*groups)
    return groups


def dense_config(model_args):
    """The model's config. Raises ValueError for a mixture of experts."""
    config = load_config(model_args.model_name_or_path, model_args.model_revision)
    check_trainer(config, "dense")
    return config


def prepare(model_args, data_args, training_args):
    """(tokenizer, packs)."""
    tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision)
    return tokenizer, multipack.prepare(data_args, tokenizer, model_args.model_name_or_path, seed=training_args.seed)


def train(model_args, data_args, lora_args, training_args, stop):
    """The run from a published checkpoint to adapters on disk. Raises ValueError for what the user can put right."""
    check_deepspeed(training_args)
    if training_args.device.type == "cuda":  # asking for it starts the process group
        torch.cuda.set_device(training_args.device)
    stop.watch(training_args.ddp_timeout)
    # before looking at what is there: another run may just end
    with on_the_first(lambda: claim(training_args.output_dir)) or contextlib.nullcontext():
        train_claimed(model_args, data_args, lora_args, training_args, stop)


def train_claimed(model_args, data_args, lora_args, training_args, stop):
    """`train` in a directory that no other run is in."""
    checkpoint = newest_checkpoint(training_args.output_dir, training_args.resume, say, training_args.start_anew)
    planned = check_memory(dense_config(model_args), data_args, lora_args, training_args)
    tokenizer, packs = prepare(model_args, data_args, training_args)
    choose_activations(training_args, planned)
    arguments = run_arguments(model_args, data_args, lora_args, training_args)
    steps = steps_of(arguments, packs)
    sizes = len(packs), data_args.max_seq_length, training_args.global_batch_size
    micro = training_args.world_size, training_args.per_device_train_batch_size
    _, arithmetic = batch_arithmetic(*sizes, *micro, *steps)
    say(arithmetic)
    if training_args.save_strategy == "no":
        say("--save_strategy no: nothing of this run will be saved")
    facts = run_facts(arguments, packs.fingerprint, steps[1])
    if checkpoint:
        refuse_another_run(facts, *recorded_facts(checkpoint))
        refuse_another_base(checkpoint, model_args.model_name_or_path, model_args.model_revision)
    first = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    if first >= steps[1]:
        return say(f"{checkpoint} is the run's last: nothing is left to train")
    if packs.validation is not None:
        training_args.eval_strategy = IntervalStrategy.EPOCH

    def started():
        """The model is there, the checkpoint is loaded: from here on it is this run's directory."""
        if training_args.process_index == 0:
            world = training_args.world_size
            record = write_arguments(arguments, facts, planned, world, packs.report["commits"])
            trim_log(training_args.output_dir, first)
            if training_args.tracker_name in OWN_TRACKERS:
                where = training_args.project, training_args.run_name, training_args.output_dir
                trainer.tracker = start_tracker(training_args.tracker_name, *where, record)
        if checkpoint:
            say(f"resuming from {checkpoint}")

    gemm_flops = measure_gemm() if torch.cuda.is_available() else None
    model = build_model(model_args, lora_args, training_args)
    trainer = DenseTrainer(
        model=model,
        args=training_args,
        train_dataset=EvenPacks(packs, micro[0] * micro[1]),
        eval_dataset=packs.validation,
        data_collator=collator(model),
        processing_class=tokenizer,
        lora_args=lora_args,
        base_model=model_args.model_name_or_path,
        facts=facts,
        stop=stop,
        started=started,
        planned=planned,
        gemm_flops=gemm_flops,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finish(trainer.tracker)
    if trainer.state.global_step < steps[1]:
        say(f"stopped by {stop.told or 'a signal'} after step {trainer.state.global_step}; go on with --resume")
        stop.leave()


def main():
    with one_last_line(), Stop() as stop:
        model_args, data_args, lora_args, training_args = parse()
        if training_args.dry_run:
            planned = plan_arguments(data_args, lora_args, training_args)
            model, epochs = model_args.model_name_or_path, training_args.num_train_epochs
            return dry_run(model, model_args.model_revision, epochs, **planned)
        if training_args.prepare_only:
            dense_config(model_args)
            return print(multipack.format_report(prepare(model_args, data_args, training_args)[1].report))
        train(model_args, data_args, lora_args, training_args, stop)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()  # leaving it to the interpreter's exit aborts now and then


if __name__ == "__main__":
    main()
