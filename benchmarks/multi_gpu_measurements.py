"""What bench_multi_gpu.py measures, each measurement in processes of its own; that program starts them and says what
they are for.

A measurement is described by a dict, given as JSON: `kind` (a key of MEASUREMENTS), `model`, `record` (the file that
rank 0 writes its result to), `output` (a path of its own), `seconds` (it ends itself after so many), and
bench_multi_gpu.py's arguments.
"""

import faulthandler
import json
import math
import os
import platform
import random
import signal
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import bench_load  # noqa: E402 (the repository root must be on the path first)
import bench_train_moe  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import AutoModelForCausalLM, HfArgumentParser, LlamaConfig  # noqa: E402

import multipack  # noqa: E402
import train_moe  # noqa: E402
from malaysian_sft.account import (  # noqa: E402
    mfu,  # noqa: E402
    train_flops,  # noqa: E402
)
from malaysian_sft.attention import (  # noqa: E402
    attention_backend,  # noqa: E402
    register_attention,  # noqa: E402
)
from malaysian_sft.base_model import load_config  # noqa: E402
from malaysian_sft.conversations import DataArguments  # noqa: E402
from malaysian_sft.load_base import (  # noqa: E402
    frozen_tensors,  # noqa: E402
)
from malaysian_sft.lora import (  # noqa: E402
    LoraArguments,  # noqa: E402
    local_tensor,  # noqa: E402
)
from malaysian_sft.moe_model import make_mesh  # noqa: E402
from malaysian_sft.run import (  # noqa: E402
    git_commit,  # noqa: E402
    setup_distributed,  # noqa: E402
)

CONFIGS = {  # published config.json files; those of mixtures of experts only say how many layers there are
    "qwen3-30b-a3b": "Qwen3-30B-A3B-Instruct-2507",
    "glm-4.5-air": "GLM-4.5-Air",
    "qwen3-235b-a22b": "Qwen3-235B-A22B-Instruct-2507",
    "qwen3-32b": "Qwen3-32B",
    "llama-3.1-70b": "Llama-3.1-70B-Instruct",
    "qwen2.5-72b": "Qwen2.5-72B-Instruct",
}


# ----------------------------------------------------------------------------------------------------------------------
# Communication that nothing hides
# ----------------------------------------------------------------------------------------------------------------------


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
    """(communication, compute): lists of (start, end) in microseconds of a profile's kernels; on a CPU, of its
    operators."""
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
    """Share of the time of one call of `function` in which this GPU only communicates; None if no communication was
    seen."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        bench_train_moe.synchronize(device)
        started = time.perf_counter()
        function()
        bench_train_moe.synchronize(device)
        seconds = time.perf_counter() - started
    communication, compute = intervals_by_kind(profiled.events(), cuda)
    return round(not_hidden(communication, compute) / 1e6 / seconds, 4) if communication else None


# ----------------------------------------------------------------------------------------------------------------------
# Measurements: each in processes of its own, started by torchrun
# ----------------------------------------------------------------------------------------------------------------------


def published_config(name):
    return load_config(ROOT / "tests" / "configs" / f"{CONFIGS[name]}.json")


def facts(job, device):
    """What every record carries."""
    cuda = device.type == "cuda"
    packages = ("torch", "triton", "transformers", "peft", "deepspeed", "flash-attn-4")
    return {
        "part": job["kind"],
        "model": job["model"],
        "gpus": int(os.environ["WORLD_SIZE"]),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "attention": attention_backend(device),
        "versions": (
            {name: bench_train_moe.version(name) for name in packages}
            | {"nccl": torch.cuda.nccl.version() if cuda else None}
        ),
        "commit": git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def words(flags):
    """{name: value} as a command line."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def speed(job, layers, planned, seconds, tokens, utilisation, peak_gib):
    """What the records of both trainers' steps have in common; `tokens` and `seconds` of the timed steps, over all
    GPUs."""
    return {
        "r": job["r"],
        "layers": layers,
        "tokens": job["tokens"],
        "step_seconds": [round(s, 3) for s in seconds],
        "tokens_per_second_per_gpu": round(tokens / sum(seconds) / int(os.environ["WORLD_SIZE"]), 1),
        "mfu": None if utilisation is None else round(utilisation, 4),
        "peak_gib": peak_gib,
        "planned_gib": planned and round(planned["peak_bytes"] / 2**30, 2),
    }


