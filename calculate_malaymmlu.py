"""Score MalayMMLU generations: the original project's block, then intervals, comparisons, tables, a plot and a report.

    python3 calculate_malaymmlu.py --pattern "malaymmlu-ds3-qwen3-32b-lora-256-checkpoint-*"
    python3 calculate_malaymmlu.py --pattern "malaymmlu-*" --questions data/questions.json --plot accuracy.png --html report.html

Reads `<directory>/generations.jsonl` (and `args.json`, if there is one) of every directory matched, and the question file; needs no GPU and
no vLLM. Prints to stdout; `--json`, `--csv`, `--markdown`, `--plot` and `--html` name files to write as well.

Measures, per question and then averaged: acc@1 (sample 0 is right), average (share of the samples that are right), majority (of the
samples with an answer; a tie counts as the chance of picking the key among the tied letters), any (one of the samples is right; its chance
level is high, so it is never the headline). Micro weighs every question equally, macro every category. A sample without an answer is wrong.
Intervals resample questions, never samples, because the samples of a question are not independent; they are stratified by category.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HUB_DATASET = "UMxYTLAILabs/MalayMMLU"
HUB_FILE = "MalayMMLU_0shot.json"
# The release of October 2024 and its checksum, as the hub's page of that file states them: the data of the official leaderboard. In August
# 2025 about a dozen questions were repaired; `--questions_revision main` takes what the hub holds now, and a lock file holds on to it.
HUB_REVISION = "e765ce2227db84be0084f4a02b3408f562b94f99"
HUB_SHA256 = "70b67e845e2199ba39be7905cbcf933d155dcb17a678c978385c6b8a10a29464"
HUB_LOCK = "malaymmlu.lock.json"
# What every release holds: a file with other counts is not the benchmark.
HUB_COUNTS = {"STEM": 2443, "Language": 6288, "Social science": 6918, "Others": 4169, "Humanities": 4395}
LETTERS = "ABCDEF"

# What became of a response. Letters are 0..5 in the arrays below, these are the rest.
NONE, AMBIGUOUS, TRUNCATED, MISSING = -1, -2, -3, -4
OUTCOMES = {"none": NONE, "ambiguous": AMBIGUOUS, "truncated": TRUNCATED}


# ---- questions ------------------------------------------------------------------------------------------------------------------------


def download_questions(revision):
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


def benchmark_questions(path, revision=None, root=None):
    """Questions from `path`, or without one from the hub -> (questions, facts for args.json: source, revision, sha256, rows).

    A file from the hub is verified: the default revision against the commit and the checksum above. For another one (a branch, a tag, a
    commit) the first reading writes what it got to `<root>/malaymmlu.lock.json`; from then on that commit is fetched and both are verified
    (without a root nothing is written). Raises ValueError naming what differs.
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
            raise ValueError(f"{source} at {asked} has {name} {found[name]}, but {where} says {wanted[name]}; the data is not the same")
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
    """The lock file as {revision asked for: {"revision", "sha256"}}, {} without one. Raises ValueError if it is damaged."""
    if not lock.exists():
        return {}
    try:
        known = json.loads(lock.read_text(encoding="utf-8"))
        return {asked: {"revision": entry["revision"], "sha256": entry["sha256"]} for asked, entry in known.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{lock} is damaged ({error!r}); expected {{asked: {{revision, sha256}}}}; restore or delete it") from error


def load_questions(path, published=False):
    """Read a question file in MalayMMLU's format (a JSON list, or JSON lines) and check it row by row.

    Returns a list of dicts: `index` (position), `id`, `prompt`, `key` (a letter), `letters` (those on offer, e.g. "ABCD"), `options`
    (letter -> text, without the letter), `subject`, `category`, `level`. Raises ValueError naming the file, the row and the field.
    published: the benchmark's own file, whose slips in the options are noted and read as the official program reads them, not refused.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the question file {path}: {error}") from error
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON (line {error.lineno}: {error.msg}); expected MalayMMLU's list of questions") from error
    if not rows:
        raise ValueError(f"{path} holds no question")
    return [check_question(row, index, path, published) for index, row in enumerate(rows)]


def check_question(row, index, path, published=False):
    """One raw row -> the dict of `load_questions`. Raises ValueError naming the row and the field."""

    def fail(what):
        raise ValueError(f"{path}, row {index}: {what}")

    if not isinstance(row, dict):
        fail(f"expected an object, found {type(row).__name__}")
    for name in ("prompt", "key", "category"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            fail(f"`{name}` is missing or is not a non-empty string (found {row.get(name)!r})")
    options, listed = parse_options(row.get("options"), row["prompt"]), bool(row.get("options"))
    count = row.get("num_options")
    count = len(options) if count is None else count
    if isinstance(count, bool) or not isinstance(count, (int, float)) or int(count) != count or not 2 <= count <= len(LETTERS):
        fail(f"`num_options` must be 2 to {len(LETTERS)}, found {count!r}")
    if listed and len(options) != count and not published:
        fail(f"`num_options` is {int(count)}, but `options` has {len(options)}")
    letters = "".join(options) if listed else LETTERS[: int(count)]
    key = row["key"].strip().upper()
    if published and len(key) == 1 and key in LETTERS and key not in letters:
        print(f"note: {path}, row {index}: the key {key} is not among the options {letters}; it counts as on offer", file=sys.stderr)
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
OPTION_LINE = re.compile(r"\s*\(?([A-F])(?:\s*[.):\-–]\s*|\s+)(\S.*?)\s*")


def parse_options(options, prompt):
    """The options as letter -> text, from the row's list (or newline-joined string) or, without one, from the prompt's lines.

    Options that all carry a letter, in order, keep theirs, even if the first is missing ("B. x", "C. y"); others are counted from A.
    """
    if isinstance(options, str):
        options = [line for line in options.splitlines() if line.strip()]
    found = {}
    if isinstance(options, list) and options:
        own = [match.group(1) for match in (OPTION_LINE.fullmatch(str(option)) for option in options) if match]
        if len(own) < len(options) or own != sorted(set(own)):
            own = LETTERS
        for letter, option in zip(own, options, strict=False):
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
LETTER_AND_TEXT = re.compile(r"[(\[]?([A-F])(?:[)\]]?\s*[.):,=]\s*|[)\]]?\s*[\-–—]\s+|\s+)(\S.*)", re.S)
LONE_LETTERS = re.compile(r"(?<![\w\\'’-])([A-F])(?![\w-]|['’]\w)")
WORD = re.compile(r"\w+")
OPENS_WITH_LETTER = re.compile(r"[\s*_$`\"'“‘(\[#>-]*(?:\\\w+\{)?[A-Fa-f](?!\w)")
NAMES_OPTION = re.compile(r"^\W*(?:pilihan|opsyen|option|choice)\b\W*", re.I)
LONE_ANY = re.compile(r"(?<!\w)[A-Fa-f](?!\w)")
SEVERAL = re.compile(
    r"\s*[)\]*_.]*\s*(?:,|/|&|\bdan\b|\batau\b|\band\b|\bor\b|\bserta\b)\s*" + WRAP + rf"(?:{NAMED}\s*)?([A-F])(?!\w|['’]\w)"
)
FORWARD = re.compile(
    rf"\b(?:jawap(?:an)?(?:nya)?|jwpn|answers?|(?P<mention>pilihan|opsyen|option|choice)|kesimpulan(?:nya)?|pilih|memilih|choose|select|pick)\b"
    rf"(?P<middle>[^.\n:=?]{{0,60}}?)"
    rf"(?:\s*(?:\b(?:ialah|adalah|iaitu|yaitu|merupakan|is|are|be|would be)\b|[:=]|->|→|-|–)\s*|\s+|(?=[*(\[$\"'“‘]))+?"
    rf"{WRAP}(?:\b{NAMED}\b\s*)?{WRAP}(?:(?P<upper>[A-F])(?![\w-]|['’]\w)|(?P<lower>[a-f])(?=[)\].*_$\"”’}}]*\s*(?:\.|\)|$|\n)))",
    re.I,
)
BACKWARD = re.compile(
    r"(?<![\w\\'’-])([A-F])(?![\w-]|['’]\w)[)\].*_$\"”’}]*\s*(?:\([^()\n]{0,80}\)\s*)?"
    r"(?:ialah|adalah|merupakan|is)\s+"
    r"(?:the\s+|pilihan\s+|jawapan\s+|option\s+|yang\s+)*(?P<verdict>jawapan|pilihan|answer|correct|betul|benar|tepat|right)\b"
)
# "pilihan A" only names an option, unless something links the two ("pilihan yang tepat: A") or what follows affirms it
LINKED = re.compile(
    r"[:=>→]|\b(?:ialah|adalah|iaitu|yaitu|merupakan|is|are|be|saya|kami|akhir|final|my)\b|\b(?:betul|benar|tepat|sesuai|correct|right|best)\b",
    re.I,
)
CLOSED = r"[)\].*_$\"”’}}]*[^\S\n]*(?:\([^()\n]{0,80}\)[^\S\n]*)?"  # what may stand between a letter and the rest of its sentence
AFFIRMED = re.compile(
    CLOSED + r"(?:[.!]*[^\S\n]*(?:\n|$)|,?\s*(?:(?:yang|ialah|adalah|merupakan|is|the|paling|most|memang|sebagai|as)\s+)*"
    r"(?:betul|benar|tepat|sesuai|correct|right|best|dipilih|jawapan(?:nya)?|answer)\b)",
    re.I,
)
REJECTED = re.compile(
    CLOSED + r"(?:(?:ialah|adalah|is|pula|juga|jelas|boleh|perlu|dan [A-F]|and [A-F])\s+)*"
    r"(?:salah|silap|tidak|tak|bukan|kurang|not|wrong|incorrect|di(?:tolak|singkirkan))\b",
    re.I,
)
# a text without any of these holds no statement
STEMS = ("jawap", "jwpn", "answer", "pilih", "milih", "opsyen", "opti", "choice", "choose", "kesimpulan", "select", "pick")
KEYWORD = re.compile("|".join(STEMS))  # where FORWARD can begin: much faster to find in lower-case text
STEMS += ("correct", "betul", "benar", "tepat", "right")
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


def remembered(read, piece, question):
    """`read(piece, question)`, remembered in the question: its samples and checkpoints repeat the same short answers again and again."""
    if len(piece) > 120:  # prose, which does not repeat
        return read(piece, question)
    known = question.setdefault("read", {})
    if (read, piece) not in known:
        known[read, piece] = read(piece, question)
    return known[read, piece]


def longest_piece(question):
    """Characters of the longest line or box that can still be an answer and nothing else."""
    return 80 + max(map(len, question["options"].values()), default=0)


def read_piece(piece, question):
    """A short piece that should be the answer itself (a box's content, a last line) -> a letter, "ambiguous" or None."""
    if len(piece) > longest_piece(question):
        return None
    piece = clean(re.sub(r"^(?:[>#•\s]|-\s)+", "", piece))
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
    # nearly always it is on the last line, which is cheap; the whole text costs 0.1 ms for 1,200 characters
    line = text[text.rstrip().rfind("\n") + 1 :]
    start = text.rfind("\n", 0, max(0, len(text) - 200)) + 1
    return (
        (remembered(scan_statements, line, question) if len(line) <= 200 else None)
        or (scan_statements(text[start:], question) if start else None)
        or scan_statements(text, question)
    )


def scan_statements(text, question):
    """`read_statement` over all of `text`."""
    lower = text.lower()
    if not any(stem in lower for stem in STEMS):
        return None
    found, mentions = [], []
    lone = LONE_ANY.search(text)  # without one, only an option's text can be the answer
    for match in forward(text, lower) if lone else ():
        letter = match.group("upper") or match.group("lower")
        # under re.I [A-F] also takes lower case: "the answer is a mammal" must not be A
        if match.group("upper") and letter.islower() and not re.match(r"[)\].*_$\"”’}]*\s*(?:\.|\)|$|\n)", text[match.end() :]):
            continue
        if NEGATION.search(match.group("middle")) or lists_options(match, letter.upper(), text):
            continue
        letter_at = match.start("upper" if match.group("upper") else "lower")
        if not LINKED.search(text, match.start(), letter_at):
            if REJECTED.match(text, letter_at + 1):
                continue
            if match.group("mention"):
                if AFFIRMED.match(text, letter_at + 1):
                    mentions.append((match.start(), match.end(), letter.upper()))
                continue
        found.append((match.start(), match.end(), letter.upper()))
    for match in BACKWARD.finditer(text) if lone else ():
        found.append((match.start(), match.end(1), match.group(1)))
    for match in AFTER_COLON.finditer(text):
        same = by_text(match.group("rest"), question)
        if len(same) == 1:
            found.append((match.start(), match.start("rest"), same[0]))
    found = [item for item in found or mentions if item[2] in question["letters"]]
    if not found:
        return None
    if found[0] in mentions and len({letter for *_, letter in found}) > 1:
        return "ambiguous"
    _, end, letter = max(found, key=lambda item: item[1])
    several = SEVERAL.match(text[end : end + 40])
    if several and several.group(1) in question["letters"] and several.group(1) != letter:
        return "ambiguous"
    return letter


def forward(text, lower):
    """`FORWARD.finditer(text)`, tried only where one of its keywords is. lower: the text in lower case."""
    if len(lower) != len(text):  # a few letters have a longer lower-case form
        yield from FORWARD.finditer(text)
        return
    end = 0
    for keyword in KEYWORD.finditer(lower):
        start = keyword.start() - 2 if lower.startswith("memilih", keyword.start() - 2) else keyword.start()
        match = FORWARD.match(text, start) if start >= end else None
        if match:
            yield match
            end = match.end()


def lists_options(match, letter, text):
    """Whether a statement's letter is only the first of a list: "the options are" / "A. x" / "B. y"."""
    if "\n" not in match.group():
        return False
    _, _, rest = text[match.end() :].partition("\n")
    following = OPENS_WITH_LETTER.match(rest.lstrip())
    return bool(following) and following.group()[-1].upper() not in ("", letter)


def read_lines(text, question):
    """A lone letter or an option's text on the last line; failing that, on the first -> a letter, "ambiguous" or None."""
    lines = [line for line in text.splitlines() if WORD.search(line)]
    if not lines:
        return None
    opened = {}
    for line in lines:
        line = NAMES_OPTION.sub("", line)
        if not OPENS_WITH_LETTER.match(line):
            continue
        match = OPTION_LINE.fullmatch(clean(line)) or ONE_LETTER.fullmatch(clean(line))
        if match and match.group(1) in question["letters"]:
            opened.setdefault(match.group(1), line)
    last = remembered(read_piece, lines[-1], question)
    bare = ONE_LETTER.fullmatch(clean(lines[-1]))
    if last == "ambiguous" or (last and (bare or len(opened) < 2)):
        return last
    if len(opened) > 1:
        return "ambiguous"  # the options were repeated and none was chosen
    return remembered(read_piece, lines[0], question)


def extract(text, question, finish_reason="stop", thinking=False):
    """Read the chosen letter out of a response.

    text: the raw response. question: a dict with `letters` and `options`. finish_reason: vLLM's; "length" means cut off. thinking: the
    prompt had already opened a `<think>` block. Returns (outcome, letter): ("answered", "B"), or one of ("ambiguous", None),
    ("truncated", None), ("none", None).

    What is inside the reasoning block is never the answer. Then in order: the last balanced box that says something; the last explicit
    statement ("Jawapan: B", "the answer is B", "B ialah jawapan yang betul"; a mere "pilihan B" is one only where nothing stronger is said
    and no other option is affirmed); a lone letter or an option's text on the last line, else on
    the first. Only letters on offer count. Of a response that was cut off the line rule is left out, because its last line is arbitrary.
    """
    cut = finish_reason == "length"
    head, closed, tail = text.rpartition("</think>")
    if closed:
        text = tail
    elif thinking or "<think>" in head + tail:
        return ("truncated" if cut else "none"), None
    last = text.rfind("boxed{")
    if last >= 0 and text[last + 7 : last + 8] == "}" and text[last + 6] in question["letters"] and text.rfind("box") == last:
        return "answered", text[last + 6]  # the plain case, most of them, without the general rules below
    for box in balanced_boxes(text) if "box" in text else ():
        if not clean(box):
            continue  # an empty box only repeats the instruction
        letter = remembered(read_piece, box, question)
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

    Returns [(name to print, path)] in natural order; a checkpoint that two directories hold is taken once. Raises ValueError if nothing
    matches.
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
    """Yield the records of a generations.jsonl. A half-written last line is passed over with a note; another bad line raises ValueError."""
    decode = json.JSONDecoder().raw_decode  # json.loads guesses the encoding of every line, which costs as much as the rest
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
                print(f"note: {path}: the last line is half written and is passed over; malaymmlu.py repairs it", file=sys.stderr)


def read_answers(directory, questions, limited=False, samples=1):
    """Extract every response of a directory -> int8 (questions, samples): a letter's number, or NONE, AMBIGUOUS, TRUNCATED, MISSING.

    limited: `questions` is only the beginning of the file, so records beyond it are passed over instead of refused. samples: how many were
    asked for; what a run that has not finished lacks is MISSING.
    """
    path = Path(directory) / "generations.jsonl"
    codes = {}
    for number, record in enumerate(read_generations(path), 1):
        try:
            index, sample, text = record["index"], record["sample"], record["text"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected index, sample and text, got {str(record)[:80]}") from error
        if not isinstance(text, str) or not isinstance(sample, int) or sample < 0:
            raise ValueError(f"{path}, line {number}: expected a text and a sample from 0 up, got {str(record)[:80]}")
        if limited and isinstance(index, int) and index >= len(questions):
            continue
        if not isinstance(index, int) or not 0 <= index < len(questions):
            raise ValueError(
                f"{path}, line {number}: no question {index} in the question file (0 to {len(questions) - 1}); wrong --questions"
            )
        question = questions[index]
        if "id" in record and record["id"] != question["id"]:
            raise ValueError(f"{path}, line {number}: id {record['id']!r}, but question {index} is {question['id']!r}; wrong --questions")
        if (index, sample) in codes:
            continue  # the first one written counts
        outcome, letter = extract(text, question, record.get("finish_reason"), record.get("thinking", False))
        codes[index, sample] = LETTERS.index(letter) if letter else OUTCOMES[outcome]
    width = max([samples - 1, *(sample for _, sample in codes)]) + 1
    answers = np.full((len(questions), width), MISSING, np.int8)  # (Q, samples)
    for (index, sample), code in codes.items():
        answers[index, sample] = code
    return answers


# ---- the original's block -------------------------------------------------------------------------------------------------------------


def original_scores(answers, questions):
    """acc1 and acc3 as the original computes them -> {category: (acc1, acc3)}, categories in the file's order, then "average".

    answers: int8 (Q, samples). acc1: the first sample that has an answer is right. acc3: one of the first three that have is right.
    Without an answer a question is wrong. The average is the unweighted mean of the categories.
    """
    keys = np.array([LETTERS.index(question["key"]) for question in questions], np.int8)  # (Q,)
    answered = answers >= 0  # (Q, samples)
    first = np.take_along_axis(answers, answered.argmax(1)[:, None], 1)[:, 0]  # (Q,)
    right_first = answered.any(1) & (first == keys)
    first_three = answered & (answered.cumsum(1) <= 3)
    right_any = (first_three & (answers == keys[:, None])).any(1)
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


# ---- measures, intervals, comparisons -------------------------------------------------------------------------------------------------

MEASURES = ("acc@1", "average", "majority", "any")


def measure(answers, keys):
    """The four measures question by question -> float64 (Q, 4), in the order of MEASURES. answers: int8 (Q, S); keys: int8 (Q,)."""
    right = answers == keys[:, None]  # (Q, S)
    votes = np.stack([(answers == letter).sum(1) for letter in range(len(LETTERS))], 1)  # (Q, 6)
    leaders = (votes == votes.max(1, keepdims=True)) & (votes > 0)
    key_leads = np.take_along_axis(leaders, keys[:, None].astype(np.int64), 1)[:, 0]
    majority = np.where(key_leads, 1.0 / np.maximum(leaders.sum(1), 1), 0.0)
    return np.stack([right[:, 0], right.mean(1), majority, right.any(1)], 1).astype(np.float64)


def bootstrap(values, groups, resamples=2000, seed=0):
    """Cluster bootstrap over questions, stratified: means of every group in every resample -> float64 (resamples, groups, columns).

    values: (Q, columns), a row per question. groups: list of index arrays, the strata. Every column sees the same resamples, so that
    differences of columns are paired.
    """
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, len(groups), values.shape[1]))
    for g, index in enumerate(groups):
        n, chosen = len(index), values[index].astype(np.float32)  # (n, columns)
        step = max(1, 4_000_000 // n)
        for start in range(0, resamples, step):
            rows = min(step, resamples - start)
            drawn = generator.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
            weights = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float32)
            means[start : start + rows, g] = weights @ chosen / n
    return means


def interval(resampled, n, values=None, level=0.95):
    """Percentile interval of bootstrap means, widened for small samples (the "expanded percentile" of Hesterberg 2015) -> (low, high).

    n: questions behind the estimate (of the smallest stratum). values: the per-question values; if they are all the same the bootstrap sees
    no spread at all, and the exact binomial interval is given instead.
    """
    from scipy import special

    if values is not None and np.ptp(values) == 0:
        return binomial_interval(values[0], len(values), level)
    tail = (1 - level) / 2
    if n > 1:
        tail = float(special.ndtr(np.sqrt(n / (n - 1)) * special.stdtrit(n - 1, tail)))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def binomial_interval(share, n, level=0.95):
    """Clopper and Pearson's exact interval for `share` of n -> (low, high); for a share between two counts by the same beta quantiles."""
    from scipy import special

    tail, k = (1 - level) / 2, share * n
    low = float(special.betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    return low, float(special.betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0


def mcnemar(first, second):
    """Exact McNemar test of two boolean arrays over the same questions -> (only first right, only second right, two-sided p)."""
    from scipy import special

    b, c = int((first & ~second).sum()), int((~first & second).sum())
    return b, c, min(1.0, 2 * float(special.bdtr(min(b, c), b + c, 0.5)))


def holm(p_values):
    """Holm's step-down correction -> adjusted p-values in the order given."""
    order = np.argsort(p_values)
    adjusted, running = np.empty(len(p_values)), 0.0
    for rank, position in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = running
    return [float(p) for p in adjusted]


@dataclass
class Row:
    """One checkpoint with its answers."""

    name: str
    path: Path
    args: dict
    answers: np.ndarray  # int8 (Q, samples)

    @property
    def protocol(self):
        return self.args.get("protocol", "reasoning")


def strata(questions, name="category"):
    """Question indices by category (or subject, or level), in the file's order: {value: int array}."""
    groups = {}
    for position, question in enumerate(questions):
        groups.setdefault(question[name], []).append(position)
    return {value: np.array(index) for value, index in groups.items()}


def score(rows, questions, resamples=2000, seed=0, pairs="all"):
    """All numbers about `rows` as one JSON-ready dict: chance levels, per checkpoint scores with intervals, comparisons."""
    keys = np.array([LETTERS.index(question["key"]) for question in questions], np.int8)
    offered = np.array([len(question["letters"]) for question in questions])
    groups = strata(questions)
    index = list(groups.values())
    sizes = np.array([len(i) for i in index])
    values = np.stack([measure(row.answers, keys) for row in rows], 1)  # (Q, rows, measures)
    means = bootstrap(values.reshape(len(questions), -1), index, resamples, seed).reshape(resamples, len(index), len(rows), len(MEASURES))
    micro = np.einsum("bgrm,g->brm", means, sizes / sizes.sum())
    macro = means.mean(1)
    report = {
        "questions": len(questions),
        "categories": {name: len(i) for name, i in groups.items()},
        "resamples": resamples,
        "seed": seed,
        "chance": {"one sample": float((1 / offered).mean())},
        "checkpoints": [],
    }
    for r, row in enumerate(rows):
        width = row.answers.shape[1]
        report["chance"][f"any of {width}"] = float((1 - (1 - 1 / offered) ** width).mean())
        mine = values[:, r]  # (Q, measures)
        entry = {
            "name": row.name,
            "directory": str(row.path),
            "protocol": row.protocol,
            "samples": width,
            "retries": row.args.get("retries", 0),
            "answers": count_outcomes(row.answers),
            "original": {name: list(pair) for name, pair in original_scores(row.answers, questions).items()},
            "micro": {},
            "macro": {},
            "category": {},
            "subject": {},
            "level": {},
        }
        for m, name in enumerate(MEASURES):
            entry["micro"][name] = estimate(mine[:, m].mean(), *interval(micro[:, r, m], sizes.min(), mine[:, m]))
            by_group = np.mean([mine[i, m].mean() for i in index])
            entry["macro"][name] = estimate(by_group, *interval(macro[:, r, m], sizes.min(), mine[:, m]))
        for g, (category, i) in enumerate(groups.items()):
            entry["category"][category] = {"questions": len(i)} | {
                name: estimate(mine[i, m].mean(), *interval(means[:, g, r, m], len(i), mine[i, m])) for m, name in enumerate(MEASURES)
            }
        for kind in ("subject", "level"):
            for value, i in strata(questions, kind).items():
                entry[kind][value] = {"questions": len(i), "average": estimate(mine[i, 1].mean(), *t_interval(mine[i, 1]))}
        report["checkpoints"].append(entry)
    report["comparisons"] = compare(rows, values, micro, pairs)
    return report


def estimate(value, low, high):
    return {"value": float(value), "low": float(low), "high": float(high)}


def t_interval(values, level=0.95):
    """Student interval of a mean over questions, inside [0, 1]; the exact binomial one when all values are the same."""
    from scipy import special

    n = len(values)
    if np.ptp(values) == 0:
        return binomial_interval(values[0], n, level)
    half = special.stdtrit(n - 1, 0.5 + level / 2) * values.std(ddof=1) / np.sqrt(n)
    return max(0.0, float(values.mean() - half)), min(1.0, float(values.mean() + half))


def count_outcomes(answers):
    """How many responses were answered, gave no answer, several, were cut off, or do not exist."""
    counts = {"answered": int((answers >= 0).sum())}
    counts |= {name: int((answers == code).sum()) for name, code in OUTCOMES.items()}
    return counts | {"missing": int((answers == MISSING).sum())}


def chosen_pairs(pairs, rows):
    """`--compare` -> index pairs. Raises ValueError for an unknown name."""
    if pairs == "none":
        return []
    if pairs == "all":
        return [(i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))]
    found = []
    for part in pairs.split(","):
        names = [name.strip() for name in part.split(":")]
        where = [next((i for i, row in enumerate(rows) if row.name in (name, f"malaymmlu-{name}")), None) for name in names]
        if len(where) != 2 or None in where:
            raise ValueError(f"--compare {part!r}: expected NAME:NAME out of {', '.join(row.name for row in rows)}, or all, or none")
        found.append(tuple(where))
    return found


def compare(rows, values, micro, pairs):
    """Paired comparisons -> list of dicts. values: (Q, rows, measures); micro: (resamples, rows, measures), the same resamples for all."""
    from scipy import special

    found = []
    for i, j in chosen_pairs(pairs, rows):
        if rows[i].protocol != rows[j].protocol:
            continue  # a first-token score and a reasoning score are not the same quantity
        difference = float((values[:, i, 1] - values[:, j, 1]).mean())
        resampled = micro[:, i, 1] - micro[:, j, 1]
        spread = float(resampled.std(ddof=1))
        low, high = interval(resampled, len(values))
        p = float(2 * special.ndtr(-abs(difference) / spread)) if spread > 0 else float(difference == 0)
        only_first, only_second, p_mcnemar = mcnemar(values[:, i, 0] == 1, values[:, j, 0] == 1)
        found.append(
            {
                "first": rows[i].name,
                "second": rows[j].name,
                "difference": estimate(difference, low, high),
                "p_bootstrap": p,
                "only_first_right": only_first,
                "only_second_right": only_second,
                "p_mcnemar": p_mcnemar,
            }
        )
    for name in ("p_bootstrap", "p_mcnemar"):
        for item, adjusted in zip(found, holm([item[name] for item in found]), strict=True):
            item[name + "_holm"] = adjusted
    for item in found:
        item["verdict"] = verdict(item)
    return found


def verdict(item):
    """A comparison in words."""
    points, p = 100 * item["difference"]["value"], item["p_bootstrap_holm"]
    better, worse = (item["first"], item["second"]) if points >= 0 else (item["second"], item["first"])
    sides = sorted(
        abs(100 * x) if (x >= 0) == (points >= 0) else -abs(100 * x) for x in (item["difference"]["low"], item["difference"]["high"])
    )
    interval_text = f"95 % interval {sides[0]:.2f} to {sides[1]:.2f}"
    p_text = f"p {p:.2g} by bootstrap, {item['p_mcnemar_holm']:.2g} by McNemar"
    numbers = f"{abs(points):.2f} points, {interval_text}; {p_text}"
    if p < 0.05:
        return f"{better} is better than {worse} ({numbers}, Holm-corrected)"
    return f"{better} and {worse} cannot be told apart ({numbers}, Holm-corrected)"


# ---- contamination --------------------------------------------------------------------------------------------------------------------

GRAM = 13


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
    """Every text of the training data: .jsonl, .json, .parquet files or directories of them, comma-separated. Raises ValueError if none."""
    import pandas

    paths = []
    for part in source.split(","):
        path = Path(part.strip())
        paths += sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".json", ".parquet")) if path.is_dir() else [path]
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
    """Questions that share a run of 13 words with the training data; shorter ones if the whole text occurs -> bool (Q,)."""
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
        report["checkpoints"].append({"name": row.name} | {k: float(v.mean()) if len(v) else None for k, v in parts.items()})
    return report


