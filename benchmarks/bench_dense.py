"""Whole optimiser steps of train_dense.py on whole models, beside transformers + PEFT + Liger as a user writes them.

    python3 benchmarks/bench_dense.py                                             Qwen3-32B under ZeRO-3 on all GPUs
    python3 benchmarks/bench_dense.py --models llama-3.1-70b --layers 40          a slice that fits
    python3 benchmarks/bench_dense.py --models tiny --tokens 256 --r 8 --gpus 1   anywhere; a CPU leaves no record

Both take the same packs of log-normal documents, the same trained parameters and the same attention kernel, and run in
processes of their own: the Trainer with its DeepSpeed, accumulation, clipping and optimiser. The peer is PEFT's model
under transformers' Trainer with Liger's kernels, gradient checkpointing and DeepSpeed's defaults. A record has tokens/s
a GPU, MFU, peak and planned GiB, the loss of the last step, and one profiled step by component as bench_step.py's.
Prints a table and one JSON line, appends to results/dense.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import bench_step  # noqa: E402 (the repository root must be on the path first)

WARM = 2  # steps before the timed ones: the first traces and compiles
DEFAULTS = {  # DeepSpeed's own, as its documentation shows them
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "zero_allow_untested_optimizer": True,
}


def parse():
    parser = argparse.ArgumentParser(description="Whole optimiser steps of dense models, measured.")
    parser.add_argument("--models", default="qwen3-32b", help="comma-separated, of tests/configs")
    parser.add_argument("--implementations", default="train_dense,peer", help="comma-separated")
    parser.add_argument("--gpus", type=int, default=None, help="default: all")
    parser.add_argument("--layers", type=int, default=None, help="decoder layers; default: all of the published model")
    parser.add_argument("--tokens", type=int, default=16384, help="of a pack")
    parser.add_argument("--packs", type=int, default=4, help="of a GPU and step, one a micro-batch")
    parser.add_argument("--steps", type=int, default=3, help="timed")
    parser.add_argument("--r", type=int, default=256)
    parser.add_argument("--adapters", default="lora", help="lora, dora or both, comma-separated")
    parser.add_argument("--activations", default="auto", help="of train_dense.py")
    parser.add_argument("--frugal_layers", type=int, default=None, help="of train_dense.py")
    parser.add_argument("--fast_parts", default="True", help="of train_dense.py")
    parser.add_argument("--deepspeed", default="True", help="False: without, on one GPU")
    parser.add_argument("--seconds", type=float, default=280, help="limit of one configuration")
    parser.add_argument("--out", default=str(ROOT / "results" / "dense.json"))
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_config(job):
    import bench_train_moe as slices
    import multi_gpu_measurements as m

    config = m.tiny_dense_config() if job["model"] == "tiny" else m.published_config(job["model"])
    return slices.shortened(config, job["layers"]) if job["layers"] else config


def make_model(config, dtype):
    """Random weights, made on the GPU; under ZeRO-3 partitioned as they are made."""
    import torch
    from transformers import AutoModelForCausalLM

    from malaysian_sft.attention import register_attention

    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=register_attention(masks=False)
        )


def our_trainer(job, config, packs, steps):
    """(trainer, plan or None) of train_dense.py."""
    import torch

    import train_dense
    from malaysian_sft import dense_model
    from malaysian_sft.flags import parse_flags

    flags = dict(model_name_or_path=job["model"], output_dir=job["output"], max_seq_length=job["tokens"], r=job["r"])
    flags |= dict(global_batch_size=job["packs"] * job["gpus"], max_steps=steps, save_strategy="no", report_to="none")
    flags |= dict(use_dora=job["adapter"] == "dora", activations=job["activations"], fast_parts=job["fast_parts"])
    flags |= dict(ignore_plan=True, bf16=torch.cuda.is_available())
    flags |= {"deepspeed": ROOT / "ds3.json"} if job["deepspeed"] == "True" else {}
    flags |= {"frugal_layers": job["frugal_layers"]} if job["frugal_layers"] is not None else {}
    kinds = train_dense.ModelArguments, train_dense.DataArguments, train_dense.LoraArguments
    kinds = *kinds, train_dense.DenseTrainingArguments
    _, data_args, lora_args, args = parse_flags(kinds, [word for k, v in flags.items() for word in (f"--{k}", str(v))])
    planned = train_dense.check_memory(config, data_args, lora_args, args)
    train_dense.choose_activations(args, planned)
    model = dense_model.adapt(make_model(config, torch.bfloat16 if args.bf16 else torch.float32), lora_args, args)
    packs = train_dense.EvenPacks(packs, job["packs"] * job["gpus"])
    job |= {"activations": args.activations, "frugal_layers": args.frugal_layers}
    return train_dense.DenseTrainer(
        model=model, args=args, train_dataset=packs, data_collator=train_dense.collator(model), lora_args=lora_args,
        base_model=job["model"],
    ), planned  # fmt: skip


def peers_trainer(job, config, packs, steps):
    """(transformers' Trainer of PEFT's model, None)."""
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    import multipack

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    cuda = torch.cuda.is_available()
    if not cuda and "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    args = TrainingArguments(
        output_dir=job["output"], max_steps=steps, per_device_train_batch_size=1, bf16=cuda, use_cpu=not cuda,
        gradient_accumulation_steps=job["packs"], learning_rate=1e-4, save_strategy="no", report_to="none",
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, use_liger_kernel=cuda,
        logging_steps=1, remove_unused_columns=False, deepspeed=DEFAULTS if job["deepspeed"] == "True" else None,
    )  # fmt: skip
    model = make_model(config, torch.bfloat16 if cuda else torch.float32)
    model.config.use_cache = False
    model.enable_input_require_grads()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(
        r=job["r"], lora_alpha=2 * job["r"], target_modules=names, use_dora=job["adapter"] == "dora",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    job |= {"activations": "full", "frugal_layers": 0}
    return InOrder(
        model=get_peft_model(model, lora), args=args, train_dataset=list(packs), data_collator=multipack.collate
    ), None


def child(job):
    """One process of a configuration; rank 0 writes the record, or what went wrong."""
    import torch

    record = {}
    try:
        record = measure(job)
    except torch.OutOfMemoryError as error:
        record = {"outcome": "does not fit", "why": str(error)[:200]}
    except ValueError as error:
        record = {"outcome": "refused", "why": str(error)[:300]}
    if int(os.environ.get("RANK", 0)) == 0:
        chosen = {name: job[name] for name in ("activations", "frugal_layers")}
        Path(job["result"]).write_text(json.dumps(chosen | record))
    sys.stdout.flush()
    os._exit(0)  # after an error the other ranks may wait in a collective for ever


def measure(job):
    """A record's figures."""
    import multi_gpu_measurements as m
    import torch
    from transformers import TrainerCallback

    from malaysian_sft.account import mfu, train_flops
    from malaysian_sft.attention import attention_backend

    cuda, rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(rank)
    config = make_config(job)
    world, steps = job["gpus"], WARM + job["steps"] + 1  # the last one is profiled
    packs = m.RandomPacks(world * job["packs"] * steps, job["tokens"], config.vocab_size)
    build = our_trainer if job["implementation"] == "train_dense" else peers_trainer
    trainer, planned = build(job, config, packs, steps)
    seconds, power = [], bench_step.Power(cuda and rank == 0)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if cuda else None

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == WARM and cuda:
                torch.cuda.reset_peak_memory_stats()
                power.__enter__()
            if state.global_step == steps - 1 and cuda:
                power.__exit__()
                profiler.start()
            self.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.synchronize()
            seconds.append(time.perf_counter() - self.started)
            if state.global_step == steps and cuda:
                profiler.stop()

        def synchronize(self):
            if cuda:
                torch.cuda.synchronize()

    trainer.add_callback(Watch())
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    timed = slice(WARM * job["packs"] * world, (WARM + job["steps"]) * job["packs"] * world)
    lengths = [int(packs.lengths[i]) for pack in packs.packs[timed] for i in pack]
    tokens, squares, total = sum(lengths), sum(n * n for n in lengths), sum(seconds[WARM:-1])
    flops = train_flops(config, tokens, squares, job["r"], use_dora=job["adapter"] == "dora")
    name = torch.cuda.get_device_name() if cuda else "cpu"
    share = mfu(flops, total, world, name)
    record = {
        "outcome": "measured",
        "layers": config.num_hidden_layers,
        "device": name,
        "attention": attention_backend(torch.device("cuda" if cuda else "cpu")),
        "tokens_per_second_per_gpu": round(tokens / total / world, 1),
        "mfu": share and round(share, 4),
        "step_ms": [round(1e3 * s, 1) for s in seconds[WARM:-1]],
        "first_step_seconds": round(seconds[0], 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "planned_gib": planned and round(planned["peak_bytes"] / 2**30, 2),
        "squares_over_tokens": round(squares / tokens),
        "clock_mhz_watts": power.mean,
        "losses": [round(loss, 4) for loss in losses],
    }
    return record | (bench_step.by_component(profiler.events()) if cuda else {})


def start(job, seconds):
    """Run a configuration; returns its record."""
    from malaysian_sft.launch import set_defaults

    with tempfile.TemporaryDirectory() as folder:
        job |= {"result": str(Path(folder, "record.json")), "output": str(Path(folder, "output"))}
        command = [sys.executable]
        if job["gpus"] > 1 or job["deepspeed"] == "True":
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
            outcome = json.loads(Path(job["result"]).read_text())
    return {k: v for k, v in job.items() if k not in ("result", "output")} | outcome


COLUMNS = "model implementation adapter layers gpus activations frugal_layers tokens_per_second_per_gpu mfu peak_gib"
COLUMNS = f"{COLUMNS} planned_gib gaps_ms communication_not_hidden_ms outcome".split()


def main():
    args = parse()
    if args.child:
        return child(json.loads(args.child))
    import bench_train_moe as slices
    import pandas
    import torch

    from malaysian_sft.run import git_commit

    here, records = torch.cuda.device_count(), []
    for model in args.models.split(","):
        for adapter in args.adapters.split(","):
            for implementation in args.implementations.split(","):
                job = dict(model=model, implementation=implementation, adapter=adapter, layers=args.layers)
                job |= dict(gpus=args.gpus or max(here, 1), tokens=args.tokens, r=args.r, packs=args.packs)
                job |= dict(steps=args.steps, activations=args.activations, frugal_layers=args.frugal_layers)
                record = start(job | dict(fast_parts=args.fast_parts, deepspeed=args.deepspeed), args.seconds)
                packages = ("torch", "triton", "transformers", "peft", "deepspeed", "liger-kernel", "flash-attn-4")
                record["versions"] = {name: slices.version(name) for name in packages}
                record |= {"commit": git_commit(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
                print(json.dumps(record), flush=True)
                records.append(record)
                if here:
                    bench_step.append(record, args.out)
    print(pandas.DataFrame(records).reindex(columns=COLUMNS).to_string(index=False, na_rep=""))
    print(json.dumps(records))
    check_losses(records)


def check_losses(records, within=0.02):
    """Exit with 1 if two implementations that took the same packs differ in the first step's loss by more."""
    measured = [r for r in records if r["outcome"] == "measured"]
    for key in {(r["model"], r["adapter"]) for r in measured}:
        first = [r["losses"][0] for r in measured if (r["model"], r["adapter"]) == key]
        if max(first) - min(first) > within * statistics.mean(first):
            sys.exit(f"error: {key}: losses of the first step differ: {first}")


if __name__ == "__main__":
    main()
