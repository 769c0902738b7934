"""What is recorded of a run: its arguments, its log, the tracker, the commit; and that one process group has its
directory."""

import contextlib
import gc
import importlib
import json
import math
import os
import socket
import subprocess
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from tqdm import tqdm

from malaysian_sft.base_model import hub_commit
from malaysian_sft.locks import hold


def git_commit():
    """The commit of the code that runs, with "+" when the tree differs from it; None outside a git checkout or without
    git."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if commit.returncode:
        return None
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
    ).stdout.strip()
    return commit.stdout.strip() + ("+" if dirty else "")


def wandb_mode():
    """WANDB_MODE if it is set; else "online" where wandb finds a key, and "offline" elsewhere, so that no run waits at
    a login prompt."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_key = "WANDB_API_KEY" in os.environ or (netrc.is_file() and "wandb" in netrc.read_text())
    return os.environ.get("WANDB_MODE", "online" if has_key else "offline")


def wandb_reachable(seconds=5):
    """Whether wandb's server answers; wandb itself would try for minutes."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY")):
        return True  # the proxy knows
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), seconds).close()
    except OSError:
        return False
    return True


def tracker_failures(tracker):
    """What wandb or trackio raise when their server, their disk or their key fails them."""
    return OSError, RuntimeError, ValueError, getattr(tracker, "Error", OSError)


def track(tracker, values):
    """Send values to a tracker; returns the tracker, None if it failed: it never ends a run."""
    try:
        tracker.log(values)
    except tracker_failures(tracker) as error:
        say(f"the tracker failed ({str(error)[:200]!r}); going on without it")
        return None
    return tracker


def start_tracker(name, project, run_name, output_dir, config):
    """The started module wandb or trackio; None if it can't start: a tracker never ends a run, one line says what is
    lost. ValueError if it is not installed. On rank 0."""
    try:
        tracker = importlib.import_module(name)
    except ImportError:
        raise ValueError(f"--report_to {name}: not installed; install it or pass --report_to none") from None
    options = {"project": project, "name": run_name, "config": config}
    if name == "wandb":
        mode = wandb_mode()
        if mode == "online" and not wandb_reachable():
            say("--report_to wandb: its server doesn't answer; offline, `wandb sync` uploads it later")
            mode = "offline"
        options |= {"dir": output_dir, "mode": mode}
    try:
        tracker.init(**options)
    except tracker_failures(tracker) as error:
        say(f"--report_to {name}: {type(error).__name__}: {str(error)[:200]!r}; going on without it")
        return None
    if name == "wandb":
        tracker.define_metric("*", step_metric="train/global_step")  # as transformers does
    return tracker


def finish(tracker):
    """Have a tracker (or None) upload the rest and end; a failure is one line."""
    if tracker is None:
        return
    try:
        tracker.finish()
    except tracker_failures(tracker) as error:
        say(f"the tracker failed at the end ({str(error)[:200]!r}); the run itself is whole")


def claim(output_dir):
    """Keep other runs out of output_dir (see `hold`).

    torchrun that dies by kill -9 leaves its workers training: a run that is resumed beside them would write over
    theirs, and they over its. Raises ValueError if another process is there.
    """
    os.makedirs(output_dir, exist_ok=True)
    busy = f"{output_dir}: another process is training there; end it, or take another --run_name"
    return hold(os.path.join(output_dir, ".lock"), busy)


def output_directory(args):
    """Where a run goes: --output_dir, else outputs/<--run_name>. Raises ValueError without either."""
    name = args.run_name
    if not args.output_dir and (not name.strip() or "/" in name or name in (".", "..")):
        raise ValueError(
            f"--run_name {name!r}: expected a name without a slash; the run's directory is outputs/<run_name>, or what"
            " --output_dir says"
        )
    return args.output_dir or os.path.join("outputs", args.run_name)


def setup_distributed(seconds=1800):
    """Join torchrun's process group, or make one of this process alone; returns this rank's device.

    seconds: how long a collective may wait for another rank.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    return device


@contextlib.contextmanager
def collector_at_rest():
    """Within: Python's garbage collector runs only where it is told to, young objects once a micro-batch.

    By itself it takes 0.28 ms a layer of the thread that launches kernels (forward and backward, on a CPU), and each
    rank at another time. It finds nothing that holds a tensor.
    """
    gc.collect()
    gc.freeze()  # the model and all modules: a later collection need not look at them
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0


