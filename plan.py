"""What a run needs and reaches, before it starts and after; no weights, no GPU.

    python3 plan.py fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh --gpus 8 --gpu_memory 80
    python3 plan.py --all --gpus 8 --gpu_memory 80         one table over all launchers, and what other hardware does
    python3 plan.py --all --write --configs tests/configs  README's table and the launchers' headers from it
    python3 plan.py --measure                              this machine's rates, for the time; one to all its GPUs
    python3 plan.py --compare outputs/RUN [outputs/RUN]    planned beside measured, and plots of any number of runs

The first runs the launcher with --dry_run, for the GPUs that are asked for, and so prints what its trainer would choose
itself (malaysian_sft/plan_page.py; parameters and FLOPs as account.py counts them, time as timing.py does). Flags of
the trainer may follow. Exits with 1 when the run doesn't fit.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from malaysian_sft.flags import OneLineParser, check_values, refuse_unknown
from malaysian_sft.plan_page import PlanArguments, check_launcher

ROOT = Path(__file__).resolve().parent


def parse(words=None):
    """(PlanArguments, what is asked for, the trainer's flags). Raises ValueError for what does not go together."""
    from transformers import HfArgumentParser

    class Parser(OneLineParser, HfArgumentParser):
        pass

    parser = Parser(PlanArguments, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("launcher", nargs="?", help="a launcher of this repository, such as ds3-qwen3-32b-lora-256.sh")
    parser.add_argument("--all", action="store_true", help="one table over all launchers")
    parser.add_argument(
        "--configs", help="with --all or --compare: directory of <model's name>.json, where the hub can't be asked"
    )
    parser.add_argument("--write", action="store_true", help="with --all: write README's table and launchers' headers")
    parser.add_argument("--measure", action="store_true", help="measure this machine's rates into <results>/rates.json")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="directories of runs, such as outputs/NAME")
    parser.add_argument("--plot", help="with --compare: PNG to draw; default: plan.png in the first RUN")
    arguments, asked, flags = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if asked.all or asked.measure or asked.compare:
        refuse_unknown(parser._option_string_actions, flags)
    modes = [name for name in ("launcher", "all", "measure", "compare") if getattr(asked, name)]
    if len(modes) != 1:
        got = ", ".join(asked.launcher if name == "launcher" else f"--{name}" for name in modes) or "none"
        parser.error(f"expected one of LAUNCHER, --all, --measure and --compare; got {got}")
    for name, mode in {"write": "all", "plot": "compare"}.items():
        if getattr(asked, name) and mode not in modes:
            parser.error(f"--{name} goes with --{mode}")
    if asked.configs and not (asked.all or asked.compare):
        parser.error("--configs goes with --all or --compare; a launcher takes --config FILE")
    if flags and modes != ["launcher"]:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return arguments, asked, flags


def plan_one(launcher, arguments, flags):
    """Run the launcher with --dry_run; returns its exit code."""
    check_launcher(launcher)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the launcher's python3 is this one
    environment = {**os.environ, "PATH": path, "PLAN_ARGUMENTS": json.dumps(asdict(arguments))}
    return subprocess.run(["bash", launcher, "--dry_run", "True", *flags], env=environment).returncode


def main():
    try:
        arguments, asked, flags = parse()
        check_values(arguments)
        if asked.launcher:
            sys.exit(plan_one(asked.launcher, arguments, flags))
        if asked.all:
            from malaysian_sft.plan_table import print_all

            launchers = [path for kind in ("ds3", "fsdp2") for path in sorted(ROOT.glob(f"{kind}-*.sh"))]
            print_all(launchers, arguments, asked.configs, asked.write)
        elif asked.measure:
            from malaysian_sft.measure_rates import measure

            measure(Path(arguments.results, "rates.json"))
        else:
            from malaysian_sft.run_plots import compare

            compare(asked.compare, asked.plot, arguments, asked.configs)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