# ---- writing --------------------------------------------------------------------------------------------------------------------------


def percent(item, digits=2):
    """An estimate as "76.62 [76.10, 77.14]"."""
    return f"{100 * item['value']:.{digits}f} [{100 * item['low']:.{digits}f}, {100 * item['high']:.{digits}f}]"


def tables(report):
    """The report as [(title, header, rows of strings)]."""
    rows = report["checkpoints"]
    facts = f"{report['questions']:,} questions, 95 % intervals over questions, in percent"
    found = []
    for kind, words in (("micro", "every question weighs the same"), ("macro", "every category weighs the same")):
        body = [[row["name"], str(row["samples"]), *(percent(row[kind][name]) for name in MEASURES)] for row in rows]
        found.append((f"{kind}: {words} ({facts})", ["checkpoint", "samples", "acc@1", "average", "majority", "any"], body))
    for kind, title in (
        ("category", "average of the samples by category"),
        ("subject", "average by subject"),
        ("level", "average by level"),
    ):
        names = list(rows[0][kind]) if rows else []
        if len(names) < 2:
            continue
        if kind == "category":
            body = [[row["name"], *(percent(row[kind][name]["average"]) for name in names)] for row in rows]
            found.append((title, ["checkpoint", *names], body))
        else:  # many values: one line each, a column per checkpoint
            body = [
                [name or "-", str(rows[0][kind][name]["questions"]), *(percent(row[kind][name]["average"], 1) for row in rows)]
                for name in names
            ]
            found.append((title, [kind, "questions", *(row["name"] for row in rows)], body))
    outcomes = list(rows[0]["answers"]) if rows else []
    found.append(
        ("responses", ["checkpoint", *outcomes], [[row["name"], *(f"{row['answers'][name]:,}" for name in outcomes)] for row in rows])
    )
    return found


