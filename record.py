"""What every run writes down in the same way: the commit of the code, and whether wandb may talk to its server."""

import os
import subprocess
from pathlib import Path


def git_commit():
    """The commit of the code that runs, with "+" when the tree differs from it; None outside a git checkout or without git."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if commit.returncode:
        return None
    dirty = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True).stdout.strip()
    return commit.stdout.strip() + ("+" if dirty else "")


def wandb_mode():
    """WANDB_MODE if it is set; else "online" where wandb finds a key, and "offline" elsewhere, so that no run waits at a login prompt."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_key = "WANDB_API_KEY" in os.environ or (netrc.is_file() and "wandb" in netrc.read_text())
    return os.environ.get("WANDB_MODE", "online" if has_key else "offline")
