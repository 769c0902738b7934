"""The data path: conversations -> tokens and labels -> packs of whole documents -> batches, and the attention that
keeps them apart.

    python3 multipack.py --dataset data/conversations --model MODEL [--max_seq_length 16384] [--show 3]

prepares a dataset for a model and prints what is in it; `--show N` prints N documents with the supervised part marked.
Trainers call `prepare`, wrap the result in a DataLoader with `collate`, and load the model with
`attn_implementation=register_attention()`.

Output: `<data_cache>/<key>/` with flat arrays that every process memory-maps (tokens.bin uint32 and supervised.bin
bool, one entry a token; offsets.npy, rows.npy and sources.npy: where each document lies and which row of which file it
is), report.json, and bad_rows.jsonl when rows were skipped. The key is a hash of everything that changes a token or a
label, so a stale cache cannot be used.
"""

import functools
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from malaysian_sft.base_model import load_tokenizer
from malaysian_sft.chat_format import ChatFormat
from malaysian_sft.conversations import DataArguments, find_sources
from malaysian_sft.flags import check_values, parse_flags
from malaysian_sft.locks import hold
from malaysian_sft.safetensors_files import writing
from malaysian_sft.tables import text_table
from malaysian_sft.tokenise import check_cache, data_fingerprint, read_meta, write_cache

IGNORE = -100  # the label that the loss skips


def _best_fit(lengths, capacity):
    """Best fit of `lengths` (int64, in placing order) into bins of `capacity`. Returns (bin of each item, number of
    bins).

    Bins with the same room left form a linked list; a binary tree over the amounts of room says which lists are not
    empty, so the tightest bin that an item fits is found in log2(capacity) steps.
    """
    leaves = 1
    while leaves < capacity + 1:
        leaves *= 2
    occupied = np.zeros(2 * leaves, dtype=np.uint8)  # node i has children 2i and 2i + 1; leaf of room r is leaves + r
    head = np.full(capacity + 1, -1, dtype=np.int64)  # first bin with this room
    following = np.full(len(lengths), -1, dtype=np.int64)  # next bin with the same room
    assigned = np.empty(len(lengths), dtype=np.int64)
    bins = 0
    for item in range(len(lengths)):
        length = lengths[item]
        node = leaves + length
        if not occupied[node]:
            # up until a right sibling is occupied, then down its left-most occupied path
            while node > 1 and (node % 2 == 1 or not occupied[node + 1]):
                node //= 2
            if node > 1:
                node += 1
                while node < leaves:
                    node = 2 * node if occupied[2 * node] else 2 * node + 1
        if node > 1:
            room = node - leaves
            chosen = head[room]
            head[room] = following[chosen]
            if head[room] == -1:
                occupied[node] = 0
                node //= 2
                while node >= 1 and not occupied[2 * node] and not occupied[2 * node + 1]:
                    occupied[node] = 0
                    node //= 2
        else:
            room, chosen = capacity, bins
            bins += 1
        assigned[item] = chosen
        room -= length
        if room > 0:
            following[chosen] = head[room]
            head[room] = chosen
            node = leaves + room
            while node >= 1 and not occupied[node]:
                occupied[node] = 1
                node //= 2
    return assigned, bins


@functools.cache
def _compiled_best_fit() -> Callable:
    """`_best_fit` compiled by numba, or as it is where numba is not installed (about 50 times slower, the same
    packs)."""
    if importlib.util.find_spec("numba") is None:
        return _best_fit
    import numba

    return numba.njit(cache=True)(_best_fit)


