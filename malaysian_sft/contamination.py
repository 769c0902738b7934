"""Questions that overlap the training data: runs of 13 words in common."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from malaysian_sft.questions import LETTERS
from malaysian_sft.statistics import measure

GRAM = 13
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


def training_texts(source):
    """Every text of the training data: .jsonl, .json, .parquet files or directories of them, comma-separated. Raises
    ValueError if none."""
    import pandas

    paths = []
    for part in source.split(","):
        path = Path(part.strip())
        paths += (
            sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".json", ".parquet"))
            if path.is_dir()
            else [path]
        )
    if not paths or any(not path.is_file() for path in paths):
        raise ValueError(f"--contamination: no .jsonl, .json or .parquet file at {source}")
    for path in paths:
        if path.suffix == ".parquet":
            yield from strings_of(pandas.read_parquet(path).to_dict("records"))
            continue
        with open(path, encoding="utf-8") as file:
            try:
                for row in json.load(file) if path.suffix == ".json" else map(json.loads, file):
                    yield from strings_of(row)
            except ValueError as error:
                raise ValueError(f"--contamination: {path} is not {path.suffix[1:].upper()} ({error})") from error


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


def contaminated(questions, source):
    """Questions that share a run of 13 words with the training data; shorter ones if the whole text occurs -> bool
    (Q,)."""
    known, wanted = {}, {}
    for question in questions:
        words = hash_words(question["prompt"], known)
        n = min(GRAM, len(words))
        if n:
            wanted.setdefault(n, []).append((question["index"], hash_grams(words, n)))
    tables = {}
    for n, items in wanted.items():
        grams = np.concatenate([grams for _, grams in items])
        owners = np.concatenate([np.full(len(grams), index) for index, grams in items])
        order = np.argsort(grams, kind="stable")
        tables[n] = grams[order], owners[order]
    found = np.zeros(len(questions), bool)
    for text in training_texts(source):
        words = hash_words(text, known)
        for n, (grams, owners) in tables.items():
            seen = np.unique(hash_grams(words, n))
            left, right = np.searchsorted(grams, seen, "left"), np.searchsorted(grams, seen, "right")
            for start, end in zip(left[right > left], right[right > left], strict=True):
                found[owners[start:end]] = True
    return found


def contamination_report(rows, questions, source):
    """Overlap with the training data and scores with and without the questions concerned, JSON-ready."""
    found = contaminated(questions, source)
    keys = np.array([LETTERS.index(question["key"]) for question in questions], np.int8)
    report = {
        "source": source,
        "questions": [questions[i]["id"] for i in np.flatnonzero(found)],
        "count": int(found.sum()),
        "checkpoints": [],
    }
    for row in rows:
        average = measure(row.answers, keys)[:, 1]
        parts = {"all": average, "without": average[~found], "only": average[found]}
        report["checkpoints"].append(
            {"name": row.name} | {k: float(v.mean()) if len(v) else None for k, v in parts.items()}
        )
    return report
