"""Packs padded and launched as two graphs, against the same packs one by one. Without a GPU a graph is stood in for by
the function that it would record, run anew at every launch; tests/test_train_moe_gpu.py has real ones."""

import numpy as np
import pytest
import torch
from test_train_moe import (
    arguments,
    build,
    checkpoints,
    conversations,
    random_pack,
    randomise_adapter,
    read_log,
    run_processes,
    saved_adapter,
)

import train_moe
from malaysian_sft import pack_graphs
from malaysian_sft.micro_batches import EMPTY_PACK, to_batch
from malaysian_sft.pack_graphs import PackGraphs, why_not_recorded

__all__ = ["checkpoints", "conversations"]  # fixtures
STAND_IN = """
from malaysian_sft import pack_graphs
pack_graphs.why_not_recorded = lambda *_: None
import torch
pack_graphs.record_graph = lambda function, pool: torch.enable_grad()(function)
"""
KINDS = {
    "lora": (),
    "dora": ("--use_dora", True),
    "fp8": ("--base_dtype", "fp8"),
    "selective": ("--activations", "selective"),
}


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(pack_graphs, "record_graph", lambda function, pool: torch.enable_grad()(function))


def pair_of(checkpoint, *more, tokens=128):
    """Two equal models, the second with graphs."""
    models = []
    for _ in range(2):
        _, model = build(checkpoint, *more)
        randomise_adapter(model)
        models.append(model)
    models[1].graphs = PackGraphs(models[1], tokens)
    return models


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def forward_backward(model, *packs):
    batches = [to_batch(pack) for pack in packs]
    args = train_moe.TrainingArguments(model_name_or_path="x")
    return train_moe.forward_backward(model, batches, torch.tensor(50.0), args, torch.device("cpu"))


def same_gradients(plain, graphed):
    for (name, p), q in zip(trained(plain).items(), trained(graphed).values(), strict=True):
        bound = 1e-5 * p.grad.abs().max().item() + 1e-9
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=bound, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_losses_gradients_and_counts_over_steps(family, kind, checkpoints, process_group, stand_in):
    plain, graphed = pair_of(checkpoints[family], *KINDS[kind])
    # a full pack, one document, many; the first runs without a graph, the second records
    steps = [[(40, 7, 61), (50,), (30, 30, 68)], [(128,), (3,) * 40], [(2, 5)]]
    where = None
    for step in steps:
        packs = [random_pack(*lengths) for lengths in step]
        totals = [forward_backward(model, *packs) for model in (plain, graphed)]
        torch.testing.assert_close(totals[1], totals[0], rtol=1e-5, atol=1e-5)
        same_gradients(plain, graphed)
        assert torch.equal(plain.router_load.take(), graphed.router_load.take())
        norms = [n for m in graphed.with_norms for n in (getattr(m, "_norms", None) or [getattr(m, "norm", None)])]
        places = [t.data_ptr() for t in (*norms, *(p.grad for p in trained(graphed).values())) if t is not None]
        assert where in (None, places), "a recorded graph would read or add elsewhere"
        where = places
        for model in (plain, graphed):
            with torch.no_grad():
                for p in trained(model).values():
                    p -= 1e-2 * p.grad
            model.zero_grad()
            model.forget_norms()
    assert len(graphed.graphs.pairs) == 1
    with torch.no_grad():  # as validation has it, with what the last step changed
        batch = to_batch(random_pack(33, 20))
        torch.testing.assert_close(graphed.eval()(batch), plain.eval()(batch), rtol=1e-5, atol=1e-5)


def test_a_place_without_a_pack_adds_nothing(checkpoints, process_group, stand_in):
    _, graphed = pair_of(checkpoints["qwen3_moe"])
    forward_backward(graphed, random_pack(40, 12), random_pack(30))
    before, counts = {name: p.grad.clone() for name, p in trained(graphed).items()}, graphed.router_load.take()
    assert counts.sum() > 0
    assert forward_backward(graphed, EMPTY_PACK).tolist() == [0, 0]
    assert all(torch.equal(p.grad, before[name]) for name, p in trained(graphed).items())
    assert graphed.router_load.take().sum() == 0


