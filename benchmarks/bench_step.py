"""Whole optimiser steps of train_moe.py on whole models: tokens/s, MFU, memory beside the plan, where the time goes.

    python3 benchmarks/bench_step.py                                              Qwen3-30B-A3B on one GPU and on all
    python3 benchmarks/bench_step.py --models glm-4.5-air --layers 8 --gpus 2     a slice that fits
    python3 benchmarks/bench_step.py --models tiny --tokens 256 --r 8             anywhere; a CPU leaves no record

The path is the launcher's own: its functions build, shard, step, clip and log; weights are random and made on the
device, packs hold log-normal documents and differ in length. A configuration runs in processes of its own, so that one
that does not fit is an outcome ("does not fit"), not a failure. Each record has, after `--steps` steps: tokens/s a GPU,
MFU, peak and planned GiB, one profiled micro-batch by component (kernel ms, gaps in which the GPU does nothing,
communication that nothing hides), the host's ms a layer alone (a pack too small to keep the GPU busy), the sum of
squared document lengths over tokens, clocks and watts. Prints a table and one JSON line, appends to results/step.json;
`--plot step.png` draws the records of that file.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

# (component, what its kernels' names contain), the first that fits; what fits none is "other"
COMPONENTS = (
    ("communication", r"nccl"),
    ("attention", r"flash|fmha|cute|varlen|FlashAttn"),
    ("experts: products", r"hopper_gemm|hopper_fp8_gemm|grouped_gemm_kernel|grouped_gemm_fp8_kernel"),
    ("experts: widened, quantised", r"widen_kernel|quantise_kernel|transpose_kernel"),
    ("experts: SwiGLU, gradients", r"swiglu|lora_grad|dora_down"),
    ("experts: routing, combine", r"combine_kernel|count_kernel|scan_kernel|tile_kernel|place_kernel|router_grad"),
    ("norms, rotary", r"rms_norm|norm_rope|scale_columns|column_products"),
    ("SwiGLU", r"silu_mul"),
    ("optimiser", r"[Aa]dam|multi_tensor|lpnorm|clip"),
    ("dense products", r"nvjet|gemm|cutlass|xmma|splitK|cublas"),
    ("loss", r"^triton_"),
    ("router", r"softmax|topk|TopK|radix|bitonic|sort|gatherTopK"),
    ("copies", r"copy|Memcpy|Memset|Cat|fill|FillFunctor"),
)


def parse():
    parser = argparse.ArgumentParser(description="Whole optimiser steps, measured.")
    parser.add_argument("--models", default="qwen3-30b-a3b", help="comma-separated, of bench_train_moe.MODELS")
    parser.add_argument("--gpus", default=None, help="comma-separated counts; default: 1 and all")
    parser.add_argument("--layers", type=int, default=None, help="decoder layers; default: all of the published model")
    parser.add_argument("--tokens", type=int, default=16384, help="of a pack")
    parser.add_argument("--packs", type=int, default=4, help="of a GPU and step")
    parser.add_argument("--steps", type=int, default=5, help="timed, after two that are not")
    parser.add_argument("--r", type=int, default=256)
    parser.add_argument("--adapters", default="lora", help="lora, dora or both, comma-separated")
    parser.add_argument("--activations", default="auto", help="auto, none, selective or full")
    parser.add_argument("--memory_mode", default=None, help="fast or frugal; default: as the trainer chooses")
    parser.add_argument("--gather_base", default=None, help="True or False; default: as the trainer chooses")
    parser.add_argument("--base_dtype", default=None, help="fp8: frozen experts stored in FP8")
    parser.add_argument("--expert_arithmetic", default=None, help="fp8: experts stored in FP8 compute in FP8")
    parser.add_argument("--frugal_layers", default=None, help="default: as the trainer chooses")
    parser.add_argument("--transposed_layers", default=None, help="default: as the trainer chooses")
    parser.add_argument("--cuda_graphs", default=None, help="True or False; default: as the trainer has it")
    parser.add_argument("--seconds", type=float, default=280, help="limit of one configuration")
    parser.add_argument("--out", default=str(ROOT / "results" / "step.json"))
    parser.add_argument("--plot", default=None, help="draw the records of --out to this PNG, and stop")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# One configuration, in processes of its own
# ----------------------------------------------------------------------------------------------------------------------


class Run:
    """A model as the launcher would have it, its optimiser, and packs to step over."""

    def __init__(self, job):
        import bench_train_moe as slices
        import torch
        import torch.distributed as dist

        import train_moe
        from malaysian_sft import pack_graphs
        from malaysian_sft.moe_model import make_mesh
        from malaysian_sft.run import setup_distributed

        self.torch, self.dist, self.slices, self.t, self.job = torch, dist, slices, train_moe, job
        self.device = setup_distributed()
        self.cuda, self.world = self.device.type == "cuda", dist.get_world_size()
        self.mesh = make_mesh(self.device, 1)
        self.config = slices.make_config(job["model"], job["layers"])
        flags = f"--model_name_or_path {job['model']} --activations {job['activations']} --r {job['r']}"
        flags += f" --use_dora {job['adapter'] == 'dora'} --max_seq_length {job['tokens']}"
        flags += " --report_to none --ignore_plan True"
        flags += f" --global_batch_size {job['packs'] * self.world}"
        for name in (
            "memory_mode",
            "gather_base",
            "frugal_layers",
            "transposed_layers",
            "base_dtype",
            "expert_arithmetic",
            "cuda_graphs",
        ):
            flags += f" --{name} {job[name]}" if job[name] is not None else ""
        self.args, self.data_args, self.lora_args = train_moe.parse(flags.split())
        self.args, self.planned = train_moe.settle_memory(self.config, self.args, self.data_args, self.lora_args)
        self.model = slices.build_run(self.config, self.args, self.lora_args, self.device, self.mesh)
        pack_graphs.refuse_graphs(self.model, self.args, self.lora_args, self.device)
        self.graphs = self.args.cuda_graphs
        self.model.graphs = pack_graphs.PackGraphs(self.model, job["tokens"]) if self.graphs else None
        self.optimizer = train_moe.make_optimizer(self.model, self.args)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.generator = torch.Generator().manual_seed(2 + dist.get_rank())

    def draw(self, tokens=None):
        """(batch on the CPU, document lengths) of one pack."""
        documents, lengths = self.slices.random_documents(
            tokens or self.job["tokens"], self.config.vocab_size, self.generator
        )
        return self.t.to_batch(documents), lengths

    def synchronize(self):
        if self.cuda:
            self.torch.cuda.synchronize()

    def step(self, batches):
        """One optimiser step as the trainer's: returns the loss, which is the step's only wait for the GPU."""
        torch = self.torch
        supervised = torch.tensor(float(sum(len(b["targets"]) for b in batches)), dtype=torch.float64).to(self.device)
        self.dist.all_reduce(supervised)
        totals = self.t.forward_backward(self.model, batches, supervised.clamp(min=1), self.args, self.device)
        self.t.clip_gradients(self.parameters, self.args.max_grad_norm, self.mesh)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.forget_norms()
        self.dist.all_reduce(totals)
        return (totals[0] / supervised).item()

    def measure(self):
        """The record's figures."""
        from malaysian_sft.account import mfu, train_flops
        from malaysian_sft.attention import attention_backend

        torch, job = self.torch, self.job
        first = time.perf_counter()
        self.step([self.draw()[0] for _ in range(job["packs"])])
        first = time.perf_counter() - first
        self.step([self.draw()[0] for _ in range(job["packs"])])
        if self.cuda and not self.graphs:  # what graphs use was taken when they were recorded
            torch.cuda.reset_peak_memory_stats()
        seconds, lengths = [], []
        with Power(self.cuda) as power:
            for _ in range(job["steps"]):
                drawn = [self.draw() for _ in range(job["packs"])]
                self.dist.barrier()
                self.synchronize()
                started = time.perf_counter()
                loss = self.step([batch for batch, _ in drawn])
                seconds.append(time.perf_counter() - started)
                lengths += [n for _, part in drawn for n in part]
        if not math.isfinite(loss):
            raise ValueError(f"loss {loss}")
        tokens, squares = sum(lengths), sum(n * n for n in lengths)
        flops = train_flops(self.config, tokens, squares, job["r"], use_dora=self.lora_args.use_dora)
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        share = mfu(flops, sum(seconds), 1, name)
        return {
            "device": name,
            "activations": self.args.activations,
            "mode": self.args.memory_mode,
            "frugal_layers": self.args.frugal_layers,
            "transposed_layers": self.args.transposed_layers,
            "gather_base": self.args.gather_base if self.world > 1 else False,
            "cuda_graphs": self.graphs,
            "attention": attention_backend(self.device),
            "tokens_per_second_per_gpu": round(tokens / sum(seconds), 1),
            "mfu": share and round(share, 4),
            "step_ms": [round(1e3 * s, 1) for s in seconds],
            "first_step_seconds": round(first, 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.cuda else None,
            "planned_gib": self.planned and round(self.planned["peak_bytes"] / 2**30, 2),
            "squares_over_tokens": round(squares / tokens),
            "clock_mhz_watts": power.mean,
            "loss": round(loss, 4),
        }

    def micro_batch(self, batch):
        supervised = self.torch.tensor(float(self.job["tokens"]), device=self.device)
        self.t.forward_backward(self.model, [batch], supervised, self.args, self.device)

    def host_ms(self):
        """Wall ms a layer, forward + backward, of packs of 256 tokens, where the host is what takes the time. CUDA
        graphs pad them, so of those until all is launched."""
        times = []
        for _ in range(6):
            batch = self.draw(256)[0]
            self.synchronize()
            started = time.perf_counter()
            self.micro_batch(batch)
            if not self.graphs:
                self.synchronize()
            times.append(time.perf_counter() - started)
        self.optimizer.zero_grad()
        return round(1e3 * statistics.median(times[2:]) / self.job["layers"], 3)

    def profile(self):
        """Kernel ms of one micro-batch by component, its wall ms, the gaps, and communication that nothing hides."""
        if not self.cuda:
            return {}
        from torch.profiler import ProfilerActivity, profile

        batch, lengths = self.draw()
        self.micro_batch(batch)
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.micro_batch(batch)
            self.synchronize()
        self.optimizer.zero_grad()
        return {
            "profiled_squares_over_tokens": round(sum(n * n for n in lengths) / sum(lengths)),
            **by_component(profiler.events()),
        }


def by_component(events):
    """Kernel ms of a profile's events by component, their wall ms, the gaps, and communication that nothing hides."""
    from torch.autograd import DeviceType

    spans, components, others = [], {}, {}
    for event in events:
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        start, end = event.time_range.start, event.time_range.end
        kind = next((name for name, pattern in COMPONENTS if re.search(pattern, event.name)), "other")
        components[kind] = components.get(kind, 0.0) + (end - start) / 1e3
        if kind == "other":
            others[event.name[:60]] = others.get(event.name[:60], 0.0) + (end - start) / 1e3
        spans.append((start, end, kind == "communication"))
    wall = (max(s[1] for s in spans) - min(s[0] for s in spans)) / 1e3
    busy, computing = union(spans), union([s for s in spans if not s[2]])
    return {
        "micro_batch_ms": round(wall, 1),
        "components_ms": {k: round(v, 1) for k, v in sorted(components.items(), key=lambda i: -i[1])},
        "other_kernels_ms": {k: round(v, 2) for k, v in sorted(others.items(), key=lambda i: -i[1])[:6]},
        "gaps_ms": round(wall - busy, 1),
        "communication_not_hidden_ms": round(busy - computing, 1),
        "kernels": len(spans),
    }


def union(spans):
    """ms that at least one of the spans (start, end, ...) in microseconds covers."""
    total, reach = 0.0, -math.inf
    for start, end, *_ in sorted(spans):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total / 1e3


class Power:
    """Mean clock (MHz) and power (W) of the first GPU while a block runs, by nvidia-smi; None without it."""

    def __init__(self, wanted):
        self.wanted, self.mean, self.process = wanted, None, None

    def __enter__(self):
        command = "nvidia-smi --query-gpu=clocks.sm,power.draw --format=csv,noheader,nounits -lms 100 -i 0".split()
        if self.wanted:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_):
        if self.process is None:
            return
        self.process.terminate()
        rows = [re.findall(r"[\d.]+", line) for line in self.process.communicate()[0].splitlines()]
        rows = [[float(x) for x in row] for row in rows if len(row) == 2]
        self.mean = [round(statistics.mean(column)) for column in zip(*rows, strict=True)] if rows else None


