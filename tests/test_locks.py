"""The lock files that setup.sh installs from: renewed with the requirements, hashed, of no particular machine."""

import importlib.metadata
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_lock_files_follow_the_requirements(device, python):
    text = (ROOT / f"locks/{device}-{python}.txt").read_text()
    assert not re.search(r"://|^-|/opt|@ file", text, re.MULTILINE), "an index or a path of one machine"
    entries = re.split(r"\n(?=\S)", text)
    locked = {entry.split()[0] for entry in entries}
    assert all("--hash=sha256:" in entry for entry in entries)
    asked = (ROOT / "requirements.txt").read_text() + (ROOT / f"requirements-{device}.txt").read_text()
    pins = {line for line in asked.splitlines() if re.match(r"[\w-]+==", line)} - {"torch==2.13.0+cpu"}
    assert len(pins) > 20 and pins <= locked, f"run locks/make.sh: {sorted(pins - locked)}"


def test_no_package_overwrites_anothers_modules():
    """Of the environment that is installed: old releases of a package carry modules that have moved to another, and a
    resolver that combines the two leaves a mixture that imports, or does not."""
    owners = defaultdict(dict)
    for package in importlib.metadata.distributions():
        for path in package.files or []:
            if path.hash and path.suffix in (".py", ".so") and len(path.parts) > 1:
                owners[str(path)][package.metadata["Name"]] = path.hash.value
    assert len(owners) > 10_000
    shared = {path: sorted(found) for path, found in owners.items() if len(set(found.values())) > 1}
    assert not shared
