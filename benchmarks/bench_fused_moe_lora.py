"""Time and memory of one routed-experts block with LoRA or DoRA, forward and backward, against what else there is.

    python benchmarks/bench_fused_moe_lora.py              # every model, adapter, routing and implementation
    python benchmarks/bench_fused_moe_lora.py --models qwen3-30b-a3b --implementations fused_moe_lora --per_op true
    python benchmarks/bench_fused_moe_lora.py --implementations unsloth_zoo,sonic_moe --routings random
    python benchmarks/bench_fused_moe_lora.py --implementations fused_moe_lora,fused_moe_lora_widened,fused_moe_lora_fp8

Appends records to results/fused_moe_lora.json (--output), prints a table and ends in one JSON line. Needs a CUDA
device.

How: one process per implementation, each checked against fp32 at every setting before it is timed (relative error of
the output and of every gradient, compared with plain PyTorch in bf16 on the same inputs); times are medians of
CUDA-graph replays where the implementation can be captured and of back-to-back runs where not, `idle_start_ms` that of
single runs from an idle device; a dense 8192^3 product per process tells how fast the device ran. saved_mib is the
memory kept for the backward beyond input and output. `back_to_back_ms` is there for all, since not every peer can be
captured; `sustained_ms` is the time under --seconds of load, where large blocks meet the device's power limit (with
nvidia-ml-py installed its watts and MHz are recorded too).

fused_moe_lora_widened and fused_moe_lora_fp8 have their weights in FP8 (moe_lora_in_fp8.py). Their fp32 truth has the
same weights; that of fused_moe_lora_fp8 is the definition of its products, max_error_fp32 how far they are from fp32's.

The peers are in moe_lora_peers.py and measured if they are installed: torch's grouped_mm with LoRA by grouped_mm,
transformers with PEFT's target_parameters, axolotl's scattermoe_lora, unsloth_zoo, sonic-moe. Records with shared_A are
of peers with one lora_A for gate and up, so slightly less to do. --per_op adds to our records the four big products
beside dense cuBLAS products of the same size. Checking the largest setting (235B, T = 65,536) should take 30 to 40 GiB
(an estimate; check_peak_mib of each record says).
"""

import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pandas
import torch
from moe_lora_peers import NEEDS, PEERS, SHARED_A

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moe_lora_in_fp8 import IN_FP8, in_fp8, room_mib, store_in_fp8  # noqa: E402

from fused_moe_lora import Projection, moe_lora_reference  # noqa: E402
from malaysian_sft.moe_autograd import DX_SLICES, Y_SLICES, column_slices, moe_lora  # noqa: E402
from malaysian_sft.run import git_commit  # noqa: E402

# hidden, intermediate, experts, experts per token
MODELS = {
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "qwen3-235b-a22b": (4096, 1536, 128, 8),
    "glm-4.5-air": (4096, 1408, 128, 8),
}
RANK, SCALING = 32, 2.0
OURS = ("fused_moe_lora", *IN_FP8)
CAPTURED = (*OURS, "torch_grouped_mm")  # the others cannot be replayed as a CUDA graph, or were not tried


@dataclass
class Arguments:
    models: str = ",".join(MODELS)
    adapters: str = "lora,dora"
    routings: str = "random,skewed"
    modes: str = "fast,frugal"
    tokens: str = "16384"
    settings: str = ""  # instead of all combinations: model:adapter:routing:mode:tokens, comma-separated
    implementations: str = ",".join(["fused_moe_lora", *PEERS])
    output: str = "results/fused_moe_lora.json"
    commit: str = ""  # taken from git if empty
    per_op: bool = (
        False  # also print and record every kernel's time, and the four big products beside cuBLAS; ours only
    )
    seconds: float = 2.0  # of runs without a break for sustained_ms
    autotune: str = "short"  # how far peers search: "short" | "full", see moe_lora_peers.py
    seed: int = 1


# ----------------------------------------------------------------------------------------------------------------------
# Inputs and truth
# ----------------------------------------------------------------------------------------------------------------------


NAMES = "gate", "up", "down"


