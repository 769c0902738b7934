"""Both trainers at full size on the GPUs of one host: speed, memory, communication, loading, and the same results as on one GPU.

    python3 benchmarks/bench_multi_gpu.py [--gpus 8] [--models ...] [--parts scaling,dense,load,correctness]
    python3 benchmarks/bench_multi_gpu.py --gpus 2 --models tiny --tokens 256 --r 8      two processes on a CPU, to try it out

Starts torchrun itself, once per measurement, each with a time limit; one that fails leaves the others be. Weights are random and made on
the device. On 8 GPUs everything is meant to fit in ten minutes; what there is no time left for is named, and `--parts` runs it alone.

    scaling      whole optimiser steps of train_moe.py: the first model on 1, 2, 4, ... GPUs (the smaller counts at the same time, each
                 on GPUs of its own), the others on all: tokens/s, MFU, peak memory beside plan.py's, and the share of a step in which
                 the GPU only communicates
    dense        train_dense.py's Trainer under DeepSpeed ZeRO-3 on a model made from its config
    load         bench_load.py, from local disk
    correctness  train_moe.py on a slice of the first model, on one GPU with accumulation and on all: losses, adapters, frozen weights;
                 then killed in a step and resumed

Prints a table for each part and one JSON line; appends a record per measurement to results/multi_gpu.json as soon as there is one (from a
CPU only with --out). Exits with 1 if anything failed.
"""

import dataclasses
import faulthandler
import json
import math
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import bench_train_moe  # noqa: E402
import numpy as np  # noqa: E402 (the repository root must be on the path first)
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig  # noqa: E402

import adapter  # noqa: E402
import multipack  # noqa: E402
import plan  # noqa: E402
import train_moe  # noqa: E402
from fused_moe_lora import local_tensor  # noqa: E402
from record import git_commit  # noqa: E402

CONFIGS = {  # published config.json files; those of mixtures of experts only say how many layers there are
    "qwen3-30b-a3b": "Qwen3-30B-A3B-Instruct-2507",
    "glm-4.5-air": "GLM-4.5-Air",
    "qwen3-235b-a22b": "Qwen3-235B-A22B-Instruct-2507",
    "qwen3-32b": "Qwen3-32B",
    "llama-3.1-70b": "Llama-3.1-70B-Instruct",
    "qwen2.5-72b": "Qwen2.5-72B-Instruct",
}
PARTS = ("scaling", "dense", "load", "correctness")
STEPS, SAVE_STEPS = 4, 2  # of the runs that are compared; the killed one dies in the last step


@dataclass
class Arguments:
    gpus: int | None = field(default=None, metadata={"help": "default: all there are; without a GPU, two processes"})
    models: str = field(default="qwen3-30b-a3b,glm-4.5-air,qwen3-235b-a22b,qwen3-32b,llama-3.1-70b", metadata={"help": "comma-separated"})
    parts: str = field(default=",".join(PARTS), metadata={"help": "comma-separated, in the order to run them in"})
    tokens: int = field(default=16384, metadata={"help": "of a pack"})
    accumulation: int = field(
        default=4, metadata={"help": "packs of a GPU in one optimiser step (dense: 1); 4 on 8 GPUs is a launcher's 32"}
    )
    steps: int = field(default=2, metadata={"help": "timed optimiser steps, after one that is not"})
    r: int = field(default=256, metadata={"help": "rank"})
    use_dora: bool = field(default=False, metadata={"help": "DoRA in place of LoRA, for mixtures of experts"})
    activations: str = field(default="auto", metadata={"help": "none, selective, full, or auto: what plan.py chooses"})
    slice_layers: int = field(default=4, metadata={"help": "layers of the model of the correctness part"})
    gigabytes: float = field(default=8.0, metadata={"help": "size of the checkpoint of the load part"})
    limit: float = field(default=170, metadata={"help": "seconds that one measurement may take"})
    minutes: float = field(default=9.5, metadata={"help": "nothing goes on for longer than this after the start"})
    directory: str | None = field(default=None, metadata={"help": "local disk to write slices to; default: a temporary directory"})
    out: str | None = field(default=None, metadata={"help": "where records are appended; default, on GPUs: results/multi_gpu.json"})
    worker: str | None = field(default=None, metadata={"help": "a measurement as JSON, in the processes that this program starts"})