def pack(lengths, max_seq_length: int, seed: int = 0) -> list[list[int]]:
    """Pack documents of the given lengths into as few packs of at most `max_seq_length` tokens as best-fit decreasing
    finds.

    Returns lists of document indices, each document in exactly one. Documents are shuffled with the seed, then placed
    from long to short, so the seed decides between documents of equal length, the order inside a pack and the order of
    the packs; the number of packs is the same for every seed, because it depends on the lengths alone. O(n log
    max_seq_length). Raises ValueError for a length below 1 or above `max_seq_length`.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        return []
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"lengths: expected a flat list of integers, got {lengths.dtype} of shape {lengths.shape}")
    for wrong, why in ((lengths < 1, "below 1"), (lengths > max_seq_length, f"above max_seq_length {max_seq_length}")):
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(f"document {index} has length {lengths[index]}, {why}; drop such documents before packing")
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled].astype(np.int64), kind="stable")]
    total = int(lengths.sum(dtype=np.int64))
    if total <= max_seq_length:  # best fit's memory is the capacity, and this one may be any number
        assigned, bins = np.zeros(len(lengths), dtype=np.int64), 1
    else:
        assigned, bins = _compiled_best_fit()(lengths[order].astype(np.int64), int(max_seq_length))
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack_of[order] = generator.permutation(bins)[assigned]  # packs in random order
    members = shuffled[np.argsort(pack_of[shuffled], kind="stable")]  # documents of a pack in random order
    ends = np.cumsum(np.bincount(pack_of, minlength=bins)).tolist()
    members = members.tolist()
    return [members[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


class PackedDataset(torch.utils.data.Dataset):
    """Packs of tokenised documents, read from memory-mapped arrays.

    `ds[i]` is a list of documents, each `{"input_ids": int64 (n,), "labels": int64 (n,)}`. `lengths` holds the
    documents' token counts, `packs` the documents of each pack, `report` the figures that the command prints,
    `fingerprint` a hash of the data and its packing, and `validation` the PackedDataset of held-out documents or None.
    """

    def __init__(self, tokens, supervised, starts, lengths, max_seq_length, seed, content):
        """`tokens` uint32 and `supervised` bool hold documents end to end, and `content` is their hash; `starts` and
        `lengths`, int64 (documents,), find this part's."""
        self._tokens, self._supervised, self._starts = tokens, supervised, starts
        self.lengths, self.max_seq_length, self.seed = lengths, max_seq_length, seed
        self.report: dict = {}
        self.validation: PackedDataset | None = None
        self.set_epoch(0)
        # of what is trained on, not of the code that made it: a run may be resumed by a later version that makes the
        # same of the data
        digest = hashlib.blake2b(content.encode(), digest_size=10)
        for array in (starts, lengths, *map(np.array, self.packs)):
            digest.update(array.astype(np.int64).tobytes())
        self.fingerprint = digest.hexdigest()

    def set_epoch(self, epoch: int) -> None:
        """Pack anew with (seed, epoch): other documents together, in another order, and always the same number of
        packs.

        A DataLoader with persistent workers keeps the packs it was started with: make a new one each epoch.
        """
        self.epoch = epoch
        self.packs = pack(self.lengths, self.max_seq_length, seed=[self.seed, epoch])

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, torch.Tensor]]:
        return [self.document(i) for i in self.packs[index]]

    def document(self, index: int) -> dict[str, torch.Tensor]:
        """One document, by its index in `lengths`."""
        part = slice(self._starts[index], self._starts[index] + self.lengths[index])
        input_ids = torch.from_numpy(self._tokens[part].astype(np.int64))
        supervised = torch.from_numpy(np.array(self._supervised[part]))
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(~supervised, IGNORE)}


def collate(packs: list[list[dict[str, torch.Tensor]]]) -> dict:
    """Join packs into one row of T tokens, documents kept apart by their positions and boundaries.

    Returns input_ids, labels, position_ids, each int64 (1, T), positions restarting at 0 in every document;
    cu_seq_lens_q and cu_seq_lens_k, int32 (documents + 1,), where documents begin and end; max_length_q and
    max_length_k, ints, the longest document. The names are those of transformers' FlashAttentionKwargs, so
    `model(**batch)` hands them to attention.
    """
    documents = [document for documents in packs for document in documents]
    lengths = torch.tensor([len(document["input_ids"]) for document in documents])
    boundaries = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (documents + 1,)
    longest = int(lengths.max())
    return {
        "input_ids": torch.cat([document["input_ids"] for document in documents])[None],  # (1, T)
        "labels": torch.cat([document["labels"] for document in documents])[None],  # (1, T)
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],  # (1, T)
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def prepare(
    data_args: DataArguments, tokenizer, model_name: str, seed: int = 42, progress: bool | None = None
) -> PackedDataset:
    """Tokenise (or find in the cache), split off validation rows, drop what is too long, pack. Returns the training
    PackedDataset.

    Safe to call from many processes at once: the first tokenises, the others wait and memory-map its arrays. `progress`
    None shows a bar on a terminal only. Raises ValueError, with the file and row, for data that cannot be used.
    """
    data_args.check()
    sources = find_sources(data_args)
    chat = ChatFormat(tokenizer)
    key = data_fingerprint(data_args, sources, chat)
    root = Path(data_args.data_cache)
    directory = root / key
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        if read_meta(directory) is None:
            with hold(root / f"{key}.lock"):
                if read_meta(directory) is None:
                    shown = sys.stderr.isatty() if progress is None else progress
                    write_cache(directory, data_args, sources, chat, shown)
        return _load(directory, data_args, model_name, seed)


