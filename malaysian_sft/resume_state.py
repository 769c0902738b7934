"""A run's training state on disk, resume/ in a checkpoint: what --resume goes on from. Nothing in it can execute.

    position.json             the index: step, facts of the run, every file's size, checksum and contents
    rank-<rank>.safetensors   that rank's share of every tensor, flattened, fp32

A share is a range of elements of the flattened whole, whatever sharded it (FSDP2, ZeRO-3, nothing), so a run may be
resumed by another number of ranks. Every byte is under a checksum: of a file by position.json, of position.json by
itself.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from malaysian_sft.lora import CONFIG, MANIFEST, WEIGHTS
from malaysian_sft.safetensors_files import save_tensors

FORMAT = 1  # raise it with any change after which an older position.json means something else
RESUME, INDEX = "resume", "position.json"
BESIDE = (WEIGHTS, CONFIG, MANIFEST, "trainer_state.json")  # what a resumed run reads next to resume/
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".distcp", ".metadata")


@dataclass
class Share:
    """Elements start to start + len(values) of a flattened tensor of `numel` elements."""

    values: torch.Tensor  # (n,), on the CPU, fp32
    start: int
    numel: int


def sync(path):
    """Have the disk hold a file, or a directory's names, before anything older is deleted."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(index):
    """The checksum of an index, over all of it but the checksum."""
    content = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe(path):
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def write_shares(directory, rank, shares):
    """Write this rank's shares (by name) to one file; returns {its name: its entry of the index}, {} without shares."""
    shares = {name: share for name, share in shares.items() if len(share.values)}
    if not shares:
        return {}
    path = directory / f"rank-{rank:05d}.safetensors"
    save_tensors({name: share.values for name, share in shares.items()}, path)
    sync(path)
    ranges = {name: [share.start, share.start + len(share.values), share.numel] for name, share in shares.items()}
    return {path.name: {**describe(path), "ranges": ranges}}


def write_index(checkpoint, position, files):
    """Write resume/position.json of a checkpoint whose other files are all there, then have the disk hold them all.

    position: {"step", "facts", ...}; files: what write_shares returned, of all ranks.
    """
    beside = {name: describe(checkpoint / name) for name in BESIDE if (checkpoint / name).is_file()}
    index = {"format": FORMAT, **position, "files": files, "beside": beside}
    path = checkpoint / RESUME / INDEX
    path.write_text(json.dumps({**index, "checksum": _digest(index)}, indent=1) + "\n")
    for entry in sorted(checkpoint.rglob("*"), reverse=True):  # files before the directories that name them
        sync(entry)
    sync(checkpoint)


def read_index(checkpoint):
    """resume/position.json of a checkpoint. Raises ValueError, in words that follow its name, for what is none."""
    path = checkpoint / RESUME / INDEX
    name = f"{RESUME}/{INDEX}"
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{name} is not there") from None
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"{name} is not of this version of the trainer")
    if index.get("checksum") != _digest(index):
        raise ValueError(f"{name} is damaged: its checksum is another")
    kinds = {"step": int, "updates": int, "facts": dict, "files": dict, "beside": dict}
    for key, kind in kinds.items():
        if not isinstance(index.get(key), kind):
            raise ValueError(f"{name} has no {key}")
    for file in index["files"]:
        if Path(file).name != file:
            raise ValueError(f"{name} lists {file}, which is outside of {RESUME}/")
    return index


def _planted(checkpoint, index):
    """A file that could execute, or that nobody listed, where a resumed run reads; None if there is none."""
    for entry in sorted(checkpoint.iterdir()):
        if entry.name.endswith(PICKLES) or entry.name.startswith("global_step"):
            return f"{entry.name} may be a pickle, which could execute"
    for entry in sorted((checkpoint / RESUME).iterdir()):
        if entry.name != INDEX and entry.name not in index["files"]:
            return f"{RESUME}/{entry.name} is not listed in {INDEX}"
    return None


def state_fault(checkpoint, rank=0, world=1):
    """What keeps a run from going on from a checkpoint, in words; None if nothing does.

    Each of `world` ranks reads every world-th file: the answer is what any of them finds.
    """
    checkpoint = Path(checkpoint)
    try:
        index = read_index(checkpoint)
        if fault := _planted(checkpoint, index):
            return fault
    except ValueError as error:
        return str(error)
    files = {f"{RESUME}/{name}": entry for name, entry in index["files"].items()} | index["beside"]
    for name, entry in sorted(files.items())[rank::world]:
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is not there"
        if path.stat().st_size < entry["bytes"]:
            return f"{name} is cut short"
        if checksum(path) != entry["sha256"]:
            return f"{name} is damaged: its checksum is another"
    return None


class StateReader:
    """The tensors of a checkpoint's resume/, any range of them: read(name, start, stop) -> (stop - start,) fp32."""

    def __init__(self, checkpoint):
        self.directory = Path(checkpoint) / RESUME
        self.places = {}  # name -> [(start, stop, file)]
        self.numel = {}
        for file, entry in read_index(Path(checkpoint))["files"].items():
            for name, (start, stop, numel) in entry["ranges"].items():
                self.places.setdefault(name, []).append((start, stop, file))
                self.numel[name] = numel
        self.open = {}

    def read(self, name, start, stop, numel):
        """Raises ValueError if the state has no such tensor of `numel` elements."""
        if self.numel.get(name) != numel:
            raise ValueError(
                f"--resume: {self.directory} has {self.numel.get(name, 'no')} elements of {name}, the model {numel}"
            )
        values, found = torch.empty(stop - start, dtype=torch.float32), 0
        for low, high, file in self.places[name]:
            first, last = max(low, start), min(high, stop)
            if first < last:
                values[first - start : last - start] = self._slice(file, name)[first - low : last - low]
                found += last - first
        if found != stop - start:
            raise ValueError(f"--resume: {self.directory} has {found} of elements {start} to {stop} of {name}")
        return values

    def _slice(self, file, name):
        try:
            if file not in self.open:
                self.open[file] = safe_open(self.directory / file, "pt")
            return self.open[file].get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"--resume: {self.directory / file}: {error}") from None
