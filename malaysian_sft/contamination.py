"""Questions that the training data has: runs of 13 words of their stems, and all their options in the same row."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from malaysian_sft.questions import LETTERS, OPTION_LINE
from malaysian_sft.statistics import measure, t_interval

GRAM = 13
FEWEST = 4  # words of a stem that says what is asked; "Pilih satu" does not
SUFFIXES = {".jsonl": "JSONL", ".json": "JSON", ".parquet": "Parquet"}
WORD = re.compile(r"\w+")


def strings_of(value):
    """Every string inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_of(item)
    elif isinstance(value, (list, tuple, np.ndarray)):
        for item in value:
            yield from strings_of(item)


def training_rows(source):
    """The texts of every row of the training data: .jsonl, .json, .parquet files or directories of them,
    comma-separated. Raises ValueError if one of them has no text or a line is not JSON."""
    parts = [Path(part.strip()) for part in source.split(",") if part.strip()]
    if not parts:
        raise ValueError(
            f"--contamination {source!r}: expected .jsonl, .json or .parquet files, or directories of them"
        )
    for part in parts:
        found = sorted(part.rglob("*")) if part.is_dir() else [part]
        kept = [path for path in found if path.is_file() and (path == part or path.suffix in SUFFIXES)]
        if not kept:
            raise ValueError(f"--contamination: no .jsonl, .json or .parquet file at {part}")
        some = False
        for path in kept:
            for texts in rows_of(path):
                some = some or bool(texts)
                yield texts
        if not some:
            raise ValueError(f"--contamination: {part} holds no row with text; give the data that was trained on")


def rows_of(path):
    """The texts of each row of one file; blank lines of a .jsonl are passed over. Raises ValueError naming the file and
    the line."""
    number, kind = 0, SUFFIXES.get(path.suffix, "JSONL")
    try:
        if kind == "Parquet":
            import pandas

            for row in pandas.read_parquet(path).to_dict("records"):
                yield [*strings_of(row)]
            return
        if kind == "JSON":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            for row in rows if isinstance(rows, list) else [rows]:
                yield [*strings_of(row)]
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                # a byte-order mark is not part of the first row
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield [*strings_of(json.loads(text))]
    except (ValueError, RecursionError) as error:
        where = f"{path}, line {number}" if number else path
        raise ValueError(f"--contamination: {where}: not {kind} ({error}); mend it") from error


def hash_words(text, known):
    """Words of `text` (lower case, letters and digits only) as uint64 (words,). known: a dict that remembers hashes."""
    numbers = []
    for word in WORD.findall(text.lower()):
        if word not in known:
            known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        numbers.append(known[word])
    return np.array(numbers, np.uint64)


def hash_grams(words, n):
    """A hash of every run of n words -> uint64 (words - n + 1,): sum of h * odd^j modulo 2^64."""
    if len(words) < n:
        return np.empty(0, np.uint64)
    grams = np.zeros(len(words) - n + 1, np.uint64)
    for j in range(n):
        grams = grams * np.uint64(0x9E3779B97F4A7C15) + words[j : len(words) - n + 1 + j]
    return grams


def stem_of(question):
    """The question without its options: the prompt up to the first of the lines that hold them."""
    lines = question["prompt"].splitlines()
    letters = iter(question["options"])
    wanted = next(letters, None)
    for number, line in enumerate(lines):
        match = OPTION_LINE.fullmatch(line)
        if match and match.group(1) == wanted and match.group(2) == question["options"][wanted]:
            return "\n".join(lines[:number])
    return question["prompt"]


