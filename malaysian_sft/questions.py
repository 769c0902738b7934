"""MalayMMLU's questions: from the hub (pinned and verified) or from a file in its format, checked row by row."""

import hashlib
import json
import os
import re
import sys
from pathlib import Path

import numpy as np

HUB_DATASET = "UMxYTLAILabs/MalayMMLU"
HUB_FILE = "MalayMMLU_0shot.json"
# The release of October 2024 and its checksum, as the hub's page of that file states them: the data of the official
# leaderboard. In August 2025 about a dozen questions were repaired; `--questions_revision main` takes what the hub
# holds now, and a lock file holds on to it.
HUB_REVISION = "e765ce2227db84be0084f4a02b3408f562b94f99"
HUB_SHA256 = "70b67e845e2199ba39be7905cbcf933d155dcb17a678c978385c6b8a10a29464"
HUB_LOCK = "malaymmlu.lock.json"
# What every release holds: a file with other counts is not the benchmark.
HUB_COUNTS = {"STEM": 2443, "Language": 6288, "Social science": 6918, "Others": 4169, "Humanities": 4395}
LETTERS = "ABCDEF"
SURROGATE = re.compile("[\\ud800-\\udfff]")


def download_questions(revision):
    """Fetch the benchmark's file from the hub; returns (path, the commit it came from). Raises ValueError if it cannot
    be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset", revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot fetch {HUB_FILE} from the hub ({reason}); give a local copy with --questions FILE"
        ) from error
    parts = Path(path).parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
    return path, commit


def benchmark_questions(path, revision=None, root=None):
    """Questions from `path`, or without one from the hub -> (questions, facts for args.json: source, revision, sha256,
    rows).

    A file from the hub is verified: the default revision against the commit and the checksum above. For another one (a
    branch, a tag, a commit) the first reading writes what it got to `<root>/malaymmlu.lock.json`; from then on that
    commit is fetched and both are verified (without a root nothing is written). Raises ValueError naming what differs.
    """
    if path is not None:
        questions = load_questions(path)
        return questions, {"source": str(path), "revision": None, "sha256": checksum(path), "rows": len(questions)}
    source, asked = f"{HUB_DATASET}/{HUB_FILE}", revision or HUB_REVISION
    lock = Path(root, HUB_LOCK) if root is not None else None
    known = {HUB_REVISION: {"revision": HUB_REVISION, "sha256": HUB_SHA256}} | (read_lock(lock) if lock else {})
    wanted = known.get(asked)
    path, commit = download_questions(wanted["revision"] if wanted else asked)
    found = {"revision": commit, "sha256": checksum(path)}
    for name in ("revision", "sha256") if wanted else ():
        if found[name] != wanted[name]:
            where = lock if asked != HUB_REVISION else "the program"
            raise ValueError(
                f"{source} at {asked} has {name} {found[name]}, but {where} says {wanted[name]}; the data is not the"
                " same"
            )
    questions = load_questions(path, published=True)
    counts = {name: len(index) for name, index in strata(questions).items()}
    if counts != HUB_COUNTS:
        raise ValueError(f"{source} holds {counts}, not MalayMMLU's {HUB_COUNTS}; pick another --questions_revision")
    if lock and not wanted:
        temporary = lock.with_suffix(".tmp")
        lock.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(read_lock(lock) | {asked: found}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, lock)
    return questions, {"source": source, **found, "rows": len(questions)}


def checksum(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_lock(lock):
    """The lock file as {revision asked for: {"revision", "sha256"}}, {} without one. Raises ValueError if it is
    damaged."""
    if not lock.exists():
        return {}
    try:
        known = json.loads(lock.read_text(encoding="utf-8"))
        return {asked: {"revision": entry["revision"], "sha256": entry["sha256"]} for asked, entry in known.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{lock} is damaged ({error!r}); expected {{asked: {{revision, sha256}}}}; restore or delete it"
        ) from error


def load_questions(path, published=False):
    """Read a question file in MalayMMLU's format (a JSON list, or JSON lines) and check it row by row.

    Returns a list of dicts: `index` (position), `id`, `prompt`, `key` (a letter), `letters` (those on offer, e.g.
    "ABCD"), `options` (letter -> text, without the letter), `subject`, `category`, `level`. Raises ValueError naming
    the file, the row and the field. published: the benchmark's own file, whose slips in the options are noted and read
    as the official program reads them, not refused.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the question file {path}: {error}") from error
    listed, place = text.lstrip().startswith("["), path
    rows, places = [], []  # places: how the errors call each row
    try:
        if listed:
            rows = json.loads(text)
            places = [f"{path}, row {index}" for index in range(len(rows))]
        for number, line in enumerate([] if listed else text.split("\n"), 1):
            place = f"{path}, line {number}"
            if line.strip():
                rows.append(json.loads(line))
                places.append(place)
    except (ValueError, RecursionError) as error:
        what = error
        if isinstance(error, json.JSONDecodeError):
            what = f"line {error.lineno}: {error.msg}" if listed else f"{error.msg}, column {error.colno}"
        raise ValueError(f"{place} is not JSON ({what}); expected MalayMMLU's list of questions") from error
    if not rows:
        raise ValueError(f"{path} holds no question")
    if "\\ud" in text.lower():  # an escape is the only way for half a pair into a JSON string
        for place, row in zip(places, rows, strict=True):
            if SURROGATE.search(json.dumps(row, ensure_ascii=False)):
                raise ValueError(
                    f"{place}: half of a surrogate pair (such as \\ud83d alone), which is no character; mend the text"
                )
    return [check_question(row, index, places[index], published) for index, row in enumerate(rows)]