def child(job):
    """One process of a configuration; rank 0 writes the record, or what went wrong."""
    import torch

    from malaysian_sft.run import collector_at_rest

    record = {}
    try:
        run = Run(job)
        with collector_at_rest():
            record |= run.measure()
            record |= run.profile()
            record["host_ms_a_layer"] = run.host_ms()
        if run.dist.get_rank() == 0:
            Path(job["result"]).write_text(json.dumps(record))
        run.dist.barrier()
        run.dist.destroy_process_group()
    except torch.OutOfMemoryError as error:
        Path(job["result"]).write_text(json.dumps(record | {"outcome": "does not fit", "why": str(error)[:200]}))
        os._exit(0)  # the other ranks may wait in a collective for ever
    except ValueError as error:
        Path(job["result"]).write_text(json.dumps(record | {"outcome": "refused", "why": str(error)[:300]}))
        os._exit(0)


# ----------------------------------------------------------------------------------------------------------------------
# All of them
# ----------------------------------------------------------------------------------------------------------------------


def start(job, seconds):
    """Run a configuration; returns its record."""
    from malaysian_sft.launch import set_defaults

    with tempfile.TemporaryDirectory() as folder:
        job["result"] = str(Path(folder, "record.json"))
        command = [sys.executable]
        if job["gpus"] > 1:
            command += "-m torch.distributed.run --rdzv_backend c10d --rdzv_endpoint localhost:0".split()
            command += ["--nproc_per_node", str(job["gpus"]), "--"]
        command += [str(Path(__file__).resolve()), "--child", json.dumps(job)]
        environment = dict(os.environ)
        set_defaults(environment)  # as the launchers do
        try:
            done = subprocess.run(command, env=environment, timeout=seconds)
            outcome = {"outcome": f"exit code {done.returncode}"}
        except subprocess.TimeoutExpired:
            outcome = {"outcome": f"not finished in {seconds:.0f} s"}
        if Path(job["result"]).exists():
            outcome = {"outcome": "measured"} | json.loads(Path(job["result"]).read_text())
    return {k: v for k, v in job.items() if k not in ("result", "memory_mode")} | outcome


