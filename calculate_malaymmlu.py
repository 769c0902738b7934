"""Score MalayMMLU generations: accuracies as the original project prints them.

    python3 calculate_malaymmlu.py --pattern "malaymmlu-ds3-qwen3-32b-lora-256-checkpoint-*"
    python3 calculate_malaymmlu.py --pattern "malaymmlu-*" --questions data/questions.json

Reads `<directory>/generations.jsonl` (and `args.json`, if there is one) of every directory matched, and the question file; needs no GPU and no
vLLM. Prints to stdout.
"""

import fnmatch
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HUB_DATASET = "UMxYTLAILabs/MalayMMLU"
HUB_FILE = "MalayMMLU_0shot.json"
# What the published file holds. The hub's commit cannot be checked without a network, so content is checked instead of a name: a file
# with other counts is not the benchmark. The commit that was actually read goes into args.json.
HUB_COUNTS = {"STEM": 2443, "Language": 6288, "Social science": 6918, "Others": 4169, "Humanities": 4395}
LETTERS = "ABCDEF"

# What became of a response. Letters are 0..5 in the arrays below, these are the rest.
NONE, AMBIGUOUS, TRUNCATED, MISSING = -1, -2, -3, -4
OUTCOMES = {"none": NONE, "ambiguous": AMBIGUOUS, "truncated": TRUNCATED}


# ---- questions ------------------------------------------------------------------------------------------------------------------------


def download_questions(revision=None):
    """Fetch the benchmark's file from the hub; returns (path, the commit it came from). Raises ValueError if it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(HUB_DATASET, HUB_FILE, repo_type="dataset", revision=revision)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot fetch {HUB_FILE} from the hub ({reason}); give a local copy with --questions FILE") from error
    parts = Path(path).parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
    return path, commit


def load_questions(path):
    """Read a question file in MalayMMLU's format (a JSON list, or JSON lines) and check it row by row.

    Returns a list of dicts: `index` (position), `id`, `prompt`, `key` (a letter), `letters` (those on offer, e.g. "ABCD"), `options` (letter -> text,
    without the letter), `subject`, `category`, `level`. Raises ValueError naming the file, the row and the field.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the question file {path}: {error}") from error
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON (line {error.lineno}: {error.msg}); expected MalayMMLU's list of questions") from error
    if not rows:
        raise ValueError(f"{path} holds no question")
    return [check_question(row, index, path) for index, row in enumerate(rows)]


def check_question(row, index, path):
    """One raw row -> the dict of `load_questions`. Raises ValueError naming the row and the field."""

    def fail(what):
        raise ValueError(f"{path}, row {index}: {what}")

    if not isinstance(row, dict):
        fail(f"expected an object, found {type(row).__name__}")
    for name in ("prompt", "key", "category"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            fail(f"`{name}` is missing or is not a non-empty string (found {row.get(name)!r})")
    options = parse_options(row.get("options"), row["prompt"])
    count = row.get("num_options")
    count = len(options) if count is None else count
    if isinstance(count, bool) or not isinstance(count, (int, float)) or int(count) != count or not 2 <= count <= len(LETTERS):
        fail(f"`num_options` must be 2 to {len(LETTERS)}, found {count!r}")
    letters = LETTERS[: int(count)]
    key = row["key"].strip().upper()
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
OPTION_LINE = re.compile(r"\s*\(?([A-F])(?:\s*[.):\-–]\s*|\s+)(\S.*?)\s*")


def parse_options(options, prompt):
    """The options as letter -> text, from the row's list (or newline-joined string) or, without one, from the prompt's lines."""
    if isinstance(options, str):
        options = [line for line in options.splitlines() if line.strip()]
    found = {}
    if isinstance(options, list) and options:
        for letter, option in zip(LETTERS, options, strict=False):
            match = OPTION_LINE.fullmatch(str(option))
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


# ---- from a response to a letter ------------------------------------------------------------------------------------------------------

NAMED = r"(?:pilihan|opsyen|opsi|option|choice|huruf|letter|jawapan|answer)"
WRAP = r"[\s*_$`\"'“‘(\[{]*"  # markdown, quotes, brackets and dollars around a letter
LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|bf)\s*\{([^{}]*)\}")
LATEX_SPACE = re.compile(r"\\[,;:! ]|\\quad|\\qquad|~")
ONE_LETTER = re.compile(rf"(?:{NAMED}\W{{0,3}}\s*)?[(\[]?([A-Fa-f])[)\]]?[.:,;!]*", re.I)
LETTER_AND_TEXT = re.compile(r"[(\[]?([A-F])(?:[)\]]?\s*[.):\-–—,=]\s*|\s+)(\S.*)", re.S)
LONE_LETTERS = re.compile(r"(?<![\w\\'’-])([A-F])(?![\w'’-])")
SEVERAL = re.compile(r"\s*[)\]*_.]*\s*(?:,|/|&|\bdan\b|\batau\b|\band\b|\bor\b|\bserta\b)\s*" + WRAP + rf"(?:{NAMED}\s*)?([A-F])(?![\w'’])")
FORWARD = re.compile(
    rf"\b(?:jawap(?:an)?(?:nya)?|jwpn|answers?|pilihan|opsyen|option|choice|kesimpulan(?:nya)?|pilih|memilih|choose|select|pick)\b"
    rf"(?P<middle>[^.\n:=?]{{0,60}}?)"
    rf"(?:\s*(?:\b(?:ialah|adalah|iaitu|yaitu|merupakan|is|are|be|would be)\b|[:=]|->|→|-|–)\s*|\s+|(?=[*(\[$\"'“‘]))+?"
    rf"{WRAP}(?:\b{NAMED}\b\s*)?{WRAP}(?:(?P<upper>[A-F])(?![\w'’-])|(?P<lower>[a-f])(?=[)\].*_$\"”’}}]*\s*(?:\.|\)|$|\n)))",
    re.I,
)
BACKWARD = re.compile(
    rf"(?:\b{NAMED}\s+)?{WRAP}(?<![\w\\'’-])([A-F])(?![\w'’-])[)\].*_$\"”’}}]*\s*(?:\([^()\n]{{0,80}}\)\s*)?(?:ialah|adalah|merupakan|is)\s+"
    r"(?:the\s+|pilihan\s+|jawapan\s+|option\s+|yang\s+)*(?P<verdict>jawapan|pilihan|answer|correct|betul|benar|tepat|right)\b"
)
NEGATION = re.compile(r"\b(?:bukan|tidak|tak|salah|silap|kurang|not|isn't|wrong|incorrect|never|elakkan|kecuali|except)\b", re.I)
AFTER_COLON = re.compile(r"\b(?:jawapan(?:nya)?|answer)\b[^\n:]{0,40}(?::|\bialah\b|\badalah\b|\bis\b)\s*(?P<rest>[^\n]+)", re.I)