def check_question(row, index, place, published=False):
    """One raw row -> the dict of `load_questions`. Raises ValueError naming the row, as `place` calls it, and the
    field."""

    def fail(what):
        raise ValueError(f"{place}: {what}")

    if not isinstance(row, dict):
        fail(f"expected an object, found {type(row).__name__}")
    for name in ("prompt", "key", "category"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            fail(f"`{name}` is missing or is not a non-empty string (found {row.get(name)!r})")
    options, listed = parse_options(row.get("options"), row["prompt"]), bool(row.get("options"))
    count = row.get("num_options")
    if count is None and len(options) < 2:
        fail("`num_options` is missing and no options stand in `options` or `prompt`; expected lines such as `A. x`")
    count = len(options) if count is None else count
    if (
        isinstance(count, bool)
        or not isinstance(count, (int, float))
        or not 2 <= count <= len(LETTERS)  # first: infinity and NaN have no int
        or int(count) != count
    ):
        fail(f"`num_options` must be 2 to {len(LETTERS)}, found {ascii(count)[:80]}")
    if listed and len(options) != count and not published:
        fail(f"`num_options` is {int(count)}, but `options` has {len(options)}")
    letters = "".join(options) if listed else LETTERS[: int(count)]
    key = row["key"].strip().upper()
    if published and len(key) == 1 and key in LETTERS and key not in letters:
        print(
            f"note: {place}: the key {key} is not among the options {letters}; it counts as on offer",
            file=sys.stderr,
        )
        letters = "".join(sorted(letters + key))
    if key not in letters or len(key) != 1:
        fail(f"`key` must be one of the letters on offer ({', '.join(letters)}), found {row['key']!r}")
    return {
        "index": index,
        "id": row.get("id", index),
        "prompt": row["prompt"],
        "key": key,
        "letters": letters,
        "options": {letter: text for letter, text in options.items() if letter in letters},
        "subject": str(row.get("subject") or ""),
        "category": row["category"],
        "level": str(row.get("level") or ""),
    }


# "A. x", "A.x", "A) x", "(A) x", "A: x", "A - x", "A   x": the delimiters that occur
OPTION_LINE = re.compile(r"\s*\(?([A-F])(?:\s*[.):\-–]\s*|\s+)(\S(?:.*\S)?)\s*")


def parse_options(options, prompt):
    """The options as letter -> text, from the row's list (or newline-joined string) or, without one, from the prompt's
    lines.

    Options that all carry a letter, in order, keep theirs, even if the first is missing ("B. x", "C. y"); others are
    counted from A.
    """
    if isinstance(options, str):
        options = [line for line in options.splitlines() if line.strip()]
    found = {}
    if isinstance(options, list) and options:
        matches = [OPTION_LINE.fullmatch(str(option)) for option in options]
        own = [match.group(1) for match in matches if match]
        if len(own) < len(options) or own != sorted(set(own)):
            own = LETTERS
        for letter, option, match in zip(own, options, matches, strict=False):
            found[letter] = match.group(2) if match and match.group(1) == letter else str(option).strip()
        return found
    for line in prompt.splitlines():
        match = OPTION_LINE.fullmatch(line)
        if not match:
            continue
        if match.group(1) == "A":
            found = {"A": match.group(2)}
        elif found and match.group(1) == LETTERS[len(found) % len(LETTERS)]:
            found[match.group(1)] = match.group(2)
    return found


def strata(questions, name="category"):
    """Question indices by category (or subject, or level), in the file's order: {value: int array}."""
    groups = {}
    for position, question in enumerate(questions):
        groups.setdefault(question[name], []).append(position)
    return {value: np.array(index) for value, index in groups.items()}
