"""How fast load_weights reads a checkpoint, against plain reads of the same files, and how much host memory
it takes.

    python3 benchmarks/bench_load.py [--gigabytes 4] [--directory DIR] [--repeats 3]
    torchrun --nproc_per_node 8 -- benchmarks/bench_load.py ...        each rank reads the rows of its own shards

Writes a Qwen3-MoE checkpoint of about the size asked for to DIR (a new temporary directory by default, removed at the
end) in files of about 1 GB with per-expert tensors, as published ones are. Both readings are timed from the page cache
and after the files were dropped from it (which only the kernel's advice does: on a file system that ignores it the two
agree). Checks that what was loaded are the checkpoint's bytes. Prints a table and one JSON line; appends a record to
results/load.json.
"""

import gc
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 (the repository root must be on the path first)
import torch.distributed as dist  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import HfArgumentParser, Qwen3MoeConfig  # noqa: E402

import train_moe  # noqa: E402
from malaysian_sft.load_base import (  # noqa: E402
    CHUNK_BYTES,  # noqa: E402
    frozen_tensors,  # noqa: E402
    load_weights,  # noqa: E402
    plan_reading,  # noqa: E402
)
from malaysian_sft.moe_model import (  # noqa: E402
    build_model,  # noqa: E402
    make_mesh,  # noqa: E402
    shard,  # noqa: E402
)
from malaysian_sft.run import (  # noqa: E402
    git_commit,  # noqa: E402
    setup_distributed,  # noqa: E402
)
from malaysian_sft.safetensors_files import read_sources  # noqa: E402


@dataclass
class Arguments:
    gigabytes: float = field(default=4.0, metadata={"help": "size of the checkpoint"})
    directory: str | None = field(default=None, metadata={"help": "where to write it; default: a temporary directory"})
    repeats: int = field(default=3, metadata={"help": "timed readings of each kind"})
    out: str = field(default=str(ROOT / "results" / "load.json"), metadata={"help": "where the record is appended"})


def config_of_size(gigabytes):
    """A Qwen3-MoE whose bf16 weights take about `gigabytes` x 1e9 bytes: eight layers, experts shaped as
    Qwen3-30B-A3B's."""
    experts = max(8, round(gigabytes * 1e9 / 2 / 8 / (3 * 768 * 2048) / 8) * 8)
    return Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=experts,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
        pad_token_id=None,
    )


def build(config):
    args, _, lora_args = train_moe.parse(["--model_name_or_path", "none", "--r", "64"])
    _, model = build_model(config, args, lora_args)
    return args, model


def write_checkpoint(directory, config):
    """Random bf16 weights under the published names, in files of about 1 GB with an index."""
    _, model = build(config)
    _, expected = plan_reading(frozen_tensors(model.causal_lm), {})
    torch.manual_seed(0)
    block = torch.randn(1 << 22, dtype=torch.float32).to(torch.bfloat16)
    files, weight_map, waiting, size = 0, {}, {}, 0
    names = list(expected)
    for name in names:
        count = torch.Size(expected[name]).numel()
        waiting[name] = (
            block.roll(len(name) + len(weight_map)).repeat(-(-count // len(block)))[:count].view(expected[name]).clone()
        )
        weight_map[name] = f"model-{files:05d}.safetensors"
        size += 2 * count
        if size > 1e9 or name == names[-1]:
            save_file(waiting, directory / weight_map[name], metadata={"format": "pt"})
            files, waiting, size = files + 1, {}, 0
    config.save_pretrained(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def drop_from_cache(files):
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_raw(files):
    """Seconds to read the files once, in eight threads and the loader's block size, into one buffer a thread."""

    def read(path):
        buffer = bytearray(CHUNK_BYTES)
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    started = time.perf_counter()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(read, files))
    return time.perf_counter() - started


def load_once(directory, config, device):
    """(bytes of this rank, seconds, model) of one load_weights into a model sharded over the ranks."""
    args, model = build(config)
    if dist.get_world_size() > 1:
        shard(model, make_mesh(device, 1), args, use_dora=False)
    size, seconds = load_weights(model.causal_lm, directory, device)
    return size, seconds, model


def check(directory, model):
    """Exit unless every piece that this rank read has the checkpoint's bytes."""
    from safetensors import safe_open

    sources = read_sources(directory)
    pieces, _ = plan_reading(frozen_tensors(model.causal_lm), sources)
    for piece in pieces[:: max(1, len(pieces) // 200)]:
        with safe_open(sources[piece.name].path, framework="pt") as file:
            expected = file.get_slice(piece.name)[piece.first : piece.first + len(piece.target)]
        if not torch.equal(expected, piece.target.cpu()):
            sys.exit(f"error: {piece.name} was not loaded as it is on disk")


def resident_gib(peak=False):
    """This process's resident memory in GiB, now or at its peak since `forget_peak`. Linux."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) / 2**20


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def measure(directory, args, device):
    config = config_of_size(args.gigabytes)
    if dist.get_rank() == 0 and not (directory / "model.safetensors.index.json").exists():
        write_checkpoint(directory, config)
    dist.barrier()
    files = sorted(directory.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    speeds = {}
    for state in ("cached", "dropped"):
        raw, ours = [], []
        for _ in range(args.repeats):
            for times, function in (
                (raw, lambda: read_raw(files)),
                (ours, lambda: load_once(directory, config, device)[1]),
            ):
                if state == "dropped" and dist.get_rank() == 0:
                    drop_from_cache(files)
                dist.barrier()
                if times is ours or dist.get_rank() == 0:
                    times.append(function())
                dist.barrier()
        slowest = torch.tensor([statistics.median(ours)])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        speeds[f"{state}_gb_per_second"] = round(total / 1e9 / slowest.item(), 3)
        speeds[f"{state}_raw_gb_per_second"] = round(total / 1e9 / statistics.median(raw), 3) if raw else None
    gc.collect()
    forget_peak()
    _, _, model = load_once(directory, config, device)
    extra = resident_gib(peak=True) - resident_gib()  # what was needed to load and is free again
    check(directory, model)
    return {"gigabytes": round(total / 1e9, 2), **speeds, "host_gib_while_loading": round(extra, 3)}


def main():
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    device = setup_distributed()
    made = [None if args.directory else tempfile.mkdtemp(prefix="bench_load-")]
    dist.broadcast_object_list(made, src=0)
    directory = Path(args.directory or made[0])
    directory.mkdir(parents=True, exist_ok=True)
    try:
        record = measure(directory, args, device)
    finally:
        dist.barrier()
        if made[0] and dist.get_rank() == 0:
            shutil.rmtree(made[0])
    if dist.get_rank() == 0:
        record |= {
            "ranks": dist.get_world_size(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "cores": os.cpu_count(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "commit": git_commit(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        for key, value in record.items():
            print(f"    {key:<28}{value}")
        path = Path(args.out)
        records = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*records, record], indent=1) + "\n")
        print(json.dumps(record))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