# ------------------------------------------------------------------------------------------------------------------------------
# Communication that nothing hides
# ------------------------------------------------------------------------------------------------------------------------------


def covered(intervals):
    """Length of the union of (start, end) intervals."""
    total, reached = 0, -math.inf
    for start, end in sorted(intervals):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def not_hidden(communication, compute):
    """How long some interval of `communication` runs while none of `compute` does."""
    return covered([*communication, *compute]) - covered(compute)


def intervals_by_kind(events, cuda):
    """(communication, compute): lists of (start, end) in microseconds of a profile's kernels; on a CPU, of its operators."""
    communication, compute = [], []
    for event in events:
        interval = (event.time_range.start, event.time_range.end)
        if cuda:
            # annotations also have a row on the GPU's timeline, as long as everything that was launched in them
            if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
                continue
            if "nccl" in event.name.lower():
                communication.append(interval)
            elif not event.name.startswith(("Memcpy", "Memset")):
                compute.append(interval)
        elif event.name.startswith("gloo:"):
            communication.append(interval)
        elif event.name.startswith("aten::"):
            compute.append(interval)
    return communication, compute


def share_not_hidden(function, device):
    """Share of the time of one call of `function` in which this GPU only communicates; None if no communication was seen."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        bench_train_moe.synchronize(device)
        started = time.perf_counter()
        function()
        bench_train_moe.synchronize(device)
        seconds = time.perf_counter() - started
    communication, compute = intervals_by_kind(profiled.events(), cuda)
    return round(not_hidden(communication, compute) / 1e6 / seconds, 4) if communication else None


# ------------------------------------------------------------------------------------------------------------------------------
# Measurements: each in processes of its own, started by torchrun
# ------------------------------------------------------------------------------------------------------------------------------


def published_config(name):
    return plan.load_config(ROOT / "tests" / "configs" / f"{CONFIGS[name]}.json")


def facts(job, device):
    """What every record carries."""
    cuda = device.type == "cuda"
    packages = ("torch", "triton", "transformers", "peft", "deepspeed", "flash-attn-4")
    return {
        "part": job["kind"],
        "model": job["model"],
        "gpus": int(os.environ["WORLD_SIZE"]),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "attention": multipack.attention_backend(device),
        "versions": {name: bench_train_moe.version(name) for name in packages} | {"nccl": torch.cuda.nccl.version() if cuda else None},
        "commit": git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def gib(size):
    return round(size / 2**30, 2)


def rounded(share):
    return None if share is None else round(share, 4)


def scaling(job):
    """Optimiser steps of train_moe.py on a whole model with random weights."""
    device = train_moe.setup_distributed()
    world, name = dist.get_world_size(), job["model"]
    flags = {"model_name_or_path": name, "activations": job["activations"], "r": job["r"], "use_dora": job["use_dora"]}
    flags |= {"max_seq_length": job["tokens"], "global_batch_size": world * job["accumulation"]}
    run, data_args, lora_args = train_moe.parse([word for key, value in flags.items() for word in (f"--{key}", str(value))])
    layers = 2 if name == "tiny" else published_config(name).num_hidden_layers
    planned = train_moe.settle_memory(bench_train_moe.make_config(name, layers), run, data_args, lora_args)
    mesh = train_moe.make_mesh(device, 1)
    chosen = bench_train_moe.Arguments(activations=run.activations, memory_mode=run.memory_mode, use_dora=job["use_dora"], r=job["r"])
    config, model = bench_train_moe.build(name, layers, chosen, "bfloat16", device, mesh)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = train_moe.make_optimizer(model, run)
    generator = torch.Generator().manual_seed(2 + dist.get_rank())

    def draw():
        """A step's packs of this rank, and [tokens, sum of squared lengths, supervised tokens] of all ranks'."""
        packs = [
            bench_train_moe.random_pack(job["tokens"], config.vocab_size, generator, torch.device("cpu"))
            for _ in range(job["accumulation"])
        ]
        counts = [(sum(lengths), sum(n * n for n in lengths), len(batch["targets"])) for batch, lengths in packs]
        counts = torch.tensor(counts, dtype=torch.float64).sum(0)
        dist.all_reduce(counts)
        return [batch for batch, _ in packs], counts.tolist()

    def step(batches, supervised):
        """As train_moe.train's, whose parts it calls; returns the loss."""
        totals = train_moe.forward_backward(model, batches, torch.tensor(supervised, dtype=torch.float64, device=device), run, device)
        norm = train_moe.clip_gradients(parameters, run.max_grad_norm, mesh)
        optimizer.step()
        optimizer.zero_grad()
        model.forget_norms()
        dist.all_reduce(totals)
        loss = (totals[0] / supervised).item()
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            raise ValueError(f"{name}: loss {loss}, gradient norm {norm.item()}")
        return loss

    drawn = [draw() for _ in range(job["steps"] + 2)]
    (warm, (*_, supervised)), *timed, (profiled, (*_, profiled_supervised)) = drawn
    step(warm, supervised)  # compiles, allocates
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for batches, (*_, supervised) in timed:
        bench_train_moe.synchronize(device)
        dist.barrier()
        started = time.perf_counter()
        losses.append(step(batches, supervised))
        times.append(time.perf_counter() - started)
    peak = torch.tensor(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    tokens, squares = (sum(counts[i] for _, counts in timed) for i in (0, 1))
    flops = plan.train_flops(config, tokens, squares, job["r"], use_dora=job["use_dora"])
    record = facts(job, device) | {
        "adapter": "dora" if job["use_dora"] else "lora",
        "r": job["r"],
        "layers": layers,
        "tokens": job["tokens"],
        "accumulation": job["accumulation"],
        "activations": run.activations,
        "mode": run.memory_mode,
        "reduce_every_micro_batch": run.reduce_every_micro_batch,
        "step_seconds": [round(seconds, 3) for seconds in times],
        "tokens_per_second_per_gpu": round(tokens / sum(times) / world, 1),
        "mfu": rounded(plan.mfu(flops, sum(times), world, torch.cuda.get_device_name() if device.type == "cuda" else "cpu")),
        "peak_gib": gib(peak.item()) if device.type == "cuda" else None,
        "planned_gib": planned and gib(planned["peak_bytes"]),
        "loss": round(losses[-1], 4),
        "communication_not_hidden": share_not_hidden(lambda: step(profiled, profiled_supervised), device),
    }
    dist.destroy_process_group()
    return record


class RandomPacks(torch.utils.data.Dataset):
    """As much of multipack's PackedDataset as train_dense.py needs: `count` packs of random documents."""

    def __init__(self, count, places, vocabulary):
        generator = torch.Generator().manual_seed(2)
        drawn = [bench_train_moe.random_documents(places, vocabulary, generator) for _ in range(count)]
        self.documents = [pack for pack, _ in drawn]
        self.lengths = np.array([n for _, lengths in drawn for n in lengths])
        ends = np.cumsum([len(pack) for pack in self.documents])
        self.packs = [list(range(end - len(pack), end)) for end, pack in zip(ends, self.documents, strict=True)]

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]

    def set_epoch(self, epoch):
        """Every epoch has the same packs in the same order."""