def say(*words):
    """Print on rank 0, above a progress bar if there is one."""
    if is_main():
        tqdm.write(" ".join(map(str, words)))


# What must be the same when a run is resumed; a trainer that has no such argument leaves it out.
FACTS = (
    "seed global_batch_size learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm"
    " router_aux_loss_coef r lora_alpha expert_r use_dora lora_dropout target_modules base_dtype expert_arithmetic"
    " dtype bf16 fp16 optim adam_beta1 adam_beta2 adam_epsilon lr_scheduler_kwargs neftune_noise_alpha"
).split()
SINCE = {"base_dtype": None, "expert_arithmetic": "bf16"}  # a fact that runs older than it had this value of


def run_facts(arguments, fingerprint, total_steps):
    """What makes a run this run, by name: {"data", "total_steps"} and the FACTS in `arguments` (a dict by flag)."""
    facts = {name: arguments[name] for name in FACTS if name in arguments}
    facts["lora_alpha"] = arguments["lora_alpha"] or 2 * arguments["r"]
    return facts | {"data": fingerprint, "total_steps": total_steps}


def refuse_another_run(facts, before, where):
    """Raise ValueError if `before`, the facts that the file `where` recorded, are not this run's: resumed, it would be
    another run. A record may be older than a fact."""
    for name, value in facts.items():
        was = before.get(name, SINCE.get(name, value))
        if was != value:
            raise ValueError(
                f"--resume: {name} is {value}, but {where} says {was}; that is another run, for another --run_name"
            )


def write_arguments(arguments, facts, planned, world_size, dataset_commits):
    """outputs/<run>/args.json: what another person needs to repeat the run; returns the record.

    arguments: every flag by its name, with output_dir; facts: `run_facts`; planned: plan.py's plan or None;
    dataset_commits: the hub's commits of the data, by name, {} for files.
    """
    record = {
        "launcher": arguments["run_name"],
        "model": arguments["model_name_or_path"],
        "model_commit": hub_commit(arguments["model_name_or_path"], arguments.get("model_revision")),
        "dataset_commits": dataset_commits,
        "commit": git_commit(),
        "data": facts["data"],
        "world_size": world_size,
        "nodes": world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "planned_gib": planned and round(planned["peak_bytes"] / 2**30, 2),
        "facts": facts,
        "arguments": arguments,
    }
    os.makedirs(arguments["output_dir"], exist_ok=True)
    temporary = Path(arguments["output_dir"], "args.json.tmp")  # renamed: another process may be reading the old one
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, temporary.with_suffix(""))
    return record


def trim_log(output_dir, last_step):
    """Drop log.jsonl's records after `last_step`: these steps are trained, and logged, again. A last line may be cut
    short. Returns the file's path."""
    path = Path(output_dir, "log.jsonl")
    if path.exists():
        kept = []
        for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number}: no record of a step; remove the line") from None
        temporary = path.with_suffix(".tmp")  # renamed: a crash must not lose the log
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
    return path


def count_steps(packs, global_batch_size, num_train_epochs, max_steps=None):
    """(optimiser steps of an epoch of `packs` packs, steps of the run)."""
    steps_an_epoch = math.ceil(packs / global_batch_size)
    return steps_an_epoch, max_steps or math.ceil(steps_an_epoch * num_train_epochs)


def batch_arithmetic(packs, max_seq_length, global_batch_size, world_size, micro_batch, steps_an_epoch, total_steps):
    """(micro-batches of a rank and step, a line that says how packs become optimiser steps). Asserts that they do.

    A second line warns where a step takes more packs than an epoch has.
    """
    if global_batch_size % (world_size * micro_batch):
        raise ValueError(
            f"--global_batch_size {global_batch_size} is no multiple of {world_size} ranks x {micro_batch} packs"
        )
    accumulation = global_batch_size // (world_size * micro_batch)
    assert world_size * micro_batch * accumulation == global_batch_size
    assert steps_an_epoch * global_batch_size >= packs
    short = (
        ""
        if global_batch_size <= packs
        else (
            f"\nwarning: --global_batch_size {global_batch_size:,} is more than the {packs:,} packs of an epoch: a step"
            f" has {packs:,}, an epoch is one step; give {packs:,} or fewer, or more data"
        )
    )
    return accumulation, (
        f"{world_size} ranks x {micro_batch} packs x {accumulation} micro-batches = {global_batch_size} packs a step ="
        f" {global_batch_size * max_seq_length:,} tokens at most; {packs:,} packs = {steps_an_epoch:,} steps an epoch,"
        f" {total_steps / steps_an_epoch:.4g} epochs = {total_steps:,} steps{short}"
    )


