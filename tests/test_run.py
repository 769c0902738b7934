"""run.py: the commit, the tracker's mode, the schedule, a step's line, what a resumed run must share."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from malaysian_sft.run import (
    batch_arithmetic,
    count_steps,
    git_commit,
    learning_rate_factor,
    refuse_another_run,
    run_facts,
    step_line,
    trim_log,
    wandb_mode,
)

ROOT = Path(__file__).resolve().parent.parent


def commit_of_copy(directory):
    """git_commit() as the copy of run.py in `directory` gives it."""
    command = [sys.executable, "-c", "from malaysian_sft import run; print(run.git_commit())"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_is_that_of_the_code_and_says_if_it_was_changed(tmp_path, monkeypatch):
    (tmp_path / "malaysian_sft").mkdir()
    for name in ("__init__.py", "run.py", "locks.py"):
        shutil.copy(ROOT / "malaysian_sft" / name, tmp_path / "malaysian_sft")
    assert commit_of_copy(tmp_path) == "None"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "malaysian_sft"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "untracked").touch()
    assert commit_of_copy(tmp_path) == head and len(head) == 40
    with open(tmp_path / "malaysian_sft" / "run.py", "a") as file:
        file.write("\n")
    assert commit_of_copy(tmp_path) == head + "+"
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_the_programs_have_no_commit_of_their_own():
    found = [
        path.name
        for path in [*ROOT.glob("*.py"), *ROOT.glob("malaysian_sft/*.py")]
        if "def git_commit" in path.read_text() or "rev-parse" in path.read_text()
    ]
    assert found == ["run.py"]


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, None, "offline"),
        ({}, "machine github.com login a password b", "offline"),
        ({}, "machine api.wandb.ai login user password key", "online"),
        ({"WANDB_API_KEY": "key"}, None, "online"),
        ({"WANDB_API_KEY": "key", "WANDB_MODE": "disabled"}, None, "disabled"),
    ],
)
def test_wandb_is_offline_without_a_key(environment, netrc, mode, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc is not None:
        (tmp_path / "netrc").write_text(netrc)
    assert wandb_mode() == mode


def test_the_learning_rate_by_hand():
    factors = [learning_rate_factor(step, total_steps=6, warmup_steps=2) for step in range(7)]
    assert factors == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert learning_rate_factor(0, total_steps=1320, warmup_steps=50) == 1 / 50


def test_a_step_s_line_is_aligned_and_fits():
    record = dict(epoch=0.04, loss=1.23456, grad_norm=0.5, learning_rate=1e-4, tokens_per_second=217864.2, mfu=0.444)
    lines = [
        step_line({"step": step, **record, "peak_gib": peak, "validation_loss": None}, 13200)
        for step, peak in ((1, 7.5), (13200, 131.06))
    ]
    assert len(lines[0]) == len(lines[1]) <= 120
    assert lines[0] == (
        "step      1/13,200  epoch  0.04  loss  1.2346  norm  0.50  lr 1.00e-04   217,864 tok/s  MFU 44.4%    7.5 GiB"
    )
    assert len(step_line({"step": 1, **record, "peak_gib": 9.0, "validation_loss": 1.0}, 13200)) <= 120
    assert "validation loss 1.5000" in step_line({"step": 1, "validation_loss": 1.5}, 10)


def test_batch_arithmetic():
    assert (
        count_steps(100, 32, 3) == (4, 12) and count_steps(100, 32, 1.5) == (4, 6) and count_steps(9, 4, 3, 5)[1] == 5
    )
    assert batch_arithmetic(100, 16384, 32, 8, 1, 4, 12)[0] == 4
    with pytest.raises(ValueError, match="--global_batch_size 12 is no multiple of 8 ranks"):
        batch_arithmetic(100, 16384, 12, 8, 1, 4, 12)


@pytest.mark.parametrize("packs", [32, 31, 3])
def test_a_step_larger_than_an_epoch_is_said(packs):
    _, said = batch_arithmetic(packs, 1024, 32, 8, 1, *count_steps(packs, 32, 3))
    first, *warning = said.splitlines()
    assert f"; {packs} packs = 1 steps an epoch, 3 epochs = 3 steps" in first
    wanted = f"warning: --global_batch_size 32 is more than the {packs} packs of an epoch: a step has {packs}, an epoch"
    assert [line.startswith(wanted) for line in warning] == ([] if packs == 32 else [True])


def test_facts_are_what_a_resumed_run_must_share():
    arguments = {"seed": 42, "r": 8, "lora_alpha": None, "report_to": "none"}
    facts = run_facts(arguments, "abc", 12)
    assert facts == {"data": "abc", "total_steps": 12, "seed": 42, "r": 8, "lora_alpha": 16}
    refuse_another_run(facts, {"data": "abc", "seed": 42}, "args.json")  # a record may be older than a fact
    with pytest.raises(ValueError, match="seed is 42, but args.json says 0; that is another run"):
        refuse_another_run(facts, {**facts, "seed": 0}, "args.json")


def test_a_log_is_cut_where_training_goes_on(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert trim_log(tmp_path, 2).read_text() == '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n[]\n')
    with pytest.raises(ValueError, match="log.jsonl, line 2: no record of a step; remove the line"):
        trim_log(tmp_path, 2)