def notes(report, rows):
    """What a reader must know beside the numbers."""
    lines = ["chance: " + ", ".join(f"{100 * value:.2f} % for {name}" for name, value in report["chance"].items())]
    for row in report["checkpoints"]:
        if row["answers"]["missing"]:
            lines.append(
                f"{row['name']}: NOT FINISHED, {row['answers']['missing']:,} of {sum(row['answers'].values()):,} samples are missing and "
                "count as wrong; malaymmlu.py makes them, or --limit scores a beginning"
            )
        if row["protocol"] == "first_token":
            lines.append(
                f"{row['name']}: first-token protocol, whose official score weighs every question: {percent(row['micro']['acc@1'])}"
            )
        if row["retries"]:
            lines.append(
                f"{row['name']}: unreadable answers were resampled up to {row['retries']} times, so its samples are not plain draws"
            )
    for name in ("sampling", "system_prompt", "seed", "questions_sha256", "retries", "chat_template_kwargs"):
        values = {json.dumps(row.args.get(name), sort_keys=True) for row in rows if row.args}
        if len(values) > 1:
            lines.append(f"the checkpoints were generated with different {name}: {'; '.join(sorted(values))}")
    return lines


def as_text(report, rows):
    """Everything after the original's block, as aligned text."""
    lines = [f"note: {line}" for line in notes(report, rows)]
    for title, header, body in tables(report):
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        lines += ["", title]
        for line in [header, *body]:
            lines.append(
                "  ".join(
                    cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))
                )
            )
    if report["comparisons"]:
        lines += ["", "paired comparisons (average of the samples; question by question)"]
        lines += [item["verdict"] for item in report["comparisons"]]
    if "contamination" in report:
        part = report["contamination"]
        lines += ["", f"contamination: {part['count']} of {report['questions']} questions overlap {part['source']}"]
        lines += [
            f"{row['name']}: average {show(row['all'])} on all, {show(row['without'])} without them, {show(row['only'])} on them"
            for row in part["checkpoints"]
        ]
    return "\n".join(lines)


