"""A device's rates for plan.py: `python3 plan.py --measure`, on one GPU and on all of the machine.

Eight layers of Qwen3-30B-A3B with random weights make a few steps on one GPU and on all, with LoRA and with DoRA
(benchmarks/bench_step.py: the trainer's own functions, profiled), and the GPUs gather 256 MiB each from the others.
Rates are fitted as those of results/step.json are (timing.py). The host's time of a layer is what eight take longer
than two: embedding, head and loss would weigh too much in a slice. A record is appended to results/rates.json.
"""

import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from malaysian_sft.run import git_commit, setup_distributed
from malaysian_sft.timing import Rates, data_sheet, fit, host_table

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node".split()
MODEL, LAYERS = "qwen3-30b-a3b", (2, 8)
SEVERAL = 1.5  # host time of a layer on several GPUs over that on one, results/step.json: 11.4 ms over 7.7


def profile_steps(gpus):
    """Records of bench_step.py: of LAYERS layers, on one GPU and on `gpus`, LoRA and DoRA. Raises ValueError for one
    that didn't end."""
    counts = "1" if gpus == 1 else f"1,{gpus}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "step.json")
        for layers in LAYERS:
            command = [sys.executable, str(ROOT / "benchmarks/bench_step.py"), "--models", MODEL, "--out", str(out)]
            command += ["--layers", str(layers), "--gpus", counts, "--adapters", "lora,dora", "--steps", "2"]
            subprocess.run([*command, "--packs", "2"], check=False)
        records = json.loads(out.read_text()) if out.is_file() else []
    for record in records:
        if record["outcome"] != "measured":
            raise ValueError(
                f"{record['adapter']} on {record['gpus']} GPUs: {record['outcome']}, {record.get('why', '')}"
            )
    if len(records) != len(LAYERS) * 2 * (1 + (gpus > 1)):
        raise ValueError("benchmarks/bench_step.py left no records; what it printed says why")
    return records


def measure_links(ranks, mebibytes=256):
    """Bytes a second that a rank receives while `ranks` processes gather `mebibytes` from each, over the GPUs' links;
    without GPUs over gloo."""
    command = [sys.executable, *TORCHRUN, str(ranks), "-m", "malaysian_sft.measure_rates", str(mebibytes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("links ")]
    if done.returncode or not lines:
        raise ValueError(f"the links between {ranks} GPUs were not measured: {done.stderr.strip()[-300:]}")
    return float(lines[-1].split()[1])


def gather(mebibytes, repeats=10):
    """A rank of `measure_links`: rank 0 prints the rate."""
    device = setup_distributed()
    shard = torch.ones(mebibytes * 2**19, dtype=torch.bfloat16, device=device)
    whole = torch.empty(dist.get_world_size() * len(shard), dtype=shard.dtype, device=device)
    started = 0.0
    for number in range(-2, repeats):  # two that set up, then the timed ones
        if number == 0:
            dist.barrier()
            started = time.perf_counter()
        dist.all_gather_into_tensor(whole, shard)
        if device.type == "cuda":
            torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    received = repeats * (dist.get_world_size() - 1) * 2 * len(shard)
    if dist.get_rank() == 0:
        print(f"links {received / seconds}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def host_of_a_layer(records):
    """Records with the host's ms of one layer alone, from pairs of `records` that differ in their layers only."""
    few, many = ([r for r in records if r["layers"] == layers] for layers in LAYERS)
    found = []
    for small in few:
        (large,) = [r for r in many if (r["adapter"], r["gpus"]) == (small["adapter"], small["gpus"])]
        longer = large["layers"] * large["host_ms_a_layer"] - small["layers"] * small["host_ms_a_layer"]
        if longer <= 0:
            raise ValueError(
                f"{large['layers']} layers launched faster than {small['layers']}: the host is busy; again"
            )
        found.append(large | {"host_ms_a_layer": longer / (large["layers"] - small["layers"])})
    return found


def rates_of(records, links=None):
    """`Rates` from profiles of one device; links in byte/s, by default its data sheet's.

    Without records on several GPUs, a layer's host time there is taken as longer by what it is in results/step.json.
    """
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from fit_rates import work_of

    device = records[0]["device"]
    lora = [r for r in records if r["adapter"] == "lora" and r["layers"] == max(LAYERS)]
    rates = fit((work_of(r, r["profiled_squares_over_tokens"])[1], r) for r in lora)
    origin = "plan.py --measure"
    if links is None and (known := data_sheet(device)):
        links, origin = 1e9 * known[1], f"{origin}, links by NVIDIA's data sheet"
    if links is not None:
        rates["links"] = links
    host = host_table(host_of_a_layer(records))
    host.setdefault("several GPUs", SEVERAL * host["one GPU"])
    return Rates(device, rates, host, origin)


def measure(path):
    """Measure this machine and append its record to `path`; prints it. Raises ValueError without a GPU."""
    gpus = torch.cuda.device_count()
    if not gpus:
        raise ValueError("--measure: no GPU here; its rates are of GPUs. Known devices are in results/rates.json")
    rates = rates_of(profile_steps(gpus), measure_links(gpus) if gpus > 1 else None)
    append(rates, path)


def append(rates, path):
    """Append a record to results/rates.json and print it."""
    path = Path(path)
    earlier = json.loads(path.read_text()) if path.is_file() else []
    record = rates.record() | {"commit": git_commit(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*earlier, record], indent=1) + "\n")
    for name, rate in rates.rates.items():
        print(f"{name:28} {rate / 1e12:10.3f} T/s")
    for name, ms in rates.host_ms.items():
        print(f"host, {name:22} {ms:10.2f} ms a layer")
    print(f"wrote {path}")


if __name__ == "__main__":
    gather(int(sys.argv[1]))
