"""Generation directories: what malaymmlu.py writes (append-only, never a sample twice) and what calculate_malaymmlu.py
reads."""

import fnmatch
import json
import os
import re
import sys
from array import array
from collections import Counter, deque
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from malaysian_sft.extraction import both_by_rules
from malaysian_sft.locks import hold
from malaysian_sft.questions import LETTERS, SURROGATE
from malaysian_sft.quick_reading import quick

# What became of a response. Letters are 0..5 in the arrays below, these are the rest.
NONE, AMBIGUOUS, TRUNCATED, MISSING = -1, -2, -3, -4
WAITING = -5  # in an array of `read_both` only: it is for the rules to read
MOST_WAITING = 2_000_000  # characters of responses
MOST_SAMPLES = 1_000  # of a question; a larger number in a record is a mistake
HALF_WRITTEN = "the last line is half written and is passed over; malaymmlu.py repairs it"
DELETE_IT = "delete the line, and malaymmlu.py makes the sample again"
OUTCOMES = {"none": NONE, "ambiguous": AMBIGUOUS, "truncated": TRUNCATED}


# settings by which two directories of one checkpoint differ, when they do
ASKED = (
    "protocol",
    "seed",
    "sampling",
    "samples",
    "system_prompt",
    "answer_prefix",
    "chat_template_kwargs",
    "retries",
    "questions_sha256",
)


def natural(name):
    """Sort key that puts checkpoint-320 before checkpoint-960 and before checkpoint-1200."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(name)) if part]


def matches(name, globs):
    """Whether a name is one of the globs or matches one; a run's name may hold what is special in a glob."""
    return any(name == glob or fnmatch.fnmatchcase(name, glob) for glob in globs)


def find_directories(pattern, root="."):
    """Directories with generations that match `pattern` (comma-separated globs) by their name or by a name in their
    args.json.

    Returns [(name to print, path)] in natural order; a checkpoint that two directories hold is taken once. Raises
    ValueError if nothing matches.
    """
    found, seen = [], {}
    globs = [part.strip().rstrip("/") for part in pattern.split(",") if part.strip()]
    for path in sorted((p.parent for p in Path(root).glob("*/generations.jsonl")), key=lambda p: natural(p.name)):
        try:
            args = read_args(path)
        except ValueError as error:
            if matches(path.name, globs):
                raise
            print(f"note: {error}; {path} is passed over", file=sys.stderr)
            continue
        names = [path.name] + [f"malaymmlu-{name}" for name in args.get("names", [])]
        matched = next((name for glob in globs for name in names if matches(name, [glob])), None)
        if matched is None:
            continue
        # another seed or protocol is another row
        settings = [args.get(name) for name in ("adapter_fingerprint", *ASKED)]
        identity = args.get("names", [path.name])[0], json.dumps(settings, sort_keys=True)
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
    return sorted(told_apart(found), key=lambda item: natural(item[0]))


def told_apart(found):
    """[(name, path)] where a name that several directories have becomes the directory's own, or else its path."""
    for rename in (lambda path: path.name, str):
        names = Counter(name for name, _ in found)
        found = [(name if names[name] == 1 else rename(path), path) for name, path in found]
    return found


# key of args.json -> (what is expected, in words; whether a value is that)
TEXT = "a text or null", lambda value: value is None or isinstance(value, str)
ARGS = {
    "names": (
        "a list of names",
        lambda value: isinstance(value, list) and value and all(isinstance(name, str) and name for name in value),
    ),
    "samples": (
        f"a whole number from 1 to {MOST_SAMPLES:,}",
        lambda value: type(value) is int and 1 <= value <= MOST_SAMPLES,
    ),
    "retries": ("a whole number from 0 up", lambda value: type(value) is int and value >= 0),
    "protocol": ('"reasoning" or "first_token"', lambda value: value in ("reasoning", "first_token")),
    "answer_prefix": ('"user", "assistant" or null', lambda value: value in ("user", "assistant", None)),
    **dict.fromkeys(("adapter", "questions_revision", "questions_sha256"), TEXT),
}


