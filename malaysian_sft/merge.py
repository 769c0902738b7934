"""Base + adapter: as an ordinary checkpoint on disk, or tensor by tensor while vLLM loads the base.

LLM(model=BASE, load_format="merge_adapter", model_loader_extra_config={"adapter": DIR})

An adapter is merged into what it was trained on. Of a base in FP8 that is its widened weights; where a run quantised
the experts itself (--base_dtype fp8), they are quantised here as they were there, and widened. The result is never
quantised.
"""

import json
import os
import shutil
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from malaysian_sft.adapter_files import Adapter, is_tokenizer_file
from malaysian_sft.base_model import block_fp8, find_base, load_config, shapes_of_base
from malaysian_sft.fp8 import BLOCK, FP8, SCALE, quantise, widen
from malaysian_sft.lora import EXPERT
from malaysian_sft.safetensors_files import (
    DTYPES,
    SIZES,
    checkpoint_shards,
    read_header,
    read_sources,
    read_tensor,
    writing,
)
from malaysian_sft.verify import adapter_faults

CHUNK = 1 << 24  # values merged at a time: 64 MiB in fp32, so that memory does not depend on the model


def merged_rows(weight, A, B, magnitude, scaling) -> torch.Tensor:
    """Rows of W + s B A, or of DoRA's m (W + s B A) / ||W + s B A||, the norm per row, in fp32.

    weight (rows, in), A (r, in), B (rows, r), magnitude (rows,) or None.
    """
    merged = torch.addmm(weight.float(), B, A, alpha=scaling)
    if magnitude is not None:
        merged *= (magnitude / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
    return merged


def trained_rows(adapter, slot, weight, scale=None, first=0) -> torch.Tensor:
    """Rows of a base weight as the adapter's `slot` (None: it has none) was trained on them, not in FP8.

    scale: of all rows, if they are in FP8; first: the number of the first one, a multiple of 128 where rows have to be
    quantised.
    """
    if scale is not None:
        return widen(weight, scale, first).to(adapter.widened_to)
    if slot is not None and adapter.quantised == "while loading" and EXPERT.match(slot):
        return widen(*quantise(weight)).to(adapter.widened_to)
    return weight


@torch.no_grad()
def merge_tensor(adapter: Adapter, name: str, weight: torch.Tensor, dtype=None, device=None, scale=None):
    """Base tensor `name` with the adapter merged in; `weight` itself if the adapter does not change it. Counts in
    adapter.used.

    The maths is fp32 on `device` (default: where weight is), the result of `dtype` (default: weight's), cast last.
    scale: of a weight in FP8.
    """
    pieces = adapter.pieces(name, weight.shape)
    if weight.dtype not in DTYPES.values() and scale is None and pieces:
        raise ValueError(f"{name} of the base is {weight.dtype}: quantised; merge into a bf16 checkpoint")
    if scale is not None:
        device = device or weight.device
        weight = trained_rows(adapter, None, weight.to(device), scale.to(device))
    if not pieces:
        return weight
    flat = weight.to(device=device or weight.device, dtype=torch.float32, copy=True).reshape(-1, weight.shape[-1])
    for slot, first, last in pieces:
        flat[first:last] = trained_rows(adapter, slot, flat[first:last])
        A, B, magnitude = (None if factor is None else factor.to(flat.device) for factor in adapter.factors(slot))
        flat[first:last] = merged_rows(flat[first:last], A, B, magnitude, adapter.slots[slot].scaling)
        adapter.used[slot] += 1
    return flat.reshape(weight.shape).to(dtype or weight.dtype)


def unused_faults(adapter: Adapter, used: Counter) -> list[str]:
    """Adapter modules that were not merged exactly once: a sentence for each kind, naming the first eight."""
    unused = sorted(set(adapter.slots) - set(used))
    twice = sorted(name for name, count in used.items() if count > 1)
    faults = []
    if unused:
        faults.append(f"{len(unused)} adapter modules match nothing in the base: {', '.join(unused[:8])}")
    if twice:
        faults.append(f"{len(twice)} adapter modules match more than one base tensor: {', '.join(twice[:8])}")
    return faults


def merge_adapter(base, adapter, out, workers: int | None = None, any_base: bool = False, log=print) -> None:
    """Write base + adapter as an ordinary checkpoint to directory `out`: the base's shards, names and dtypes, and its
    configuration files. Of a base in FP8, weights are bf16, and scales and quantisation are gone.

    Each shard is streamed through `workers` processes (default: one per core, at most 8 and one per shard) in blocks of
    rows, so memory stays at a few hundred MB a process for any model. `out` is complete or not there at all: it is put
    together under another name. Raises ValueError when the base is quantised in another way or not safetensors, when a
    key of the adapter does not change exactly one base tensor, or when `out` is there already.
    """
    directory, out = find_base(base), Path(out)
    if out.exists():
        raise ValueError(f"{out} is there already; delete it or choose another directory")
    try:
        fp8 = block_fp8(directory, json.loads((directory / "config.json").read_bytes()))
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory / 'config.json'}: not JSON ({error}); download the base again") from None
    # complete, finite, trained, for this base: what is merged cannot be looked at any more
    shapes, known = shapes_of_base(directory), None if any_base else str(directory)
    if faults := adapter_faults(Path(adapter), shapes, known, allow_zero=False):
        raise ValueError(f"{adapter} is not sound ({len(faults)} faults): {'; '.join(faults[:5])}")
    adapter = Adapter(adapter)
    shards = checkpoint_shards(directory)
    sources = read_sources(directory) if fp8 else {}
    scales = {name: source.scale for name, source in sources.items() if source.scale is not None}
    _check_use(adapter, shards, scales)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a merge that was killed
    workers = min(workers or min(os.cpu_count() or 1, 8), len(shards))
    try:
        with writing(out):
            part.mkdir(parents=True)
            _merge_shards(shards, part, adapter.directory, scales, workers, log)
            _copy_configuration(directory, adapter.directory, part)
            if fp8:
                _without_quantisation(part, scales)
            os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # half a model would only fill the disk