def main():
    args = parse()
    if args.child:
        return child(json.loads(args.child))
    if args.plot:
        return draw(json.loads(Path(args.out).read_text()), args.plot)
    import bench_train_moe as slices
    import torch

    from malaysian_sft.run import git_commit

    here = torch.cuda.device_count()
    counts = [int(n) for n in args.gpus.split(",")] if args.gpus else sorted({1, max(1, here)})
    records = []
    for model in args.models.split(","):
        layers = args.layers or slices.LAYERS[model]
        for gpus in counts:
            for adapter in args.adapters.split(","):
                job = dict(model=model, adapter=adapter, layers=layers, gpus=gpus, tokens=args.tokens, r=args.r)
                job |= dict(packs=args.packs, steps=args.steps, activations=args.activations)
                job |= dict(
                    memory_mode=args.memory_mode,
                    gather_base=args.gather_base,
                    frugal_layers=args.frugal_layers,
                    transposed_layers=args.transposed_layers,
                    base_dtype=args.base_dtype,
                    expert_arithmetic=args.expert_arithmetic,
                    cuda_graphs=args.cuda_graphs,
                )
                record = start(job, args.seconds)
                record["versions"] = {n: slices.version(n) for n in ("torch", "triton", "transformers", "flash-attn-4")}
                record |= {"commit": git_commit(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
                print(json.dumps(record), flush=True)
                records.append(record)
                if here:
                    append(record, args.out)
    print(table(records))
    print(json.dumps(records))


def append(record, path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*earlier, record], indent=1) + "\n")


