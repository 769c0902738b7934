"""What is recorded of a run: its arguments, its log, the tracker, the commit; and that one process group has its
directory."""

import dataclasses
import fcntl
import importlib
import json
import os
import subprocess
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm


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


def claim(output_dir):
    """Keep other runs out of output_dir while the file that is returned is open; the kernel closes it when the process
    dies.

    torchrun that dies by kill -9 leaves its workers training: a run that is resumed beside them would write over
    theirs, and they over its. Raises ValueError if another process is there.
    """
    os.makedirs(output_dir, exist_ok=True)
    lock = open(os.path.join(output_dir, ".lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"{output_dir}: another process is training there; end it, or take another --run_name"
        ) from None
    return lock


def setup_distributed():
    """Join torchrun's process group, or make one of this process alone; returns this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
    return device


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0


def say(*words):
    """Print on rank 0, above a progress bar if there is one."""
    if is_main():
        tqdm.write(" ".join(map(str, words)))


def write_arguments(args, data_args, lora_args, fingerprint, planned):
    """outputs/<run>/args.json: what another person needs to repeat the run; returns the record."""
    arguments = {
        key: value for group in (args, data_args, lora_args) for key, value in dataclasses.asdict(group).items()
    }
    record = {
        "launcher": args.run_name,
        "model": args.model_name_or_path,
        "commit": git_commit(),
        "data": fingerprint,
        "world_size": dist.get_world_size(),
        "planned_gib": planned and round(planned["peak_bytes"] / 2**30, 2),
        "arguments": arguments,
    }
    os.makedirs(args.output_dir, exist_ok=True)
    Path(args.output_dir, "args.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


class Log:
    """The same record to the terminal, log.jsonl and the tracker. On rank 0; elsewhere it does nothing."""

    def __init__(self, args, config, first_step):
        self.tracker = self.file = None
        if not is_main():
            return
        path = Path(args.output_dir, "log.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # steps after the checkpoint that a resumed run goes on from are trained, and logged, again; a last line may be
        # cut short
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first_step]
        path.write_text("".join(kept))
        self.file = open(path, "a", buffering=1)
        if args.report_to != "none":
            try:
                self.tracker = importlib.import_module(args.report_to)
            except ImportError:
                raise ValueError(
                    f"--report_to {args.report_to}: not installed; install it or pass --report_to none"
                ) from None
            options = {"project": args.project, "name": args.run_name, "config": config}
            if args.report_to == "wandb":
                options |= {"dir": args.output_dir, "mode": wandb_mode()}
            self.tracker.init(**options)
            if args.report_to == "wandb":
                self.tracker.define_metric("*", step_metric="train/global_step")  # as transformers does

    def write(self, record):
        if self.file is None:
            return
        self.file.write(json.dumps(record) + "\n")
        values = {key: value for key, value in record.items() if value is not None}
        say(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
            )
        )
        if self.tracker is not None:
            # transformers' names, so that the dense runs of the project are drawn in the same charts
            self.tracker.log(
                {f"train/{key}": value for key, value in values.items()} | {"train/global_step": record["step"]}
            )

    def close(self):
        if self.file is not None:
            self.file.close()
        if self.tracker is not None:
            self.tracker.finish()


def router_record(counts):
    """What of (layers, E) token counts goes in the log: the busiest expert's load over the mean, and experts without a
    token."""
    ratio = counts.max(dim=1).values / counts.double().mean(dim=1)
    return {
        "expert_load_max_over_mean": round(ratio.mean().item(), 3),
        "expert_load_worst_layer": round(ratio.max().item(), 3),
        "dead_experts": int((counts == 0).sum()),
    }


def print_batch_arithmetic(args, dataset, data_args, steps_an_epoch, total_steps):
    """Print, and assert, how packs become optimiser steps; returns the micro-batches of a rank and step."""
    world = dist.get_world_size()
    if args.global_batch_size % world:
        raise ValueError(f"--global_batch_size {args.global_batch_size} is not a multiple of {world} ranks")
    micro = args.global_batch_size // world
    assert world * micro == args.global_batch_size and steps_an_epoch * args.global_batch_size >= len(dataset)
    say(
        f"{world} ranks x {micro} packs, one at a time = {args.global_batch_size} packs a step ="
        f" {args.global_batch_size * data_args.max_seq_length:,} token places; {len(dataset):,} packs ="
        f" {steps_an_epoch:,} steps an epoch, {total_steps / steps_an_epoch:.4g} epochs = {total_steps:,} steps"
    )
    return micro
