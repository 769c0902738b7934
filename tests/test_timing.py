"""The time of a step: planned against measured steps left out of the fit, and its parts worked out by hand."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import FAMILIES, MOE_FAMILIES, real_config, tiny_config
from malaysian_sft.plan_page import read_results
from malaysian_sft.planning import CHOICES, plan_run
from malaysian_sft.timing import IN_FP8, UNITS, Rates, known_rates, slowest, step_time, together, work

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import fit_rates  # noqa: E402 (benchmarks/ must be on the path first)

RECORDS = read_results(ROOT / "results")
PAGE = ROOT / "docs/planning.md"
H200, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("index", range(len(fit_rates.profiled(H200, RECORDS))))
def test_a_step_left_out_of_the_fit_is_planned_within_a_tenth(index):
    """Whole models on one and two GPUs, LoRA and DoRA, both kernels of attention, the base whole and gathered."""
    record, measured, planned = fit_rates.leave_one_out(H200, RECORDS, [index])[0]
    assert record["layers"] == 48 and planned == pytest.approx(measured, rel=0.10)


def test_models_and_a_device_that_no_rate_was_fitted_on_are_planned_within_a_tenth():
    """Four layers of three mixtures on an H100, by the H200's rates and the two data sheets."""
    rows = fit_rates.slices(known_rates(H100, [r for r in RECORDS if r.get("device") == H200]), RECORDS)
    assert {r["model"] for r, _, _ in rows} == {"qwen3-30b-a3b", "qwen3-235b-a22b", "glm-4.5-air"} and len(rows) == 6
    for record, measured, planned in rows:
        assert planned == pytest.approx(measured, rel=0.10), record


def dense_rows():
    """[(record, measured ms, planned by the mixtures' rates)] of train_dense.py's steps on both devices."""
    rows = []
    for device in (H200, H100):
        rates = known_rates(device, [r for r in RECORDS if r.get("device") == H200])
        rows += [(r, *fit_rates.dense_step(r, rates)) for r in fit_rates.dense_steps(device, RECORDS)]
    return rows


def test_dense_steps_are_planned_within_a_tenth_by_the_mixtures_rates():
    """No rate was fitted on a dense model. The one step that is missed ran out of memory's room: the allocator gave all
    it had back and asked anew, three times a step."""
    rows = dense_rows()
    assert len(rows) == 8
    for record, measured, planned in rows:
        if "three times a step" in record.get("note", ""):
            assert "flushed" in record["note"] and planned < measured
        else:
            assert planned == pytest.approx(measured, rel=0.10), record


def test_steps_with_experts_in_fp8_are_planned_within_a_tenth():
    """Stored in it: no rate was fitted on such a step. Computing in it: the rate of its products was, and is that of
    the block alone."""
    rates = known_rates(H200, RECORDS)
    rows = fit_rates.fp8_steps(rates, RECORDS)
    assert [r["expert_arithmetic"] for r, _, _ in rows] == ["fp8", "bf16"]
    for record, measured, planned in rows:
        assert planned == pytest.approx(measured, rel=0.10), record
    blocks = [r for r in RECORDS if r.get("implementation") == "fused_moe_lora_fp8" and r["device"] == H200]
    assert len(blocks) == 3
    for product in (product for block in blocks for product in block["per_op"]):
        assert product["tflops"] == pytest.approx(rates.rates[IN_FP8] / 1e12, rel=0.12)


def test_the_page_says_how_far_off_it_is():
    rows = re.findall(r"^\| \d \| .* \| ([\d,]+) \| ([\d,]+) \| (\S+) % \|$", PAGE.read_text(), re.MULTILINE)
    steps = [*fit_rates.leave_one_out(H200, RECORDS), *dense_rows()]
    assert set(rows) == {(f"{m:,.0f}", f"{p:,.0f}", f"{100 * (p / m - 1):+.1f}") for _, m, p in steps}
    assert len(rows) == 16


def test_the_rates_of_plan_are_those_of_the_records():
    kept = known_rates(H200, RECORDS)
    fitted = fit_rates.rates_of(H200, RECORDS)
    assert fitted.rates == pytest.approx(kept.rates) and fitted.host_ms == pytest.approx(kept.host_ms)