class NotFinite:
    """Counts steps whose loss or gradient is not finite: they change nothing, and too many in a row end the run."""

    def __init__(self, output_dir, most):
        self.path, self.most = Path(output_dir, "skipped.jsonl"), most
        self.skipped = self.in_a_row = 0

    def see(self, finite):
        """To be told of every step."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.skipped += not finite

    def keep(self, step, loss, grad_norm, documents):
        """Keep which documents (their indices in the training set) a skipped step had; raises ValueError for too many
        skipped in a row. On every rank."""
        if is_main():
            record = {"step": step, "loss": loss, "grad_norm": grad_norm, "documents": [int(i) for i in documents]}
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        words = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        if self.in_a_row >= self.most:
            raise ValueError(
                f"{words}; {self.in_a_row} steps in a row were not finite and changed nothing (--max_skipped_steps"
                f" {self.most}); their documents are in {self.path}"
            )
        say(f"{words}: skipped; its documents are in {self.path}")


def learning_rate_factor(step, total_steps, warmup_steps):
    """The learning rate of step `step` (0-based) as a share of its peak: linear warm-up, the first step at
    1 / warmup_steps, then linear decay that would reach 0 one step after the last."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(total_steps - step, 0) / max(1, total_steps - warmup_steps)


def step_line(record, total_steps):
    """A step's record for the terminal, aligned, at most 120 columns."""
    if "loss" not in record:
        return f"step {record['step']:,}/{total_steps:,}  validation loss {record['validation_loss']:.4f}"
    parts = [
        f"step {record['step']:>{len(f'{total_steps:,}')},}/{total_steps:,}",
        f"epoch {record['epoch']:5.2f}",
        f"loss {record['loss']:7.4f}",
        f"norm {record['grad_norm']:5.2f}",
        f"lr {record['learning_rate']:.2e}",
        f"{record['tokens_per_second']:>8,.0f} tok/s",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:5.1%}")
    if record.get("peak_gib") is not None:
        parts.append(f"{record['peak_gib']:5.1f} GiB")
    if record.get("validation_loss") is not None:
        parts.append(f"val {record['validation_loss']:.4f}")
    return "  ".join(parts)


class Log:
    """The same record to the terminal, log.jsonl and the tracker. On rank 0; elsewhere it does nothing."""

    def __init__(self, args, config, first_step, total_steps):
        self.tracker = self.file = None
        self.total_steps = total_steps
        if not is_main():
            return
        self.file = open(trim_log(args.output_dir, first_step), "a", buffering=1)
        if args.report_to != "none":
            self.tracker = start_tracker(args.report_to, args.project, args.run_name, args.output_dir, config)

    def write(self, record):
        if self.file is None:
            return
        self.file.write(json.dumps(record) + "\n")
        values = {key: value for key, value in record.items() if value is not None}
        say(step_line(record, self.total_steps))
        if self.tracker is not None:
            # transformers' names, so that the dense runs of the project are drawn in the same charts
            named = {f"train/{key}": value for key, value in values.items()}
            self.tracker = track(self.tracker, named | {"train/global_step": record["step"]})

    def close(self):
        if self.file is not None:
            self.file.close()
        finish(self.tracker)


def router_record(counts):
    """What of (layers, E) token counts goes in the log: the busiest expert's load over the mean, and experts without a
    token."""
    ratio = counts.max(dim=1).values / counts.double().mean(dim=1)
    return {
        "expert_load_max_over_mean": round(ratio.mean().item(), 3),
        "expert_load_worst_layer": round(ratio.max().item(), 3),
        "dead_experts": int((counts == 0).sum()),
    }