def make_inputs(model, adapter, routing, tokens, seed, shared_A, device="cuda"):
    """Everything a block needs, bf16 as the ring hands it over: a dict of leaves and a dict of fixed
    tensors."""
    H, I, E, top_k = MODELS[model]  # noqa: E741
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator, device=device) * std).to(torch.bfloat16)

    gate_up, down = (torch.empty(E, *s, device=device, dtype=torch.bfloat16) for s in ((2 * I, H), (H, I)))
    for e in range(E):
        gate_up[e], down[e] = normal(2 * I, H, std=H**-0.5), normal(H, I, std=I**-0.5)
    logits = torch.randn(tokens, E, generator=generator, device=device)
    if routing == "skewed":
        # every token takes expert 0, an eighth of all rows at top-8 (no expert can have more); four experts get none
        logits[:, 0] = 50.0
        logits[:, 1:5] = -1e4
    weights, index = logits.topk(top_k, dim=-1)
    leaves = {
        "x": normal(tokens, H),
        "top_k_weights": weights.clamp(-10, 10).softmax(-1),
        "gate_A": normal(E, RANK, H, std=H**-0.5),
        "gate_B": normal(E, I, RANK, std=0.1 * RANK**-0.5),
        "up_A": normal(E, RANK, H, std=H**-0.5),
        "up_B": normal(E, I, RANK, std=0.1 * RANK**-0.5),
        "down_A": normal(E, RANK, I, std=I**-0.5),
        "down_B": normal(E, H, RANK, std=0.1 * RANK**-0.5),
    }
    if shared_A:
        leaves["up_A"] = leaves["gate_A"].clone()
    if adapter == "dora":
        for name, out in (("gate", I), ("up", I), ("down", H)):
            leaves[f"{name}_scale"] = 1 + 0.1 * torch.randn(E, out, generator=generator, device=device)
    return leaves, {"index": index, "gate_up": gate_up, "down": down, "dout": normal(tokens, H)}


def call(block, leaves, fixed, **options):
    routed = leaves["x"], fixed["index"], leaves["top_k_weights"]
    adapters = [Projection(*(leaves.get(f"{name}_{part}") for part in ("A", "B", "scale"))) for name in NAMES]
    return block(*routed, fixed["gate_up"], fixed["down"], *adapters, SCALING, **options)


def reference(leaves, fixed, dtype, **options):
    """Output and gradients by moe_lora_reference in `dtype` with `options`, in chunks of tokens so that the longest
    batch fits."""
    totals, outputs = {}, []
    for rows in torch.arange(fixed["index"].shape[0], device=fixed["index"].device).split(8192):
        part = {
            n: (t[rows] if n in ("x", "top_k_weights") else t).to(dtype).detach().requires_grad_()
            for n, t in leaves.items()
        }
        out = call(moe_lora_reference, part, {**fixed, "index": fixed["index"][rows]}, **options)
        out.backward(fixed["dout"][rows].to(dtype))
        outputs.append(out.detach())
        for name, leaf in part.items():
            if name in ("x", "top_k_weights"):
                totals.setdefault(name, []).append(leaf.grad)
            else:
                totals[name] = leaf.grad.float() + totals.get(name, 0)
    grads = {name: torch.cat(g) if isinstance(g, list) else g for name, g in totals.items()}
    return {"out": torch.cat(outputs), **grads}


