"""Safetensors files: their headers, where each tensor's bytes lie, checksums."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def tensor_checksum(tensor) -> str:
    """The first 64 bits of a tensor's sha256: enough to notice damage or a swap, small enough for 70,000 expert
    tensors."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()[:16]


def tensor_checksums(tensors) -> dict[str, str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(tensor_checksum, tensors.values()), strict=True))


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
        except ValueError:
            raise ValueError(f"{path}: not a safetensors file (its header is not JSON)") from None
    header.pop("__metadata__", None)
    expected = 8 + length + max((info["data_offsets"][1] for info in header.values()), default=0)
    if size != expected:
        raise ValueError(f"{path}: truncated or damaged: {size:,} bytes, its header asks for {expected:,}")
    return header, 8 + length


def checkpoint_shards(directory) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
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


def read_sources(directory):
    """{tensor name: Source} of the model in `directory`. Raises ValueError for missing or damaged files."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(path.name for path in directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory}: no *.safetensors file")
    sources = {}
    for name in files:
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{path}: missing, but {index.name} lists it")
        header, start = read_header(path)
        for key, info in header.items():
            if info["dtype"] not in DTYPES:
                raise ValueError(f"{path}: {key} is {info['dtype']}; expected one of {', '.join(DTYPES)}")
            sources[key] = Source(path, start + info["data_offsets"][0], tuple(info["shape"]), DTYPES[info["dtype"]])
    return sources
