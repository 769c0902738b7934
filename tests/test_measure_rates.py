"""plan.py --measure: from profiles to a record that the plan takes; the links for real, between two processes."""

import copy
import json
from pathlib import Path

import pytest
import torch

from malaysian_sft import measure_rates
from malaysian_sft.plan_page import read_results
from malaysian_sft.timing import DORA_LAUNCHES, known_rates

ROOT = Path(__file__).parents[1]
PROFILES = [r for r in read_results(ROOT / "results") if r.get("profiled_squares_over_tokens")]


def records(gpus):
    """What bench_step.py leaves of a device twice an H200: slices of LoRA and DoRA on one GPU and on `gpus`, whose host
    takes 10 ms beside its layers."""
    found = []
    for layers in measure_rates.LAYERS:
        for count in sorted({1, gpus}):
            for adapter in ("lora", "dora"):
                record = copy.deepcopy(PROFILES[0])
                record |= {"gpus": count, "adapter": adapter, "layers": layers, "outcome": "measured"}
                record["components_ms"] = {k: v / 2 for k, v in record["components_ms"].items()}
                record["host_ms_a_layer"] = 10 / layers + 4 * count * (DORA_LAUNCHES if adapter == "dora" else 1)
                found.append(record | {"device": "NVIDIA GeForce RTX 4090"})
    return found


def test_profiles_become_rates_that_the_plan_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(measure_rates, "profile_steps", records)
    monkeypatch.setattr(measure_rates, "measure_links", lambda ranks: 1e11)
    path = tmp_path / "results" / "rates.json"
    measure_rates.measure(path)
    rates = known_rates("NVIDIA GeForce RTX 4090", read_results(path.parent))
    # the record's dense products were halved; the work is counted here by hand: eight layers of q, k, v, o, router and
    # rank 256 on the first four, and the head; 4 FLOPs a frozen and 6 a trained weight
    projections, router, head = 2 * 2048 * (4096 + 512), 128 * 2048, 151936 * 2048
    adapter = 256 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    flops = 16384 * (8 * (4 * (projections + router) + 6 * adapter) + 4 * head)
    assert rates.rates["dense products"] == pytest.approx(
        flops / (PROFILES[0]["components_ms"]["dense products"] / 2e3)
    )
    assert rates.rates["links"] == 1e11
    host = {"one GPU": 4, "several GPUs": 8}  # of LoRA; DoRA's, made by the ratio, says the same
    assert rates.host_ms == pytest.approx(host)
    assert "wrote" in capsys.readouterr().out
    measure_rates.measure(path)
    assert len(json.loads(path.read_text())) == 2


def test_one_gpu_measures_what_it_can():
    rates = measure_rates.rates_of(records(1))
    assert "links" not in rates.rates  # no data sheet here has this card's
    assert rates.host_ms["several GPUs"] == pytest.approx(1.5 * 4)
    known = measure_rates.rates_of([r | {"device": "NVIDIA H200"} for r in records(1)])
    assert known.rates["links"] == 450e9 and "data sheet" in known.origin


def test_a_busy_host_is_measured_again():
    busy = records(1)
    busy[0]["host_ms_a_layer"] = 1000.0
    with pytest.raises(ValueError, match="8 layers launched faster than 2: the host is busy; again"):
        measure_rates.host_of_a_layer(busy)


def test_links_between_two_processes():
    rate = measure_rates.measure_links(2, mebibytes=1)
    assert 1e5 < rate < 1e12  # bytes a second that a rank receives, over gloo


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="--measure: no GPU here"):
        measure_rates.measure(tmp_path / "rates.json")
    assert not (tmp_path / "rates.json").exists()


def test_a_profile_that_did_not_end_is_named(monkeypatch):
    def bench(command, check):
        failed = records(1)[:1]
        failed[0] |= {"outcome": "does not fit", "why": "CUDA out of memory"}
        Path(command[command.index("--out") + 1]).write_text(json.dumps(failed))

    monkeypatch.setattr(measure_rates.subprocess, "run", bench)
    with pytest.raises(ValueError, match="lora on 1 GPUs: does not fit, CUDA out of memory"):
        measure_rates.profile_steps(1)
    monkeypatch.setattr(measure_rates.subprocess, "run", lambda command, check: None)
    with pytest.raises(ValueError, match="left no records"):
        measure_rates.profile_steps(1)
