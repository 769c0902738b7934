"""What a launcher's run needs and what it is worth, before it starts; no weights, no GPU.

    python3 plan.py fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh --gpus 8 --gpu_memory 80

runs the launcher with --dry_run, for the GPUs that are asked for, and so prints what its trainer would choose itself
(malaysian_sft/plan_page.py; parameters and FLOPs as account.py counts them). Flags of the trainer may follow. Exits
with 1 when the run doesn't fit.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from malaysian_sft.plan_page import PlanArguments

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


def main():
    from transformers import HfArgumentParser

    parser = HfArgumentParser(PlanArguments, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("launcher", help="a launcher of this repository, such as ds3-qwen3-32b-lora-256.sh")
    arguments, positional, flags = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    try:
        check_launcher(positional.launcher)
    except ValueError as error:
        sys.exit(f"error: {error}")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the launcher's python3 is this one
    environment = {**os.environ, "PATH": path, "PLAN_ARGUMENTS": json.dumps(asdict(arguments))}
    sys.exit(subprocess.run(["bash", positional.launcher, "--dry_run", "True", *flags], env=environment).returncode)


if __name__ == "__main__":
    main()