def show(value):
    return "-" if value is None else f"{100 * value:.2f}"


def as_markdown(report, rows):
    """The same tables as markdown."""
    lines = []
    for title, header, body in tables(report):
        lines += ["", f"**{title}**", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(line) + " |" for line in body]
    lines += [""] + [f"- {line}" for line in notes(report, rows)] + [f"- {item['verdict']}" for item in report["comparisons"]]
    return "\n".join(lines).lstrip() + "\n"


def as_csv(report):
    """Long format: checkpoint, kind, name, questions, measure, value, low, high."""
    lines = ["checkpoint,kind,name,questions,measure,value,low,high"]

    def quoted(text):
        return '"' + str(text).replace('"', '""') + '"'

    for row in report["checkpoints"]:
        for kind in ("micro", "macro"):
            for name, item in row[kind].items():
                lines.append(f"{quoted(row['name'])},{kind},,{report['questions']},{name},{item['value']},{item['low']},{item['high']}")
        for kind in ("category", "subject", "level"):
            for value, items in row[kind].items():
                for name, item in items.items():
                    if name != "questions":
                        numbers = f"{items['questions']},{name},{item['value']},{item['low']},{item['high']}"
                        lines.append(f"{quoted(row['name'])},{kind},{quoted(value)},{numbers}")
    return "\n".join(lines) + "\n"