def relative_errors(got, truth):
    return {
        n: (torch.linalg.vector_norm(got[n].float() - t.float()) / torch.linalg.vector_norm(t.float())).item()
        for n, t in truth.items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# Ours; the peers have the same interface: function(leaves, fixed, ...) -> (forward, {name of a gradient: function that
# reads it})
# ----------------------------------------------------------------------------------------------------------------------


def fused(leaves, fixed, mode):
    return lambda: call(moe_lora, leaves, fixed, mode=mode), {
        name: lambda leaf=leaf: leaf.grad for name, leaf in leaves.items()
    }


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


def clear(leaves):
    for leaf in leaves.values():
        leaf.grad = None


def events(count):
    return [torch.cuda.Event(enable_timing=True) for _ in range(count)]


def time_single(forward, leaves, dout, repeats=10):
    """(forward ms, backward ms) of single runs, each begun on an idle device: medians, and the spread of their sum."""
    pairs = []
    for _ in range(repeats):
        clear(leaves)
        torch.cuda.synchronize()
        start, middle, end = events(3)
        start.record()
        out = forward()
        middle.record()
        out.backward(dout)
        end.record()
        torch.cuda.synchronize()
        pairs.append((start.elapsed_time(middle), middle.elapsed_time(end)))
        del out
    return [statistics.median(p[i] for p in pairs) for i in (0, 1)]


def time_runs(run, repeats=7, inner=5):
    """ms of one run when they follow each other without a gap: median over `repeats`, and (max - min) / median."""
    times = []
    for _ in range(repeats):
        start, end = events(2)
        start.record()
        for _ in range(inner):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / inner)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def sustained(run, ms, seconds):
    """What remains of the speed under load: ms of one run in the second half of `seconds` of them, and there the
    device's watts and MHz.

    `ms`: about what a run takes. A short measurement may end before the device lowers its clock to keep to its power
    limit.
    """
    runs = max(10, int(seconds * 1e3 / ms / 2))
    marks = events(3)
    for mark in marks[:2]:
        mark.record()
        for _ in range(runs):
            run()
    marks[2].record()
    samples, metered = [], find_spec("pynvml") is not None
    while not marks[2].query():
        time.sleep(0.02)
        if metered and marks[1].query():
            samples.append((torch.cuda.power_draw() / 1e3, torch.cuda.clock_rate()))
    record = {"sustained_ms": round(marks[1].elapsed_time(marks[2]) / runs, 4)}
    if samples:
        watts, mhz = (statistics.median(part) for part in zip(*samples, strict=True))
        record.update(sustained_watts=round(watts), sustained_mhz=round(mhz))
    return record


def capture(run):
    """`run` as a CUDA graph, or None if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except (RuntimeError, torch.AcceleratorError):
        torch.cuda.synchronize()
        return None
    return graph


def measure(forward, leaves, dout, can_capture, seconds):
    """The record's times and memory; fwd_ms and bwd_ms by graph replay if the implementation can be captured, else by
    single runs."""

    def both():
        clear(leaves)
        forward().backward(dout)

    def forward_only():
        forward()

    for _ in range(3):
        both()
    fwd_single, bwd_single = time_single(forward, leaves, dout)
    total, spread = time_runs(both)
    back_to_back, fwd, timing = total, fwd_single, "back-to-back"
    graphs = [capture(forward_only), capture(both)] if can_capture else [None]
    if None not in graphs:
        timing = "graph"
        fwd = time_runs(graphs[0].replay)[0]
        total, spread = time_runs(graphs[1].replay)
    under_load = sustained(both if None in graphs else graphs[1].replay, total, seconds)
    del graphs
    clear(leaves)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    torch.cuda.synchronize()
    saved = torch.cuda.memory_allocated() - base - out.numel() * out.element_size()
    out.backward(dout)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    del out
    clear(leaves)
    times = {"fwd_ms": fwd, "bwd_ms": total - fwd, "total_ms": total, "spread": spread}
    times.update(back_to_back_ms=back_to_back, idle_start_ms=fwd_single + bwd_single)
    memory = {"saved_mib": saved >> 20, "peak_mib": peak >> 20}
    return {**{k: round(v, 4) for k, v in times.items()}, "timing": timing, **under_load, **memory}


def dense_tflops(dtype=torch.bfloat16):
    """TFLOP/s of an 8192^3 product in bf16, or E4M3 with one scale: how fast this device runs in this process."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    one = torch.ones((), device="cuda")

    def multiply():
        if dtype == torch.bfloat16:
            return a @ b
        return torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    for _ in range(3):
        multiply()
    return 2 * 8192**3 / time_runs(multiply)[0] / 1e9


