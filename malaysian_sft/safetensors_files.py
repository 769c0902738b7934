"""Safetensors files: their headers, where each tensor's bytes lie, checksums."""

import contextlib
import errno
import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from malaysian_sft.fp8 import BLOCK, FP8, SCALE, scale_shape

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_checksum(tensor) -> str:
    """The first 64 bits of a tensor's sha256: enough to notice damage or a swap, small enough for 70,000 expert
    tensors."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()[:16]


def tensor_checksums(tensors) -> dict[str, str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(tensor_checksum, tensors.values()), strict=True))


def save_tensors(tensors, path):
    """Write a safetensors file that others may read as the umask says (the library makes it the owner's alone)."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def disk_is_full(error):
    """Whether an exception says that nothing more can be written: by its number, in its words, or in NumPy's
    (ndarray.tofile counts what it could write)."""
    full = (errno.ENOSPC, errno.EDQUOT)
    said = [words for number in full for words in (f"os error {number}", f"[Errno {number}]")]
    if getattr(error, "errno", None) in full or any(words in str(error) for words in said):
        return True
    return isinstance(error, OSError) and error.errno is None and "requested and" in str(error)


@contextlib.contextmanager
def writing(directory):
    """Around what writes into `directory`: ValueError, in one line, for a full disk and for what safetensors raises."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if disk_is_full(error):
            raise ValueError(
                f"{directory}: the disk is full; nothing was changed: make room and start the command again"
            ) from None
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{directory}: {error}") from None


def read_header(path) -> tuple[dict, int]:
    """({name: {"dtype", "shape", "data_offsets"}}, first data byte) of a safetensors file; ValueError if it is damaged
    or cut short."""
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: truncated: its header is longer than the file ({size:,} bytes)")
        try:
            header = json.loads(file.read(length))
        except (RecursionError, ValueError):
            raise ValueError(f"{path}: not a safetensors file (its header is not JSON)") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file (its header is no object)")
    header.pop("__metadata__", None)
    for name, info in header.items():
        if fault := _entry_fault(info):
            raise ValueError(f"{path}: damaged: its header says of {name} {fault}")
    expected = 8 + length + max((info["data_offsets"][1] for info in header.values()), default=0)
    if size != expected:
        raise ValueError(f"{path}: truncated or damaged: {size:,} bytes, its header asks for {expected:,}")
    return header, 8 + length


def _entry_fault(info):
    """What is wrong with one tensor's entry of a header, in words; None if nothing is. A dtype that is not the bytes'
    own would be read as other values."""
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        return f"{str(info)[:60]}, not dtype, shape and data_offsets"
    shape, offsets = info["shape"], info["data_offsets"]
    both = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    numbers = [*shape, *offsets] if both else [None]
    if not isinstance(info["dtype"], str) or not all(type(n) is int and n >= 0 for n in numbers):
        return f"shape {shape} and data_offsets {offsets}"
    size = SIZES.get(info["dtype"])
    if size is not None and offsets[1] - offsets[0] != size * math.prod(shape):
        return f"{info['dtype']} {shape}, which is {size * math.prod(shape):,} bytes, at {offsets}"
    return None


def indexed_files(directory) -> list[str] | None:
    """Names of the files that model.safetensors.index.json lists, None without one. Raises ValueError for an index that
    is none, or that names a file elsewhere."""
    index = Path(directory) / "model.safetensors.index.json"
    if not index.is_file():
        return None
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{index}: no index of safetensors files ({type(error).__name__}: {error})") from None
    for name in files:
        plain = isinstance(name, str) and os.path.basename(name) == name and len(name) < 256 and "\0" not in name
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: lists {str(name)[:80]!r}; expected the name of a .safetensors file beside it")
    return files


def checkpoint_shards(directory) -> list[Path]:
    if (files := indexed_files(directory)) is not None:
        return [directory / name for name in files]
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    raise ValueError(
        f"{directory}: no model.safetensors and no model.safetensors.index.json; save the base as safetensors first"
    )


@dataclass
class Source:
    """A tensor of a safetensors checkpoint: where its bytes are."""

    path: Path
    start: int  # offset of its first byte in the file
    shape: tuple
    dtype: torch.dtype
    scale: "Source | None" = None  # of one in FP8


def read_tensor(source):
    """The tensor of a Source, whole."""
    with open(source.path, "rb") as file:
        file.seek(source.start)
        data = bytearray(file.read(math.prod(source.shape) * source.dtype.itemsize))
    return torch.frombuffer(data, dtype=source.dtype).view(source.shape)


def read_sources(directory):
    """{tensor name: Source} of the model in `directory`; the scales of a weight in FP8 are a part of its Source. Raises
    ValueError for missing or damaged files."""
    files = indexed_files(directory)
    if files is None:
        files = sorted(path.name for path in directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory}: no *.safetensors file")
    sources = {}
    for name in files:
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path}: missing, but model.safetensors.index.json lists it")
        header, start = read_header(path)
        for key, info in header.items():
            dtype = FP8 if info["dtype"] == "F8_E4M3" else DTYPES.get(info["dtype"])
            if dtype is None:
                raise ValueError(f"{path}: {key} is {info['dtype']}; expected one of {', '.join(DTYPES)}, F8_E4M3")
            sources[key] = Source(path, start + info["data_offsets"][0], tuple(info["shape"]), dtype)
    return _with_scales(sources)


def _with_scales(sources):
    """`sources` with the scales of each weight in FP8 put into its Source. Raises ValueError, naming the weight, for
    other scales than one for each block of 128 x 128."""
    for name in [name for name, source in sources.items() if source.dtype == FP8]:
        source, scale = sources[name], sources.pop(name + SCALE, None)
        expected = scale_shape(*source.shape) if len(source.shape) == 2 else None
        if expected is None or scale is None or scale.shape != expected or scale.dtype == FP8:
            found = "none" if scale is None else f"{scale.dtype} {scale.shape}"
            raise ValueError(
                f"{source.path}: {name} is F8_E4M3 {source.shape}, with scales {name}{SCALE}: {found}; expected a"
                f" matrix and a scale for each of its blocks of {BLOCK} x {BLOCK}"
                + (f", {expected}" if expected else "")
            )
        source.scale = scale
    return sources
