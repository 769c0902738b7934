"""Generation directories: what malaymmlu.py writes (append-only, never a sample twice) and what calculate_malaymmlu.py
reads."""

import fnmatch
import json
import os
import re
import sys
from collections import deque
from pathlib import Path

import numpy as np

from malaysian_sft.extraction import extract
from malaysian_sft.locks import hold
from malaysian_sft.questions import LETTERS

# What became of a response. Letters are 0..5 in the arrays below, these are the rest.
NONE, AMBIGUOUS, TRUNCATED, MISSING = -1, -2, -3, -4
OUTCOMES = {"none": NONE, "ambiguous": AMBIGUOUS, "truncated": TRUNCATED}


def natural(name):
    """Sort key that puts checkpoint-320 before checkpoint-960 and before checkpoint-1200."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(name)) if part]


def find_directories(pattern, root="."):
    """Directories with generations that match `pattern` (comma-separated globs) by their name or by a name in their
    args.json.

    Returns [(name to print, path)] in natural order; a checkpoint that two directories hold is taken once. Raises
    ValueError if nothing matches.
    """
    found, seen = [], {}
    globs = [part.strip() for part in pattern.split(",") if part.strip()]
    for path in sorted((p.parent for p in Path(root).glob("*/generations.jsonl")), key=lambda p: natural(p.name)):
        args = read_args(path)
        names = [path.name] + [f"malaymmlu-{name}" for name in args.get("names", [])]
        matched = next((name for glob in globs for name in names if fnmatch.fnmatchcase(name, glob.rstrip("/"))), None)
        if matched is None:
            continue
        identity = args.get("names", [path.name])[0], json.dumps(args.get("adapter_fingerprint"))
        if identity in seen:
            print(
                f"note: {path} and {seen[identity]} hold the same checkpoint; only the latter is counted",
                file=sys.stderr,
            )
            continue
        seen[identity] = path
        found.append((matched, path))
    for glob in globs:  # a path outside the current directory
        if os.sep in glob:
            base = Path(glob).parent
            found += [
                item for item in find_directories(Path(glob).name, base) if item[1] not in [path for _, path in found]
            ]
    if not found:
        there = (
            ", ".join(sorted({p.parent.name for p in Path(root).glob("*/generations.jsonl")}, key=natural)) or "none"
        )
        raise ValueError(f"no directory with a generations.jsonl matches {pattern!r}; found: {there}")
    return sorted(found, key=lambda item: natural(item[0]))


def read_args(directory):
    """args.json of a generation directory, {} without one. Raises ValueError if it is not JSON."""
    path = Path(directory) / "args.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it or generate again") from error


def read_generations(path):
    """Yield the records of a generations.jsonl. A half-written last line is passed over with a note; another bad line
    raises ValueError."""
    # json.loads guesses the encoding of every line, which costs as much as the rest
    decode = json.JSONDecoder().raw_decode
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode().strip()
                record, end = decode(text)
                if end != len(text):
                    raise ValueError(f"something follows the first {end} characters")
                yield record
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
                print(
                    f"note: {path}: the last line is half written and is passed over; malaymmlu.py repairs it",
                    file=sys.stderr,
                )


def read_answers(directory, questions, limited=False, samples=1):
    """Extract every response of a directory -> int8 (questions, samples): a letter's number, or NONE, AMBIGUOUS,
    TRUNCATED, MISSING.

    limited: `questions` is only the beginning of the file, so records beyond it are passed over instead of refused.
    samples: how many were asked for; what a run that has not finished lacks is MISSING.
    """
    path = Path(directory) / "generations.jsonl"
    codes = {}
    for number, record in enumerate(read_generations(path), 1):
        try:
            index, sample, text = record["index"], record["sample"], record["text"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected index, sample and text, got {str(record)[:80]}"
            ) from error
        if not isinstance(text, str) or not isinstance(sample, int) or sample < 0:
            raise ValueError(f"{path}, line {number}: expected a text and a sample from 0 up, got {str(record)[:80]}")
        if limited and isinstance(index, int) and index >= len(questions):
            continue
        if not isinstance(index, int) or not 0 <= index < len(questions):
            raise ValueError(
                f"{path}, line {number}: no question {index} in the question file (0 to {len(questions) - 1}); wrong"
                " --questions"
            )
        question = questions[index]
        if "id" in record and record["id"] != question["id"]:
            raise ValueError(
                f"{path}, line {number}: id {record['id']!r}, but question {index} is {question['id']!r}; wrong"
                " --questions"
            )
        if (index, sample) in codes:
            continue  # the first one written counts
        outcome, letter = extract(text, question, record.get("finish_reason"), record.get("thinking", False))
        codes[index, sample] = LETTERS.index(letter) if letter else OUTCOMES[outcome]
    width = max([samples - 1, *(sample for _, sample in codes)]) + 1
    answers = np.full((len(questions), width), MISSING, np.int8)  # (Q, samples)
    for (index, sample), code in codes.items():
        answers[index, sample] = code
    return answers


# settings that change what is generated: output made with other values is not continued
FIXED = (
    "model_fingerprint",
    "adapter_fingerprint",
    "how",
    "protocol",
    "system_prompt",
    "answer_prefix",
    "chat_template_kwargs",
    "sampling",
    "seed",
    "retries",
    "dtype",
    "batch_invariant",
    "questions_sha256",
)


class Output:
    """generations.jsonl of one row: locked, repaired, checked against the settings, and the queue of what is missing.

    Raises ValueError if another run holds the directory, if its output was made with other settings, or if a line is
    damaged.
    """

    def __init__(self, job, wanted, questions, samples):
        self.job, self.directory, self.wanted = job, job.directory, wanted
        self.path = self.directory / "generations.jsonl"
        self.directory.mkdir(parents=True, exist_ok=True)
        busy = f"{self.directory} is being written by another run; wait for it or stop it"
        self.lock = hold(self.directory / ".lock", busy)
        self.check_settings()
        self.done = self.repair()
        wanted = [(question["index"], sample) for question in questions for sample in range(samples)]
        self.queue = deque(unit for unit in wanted if unit not in self.done)
        self.total, self.missing = len(wanted), len(self.queue)
        self.tokens, self.started, self.reported = 0, None, False
        self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.write_args()

    def check_settings(self):
        path = self.directory / "args.json"
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        if not path.exists():
            raise ValueError(
                f"{self.directory} has generations but no args.json, so what made them is unknown; move it away"
            )
        made = json.loads(path.read_text(encoding="utf-8"))
        for name in FIXED:
            old, new = json.dumps(made.get(name)), json.dumps(self.wanted[name])
            if old != new:
                raise ValueError(
                    f"{self.directory} was generated with {name} = {old}, now it is {new}; "
                    "use the old setting, or move the directory away to start again"
                )

    def write_args(self):
        """Write args.json under a temporary name, then rename it."""
        temporary = self.directory / "args.json.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(self.wanted, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.directory / "args.json")

    def repair(self):
        """Read what is there, cut off a half-written last line -> set of (index, sample)."""
        done = set()
        if not self.path.exists():
            return done
        good = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    print(f"{self.path}: cut off a half-written last line ({len(line)} bytes)")
                    break
                try:
                    record = json.loads(line)
                    unit = record["index"], record["sample"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{self.path}, line {number} is damaged ({error}); delete the line to have it made again"
                    ) from error
                if unit in done:
                    raise ValueError(
                        f"{self.path}, line {number}: question {unit[0]}, sample {unit[1]} occurs twice; delete one of"
                        " the two"
                    )
                done.add(unit)
                good += len(line)
        if good < self.path.stat().st_size:
            os.truncate(self.path, good)
        return done

    def append(self, records):
        """Append records durably. Raises RuntimeError if the disk is full; what was written before stays whole."""
        # ASCII: a text may hold characters (U+0085, U+2028) at which some readers would break a line
        data = memoryview("".join(json.dumps(record) + "\n" for record in records).encode())
        whole = os.fstat(self.file).st_size
        try:
            while data:
                data = data[os.write(self.file, data) :]
            os.fsync(self.file)
        except OSError as error:
            os.ftruncate(self.file, whole)
            raise RuntimeError(
                f"cannot write {self.path}: {error.strerror}; {self.total - self.missing} of {self.total} samples are"
                " safe; make room and run the same command again"
            ) from error
        self.missing -= len(records)
        self.tokens += sum(record["completion_tokens"] for record in records)

    def summary(self):
        state = f"{self.missing} to make" if self.missing else "nothing to do"
        return f"{self.directory}: {self.total - self.missing} of {self.total} samples there, {state}"

    def close(self):
        os.close(self.file)
        self.lock.close()
