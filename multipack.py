"""The data path: conversations -> tokens and labels -> packs of whole documents -> batches, and the attention that keeps them apart.

    python3 multipack.py --dataset data/conversations --model MODEL [--max_seq_length 16384] [--show 3]

prepares a dataset for a model and prints what is in it; `--show N` prints N documents with the supervised part marked. Trainers call
`prepare`, wrap the result in a DataLoader with `collate`, and load the model with `attn_implementation=register_attention()`.

Output: `<data_cache>/<key>/` with flat arrays that every process memory-maps (tokens.bin uint32 and supervised.bin bool, one entry a
token; offsets.npy, rows.npy and sources.npy: where each document lies and which row of which file it is), report.json, and bad_rows.jsonl
when rows were skipped. The key is a hash of everything that changes a token or a label, so a stale cache cannot be used.
"""

import functools
import hashlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

IGNORE = -100  # the label that the loss skips

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class DataArguments:
    dataset: str = field(
        default="Scicom-intl/Malaysian-Instructions",
        metadata={"help": "Hub dataset id, or local .jsonl/.json/.parquet files or directories; comma-separated."},
    )
    dataset_config: str = field(
        default="all", metadata={"help": "Configs of the dataset (hub) or file names without suffix (local), or all."}
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Hub revision (commit, tag or branch) of the dataset."})
    max_seq_length: int = field(default=16384, metadata={"help": "Tokens in a full pack. Longer documents are dropped and counted."})
    loss_on: str = field(
        default="assistant", metadata={"help": "Train on assistant turns only, or on all tokens.", "choices": ["assistant", "all"]}
    )
    bad_rows: str = field(
        default="refuse", metadata={"help": "Refuse a dataset with bad rows, or skip and count them.", "choices": ["refuse", "skip"]}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Tokenising processes. Default: the cores this process may use."}
    )
    data_cache: str = field(default="outputs/data", metadata={"help": "Directory of the tokenised data."})
    validation_share: float = field(default=0.0, metadata={"help": "Share of the rows held out for validation, 0 <= share < 1."})

    def check(self) -> None:
        """Raise ValueError for a value that cannot work, naming the flag."""
        for name, allowed in (("loss_on", ("assistant", "all")), ("bad_rows", ("refuse", "skip"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.max_seq_length < 2:
            raise ValueError(f"--max_seq_length {self.max_seq_length}: expected at least 2")
        if not 0.0 <= self.validation_share < 1.0:
            raise ValueError(f"--validation_share {self.validation_share}: expected a share of at least 0 and below 1")
        if self.preprocessing_num_workers is not None and self.preprocessing_num_workers < 1:
            raise ValueError(f"--preprocessing_num_workers {self.preprocessing_num_workers}: expected at least 1")


# ---------------------------------------------------------------------------------------------------------------------
# Rows -> conversations
# ---------------------------------------------------------------------------------------------------------------------


class BadRow(ValueError):
    """A row that cannot be trained on; the message says what is wrong with it."""


# config of Scicom-intl/Malaysian-Instructions -> its fields for the user's turn and the answer; system and reasoning are named so in all
SCHEMAS = {
    "ayat_aktif_pasif": ("input", "output"),
    "coding": ("question", "answer"),
    "malaysian_reasoning": ("input", "answer"),
    "meta_prompt": ("input", "answer"),
    "multiple_choice_qa": ("question", "answer"),
}


def _text(row: dict, key: str, optional: bool = False) -> str:
    """A row's text field, "" for an optional one that is absent, null or blank. Raises BadRow for anything else that is not text."""
    value = row.get(key)
    if optional and (value is None or value == ""):
        return ""
    if key not in row:
        raise BadRow(f"missing field {key!r}")
    if not isinstance(value, str):
        raise BadRow(f"field {key!r} is {type(value).__name__}, expected a string")
    if not value.strip():
        if optional:
            return ""
        raise BadRow(f"field {key!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"field {key!r} is not valid Unicode ({error.reason})") from None
    return value


def to_conversation(row: dict, config: str | None = None) -> list[dict]:
    """Map one dataset row to messages: dicts with role, content and, where there is any, reasoning_content.

    `config` names the schema (a key of SCHEMAS); None, or a row that has `messages`, detects it by the row's fields. A non-empty system or
    reasoning field is always used. Raises BadRow with the field and the reason: nothing is guessed.
    """
    if not isinstance(row, dict):
        raise BadRow(f"row is {type(row).__name__}, expected an object")
    if "messages" in row:
        return _check_messages(row["messages"])
    if config in SCHEMAS:
        user, answer = SCHEMAS[config]
    else:
        fitting = sorted({fields for fields in SCHEMAS.values() if all(name in row for name in fields)})
        if len(fitting) != 1:
            which = "more than one schema" if fitting else "no schema"
            known = "messages, " + ", ".join(sorted({"+".join(fields) for fields in SCHEMAS.values()}))
            raise BadRow(f"fields {sorted(map(str, row))} fit {which} ({known})")
        user, answer = fitting[0]
    messages = []
    system = _text(row, "system", optional=True)
    if system:
        messages.append({"role": "system", "content": system})
    messages.append({"role": "user", "content": _text(row, user)})
    messages.append({"role": "assistant", "content": _text(row, answer)})
    reasoning = _text(row, "reasoning", optional=config != "malaysian_reasoning")
    if reasoning:
        messages[-1]["reasoning_content"] = reasoning
    return messages


def _check_messages(messages) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise BadRow("field 'messages' is not a non-empty list")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRow(f"messages[{i}] is {type(message).__name__}, expected an object")
        # columnar files fill absent keys with null
        unknown = {key for key, value in message.items() if value not in (None, [], "")} - {"role", "content", "reasoning_content"}
        if unknown:
            raise BadRow(f"messages[{i}] has {sorted(unknown)}; only role, content and reasoning_content are trained on")
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise BadRow(f"messages[{i}] has role {role!r}, expected system, user or assistant")
        if role == "assistant" and (not checked or checked[-1]["role"] != "user"):
            raise BadRow(f"messages[{i}] is an assistant turn that follows no user turn")
        try:
            checked.append({"role": role, "content": _text(message, "content")})
            reasoning = _text(message, "reasoning_content", optional=True)
        except BadRow as error:
            raise BadRow(f"messages[{i}]: {error}") from None
        if reasoning:
            if role != "assistant":
                raise BadRow(f"messages[{i}] has reasoning_content in a {role} turn")
            checked[-1]["reasoning_content"] = reasoning
    if checked[-1]["role"] != "assistant":
        raise BadRow(f"the last message is a {checked[-1]['role']} turn; a conversation ends with the assistant")
    return checked


# ---------------------------------------------------------------------------------------------------------------------
# Where rows come from
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """One file, or one config of a hub dataset. `rows()` yields (row number from 1, bytes of JSON | dict | BadRow)."""

    name: str
    config: str | None  # a key of SCHEMAS when the name says so; None detects the schema row by row
    label: str  # what the report groups by
    digest: str  # hash of the content
    count: int  # rows, for the progress bar (blank lines of a JSONL file included)
    rows: Callable[[], Iterator[tuple[int, object]]]


def _digest_file(path: Path) -> tuple[str, int]:
    """blake2b of a file's content and its number of newlines."""
    digest, newlines = hashlib.blake2b(digest_size=20), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            newlines += block.count(b"\n")
    return digest.hexdigest(), newlines


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is not part of the first row
            if line.strip():
                yield number, line


def _json_list(rows: list) -> Iterator[tuple[int, object]]:
    yield from enumerate(rows, 1)


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
        for i in range(batch.num_rows):
            number += 1
            try:
                yield number, batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield number, BadRow(f"not valid UTF-8 ({error.reason})")


def _file_source(path: Path) -> Source:
    import pyarrow

    digest, newlines = _digest_file(path)
    config = path.stem if path.stem in SCHEMAS else None
    name, count = str(path), newlines + 1
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            count = pyarrow.parquet.ParquetFile(path).metadata.num_rows
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path}: not a Parquet file ({error})") from None
        rows = functools.partial(_parquet_rows, path)
    elif path.suffix == ".json" and path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:  # a UnicodeDecodeError is one too
            raise ValueError(f"{path}: not valid JSON ({error}); a list of objects, or one object a line, is expected") from None
        rows, count = functools.partial(_json_list, content), len(content)
    else:
        rows = functools.partial(_json_lines, path)
    return Source(name, config, path.stem, digest, count, rows)


SUFFIXES = (".jsonl", ".json", ".parquet")


def _local_sources(path: Path, wanted: set[str] | None) -> list[Source]:
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        files = [file for file in found if file.suffix in SUFFIXES]
        if ignored := [str(file) for file in found if file.suffix not in (*SUFFIXES, ".md")]:
            print(f"--dataset {path}: {len(ignored)} files of other kinds are not read: {', '.join(ignored[:5])}", file=sys.stderr)
        if not files:
            raise ValueError(f"--dataset {path}: the directory has no {', '.join(SUFFIXES)} file")
    elif path.suffix in SUFFIXES:
        files = [path]
    else:
        raise ValueError(f"--dataset {path}: expected a directory or a file that ends in {', '.join(SUFFIXES)}")
    return [_file_source(file) for file in files if wanted is None or file.stem in wanted]


def _hub_sources(dataset: str, wanted: set[str] | None, revision: str | None) -> list[Source]:
    import datasets

    try:
        available = datasets.get_dataset_config_names(dataset, revision=revision)
        loaded = {
            name: datasets.load_dataset(dataset, name, revision=revision, split="train")
            for name in available
            if wanted is None or name in wanted
        }
    except (OSError, ValueError) as error:  # not found, no network, no such split
        raise ValueError(f"--dataset {dataset}: cannot be loaded from the hub, and no such file exists here ({error})") from None
    sources = []
    for name, table in loaded.items():
        digest = hashlib.blake2b(digest_size=20)
        for file in table.cache_files:
            digest.update(_digest_file(Path(file["filename"]))[0].encode())
        rows = functools.partial(enumerate, table, 1)
        sources.append(Source(f"{dataset}/{name}", name if name in SCHEMAS else None, name, digest.hexdigest(), len(table), rows))
    return sources


def find_sources(data_args: DataArguments) -> list[Source]:
    """The files and hub configs that `dataset`, `dataset_config` and `dataset_revision` name. Raises ValueError when there are none."""
    names = [name.strip() for name in data_args.dataset_config.split(",") if name.strip()]
    wanted = None if names in ([], ["all"]) else set(names)
    sources = []
    for entry in filter(None, (entry.strip() for entry in data_args.dataset.split(","))):
        path = Path(entry)
        if path.exists() or path.suffix in SUFFIXES or entry.count("/") != 1:
            if not path.exists():
                raise ValueError(f"--dataset {entry}: no such file or directory")
            sources += _local_sources(path, wanted)
        else:
            sources += _hub_sources(entry, wanted, data_args.dataset_revision)
    missing = (wanted or set()) - {source.label for source in sources}
    if missing:
        raise ValueError(f"--dataset_config {','.join(sorted(missing))}: not found in --dataset {data_args.dataset}")
    if not sources:
        raise ValueError(f"--dataset {data_args.dataset!r}: names no data")
    return sources


# ---------------------------------------------------------------------------------------------------------------------
# Conversations -> text, split where the model's own turns begin and end
# ---------------------------------------------------------------------------------------------------------------------

SENTINEL = "q7Zassistantq7Z"


class ChatFormat:
    """A tokenizer's chat template, and where assistant turns begin and end in what it renders.

    Nothing is known about any template: everything is found by rendering.

    - A turn begins where the generation prompt ends, `render(messages[:i], add_generation_prompt=True)`, so the model is trained from
      exactly the text that it is given when it is asked to answer. What the template puts after that by itself (Qwen3's empty think block)
      is something the model has to write, and is supervised.
    - A turn's text ends where the text that the template puts after it begins. That text is found by rendering the same conversation with
      the turn's content replaced by a sentinel, because a template may rewrite earlier turns (Qwen3 and GLM-4.5 strip their reasoning),
      so that the rendering of `messages[:i + 1]` need not be a prefix of the whole.
    - The end-of-turn text (`<|im_end|>`, `<|eot_id|>`) belongs to the turn; white space after it does not. A template without one (GLM-4.5)
      ends a turn with the next role's token, which is then supervised, and the last turn gets the tokenizer's end-of-sequence token.
    """

    def __init__(self, tokenizer):
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; a fast one (tokenizer.json) is needed")
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; use an instruction-tuned model's tokenizer")
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        # Text that would become a control token inside a message: it would end the turn, or fake one. Think tags are legitimate content.
        self.control = sorted({t.content for t in added if t.special and t.content not in ("<think>", "</think>")}, key=len, reverse=True)
        user = {"role": "user", "content": "q7Zuserq7Z"}
        self.probe = self.render([user, {"role": "assistant", "content": SENTINEL}])
        if SENTINEL not in self.probe:
            raise ValueError("the chat template does not render an assistant turn's content")
        self.tail = self.probe[self.probe.rindex(SENTINEL) + len(SENTINEL) :]  # "<|im_end|>\n", "<|eot_id|>" or ""
        self.stop = self.tail.rstrip()
        if not self.stop and not tokenizer.eos_token:
            raise ValueError("the chat template ends a turn with nothing and the tokenizer has no eos_token: nothing teaches it to stop")
        thinking = self.render([user, {"role": "assistant", "content": SENTINEL, "reasoning_content": "q7Zreasoningq7Z"}])
        self.keeps_reasoning = "q7Zreasoningq7Z" in thinking
        pieces = self.segments([user, {"role": "assistant", "content": SENTINEL}])
        apart = [token for ids in self.encode([text for text, _ in pieces]) for token in ids]
        if apart != self.encode(["".join(text for text, _ in pieces)])[0]:
            raise ValueError(
                "the tokenizer changes text that is tokenised in pieces (a prefix space?): prompt and answer cannot be told apart"
            )

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, with no special token added: the template has already written them (no second BOS)."""
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)[
            "input_ids"
        ]

    def documents(self, messages: list[dict]) -> list[list[tuple[str, bool]]]:
        """The documents of one conversation, each a list of (text, supervised) pieces that make up its rendering.

        One document, unless the template strips the reasoning of earlier turns: then one document a turn, each ending with the turn that
        it supervises, which is how the model will see that turn, and no reasoning is lost. Raises BadRow when the template drops text.
        """
        from jinja2 import TemplateError

        for i, message in enumerate(messages):
            for token in self.control:
                if token in message["content"] or token in message.get("reasoning_content", ""):
                    raise BadRow(f"messages[{i}] contains the control token {token!r} as text")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            pieces = self.segments(messages)
            if len(turns) == 1 or self._lost(messages, pieces) is None:
                documents = [(messages, pieces)]
            else:
                documents = []
                for i in turns:
                    pieces = self.segments(messages[: i + 1])
                    # all but the last answer, and the white space that may follow it, is context here
                    last = max(n for n, (_, supervised) in enumerate(pieces) if supervised)
                    context = "".join(text for text, _ in pieces[:last])
                    documents.append((messages[: i + 1], [(context, False), *pieces[last:]]))
        except TemplateError as error:
            raise BadRow(f"the chat template refuses this conversation: {error}") from None
        for conversation, pieces in documents:
            only_last = len(documents) > 1
            if (lost := self._lost(conversation, pieces, only_last)) is not None:
                raise BadRow(f"the chat template drops {lost}")
        return [pieces for _, pieces in documents]

    def _lost(self, messages: list[dict], pieces: list[tuple[str, bool]], only_last: bool = False) -> str | None:
        """The first part of the conversation that is missing from the rendering, in words, or None. `only_last`: of the assistant turns
        check the last one."""
        answers = [text for text, supervised in pieces if supervised]
        whole = "".join(text for text, _ in pieces)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                if message["content"].strip() not in whole:
                    return f"the content of messages[{i}]"
            elif not only_last or i == turns[-1]:
                text = answers[-1 if only_last else turns.index(i)]
                if message["content"].strip() not in text:
                    return f"a part of the answer in messages[{i}]"
                if message.get("reasoning_content", "").strip() not in text:
                    return f"the reasoning in messages[{i}]"
        return None

    def segments(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """Split the rendering of a conversation into (text, supervised) pieces, at least one a turn and one before it."""
        if not self.keeps_reasoning:
            messages = [_reasoning_in_content(message) for message in messages]
        full = self.render(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [self.render(messages[:i], add_generation_prompt=True) for i in turns]
        pieces, at = [], 0
        for n, (i, prompt) in enumerate(zip(turns, prompts, strict=True)):
            if not full.startswith(prompt):
                raise ValueError(
                    f"the chat template's generation prompt {prompt[-40:]!r} is not how it begins an assistant turn "
                    f"{full[len(prompt) - 40 : len(prompt)]!r}; train with a template whose prompt and turns agree"
                )
            pieces.append((full[at : len(prompt)], False))
            if n + 1 < len(turns):
                context = self.render([*messages[:i], {"role": "assistant", "content": SENTINEL}, *messages[i + 1 : turns[n + 1]]], True)
                after = context[context.index(SENTINEL) + len(SENTINEL) :]
                end = len(prompts[n + 1]) - len(after)
            else:
                after, end = self.tail, len(full) - len(self.tail)
            if not full[end:].startswith(after) or end <= len(prompt):
                raise ValueError(f"the chat template changes what follows a turn ({after[:40]!r}) with the turn's content")
            if self.stop and after.startswith(self.stop):
                end += len(self.stop)
            elif n + 1 < len(turns):
                end += max((len(token) for token in self.control if after.startswith(token)), default=0)
            else:  # nothing ends the last turn: the end-of-sequence token does, in place of trailing white space
                full = full[:end] + self.tokenizer.eos_token
                end = len(full)
            pieces.append((full[len(prompt) : end], True))
            at = end
        if at < len(full):
            pieces.append((full[at:], False))
        return pieces


def _reasoning_in_content(message: dict) -> dict:
    """For a template without a reasoning field: write the reasoning where a reasoning model would."""
    reasoning = message.get("reasoning_content")
    if not reasoning:
        return message
    return {"role": message["role"], "content": f"<think>\n{reasoning.strip()}\n</think>\n\n{message['content']}"}


# ---------------------------------------------------------------------------------------------------------------------
# Tokenising, in parallel, into a cache
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Tokenised:
    """What one chunk of rows became. Documents in row order; `bad` holds (source index, row number, reason)."""

    tokens: np.ndarray  # uint32 (sum of lengths,)
    supervised: np.ndarray  # bool (sum of lengths,)
    lengths: list[int]
    rows: list[tuple[int, int]]  # (source index, row number) of each document
    bad: list[tuple[int, int, str]]


def tokenise(chat: ChatFormat, chunk: list[tuple[int, str | None, int, object]], loss_on: str) -> Tokenised:
    """Tokenise rows given as (source index, config, row number, bytes of JSON | dict | BadRow)."""
    documents, rows, bad = [], [], []
    for source, config, number, raw in chunk:
        try:
            if isinstance(raw, BadRow):
                raise raw
            row = _parse(raw) if isinstance(raw, bytes) else raw
            found = chat.documents(to_conversation(row, config))
        except BadRow as error:
            bad.append((source, number, str(error)))
            continue
        documents += found
        rows += [(source, number)] * len(found)
    # Piece by piece, so that a prompt's tokens are those the model is given at inference, and no token straddles prompt and answer.
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
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not valid UTF-8 (byte {error.start}: {error.reason})") from None
    except ValueError as error:
        raise BadRow(f"not valid JSON ({error})") from None


_worker: dict = {}  # the tokenizer and loss_on, in a worker process; empty in the parent


def _start_worker(chat: ChatFormat, loss_on: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is enough threads
    _worker.update(chat=chat, loss_on=loss_on)


def _work(chunk) -> Tokenised:
    return tokenise(_worker["chat"], chunk, _worker["loss_on"])


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


def _tokenise_all(chat: ChatFormat, sources: list[Source], loss_on: str, workers: int) -> Iterator[Tokenised]:
    """Tokenise every source in order, on `workers` processes, holding only a few chunks at a time."""
    if workers == 1:
        for chunk in _chunks(sources, 256):
            yield tokenise(chat, chunk, loss_on)
        return
    waiting = deque()
    fork = multiprocessing.get_context("fork")  # hands the tokenizer over without pickling; the children run no kernels and no threads
    try:
        with ProcessPoolExecutor(workers, fork, _start_worker, (chat, loss_on)) as pool:
            for chunk in _chunks(sources, 256):
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) >= 4 * workers:  # never the whole dataset in flight
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a tokenising process died, probably for lack of memory; pass a smaller --preprocessing_num_workers") from None


def _fingerprint(data_args: DataArguments, sources: list[Source], chat: ChatFormat) -> str:
    """Hash of all that changes a token, a label or which rows are kept. max_seq_length and the seed act later and are not in it."""
    import tokenizers
    import transformers

    tokenizer = chat.tokenizer
    parts = {
        "code": hashlib.blake2b(Path(__file__).read_bytes(), digest_size=20).hexdigest(),
        "versions": [transformers.__version__, tokenizers.__version__],
        "sources": [[source.name, source.config, source.digest] for source in sources],
        "revision": data_args.dataset_revision,
        "tokenizer": hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=20).hexdigest(),
        "special_tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "rendered": chat.probe,  # a template that writes today's date makes another dataset tomorrow
        "loss_on": data_args.loss_on,
        "bad_rows": data_args.bad_rows,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=10).hexdigest()


def _write_cache(directory: Path, data_args: DataArguments, sources: list[Source], chat: ChatFormat, progress: bool) -> None:
    """Tokenise into `directory`: written under a temporary name and renamed, so that a reader sees all of it or nothing."""
    from tqdm import tqdm

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = data_args.preprocessing_num_workers or min(cores, 64)
    total = sum(source.count for source in sources)
    if total < 1024:  # not worth a process
        workers = 1
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
            for part in _tokenise_all(chat, sources, data_args.loss_on, workers):
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
        np.save(temporary / "sources.npy", np.array([source for source, _ in rows], dtype=np.uint16))
        skipped = defaultdict(int)
        for source, _, _ in bad:
            skipped[source] += 1
        meta = {
            "sources": [source.name for source in sources],
            "labels": [source.label for source in sources],
            "skipped": [skipped[i] for i in range(len(sources))],
            "rows": seen,
            "loss_on": data_args.loss_on,
            "content": content.hexdigest(),
        }
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            temporary.rename(directory)
        except OSError:  # another machine's process on a shared disk was first; its cache has the same content
            if not (directory / "meta.json").exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _report_bad_rows(bad: list[tuple[int, int, str]], seen: int, sources: list[Source], mode: str, directory: Path) -> None:
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


def _locked(path: Path):
    """An open file that holds an exclusive lock until it is closed; the kernel frees it when a process dies."""
    import fcntl

    file = open(path, "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


def _best_fit(lengths, capacity):
    """Best fit of `lengths` (int64, in placing order) into bins of `capacity`. Returns (bin of each item, number of bins).

    Bins with the same room left form a linked list; a binary tree over the amounts of room says which lists are not empty, so the
    tightest bin that an item fits is found in log2(capacity) steps.
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
    """`_best_fit` compiled by numba, or as it is where numba is not installed (about 50 times slower, the same packs)."""
    if importlib.util.find_spec("numba") is None:
        return _best_fit
    import numba

    return numba.njit(cache=True)(_best_fit)


def pack(lengths, max_seq_length: int, seed: int = 0) -> list[list[int]]:
    """Pack documents of the given lengths into as few packs of at most `max_seq_length` tokens as best-fit decreasing finds.

    Returns lists of document indices, each document in exactly one. Documents are shuffled with the seed, then placed from long to short,
    so the seed decides between documents of equal length, the order inside a pack and the order of the packs; the number of packs is the
    same for every seed, because it depends on the lengths alone. O(n log max_seq_length).
    Raises ValueError for a length below 1 or above `max_seq_length`.
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
    assigned, bins = _compiled_best_fit()(lengths[order].astype(np.int64), int(max_seq_length))
    pack_of = np.empty(len(lengths), dtype=np.int64)
    pack_of[order] = generator.permutation(bins)[assigned]  # packs in random order
    members = shuffled[np.argsort(pack_of[shuffled], kind="stable")]  # documents of a pack in random order
    ends = np.cumsum(np.bincount(pack_of, minlength=bins)).tolist()
    members = members.tolist()
    return [members[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


class PackedDataset(torch.utils.data.Dataset):
    """Packs of tokenised documents, read from memory-mapped arrays.

    `ds[i]` is a list of documents, each `{"input_ids": int64 (n,), "labels": int64 (n,)}`. `lengths` holds the documents' token counts,
    `packs` the documents of each pack, `report` the figures that the command prints, `fingerprint` a hash of the data and its packing, and
    `validation` the PackedDataset of held-out documents or None.
    """

    def __init__(self, tokens, supervised, starts, lengths, max_seq_length, seed, content):
        """`tokens` uint32 and `supervised` bool hold documents end to end, and `content` is their hash; `starts` and `lengths`, int64
        (documents,), find this part's."""
        self._tokens, self._supervised, self._starts = tokens, supervised, starts
        self.lengths, self.max_seq_length, self.seed = lengths, max_seq_length, seed
        self.report: dict = {}
        self.validation: PackedDataset | None = None
        self.set_epoch(0)
        # of what is trained on, not of the code that made it: a run may be resumed by a later version that makes the same of the data
        digest = hashlib.blake2b(content.encode(), digest_size=10)
        for array in (starts, lengths, *map(np.array, self.packs)):
            digest.update(array.astype(np.int64).tobytes())
        self.fingerprint = digest.hexdigest()

    def set_epoch(self, epoch: int) -> None:
        """Pack anew with (seed, epoch): other documents together, in another order, and always the same number of packs.

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

    Returns input_ids, labels, position_ids, each int64 (1, T), positions restarting at 0 in every document; cu_seq_lens_q and
    cu_seq_lens_k, int32 (documents + 1,), where documents begin and end; max_length_q and max_length_k, ints, the longest document. The
    names are those of transformers' FlashAttentionKwargs, so `model(**batch)` hands them to attention.
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


# ---------------------------------------------------------------------------------------------------------------------
# Preparing
# ---------------------------------------------------------------------------------------------------------------------


def prepare(data_args: DataArguments, tokenizer, model_name: str, seed: int = 0, progress: bool | None = None) -> PackedDataset:
    """Tokenise (or find in the cache), split off validation rows, drop what is too long, pack. Returns the training PackedDataset.

    Safe to call from many processes at once: the first tokenises, the others wait and memory-map its arrays. `progress` None shows a bar
    on a terminal only. Raises ValueError, with the file and row, for data that cannot be used.
    """
    data_args.check()
    sources = find_sources(data_args)
    chat = ChatFormat(tokenizer)
    key = _fingerprint(data_args, sources, chat)
    root = Path(data_args.data_cache)
    root.mkdir(parents=True, exist_ok=True)
    directory = root / key
    if not (directory / "meta.json").exists():
        with _locked(root / f"{key}.lock"):
            if not (directory / "meta.json").exists():
                _write_cache(directory, data_args, sources, chat, sys.stderr.isatty() if progress is None else progress)
    return _load(directory, data_args, model_name, seed)


def _load(directory: Path, data_args: DataArguments, model_name: str, seed: int) -> PackedDataset:
    meta = json.loads((directory / "meta.json").read_text())
    offsets = np.load(directory / "offsets.npy")
    rows, sources = np.load(directory / "rows.npy"), np.load(directory / "sources.npy")
    tokens = np.memmap(directory / "tokens.bin", dtype=np.uint32, mode="r")
    supervised = np.memmap(directory / "supervised.bin", dtype=bool, mode="r")
    lengths = np.diff(offsets)
    if len(tokens) != offsets[-1] or len(supervised) != offsets[-1]:
        raise ValueError(f"{directory}: the cache is damaged ({len(tokens)} tokens, {offsets[-1]} expected); delete it and prepare again")

    fits = lengths <= data_args.max_seq_length
    held_out = _held_out(rows, sources, data_args.validation_share, seed)
    parts = []
    for part in (fits & ~held_out, fits & held_out):
        chosen = np.flatnonzero(part)
        parts.append(PackedDataset(tokens, supervised, offsets[chosen], lengths[chosen], data_args.max_seq_length, seed, meta["content"]))
    train, validation = parts
    if not len(train):
        raise ValueError(f"no document of {len(lengths)} is left to train on with --max_seq_length {data_args.max_seq_length}")
    if data_args.validation_share and not len(validation):
        raise ValueError(f"--validation_share {data_args.validation_share} holds out none of {meta['rows']} rows")
    train.validation = validation if len(validation) else None
    train.report = _report(meta, rows, sources, lengths, supervised, offsets, fits, train, data_args, model_name)
    _write_report(directory / "report.json", train.report)
    return train


def _held_out(rows: np.ndarray, sources: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which documents are for validation: all documents of a random share of the rows, so that no row is in both parts."""
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
        "histogram": [[a, b - 1, int(n)] for a, b, n in zip(edges, edges[1:], np.histogram(kept, edges)[0], strict=False)],
    }


def _write_report(path: Path, report: dict) -> None:
    text = json.dumps(report, indent=1) + "\n"
    if path.exists() and path.read_text() == text:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Attention over packed documents
# ---------------------------------------------------------------------------------------------------------------------


def attention_backend(device) -> str:
    """What "packed" attention runs on for a device: flash-attn-4, flash-attn-3, flash-attn-2, varlen_attn (PyTorch's own) or sdpa.

    On a GPU of compute capability 8.0 (Ampere) or later the first of these that is installed and supports it; elsewhere, and for float32
    tensors anywhere, an exact loop of scaled_dot_product_attention over the documents.
    """
    return _backend(torch.device(device))[0]


@functools.cache
def _backend(device: torch.device) -> tuple[str, Callable | None]:
    if device.type != "cuda":
        return "sdpa", None
    major, _ = torch.cuda.get_device_capability(device)
    # (name, module, first and last compute capability that it is built for)
    for name, module, first, last in (
        ("flash-attn-4", "flash_attn.cute", 9, 10),
        ("flash-attn-3", "flash_attn_interface", 9, 9),
        ("flash-attn-2", "flash_attn", 8, 12),
        ("varlen_attn", "torch.nn.attention.varlen", 8, 99),
    ):
        if first <= major <= last and (function := _import_varlen(module)) is not None:
            # Not an operator of PyTorch as the others are: torch.compile would trace into the compiler of its kernels.
            return name, torch.compiler.disable(function) if name == "flash-attn-4" else function
    return "sdpa", None


def _import_varlen(module: str) -> Callable | None:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if not absent:  # what is missing or broken is something that it needs
            print(f"warning: {module} is installed, but cannot be imported ({error}); attention does without it", file=sys.stderr)
        return None
    return getattr(found, "flash_attn_varlen_func", None) or getattr(found, "varlen_attn", None)


@functools.cache
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _call_varlen(function: Callable, query, key, value, boundaries, longest: int, scaling: float | None, window: int | None):
    """Call a variable-length attention kernel, whichever of the known signatures it has. Tensors are (T, heads, D)."""
    accepts = _parameters(function)
    kwargs = {}
    if "softmax_scale" in accepts:  # flash-attn 2, 3 and 4, which returns (out, log-sum-exp or None)
        kwargs = {"cu_seqlens_q": boundaries, "cu_seqlens_k": boundaries, "softmax_scale": scaling, "causal": True}
        if "max_seqlen_q" in accepts:
            kwargs |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
        if window is not None:
            kwargs["window_size"] = (window - 1, 0)
        out = function(query, key, value, **kwargs)
        return out[0] if isinstance(out, tuple) else out
    # torch.nn.attention.varlen: 2.10 has is_causal, 2.11 window_size and scale, 2.12 enable_gqa
    if "window_size" in accepts:
        kwargs["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        kwargs["is_causal"] = True
    else:
        raise ValueError(f"torch {torch.__version__}'s varlen_attn has no sliding window; install flash-attn or a later torch")
    if "scale" in accepts:
        kwargs["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in accepts:
            kwargs["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return function(query, key, value, boundaries, boundaries, longest, longest, **kwargs)


def _document_loop(query, key, value, boundaries: list[int], scaling: float | None, window: int | None):
    """Exact attention, document by document. query (1, heads, T, D), key and value (1, kv_heads, T, D); returns (1, heads, T, D)."""
    if boundaries[-1] != query.shape[2]:
        raise ValueError(f"packed attention: cu_seq_lens_q ends at {boundaries[-1]}, but there are {query.shape[2]} tokens")
    outputs = []
    for start, end in zip(boundaries, boundaries[1:], strict=False):
        mask = None
        if window is not None and end - start > window:
            at = torch.arange(end - start, device=query.device)
            mask = (at[:, None] >= at) & (at[:, None] - at < window)
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        )
    return torch.cat(outputs, dim=2)


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q=None,
    max_length_q: int | None = None,
    **kwargs,
):
    """Causal attention within each document, by transformers' contract for attention functions.

    query (B, heads, T, D), key and value (B, kv_heads, T, D); returns ((B, T, heads, D), None). `cu_seq_lens_q`, int32 (N + 1,), and
    `max_length_q` bound the documents in the flattened B * T tokens; without them every batch row is one document. The kernel reads the
    boundaries on the device, so nothing waits for the GPU. Raises ValueError for what it cannot do exactly: masks, dropout, soft caps,
    attention sinks, non-causal attention, caches.
    """
    batch, heads, tokens, _ = query.shape
    _refuse_unsupported(module, attention_mask, dropout, is_causal, kwargs, tokens, key.shape[2])
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * T, heads, D)
    dtype = query.dtype
    if query.device.type == "cuda" and dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")  # norms kept in float32 must not push attention out of the kernels
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    function = _backend(query.device)[1] if dtype in (torch.float16, torch.bfloat16) else None
    if cu_seq_lens_q is None:
        max_length_q = tokens
        boundaries = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=query.device)
    else:
        if max_length_q is None:
            raise ValueError("packed attention: cu_seq_lens_q came without max_length_q; pass collate's batch whole")
        boundaries = cu_seq_lens_q
    if function is not None:
        # The output has its query's layout. Partial rotary (GLM-4.5) leaves that head by head; such an output would be copied for o_proj,
        # and both of them kept for the backward. Elsewhere this copies nothing.
        query = query.contiguous()
        out = _call_varlen(function, query, key, value, boundaries, int(max_length_q), scaling, sliding_window)
    else:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, B * T, D)
        out = _document_loop(query, key, value, boundaries.tolist(), scaling, sliding_window)[0].transpose(0, 1)
    return out.reshape(batch, tokens, heads, -1).contiguous(), None


def _refuse_unsupported(module, attention_mask, dropout, is_causal, kwargs, query_length, key_length) -> None:
    problem = None
    if attention_mask is not None:
        problem = "an attention_mask; documents are bounded by cu_seq_lens_q, leave the mask out"
    elif dropout:
        problem = f"attention dropout {dropout}; set attention_dropout to 0"
    elif is_causal is False or getattr(module, "is_causal", True) is False:
        problem = "non-causal attention"
    elif query_length != key_length:
        problem = f"{query_length} queries for {key_length} keys (a cache?); generate with attn_implementation='sdpa'"
    else:
        for name in ("softcap", "s_aux", "position_bias"):
            if kwargs.get(name) is not None:
                problem = f"{name}, which this model needs"
    if problem is not None:
        raise ValueError(f"packed attention cannot do {problem}")


def _no_mask(*args, attention_mask=None, **kwargs):
    """transformers asks for a mask: hand back what the caller gave (None, or a mask that packed_attention refuses), build nothing."""
    return attention_mask


def register_attention() -> str:
    """Register packed_attention with transformers under the name it returns, for `attn_implementation=`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", _no_mask)
    return "packed"


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class CommandArguments:
    model: str = field(metadata={"help": "Model whose tokenizer and chat template are used: hub id or directory."})
    show: int = field(default=0, metadata={"help": "Print this many documents with the supervised part marked."})
    seed: int = field(default=0, metadata={"help": "Seed of packing and of the validation split."})


def format_report(report: dict) -> str:
    """The report as aligned text."""
    lines = [f"{report['dataset']} for {report['model']}", ""]
    header = ("config", "rows", "skipped", "too long", "documents", "tokens", "supervised")
    table = [header]
    total = {
        key: sum(config[key] for config in report["configs"].values()) for key in ("rows", "skipped", "too_long", "documents", "tokens")
    }
    total["supervised_tokens"] = report["supervised_tokens"]
    for name, row in [*report["configs"].items(), ("all", total)]:
        share = row["supervised_tokens"] / row["tokens"] if row["tokens"] else 0.0
        counts = [f"{row[key]:,}" for key in ("rows", "skipped", "too_long", "documents", "tokens")]
        table.append((name, *counts, f"{share:.1%}"))
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines += [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in table
    ]
    lines += ["", "document length (tokens)"]
    most = max(count for _, _, count in report["histogram"]) or 1
    lines += [f"{low:>8,} - {high:>8,}  {count:>9,}  {'#' * round(40 * count / most)}" for low, high, count in report["histogram"]]
    lines += [
        "",
        f"{report['packs']:,} packs of {report['max_seq_length']:,} tokens from {report['train_documents']:,} documents "
        f"and {report['train_tokens']:,} tokens, {report['fill']:.2%} full",
    ]
    if report["validation_documents"]:
        lines.append(f"{report['validation_documents']:,} documents held out for validation, in {report['validation_packs']:,} packs")
    if report["extra_documents"]:
        lines.append(
            f"{report['extra_documents']:,} documents more than rows: turns whose reasoning the template hides later are trained one by one"
        )
    return "\n".join(lines)


def format_document(document: dict[str, torch.Tensor], tokenizer, color: bool) -> str:
    """A document's text with its supervised parts in green, or between [[ and ]] where there is no colour."""
    begin, end = ("\033[32m", "\033[0m") if color else ("[[", "]]")
    supervised = document["labels"] != IGNORE
    cuts = [0, *(torch.nonzero(supervised[1:] != supervised[:-1])[:, 0] + 1).tolist(), len(supervised)]
    parts = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        text = tokenizer.decode(document["input_ids"][start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        parts.append(f"{begin}{text}{end}" if supervised[start] else text)
    return "".join(parts)


def main() -> None:
    from transformers import AutoTokenizer, HfArgumentParser

    try:
        data_args, args = HfArgumentParser((DataArguments, CommandArguments)).parse_args_into_dataclasses()
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            raise ValueError(f"--model {args.model}: no tokenizer there ({str(error).splitlines()[0]})") from None
        dataset = prepare(data_args, tokenizer, args.model, seed=args.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(format_report(dataset.report))
    for index in np.linspace(0, len(dataset.lengths) - 1, min(args.show, len(dataset.lengths)), dtype=int):
        print(f"\n----- document {index + 1} of {len(dataset.lengths):,}, {dataset.lengths[index]:,} tokens")
        print(format_document(dataset.document(index), tokenizer, color=sys.stdout.isatty()))


if __name__ == "__main__":
    main()