def _merge_shards(shards, part, adapter_directory, scales, workers, log):
    total, done, start = sum(shard.stat().st_size for shard in shards), 0, time.perf_counter()
    for shard in _run(workers, [(shard, part / shard.name, adapter_directory, scales) for shard in shards]):
        done += shard.stat().st_size
        rate = done / 1e9 / (time.perf_counter() - start)
        log(f"{done / 1e9:.2f} of {total / 1e9:.2f} GB merged  {rate:.2f} GB/s  {shard.name}")


def _check_use(adapter, shards, scales):
    """Raise ValueError unless every module of the adapter changes exactly one tensor of the base, before any is
    merged."""
    used = Counter()
    for shard in shards:
        header, _ = read_header(shard)
        for name, info in header.items():
            for slot, _, _ in adapter.pieces(name, info["shape"]):
                if info["dtype"] not in DTYPES and name not in scales:
                    raise ValueError(f"{shard}: {name} is {info['dtype']}: quantised; merge into a bf16 checkpoint")
                used[slot] += 1
    if faults := unused_faults(adapter, used):
        raise ValueError(f"{adapter.path}: {'; '.join(faults)}")


def _run(workers, jobs):
    """Merge the shards in `workers` processes (in this one if 1); yields each shard when it is finished."""
    if workers <= 1:
        for job in jobs:
            yield _merge_shard(*job)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        try:
            for future in as_completed([pool.submit(_merge_shard, *job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a merging process was killed (as the kernel does for lack of memory): start again with fewer --workers"
            ) from None


@torch.no_grad()
def _merge_shard(source: Path, target: Path, adapter_directory, scales) -> Path:
    """One shard, byte for byte the base's layout, but for what was in FP8: scales is {its weights: Source}."""
    adapter = Adapter(adapter_directory)
    header, start = read_header(source)
    ordered = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]))
    with open(source, "rb") as reader, open(target, "wb") as writer:
        writer.write(_wide_header(ordered, scales) if scales else reader.read(start))
        for name, info in ordered.items():
            if _is_scale(name, scales):
                continue
            begin, end = info["data_offsets"]
            reader.seek(start + begin)
            scale = read_tensor(scales[name]) if name in scales else None
            pieces = adapter.pieces(name, info["shape"]) or ([(None, 0, info["shape"][0])] if scale is not None else [])
            if not pieces:
                _copy_bytes(reader, writer, end - begin)
                continue
            features, row = info["shape"][-1], 0
            dtype = DTYPES[info["dtype"]] if scale is None else FP8
            for slot, first, last in pieces:
                _copy_bytes(reader, writer, (first - row) * features * dtype.itemsize)
                _merge_rows(reader, writer, adapter, slot, (last - first, features), dtype, scale)
                row = last
            _copy_bytes(reader, writer, end - begin - row * features * dtype.itemsize)
        writer.flush()
        os.fsync(writer.fileno())
    return source


