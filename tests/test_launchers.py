"""Every launcher is valid bash, prepares before it trains, and passes only flags that its trainer knows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import HfArgumentParser

import adapter
import multipack
import train_dense
import train_moe

ROOT = Path(__file__).parent.parent
LAUNCHERS = sorted([*ROOT.glob("ds3-*.sh"), *ROOT.glob("fsdp2-*.sh")])
STUB = '#!/bin/sh\nfor a in "$@"; do printf "%s\\037" "$a"; done >> "$CALLS"; printf "\\n" >> "$CALLS"\n'


def calls_of(launcher, tmp_path, *flags, **environment):
    """What the launcher would start: a list of argument vectors, recorded by stand-ins for python3 and torchrun."""
    for name in ("python3", "torchrun"):
        stub = tmp_path / name
        stub.write_text(STUB.replace("for a in", f'printf "{name}\\037" >> "$CALLS"; for a in'))
        stub.chmod(0o755)
    record = tmp_path / "calls"
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(record), **environment}
    subprocess.run(["bash", str(launcher), *flags], check=True, env=env)
    return [line.rstrip("\x1f").split("\x1f") for line in record.read_text().splitlines()]


def parser_of(script):
    if script == "train_dense.py":
        groups = (train_dense.ModelArguments, train_dense.DenseTrainingArguments)
    else:
        groups = (train_moe.TrainingArguments,)
    return HfArgumentParser((*groups, multipack.DataArguments, adapter.LoraArguments))


def test_all_of_them_are_here():
    assert [p.name for p in LAUNCHERS] == [
        "ds3-llama3.1-70b-lora-256.sh",
        "ds3-qwen2.5-72b-lora-256.sh",
        "ds3-qwen3-32b-lora-256.sh",
        "fsdp2-fused-moe-Qwen3-235B-A22B-lora-256.sh",
        "fsdp2-fused-moe-Qwen3-30B-A3B-dora-256.sh",
        "fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh",
        "fsdp2-fused-moe-glm-4.5-air-lora-256.sh",
    ]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda p: p.stem)
def test_launcher(launcher, tmp_path):
    subprocess.run(["bash", "-n", str(launcher)], check=True)
    assert os.access(launcher, os.X_OK)
    prepare, train = calls_of(launcher, tmp_path, "--learning_rate", "3e-4", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    assert prepare[0] == "python3" and train[0] == "torchrun"
    assert "--prepare_only" in prepare and "--prepare_only" not in train
    for flag, value in {"--nproc_per_node": "8", "--nnodes": "2", "--node_rank": "1", "--master_addr": "10.0.0.1"}.items():
        assert train[train.index(flag) + 1] == value
    script = next(a for a in train if a.endswith(".py"))
    flags = train[train.index(script) + 1 :]
    assert prepare[prepare.index(script) + 1 :][: len(flags) - 2] == flags[:-2], "both steps take the same flags"
    namespace, unknown = parser_of(script).parse_known_args(flags)
    assert unknown == []
    assert namespace.run_name == launcher.stem
    assert namespace.learning_rate == 3e-4, "flags given to a launcher come last and win"
    assert namespace.max_seq_length * namespace.global_batch_size == 524_288
    assert namespace.use_dora == ("dora" in launcher.stem)


def test_a_launcher_runs_on_two_cpu_processes(tmp_path):
    """The real thing in small: a launcher with model, data and sizes overridden: DoRA in bf16 through ZeRO-3 on two processes."""
    from conftest import save_tiny_checkpoint

    save_tiny_checkpoint(tmp_path / "model", "qwen3")
    (tmp_path / "train.jsonl").write_text('{"input": "Ali makan nasi.", "output": "Nasi dimakan oleh Ali."}\n' * 5)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NUM_GPUS": "2", "OMP_NUM_THREADS": "1"}
    flags = f"""--model_name_or_path {tmp_path}/model --dataset {tmp_path}/train.jsonl --data_cache {tmp_path}/cache --max_seq_length 128
        --output_dir {tmp_path}/run --global_batch_size 2 --r 4 --use_dora True --num_train_epochs 1 --report_to none""".split()
    done = subprocess.run(["bash", str(ROOT / "ds3-qwen3-32b-lora-256.sh"), *flags], env=env, capture_output=True, text=True, timeout=300)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert adapter.verify_adapter(checkpoint, tmp_path / "model") == [], done.stderr[-3000:]
    saved = {name: t for name, t in load_file(checkpoint / "adapter_model.safetensors").items() if "lora_B" in name}
    assert all((t.bfloat16().float() != t).any() for t in saved.values()), "fp32 is trained and saved, not a bf16 copy"