def balanced_boxes(text):
    """Contents of every `\\boxed{...}` (or `\\fbox{...}`) whose braces balance, last one first."""
    boxes = []
    end = len(text)
    while True:
        start = max(text.rfind("boxed", 0, end), text.rfind("\\fbox", 0, end))
        if start < 0:
            return boxes
        end = start
        brace = start + 5
        while brace < len(text) and text[brace] == " ":
            brace += 1
        if brace >= len(text) or text[brace] != "{":
            continue
        depth = 0
        for position in range(brace, min(len(text), brace + 2000)):
            if text[position] == "{":
                depth += 1
            elif text[position] == "}":
                depth -= 1
                if depth == 0:
                    boxes.append(text[brace + 1 : position])
                    break


def clean(text):
    """Take LaTeX text commands, dollars, markdown and outer punctuation off a short piece of an answer."""
    previous = None
    while previous != text:
        previous, text = text, LATEX_TEXT.sub(r" \1 ", text)
    text = LATEX_SPACE.sub(" ", text)
    text = text.replace("\\(", "").replace("\\)", "").replace("\\{", "").replace("\\}", "")
    return re.sub(r"\s+", " ", text.strip(" \t\r\n$*_`\"'“”‘’{}")).strip()


def normal(text):
    """Compare options by this: lower case, no markup, no space or punctuation at the ends, single spaces."""
    return re.sub(r"\s+", " ", clean(text).lower()).strip(" .,;:!?()[]\"'`*_$")


def by_text(piece, question):
    """The letters whose option text is `piece` (after normalisation)."""
    wanted = normal(piece)
    return [letter for letter, text in question["options"].items() if wanted and normal(text) == wanted]


def read_piece(piece, question):
    """A short piece that should be the answer itself (a box's content, a last line) -> a letter, "ambiguous" or None."""
    piece = clean(piece)
    match = ONE_LETTER.fullmatch(piece)
    if match:
        letter = match.group(1).upper()
        return letter if letter in question["letters"] else None
    same = by_text(piece, question)
    if len(same) == 1:
        return same[0]
    named = re.sub(rf"^(?:{NAMED}\b\W*)+(?:(?:ialah|adalah|is)\b\W*)?", "", piece, flags=re.I)
    match = LETTER_AND_TEXT.fullmatch(named)
    if match and match.group(1) in question["letters"]:
        letter, rest = match.groups()
        if ONE_LETTER.fullmatch(clean(rest)) or SEVERAL.match(named[match.end(1) :]):
            return "ambiguous"
        others = by_text(rest, question)
        if others and letter not in others:
            return "ambiguous"  # "B. text of C"
        own = normal(question["options"].get(letter, ""))
        if others or not own or named[match.end(1)] != " " or normal(rest).startswith(own):
            return letter
    lone = set(LONE_LETTERS.findall(piece)) & set(question["letters"])
    if len(lone) > 1:
        return "ambiguous"
    return None