def read_object(path, mend=""):
    """The JSON object in a file. Raises ValueError naming the file, and `mend`, if it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}){mend}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is {ascii(found)[:80]}; expected an object{mend}")
    return found


def read_args(directory):
    """args.json of a generation directory, {} without one. Raises ValueError naming the file, and the key whose value
    malaymmlu.py does not write."""
    path = Path(directory) / "args.json"
    if not path.exists():
        return {}
    mend = "; mend it, or move the directory away and generate again"
    made = read_object(path, mend)
    for name, (expected, holds) in ARGS.items():
        if name in made and not holds(made[name]):
            raise ValueError(f"{path}: {name} is {ascii(made[name])[:80]}; expected {expected}{mend}")
    return made


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
                    f"note: {path}: {HALF_WRITTEN}",
                    file=sys.stderr,
                )


class Record(msgspec.Struct, gc=False):
    """What scoring needs of a line; msgspec reads it several times as fast as json does, and passes over the rest."""

    index: int
    sample: int
    text: str
    id: Any = msgspec.UNSET
    finish_reason: Any = None
    thinking: Any = False


def read_records(path):
    """Yield (line number, `Record`) of a generations.jsonl, as `read_generations` reads it. Raises ValueError naming
    the line that is not a record."""
    decode = msgspec.json.Decoder(Record).decode
    with open(path, "rb", buffering=1 << 20) as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    print(f"note: {path}: {HALF_WRITTEN}", file=sys.stderr)
                    return
                raise ValueError(f"{path}, line {number}: {what_is_wrong(line)}; {DELETE_IT}") from error


def what_is_wrong(line):
    """Why a line is not a record, in words."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as failure:
        return f"not JSON ({failure})"
    shown = ascii(record)[:80]
    if not isinstance(record, dict) or not {"index", "sample", "text"} <= record.keys():
        return f"expected index, sample and text, got {shown}"
    if SURROGATE.search(json.dumps(record, ensure_ascii=False)):
        return "half of a surrogate pair (such as \\ud83d alone), which is no character"
    return f"expected a text and a sample and an index from 0 up, got {shown}"


def read_answers(directory, questions, limited=False, samples=1):
    """Extract every response of a directory -> int8 (questions, samples): a letter's number, or NONE, AMBIGUOUS,
    TRUNCATED, MISSING.

    limited: `questions` is only the beginning of the file, so records beyond it are passed over instead of refused.
    samples: how many were asked for; what a run that has not finished lacks is MISSING.
    """
    return read_both(directory, questions, limited, samples)[0]


def read_both(directory, questions, limited=False, samples=1):
    """`read_answers`, and the same by strict reading, in one pass over the file -> int8 (questions, samples) twice."""
    path, count = Path(directory) / "generations.jsonl", len(questions)
    codes = {letter: number for number, letter in enumerate(LETTERS)} | OUTCOMES
    width, said = samples, array("b", [MISSING]) * (count * samples)
    strict = said[:]
    waiting, characters = [], 0
    for number, record in read_records(path):
        index, sample = record.index, record.sample
        if not 0 <= index < count or sample < 0:
            if limited and index >= count and sample >= 0:
                continue
            raise ValueError(f"{path}, line {number}: {out_of_range(record, count)}")
        question = questions[index]
        if record.id is not msgspec.UNSET and record.id != question["id"]:
            raise ValueError(f"{path}, line {number}: {other_id(record, question)}")
        if sample >= width:
            read_waiting(waiting, said, strict, codes)
            said, strict = widened(said, width, sample + 1), widened(strict, width, sample + 1)
            width = sample + 1
        place = index * width + sample
        if said[place] != MISSING:
            continue  # the first one written counts
        found = quick(record.text, question, record.thinking)
        if found:
            said[place] = codes[found[0]]
            strict[place] = said[place] if found[1] else TRUNCATED if record.finish_reason == "length" else NONE
            continue
        said[place] = WAITING
        waiting.append((place, question, record))
        characters += len(record.text)
        if characters > MOST_WAITING:
            characters = 0
            read_waiting(waiting, said, strict, codes)
    read_waiting(waiting, said, strict, codes)
    return tuple(np.array(one).reshape(count, width) for one in (said, strict))