def tiny_dense_config():
    sizes = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaConfig(**sizes, max_position_embeddings=262144, pad_token_id=None)


def dense(job):
    """Optimiser steps of train_dense.py's Trainer, one pack a GPU, on a whole model with random weights, partitioned as it is made."""
    import train_dense

    world, name, cuda = int(os.environ["WORLD_SIZE"]), job["model"], torch.cuda.is_available()
    flags = {"model_name_or_path": name, "run_name": "dense", "output_dir": job["output"], "max_seq_length": job["tokens"], "r": job["r"]}
    flags |= {"global_batch_size": world, "max_steps": job["steps"] + 1, "save_strategy": "no", "report_to": "none", "bf16": cuda}
    flags |= {"deepspeed": ROOT / "ds3.json"}
    kinds = (train_dense.ModelArguments, multipack.DataArguments, adapter.LoraArguments, train_dense.DenseTrainingArguments)
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    _, data_args, lora_args, training_args = HfArgumentParser(kinds).parse_args_into_dataclasses(words)
    config = tiny_dense_config() if name == "tiny" else published_config(name)
    planned = train_dense.check_memory(config, data_args, lora_args, training_args)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=multipack.register_attention())
    trainer = train_dense.DenseTrainer(
        model=train_dense.adapt(model, lora_args, training_args),
        args=training_args,
        train_dataset=train_dense.EvenPacks(RandomPacks(world * (job["steps"] + 1), job["tokens"], config.vocab_size), world),
        data_collator=multipack.collate,
        lora_args=lora_args,
        base_model=name,
        planned=planned,
    )
    trainer.train()
    log = [line for line in trainer.state.log_history if "tokens_per_second" in line][1:]  # the first step allocates and compiles
    seconds = [line["tokens"] / line["tokens_per_second"] for line in log]
    record = facts(job, training_args.device) | {
        "adapter": "lora",
        "r": job["r"],
        "layers": config.num_hidden_layers,
        "tokens": job["tokens"],
        "accumulation": 1,
        "activations": "full",
        "step_seconds": [round(s, 3) for s in seconds],
        "tokens_per_second_per_gpu": round(sum(line["tokens"] for line in log) / sum(seconds) / world, 1),
        "mfu": rounded(statistics.mean(line["mfu"] for line in log)) if log[0].get("mfu") else None,
        "peak_gib": log[-1].get("peak_gib"),
        "planned_gib": planned and gib(planned["peak_bytes"]),
        "loss": round(log[-1]["loss"], 4),
    }
    dist.barrier()
    dist.destroy_process_group()
    return record


