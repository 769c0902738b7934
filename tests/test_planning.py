"""Every way to run, and the choice between them."""

from types import SimpleNamespace

import pytest
import torch

from conftest import real_config, tiny_config
from malaysian_sft.account import (
    GIB,
)
from malaysian_sft.planning import (
    CHOICES,
    best_policy,
    check_fits,
    options,
    plan_run,
    settle,
    this_machine,
    trainer_flags,
)


def test_as_few_layers_are_frugal_as_must_be():
    config = real_config("Qwen3-30B-A3B-Instruct-2507")
    way = dict(kind="moe", gpus=1, global_batch_size=4, activations="none")
    found = options(config, gpu_memory_gib=139.8, **way)[0]
    assert found["memory_mode"] == "fast" and 0 < found["frugal_layers"] < 24
    limit = 0.96 * found["limit_bytes"]
    fewer = plan_run(config, gpu_memory_gib=139.8, memory_mode="fast", frugal_layers=found["frugal_layers"] - 1, **way)
    assert found["peak_bytes"] <= limit < fewer["peak_bytes"]
    assert f"--frugal_layers {found['frugal_layers']}" in trainer_flags(found)
    fast, frugal = (plan_run(config, memory_mode=mode, **way)["recompute_per_token"] for mode in ("fast", "frugal"))
    assert fast == 0 and found["recompute_per_token"] == pytest.approx(frugal * found["frugal_layers"] / 48)


@pytest.mark.parametrize("kind, name", [("dense", "Qwen3-32B"), ("moe", "GLM-4.5-Air")])
def test_more_recompute_needs_less_memory_and_more_flops(kind, name):
    plans = [plan_run(real_config(name), kind=kind, gpus=8, activations=policy) for policy in CHOICES[kind]]
    peaks, extra = [p["peak_bytes"] for p in plans], [p["recompute_per_token"] for p in plans]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    assert extra == sorted(extra) and extra[0] == 0 and len(set(extra)) == len(extra)
    assert len({p["flops_per_token"] for p in plans}) == 1


def test_best_policy_recomputes_no_more_than_it_must():
    config = real_config("Qwen3-30B-A3B-Instruct-2507")
    roomy = best_policy(config, kind="moe", gpus=8, gpu_memory_gib=140)
    tight = best_policy(config, kind="moe", gpus=8, gpu_memory_gib=40)
    assert (roomy["activations"], roomy["memory_mode"], roomy["reduce_every_micro_batch"]) == (
        "none",
        "fast",
        False,
    )
    assert tight["recompute_per_token"] > 0 and tight["peak_bytes"] < 0.96 * tight["limit_bytes"]
    everything = options(config, kind="moe", gpus=8, gpu_memory_gib=40)
    assert len([p for p in everything if not p["frugal_layers"]]) == 5 * 2 * 2 and everything[0] == tight
    comfortable = [p for p in everything if p["peak_bytes"] < 0.96 * p["limit_bytes"]]
    assert tight["gather_base"], "40 GiB do not hold the whole base"
    assert all(p["recompute_per_token"] >= tight["recompute_per_token"] for p in comfortable)
    assert not roomy["gather_base"], "what need not be gathered is not"
    assert any(p["activations"] == "none" and not p["fits"] for p in everything)
    for given in (
        {"activations": "full"},
        {"memory_mode": "frugal"},
        {"activations": "selective", "memory_mode": "fast"},
    ):
        for chosen in options(config, kind="moe", gpus=8, **given):
            assert given.items() <= chosen.items()


def test_what_barely_fits_is_the_second_choice():
    config = real_config("Qwen3-30B-A3B-Instruct-2507")
    way = dict(kind="moe", gpus=8, reduce_every_micro_batch=False)
    fast = plan_run(config, activations="none", **way)
    need = fast["peak_bytes"] / GIB + 4.0
    barely, easily = (options(config, gpu_memory_gib=memory, **way)[0] for memory in (need + 0.01, 1.15 * need))
    assert easily["memory_mode"] == "fast" and barely["recompute_per_token"] > 0
    assert options(config, gpu_memory_gib=need + 0.01, activations="none", memory_mode="fast", **way)[0]["fits"]


@pytest.mark.parametrize(
    "environment, whole, machine",
    [
        ({}, False, (1, 1)),
        ({}, True, (4, 1)),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, True, (8, 2)),
        ({"WORLD_SIZE": "2"}, False, (2, 1)),
    ],
)
def test_this_machine_is_what_torchrun_started(environment, whole, machine, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=79 * 2**30))
    expected = {"gpus": machine[0], "nodes": machine[1], "gpu_memory_gib": 79.0}
    assert this_machine(whole) == expected


def test_settle_refuses_or_warns(monkeypatch, capsys):
    config = real_config("Qwen2.5-72B-Instruct")
    arguments = dict(kind="dense", gpus=2, nodes=1, gpu_memory_gib=79.0, micro_batch=1, activations=None)
    with pytest.raises(
        ValueError, match="GiB a GPU are needed.*Largest: frozen base, bf16 shard 67.7 GiB.*--ignore_plan True"
    ):
        settle(config, **arguments)
    nearest = settle(config, ignore=True, **arguments)
    assert nearest["activations"] == "full" and not nearest["fits"]
    assert capsys.readouterr().err.startswith("warning: ")
    monkeypatch.setenv("RANK", "1")
    assert settle(config, ignore=True, **arguments) == nearest and capsys.readouterr().err == ""


def test_a_model_too_large_for_a_node_is_shared_by_two():
    config = real_config("Qwen3-235B-A22B-Instruct-2507")
    with pytest.raises(ValueError, match="Largest: frozen base, bf16 54"):
        best_policy(config, kind="moe", gpus=8, gpu_memory_gib=80)
    best = best_policy(config, kind="moe", gpus=8, nodes=2, gpu_memory_gib=80)
    assert best["shard_nodes"] == 2 and "--shard_nodes 2" in trainer_flags(best)


def test_small_packs_are_batched():
    best = best_policy(real_config("Qwen3-32B"), kind="dense", gpus=8, max_seq_length=4096)
    assert best["micro_batch"] == 4  # four packs of 4,096 fill the GPU as one of 16,384 does


def test_what_cannot_fit_is_refused_with_its_largest_terms():
    config = real_config("Qwen2.5-72B-Instruct")
    with pytest.raises(ValueError, match=r"Largest: frozen base, bf16 shard 67.7 GiB.*Take more GPUs"):
        best_policy(config, kind="dense", gpus=2, gpu_memory_gib=80)
    with pytest.raises(ValueError, match="Largest: kept activations.*max_seq_length"):
        check_fits(plan_run(config, kind="dense", gpus=8, activations="none"))
    check_fits(plan_run(config, kind="dense", gpus=8))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(kind="moe"), "no routed experts"),
        (dict(kind="sparse"), "kind is 'sparse'"),
        (dict(activations="some"), "activations is 'some'; expected one of none, selective, full"),
        (dict(memory_mode="frugal"), "memory_mode is 'frugal'"),
        (dict(gpus=7), "no multiple of 7 GPUs"),
        (dict(nodes=2, shard_nodes=3), "no multiple of --shard_nodes 3"),
    ],
)
def test_impossible_plans_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan_run(tiny_config("llama"), **{"kind": "dense", "gpus": 8, **wrong})