def test_the_profiled_pack_is_the_one_that_was_drawn():
    """`profiled_squares_over_tokens` of earlier records was added by drawing their packs again, by their seed."""
    import bench_train_moe
    import torch

    record = next(r for r in RECORDS if r.get("components_ms") and r["steps"] == 4)
    generator = torch.Generator().manual_seed(2)
    draws = [bench_train_moe.random_documents(16384, 151936, generator)[1] for _ in range(4 * (2 + 4) + 1)]
    squares, tokens = ([sum(f(n) for n in d) for d in draws] for f in (lambda n: n * n, lambda n: n))
    assert round(sum(squares[8:24]) / sum(tokens[8:24])) == record["squares_over_tokens"]
    assert round(squares[24] / tokens[24]) == record["profiled_squares_over_tokens"]


# --------------------------------------------------------------------------------------------------------------- parts


def test_work_by_hand():
    """Two GPUs of Qwen3-30B-A3B: experts 4 FLOPs a weight and 6 an adapter weight; what the links carry."""
    config = real_config("Qwen3-30B-A3B-Instruct-2507")
    way = dict(kind="moe", gpus=2, global_batch_size=8, activations="none")
    done = work(config, plan_run(config, **way))
    rows, layers = 16384 * 8, 48
    size, inner = 3 * 2048 * 768, 3 * 32 * (2048 + 768)
    assert done["micro"]["experts: products"] == layers * rows * (4 * size + 6 * inner)
    # frugal computes gate and up again, not down
    frugal = work(config, plan_run(config, memory_mode="frugal", **way))["micro"]["experts: products"]
    again = 2 * (2 * 2048 * 768 + 2 * 32 * (2048 + 768) + 32 * 768)
    assert frugal - done["micro"]["experts: products"] == layers * rows * again
    # in FP8 the frozen weights' products have a rate of their own, and a byte is transposed where three were widened
    stored, fp8 = (
        work(config, plan_run(config, base_dtype="fp8", memory_mode="fast", expert_arithmetic=a, **way))["micro"]
        for a in ("bf16", "fp8")
    )
    assert IN_FP8 not in stored and stored["experts: products"] == done["micro"]["experts: products"]
    assert (fp8[IN_FP8], fp8["experts: products"]) == (layers * rows * 4 * size, layers * rows * 6 * inner)
    assert stored["element-wise passes"] - fp8["element-wise passes"] == (6 - 2) * layers * 128 * size
    assert fp8["experts: passes"] - stored["experts: passes"] == layers * (3 * rows * 768 + 6 * 16384 * 2048)
    # the base twice in bf16, the adapter twice in bf16, half of each from the other GPU; gradients once a step in fp32
    base, outside, adapter = 30_532_122_624, 2 * 151936 * 2048, 1_874_853_888
    assert done["micro"]["links"] == 4 * (base - outside) / 2 + 4 * adapter / 2
    assert done["step"]["links"] == 4 * adapter / 2
    whole = work(config, plan_run(config, gather_base=False, **way))
    assert whole["micro"]["links"] == 4 * adapter / 2
    alone = work(config, plan_run(config, **way | dict(gpus=1)))
    assert alone["micro"]["links"] == 0 == alone["step"]["links"] and alone["micro_batches"] == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_of_the_account(family, monkeypatch):
    """Of every family: what is useful, which torch's counter holds in test_account.py, and what is computed again."""
    monkeypatch.setattr("malaysian_sft.timing.FLOOR", 0)
    config, kind = tiny_config(family), "moe" if family in MOE_FAMILIES else "dense"
    for policy, modes in CHOICES[kind].items():
        for mode in modes:
            way = dict(
                kind=kind, gpus=1, r=8, activations=policy, memory_mode=mode, max_seq_length=64, document_length=20.0
            )
            plan = plan_run(config, **way)
            micro = work(config, plan)["micro"]
            flops = sum(micro.get(name, 0) for name, unit in UNITS.items() if unit == "FLOPs")
            assert flops / 64 == pytest.approx(plan["flops_per_token"] + plan["recompute_per_token"])


@pytest.mark.parametrize("kind, family", [("dense", "llama"), ("moe", "qwen3_moe")])
def test_what_is_computed_again_is_work(kind, family):
    config = tiny_config(family)
    none, full = (
        work(config, plan_run(config, kind=kind, gpus=1, activations=policy, r=8))["micro"]
        for policy in ("none", "full")
    )
    for name in ("dense products", "attention", "element-wise passes"):
        assert full[name] > none[name]
    assert (full["experts: products"] > none["experts: products"]) == (kind == "moe")