def test_packs_are_padded_to_few_numbers_of_documents(checkpoints, process_group):
    _, graphed = pair_of(checkpoints["qwen3_moe"], tokens=2048)
    graphs, boundaries = graphed.graphs, []
    assert graphs.sizes == (128, 1024, 2048)
    for lengths, size in (
        ((5, 7), 128),
        ((16,) * 128, 128),
        ((15,) * 128, 1024),
        ((1,) * 1025, 2048),
        ((1,) * 2048, 2048),
    ):
        batch, n = to_batch(random_pack(*lengths)), sum(lengths)
        assert graphs.fill(batch, counts=True) == size, lengths
        found = graphs.boundaries[: size + 1]
        assert found[: len(lengths) + 1].tolist() == np.cumsum([0, *lengths]).tolist()
        assert set(found[len(lengths) + 1 :].tolist()) <= {2048} and found[-1] == 2048
        assert torch.equal(graphs.input_ids[:, :n], batch["input_ids"]) and not graphs.input_ids[:, n:].any()
        assert torch.equal(graphs.position_ids[:, :n], batch["position_ids"])
        assert graphs.position_ids[0, n:].tolist() == list(range(2048 - n))
        assert graphs.counted.sum() == n
        boundaries.append(found)
    with pytest.raises(ValueError, match="2049 tokens.*at most 2048"):
        graphs.fill(to_batch(random_pack(2049)), counts=True)


def test_gradients_that_others_dropped_or_made_are_taken_over(checkpoints, process_group, stand_in):
    plain, graphed = pair_of(checkpoints["qwen3_moe"])
    one, two, three = random_pack(40, 12), random_pack(30), random_pack(9, 60)
    forward_backward(graphed, one, two)
    kept = [p.grad for p in trained(graphed).values()]
    for p in trained(graphed).values():
        p.grad = p.grad.clone()
    forward_backward(graphed, three)
    forward_backward(plain, one, two, three)
    same_gradients(plain, graphed)
    assert all(p.grad is g for p, g in zip(trained(graphed).values(), kept, strict=True))


@pytest.mark.parametrize(("processes", "more"), [(1, ("--use_dora", True)), (2, ()), (2, ("--use_dora", True))])
def test_a_run_is_the_run_without_graphs(processes, more, checkpoints, conversations, tmp_path):
    common = (*more, "--activations", "none", "--validation_share", 0.1, "--gather_base", True)
    for name, flags, patch in (("plain", (), ""), ("graphs", ("--cuda_graphs", True), STAND_IN)):
        argv = arguments(checkpoints["qwen3_moe"], conversations, tmp_path / name, *common, *flags)
        code, output = run_processes(processes, argv, patch)
        assert code == 0, output[-3000:]
    plain, graphs = read_log(tmp_path / "plain"), read_log(tmp_path / "graphs")
    assert len(plain) == len(graphs) > 4
    for a, b in zip(plain, graphs, strict=True):
        for key in ("loss", "grad_norm", "validation_loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=2e-4), (a["step"], key)
        for key in ("expert_load_max_over_mean", "expert_load_worst_layer"):
            assert b[key] == pytest.approx(a[key], rel=0.02), (a["step"], key)
        assert b["tokens"] == a["tokens"] and b["dead_experts"] == a["dead_experts"]
    last = f"checkpoint-{plain[-1]['step']}"
    want, got = saved_adapter(tmp_path / "plain" / last), saved_adapter(tmp_path / "graphs" / last)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-2, atol=2e-3 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--lora_dropout", 0.1), "--lora_dropout 0.1"),
        (("--router_aux_loss_coef", 0.1), "--router_aux_loss_coef"),
        (("--activations", "full"), "--activations full"),
        (("--reduce_every_micro_batch", True), "--reduce_every_micro_batch True"),
    ],
)
def test_what_cannot_be_recorded_is_said(flags, reason, checkpoints, process_group):
    argv = arguments(checkpoints["qwen3_moe"], "none", "none", "--activations", "none", *flags)
    args, _, lora_args = train_moe.parse(argv)
    _, model = build(checkpoints["qwen3_moe"])
    assert why_not_recorded(model, args, lora_args, torch.device("cuda")).startswith(reason.split()[0]) or (
        reason in why_not_recorded(model, args, lora_args, torch.device("cuda"))
    )


def test_without_a_gpu_the_flag_is_refused_before_anything_is_loaded(checkpoints, conversations, tmp_path):
    argv = arguments(checkpoints["qwen3_moe"], conversations, tmp_path / "out", "--cuda_graphs", True)
    code, output = run_processes(1, argv)
    assert code == 1
    assert output.strip().splitlines()[-1].endswith("--cuda_graphs True: there is no GPU; pass --cuda_graphs False")
    assert "Traceback" not in output
