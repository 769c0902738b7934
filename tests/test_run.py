"""run.py: the commit of a checkout, and when wandb stays offline."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from malaysian_sft.run import git_commit, wandb_mode

ROOT = Path(__file__).resolve().parent.parent


def commit_of_copy(directory):
    """git_commit() as the copy of run.py in `directory` gives it."""
    command = [sys.executable, "-c", "from malaysian_sft import run; print(run.git_commit())"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout.strip()


def test_commit_is_that_of_the_code_and_says_if_it_was_changed(tmp_path, monkeypatch):
    (tmp_path / "malaysian_sft").mkdir()
    for name in ("__init__.py", "run.py"):
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