COLUMNS = "model adapter layers gpus activations mode tokens_per_second_per_gpu mfu peak_gib planned_gib gaps_ms"
COLUMNS = f"{COLUMNS} communication_not_hidden_ms host_ms_a_layer outcome".split()


def table(records):
    import pandas

    return pandas.DataFrame(records).reindex(columns=COLUMNS).to_string(index=False, na_rep="")


def bar_label(r):
    """What a record is, in two short lines."""
    base = "" if r["gpus"] == 1 else ", base gathered" if r["gather_base"] else ", base whole"
    frugal = f", {r['frugal_layers']} layers frugal" if r["frugal_layers"] else ""
    frugal += ", experts in FP8" if r.get("base_dtype") else ""
    frugal += " products" if r.get("expert_arithmetic") == "fp8" else ""
    frugal += ", CUDA graphs" if r.get("cuda_graphs") else ""
    first = f"{r['model']}, {r['adapter']}, {r['gpus']} x {r['device'].removeprefix('NVIDIA ')}{base}"
    return f"{first}\n{r['activations']}, {r['mode']}{frugal}; {r['attention']}"


def draw(records, path):
    """Stacked bars: where one micro-batch's wall time goes, a bar a record."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [r for r in records if r.get("components_ms")]
    rows = [
        r["components_ms"] | {"communication": r["communication_not_hidden_ms"], "gaps": r["gaps_ms"]} for r in records
    ]
    names = [
        name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("communication", "gaps")
    ]
    figure, axis = pyplot.subplots(figsize=(12, 2.2 + 0.6 * len(records)), layout="constrained")
    left = [0.0] * len(records)
    for i, name in enumerate([*names, "communication", "gaps"]):
        widths = [row.get(name, 0.0) for row in rows]
        colour = {"gaps": "0.85", "communication": "black"}.get(name, f"C{i % 10}")
        label = "communication that nothing hides" if name == "communication" else name
        axis.barh(range(len(rows)), widths, left=left, color=colour, hatch="//" if i >= 10 else "", label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(records)), [bar_label(r) for r in records], fontsize=8)
    for y, (r, x) in enumerate(zip(records, left, strict=True)):
        axis.text(x, y, f" {r['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU", va="center", fontsize=8)
    axis.set_xlim(0, max(left) * 1.25)
    axis.set_xlabel("ms of one pack of 16,384 tokens, forward + backward")
    axis.invert_yaxis()
    figure.legend(ncols=4, fontsize=8, loc="outside lower center")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
