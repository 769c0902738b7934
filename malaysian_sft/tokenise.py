"""Conversations as tokens and labels, in parallel, into a cache that every process memory-maps."""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from malaysian_sft.chat_format import ChatFormat
from malaysian_sft.conversations import BadRow, DataArguments, Source, parse_json, to_conversation

# Part of the cache's key. Raise it with any change in this file, conversations.py or chat_format.py after which some
# row becomes other tokens or labels; tests/test_multipack.py holds it to a golden sample.
TOKENISATION_VERSION = 3


@dataclass
class Tokenised:
    """What one chunk of rows became. Documents in row order; `bad` holds (source index, row number, reason)."""

    tokens: np.ndarray  # uint32 (sum of lengths,)
    supervised: np.ndarray  # bool (sum of lengths,)
    lengths: list[int]
    rows: list[tuple[int, int]]  # (source index, row number) of each document
    bad: list[tuple[int, int, str]]


def tokenise(
    chat: ChatFormat, chunk: list[tuple[int, str | None, int, object]], loss_on: str, ignored: frozenset = frozenset()
) -> Tokenised:
    """Tokenise rows given as (source index, config, row number, bytes of JSON | dict | BadRow)."""
    documents, rows, bad = [], [], []
    for source, config, number, raw in chunk:
        try:
            if isinstance(raw, BadRow):
                raise raw
            row = _parse(raw) if isinstance(raw, bytes) else raw
            found = chat.documents(to_conversation(row, config, ignored))
        except BadRow as error:
            bad.append((source, number, str(error)))
            continue
        documents += found
        rows += [(source, number)] * len(found)
    # Piece by piece, so that a prompt's tokens are those the model is given at inference, and no token straddles prompt
    # and answer.
    ids = iter(chat.encode([text for pieces in documents for text, _ in pieces]) if documents else [])
    tokens, supervised, lengths = [], [], []
    for pieces in documents:
        start = len(tokens)
        for _, is_answer in pieces:
            piece = next(ids)
            tokens += piece
            supervised += [is_answer or loss_on == "all"] * len(piece)
        supervised[start] = False  # a document's first token has nothing to be predicted from
        lengths.append(len(tokens) - start)
    return Tokenised(np.array(tokens, dtype=np.uint32), np.array(supervised, dtype=bool), lengths, rows, bad)


def _parse(line: bytes) -> object:
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not valid UTF-8 (byte {error.start}: {error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not valid JSON ({error})") from None


_worker: dict = {}  # the tokenizer and loss_on, in a worker process; empty in the parent


def _start_worker(chat: ChatFormat, loss_on: str, ignored: frozenset) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough threads
    _worker.update(chat=chat, loss_on=loss_on, ignored=ignored)


def _work(chunk) -> Tokenised:
    return tokenise(_worker["chat"], chunk, _worker["loss_on"], _worker["ignored"])


def _chunks(sources: list[Source], size: int) -> Iterator[list[tuple[int, str | None, int, object]]]:
    chunk = []
    for index, source in enumerate(sources):
        for number, raw in source.rows():
            chunk.append((index, source.config, number, raw))
            if len(chunk) == size:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _tokenise_all(
    chat: ChatFormat, sources: list[Source], loss_on: str, ignored: frozenset, workers: int
) -> Iterator[Tokenised]:
    """Tokenise every source in order, on `workers` processes, holding only a few chunks at a time."""
    if workers == 1:
        for chunk in _chunks(sources, 256):
            yield tokenise(chat, chunk, loss_on, ignored)
        return
    waiting = deque()
    # fork hands the tokenizer over without pickling; the children run no kernels and no threads
    fork = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(workers, fork, _start_worker, (chat, loss_on, ignored)) as pool:
            for chunk in _chunks(sources, 256):
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) >= 4 * workers:  # never the whole dataset in flight
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            "a tokenising process died, probably for lack of memory; pass a smaller --preprocessing_num_workers"
        ) from None


def data_fingerprint(data_args: DataArguments, sources: list[Source], chat: ChatFormat) -> str:
    """Hash of all that changes a token, a label or which rows are kept; max_seq_length and the seed act later."""
    import tokenizers
    import transformers

    tokenizer = chat.tokenizer
    parts = {
        "tokenisation": TOKENISATION_VERSION,
        "versions": [transformers.__version__, tokenizers.__version__],
        "sources": [[source.name, source.config, source.digest] for source in sources],
        "revision": data_args.dataset_revision,
        "tokenizer": hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=20).hexdigest(),
        "special_tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "rendered": chat.probe,  # a template that writes today's date makes another dataset tomorrow
        "loss_on": data_args.loss_on,
        "bad_rows": data_args.bad_rows,
        "ignore_columns": sorted(data_args.ignored()),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=10).hexdigest()


ARRAYS = (".bin", ".npy")  # a cache's files of which one wrong bit would be trained on