def read_statement(text, question):
    """The last "Jawapan: X" (or "X ialah jawapan ...") in `text` -> a letter, "ambiguous" or None."""
    found = []
    for match in FORWARD.finditer(text):
        letter = match.group("upper") or match.group("lower")
        # under re.I [A-F] also takes lower case: "the answer is a mammal" must not be A
        if match.group("upper") and letter.islower() and not re.match(r"[)\].*_$\"”’}]*\s*(?:\.|\)|$|\n)", text[match.end() :]):
            continue
        if NEGATION.search(match.group("middle")):
            continue
        found.append((match.start(), match.end(), letter.upper()))
    for match in BACKWARD.finditer(text):
        found.append((match.start(), match.end(1), match.group(1)))
    for match in AFTER_COLON.finditer(text):
        same = by_text(match.group("rest"), question)
        if len(same) == 1:
            found.append((match.start(), match.start("rest"), same[0]))
    found = [item for item in found if item[2] in question["letters"]]
    if not found:
        return None
    _, end, letter = max(found, key=lambda item: item[1])
    several = SEVERAL.match(text[end : end + 40])
    if several and several.group(1) in question["letters"] and several.group(1) != letter:
        return "ambiguous"
    return letter


def read_lines(text, question):
    """A lone letter or an option's text on the last line; failing that, on the first -> a letter, "ambiguous" or None."""
    lines = [line.strip() for line in text.splitlines() if clean(line)]
    if not lines:
        return None
    opened = {}
    for line in lines:
        match = OPTION_LINE.fullmatch(clean(line)) or ONE_LETTER.fullmatch(clean(line))
        if match and match.group(1) in question["letters"]:
            opened.setdefault(match.group(1), line)
    last = read_piece(lines[-1], question)
    bare = ONE_LETTER.fullmatch(clean(lines[-1]))
    if last == "ambiguous" or (last and (bare or len(opened) < 2)):
        return last
    if len(opened) > 1:
        return "ambiguous"  # the options were repeated and none was chosen
    return read_piece(lines[0], question)


def extract(text, question, finish_reason="stop", thinking=False):
    """Read the chosen letter out of a response.

    text: the raw response. question: a dict with `letters` and `options`. finish_reason: vLLM's; "length" means cut off. thinking: the
    prompt had already opened a `<think>` block. Returns (outcome, letter): ("answered", "B"), or ("ambiguous" | "truncated" | "none", None).

    Rules in order: what is inside the reasoning block is never the answer; the last balanced box that says something; the last explicit
    statement ("Jawapan: B", "the answer is B", "B ialah jawapan yang betul"); a lone letter or an option's text on the last line, else on
    the first. Only letters on offer count. Of a response that was cut off only the first two rules are used, because its last line is arbitrary.
    """
    cut = finish_reason == "length"
    head, closed, tail = text.rpartition("</think>")
    if closed:
        text = tail
    elif thinking or "<think>" in head + tail:
        return ("truncated" if cut else "none"), None
    for box in balanced_boxes(text) if "box" in text else ():
        if not clean(box):
            continue  # an empty box only repeats the instruction
        letter = read_piece(box, question)
        if letter == "ambiguous":
            return "ambiguous", None
        if letter:
            return "answered", letter
        break
    letter = read_statement(text, question)
    if letter is None and not cut:
        letter = read_lines(text, question)
    if letter == "ambiguous":
        return "ambiguous", None
    if letter:
        return "answered", letter
    return ("truncated" if cut else "none"), None


# ---- reading generations --------------------------------------------------------------------------------------------------------------


def natural(name):
    """Sort key that puts checkpoint-320 before checkpoint-960 and before checkpoint-1200."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(name)) if part]


def find_directories(pattern, root="."):
    """Directories with generations that match `pattern` (comma-separated globs) by their name or by a name in their args.json.

    Returns [(name to print, path)] in natural order; a checkpoint that two directories hold is taken once. Raises ValueError if nothing matches.
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
            print(f"note: {path} and {seen[identity]} hold the same checkpoint; only the latter is counted", file=sys.stderr)
            continue
        seen[identity] = path
        found.append((matched, path))
    for glob in globs:  # a path outside the current directory
        if os.sep in glob:
            base = Path(glob).parent
            found += [item for item in find_directories(Path(glob).name, base) if item[1] not in [path for _, path in found]]
    if not found:
        there = ", ".join(sorted({p.parent.name for p in Path(root).glob("*/generations.jsonl")}, key=natural)) or "none"
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
    """Yield the records of a generations.jsonl. A half-written last line is passed over with a note; any other bad line raises ValueError."""
    with open(path, "rb") as file:
        number = 0
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
                print(f"note: {path}: the last line is half written and is passed over; malaymmlu.py repairs it", file=sys.stderr)