def read_waiting(waiting, said, strict, codes):
    """Put what the rules read into `said` and `strict`, and empty `waiting`. Many responses at a time, because the
    rules are quicker when nothing else has the processor's cache."""
    for place, question, record in waiting:
        read, read_strictly = both_by_rules(record.text, question, record.finish_reason, record.thinking)
        said[place] = codes[read[1] or read[0]]
        strict[place] = codes[read_strictly[1] or read_strictly[0]]
    waiting.clear()


def out_of_range(record, count):
    if record.sample < 0:
        return f"expected a text and a sample from 0 up, got sample {record.sample}"
    return f"no question {record.index} in the question file (0 to {count - 1}); wrong --questions"


def other_id(record, question):
    return f"id {record.id!r}, but question {record.index} is {question['id']!r}; wrong --questions"


def widened(codes, width, wanted):
    """A flat array of rows of `width` codes with rows of `wanted`; what is new is MISSING. Raises ValueError for a
    number of samples that is a mistake."""
    if wanted > MOST_SAMPLES:
        raise ValueError(f"sample {wanted - 1} is beyond the {MOST_SAMPLES:,} samples a question may have")
    more = np.full((len(codes) // width, wanted - width), MISSING, np.int8)
    return array("b", np.hstack([np.reshape(codes, (-1, width)), more]).tobytes())


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

    def __init__(self, job, wanted, questions, samples, limit=None):
        self.job, self.directory, self.wanted = job, job.directory, wanted
        self.path = self.directory / "generations.jsonl"
        self.directory.mkdir(parents=True, exist_ok=True)
        busy = f"{self.directory} is being written by another run; wait for it or stop it"
        self.lock = hold(self.directory / ".lock", busy)
        self.check_settings()
        self.done = self.repair(questions, samples)
        wanted = [(question["index"], sample) for question in questions[:limit] for sample in range(samples)]
        self.queue = deque(unit for unit in wanted if unit not in self.done)
        self.total, self.missing = len(wanted), len(self.queue)
        self.tokens, self.started, self.reported = 0, None, False
        self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if self.missing:
            self.write_args()

    def check_settings(self):
        path = self.directory / "args.json"
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        if not path.exists():
            raise ValueError(
                f"{self.directory} has generations but no args.json, so what made them is unknown; move it away"
            )
        made = read_args(self.directory)
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

    def repair(self, questions, samples):
        """Read what is there, cut off a half-written last line -> set of (index, sample). Raises ValueError naming a
        line that scoring would refuse, or that no run with these questions and samples writes."""
        done, good = set(), 0
        if not self.path.exists():
            return done
        decode = msgspec.json.Decoder(Record).decode
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.path}, line {number}"
                if not line.endswith(b"\n"):
                    print(f"{self.path}: cut off a half-written last line ({len(line)} bytes)")
                    break
                try:
                    record = decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise ValueError(f"{where} is damaged: {what_is_wrong(line)}; {DELETE_IT}") from error
                unit = record.index, record.sample
                if not 0 <= record.index < len(questions) or record.sample < 0:
                    raise ValueError(f"{where}: {out_of_range(record, len(questions))}; or {DELETE_IT}")
                question = questions[record.index]
                if record.id is not msgspec.UNSET and record.id != question["id"]:
                    raise ValueError(f"{where}: {other_id(record, question)}; or {DELETE_IT}")
                if record.sample >= samples:
                    raise ValueError(
                        f"{where}: sample {record.sample}, but --samples {samples} makes 0 to {samples - 1}; ask for as"
                        " many as there are, or delete the line"
                    )
                if unit in done:
                    raise ValueError(
                        f"{where}: question {unit[0]}, sample {unit[1]} occurs twice; delete one of the two"
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