def _is_scale(name, scales):
    """Whether a tensor of a checkpoint holds the scales of one of the weights in FP8, which `scales` has."""
    return name.endswith(SCALE) and name.removesuffix(SCALE) in scales


def _wide_header(ordered, scales) -> bytes:
    """The header of a shard whose weights in FP8, those in `scales`, are bf16 and whose scales are gone."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, info in ordered.items():
        if _is_scale(name, scales):
            continue
        dtype = "BF16" if name in scales else info["dtype"]
        begin, end = info["data_offsets"]
        size = (end - begin) // SIZES[info["dtype"]] * SIZES[dtype] if name in scales else end - begin
        header[name] = {"dtype": dtype, "shape": info["shape"], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as the library does, so that tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _without_quantisation(out, scales):
    """Take out of the merged checkpoint's configuration that its base was in FP8."""
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    path = out / "model.safetensors.index.json"
    if path.is_file():
        index = json.loads(path.read_text())
        dropped = {name + SCALE for name in scales}
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in dropped}
        ends = [read_header(out / file)[0].values() for file in set(index["weight_map"].values())]
        total = sum(max(info["data_offsets"][1] for info in infos) for infos in ends)
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": total}
        path.write_text(json.dumps(index, indent=2) + "\n")


def _copy_bytes(reader, writer, count):
    while count:
        block = reader.read(min(count, 1 << 24))
        writer.write(block)
        count -= len(block)