def read_answers(directory, questions, samples=None):
    """Extract every response of a directory -> int8 (questions, samples): a letter's number, or NONE, AMBIGUOUS, TRUNCATED, MISSING."""
    path = Path(directory) / "generations.jsonl"
    codes = {}
    for number, record in enumerate(read_generations(path), 1):
        try:
            index, sample, text = record["index"], record["sample"], record["text"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected index, sample and text, got {str(record)[:80]}") from error
        if not isinstance(index, int) or not 0 <= index < len(questions):
            raise ValueError(f"{path}, line {number}: index {index} is not in the question file (0 to {len(questions) - 1}); give its --questions")
        question = questions[index]
        if "id" in record and record["id"] != question["id"]:
            raise ValueError(f"{path}, line {number}: id {record['id']!r}, but question {index} is {question['id']!r}; wrong --questions")
        if (index, sample) in codes:
            continue  # the first one written counts
        outcome, letter = extract(text, question, record.get("finish_reason"), record.get("thinking", False))
        codes[index, sample] = LETTERS.index(letter) if letter else OUTCOMES[outcome]
    width = samples or max([sample for _, sample in codes], default=0) + 1
    answers = np.full((len(questions), width), MISSING, np.int8)  # (Q, samples)
    for (index, sample), code in codes.items():
        if sample < width:
            answers[index, sample] = code
    return answers


# ---- the original's block -------------------------------------------------------------------------------------------------------------


def original_scores(answers, questions):
    """acc1 and acc3 as the original computes them -> {category: (acc1, acc3)}, categories in the file's order, then "average".

    answers: int8 (Q, samples). acc1: the first sample that has an answer is right. acc3: any sample is right. Without an answer a question is wrong.
    The average is the unweighted mean of the categories.
    """
    keys = np.array([LETTERS.index(question["key"]) for question in questions], np.int8)  # (Q,)
    answered = answers >= 0  # (Q, samples)
    first = np.take_along_axis(answers, answered.argmax(1)[:, None], 1)[:, 0]  # (Q,)
    right_first = answered.any(1) & (first == keys)
    right_any = (answers == keys[:, None]).any(1)
    rows = {}
    for question in questions:
        rows.setdefault(question["category"], []).append(question["index"])
    scores = {name: (int(right_first[index].sum()) / len(index), int(right_any[index].sum()) / len(index)) for name, index in rows.items()}
    scores["average"] = tuple(float(np.mean([score[i] for score in scores.values()])) for i in (0, 1))
    return scores


def print_original(names, all_answers, questions):
    """Print the name and number of answers of each checkpoint, then its block, in the original's format."""
    for name, answers in zip(names, all_answers, strict=True):
        print(name, int((answers >= 0).sum()))
    print()
    for name, answers in zip(names, all_answers, strict=True):
        print(name)
        for category, (acc1, acc3) in original_scores(answers, questions).items():
            print(category, acc1, acc3)
        print()


# ---- command --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Arguments:
    pattern: str = field(metadata={"help": "directories to score: comma-separated globs"})
    questions: str | None = field(default=None, metadata={"help": "question file; default: MalayMMLU from the hub"})
    questions_revision: str | None = field(default=None, metadata={"help": "the hub's revision of the question file"})
    limit: int | None = field(default=None, metadata={"help": "score the first N questions only, as malaymmlu.py --limit asks them"})


def benchmark_questions(path, revision=None):
    """Questions from `path`, or without one from the hub, whose counts are then checked -> (questions, facts for args.json)."""
    commit = None
    source = path or f"{HUB_DATASET}/{HUB_FILE}"
    if path is None:
        path, commit = download_questions(revision)
    questions = load_questions(path)
    if commit is not None or source != path:
        counts = {}
        for question in questions:
            counts[question["category"]] = counts.get(question["category"], 0) + 1
        if counts != HUB_COUNTS:
            raise ValueError(f"{source} holds {counts}, not MalayMMLU's {HUB_COUNTS}; pick another --questions_revision")
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return questions, {"source": str(source), "revision": commit, "sha256": sha256, "rows": len(questions)}


def main():
    from transformers import HfArgumentParser

    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    try:
        questions, _ = benchmark_questions(args.questions, args.questions_revision)
        questions = questions[: args.limit]
        found = find_directories(args.pattern)
        answers = [read_answers(path, questions) for _, path in found]
    except ValueError as error:
        sys.exit(f"error: {error}")
    print_original([name for name, _ in found], answers, questions)


if __name__ == "__main__":
    main()
