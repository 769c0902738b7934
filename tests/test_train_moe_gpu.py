"""train_moe.py run whole on one GPU: kernels, FSDP2, checkpoints, against the same run in fp32 on the CPU. `pytest -m
gpu`."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import save_tiny_checkpoint
from malaysian_sft.verify import verify_adapter

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: its directory}: the runs compared below, each a process of its own, all started at once."""
    root = tmp_path_factory.mktemp("gpu")
    # sizes that the Hopper kernels take; ranks 32, and 16 an expert
    save_tiny_checkpoint(root / "model", "qwen3_moe", hidden_size=128, moe_intermediate_size=128, head_dim=64)
    generator = random.Random(0)
    with open(root / "chat.jsonl", "w") as f:
        for _ in range(60):
            answer = " ".join(
                generator.choice(["saya", "makan", "nasi", "lemak", "esok"]) for _ in range(generator.randint(2, 25))
            )
            f.write(json.dumps({"question": "Apa khabar?", "answer": answer}) + "\n")
    common = (
        f"--model_name_or_path {root}/model --dataset {root}/chat.jsonl --max_seq_length 512 --global_batch_size 4"
        " --r 32"
    )
    common += f" --learning_rate 5e-3 --warmup_steps 2 --report_to none --max_steps {STEPS}"
    flags = {
        "cpu": "--dtype float32",
        "none": "--activations none",
        "selective": "--activations selective",
        "full": "--activations full --save_steps 1",
        "broken": "--activations full",
        "dora": "--activations none --use_dora True",
        "graphs": "--activations none --cuda_graphs True",
        "graphs-selective": "--activations selective --memory_mode frugal --cuda_graphs True",
        "graphs-dora": "--activations none --use_dora True --cuda_graphs True --validation_share 0.1",
    }
    if torch.cuda.get_device_capability() >= (9, 0):
        flags["fp8"] = "--activations none --base_dtype fp8 --expert_arithmetic fp8 --transposed_layers 0"
        flags["fp8-kept"] = flags["fp8"].replace("--transposed_layers 0", "--transposed_layers 2")
        flags["graphs-fp8"] = flags["fp8"] + " --cuda_graphs True"
        flags["fp8-cpu"] = "--dtype float32 --base_dtype fp8 --expert_arithmetic fp8"
    started = {
        name: start(root, name, [*common.split(), *more.split()], stop_in=3 if name == "broken" else 0)
        for name, more in flags.items()
    }
    finish(started)
    assert len(losses(root / "broken")) == 3
    finish({"broken": start(root, "broken", [*common.split(), *flags["full"].split(), "--resume"])})
    return {name: root / name for name in flags}


RUN = """
import signal, train_moe
clip, calls = train_moe.clip_gradients, []

def stopping(*args):
    calls.append(1)
    if len(calls) == {stop_in}:
        signal.raise_signal(signal.SIGTERM)
    return clip(*args)

train_moe.clip_gradients = stopping
train_moe.main()
"""


def start(root, name, flags, stop_in=0):
    """A run in a process of its own, which gets SIGTERM in step `stop_in`."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if name.endswith("cpu") else {}
    common = ["--run_name", name, "--output_dir", root / name, "--data_cache", root / f"{name}-data"]
    command = [sys.executable, "-c", RUN.format(stop_in=stop_in), *common, *flags]
    environment = {**os.environ, **hidden, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(started):
    for name, process in started.items():
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: {output[-4000:]}"


def records(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def losses(directory):
    return [record["loss"] for record in records(directory)]


def test_a_gpu_follows_the_cpu(runs):
    truth = losses(runs["cpu"])
    assert len(truth) == STEPS and truth[-1] < truth[0]
    for name in (
        "none",
        "selective",
        "full",
        "dora",
        "graphs",
        "graphs-selective",
    ):  # their start is drawn on the GPU, and B is zero in it
        found = losses(runs[name])
        assert found[0] == pytest.approx(truth[0], rel=5e-3) and found == pytest.approx(truth, rel=0.1), name


def test_products_in_fp8_follow_the_cpu_s(runs):
    if "fp8" not in runs:
        pytest.skip("products in FP8 need a Hopper GPU or newer")
    found, truth = losses(runs["fp8"]), losses(runs["fp8-cpu"])
    assert found[0] == pytest.approx(truth[0], rel=5e-3) and found == pytest.approx(truth, rel=0.1)


def test_what_is_recomputed_changes_nothing(runs):
    for name in ("selective", "full"):
        assert losses(runs[name]) == pytest.approx(losses(runs["none"]), rel=2e-2), name


def test_transposes_that_are_kept_change_nothing(runs):
    if "fp8" in runs:
        assert losses(runs["fp8-kept"]) == pytest.approx(losses(runs["fp8"]), rel=1e-3)


def test_graphs_change_nothing(runs):
    """Packs are padded, so sums are made in another order: bounds as for what is recomputed."""
    for name in ("graphs", "graphs-selective", "graphs-fp8"):
        if name in runs:
            plain = runs["fp8" if name == "graphs-fp8" else "none"]
            assert losses(runs[name]) == pytest.approx(losses(plain), rel=2e-2), name
            for a, b in zip(records(runs[name]), records(plain), strict=True):
                assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.1), (name, a["step"])
                assert a["expert_load_max_over_mean"] == pytest.approx(b["expert_load_max_over_mean"], rel=0.1), (
                    name,
                    a["step"],
                )
    # its packs are fewer by the validation's, so it is held to its own start: DoRA begins as LoRA does, and learns
    found = losses(runs["graphs-dora"])
    assert len(found) == STEPS and found[-1] < found[0] and found[0] == pytest.approx(losses(runs["dora"])[0], rel=0.05)


def test_a_resumed_run_equals_an_unbroken_one(runs):
    assert len(losses(runs["broken"])) == STEPS
    assert losses(runs["broken"]) == pytest.approx(losses(runs["full"]), rel=1e-2)


def test_every_adapter_is_whole(runs):
    for name, directory in runs.items():
        assert verify_adapter(directory / f"checkpoint-{STEPS}", directory.parent / "model") == [], name


def test_the_log_says_how_fast_and_how_much(runs):
    record = json.loads((runs["none"] / "log.jsonl").read_text().splitlines()[-1])
    assert record["tokens_per_second"] > 0 and record["peak_gib"] > 0