RATES = Rates(
    "a device",
    {
        "experts: products": 1e12,
        "experts: passes": 1e9,
        "dense products": 1e12,
        "attention, varlen_attn": 1e12,
        "element-wise passes": 1e9,
        "optimiser": 1e9,
        "links": 1e9,
    },
    {"one GPU": 1.0, "several GPUs": 1.0},
    "by hand",
)


def done(gpus=1, host=0, between=False, **micro):
    micro = dict.fromkeys(("experts: products", "experts: passes", "element-wise passes", "links"), 0) | micro
    micro = {"dense products": 0, "attention": 0} | micro | {"host": host}
    return {
        "micro": micro,
        "step": {"optimiser": 5e6, "links": 0},
        "micro_batches": 4,
        "kind": "moe",
        "gpus": gpus,
        "nodes": 1 + between,
        "sharing_nodes": 1 + between,
    }


def test_a_step_is_the_sum_of_its_parts():
    time = step_time(done(**{"dense products": 1e11, "attention": 2e10}), RATES)
    # 100 and 20 ms a pack, four packs, 2 % of gaps, 5 ms of optimiser
    expected = {"dense products": 400, "attention": 80, "gaps": 0.02 * 480, "optimiser": 5}
    assert time["components"] == pytest.approx(expected) and time["ms"] == pytest.approx(494.6)
    assert time["largest"] == "dense products" and "activations" in time["shorter"]
    assert (time["low"], time["high"]) == pytest.approx((0.9 * 494.6, 1.1 * 494.6))


def test_a_host_that_is_slower_than_the_gpu_is_what_counts():
    slow = step_time(done(host=500, **{"dense products": 1e11}), RATES)
    assert slow["largest"] == "host, not hidden" and slow["ms"] == pytest.approx(4 * 500 + 8 + 5, rel=1e-3)
    fast = step_time(done(host=10, **{"dense products": 1e11}), RATES)
    assert fast["components"].get("host, not hidden", 0) < 0.01
    assert together(100, 100) == pytest.approx(100 * 2 ** (1 / 6))


def test_links_are_added_and_a_range_begins_without_them():
    time = step_time(done(gpus=2, links=5e7, **{"dense products": 1e11}), RATES)
    assert time["components"]["links"] == pytest.approx(200)
    assert time["low"] == pytest.approx(0.9 * (time["ms"] - 200))
    between = step_time(done(gpus=16, between=True, links=5e7, **{"dense products": 1e11}), RATES)
    # at 1 GB/s the ports of 50 GB/s are not what limits
    assert between["components"]["links"] == pytest.approx(200) and between["high"] == pytest.approx(
        1.3 * between["ms"]
    )


def test_ports_between_nodes_carry_what_is_elsewhere_once():
    """16 GPUs receive 15 sixteenths of 16 GB each; a node of eight lacks 8 GB, one through each port, in 20 ms."""
    whole = 16e9
    fast = replace(RATES, rates=RATES.rates | {"links": 1e15})
    time = step_time(done(gpus=16, between=True, links=whole * 15 / 16), fast)
    assert time["components"]["links"] == pytest.approx(4 * 20)


def test_the_slowest_of_several_ranks():
    """The mean of the larger of two standard normal draws is 1 / sqrt(pi); tables give 1.423 for eight."""
    assert (
        slowest(1) == 0
        and slowest(2) == pytest.approx(0.564, rel=0.07)
        and slowest(8) == pytest.approx(1.423, rel=0.01)
    )


def test_a_device_of_the_same_chip_has_the_same_products_and_its_own_memory():
    own = known_rates(H200, RECORDS)
    other = known_rates(H100, [own.record()])
    assert other.rates["dense products"] == own.rates["dense products"]
    assert other.rates["element-wise passes"] == pytest.approx(own.rates["element-wise passes"] * 3350 / 4800)
    assert other.tolerance > own.tolerance and H200 in other.origin
    assert known_rates("NVIDIA A100-SXM4-80GB", [own.record()]) is None
    assert known_rates("cpu", [own.record()]) is None
    newer = own.record() | {"rates": own.rates | {"dense products": 1.0}}
    assert known_rates(H200, [own.record(), newer]).rates["dense products"] == 1.0


def test_a_kernel_without_a_rate_is_named():
    with pytest.raises(ValueError, match="no rate of attention, sdpa on a device; measure it"):
        step_time(done(), RATES, "sdpa")


def test_results_are_valid():
    for name in ("rates", "multi_gpu"):
        for record in json.loads((ROOT / f"results/{name}.json").read_text()):
            assert {"part", "device", "commit", "date"} <= record.keys()
