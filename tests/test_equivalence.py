"""A run is the same run however it is spread: {1, 2} processes x accumulation x {LoRA, DoRA} x both trainers x {resumed
or not}. A step's packs are the same two or four; one process takes them one after another, two share them.

Losses, gradient norms and the saved adapter of one process, unbroken, are what the others must come to. In fp32; sums
of a few hundred terms in another order differ by some 1e-5, of which Adam's first steps, which divide by the gradient's
size, make up to 1e-4 (`same` and `equals_unbroken` have the bounds). `-m slow` runs the cells that CI does not."""

import itertools
import os
import shutil
import subprocess
import sys

import pytest
from test_fault_matrix import equals_unbroken, without
from test_faults import FLAGS, ROOT, STEPS, TRAINERS, workspace

__all__ = ["workspace"]  # a fixture
IN_CI = {("moe", "dora", 4), ("dense", "dora", 4)}
CELLS = [
    pytest.param(*cell, marks=() if cell in IN_CI else pytest.mark.slow)
    for cell in itertools.product(TRAINERS, ("lora", "dora"), (2, 4))
]


def run(workspace, trainer, out, processes, *flags):
    """The trainer's command on so many processes; what it printed if it failed."""
    _, module, dtype = TRAINERS[trainer]
    words = (
        f"{FLAGS} {dtype} --model_name_or_path {workspace / trainer} --dataset {workspace}/train.jsonl --run_name run"
    )
    words += f" --data_cache {workspace}/cache --output_dir {out} --max_steps {STEPS} --ddp_timeout 120"
    words += " --save_strategy steps --disable_tqdm True" if trainer == "dense" else ""
    command = [sys.executable, module.__file__]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "malaysian_sft.launch",
            "--nproc_per_node",
            str(processes),
            "--",
            module.__file__,
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [*words.split(), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("trainer", "adapter", "batch"), CELLS)
def test_any_spread_and_any_break_is_the_same_run(trainer, adapter, batch, workspace, tmp_path):
    flags = "--global_batch_size", batch, "--use_dora", adapter == "dora"
    one, two = tmp_path / "one", tmp_path / "two"
    run(workspace, trainer, one, 1, *flags)
    run(workspace, trainer, two, 2, *flags)
    equals_unbroken(two, one)
    for processes in (1, 2):  # after step 3 of the two processes' run
        broken = shutil.copytree(two, tmp_path / f"resumed-{processes}")
        without(broken, 4)
        run(workspace, trainer, broken, processes, *flags, "--resume", "True")
        equals_unbroken(broken, one)