def _merge_rows(reader, writer, adapter, slot, shape, dtype, scale):
    """Rows of one weight (all of its rows, if it is in FP8) from reader to writer, merged if there is a slot."""
    rows, features = shape
    A, B, magnitude = adapter.factors(slot) if slot else (None, None, None)
    step = max(1, CHUNK // features)
    if dtype == FP8 or adapter.quantised:
        step = max(step // BLOCK, 1) * BLOCK  # whole blocks
    for first in range(0, rows, step):
        count = min(step, rows - first)
        raw = bytearray(reader.read(count * features * dtype.itemsize))
        weight = torch.frombuffer(raw, dtype=dtype).view(count, features)
        weight = trained_rows(adapter, slot, weight, scale, first)
        if slot:
            part = None if magnitude is None else magnitude[first : first + count]
            weight = merged_rows(weight, A, B[first : first + count], part, adapter.slots[slot].scaling)
        weight = weight.to(torch.bfloat16 if dtype == FP8 else dtype)
        writer.write(weight.contiguous().flatten().view(torch.uint8).numpy().data)


def _copy_configuration(base, adapter, out):
    """Configuration of the base, how it generates included; tokenizer and chat template as trained with."""
    own_tokenizer = (adapter / "tokenizer_config.json").is_file()
    for path in base.iterdir():
        tokenizer = is_tokenizer_file(path.name) and not own_tokenizer
        kept = path.name in ("config.json", "generation_config.json", "model.safetensors.index.json")
        if kept or tokenizer or path.suffix == ".py":
            shutil.copyfile(path, out / path.name)
    for path in adapter.iterdir():
        if own_tokenizer and is_tokenizer_file(path.name):
            shutil.copyfile(path, out / path.name)


WIDE = {"hf_overrides": {"quantization_config": None}}  # what vLLM needs to be told of a base in FP8


def base_scales(model_config) -> dict:
    """{weight in FP8 of a vLLM model's checkpoint: the Source of its scales}. Raises ValueError if vLLM has made layers
    for quantised weights, which merged ones are not."""
    name = model_config.model
    if not block_fp8(name, load_config(name, model_config.revision).to_dict()):
        return {}
    if getattr(model_config.hf_config, "quantization_config", None):
        raise ValueError(f"{name} is in FP8, the merged weights are not: pass {WIDE} to vllm.LLM as well")
    sources = read_sources(find_base(name, model_config.revision))
    return {name: source.scale for name, source in sources.items() if source.scale is not None}


def register_vllm_loader() -> None:
    """Give vLLM the load format "merge_adapter": base tensors get the adapter merged in as they stream from disk into
    the model.

        LLM(model=BASE, load_format="merge_adapter", model_loader_extra_config={"adapter": DIR})

    For a base in FP8 also hf_overrides={"quantization_config": None}: what is served is not quantised.

    vLLM calls this in every process through the entry point in pyproject.toml, once the project is installed (pip
    install -e . --no-deps). Sharding, stacking and casting come after, so it serves any tensor-parallel size, dense or
    mixture of experts, LoRA or DoRA, at the speed of the base. Loading fails, naming the keys, unless each adapter
    module changed exactly one base tensor in every worker.
    """
    import dataclasses

    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class MergeAdapterLoader(DefaultModelLoader):
        def __init__(self, load_config):
            extra = dict(load_config.model_loader_extra_config or {})
            self.adapter_directory, self.any_base = extra.pop("adapter", None), extra.pop("any_base", False)
            if not self.adapter_directory:
                raise ValueError('load_format "merge_adapter" needs model_loader_extra_config={"adapter": DIRECTORY}')
            super().__init__(
                dataclasses.replace(load_config, load_format="safetensors", model_loader_extra_config=extra)
            )

        def get_all_weights(self, model_config, model):
            # now, not at the first weight: a reload takes the parameters away before it asks for that
            return self._merged_weights(model_config, model, next(model.parameters()).device)

        def _merged_weights(self, model_config, model, device):
            scales = base_scales(model_config)
            adapter = Adapter(self.adapter_directory).check(None if self.any_base else model_config.model)
            for name, weight in super().get_all_weights(model_config, model):
                if _is_scale(name, scales):
                    continue
                scale = read_tensor(scales[name]) if name in scales else None
                options = dict(dtype=model_config.dtype, device=device, scale=scale)
                yield name, merge_tensor(adapter, name, weight, **options)
            if faults := unused_faults(adapter, self._expected_use(adapter)):
                raise ValueError(f"{adapter.path}: {'; '.join(faults)}")

        def _expected_use(self, adapter):
            """What was merged; with expert parallelism's filter, experts of other ranks count as merged: theirs is
            another rank's load."""
            if self.local_expert_ids is None:
                return adapter.used
            elsewhere = {
                n
                for n in adapter.slots
                if EXPERT.match(n) and int(EXPERT.match(n)["index"]) not in self.local_expert_ids
            }
            return adapter.used + Counter(elsewhere - set(adapter.used))

    register_model_loader("merge_adapter")(MergeAdapterLoader)