class Stems:
    """What the training data is searched for: runs of 13 words of every stem, the whole of a shorter one.

    A run that several stems share is an instruction or a passage: it marks none of them. A stem that has no run of its
    own, or a short one that several questions ask, marks a question only beside all its options.
    """

    def __init__(self, questions, known):
        self.options = [
            [words for words in (hash_words(text, known) for text in question["options"].values()) if len(words)]
            for question in questions
        ]
        runs, owners, stems = {}, {}, {}  # by number of words: arrays of runs, and of the stem each belongs to
        for question in questions:
            words = hash_words(stem_of(question), known)
            stems.setdefault(words.tobytes(), (len(stems), words, []))[2].append(question["index"])
        self.askers = [askers for _, _, askers in stems.values()]  # the questions of each stem
        for number, words, _ in stems.values():
            n = min(GRAM, len(words))
            if n:
                grams = np.unique(hash_grams(words, n))
                runs.setdefault(n, []).append(grams)
                owners.setdefault(n, []).append(np.full(len(grams), number))
        sorted_runs, own = {}, np.zeros(len(stems), bool)
        for n in runs:
            grams, owner = np.concatenate(runs[n]), np.concatenate(owners[n])
            order = np.argsort(grams, kind="stable")
            grams, owner = grams[order], owner[order]
            differs = grams[1:] != grams[:-1]
            single = np.append(differs, True) & np.append(True, differs)
            own[owner[single]] = True
            sorted_runs[n] = grams, owner, single
        self.tables = {}  # what a stem shares is searched for only where it has nothing of its own
        for n, (grams, owner, single) in sorted_runs.items():
            kept = single | ~own[owner]
            self.tables[n] = grams[kept], owner[kept]
        asked_once = np.array([len(askers) == 1 for askers in self.askers])
        sizes = np.array([len(words) for _, words, _ in stems.values()])
        # stems that mark a question without its options
        self.enough = own & ((sizes >= GRAM) | asked_once & (sizes >= FEWEST))

    def search(self, words):
        """The stems of which a row has a run. words: of each of its texts."""
        hits = set()
        for n, (grams, owner) in self.tables.items():
            seen = np.unique(np.concatenate([hash_grams(text, n) for text in words]))
            left, right = np.searchsorted(grams, seen, "left"), np.searchsorted(grams, seen, "right")
            for start, end in zip(left[right > left], right[right > left], strict=True):
                hits.update(owner[start:end].tolist())
        return hits

    def has_options(self, question, words):
        """Whether every option of a question stands somewhere in a row, in any order."""
        options = self.options[question]
        return bool(options) and all(any(contains(text, option) for text in words) for option in options)


def contains(text, run):
    """Whether the words `run` stand in a row in the words `text`."""
    return bool(len(run) <= len(text) and np.isin(hash_grams(run, len(run)), hash_grams(text, len(run)))[0])


def overlaps(questions, source):
    """Which questions the training data has -> (stem found, all options in the same row too), bool (Q,) each."""
    known = {}
    stems = Stems(questions, known)
    found, with_options = np.zeros(len(questions), bool), np.zeros(len(questions), bool)
    for texts in training_rows(source):
        words = [hash_words(text, known) for text in texts]
        if not words:
            continue
        for stem in stems.search(words):
            for question in stems.askers[stem]:
                options = stems.has_options(question, words)
                if options or stems.enough[stem]:
                    found[question] = True
                    with_options[question] |= options
    return found, with_options


def contamination_report(rows, questions, source):
    """Overlap with the training data and scores with and without the questions concerned, JSON-ready."""
    found, with_options = overlaps(questions, source)
    keys = np.array([LETTERS.index(question["key"]) for question in questions], np.int8)
    report = {
        "source": source,
        "questions": [questions[i]["id"] for i in np.flatnonzero(found)],
        "with_options": [questions[i]["id"] for i in np.flatnonzero(with_options)],
        "count": int(found.sum()),
        "checkpoints": [],
    }
    for row in rows:
        average = measure(row.answers, keys)[:, 1]
        parts = {"all": average, "without": average[~found], "only": average[found]}
        scores = {name: float(part.mean()) if len(part) else None for name, part in parts.items()}
        intervals = {name: list(t_interval(part)) if len(part) else None for name, part in parts.items()}
        counts = {name: len(part) for name, part in parts.items()}
        report["checkpoints"].append({"name": row.name, **scores, "intervals": intervals, "counts": counts})
    return report