def scaling(job):
    """Optimiser steps of train_moe.py on a whole model with random weights."""
    device = setup_distributed()
    cuda, cpu = device.type == "cuda", torch.device("cpu")
    world, name = dist.get_world_size(), job["model"]
    flags = {"model_name_or_path": name, "activations": job["activations"], "r": job["r"], "use_dora": job["use_dora"]}
    flags |= {"max_seq_length": job["tokens"], "global_batch_size": world * job["accumulation"]}
    run, data_args, lora_args = train_moe.parse(words(flags))
    layers = 2 if name == "tiny" else published_config(name).num_hidden_layers
    run, planned = train_moe.settle_memory(bench_train_moe.make_config(name, layers), run, data_args, lora_args)
    mesh = make_mesh(device, 1)
    chosen = bench_train_moe.Arguments(
        activations=run.activations, memory_mode=run.memory_mode, use_dora=job["use_dora"], r=job["r"]
    )
    config, model = bench_train_moe.build(name, layers, chosen, "bfloat16", device, mesh)
    optimizer = train_moe.make_optimizer(model, run)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    generator = torch.Generator().manual_seed(2 + dist.get_rank())

    def draw():
        """A step's packs of this rank, and [tokens, sum of squared lengths, supervised tokens] of all ranks'."""
        packs = [
            bench_train_moe.random_pack(job["tokens"], config.vocab_size, generator, cpu)
            for _ in range(job["accumulation"])
        ]
        counts = [(sum(lengths), sum(n * n for n in lengths), len(batch["targets"])) for batch, lengths in packs]
        counts = torch.tensor(counts, dtype=torch.float64).sum(0)
        dist.all_reduce(counts)
        return [batch for batch, _ in packs], counts.tolist()

    def step(batches, supervised):
        """As train_moe.train's, whose parts it calls; returns the loss."""
        count = torch.tensor(supervised, dtype=torch.float64, device=device)
        totals = train_moe.forward_backward(model, batches, count, run, device)
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
    # compiles and allocates; with one micro-batch that is followed by another, and a last one
    step(warm[:2], supervised)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], []
    for batches, (*_, supervised) in timed:
        bench_train_moe.synchronize(device)
        dist.barrier()
        started = time.perf_counter()
        losses.append(step(batches, supervised))
        times.append(time.perf_counter() - started)
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    tokens, squares = (sum(counts[i] for _, counts in timed) for i in (0, 1))
    flops = train_flops(config, tokens, squares, job["r"], use_dora=job["use_dora"])
    utilisation = mfu(flops, sum(times), world, torch.cuda.get_device_name() if cuda else "cpu")
    record = facts(job, device) | {
        "adapter": "dora" if job["use_dora"] else "lora",
        **speed(job, layers, planned, times, tokens, utilisation, round(peak.item(), 2) if cuda else None),
        "accumulation": job["accumulation"],
        "activations": run.activations,
        "mode": run.memory_mode,
        "reduce_every_micro_batch": run.reduce_every_micro_batch,
        "loss": round(losses[-1], 4),
        "communication_not_hidden": share_not_hidden(lambda: step(profiled, profiled_supervised), device),
    }
    dist.destroy_process_group()
    return record


class RandomPacks(list):
    """As much of multipack's PackedDataset as train_dense.py needs: `count` packs of random documents, the same in
    every epoch."""

    def __init__(self, count, places, vocabulary):
        generator = torch.Generator().manual_seed(2)
        drawn = [bench_train_moe.random_documents(places, vocabulary, generator) for _ in range(count)]
        super().__init__(pack for pack, _ in drawn)
        self.lengths = np.array([n for _, lengths in drawn for n in lengths])
        ends = np.cumsum([len(pack) for pack in self])
        self.packs = [list(range(end - len(pack), end)) for end, pack in zip(ends, self, strict=True)]

    def set_epoch(self, epoch):
        pass


