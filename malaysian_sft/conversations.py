"""Rows of a dataset, from files or the hub, as conversations: lists of messages with role, content and
reasoning_content."""

import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class DataArguments:
    dataset: str = field(
        default="Scicom-intl/Malaysian-Instructions",
        metadata={"help": "Hub dataset id, or local .jsonl/.json/.parquet files or directories; comma-separated."},
    )
    dataset_config: str = field(
        default="all", metadata={"help": "Configs of the dataset (hub) or file names without suffix (local), or all."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Hub revision (commit, tag or branch) of the dataset."}
    )
    max_seq_length: int = field(
        default=16384, metadata={"help": "Tokens in a full pack. Longer documents are dropped and counted."}
    )
    loss_on: str = field(
        default="assistant",
        metadata={"help": "Train on assistant turns only, or on all tokens.", "choices": ["assistant", "all"]},
    )
    bad_rows: str = field(
        default="refuse",
        metadata={"help": "Refuse a dataset with bad rows, or skip and count them.", "choices": ["refuse", "skip"]},
    )
    ignore_columns: str = field(
        default="",
        metadata={"help": "Columns that are left out on purpose, comma-separated (ids, sources, weights)."},
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Tokenising processes. Default: the cores this process may use."}
    )
    data_cache: str = field(default="outputs/data", metadata={"help": "Directory of the tokenised data."})
    validation_share: float = field(
        default=0.0, metadata={"help": "Share of the rows held out for validation, 0 <= share < 1."}
    )

    def ignored(self) -> frozenset:
        """The names in ignore_columns."""
        return frozenset(name.strip() for name in self.ignore_columns.split(",") if name.strip())

    def check(self) -> None:
        """Raise ValueError for a value that cannot work, naming the flag."""
        for name, allowed in (("loss_on", ("assistant", "all")), ("bad_rows", ("refuse", "skip"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if not 2 <= self.max_seq_length < 1 << 62:
            raise ValueError(f"--max_seq_length {self.max_seq_length}: expected at least 2 and below 2^62")
        if not 0.0 <= self.validation_share < 1.0:
            raise ValueError(f"--validation_share {self.validation_share}: expected a share of at least 0 and below 1")
        if self.preprocessing_num_workers is not None and self.preprocessing_num_workers < 1:
            raise ValueError(f"--preprocessing_num_workers {self.preprocessing_num_workers}: expected at least 1")


class BadRow(ValueError):
    """A row that cannot be trained on; the message says what is wrong with it."""


class Repeated(dict):
    """An object of JSON some of whose keys, those in `names`, are there more than once: only the last values are
    kept."""

    names: tuple = ()


def parse_json(text: bytes | str) -> object:
    """What JSON says; an object with a key that is there twice is Repeated, which no row may have."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        found = Repeated(found)
        found.names = tuple(key for key in found if keys.count(key) > 1)
    return found


def _refuse_repeated(value, where, ignored=()):
    if isinstance(value, Repeated) and (names := [name for name in value.names if name not in ignored]):
        raise BadRow(f"{where} has key {names[0]!r} more than once: which of them is meant?")


# The schemas of rows: required columns; what else may be there. An empty or null column is absent.
EXTRAS = frozenset({"system", "reasoning"})
SCHEMAS = {
    ("input", "output"): EXTRAS,
    ("question", "answer"): EXTRAS,
    ("input", "answer"): EXTRAS,
    ("instruction", "output"): EXTRAS | {"input"},  # Alpaca
    ("context", "question", "answer"): EXTRAS,
    ("question", "options", "answer"): EXTRAS | {"context"},
    ("messages",): frozenset({"system"}),
    ("conversations",): frozenset({"system"}),  # ShareGPT
}
# config of Scicom-intl/Malaysian-Instructions -> its schema
CONFIGS = {
    "ayat_aktif_pasif": ("input", "output"),
    "coding": ("question", "answer"),
    "malaysian_reasoning": ("input", "answer"),
    "meta_prompt": ("input", "answer"),
    "multiple_choice_qa": ("question", "answer"),
}
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def _text(row: dict, key: str, optional: bool = False) -> str:
    """A row's text field, "" for an optional one that is absent, null or blank. Raises BadRow for anything else that is
    not text."""
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


def to_conversation(row: dict, config: str | None = None, ignored: frozenset = frozenset()) -> list[dict]:
    """Map one dataset row to messages: dicts with role, content and, where there is any, reasoning_content.

    `config` names the schema (a key of CONFIGS); otherwise the row's columns say which of SCHEMAS it is. ignored:
    columns that are left out on purpose. Raises BadRow with the column and the reason: nothing is guessed, and no
    column is dropped.
    """
    if not isinstance(row, dict):
        raise BadRow(f"row is {type(row).__name__}, expected an object")
    _refuse_repeated(row, "the row", ignored)
    row = {key: value for key, value in row.items() if value is not None and key not in ignored}
    schema = _schema_of(row, config)
    if schema == ("messages",):
        messages = _check_messages(row["messages"])
    elif schema == ("conversations",):
        messages = _check_messages(_from_sharegpt(row["conversations"]))
    else:
        *questions, answer = schema
        if schema == ("instruction", "output"):
            questions.append("input")
        parts = [_user_part(row, name, optional=name not in schema) for name in _in_order(row, questions)]
        messages = [{"role": "user", "content": "\n\n".join(filter(None, parts))}]
        messages.append({"role": "assistant", "content": _text(row, answer)})
        if reasoning := _text(row, "reasoning", optional=config != "malaysian_reasoning"):
            messages[-1]["reasoning_content"] = reasoning
    if system := _text(row, "system", optional=True):
        if messages[0]["role"] == "system":
            raise BadRow("column 'system' and a system turn in the messages: which of them is meant?")
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _schema_of(row, config):
    filled = {str(key) for key, value in row.items() if value != "" and value != []}
    if config in CONFIGS and "messages" not in row:
        schema = CONFIGS[config]
        if missing := [name for name in schema if name not in row]:
            raise BadRow(f"missing field {missing[0]!r}")
        unknown = filled - {*schema, *SCHEMAS[schema]}
    else:
        fitting = [schema for schema in SCHEMAS if all(name in row for name in schema)]
        exact = [schema for schema in fitting if filled <= {*schema, *SCHEMAS[schema]}]
        if not fitting or len(exact) > 1:
            known = ", ".join("+".join(schema) for schema in SCHEMAS)
            which = "more than one schema" if fitting else "no schema"
            raise BadRow(f"columns {sorted(map(str, row))} fit {which} ({known})")
        schema = exact[0] if exact else max(fitting, key=lambda schema: len(filled & {*schema, *SCHEMAS[schema]}))
        unknown = filled - {*schema, *SCHEMAS[schema]}
    if unknown:
        raise BadRow(
            f"columns {sorted(unknown)} have no place in a row of {'+'.join(schema)} and would not be trained on; leave"
            f" them out with --ignore_columns {','.join(sorted(unknown))}"
        )
    return schema


def _in_order(row, questions):
    """The columns of the user's turn in the order in which they are read: context first, options last."""
    return [*(["context"] if "context" in row and "context" not in questions else []), *questions]


def _user_part(row, name, optional):
    value = row.get(name)
    if name == "options" and isinstance(value, list):
        if not value or not all(isinstance(option, str) and option.strip() for option in value):
            raise BadRow("column 'options' is not a list of non-empty strings")
        return "\n".join(value)
    return _text(row, name, optional)


def _from_sharegpt(turns):
    if not isinstance(turns, list):
        raise BadRow(f"column 'conversations' is {type(turns).__name__}, expected a list")
    messages = []
    for i, turn in enumerate(turns):
        _refuse_repeated(turn, f"conversations[{i}]")
        if not isinstance(turn, dict) or {"from", "value"} - turn.keys():
            raise BadRow(f"conversations[{i}] is not an object with 'from' and 'value'")
        if unknown := {key for key, value in turn.items() if value not in (None, [], "")} - {"from", "value"}:
            raise BadRow(f"conversations[{i}] has {sorted(unknown)}; only from and value are trained on")
        if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
            raise BadRow(f"conversations[{i}] is from {turn['from']!r}, expected one of {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return messages


def _check_messages(messages) -> list[dict]:
    if not isinstance(messages, list) or not messages:
        raise BadRow("field 'messages' is not a non-empty list")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BadRow(f"messages[{i}] is {type(message).__name__}, expected an object")
        _refuse_repeated(message, f"messages[{i}]")
        # columnar files fill absent keys with null
        unknown = {key for key, value in message.items() if value not in (None, [], "")} - {
            "role",
            "content",
            "reasoning_content",
        }
        if unknown:
            raise BadRow(
                f"messages[{i}] has {sorted(unknown)}; only role, content and reasoning_content are trained on"
            )
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise BadRow(f"messages[{i}] has role {role!r}, expected system, user or assistant")
        if role == "system" and message.get("content") in ("", None):
            continue  # some templates want one, with nothing in it
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
    if not checked:
        raise BadRow("field 'messages' has no turn with text")
    if checked[-1]["role"] != "assistant":
        raise BadRow(f"the last message is a {checked[-1]['role']} turn; a conversation ends with the assistant")
    return checked


@dataclass
class Source:
    """One file, or one config of a hub dataset. `rows()` yields (row number from 1, bytes of JSON | dict | BadRow)."""

    name: str
    config: str | None  # a key of CONFIGS when the name says so; None detects the schema row by row
    label: str  # what the report groups by
    digest: str  # hash of the content
    count: int  # rows, for the progress bar (blank lines of a JSONL file included)
    rows: Callable[[], Iterator[tuple[int, object]]]
    commit: str | None = None  # the hub's, of a hub dataset


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
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for i in range(batch.num_rows):
                number += 1
                try:
                    yield number, batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    yield number, BadRow(f"not valid UTF-8 ({error.reason})")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged after row {number} ({str(error).splitlines()[0]})") from None


def _file_source(path: Path) -> Source:
    import pyarrow

    digest, newlines = _digest_file(path)
    config = path.stem if path.stem in CONFIGS else None
    name, count = str(path), newlines + 1
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            count = pyarrow.parquet.ParquetFile(path).metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
        rows = functools.partial(_parquet_rows, path)
    elif path.suffix == ".json" and _first_byte(path) == b"[":
        try:
            content = parse_json(path.read_bytes())
        except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError too
            raise ValueError(
                f"{path}: not valid JSON ({error}); a list of objects, or one object a line, is expected"
            ) from None
        rows, count = functools.partial(_json_list, content), len(content)
    else:
        _refuse_other_json(path)
        rows = functools.partial(_json_lines, path)
    return Source(name, config, path.stem, digest, count, rows)


def _first_byte(path):
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _refuse_other_json(path):
    """Raise ValueError, in one line, for JSON that is not one object a line: reading it would name every line."""
    if _first_byte(path) == b"[":
        raise ValueError(f"{path}: a JSON list, not one object a line; rename it to {path.stem}.json")
    with open(path, "rb") as file:
        first = file.readline().removeprefix(b"\xef\xbb\xbf").strip()
    if first == b"{":
        raise ValueError(f"{path}: pretty-printed JSON; write one object a line, or a list of objects in a .json file")


SUFFIXES = (".jsonl", ".json", ".parquet")
COMMIT = re.compile(r"\b[0-9a-f]{40}\b")
# Of a local directory, as of a hub dataset, the training split is read; these words in a file's name say it is another.
OTHER_SPLITS = re.compile(r"(^|[-_.])(test|validation|valid|val|dev|eval)([-_.]|$)", re.IGNORECASE)


def _files_under(path: Path) -> list[Path]:
    """The files under a directory, but for hidden ones. Raises ValueError for what would be left out without a word:
    a directory that cannot be read, data that is no regular file; links to directories are said not to be followed."""

    def refuse(error):
        raise ValueError(
            f"--dataset {path}: {error.filename} cannot be read ({error.strerror}); make it readable or move it away"
        ) from None

    found, linked = [], []
    for folder, folders, names in os.walk(path, onerror=refuse):
        found += [Path(folder, name) for name in names if not name.startswith(".")]
        linked += [os.path.join(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))]
    for file in found:
        if file.suffix in SUFFIXES:
            _refuse_no_file(file)
    if linked:
        print(
            f"--dataset {path}: {len(linked)} links to directories are not followed; name them in --dataset to read"
            f" them: {', '.join(sorted(linked)[:5])}",
            file=sys.stderr,
        )
    return sorted(found)


def _refuse_no_file(path):
    """Raise ValueError for data that is no regular file: a link to nothing, or a pipe, which is read once at most."""
    if not path.is_file():
        what = "no regular file" if path.exists() else f"a link to nothing ({os.readlink(path)})"
        raise ValueError(f"--dataset {path}: {what}; put a file in its place or remove it")


def _local_sources(path: Path, wanted: set[str] | None) -> list[Source]:
    if path.is_dir():
        found = _files_under(path)
        if (path / "dataset_info.json").exists() or (path / "state.json").exists():
            raise ValueError(
                f"--dataset {path}: written by datasets' save_to_disk; write it with to_parquet or to_json instead"
            )
        data = [file for file in found if file.suffix in SUFFIXES]
        files = [file for file in data if not OTHER_SPLITS.search(file.stem)]
        if left := [str(file) for file in data if OTHER_SPLITS.search(file.stem)]:
            print(
                f"--dataset {path}: {len(left)} files of other splits than train are not read: {', '.join(left[:5])}",
                file=sys.stderr,
            )
        if ignored := [str(file) for file in found if file.suffix not in (*SUFFIXES, ".md")]:
            print(
                f"--dataset {path}: {len(ignored)} files of other kinds are not read: {', '.join(ignored[:5])}",
                file=sys.stderr,
            )
        if not files:
            raise ValueError(f"--dataset {path}: the directory has no {', '.join(SUFFIXES)} file")
    elif path.suffix in SUFFIXES:
        files = [path]
        _refuse_no_file(path)
    else:
        raise ValueError(f"--dataset {path}: expected a directory or a file that ends in {', '.join(SUFFIXES)}")
    return [_file_source(file) for file in files if wanted is None or file.stem in wanted]


def commit_of(paths) -> str | None:
    """The hub's commit that the cache of `datasets` names a directory after; None if it names none, or several."""
    found = {match.group() for path in paths for match in COMMIT.finditer(str(Path(path).parent))}
    return found.pop() if len(found) == 1 else None


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
        raise ValueError(
            f"--dataset {dataset}: cannot be loaded from the hub, and no such file exists here ({error})"
        ) from None
    sources = []
    for name, table in loaded.items():
        digest = hashlib.blake2b(digest_size=20)
        for file in table.cache_files:
            digest.update(_digest_file(Path(file["filename"]))[0].encode())
        rows = functools.partial(enumerate, table, 1)
        facts = f"{dataset}/{name}", name if name in CONFIGS else None, name, digest.hexdigest(), len(table), rows
        sources.append(Source(*facts, commit_of([file["filename"] for file in table.cache_files])))
    return sources


def find_sources(data_args: DataArguments) -> list[Source]:
    """The files and hub configs that `dataset`, `dataset_config` and `dataset_revision` name. Raises ValueError when
    there are none."""
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
    first: dict = {}
    for source in sources:
        other = first.setdefault(Path(source.name).resolve(), source)
        if other is not source:
            same = "" if other.name == source.name else f" (once as {other.name})"
            raise ValueError(f"--dataset: {source.name} is named twice{same}, its rows would count twice; name it once")
    return sources
