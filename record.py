"""What both trainers do in the same way: note the commit of the code, talk to wandb or not, find what to resume from, keep others out."""

import fcntl
import os
import re
import subprocess
from pathlib import Path


def git_commit():
    """The commit of the code that runs, with "+" when the tree differs from it; None outside a git checkout or without git."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if commit.returncode:
        return None
    dirty = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True).stdout.strip()
    return commit.stdout.strip() + ("+" if dirty else "")


def wandb_mode():
    """WANDB_MODE if it is set; else "online" where wandb finds a key, and "offline" elsewhere, so that no run waits at a login prompt."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_key = "WANDB_API_KEY" in os.environ or (netrc.is_file() and "wandb" in netrc.read_text())
    return os.environ.get("WANDB_MODE", "online" if has_key else "offline")


def claim(output_dir):
    """Keep other runs out of output_dir while the file that is returned is open; the kernel closes it when the process dies.

    torchrun that dies by kill -9 leaves its workers training: a run that is resumed beside them would write over theirs, and they over
    its. Raises ValueError if another process is there.
    """
    os.makedirs(output_dir, exist_ok=True)
    lock = open(os.path.join(output_dir, ".lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{output_dir}: another process is training there; end it, or take another --run_name") from None
    return lock


def newest_checkpoint(output_dir, resume, fault, say):
    """The newest complete checkpoint-<step> under output_dir, or None to start anew. Raises ValueError rather than write over a run.

    fault(directory) says what a checkpoint lacks, None if it is complete; say(line) tells the user. A run that was killed must go on by
    --resume alone: an incomplete checkpoint is passed over, and written again when the run gets there; a run that was started and has no
    complete one starts anew.
    """
    out = Path(output_dir)
    found = {int(path.name.split("-")[1]): path for path in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)}
    if not resume:
        if found:
            raise ValueError(f"{found[max(found)]} exists: pass --resume to go on, or another --run_name or --output_dir")
        return None
    for step, directory in sorted(found.items(), reverse=True):
        lacking = fault(directory)
        if lacking is None:
            return directory
        say(f"--resume: {directory} is incomplete ({lacking}): skipped, and written again when the run gets to step {step}")
    if not found and not (out / "args.json").exists():
        raise ValueError(f"--resume: no run under {out}; check --run_name, or start without --resume")
    say(f"--resume: no complete checkpoint under {out}: starting anew")
    return None