def useful_flops(model, tokens, shared_A):
    """Forward and backward of one block: 4 a frozen weight and row, 6 an adapter weight and row."""
    H, I, _, top_k = MODELS[model]  # noqa: E741
    base, lora = 3 * H * I, RANK * ((1 if shared_A else 2) * H + 2 * I + I + H)
    return tokens * top_k * (4 * base + 6 * lora)


def kernel_times(forward, leaves, dout, repeats=5):
    """(name, us) of every kernel of one forward and backward, in order: medians of runs that follow each other."""
    from torch.profiler import ProfilerActivity, profile

    def both():
        clear(leaves)
        forward().backward(dout)

    both()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            both()
        torch.cuda.synchronize()
    kernels = sorted((e for e in profiler.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    per_run = len(kernels) // repeats
    return [
        (kernels[i].name, statistics.median(e.time_range.elapsed_us() for e in kernels[i::per_run]))
        for i in range(per_run)
    ]


def per_op(forward, leaves, dout, setting):
    """For the record: `kernels`, (name, us) of each in order, and `per_op`, the four big products beside cuBLAS's of
    the same size.

    TFLOP/s of the frozen weights' FLOPs alone, while the time includes gathering, LoRA and SwiGLU where the kernel does
    them. cuBLAS: one dense product, whose weights stay in L2; and a batch of one product for each expert, all with
    equally many rows. `per_op` is empty on GPUs before Hopper, where the big products share their kernel with the small
    ones.
    """
    model, adapter, _, mode, tokens = setting
    H, I, E, top_k = MODELS[model]  # noqa: E741
    S = tokens * top_k
    kernels = kernel_times(forward, leaves, dout)
    for name, us in kernels:
        print(f"    {us:9.1f} us  {name[:100]}")
    print(f"    {sum(us for _, us in kernels):9.1f} us  all kernels", flush=True)
    gemms = [us for name, us in kernels if "hopper_gemm_kernel" in name or "hopper_fp8_gemm_kernel" in name]
    y_slices, dx_slices = (len(column_slices(H, wanted)) for wanted in (Y_SLICES, DX_SLICES))
    recomputed = (2 if adapter == "dora" else 1) if mode == "frugal" else 0
    launches = {
        "gate_up": 1,
        "down": 1 if adapter == "dora" else y_slices,
        "recomputed": recomputed,
        "da": 1,
        "dx": dx_slices,
    }
    if len(gemms) != sum(launches.values()):
        launches = {}
    rows = []
    for name, count in launches.items():
        us, gemms = sum(gemms[:count]), gemms[count:]
        if name == "recomputed":
            continue
        K, N = {"gate_up": (H, 2 * I), "down": (I, H), "da": (H, I), "dx": (2 * I, H)}[name]
        flops = 2 * S * K * N
        rows.append({"name": name, "us": round(us, 1), "tflops": round(flops / us / 1e6, 1)})
        for kind, shapes in (("dense", ((S, K), (K, N))), ("batched", ((E, S // E, K), (E, K, N)))):
            a, b = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
            a @ b
            rows[-1][f"{kind}_tflops"] = round(flops / time_runs(lambda a=a, b=b: a @ b)[0] / 1e9, 1)
            del a, b
        line = (
            "    {name:8} {us:9.1f} us  {tflops:6.1f} TFLOP/s; cuBLAS dense {dense_tflops:6.1f}, batched"
            " {batched_tflops:6.1f}"
        )
        print(line.format(**rows[-1]), flush=True)
    return {"kernels": [[name, round(us, 1)] for name, us in kernels], "per_op": rows}


def worker(implementation, settings, arguments):
    """Check and time one implementation at each setting; prints one JSON line per record."""
    torch.backends.cuda.matmul.allow_tf32 = False
    sentinels = {"dense_8192_tflops": round(dense_tflops(), 1)}
    arithmetic = {"arithmetic": IN_FP8.get(implementation, "bf16")}
    if arithmetic["arithmetic"] == "fp8":
        sentinels["dense_8192_fp8_tflops"] = round(dense_tflops(torch.float8_e4m3fn), 1)
    for model, adapter, routing, mode, tokens in settings:
        shared_A = implementation in SHARED_A
        leaves, fixed = make_inputs(model, adapter, routing, tokens, arguments.seed, shared_A)
        if implementation in IN_FP8:
            fixed = store_in_fp8(fixed)
        record = {
            "model": model,
            "adapter": adapter,
            "routing": routing,
            "mode": mode,
            "tokens": tokens,
            "implementation": implementation,
        }
        load = torch.bincount(fixed["index"].reshape(-1), minlength=MODELS[model][2]).float()
        if implementation in NEEDS:
            record["autotune"] = arguments.autotune
        record.update(
            rank=RANK,
            shared_A=shared_A,
            max_over_mean_load=round((load.max() / load.mean()).item(), 2),
            min_load=int(load.min()),
        )
        try:
            torch.cuda.reset_peak_memory_stats()
            truth = reference(leaves, fixed, torch.float32, **arithmetic)
            record["check_peak_mib"] = torch.cuda.max_memory_allocated() >> 20
            plain = relative_errors(reference(leaves, fixed, torch.bfloat16, **arithmetic), truth)
            exact = reference(leaves, fixed, torch.float32) if arithmetic["arithmetic"] == "fp8" else None
            leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
            if implementation in IN_FP8:
                fixed = {name: t for name, t in fixed.items() if name not in ("gate_up", "down")}  # of fp32
                record["room_mib"] = room_mib(implementation, fixed)
                forward, reads = in_fp8(call, implementation, leaves, fixed, mode)
            elif implementation == "fused_moe_lora":
                forward, reads = fused(leaves, fixed, mode)
            else:
                forward, reads = PEERS[implementation](leaves, fixed, SCALING, arguments.autotune)
            out = forward()
            out.backward(fixed["dout"])
            if "gate_A+up_A" in reads:
                truth["gate_A+up_A"] = truth.pop("gate_A") + truth.pop("up_A")
                plain["gate_A+up_A"] = max(plain.pop("gate_A"), plain.pop("up_A"))
            found = {"out": out.detach(), **{n: read() for n, read in reads.items()}}
            errors = relative_errors(found, truth)
            if exact is not None:
                record["max_error_fp32"] = round(max(relative_errors(found, exact).values()), 5)
            del out, truth, found, exact
            worst = max(errors, key=lambda n: errors[n])
            # a peer may round in more places than plain PyTorch does; anything beyond a few times its error is another
            # function
            wrong = {n: e for n, e in errors.items() if not e <= 4 * plain[n] + 1e-3}
            record.update(
                max_error=round(errors[worst], 5),
                max_error_of=worst,
                max_error_torch_bf16=round(max(plain.values()), 5),
            )
            if wrong:
                record["failed"] = f"wrong: {wrong}"
            else:
                record.update(measure(forward, leaves, fixed["dout"], implementation in CAPTURED, arguments.seconds))
                record["tflops"] = round(useful_flops(model, tokens, shared_A) / record["total_ms"] / 1e9, 1)
                if arguments.per_op and implementation in OURS:
                    record.update(per_op(forward, leaves, fixed["dout"], (model, adapter, routing, mode, tokens)))
        except torch.OutOfMemoryError:
            record["failed"] = "out of memory"
        record.update(sentinels)
        print("RECORD " + json.dumps(record), flush=True)
        leaves = fixed = forward = reads = None
        torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------------------------
# Main
# ----------------------------------------------------------------------------------------------------------------------


def settings_of(implementation, arguments):
    """(model, adapter, routing, mode, tokens) to run: peers know neither DoRA nor modes."""
    ours = implementation in OURS
    if arguments.settings:
        listed = [tuple(setting.split(":")) for setting in arguments.settings.split(",")]
        return [(*names, int(tokens)) for *names, tokens in listed if ours or names[1::2] == ["lora", "fast"]]
    return [
        (model, adapter, routing, mode, int(tokens))
        for model in arguments.models.split(",")
        for tokens in arguments.tokens.split(",")
        for adapter in (arguments.adapters.split(",") if ours else ["lora"])
        for routing in arguments.routings.split(",")
        for mode in (arguments.modes.split(",") if ours else ["fast"])
    ]


def versions():
    found = {"torch": torch.__version__}
    for name in ("triton", "transformers", "peft", "liger-kernel", "axolotl", "unsloth_zoo", *NEEDS["sonic_moe"]):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def store(record, output):
    output.parent.mkdir(parents=True, exist_ok=True)
    previous = json.loads(output.read_text()) if output.exists() else []
    output.write_text(json.dumps([*previous, record], indent=1) + "\n")


def print_table(records):
    columns = (
        "model tokens adapter routing mode implementation fwd_ms bwd_ms total_ms back_to_back_ms idle_start_ms"
        " sustained_ms tflops saved_mib peak_mib room_mib max_error max_error_fp32 failed"
    ).split()
    print(pandas.DataFrame(records).reindex(columns=columns).to_string(index=False, na_rep=""))


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        job = json.loads(sys.argv[2])
        return worker(job["implementation"], job["settings"], Arguments(**job["arguments"]))
    from transformers import HfArgumentParser

    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a CUDA device; on a CPU only the reference runs")
    listed = [setting.split(":") for setting in arguments.settings.split(",") if setting]
    malformed = [":".join(setting) for setting in listed if len(setting) != 5 or not setting[4].isdecimal()]
    if malformed:
        sys.exit(
            f"error: --settings {malformed[0]}: expected model:adapter:routing:mode:tokens, e.g."
            " qwen3-30b-a3b:lora:random:fast:16384"
        )
    unknown = [m for m in arguments.models.split(",") + [setting[0] for setting in listed] if m not in MODELS]
    known = [*OURS, *PEERS]
    unknown += [i for i in arguments.implementations.split(",") if i not in known]
    if unknown:
        sys.exit(
            f"error: unknown {', '.join(unknown)}; models: {', '.join(MODELS)}; implementations: {', '.join(known)}"
        )
    if arguments.autotune not in ("short", "full"):
        sys.exit(f"error: --autotune {arguments.autotune}: expected short or full")

    common = {
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "commit": arguments.commit or git_commit(),
        "date": str(date.today()),
    }
    records = []
    for implementation in arguments.implementations.split(","):
        missing = [name for name in NEEDS.get(implementation, ()) if name not in common["versions"]]
        if missing:
            print(f"{implementation}: skipped, not installed: {', '.join(missing)}", flush=True)
            continue
        settings = settings_of(implementation, arguments)
        while settings:
            job = {"implementation": implementation, "settings": settings, "arguments": asdict(arguments)}
            process = subprocess.Popen(
                [sys.executable, __file__, "--worker", json.dumps(job)], stdout=subprocess.PIPE, text=True
            )
            for line in process.stdout:
                if line.startswith("RECORD "):
                    records.append({**json.loads(line.removeprefix("RECORD ")), **common})
                    settings = settings[1:]
                    store(records[-1], Path(arguments.output))
                else:
                    print(line, end="", flush=True)
            if process.wait() == 0:
                break
            if settings:  # the one it died in is a failure, the others get a new process
                names = dict(zip(("model", "adapter", "routing", "mode", "tokens"), settings[0], strict=True))
                records.append(
                    {**names, "implementation": implementation, "failed": f"exit code {process.returncode}", **common}
                )
                store(records[-1], Path(arguments.output))
                settings = settings[1:]
    print_table(records)
    ours = {}
    for r in records:
        if "total_ms" in r and r["implementation"] in OURS:
            stored = [r["implementation"]] if r["implementation"] in IN_FP8 else []
            ours[(r["model"], r["tokens"], r["adapter"], r["routing"], r["mode"], *stored)] = r["total_ms"]
    totals = {"/".join(map(str, key)): value for key, value in ours.items()}
    print(
        json.dumps(
            {"benchmark": "fused_moe_lora", "records": len(records), "total_ms": totals, "device": common["device"]}
        )
    )
    return None if records and math.isfinite(sum(ours.values())) else sys.exit("error: nothing was measured")


if __name__ == "__main__":
    main()