def load(job):
    """bench_load.py's own measurement."""
    import bench_load

    out = Path(job["output"] + ".json")
    sys.argv[1:] = ["--gigabytes", str(job["gigabytes"]), "--repeats", "2", "--directory", job["output"], "--out", str(out)]
    bench_load.main()
    if int(os.environ["RANK"]):
        return None
    found = json.loads(out.read_text())[-1]
    return facts(job, torch.device("cuda" if torch.cuda.is_available() else "cpu")) | {
        key: found[key] for key in found if key.endswith(("per_second", "loading")) or key in ("gigabytes", "cores")
    }


def write_slice(job):
    """A checkpoint of the first layers of a model, random weights, with a tokenizer, and conversations to train on."""
    from conftest import tiny_tokenizer

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = bench_train_moe.make_config(job["model"], job["layers"])
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job["dtype"]))
    model.save_pretrained(job["output"])
    tiny_tokenizer().save_pretrained(job["output"])
    generator = random.Random(0)
    with open(job["data"], "w") as f:
        for _ in range(job["rows"]):
            answer = " ".join(
                generator.choice(["saya", "makan", "nasi", "lemak", "esok"]) for _ in range(generator.randint(2, job["tokens"] // 30))
            )
            f.write(json.dumps({"question": "Apa khabar?", "answer": answer}) + "\n")
    return None


def train(job):
    """train_moe.main, watched: every frozen tensor's checksum is taken after loading and after training; or killed in a step."""
    load_weights, clip_gradients = train_moe.load_weights, train_moe.clip_gradients
    seen, calls = {}, []

    def checksums():
        frozen = {name: local_tensor(tensor) for name, tensor in train_moe.frozen_tensors(seen["model"]).items()}
        return {name: t.view(torch.int16 if t.element_size() == 2 else torch.int32).sum().item() for name, t in frozen.items()}

    def watched(causal_lm, *rest):
        loaded = load_weights(causal_lm, *rest)
        seen["model"] = causal_lm
        seen["before"] = checksums()
        return loaded

    def dying(*arguments):
        calls.append(1)
        if len(calls) == job["kill_at"]:
            while not Path(job["output"], f"checkpoint-{SAVE_STEPS}", "resume", "position.json").exists():
                time.sleep(0.05)  # it is written in the background, and there must be something to go on from
            os.kill(os.getpid(), signal.SIGKILL)
        return clip_gradients(*arguments)

    train_moe.load_weights, train_moe.clip_gradients = watched, dying
    train_moe.main(job["argv"])
    changed = [name for name, total in checksums().items() if total != seen["before"][name]]
    if changed:
        raise ValueError(f"{len(changed)} frozen tensors changed, such as {changed[0]}")
    return facts(job, local_tensor(next(seen["model"].parameters())).device) | {"frozen_tensors_unchanged": len(seen["before"])}


MEASUREMENTS = {"scaling": scaling, "dense": dense, "load": load, "slice": write_slice, "train": train}


def work(job):
    """One process of a measurement; rank 0 writes the record."""
    faulthandler.dump_traceback_later(job["seconds"], exit=True)  # works in a process that waits for one that is no more
    try:
        record = MEASUREMENTS[job["kind"]](job)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if os.environ["RANK"] == "0":
        Path(job["record"]).write_text(json.dumps(record))


# ------------------------------------------------------------------------------------------------------------------------------
# The program that starts them
# ------------------------------------------------------------------------------------------------------------------------------


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
        launcher = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(gpus),
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
        ]
        command = [sys.executable, *launcher, "--", __file__, "--worker", json.dumps(job)]
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
            words = log.read_text(errors="replace").splitlines()
            if any(line.startswith("error: ") for line in words):
                raise ValueError(next(line for line in words if line.startswith("error: ")).removeprefix("error: "))
            end = next((i for i, line in enumerate(words) if "failed (exitcode" in line), len(words))
            raise ValueError(f"exit code {code}\n" + "\n".join(words[max(0, end - 25) : end]))
        return json.loads(Path(job["record"]).read_text())

    def measure(self, kind, gpus, **settings):
        return self.finish(*self.start(kind, gpus, **settings))

    def keep(self, record):
        self.records.append(record)
        if self.out:
            path = Path(self.out)
            records = json.loads(path.read_text()) if path.exists() else []
            path.write_text(json.dumps([*records, record], indent=1) + "\n")

    def attempt(self, what, function):
        """`function()`, whose failure is printed and remembered."""
        try:
            return function()
        except ValueError as error:
            print(f"{what} failed: {error}", flush=True)
            self.failures.append(what)
            return None


def measure_scaling(host, names):
    """Every model of `names` on all GPUs; the first one before that on 1, 2, 4, ..., all at once."""
    for name in names:
        counts = [n for n in (1, 2, 4) if n < host.gpus] if name == names[0] else []
        running = []
        for n in counts:
            what = f"scaling {name} on {n}"
            running.append((what, host.attempt(what, lambda n=n, name=name: host.start("scaling", n, first=n - 1, model=name))))
        found = [host.attempt(what, lambda begun=begun: host.finish(*begun)) for what, begun in running if begun]
        last = host.attempt(f"scaling {name} on {host.gpus}", lambda name=name: host.measure("scaling", host.gpus, model=name))
        found = [record for record in (*found, last) if record]
        for record in found:
            efficiency = record["tokens_per_second_per_gpu"] / found[0]["tokens_per_second_per_gpu"]
            several = len(found) > 1
            host.keep(record | {"efficiency": round(efficiency, 4) if several else None, "against": found[0]["gpus"] if several else None})


def measure_correctness(host, name):
    """Compare runs of train_moe.py on a slice: one GPU, all GPUs, all GPUs after a kill -9. Raises ValueError for a run that fails."""
    gpus, dtype = host.gpus, "bfloat16" if host.cuda else "float32"
    tokens, packs = min(host.args.tokens, 4096), 2 * host.gpus
    base, data = str(host.directory / "slice"), str(host.directory / "chat.jsonl")
    layers = 2 if name == "tiny" else host.args.slice_layers
    common = {"model_name_or_path": base, "dataset": data, "data_cache": host.directory / "cache", "dtype": dtype, "max_seq_length": tokens}
    common |= {"global_batch_size": packs, "r": host.args.r, "use_dora": host.args.use_dora, "activations": "none", "report_to": "none"}
    common |= {"max_steps": STEPS, "save_steps": SAVE_STEPS, "num_train_epochs": 9, "learning_rate": 1e-3, "warmup_steps": 1}

    def run(n, name_of_run, kill_at=0, resume=False):
        out = host.directory / name_of_run
        flags = common | {"run_name": name_of_run, "output_dir": out, "resume": resume}
        argv = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
        begun = host.start("train", n, model=name, argv=argv, kill_at=kill_at, output=str(out))
        return out, host.finish(*begun, must_die=kill_at > 0)

    host.measure("slice", 1, model=name, layers=layers, dtype=dtype, output=base, data=data, rows=60 * packs, tokens=tokens)
    alone, _ = run(1, "alone")
    together, record = run(gpus, "together")
    run(gpus, "killed", kill_at=STEPS)
    killed = host.directory / "killed"
    if (killed / f"checkpoint-{STEPS}").exists():
        raise ValueError("the killed run had finished")
    run(gpus, "killed", resume=True)
    faults = [fault for out in (alone, together, killed) for fault in adapter.verify_adapter(out / f"checkpoint-{STEPS}", base)]
    bound, adapter_bound = (5e-3, 0.1) if dtype == "bfloat16" else (1e-4, 1e-2)
    found = {
        "loss_difference": difference_of_losses(alone, together),
        "loss_difference_resumed": difference_of_losses(killed, together),
        "adapter_difference": difference_of_adapters(alone, together),
        "adapter_difference_resumed": difference_of_adapters(killed, together),
    }
    passed = not faults and all(value <= (bound if "loss" in key else adapter_bound) for key, value in found.items())
    settings = {"layers": layers, "tokens": tokens, "r": host.args.r, "dtype": dtype, "accumulation": packs // gpus}
    host.keep(record | {"part": "correctness"} | settings | found | {"faults_in_adapters": len(faults), "passed": passed})
    if not passed:
        raise ValueError(f"{found}, bounds {bound} and {adapter_bound}; {faults[:3]}")


def difference_of_losses(a, b):
    """Largest relative difference of the losses of two runs' steps, which have to be all there."""
    a, b = ([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()] for out in (a, b))
    if not len(a) == len(b) == STEPS:
        raise ValueError(f"{len(a)} and {len(b)} steps were logged, not {STEPS}")
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def difference_of_adapters(a, b):
    """|a - b| / |b| over every lora_B, which starts at zero: all that is in it was trained."""
    a, b = (load_file(out / f"checkpoint-{STEPS}" / adapter.WEIGHTS) for out in (a, b))
    names = [name for name in b if "lora_B" in name]
    squares = torch.tensor([[(a[name] - b[name]).square().sum(), b[name].square().sum()] for name in names], dtype=torch.float64).sum(0)
    return (squares[0] / squares[1]).sqrt().item()


def print_tables(records):
    """A table for each part; what is the same for all of its rows, and nothing to compare, is left to the JSON."""
    hidden = ("part", "device", "attention", "versions", "commit", "date", "adapter", "r", "step_seconds", "loss")
    for part in PARTS:
        rows = [{k: v for k, v in record.items() if k not in hidden} for record in records if record["part"] == part]
        if rows:
            print(f"\n{part}")
            table = [list(rows[0]), *([("" if row[key] is None else str(row[key])) for key in rows[0]] for row in rows)]
            for column in zip(*table, strict=True) if len(rows) == 1 else ():
                print(f"    {column[0]:<32}{column[1]}")
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            for line in table if len(rows) > 1 else ():
                print("    " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main():
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    if args.worker:
        return work(json.loads(args.worker))
    names, parts = args.models.split(","), args.parts.split(",")
    unknown = [part for part in parts if part not in PARTS] + [n for n in names if n not in CONFIGS and n != "tiny"]
    if unknown:
        sys.exit(f"error: {unknown[0]}: the parts are {', '.join(PARTS)}, the models {', '.join(CONFIGS)}, tiny")
    experts = [name for name in names if name in bench_train_moe.MODELS]
    plain = [name for name in names if name == "tiny" or name not in bench_train_moe.MODELS]
    directory = tempfile.mkdtemp(prefix="bench_multi_gpu-", dir=args.directory)
    host = Host(args, directory)
    if host.cuda and host.gpus > torch.cuda.device_count():
        sys.exit(f"error: --gpus {host.gpus}: there are {torch.cuda.device_count()}")
    try:
        for part in parts:
            if part == "scaling" and experts:
                measure_scaling(host, experts)
            elif part == "dense":
                for name in plain:
                    what = f"dense {name}"
                    host.attempt(what, lambda name=name: host.keep(host.measure("dense", host.gpus, model=name)))
            elif part == "load":
                host.attempt("load", lambda: host.keep(host.measure("load", host.gpus, model="experts as qwen3-30b-a3b's")))
            elif part == "correctness" and experts:
                host.attempt("correctness", lambda: measure_correctness(host, experts[0]))
    finally:
        shutil.rmtree(directory)
    print_tables(host.records)
    print(json.dumps({"records": host.records, "failed": host.failures}), flush=True)
    if host.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
