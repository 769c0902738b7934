"""bench_multi_gpu.py where it can be checked without several GPUs: its arithmetic, its models, and (slow) the program
on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import bench_multi_gpu  # noqa: E402 (its directory must be on the path first)
import bench_train_moe  # noqa: E402
import multi_gpu_measurements  # noqa: E402

from malaysian_sft.account import count_parameters  # noqa: E402


@pytest.mark.parametrize(
    ("communication", "compute", "expected"),
    [
        ([(0, 10)], [], 10),
        ([(0, 10)], [(0, 10)], 0),
        ([(0, 10)], [(2, 4), (3, 6)], 6),  # kernels that overlap hide the same time once
        ([(0, 10), (5, 15)], [(12, 20)], 12),  # two collectives at once take their time once
        ([(8, 9), (0, 4), (8, 9)], [(3, 8), (20, 30)], 4),  # in any order; what is computed elsewhere hides nothing
        ([], [(0, 5)], 0),
    ],
)
def test_communication_that_nothing_hides(communication, compute, expected):
    assert multi_gpu_measurements.not_hidden(communication, compute) == expected


def test_kernels_are_told_apart():
    def event(name, start, end, cuda=True, annotation=False):
        device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        times = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=times, device_type=device, is_user_annotation=annotation)

    events = [
        event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 0, 5),
        event("nvjet_hsh_256x128_64x4", 3, 4),
        event("Memcpy DtoD (Device -> Device)", 0, 9),
        event("FSDP::all_gather", 0, 9, annotation=True),  # would seem to compute all the while
        event("aten::mm", 0, 9, cuda=False),
    ]
    assert multi_gpu_measurements.intervals_by_kind(events, cuda=True) == ([(0, 5)], [(3, 4)])
    events = [
        event("gloo:all_gather", 1, 2, cuda=False),
        event("aten::mm", 3, 4, cuda=False),
        event("FSDP::pre_forward", 0, 9, cuda=False),
    ]
    assert multi_gpu_measurements.intervals_by_kind(events, cuda=False) == ([(1, 2)], [(3, 4)])


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "glm-4.5-air", "qwen3-235b-a22b"])
def test_models_have_the_published_number_of_parameters(name):
    published = multi_gpu_measurements.published_config(name)
    made = bench_train_moe.make_config(name, published.num_hidden_layers)
    assert count_parameters(made, r=256) == count_parameters(published, r=256)


def test_random_packs_are_what_train_dense_counts():
    packs = multi_gpu_measurements.RandomPacks(3, 200, 50)
    for pack, documents in zip(packs.packs, packs, strict=True):
        assert [len(document["input_ids"]) for document in documents] == packs.lengths[pack].tolist()
    assert sum(map(len, packs.packs)) == len(packs.lengths)


def test_what_there_is_no_time_for_is_named(tmp_path, capsys):
    host = bench_multi_gpu.Host(bench_multi_gpu.Arguments(gpus=8, minutes=0.0), tmp_path)
    bench_multi_gpu.measure_scaling(host, ["qwen3-30b-a3b", "glm-4.5-air"])
    assert host.failures == [f"scaling qwen3-30b-a3b on {n}" for n in (1, 2, 4, 8)] + ["scaling glm-4.5-air on 8"]
    assert capsys.readouterr().out.count("failed: no time left") == 5 and host.records == []


def test_losses_are_compared_step_by_step(tmp_path):
    for name, losses in (("a", [4.0, 3.0, 2.0, 1.0]), ("b", [4.0, 3.0, 2.5, 1.0]), ("short", [4.0, 3.0, 2.0])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, start=1)]
        (tmp_path / name / "log.jsonl").write_text("\n".join(lines) + "\n")
    a, b, short = (tmp_path / name for name in ("a", "b", "short"))
    assert bench_multi_gpu.difference_of_losses(a, b) == pytest.approx(0.2)
    assert bench_multi_gpu.difference_of_losses(b, a) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="3 and 4 steps"):
        bench_multi_gpu.difference_of_losses(short, b)


@pytest.mark.slow
def test_two_processes_measure_everything(tmp_path):
    flags = "--gpus 2 --models tiny --parts scaling,correctness,dense --tokens 256 --r 8 --minutes 20".split()
    program = [
        sys.executable,
        ROOT / "benchmarks" / "bench_multi_gpu.py",
        *flags,
        "--out",
        tmp_path / "out.json",
        "--directory",
        tmp_path,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "out.json").read_text())
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed == {"records": records, "failed": []} and [path.name for path in tmp_path.iterdir()] == ["out.json"]
    one, two, correctness, dense = records
    assert [record["part"] for record in records] == ["scaling", "scaling", "correctness", "dense"]
    for record in records:
        assert {"device", "versions", "commit", "date"} <= record.keys() and record["model"] == "tiny"
        assert record["gpus"] == (1 if record is one else 2)
    for record in (one, two, dense):
        assert record["tokens_per_second_per_gpu"] > 0 and len(record["step_seconds"]) == 2
        assert record["loss"] == pytest.approx(5.77, abs=0.1), "random weights: the logarithm of 320 words"
        assert record["mfu"] is record["peak_gib"] is record["planned_gib"] is None, "there is no GPU"
    assert (one["efficiency"], one["against_gpus"], two["against_gpus"]) == (1.0, 1, 1)
    ratio = two["tokens_per_second_per_gpu"] / one["tokens_per_second_per_gpu"]
    assert two["efficiency"] == pytest.approx(ratio, abs=1e-4) and 0 < two["communication_not_hidden"] < 1
    assert (
        correctness["passed"]
        and correctness["faults_in_adapters"] == 0
        and correctness["frozen_tensors_unchanged"] > 20
    )
    assert correctness["losses"][-1] < correctness["losses"][0] and len(correctness["losses"]) == 4
