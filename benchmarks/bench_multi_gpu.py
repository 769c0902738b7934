"""Both trainers at full size on the GPUs of one host: speed, memory, communication, loading, and the same results as on
one GPU.

    python3 benchmarks/bench_multi_gpu.py [--gpus 8] [--models ...] [--parts scaling,correctness,dense,load]
    python3 benchmarks/bench_multi_gpu.py --gpus 2 --models tiny --tokens 256 --r 8      two CPU processes, to try it

Starts torchrun itself, once per measurement, each with a time limit; one that fails leaves the others be. Weights are
random and made on the device. On 8 GPUs everything is meant to fit in ten minutes; what there is no time left for is
named, and `--parts` runs it alone.

    scaling      whole optimiser steps of train_moe.py: the first model on 1, 2, 4, ... GPUs (the smaller counts at the
                 same time, each on GPUs of its own), the others on all: tokens/s, MFU, peak memory beside plan.py's,
                 and the share of a step in which the GPU only communicates
    correctness  train_moe.py on a slice of the first model, on one GPU with accumulation and on all: losses, adapters,
                 frozen weights; then killed in a step and resumed
    dense        train_dense.py's Trainer under DeepSpeed ZeRO-3 on models made from their configs
    load         bench_load.py, from local disk

Prints a table for each part and one JSON line; appends a record per measurement to results/multi_gpu.json as soon as
there is one (from a CPU only with --out). Exits with 1 if anything failed.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_train_moe  # noqa: E402 (the repository root must be on the path first)
import multi_gpu_measurements  # noqa: E402
import torch  # noqa: E402
from multi_gpu_measurements import CONFIGS, words  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import HfArgumentParser  # noqa: E402

from malaysian_sft.lora import WEIGHTS  # noqa: E402
from malaysian_sft.verify import verify_adapter  # noqa: E402

PARTS = ("scaling", "correctness", "dense", "load")
STEPS, SAVE_STEPS = 4, 2  # of the runs that are compared; the killed one dies in the last step


@dataclass
class Arguments:
    gpus: int | None = field(default=None, metadata={"help": "default: all there are; without a GPU, two processes"})
    models: str = field(
        default="qwen3-30b-a3b,glm-4.5-air,qwen3-235b-a22b,qwen3-32b,llama-3.1-70b",
        metadata={"help": "comma-separated"},
    )
    parts: str = field(default=",".join(PARTS), metadata={"help": "comma-separated, in the order to run them in"})
    tokens: int = field(default=16384, metadata={"help": "of a pack"})
    accumulation: int = field(
        default=4, metadata={"help": "packs of a GPU in an optimiser step (dense: 1); 4 on 8 GPUs is a launcher's 32"}
    )
    steps: int = field(default=2, metadata={"help": "timed optimiser steps, after one that is not"})
    r: int = field(default=256, metadata={"help": "rank"})
    use_dora: bool = field(default=False, metadata={"help": "DoRA in place of LoRA, for mixtures of experts"})
    activations: str = field(default="auto", metadata={"help": "none, selective, full, or auto: what plan.py chooses"})
    slice_layers: int = field(default=4, metadata={"help": "layers of the model of the correctness part"})
    gigabytes: float = field(default=8.0, metadata={"help": "size of the checkpoint of the load part"})
    limit: float = field(default=170, metadata={"help": "seconds that one measurement may take"})
    minutes: float = field(default=9.5, metadata={"help": "nothing goes on for longer than this after the start"})
    directory: str | None = field(
        default=None, metadata={"help": "local disk to write slices to; default: a temporary directory"}
    )
    out: str | None = field(
        default=None, metadata={"help": "where records are appended; default, on GPUs: results/multi_gpu.json"}
    )


class Host:
    """Starts measurements on the GPUs of this host and keeps what they found."""

    def __init__(self, args, directory):
        self.args, self.directory, self.ends = args, Path(directory), time.monotonic() + 60 * args.minutes
        self.cuda, self.started, self.records, self.failures = torch.cuda.is_available(), 0, [], []
        self.gpus = args.gpus or torch.cuda.device_count() or 2
        self.out = args.out or (str(ROOT / "results" / "multi_gpu.json") if self.cuda else None)

    def start(self, kind, gpus, first=0, **settings):
        """torchrun with `gpus` processes, on the GPUs from number `first` on; returns what `finish` wants."""
        seconds = min(self.args.limit, self.ends - time.monotonic())
        self.started += 1
        base = self.directory / f"{self.started}-{kind}"
        settings = dataclasses.asdict(self.args) | {"output": f"{base}.files"} | settings
        job = {**settings, "kind": kind, "record": f"{base}.record", "seconds": max(1, seconds)}
        environment = dict(os.environ)
        if self.cuda:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(first + gpus)))).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[first : first + gpus])
        rendezvous = "--rdzv_backend c10d --rdzv_endpoint localhost:0"
        launcher = f"-m torch.distributed.run --nproc_per_node {gpus} {rendezvous} --".split()
        command = [sys.executable, *launcher, multi_gpu_measurements.__file__, json.dumps(job)]
        log = Path(f"{base}.log")
        print(f"{time.strftime('%H:%M:%S')} {kind} {job['model']} on {gpus}", flush=True)
        if seconds < 20:
            raise ValueError("no time left")
        with open(log, "w") as file:
            return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT), job, log

    def finish(self, process, job, log, must_die=False):
        """Wait for a measurement; returns its record. Raises ValueError with its last words if it failed."""
        try:
            code = process.wait(job["seconds"] + 30)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its processes, within half a minute
            code = process.wait()
        if must_die:
            if code == 0:
                raise ValueError("was not killed")
            return None
        if code:
            # the rest is torchrun's
            lines = log.read_text(errors="replace").partition("failed (exitcode")[0].splitlines()
            own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise ValueError(own[0] if own else f"exit code {code}\n" + "\n".join(lines[-25:]))
        return json.loads(Path(job["record"]).read_text())

    def measure(self, kind, **settings):
        self.keep(self.finish(*self.start(kind, self.gpus, **settings)))

    def keep(self, record):
        self.records.append(record)
        if self.out:
            path = Path(self.out)
            records = json.loads(path.read_text()) if path.exists() else []
            path.write_text(json.dumps([*records, record], indent=1) + "\n")

    def attempt(self, what, function, *inputs, **settings):
        """`function(*inputs, **settings)`, whose failure is printed and remembered."""
        try:
            return function(*inputs, **settings)
        except (ValueError, OSError) as error:
            print(f"{what} failed: {error}", flush=True)
            self.failures.append(what)
            return None


def measure_scaling(host, names):
    """Every model of `names` on all GPUs; the first one before that on 1, 2, 4, ..., all at once."""
    for name in names:
        smaller = [n for n in (1, 2, 4) if 2 * n <= host.gpus and name == names[0]]
        base = None
        for group in (smaller, [host.gpus]):
            what = {n: f"scaling {name} on {n}" for n in group}
            first = {n: n - 1 if n in smaller else 0 for n in group}
            begun = {n: host.attempt(what[n], host.start, "scaling", n, first=first[n], model=name) for n in group}
            for n in group:
                record = begun[n] and host.attempt(what[n], host.finish, *begun[n])
                if record:
                    base = base or record
                    share = round(record["tokens_per_second_per_gpu"] / base["tokens_per_second_per_gpu"], 4)
                    host.keep(record | {"efficiency": share, "against_gpus": base["gpus"]})


def measure_correctness(host, name):
    """Compare runs of train_moe.py on a slice: one GPU, all GPUs, all GPUs after a kill -9. Raises ValueError for a run
    that fails."""
    gpus, dtype = host.gpus, "bfloat16" if host.cuda else "float32"
    tokens, packs = min(host.args.tokens, 4096), 2 * host.gpus
    base, data = str(host.directory / "slice"), str(host.directory / "chat.jsonl")
    layers = 2 if name == "tiny" else host.args.slice_layers
    common = {
        "model_name_or_path": base,
        "dataset": data,
        "data_cache": host.directory / "cache",
        "dtype": dtype,
        "max_seq_length": tokens,
    }
    common |= {
        "global_batch_size": packs,
        "r": host.args.r,
        "use_dora": host.args.use_dora,
        "activations": "none",
        "report_to": "none",
    }
    common |= {
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "num_train_epochs": 9,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
    }

    def run(n, name_of_run, kill_at=0, resume=False):
        out = host.directory / name_of_run
        flags = common | {"run_name": name_of_run, "output_dir": out, "resume": resume}
        begun = host.start(
            "train", n, model=name, argv=words(flags), kill_at=kill_at, saved_step=SAVE_STEPS, output=str(out)
        )
        return out, host.finish(*begun, must_die=kill_at > 0)

    slice_of = dict(model=name, layers=layers, dtype=dtype, output=base, data=data, rows=60 * packs, tokens=tokens)
    host.finish(*host.start("slice", 1, **slice_of))
    alone, _ = run(1, "alone")
    together, record = run(gpus, "together")
    killed, _ = run(gpus, "killed", kill_at=STEPS)
    if len(losses(killed)) != STEPS - 1:
        raise ValueError(f"the run to be killed in step {STEPS} logged {len(losses(killed))} steps")
    run(gpus, "killed", resume=True)
    faults = [fault for out in (alone, together, killed) for fault in verify_adapter(out / f"checkpoint-{STEPS}", base)]
    # sums over ranks are in another order, and AdamW makes a whole step of a gradient that is only noise
    bound, adapter_bound = (5e-3, 0.1) if dtype == "bfloat16" else (1e-4, 1e-2)
    found = {
        "loss_difference": difference_of_losses(alone, together),
        "loss_difference_resumed": difference_of_losses(killed, together),
        "adapter_difference": difference_of_adapters(alone, together),
        "adapter_difference_resumed": difference_of_adapters(killed, together),
    }
    passed = not faults and all(value <= (bound if "loss" in key else adapter_bound) for key, value in found.items())
    settings = {"layers": layers, "tokens": tokens, "r": host.args.r, "dtype": dtype, "accumulation": packs // gpus}
    settings["losses"] = [round(loss, 4) for loss in losses(together)]
    host.keep(
        record | {"part": "correctness"} | settings | found | {"faults_in_adapters": len(faults), "passed": passed}
    )
    if not passed:
        raise ValueError(f"{found}, bounds {bound} and {adapter_bound}; {faults[:3]}")


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def difference_of_losses(a, b):
    """Largest relative difference of the losses of two runs' steps, which have to be all there."""
    a, b = losses(a), losses(b)
    if not len(a) == len(b) == STEPS:
        raise ValueError(f"{len(a)} and {len(b)} steps were logged, not {STEPS}")
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def difference_of_adapters(a, b):
    """|a - b| / |b| over every lora_B, which starts at zero: all that is in it was trained."""
    a, b = (load_file(out / f"checkpoint-{STEPS}" / WEIGHTS) for out in (a, b))
    names = [name for name in b if "lora_B" in name]
    squares = torch.tensor(
        [[(a[name] - b[name]).square().sum(), b[name].square().sum()] for name in names], dtype=torch.float64
    ).sum(0)
    return (squares[0] / squares[1]).sqrt().item()


