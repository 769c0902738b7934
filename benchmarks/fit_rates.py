"""Rates of a device from the profiles in results/step.json, and how far a plan by them is off; no GPU.

    python3 benchmarks/fit_rates.py --device "NVIDIA H200"

Fits on all profiled steps of the device, and prints for every whole step what the others alone would have planned for
it (leave one out), for steps of train_dense.py what the mixtures' rates plan, and for slices of four layers on a
device of the same chip what these rates plan for it. Appends a record for plan.py to results/rates.json.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_train_moe  # noqa: E402 (the repository root must be on the path first)

from malaysian_sft.account import train_flops  # noqa: E402
from malaysian_sft.base_model import load_config  # noqa: E402
from malaysian_sft.measure_rates import append  # noqa: E402
from malaysian_sft.plan_page import read_results  # noqa: E402
from malaysian_sft.planning import plan_run  # noqa: E402
from malaysian_sft.timing import (  # noqa: E402
    IN_FP8,
    Rates,
    data_sheet,
    fit,
    fp8_rate,
    host_table,
    known_rates,
    step_time,
    work,
)

NAMES = {"qwen3-30b-a3b": "Qwen3-30B-A3B-Instruct-2507", "qwen3-235b-a22b": "Qwen3-235B-A22B-Instruct-2507"}
NAMES |= {"glm-4.5-air": "GLM-4.5-Air", "qwen3-32b": "Qwen3-32B", "llama-3.1-70b": "Llama-3.1-70B-Instruct"}
TOKENS = 0.9963  # of a pack's places that benchmarks fill: random_documents leaves up to a hundredth


def work_of(record, squares_over_tokens):
    """`work` of the run that a record of step.json, train_moe.json or dense.json was measured in."""
    config = load_config(str(ROOT / "tests/configs" / f"{NAMES[record['model']]}.json"), None)
    config = bench_train_moe.shortened(config, record["layers"])
    kind = "dense" if "implementation" in record else "moe"
    planned = plan_run(
        config,
        kind=kind,
        gpus=record["gpus"],
        global_batch_size=record["gpus"] * record.get("packs", 1),
        max_seq_length=record["tokens"],
        r=record["r"],
        use_dora=record["adapter"] == "dora",
        activations=record["activations"],
        memory_mode=record.get("mode"),
        frugal_layers=record.get("frugal_layers", 0),
        transposed_layers=record.get("transposed_layers", 0),
        gather_base=record.get("gather_base", False),
        base_dtype=record.get("base_dtype"),
        expert_arithmetic=record.get("expert_arithmetic") or "bf16",
        document_length=squares_over_tokens,
    )
    return config, work(config, planned)


def squares_by_mfu(record, seconds):
    """Sum of squared lengths over tokens of a record that keeps only its MFU: what its FLOPs leave for attention."""
    config, _ = work_of(record, 0)
    tokens = record["tokens_per_second_per_gpu"] * seconds
    flops = record["mfu"] * 989.4e12 * seconds
    dora = record["adapter"] == "dora"
    none, some = (train_flops(config, tokens, tokens * n, record["r"], use_dora=dora) for n in (0, 1000))
    return max(1000 * (flops - none) / (some - none), 0.0)


def profiled(device, records):
    """The profiled steps of train_moe.py as it is: not of layers before they were fused, nor of a base in FP8."""
    wanted = [r for r in records if r.get("device") == device and r.get("components_ms")]
    return [r for r in wanted if "implementation" not in r and r.get("fused", True) and not r.get("base_dtype")]


def dense_steps(device, records):
    """The steps of train_dense.py that were measured on a device."""
    wanted = [r for r in records if r.get("device") == device and r.get("implementation") == "train_dense"]
    return [r for r in wanted if r["tokens_per_second_per_gpu"]]


def rates_of(device, records):
    """`Rates` of a device from records: profiles, and the host's times."""
    here = [r for r in records if r.get("device") == device]
    profiles = profiled(device, records)
    rates = fit((work_of(r, r["profiled_squares_over_tokens"])[1], r) for r in profiles)
    rates["links"] = 1e9 * data_sheet(device)[1]
    for r in (r for r in here if r.get("expert_arithmetic") == "fp8" and r.get("components_ms")):
        rates[IN_FP8] = fp8_rate(work_of(r, r["profiled_squares_over_tokens"])[1], r, rates)
    hosts = [r for r in here if r.get("host_ms_a_layer") and r.get("fused", True) and not r.get("base_dtype")]
    files = sorted({f"results/{r['source']}" for r in (*profiles, *hosts)})
    source = f"{', '.join(files)}, links by NVIDIA's data sheet"
    return Rates(device, rates, host_table(hosts), source)