def _load(directory: Path, data_args: DataArguments, model_name: str, seed: int) -> PackedDataset:
    meta = read_meta(directory)
    if meta is None:
        raise ValueError(f"{directory / 'meta.json'}: changed while it was read; prepare again")
    check_cache(directory, meta)
    offsets = np.load(directory / "offsets.npy")
    rows, sources = np.load(directory / "rows.npy"), np.load(directory / "sources.npy")
    tokens = np.memmap(directory / "tokens.bin", dtype=np.uint32, mode="r")
    supervised = np.memmap(directory / "supervised.bin", dtype=bool, mode="r")
    lengths = np.diff(offsets)
    if len(tokens) != offsets[-1] or len(supervised) != offsets[-1]:
        raise ValueError(
            f"{directory}: the cache is damaged ({len(tokens)} tokens, {offsets[-1]} expected); delete it and prepare"
            " again"
        )

    fits = lengths <= data_args.max_seq_length
    held_out = _held_out(rows, sources, data_args.validation_share, seed)
    parts = []
    for part in (fits & ~held_out, fits & held_out):
        chosen = np.flatnonzero(part)
        parts.append(
            PackedDataset(
                tokens, supervised, offsets[chosen], lengths[chosen], data_args.max_seq_length, seed, meta["content"]
            )
        )
    train, validation = parts
    if not len(train):
        raise ValueError(
            f"no document of {len(lengths)} is left to train on with --max_seq_length {data_args.max_seq_length}"
        )
    if data_args.validation_share and not len(validation):
        raise ValueError(f"--validation_share {data_args.validation_share} holds out none of {meta['rows']} rows")
    train.validation = validation if len(validation) else None
    train.report = _report(meta, rows, sources, lengths, supervised, offsets, fits, train, data_args, model_name)
    _write_report(directory / "report.json", train.report)
    return train