def print_tables(records):
    """A table for each part, one column a measurement; the rest of a record is only in the JSON."""
    hidden = ("part", "device", "attention", "versions", "commit", "date", "step_seconds", "losses")
    for part in PARTS:
        columns = [record for record in records if record["part"] == part]
        for key in [key for key in columns[0] if key not in hidden] if columns else ():
            values = [record[key] for record in columns]
            cells = ["" if value is None else f"{value:.3g}" if "difference" in key else str(value) for value in values]
            print(f"{part:<12}{key:<30}" + "".join(f"{cell:>18}" for cell in cells))


def main():
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    names, parts = args.models.split(","), args.parts.split(",")
    unknown = [part for part in parts if part not in PARTS] + [n for n in names if n not in CONFIGS and n != "tiny"]
    if unknown:
        sys.exit(f"error: {unknown[0]}: the parts are {', '.join(PARTS)}, the models {', '.join(CONFIGS)}, tiny")
    experts = [name for name in names if name in bench_train_moe.MODELS]
    plain = [name for name in names if name == "tiny" or name not in bench_train_moe.MODELS]
    there = torch.cuda.device_count()
    if there and (args.gpus or 0) > there:
        sys.exit(f"error: --gpus {args.gpus}: there are {there}")
    directory = tempfile.mkdtemp(prefix="bench_multi_gpu-", dir=args.directory)
    host = Host(args, directory)
    try:
        for part in parts:
            if part == "scaling" and experts:
                measure_scaling(host, experts)
            elif part == "dense":
                for name in plain:
                    host.attempt(f"dense {name}", host.measure, "dense", model=name)
            elif part == "load":
                host.attempt("load", host.measure, "load", model="experts as qwen3-30b-a3b's")
            elif part == "correctness" and experts:
                host.attempt("correctness", measure_correctness, host, experts[0])
    finally:
        shutil.rmtree(directory)
    print_tables(host.records)
    print(json.dumps({"records": host.records, "failed": host.failures}), flush=True)
    if host.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