def dense_step(record, rates):
    """(measured ms a step, planned) of a step of train_dense.py."""
    measured = 1e3 * TOKENS * record["tokens"] * record["packs"] / record["tokens_per_second_per_gpu"]
    _, done = work_of(record, squares_by_mfu(record, measured / 1e3))
    return measured, TOKENS * step_time(done, rates, record["attention"])["ms"]


def leave_one_out(device, records, which=None):
    """[(record, measured ms, planned ms without it)] of every whole step of a device, or of those numbered `which`."""
    steps = profiled(device, records)
    found = []
    for record in steps if which is None else [steps[i] for i in which]:
        rates = rates_of(device, [r for r in records if r is not record])
        _, done = work_of(record, record["squares_over_tokens"])
        planned = step_time(done, rates, record["attention"])
        found.append((record, sum(record["step_ms"]) / len(record["step_ms"]), TOKENS * planned["ms"]))
    return found


def fp8_steps(rates, records):
    """[(record, measured ms, planned)] of whole steps with experts in FP8 on the device of `rates`."""
    found = []
    stored = [r for r in records if r.get("base_dtype")]
    for record in (r for r in stored if r.get("step_ms") and r["device"] == rates.device):
        _, done = work_of(record, record["squares_over_tokens"])
        planned = TOKENS * step_time(done, rates, record["attention"])["ms"]
        found.append((record, sum(record["step_ms"]) / len(record["step_ms"]), planned))
    return found


def slices(rates, records):
    """[(record, measured ms a pack, planned)] of the slices of results/train_moe.json on the device of `rates`."""
    found = []
    for record in (r for r in records if r.get("pack_ms") and r["device"] == rates.device and not r["sharded"]):
        _, done = work_of(record, squares_by_mfu(record, record["pack_ms"] / 1e3))
        done["step"] = {}
        found.append((record, record["pack_ms"], TOKENS * step_time(done, rates, record["attention"])["ms"]))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="NVIDIA H200", help="CUDA name of the device whose records are used")
    parser.add_argument("--slices", default="NVIDIA H100 80GB HBM3", help="device of the slices")
    parser.add_argument("--out", default=str(ROOT / "results" / "rates.json"))
    args = parser.parse_args()
    records = read_results(ROOT / "results")
    rates = rates_of(args.device, records)
    rows = [(r, m, p, "left out") for r, m, p in leave_one_out(args.device, records)]
    other = known_rates(args.slices, [rates.record()])
    for here in (rates, other):
        for r in dense_steps(here.device, records):
            rows.append((r, *dense_step(r, here), "by the mixtures' rates"))
    rows += [(*row, "experts in FP8") for row in fp8_steps(rates, records)]
    rows += [(*row, "experts in FP8, by the other device's rates") for row in fp8_steps(other, records)]
    rows += [(r, m, p, "slice, by the other device's rates") for r, m, p in slices(other, records)]
    for r, measured, planned, how in rows:
        what = f"{r['model']} {r['adapter']} {r['activations']} {r.get('mode') or ''} {r['gpus']} x {r['device']}"
        print(f"{what:66} measured {measured:7.0f} ms, planned {planned:7.0f} ({planned / measured - 1:+.1%}; {how})")
    append(rates, args.out)


if __name__ == "__main__":
    main()
