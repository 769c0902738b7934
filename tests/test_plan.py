"""plan.py's page and command, and what they say of evaluation and schedule."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import plan
import train_dense
import train_moe
from conftest import CONFIGS, LAUNCHERS, launcher_flags, real_config
from malaysian_sft.account import (
    count_parameters,
)
from malaysian_sft.plan_page import (
    PlanArguments,
    dry_run,
    plan_evaluation,
    schedule,
)

ROOT = Path(__file__).parents[1]


def test_dry_run_refuses_on_a_gpu_after_printing(monkeypatch, capsys):
    machine = {"gpus": 2, "nodes": 1, "gpu_memory_gib": 79.0}
    monkeypatch.setattr("malaysian_sft.plan_page.this_machine", lambda whole: dict(machine))
    arguments = dict(kind="dense", micro_batch=1, activations="full")
    with pytest.raises(ValueError, match="Take more GPUs"):
        dry_run(str(CONFIGS["Qwen2.5-72B-Instruct"]), None, 3, **arguments)
    assert "1 x 2 GPUs of 79 GiB" in capsys.readouterr().out
    machine["gpu_memory_gib"] = None
    dry_run(str(CONFIGS["Qwen2.5-72B-Instruct"]), None, 3, **arguments)
    assert "No GPU here: planned for 2 of 80 GiB" in capsys.readouterr().out
    monkeypatch.setenv("NUM_GPUS", "4")  # a launcher's
    dry_run(str(CONFIGS["Qwen2.5-72B-Instruct"]), None, 3, **arguments)
    assert "planned for 4 of 80 GiB" in capsys.readouterr().out


def test_evaluation_by_hand():
    """Qwen3-235B over 8 GPUs: 4 key-value heads are replicated, one on each GPU; 94 layers of keys and values of 128 in
    bf16."""
    vllm = plan_evaluation(real_config("Qwen3-235B-A22B-Instruct-2507"), gpu_partition=8)
    assert vllm["kv_bytes_per_token"] == 94 * 2 * 128 * 2
    assert vllm["weights_bytes"] == 235_093_634_560 * 2 // 8
    assert vllm["cache_bytes"] == pytest.approx(0.92 * 80 * 2**30 - 235_093_634_560 * 2 / 8 - 3 * 2**30, abs=2)
    assert vllm["fits"] and not plan_evaluation(real_config("Qwen3-235B-A22B-Instruct-2507"), gpu_partition=4)["fits"]
    with pytest.raises(ValueError, match="64 attention heads"):
        plan_evaluation(real_config("Qwen3-32B"), gpu_partition=3)


def test_schedule_covers_every_token():
    run = schedule(144e6, 16384, 32, epochs=3)
    assert run["packs"] * 16384 * 0.995 >= 144e6 > (run["packs"] - 1) * 16384 * 0.995
    assert run["steps_per_epoch"] * 32 >= run["packs"] and run["steps"] == 3 * run["steps_per_epoch"]


TRAINERS = {"ds3": train_dense, "fsdp2": train_moe}
STAND_IN = {"ds3": "Qwen3-32B", "fsdp2": "Qwen3-30B-A3B-Instruct-2507"}


@pytest.fixture
def page(monkeypatch, capsys):
    """page(launcher, *flags, config=, **PlanArguments): what plan.py's launch would print, without its processes."""

    def call(launcher, *flags, config, **wanted):
        asked = PlanArguments(config=str(CONFIGS[config]), **wanted)
        monkeypatch.setenv("PLAN_ARGUMENTS", json.dumps(dataclasses.asdict(asked)))
        monkeypatch.setenv("NUM_GPUS", "8")
        monkeypatch.setattr(sys, "argv", ["trainer", *launcher_flags(launcher), "--dry_run", "True", *map(str, flags)])
        TRAINERS[Path(launcher).name.split("-")[0]].main()
        return capsys.readouterr().out

    return call


def rows(printed):
    """The table of ways to run: lists of words, best first."""
    return [line.split() for line in printed.split("best first\n")[1].split("\n\n")[0].splitlines()[1:]]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.stem)