def _held_out(rows: np.ndarray, sources: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which documents are for validation: all documents of a random share of the rows, so that no row is in both
    parts."""
    _, row_of = np.unique(np.stack([sources.astype(np.int64), rows]), axis=1, return_inverse=True)
    count = int(row_of.max()) + 1
    held = np.zeros(count, dtype=bool)
    held[np.random.default_rng([seed, 1]).permutation(count)[: round(share * count)]] = True
    return held[row_of]


def _report(meta, rows, sources, lengths, supervised, offsets, fits, train, data_args, model_name) -> dict:
    """The figures that the command prints; asserts that every row is accounted for."""
    supervised_tokens = np.add.reduceat(supervised, offsets[:-1], dtype=np.int64)
    skipped = sum(meta["skipped"])
    # documents beyond one a row: conversations whose turns are trained one by one
    row_ids, documents_of = np.unique(np.stack([sources.astype(np.int64), rows]), axis=1, return_counts=True)
    split = int((documents_of - 1).sum())
    held = 0 if train.validation is None else len(train.validation.lengths)
    documents, too_long = int(fits.sum()), int((~fits).sum())
    assert documents == len(train.lengths) + held, "a document was lost between the cache and the packs"
    assert documents + too_long - split + skipped == meta["rows"], "documents + skipped + too long must be the rows"
    configs = {}
    for label in dict.fromkeys(meta["labels"]):
        indices = [i for i, other in enumerate(meta["labels"]) if other == label]
        mine = np.isin(sources, indices)
        bad = sum(meta["skipped"][i] for i in indices)
        configs[label] = {
            "rows": int(np.isin(row_ids[0], indices).sum()) + bad,
            "skipped": bad,
            "documents": int((mine & fits).sum()),
            "too_long": int((mine & ~fits).sum()),
            "tokens": int(lengths[mine & fits].sum()),
            "supervised_tokens": int(supervised_tokens[mine & fits].sum()),
        }
    kept = lengths[fits]
    edges = [1, *[2**i for i in range(6, 24) if 2**i < data_args.max_seq_length], data_args.max_seq_length + 1]
    return {
        "dataset": data_args.dataset,
        "model": model_name,
        "commits": meta.get("commits", {}),
        "fingerprint": train.fingerprint,
        "loss_on": data_args.loss_on,
        "max_seq_length": data_args.max_seq_length,
        "rows": meta["rows"],
        "skipped": skipped,
        "extra_documents": split,
        "documents": documents,
        "too_long": too_long,
        "longest": int(lengths.max()),
        "tokens": int(kept.sum()),
        "supervised_tokens": int(supervised_tokens[fits].sum()),
        "supervised_share": float(supervised_tokens[fits].sum() / kept.sum()),
        "validation_documents": held,
        "validation_packs": 0 if train.validation is None else len(train.validation),
        "train_documents": len(train.lengths),
        "train_tokens": int(train.lengths.sum()),
        "packs": len(train),
        "fill": float(train.lengths.sum() / (len(train) * data_args.max_seq_length)),
        "configs": configs,
        "histogram": [
            [a, b - 1, int(n)] for a, b, n in zip(edges, edges[1:], np.histogram(kept, edges)[0], strict=False)
        ],
    }


def _write_report(path: Path, report: dict) -> None:
    text = json.dumps(report, indent=1) + "\n"
    if path.exists() and path.read_text() == text:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


@dataclass
class CommandArguments:
    model: str = field(metadata={"help": "Model whose tokenizer and chat template are used: hub id or directory."})
    show: int = field(default=0, metadata={"help": "Print this many documents with the supervised part marked."})
    seed: int = field(default=42, metadata={"help": "Seed of packing and of the validation split."})


def format_report(report: dict) -> str:
    """The report as aligned text."""
    lines = [f"{report['dataset']} for {report['model']}", ""]
    configs = report["configs"]
    counts = ("rows", "skipped", "too_long", "documents", "tokens")
    total = {key: sum(config[key] for config in configs.values()) for key in (*counts, "supervised_tokens")}
    frame = pd.DataFrame.from_dict({**configs, "all": total}, orient="index")
    share = (frame["supervised_tokens"] / frame["tokens"].where(frame["tokens"] > 0)).fillna(0)
    frame = frame[list(counts)].map("{:,}".format).assign(supervised=share.map("{:.1%}".format))
    lines.append(text_table(frame.rename(columns={"too_long": "too long"}).rename_axis(columns="config")))
    lines += ["", "document length (tokens)"]
    most = max(count for _, _, count in report["histogram"]) or 1
    lines += [
        f"{low:>8,} - {high:>8,}  {count:>9,}  {'#' * round(40 * count / most)}"
        for low, high, count in report["histogram"]
    ]
    lines += [
        "",
        (
            f"{report['packs']:,} packs of {report['max_seq_length']:,} tokens from {report['train_documents']:,}"
            f" documents and {report['train_tokens']:,} tokens, {report['fill']:.2%} full"
        ),
    ]
    if report["validation_documents"]:
        lines.append(
            f"{report['validation_documents']:,} documents held out for validation, in {report['validation_packs']:,}"
            " packs"
        )
    if report["extra_documents"]:
        lines.append(
            f"{report['extra_documents']:,} documents more than rows: turns whose reasoning the template hides later"
            " are trained one by one"
        )
    return "\n".join(lines)


def format_document(document: dict[str, torch.Tensor], tokenizer, color: bool) -> str:
    """A document's text with its supervised parts in green, or between [[ and ]] where there is no colour."""
    begin, end = ("\033[32m", "\033[0m") if color else ("[[", "]]")
    supervised = document["labels"] != IGNORE
    cuts = [0, *(torch.nonzero(supervised[1:] != supervised[:-1])[:, 0] + 1).tolist(), len(supervised)]
    parts = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        text = tokenizer.decode(
            document["input_ids"][start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        parts.append(f"{begin}{text}{end}" if supervised[start] else text)
    return "".join(parts)


def main() -> None:
    try:
        data_args, args = parse_flags((DataArguments, CommandArguments))
        check_values(args)
        tokenizer = load_tokenizer(args.model)
        dataset = prepare(data_args, tokenizer, args.model, seed=args.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(format_report(dataset.report))
    for index in np.linspace(0, len(dataset.lengths) - 1, min(args.show, len(dataset.lengths)), dtype=int):
        print(f"\n----- document {index + 1} of {len(dataset.lengths):,}, {dataset.lengths[index]:,} tokens")
        print(format_document(dataset.document(index), tokenizer, color=sys.stdout.isatty()))


if __name__ == "__main__":
    main()