def split_step(name):
    """ "malaymmlu-run-checkpoint-960" -> ("run", 960); a name without a step -> (name, None)."""
    short = name.removeprefix("malaymmlu-")
    match = re.fullmatch(r"(.+?)(?:-checkpoint)?-(\d+)", short)
    return (match.group(1), int(match.group(2))) if match else (short, None)


def heights(items):
    """Estimates -> (percent, [[below], [above]]) for error bars."""
    y = np.array([100 * item["value"] for item in items])
    below, above = y - [100 * item["low"] for item in items], [100 * item["high"] for item in items] - y
    return y, np.maximum([below, above], 0)


def draw(report, rows, path):
    """PNG: the average by epoch with intervals, one line a run and base models dashed; beside it the average by category."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = report["checkpoints"]
    runs = {}
    for entry, row in zip(entries, rows, strict=True):
        run, step = split_step(entry["name"])
        if row.args and row.args.get("adapter") is None:  # a base model, even if its name ends in a number
            run, step = entry["name"].removeprefix("malaymmlu-"), None
        runs.setdefault(run, []).append((step, entry))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.8), width_ratios=[1, 1.4], layout="constrained")
    most = max(len(points) for points in runs.values())
    categories = list(report["categories"])
    width, bar = 0.8 / len(entries), 0
    for number, (run, points) in enumerate(runs.items()):
        points.sort(key=lambda point: point[0] or 0)
        colour = f"C{number % 10}"
        y, errors = heights([entry["micro"]["average"] for _, entry in points])
        if points[0][0] is None:
            left.axhline(y[0], color=colour, linestyle="--", label=run)
            left.axhspan(y[0] - errors[0][0], y[0] + errors[1][0], color=colour, alpha=0.12, linewidth=0)
        else:
            left.errorbar(range(1, len(y) + 1), y, yerr=errors, color=colour, marker="o", capsize=3, label=run)
        for position, (_, entry) in enumerate(points):
            y, errors = heights([entry["category"][name]["average"] for name in categories])
            x = np.arange(len(categories)) + (bar - (len(entries) - 1) / 2) * width
            alpha = 0.4 + 0.6 * (position + 1) / len(points)  # later epochs are darker
            label = entry["name"].removeprefix("malaymmlu-")
            right.bar(x, y, width, yerr=errors, capsize=2, color=colour, alpha=alpha, label=label, error_kw={"linewidth": 0.8})
            bar += 1
    left.set_xticks(range(1, most + 1))
    left.set_xlim(0.5, most + 0.5)
    left.set_xlabel("epoch (checkpoints of a run, in order)")
    left.set_ylabel("questions right, % (average of the samples)")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.axhline(100 * report["chance"]["one sample"], color="0.4", linestyle=":", label="chance")
    right.set_xticks(range(len(categories)), [f"{name}\n({report['categories'][name]:,})" for name in categories])
    right.set_ylim(0, 100)
    right.grid(axis="y", alpha=0.3)
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=min(4, len(entries) + 1))
    figure.suptitle(f"MalayMMLU format, {report['questions']:,} questions; bars are 95 % intervals over questions")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


PAGE = r"""<!doctype html><html lang="en"><meta charset="utf-8"><title>MalayMMLU report</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<style>
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.6rem 0 1.4rem;display:block;overflow-x:auto}
th,td{padding:.25rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left} th{cursor:pointer;background:#f4f4f4}
pre{white-space:pre-wrap;background:#f7f7f7;padding:.6rem;margin:.3rem 0} .right{color:#0a7d32} .wrong{color:#b3261e} .gone{color:#777}
select,input,button{font:inherit;margin:.2rem} details{border-bottom:1px solid #ddd;padding:.3rem 0} img{max-width:100%}
</style>
<h1>MalayMMLU report</h1><div id="notes"></div><div id="plot"></div><div id="tables"></div>
<h2>Comparisons</h2><ul id="pairs"></ul>
<h2>Questions</h2>
<div><select id="status"></select><select id="category"></select><select id="subject"></select><input id="find" placeholder="text or id">
<button id="back">&lt;</button><span id="page"></span><button id="next">&gt;</button></div><div id="list"></div>
<script id="data" type="application/json">__DATA__</script>
<script>
const D=JSON.parse(document.getElementById('data').textContent), $=id=>document.getElementById(id);
const make=(tag,text,cls)=>{const e=document.createElement(tag);if(text!==undefined)e.textContent=text;if(cls)e.className=cls;return e};
D.notes.forEach(n=>$('notes').append(make('p',n)));
if(D.plot){const i=make('img');i.src='data:image/png;base64,'+D.plot;i.alt='accuracy by epoch and by category';$('plot').append(i)}
D.tables.forEach(([title,head,body])=>{
  const t=make('table'),h=make('tr');let up=false;
  head.forEach((c,k)=>{const th=make('th',c);th.title='sort';th.onclick=()=>{up=!up;
    const value=r=>{const x=r.cells[k].textContent.replaceAll(',',''),f=parseFloat(x);return k===0||isNaN(f)?x:f};
    [...t.rows].slice(1).sort((a,b)=>{const x=value(a),y=value(b),s=typeof x==='number'&&typeof y==='number'?x-y:
      String(x).localeCompare(String(y),undefined,{numeric:true});return up?s:-s}).forEach(r=>t.append(r))};h.append(th)});
  t.append(h);body.forEach(r=>{const tr=make('tr');r.forEach(c=>tr.append(make('td',c)));t.append(tr)});
  $('tables').append(make('h2',title),t)});
D.comparisons.forEach(c=>$('pairs').append(make('li',c)));
if(!D.comparisons.length)$('pairs').append(make('li','none asked'));
const names=D.names,sign={'-1':'no answer','-2':'several answers','-3':'cut off','-4':'missing'},letters='ABCDEF';
const look=(a,q)=>a<0?'gone':letters[a]===q.key?'right':'wrong';
const right=(q,n)=>q.a[n].filter(a=>letters[a]===q.key).length/q.a[n].length;
const tests={'all questions':q=>true,'right in every checkpoint':q=>names.every((_,n)=>right(q,n)===1),
 'wrong in every checkpoint':q=>names.every((_,n)=>right(q,n)===0),
 'checkpoints disagree':q=>{const r=names.map((_,n)=>right(q,n)>.5);return r.includes(true)&&r.includes(false)},
 'samples disagree':q=>names.some((_,n)=>{const r=right(q,n);return r>0&&r<1}),
 'a response without an answer':q=>names.some((_,n)=>q.a[n].some(a=>a<0))};
names.forEach((name,n)=>{tests['right in '+name]=q=>right(q,n)>.5;tests['wrong in '+name]=q=>right(q,n)<=.5});
const fill=(id,first,values)=>{[first,...values].forEach(v=>{const o=make('option',v||'(none)');o.value=v;$(id).append(o)})};
fill('status','all questions',Object.keys(tests).slice(1));
fill('category','all categories',[...new Set(D.questions.map(q=>q.category))]);
fill('subject','all subjects',[...new Set(D.questions.map(q=>q.subject))].sort());
let page=0;const SIZE=25;
function list(){
  const word=$('find').value.toLowerCase(),s=tests[$('status').value],c=$('category').value,u=$('subject').value;
  const hits=D.questions.filter(q=>s(q)&&(c==='all categories'||q.category===c)&&(u==='all subjects'||q.subject===u)&&
    (!word||q.prompt.toLowerCase().includes(word)||String(q.id).toLowerCase()===word));
  const last=Math.max(0,Math.ceil(hits.length/SIZE)-1);page=Math.max(0,Math.min(page,last));
  $('page').textContent=` ${hits.length} questions, page ${page+1} of ${last+1} `;$('list').replaceChildren();
  hits.slice(page*SIZE,page*SIZE+SIZE).forEach(q=>{const d=make('details'),m=make('summary');
    m.append(make('span',`${q.id} · ${q.category} · ${q.subject} · key ${q.key} · `));
    names.forEach((name,n)=>{q.a[n].forEach(a=>m.append(make('span',(a<0?'–':letters[a])+' ',look(a,q))));m.append(' | ')});
    d.append(m);d.ontoggle=()=>{if(d.childElementCount>1)return;d.append(make('pre',q.prompt));
      names.forEach((name,n)=>{d.append(make('strong',name));q.a[n].forEach((a,k)=>{
        d.append(make('div',`sample ${k}: ${a<0?sign[a]:letters[a]}`,look(a,q)));
        if(q.t&&q.t[n]&&q.t[n][k])d.append(make('pre',q.t[n][k]))})})};
    $('list').append(d)})}
['status','category','subject'].forEach(id=>$(id).onchange=()=>{page=0;list()});$('find').oninput=()=>{page=0;list()};
$('back').onclick=()=>{page--;list()};$('next').onclick=()=>{page++;list()};list();
</script></html>
"""


def write_html(report, rows, questions, path, budget=20_000_000):
    """One self-contained page: tables that sort, the plot, and every question with every checkpoint's letters.

    Responses are included (their last 1,500 characters) while all of them together stay under `budget` characters; otherwise only letters.
    """
    with tempfile.TemporaryDirectory() as folder:
        draw(report, rows, Path(folder) / "plot.png")
        plot = base64.b64encode((Path(folder) / "plot.png").read_bytes()).decode()
    texts = tails(rows, questions, budget)
    listed = []
    for i, question in enumerate(questions):
        item = {name: question[name] for name in ("id", "prompt", "key", "category", "subject")}
        item["a"] = [row.answers[i].tolist() for row in rows]
        if texts:
            item["t"] = [[texts[r].get((i, sample), "") for sample in range(row.answers.shape[1])] for r, row in enumerate(rows)]
        listed.append(item)
    data = {
        "notes": [f"{report['questions']:,} questions", *notes(report, rows)]
        + ([] if texts else ["responses are left out: too many for one page"]),
        "plot": plot,
        "tables": tables(report),
        "comparisons": [item["verdict"] for item in report["comparisons"]],
        "names": [row.name.removeprefix("malaymmlu-") for row in rows],
        "questions": listed,
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text can end the script element early
    Path(path).write_text(PAGE.replace("__DATA__", text), encoding="utf-8")


def tails(rows, questions, budget):
    """The ends of all responses, [{(index, sample): text}] per row, or None if they are too much for a page."""
    if sum((row.path / "generations.jsonl").stat().st_size for row in rows) > 4 * budget:
        return None
    found = [
        {
            (r["index"], r["sample"]): r["text"][-1500:]
            for r in read_generations(row.path / "generations.jsonl")
            if r["index"] < len(questions)
        }
        for row in rows
    ]
    return found if sum(len(text) for row in found for text in row.values()) <= budget else None


def audit(rows, questions, count, seed=0):
    """Print `count` random extractions for a human eye: the end of the response and what was read out of it."""
    generator = np.random.default_rng(seed)
    records = [
        (row, record) for row in rows for record in read_generations(row.path / "generations.jsonl") if record["index"] < len(questions)
    ]
    for position in generator.choice(len(records), min(count, len(records)), replace=False):
        row, record = records[position]
        question = questions[record["index"]]
        outcome, letter = extract(record["text"], question, record.get("finish_reason"), record.get("thinking", False))
        print(f"\n---- {row.name}, question {record['index']} (id {question['id']}), sample {record['sample']}")
        print("\n".join(f"{name}. {text}" for name, text in question["options"].items()))
        print("..." + record["text"][-400:] if len(record["text"]) > 400 else record["text"])
        print(f"---- read as: {letter or outcome}   key: {question['key']}   finish: {record.get('finish_reason')}")


# ---- command --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Arguments:
    pattern: str = field(metadata={"help": "directories to score: comma-separated globs"})
    questions: str | None = field(default=None, metadata={"help": "question file; default: MalayMMLU from the hub"})
    questions_revision: str | None = field(
        default=None, metadata={"help": "the hub's revision of the question file; default: the one that was generated from"}
    )
    limit: int | None = field(default=None, metadata={"help": "score the first N questions only, as malaymmlu.py --limit asks them"})
    compare: str = field(default="all", metadata={"help": "paired comparisons: all, none, or NAME:NAME,NAME:NAME"})
    resamples: int = field(default=2000, metadata={"help": "bootstrap resamples"})
    seed: int = field(default=0, metadata={"help": "seed of the bootstrap and of --audit"})
    contamination: str | None = field(default=None, metadata={"help": "training data to check the questions against: files or directories"})
    audit: int = field(default=0, metadata={"help": "print N random extractions"})
    json: str | None = field(default=None, metadata={"help": "write everything as JSON"})
    csv: str | None = field(default=None, metadata={"help": "write the scores as CSV, one value a line"})
    markdown: str | None = field(default=None, metadata={"help": "write the tables as markdown"})
    plot: str | None = field(default=None, metadata={"help": "write a PNG"})
    html: str | None = field(default=None, metadata={"help": "write a self-contained report"})


def main():
    from transformers import HfArgumentParser

    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    try:
        if args.limit is not None and args.limit < 1:
            raise ValueError(f"--limit must be at least 1, got {args.limit}")
        found = [(name, path, read_args(path)) for name, path in find_directories(args.pattern)]
        # without a revision, the one that the first of them was generated from
        questions, facts = benchmark_questions(args.questions, args.questions_revision or found[0][2].get("questions_revision"))
        for name, _, made in found:
            if made.get("questions_sha256") not in (None, facts["sha256"]):
                what = f"{name} was generated from questions with sha256 {made['questions_sha256']}, these have {facts['sha256']}"
                if not args.questions:
                    raise ValueError(f"{what}; score it apart, or against one file with --questions FILE")
                print(f"note: {what}", file=sys.stderr)
        questions = questions[: args.limit]
        rows = [
            Row(name, path, made, read_answers(path, questions, bool(args.limit), made.get("samples", 1))) for name, path, made in found
        ]
        print_original([row.name for row in rows], [row.answers for row in rows], questions)
        report = score(rows, questions, args.resamples, args.seed, args.compare)
        if args.contamination:
            report["contamination"] = contamination_report(rows, questions, args.contamination)
        print(as_text(report, rows))
        write(args, report, rows, questions)
        if args.audit:
            audit(rows, questions, args.audit, args.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def write(args, report, rows, questions):
    """Write the files asked for."""
    for name, text in (
        ("json", lambda: json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
        ("csv", lambda: as_csv(report)),
        ("markdown", lambda: as_markdown(report, rows)),
    ):
        path = getattr(args, name)
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text(), encoding="utf-8")
    if args.plot:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        draw(report, rows, args.plot)
    if args.html:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        write_html(report, rows, questions, args.html)


if __name__ == "__main__":
    main()