def tiny_dense_config():
    sizes = dict(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaConfig(**sizes, max_position_embeddings=262144, pad_token_id=None)


def dense(job):
    """Optimiser steps of train_dense.py's Trainer, one pack a GPU, on a whole model with random weights, partitioned as
    it is made."""
    import train_dense  # here, because it takes seconds and the other measurements need none of it
    from malaysian_sft import dense_model

    world, name, cuda = int(os.environ["WORLD_SIZE"]), job["model"], torch.cuda.is_available()
    flags = {
        "model_name_or_path": name,
        "run_name": "dense",
        "output_dir": job["output"],
        "max_seq_length": job["tokens"],
        "r": job["r"],
    }
    flags |= {
        "global_batch_size": world,
        "max_steps": job["steps"] + 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": cuda,
    }
    flags["deepspeed"] = ROOT / "ds3.json"
    kinds = (
        train_dense.ModelArguments,
        DataArguments,
        LoraArguments,
        train_dense.DenseTrainingArguments,
    )
    _, data_args, lora_args, training_args = HfArgumentParser(kinds).parse_args_into_dataclasses(words(flags))
    config = tiny_dense_config() if name == "tiny" else published_config(name)
    planned = train_dense.check_memory(config, data_args, lora_args, training_args)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=register_attention(masks=False))
    trainer = train_dense.DenseTrainer(
        model=dense_model.adapt(model, lora_args, training_args),
        args=training_args,
        train_dataset=train_dense.EvenPacks(
            RandomPacks(world * (job["steps"] + 1), job["tokens"], config.vocab_size), world
        ),
        data_collator=multipack.collate,
        lora_args=lora_args,
        base_model=name,
        planned=planned,
    )
    trainer.train()
    # the first step allocates and compiles
    log = [line for line in trainer.state.log_history if "tokens_per_second" in line][1:]
    seconds = [line["tokens"] / line["tokens_per_second"] for line in log]
    tokens, utilisation = sum(line["tokens"] for line in log), [line["mfu"] for line in log if line.get("mfu")]
    mean = statistics.mean(utilisation) if utilisation else None
    record = facts(job, training_args.device) | speed(
        job, config.num_hidden_layers, planned, seconds, tokens, mean, log[-1].get("peak_gib")
    )
    dist.barrier()
    dist.destroy_process_group()
    return record | {"accumulation": 1, "activations": "full", "loss": round(log[-1]["loss"], 4)}


def load(job):
    """bench_load.py's own measurement."""
    out = Path(job["output"] + ".json")
    sys.argv[1:] = [
        "--gigabytes",
        str(job["gigabytes"]),
        "--repeats",
        "2",
        "--directory",
        job["output"],
        "--out",
        str(out),
    ]
    bench_load.main()
    if int(os.environ["RANK"]):
        return None
    found = json.loads(out.read_text())[-1]
    kept = {
        key: found[key] for key in found if key.endswith(("per_second", "loading")) or key in ("gigabytes", "cores")
    }
    return facts(job, torch.device("cuda" if torch.cuda.is_available() else "cpu")) | kept


def write_slice(job):
    """A checkpoint of the first layers of a model, random weights, with a tokenizer, and conversations to train on."""
    from conftest import tiny_tokenizer

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = bench_train_moe.make_config(job["model"], job["layers"])
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job["dtype"]))
    model.save_pretrained(job["output"])
    tiny_tokenizer().save_pretrained(job["output"])
    generator, vocabulary = random.Random(0), ["saya", "makan", "nasi", "lemak", "esok"]
    with open(job["data"], "w") as f:
        for _ in range(job["rows"]):
            answer = " ".join(generator.choices(vocabulary, k=generator.randint(2, job["tokens"] // 30)))
            f.write(json.dumps({"question": "Apa khabar?", "answer": answer}) + "\n")


def train(job):
    """train_moe.main, watched: every frozen tensor's checksum is taken after loading and after training; or killed in a
    step."""
    load_weights, clip_gradients = train_moe.load_weights, train_moe.clip_gradients
    seen, calls = {}, []

    def checksums():
        frozen = {name: local_tensor(tensor) for name, tensor in frozen_tensors(seen["model"]).items()}
        return {
            name: t.view(torch.int16 if t.element_size() == 2 else torch.int32).sum().item()
            for name, t in frozen.items()
        }

    def watched(causal_lm, *rest):
        loaded = load_weights(causal_lm, *rest)
        seen["model"] = causal_lm
        seen["before"] = checksums()
        return loaded

    def dying(*arguments):
        calls.append(1)
        if len(calls) == job["kill_at"]:
            while not Path(job["output"], f"checkpoint-{job['saved_step']}", "resume", "position.json").exists():
                time.sleep(0.05)  # it is written in the background, and there must be something to go on from
            os.kill(os.getpid(), signal.SIGKILL)
        return clip_gradients(*arguments)

    train_moe.load_weights, train_moe.clip_gradients = watched, dying
    train_moe.main(job["argv"])
    changed = [name for name, total in checksums().items() if total != seen["before"][name]]
    if changed:
        raise ValueError(f"{len(changed)} frozen tensors changed, such as {changed[0]}")
    return facts(job, local_tensor(next(seen["model"].parameters())).device) | {
        "frozen_tensors_unchanged": len(seen["before"])
    }


MEASUREMENTS = {"scaling": scaling, "dense": dense, "load": load, "slice": write_slice, "train": train}


def work(job):
    """One process of a measurement; rank 0 writes the record."""
    # works in a process that waits for one that is no more
    faulthandler.dump_traceback_later(job["seconds"], exit=True)
    try:
        record = MEASUREMENTS[job["kind"]](job)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if os.environ["RANK"] == "0":
        Path(job["record"]).write_text(json.dumps(record))


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
