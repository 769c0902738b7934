"""Every launcher is valid bash, prepares before it trains, and passes only flags that its trainer knows."""

import fnmatch
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import HfArgumentParser

import calculate_malaymmlu
import malaymmlu
import train_dense
import train_moe
from malaysian_sft import launch
from malaysian_sft.conversations import DataArguments
from malaysian_sft.lora import LoraArguments
from malaysian_sft.plan_page import launcher_number
from malaysian_sft.sample_models import upcycle
from malaysian_sft.verify import verify_adapter

ROOT = Path(__file__).parent.parent
LAUNCHERS = sorted([*ROOT.glob("ds3-*.sh"), *ROOT.glob("fsdp2-*.sh")])
STUB = '#!/bin/sh\nfor a in "$@"; do printf "%s\\037" "$a"; done >> "$CALLS"; printf "\\n" >> "$CALLS"\n'


def calls_of(launcher, tmp_path, *flags, **environment):
    """What the launcher would start: a list of argument vectors, recorded by a stand-in for python3."""
    stub = tmp_path / "python3"
    stub.write_text(STUB.replace("for a in", 'printf "python3\\037" >> "$CALLS"; for a in'))
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
    return HfArgumentParser((*groups, DataArguments, LoraArguments))


def test_the_original_project_s_are_here():
    assert {
        "ds3-llama3.1-70b-lora-256",
        "ds3-qwen2.5-72b-lora-256",
        "ds3-qwen3-32b-lora-256",
        "fsdp2-fused-moe-Qwen3-235B-A22B-lora-256",
        "fsdp2-fused-moe-Qwen3-30B-A3B-dora-256",
        "fsdp2-fused-moe-Qwen3-30B-A3B-lora-256",
        "fsdp2-fused-moe-glm-4.5-air-lora-256",
    } <= {launcher.stem for launcher in LAUNCHERS}


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda p: p.stem)
def test_launcher(launcher, tmp_path):
    subprocess.run(["bash", "-n", str(launcher)], check=True)
    assert os.access(launcher, os.X_OK)
    prepare, train = calls_of(
        launcher, tmp_path, "--learning_rate", "3e-4", NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1"
    )
    assert prepare[0] == "python3" and train[:3] == ["python3", "-m", "malaysian_sft.launch"]
    assert "--prepare_only" in prepare and "--prepare_only" not in train
    for only in (["--prepare_only"], ["--prepare_only", "True"], ["--dry_run", "True"]):
        (tmp_path / "calls").unlink()
        assert len(calls_of(launcher, tmp_path, *only)) == 1, "once, not in every rank again"
    for flag, value in {
        "--nproc_per_node": "8",
        "--nnodes": "2",
        "--node_rank": "1",
        "--master_addr": "10.0.0.1",
    }.items():
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
    """The real thing in small: a launcher with model, data and sizes overridden: DoRA in bf16 through ZeRO-3 on two
    processes."""
    from conftest import save_tiny_checkpoint

    save_tiny_checkpoint(tmp_path / "model", "qwen3")
    (tmp_path / "train.jsonl").write_text('{"input": "Ali makan nasi.", "output": "Nasi dimakan oleh Ali."}\n' * 5)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "NUM_GPUS": "2",
        "OMP_NUM_THREADS": "1",
    }
    flags = f"""--model_name_or_path {tmp_path}/model --dataset {tmp_path}/train.jsonl --data_cache {tmp_path}/cache
        --max_seq_length 128 --output_dir {tmp_path}/run --global_batch_size 2 --r 4 --use_dora True
        --num_train_epochs 1 --report_to none""".split()
    done = subprocess.run(
        ["bash", str(ROOT / "ds3-qwen3-32b-lora-256.sh"), *flags], env=env, capture_output=True, text=True, timeout=900
    )
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert verify_adapter(checkpoint, tmp_path / "model") == [], done.stderr[-3000:]
    assert "FutureWarning" not in done.stderr, "hundreds a step, in which a user finds nothing else"
    saved = {name: t for name, t in load_file(checkpoint / "adapter_model.safetensors").items() if "lora_B" in name}
    assert all((t.bfloat16().float() != t).any() for t in saved.values()), "fp32 is trained and saved, not a bf16 copy"


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, ["expandable_segments:True", ""]),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, ["backend:native", ""]),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, ["", "backend:native"]),
    ],
)
def test_ranks_get_the_allocator_that_peaks_were_measured_with(tmp_path, given, expected):
    names = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    script = tmp_path / "rank.py"
    script.write_text(f"import os\nprint('here:', [os.environ.get(name, '') for name in {names!r}])\n")
    env = {name: value for name, value in os.environ.items() if name not in names} | given | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "malaysian_sft.launch", "--nproc_per_node", "1", "--standalone", "--", script]
    done = subprocess.run(map(str, command), env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert f"here: {expected!r}" in done.stdout, done.stderr[-2000:]


def quickstart_calls(workspace, *flags):
    """What quickstart.sh would start in `workspace`: {script: its flags}, and every call in order."""
    calls = calls_of(workspace / "quickstart.sh", workspace, *flags)
    (workspace / "calls").unlink()
    return {call[i]: call[i + 1 :] for call in calls for i, word in enumerate(call) if word.endswith(".py")}, calls


def test_quickstart(tmp_path):
    """Both runs of the quickstart pass flags that exist, take what is added, are evaluated and scored, and go on where
    they were."""
    shutil.copy(ROOT / "quickstart.sh", tmp_path)
    (tmp_path / "setup.sh").write_text("")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("")
    scripts, calls = quickstart_calls(tmp_path, "--max_steps", "3")
    runs = {}
    for script in ("train_dense.py", "train_moe.py"):
        args, unknown = parser_of(script).parse_known_args(scripts[script])
        assert unknown == [] and args.max_steps == 3 and not getattr(args, "resume", False)
        assert args.r == 64 and args.max_seq_length == 1024 and args.dataset == "data/conversations"
        runs[args.run_name] = args.model_name_or_path
    assert list(runs) == ["quickstart-lora-64", "quickstart-moe-lora-64"]
    dense, moe = runs.values()
    (launched,) = [call for call in calls if "malaysian_sft.launch" in call]
    assert "--standalone" in launched, "two of them on one machine must not meet at one port"
    assert any(call[1] == "-c" and f"upcycle('{dense}', '{moe}'" in call[2] for call in calls)

    evaluated, unknown = HfArgumentParser(malaymmlu.Arguments).parse_known_args(scripts["malaymmlu.py"])
    scored, unknown_too = HfArgumentParser(calculate_malaymmlu.Arguments).parse_known_args(
        scripts["calculate_malaymmlu.py"]
    )
    assert unknown == unknown_too == [] and evaluated.base == dense, "the mixture before training is no row"
    for pattern, names in (
        (evaluated.pattern, [f"{run}-checkpoint-15" for run in runs]),
        (
            scored.pattern,
            [f"malaymmlu-{run}-checkpoint-15" for run in runs] + [f"malaymmlu-{malaymmlu.base_name(dense)}"],
        ),
    ):
        globs = pattern.split(",")
        assert [sum(fnmatch.fnmatchcase(name, glob) for glob in globs) for name in names] == [1] * len(names)

    for run in runs:  # a second time: the base models are there, and so are checkpoints
        (tmp_path / "outputs" / run / "checkpoint-15/resume").mkdir(parents=True)
        (tmp_path / "outputs" / run / "checkpoint-15/resume/position.json").touch()
    for base in (dense, moe):
        (tmp_path / base).mkdir(parents=True)
        (tmp_path / base / "model.safetensors").touch()
    scripts, calls = quickstart_calls(tmp_path)
    assert "--resume" in scripts["train_dense.py"] and "--resume" in scripts["train_moe.py"]
    assert not any("upcycle" in word for call in calls for word in call) and not any(call[1] == "-" for call in calls)


def test_upcycled_model_can_start_a_dora(tmp_path):
    """DoRA divides by the norm of a weight's row: no row that is adapted may be zero, the idle shared expert's
    included."""
    from conftest import save_tiny_checkpoint

    save_tiny_checkpoint(tmp_path / "dense", "llama", tie_word_embeddings=True)
    upcycle(tmp_path / "dense", tmp_path / "moe")
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    adapted = [name for name in weights if name.endswith("_proj.weight")]
    assert any("shared_expert.down_proj" in name for name in adapted)
    assert all(weights[name].norm(dim=-1).min() > 0 for name in adapted)
    assert not (tmp_path / "moe.part").exists()
    with pytest.raises(ValueError, match="moe is there already"):
        upcycle(tmp_path / "dense", tmp_path / "moe")


@pytest.mark.parametrize(
    "variable, value",
    [
        ("NUM_GPUS", "0"),
        ("NUM_GPUS", "-1"),
        ("NUM_GPUS", "eight"),
        ("NUM_GPUS", "1.5"),
        ("NNODES", "0"),
        ("NNODES", "two"),
        ("NODE_RANK", "first"),
        ("NODE_RANK", "1"),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "80000"),
    ],
)
def test_a_number_that_cannot_be_is_one_line_that_names_the_variable(tmp_path, monkeypatch, variable, value):
    script = "ds3-qwen3-32b-lora-256.sh"
    *_, start = calls_of(ROOT / script, tmp_path, **{"NUM_GPUS": "1", variable: value})
    monkeypatch.setattr(launch, "run", lambda args: pytest.fail("started"))
    with pytest.raises(SystemExit, match=rf"^error: {variable} \(or --\w+\) is '?{value}'?: expected [^\n]+$"):
        launch.main(start[3:])
    if variable in ("NUM_GPUS", "NNODES"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(ValueError, match=f"^{variable} is '{value}': expected a positive number$"):
            launcher_number(variable, 1)