def test_every_launcher_can_be_planned(launcher, page):
    name = re.search(r"--model_name_or_path \S*?/?([^/\s]+)\n", launcher.read_text())[1]
    # without the model's config.json in tests/configs, as a model of its kind would be
    name = name if name in CONFIGS else STAND_IN[launcher.name.split("-")[0]]
    printed = page(launcher, config=name, gpu_memory=140)
    adapter_kind = "DoRA" if "dora" in launcher.stem else "LoRA"
    assert f"{adapter_kind} r 256" in printed and "A step: 8 GPUs x 1 x 4 micro-batches = 32 packs" in printed
    assert "best" in " ".join(rows(printed)[0]) and printed.count("as launched") == 1
    assert f"{count_parameters(real_config(name))['total']:,}" in printed


def test_a_page_refuses_what_cannot_fit_and_takes_the_trainers_flags(page):
    launcher, config = ROOT / "ds3-qwen2.5-72b-lora-256.sh", "Qwen2.5-72B-Instruct"
    with pytest.raises(
        SystemExit, match="Largest: kept activations 19.8 GiB, frozen base, bf16 shard 16.9 GiB.*Lower --max_seq_length"
    ):
        page(launcher, config=config, gpu_memory=24)
    flags = "--lora_r 64 --max_seq_length 4096 --per_device_train_batch_size 2".split()
    printed = page(launcher, *flags, config=config)
    assert "LoRA r 64" in printed and "8 GPUs x 2 x 2 micro-batches = 32 packs of 4,096 tokens" in printed


def test_a_page_marks_what_is_better_than_the_launch(page):
    launcher, config = ROOT / "fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh", "Qwen3-30B-A3B-Instruct-2507"
    table = rows(page(launcher, "--activations", "full", config=config, gpu_memory=140))
    assert table[0][1] == "none" and "best" in table[0]
    (launched,) = [row for row in table if "launched" in row]
    assert launched[1] == "full" and "best" not in launched


@pytest.mark.parametrize("memory, activations", [(140, "none"), (26, "full")])
def test_a_page_chooses_what_the_launcher_leaves_open(memory, activations, page):
    launcher, config = ROOT / "fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh", "Qwen3-30B-A3B-Instruct-2507"
    for flags in ([], ["--activations", "auto"]):
        table = rows(page(launcher, *flags, config=config, gpu_memory=memory))
        assert table[0][1] == activations and table[0][-3:] == ["best,", "as", "launched"]


def test_a_page_says_which_flags_would_fit(page, capsys):
    launcher, config = ROOT / "ds3-qwen3-32b-lora-256.sh", "Qwen3-32B"
    with pytest.raises(SystemExit, match="Largest: kept activations 160.0 GiB"):
        flags = "--per_device_train_batch_size 2 --max_seq_length 131072 --activations full".split()
        page(launcher, *flags, config=config)
    assert not any("best" in " ".join(row) for row in rows(capsys.readouterr().out))
    with pytest.raises(SystemExit, match="--activations none"):
        page(launcher, "--activations", "none", config=config)
    printed = capsys.readouterr().out
    fits = (
        r"This launch doesn't fit; with --activations selective --frugal_layers \d+ --per_device_train_batch_size 1 it"
    )
    assert re.search(f"{fits} does", printed)


def run_plan(*words):
    """plan.py as a command."""
    command = [sys.executable, str(ROOT / "plan.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_the_command_is_the_launcher_with_dry_run(tmp_path):
    words = ["--config", CONFIGS["Qwen3-32B"], "--gpu_memory", 80, "--nodes", 2, "--global_batch_size", 64]
    done = run_plan(ROOT / "ds3-qwen3-32b-lora-256.sh", *words)
    assert done.returncode == 0, done.stderr
    assert "2 x 8 GPUs of 80 GiB" in done.stdout and "= 64 packs of 16,384 tokens" in done.stdout
    launcher = tmp_path / "mine.sh"
    launcher.write_text(f'python3 {ROOT}/train_dense.py --model_name_or_path nobody/no-such-model "$@"\n')
    done = run_plan(launcher)
    assert done.returncode and re.search(r"error: nobody/no-such-model.*--config FILE", done.stderr), done.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("touch {folder}/ran\n", "starts neither train_dense.py nor train_moe.py"),
        ("touch {folder}/ran\npython3 train_moe.py --r 8\n", "does not hand its flags to the trainer"),
        (None, "no such launcher"),
    ],
)
def test_what_is_no_launcher_is_not_run(text, message, tmp_path):
    launcher = tmp_path / "mine.sh"
    if text is not None:
        launcher.write_text(text.format(folder=tmp_path))
    with pytest.raises(ValueError, match=message):
        plan.check_launcher(launcher)
    assert not (tmp_path / "ran").exists()
