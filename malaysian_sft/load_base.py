"""Loading: every rank reads its own rows of the base checkpoint, straight to its device."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from fused_moe_lora import FusedMoELoRA, squared_row_norms
from malaysian_sft.disk_names import Place, disk_names
from malaysian_sft.fp8 import BLOCK, FP8, SCALE, quantise, widen
from malaysian_sft.lora import LAYER, start_lora
from malaysian_sft.moe_model import LoraLinear, allocate
from malaysian_sft.run import is_main, say
from malaysian_sft.safetensors_files import read_sources, read_tensor


@dataclass
class Piece:
    """The values of a checkpoint tensor from `begin` on, to be read into `target`."""

    name: str
    begin: int
    target: torch.Tensor
    scale: torch.Tensor | None = None  # for the scales of a target in FP8, one matrix


def frozen_tensors(causal_lm):
    """{name in the base checkpoint: tensor} of what the checkpoint must provide: base parameters and persistent
    buffers."""
    found = {name: p for name, p in causal_lm.named_parameters() if not p.requires_grad}
    for path, module in causal_lm.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}".lstrip(".")] = buffer
    return {name.replace(".base_layer.", "."): tensor for name, tensor in found.items()}


def plan_reading(tensors, names, ring=None):
    """What this rank reads: ([Piece], {every checkpoint tensor that the model needs: its shape}).

    A parameter sharded on dimension 0 needs a range of rows. A stack of experts is found either as such or as one
    two-dimensional tensor per expert and projection; then a range of rows is a set of whole experts. Experts in FP8 are
    read as matrices with blocks of their own either way. names: DiskNames.
    """
    pieces, expected = [], {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):  # with its weight
            continue
        shape, (local, first), scales = tuple(tensor.shape), own_rows(tensor, ring), None
        if tensor.dtype == FP8:
            scales, _ = own_rows(tensors[name + SCALE], ring)
        whole = names.names.get(Place(name))
        whole = name if whole is None and Place(name, 0) not in names.names else whole
        if whole is not None:
            expected[whole] = shape
        if whole is not None and scales is None:
            if local.numel():
                pieces.append(Piece(whole, first * math.prod(shape[1:]), local))
            continue
        parts = 2 if name.endswith(".gate_up_proj") else 1
        rows = shape[1] // parts
        for e in range(shape[0]):
            for part in range(parts):
                expert, begin = whole, (e * parts + part) * rows * shape[2]
                if whole is None:
                    expert, begin = names.names.get(Place(name, e, part), f"{name} of expert {e}"), 0
                    expected[expert] = (rows, shape[2])
                if first <= e < first + len(local):
                    scale = None if scales is None else scales[e - first].chunk(parts)[part]
                    pieces.append(Piece(expert, begin, local[e - first].chunk(parts)[part], scale))
    return pieces, expected


def own_rows(tensor, ring):
    """(the rows of a frozen tensor that this rank holds, the first one's number)"""
    if ring is not None and (held := ring.pieces.get(id(tensor))) is not None:
        return held.shard[: held.rows].detach(), held.first
    return tensor.detach(), 0


def check_complete(expected, sources, causal_lm, directory):
    """Raise ValueError naming tensors that are missing, unexpected or of another shape; returns those that are ignored
    on purpose.

    Ignored: layers after the last that predict several tokens ahead (GLM-4.5 publishes one), the head of a model that
    ties it to the embedding, rotary frequencies that old checkpoints carry, what transformers' class ignores.
    """
    config, patterns = causal_lm.config, disk_names(causal_lm).ignored
    ahead = getattr(config, "num_mtp_layers", getattr(config, "num_nextn_predict_layers", 0)) or 0
    extra_layers = range(config.num_hidden_layers, config.num_hidden_layers + ahead)
    prefixes = tuple(f"model.layers.{layer}." for layer in extra_layers)
    ignored, extra = [], []
    for name in sources.keys() - expected.keys():
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        unused = name.startswith(prefixes) or name.endswith("rotary_emb.inv_freq")
        unused = unused or any(pattern.search(name) for pattern in patterns)
        (ignored if tied or unused else extra).append(name)
    missing = expected.keys() - sources.keys()
    wrong = [
        f"{n} is {sources[n].shape}, not {s}" for n, s in expected.items() if n in sources and sources[n].shape != s
    ]
    faults = []
    for what, names in (("lacks", missing), ("has, and the model does not", extra), ("has in another shape", wrong)):
        if names:
            faults.append(
                f"{what}: {', '.join(sorted(names)[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            )
    if faults:
        raise ValueError(f"{directory} is no checkpoint of this model. It " + "; it ".join(faults))
    return sorted(ignored)


CHUNK_BYTES = 32 << 20  # of one read: large enough for a disk, small enough that eight threads need little memory


def read_piece(piece, source, progress):
    """Read a piece into its target: from FP8 into FP8 as it is, from FP8 into another dtype widened, from another dtype
    into FP8 quantised."""
    if piece.target.dtype == source.dtype or FP8 not in (piece.target.dtype, source.dtype):
        read_values(piece.name, source, piece.begin, piece.target, progress)
        if piece.scale is not None:
            piece.scale.copy_(read_tensor(source.scale))
        return
    scale = read_tensor(source.scale).to(piece.target.device) if source.dtype == FP8 else None
    columns, device = source.shape[-1], piece.target.device
    step = max(CHUNK_BYTES // (columns * source.dtype.itemsize) // BLOCK, 1) * BLOCK  # rows at a time, whole blocks
    for at in range(0, len(piece.target), step):
        target = piece.target[at : at + step]
        stored = torch.empty(target.shape, dtype=source.dtype, device=device)
        read_values(piece.name, source, piece.begin + at * columns, stored, progress)
        if scale is not None:
            target.copy_(widen(stored, scale, piece.begin // columns + at))
            continue
        values, scales = quantise(stored)
        target.copy_(values)
        piece.scale[at // BLOCK :][: len(scales)].copy_(scales)


def read_values(name, source, begin, out, progress):
    """Read a tensor's values from `begin` on into `out` with plain positioned reads: no page is mapped, so host memory
    stays at one chunk a thread."""
    begin = source.start + begin * source.dtype.itemsize
    target = out.flatten()  # a view: rows of a contiguous tensor
    assert target.data_ptr() == out.data_ptr(), f"{name}: the target's rows are not contiguous"
    direct = target.device.type == "cpu" and target.dtype == source.dtype
    step = CHUNK_BYTES // source.dtype.itemsize
    staging = None if direct else torch.empty(min(step, target.numel()), dtype=source.dtype, pin_memory=target.is_cuda)
    fd = os.open(source.path, os.O_RDONLY)
    try:
        for at in range(0, target.numel(), step):
            part = target[at : at + step]
            buffer = part if direct else staging[: part.numel()]
            view = memoryview(buffer.view(torch.uint8).numpy())
            read = 0
            while read < len(view):
                count = os.preadv(fd, [view[read:]], begin + at * source.dtype.itemsize + read)
                if count == 0:
                    raise ValueError(f"{source.path}: ends inside {name}")
                read += count
            if not direct:
                part.copy_(buffer)
            progress(read)
    finally:
        os.close(fd)


@torch.no_grad()
def load_weights(causal_lm, directory, device, ring=None):
    """Give a (sharded) meta-device model its storage on `device` and its base weights from `directory`; returns (bytes,
    seconds).

    Each rank reads the rows of its own shards straight to its device, so no host ever holds the model. What every rank
    holds whole (embedding, head, norms; without a ring everything) is read by every rank, from the page cache after the
    first. Adapter parameters are left for `reset_adapter`.
    Raises ValueError, before anything is read, naming tensors that are missing, unexpected or of another shape.
    """
    sources, names = read_sources(directory), disk_names(causal_lm)
    names.use(sources)
    _, expected = plan_reading(frozen_tensors(causal_lm), names)
    ignored = check_complete(expected, sources, causal_lm, directory)
    if ignored:
        say(f"loading: ignored {len(ignored)} tensors that this model does not use, such as {ignored[0]}")
    allocate(causal_lm, ring, device)
    causal_lm.tie_weights()
    compute_buffers(causal_lm)
    pieces, _ = plan_reading(frozen_tensors(causal_lm), names, ring)
    total = sum(piece.target.numel() * sources[piece.name].dtype.itemsize for piece in pieces)
    started = time.perf_counter()
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not is_main(), mininterval=1.0) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for reading in [pool.submit(read_piece, piece, sources[piece.name], bar.update) for piece in pieces]:
            reading.result()
    seconds = time.perf_counter() - started
    totals = torch.tensor([float(total)])
    dist.all_reduce(totals)
    say(
        f"loading: {totals.item() / 1e9:.2f} GB in {seconds:.1f} s, {totals.item() / 1e9 / seconds:.2f} GB/s over all"
        " ranks"
    )
    return total, seconds


def compute_buffers(causal_lm):
    """Give buffers that no checkpoint holds (rotary frequencies) their values, by transformers' own initialisation."""
    for path, module in causal_lm.named_modules():
        names = [name for name in module._non_persistent_buffers_set if getattr(module, name) is not None]
        for name in names:
            getattr(module, name).fill_(float("nan"))
        if names:
            causal_lm._init_weights(module)
        for name in names:
            if getattr(module, name).isnan().any():
                raise ValueError(
                    f"{path}.{name} is a buffer that neither the checkpoint nor {type(causal_lm).__name__} gives a"
                    " value"
                )


@torch.no_grad()
def reset_adapter(causal_lm, seed, ring=None):
    """Start values of the adapter (`start_lora`), the same for any number of ranks."""
    torch.manual_seed(seed)
    for path, module in causal_lm.named_modules():
        if ring is not None and (layer := LAYER.search(path)):
            ring.use(int(layer[1]))
        if isinstance(module, FusedMoELoRA):
            module.reset_lora_parameters()
        elif isinstance(module, LoraLinear):
            A, B, magnitude, norms = module.lora_A["default"].weight, module.lora_B["default"].weight, None, None
            if module.use_dora["default"]:
                magnitude = module.lora_magnitude_vector["default"].weight
                norms = squared_row_norms(module.base_layer.weight.unsqueeze(0))[0].sqrt()
            start_lora(path, A, B, magnitude, norms)
    if ring is not None:
        ring.forget()