def file_checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_meta(directory: Path) -> dict | None:
    """A cache's meta.json; None where there is none, or none that `write_cache` wrote for this directory."""
    try:
        meta = json.loads((directory / "meta.json").read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    sound = isinstance(meta, dict) and meta.get("checksum") == _meta_checksum(directory.name, meta)
    return meta if sound else None


def _meta_checksum(key: str, meta: dict) -> str:
    """Of what meta.json says, and of whose cache it says it."""
    said = {name: value for name, value in meta.items() if name != "checksum"}
    return hashlib.sha256(json.dumps([key, said], sort_keys=True).encode()).hexdigest()


def check_cache(directory: Path, meta: dict) -> None:
    """Raise ValueError for a cache whose files are not those that were written. One process of a machine reads them."""
    if int(os.environ.get("LOCAL_RANK", 0)):
        return
    for name, checksum in meta.get("files", {}).items():
        path = directory / name
        if not path.is_file() or file_checksum(path) != checksum:
            raise ValueError(f"{path}: damaged or not there; delete {directory} and prepare again")


def _workers(data_args: DataArguments, rows: int) -> int:
    """Tokenising processes: as asked for, else the cores this process may use; one where more are not worth it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if rows < 1024 else data_args.preprocessing_num_workers or min(cores, 64)


def write_cache(
    directory: Path, data_args: DataArguments, sources: list[Source], chat: ChatFormat, progress: bool
) -> None:
    """Tokenise into `directory`: written under a temporary name and renamed, so that a reader sees all of it or
    nothing."""
    from tqdm import tqdm

    total = sum(source.count for source in sources)
    workers = _workers(data_args, total)
    temporary = Path(tempfile.mkdtemp(prefix=f"{directory.name}.tmp-", dir=directory.parent))
    try:
        lengths: list[int] = []
        rows: list[tuple[int, int]] = []
        bad: list[tuple[int, int, str]] = []
        seen, content = 0, hashlib.blake2b(digest_size=20)
        with (
            open(temporary / "tokens.bin", "wb") as tokens,
            open(temporary / "supervised.bin", "wb") as supervised,
            tqdm(total=total, desc="tokenising", unit=" rows", disable=not progress, mininterval=1.0) as bar,
        ):
            for part in _tokenise_all(chat, sources, data_args.loss_on, data_args.ignored(), workers):
                part.tokens.tofile(tokens)
                part.supervised.tofile(supervised)
                content.update(part.tokens.tobytes() + part.supervised.tobytes())
                lengths += part.lengths
                rows += part.rows
                bad += part.bad
                done = len(set(part.rows)) + len(part.bad)
                seen += done
                bar.update(done)
        _report_bad_rows(bad, seen, sources, data_args.bad_rows, temporary)
        if not lengths:
            raise ValueError(f"--dataset {data_args.dataset}: no document in {seen} rows")
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        np.save(temporary / "offsets.npy", offsets)
        # a row's number within its source, and the source: together they say which row a document comes from
        np.save(temporary / "rows.npy", np.array([row for _, row in rows], dtype=np.int64))
        np.save(temporary / "sources.npy", np.array([source for source, _ in rows], dtype=np.uint32))
        skipped = defaultdict(int)
        for source, _, _ in bad:
            skipped[source] += 1
        meta = {
            "sources": [source.name for source in sources],
            "labels": [source.label for source in sources],
            "commits": {source.name: source.commit for source in sources if source.commit},
            "skipped": [skipped[i] for i in range(len(sources))],
            "rows": seen,
            "loss_on": data_args.loss_on,
            "content": content.hexdigest(),
            "files": {path.name: file_checksum(path) for path in sorted(temporary.iterdir()) if path.suffix in ARRAYS},
        }
        meta["checksum"] = _meta_checksum(directory.name, meta)
        with open(temporary / "meta.json", "w") as file:
            file.write(json.dumps(meta, indent=1))
            file.flush()
            os.fsync(file.fileno())
        if directory.exists() and read_meta(directory) is None:
            print(f"{directory}: no cache, its meta.json is damaged or not there; made again", file=sys.stderr)
            shutil.rmtree(directory)
        try:
            temporary.rename(directory)
        except OSError:  # another machine's process on a shared disk was first; its cache has the same content
            if read_meta(directory) is None:
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _report_bad_rows(
    bad: list[tuple[int, int, str]], seen: int, sources: list[Source], mode: str, directory: Path
) -> None:
    """Name bad rows on stderr; raise ValueError when they are to be refused."""
    if not bad:
        return
    lines = [f"{sources[source].name}, row {number}: {reason}" for source, number, reason in bad]
    listed = "\n  ".join(lines[:10]) + (f"\n  and {len(lines) - 10} more" if len(lines) > 10 else "")
    if mode == "refuse":
        raise ValueError(f"{len(bad)} bad rows of {seen} (repair them, or pass --bad_rows skip):\n  {listed}")
    print(f"skipped {len(bad)} bad rows of {seen}:\n  {listed}", file=sys.stderr)
    with open(directory / "bad_rows.jsonl", "w") as file:
        for source, number, reason in bad:
            file.write(json.dumps({"source": sources[source].name, "row": number, "reason": reason}) + "\n")
