"""From a response to the letter that it chooses."""

import re

from malaysian_sft.questions import OPTION_LINE

NAMED = r"(?:pilihan|opsyen|opsi|option|choice|huruf|letter|jawapan|answer)"
WRAP = r"[\s*_$`\"'“‘(\[{]*"  # markdown, quotes, brackets and dollars around a letter
LATEX_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|bf)\s*\{([^{}]*)\}"
)
LATEX_SPACE = re.compile(r"\\[,;:! ]|\\quad|\\qquad|~")
ONE_LETTER = re.compile(rf"(?:{NAMED}\W{{0,3}}\s*)?[(\[]?([A-Fa-f])[)\]]?[.:,;!]*", re.I)
LETTER_AND_TEXT = re.compile(r"[(\[]?([A-F])(?:[)\]]?\s*[.):,=]\s*|[)\]]?\s*[\-–—]\s+|\s+)(\S.*)", re.S)
LONE_LETTERS = re.compile(r"(?<![\w\\'’-])([A-F])(?![\w-]|['’]\w)")
WORD = re.compile(r"\w+")
OPENS_WITH_LETTER = re.compile(r"[\s*_$`\"'“‘(\[#>-]*(?:\\\w+\{)?[A-Fa-f](?!\w)")
NAMES_OPTION = re.compile(r"^\W*(?:pilihan|opsyen|option|choice)\b\W*", re.I)
LONE_ANY = re.compile(r"(?<!\w)[A-Fa-f](?!\w)")
SEVERAL = re.compile(
    r"\s*[)\]*_.]*\s*(?:,|/|&|\bdan\b|\batau\b|\band\b|\bor\b|\bserta\b)\s*"
    + WRAP
    + rf"(?:{NAMED}\s*)?([A-F])(?!\w|['’]\w)"
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
CLOSED = (  # what may stand between a letter and the rest of its sentence
    r"[)\].*_$\"”’}}]*[^\S\n]*(?:\([^()\n]{0,80}\)[^\S\n]*)?"
)
AFFIRMED = re.compile(
    CLOSED
    + r"(?:[.!]*[^\S\n]*(?:\n|$)|,?\s*(?:(?:yang|ialah|adalah|merupakan|is|the|paling|most|memang|sebagai|as)\s+)*"
    r"(?:betul|benar|tepat|sesuai|correct|right|best|dipilih|jawapan(?:nya)?|answer)\b)",
    re.I,
)
REJECTED = re.compile(
    CLOSED + r"(?:(?:ialah|adalah|is|pula|juga|jelas|boleh|perlu|dan [A-F]|and [A-F])\s+)*"
    r"(?:salah|silap|tidak|tak|bukan|kurang|not|wrong|incorrect|di(?:tolak|singkirkan))\b",
    re.I,
)
# a text without any of these holds no statement
STEMS = (
    "jawap",
    "jwpn",
    "answer",
    "pilih",
    "milih",
    "opsyen",
    "opti",
    "choice",
    "choose",
    "kesimpulan",
    "select",
    "pick",
)
KEYWORD = re.compile("|".join(STEMS))  # where FORWARD can begin: much faster to find in lower-case text


STEMS += ("correct", "betul", "benar", "tepat", "right")


NEGATION = re.compile(
    r"\b(?:bukan|tidak|tak|salah|silap|kurang|not|isn't|wrong|incorrect|never|elakkan|kecuali|except)\b", re.I
)
AFTER_COLON = re.compile(
    r"\b(?:jawapan(?:nya)?|answer)\b[^\n:]{0,40}(?::|\bialah\b|\badalah\b|\bis\b)\s*(?P<rest>[^\n]+)", re.I
)


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
    """`read(piece, question)`, remembered in the question: its samples and checkpoints repeat the same short answers
    again and again."""
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
    """A short piece that should be the answer itself (a box's content, a last line) -> a letter, "ambiguous" or
    None."""
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
        if (
            match.group("upper")
            and letter.islower()
            and not re.match(r"[)\].*_$\"”’}]*\s*(?:\.|\)|$|\n)", text[match.end() :])
        ):
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
    """A lone letter or an option's text on the last line; failing that, on the first -> a letter, "ambiguous" or
    None."""
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

    text: the raw response. question: a dict with `letters` and `options`. finish_reason: vLLM's; "length" means cut
    off. thinking: the prompt had already opened a `<think>` block. Returns (outcome, letter): ("answered", "B"), or one
    of ("ambiguous", None), ("truncated", None), ("none", None).

    What is inside the reasoning block is never the answer. Then in order: the last balanced box that says something;
    the last explicit statement ("Jawapan: B", "the answer is B", "B ialah jawapan yang betul"; a mere "pilihan B" is
    one only where nothing stronger is said and no other option is affirmed); a lone letter or an option's text on the
    last line, else on the first. Only letters on offer count. Of a response that was cut off the line rule is left out,
    because its last line is arbitrary.
    """
    cut = finish_reason == "length"
    head, closed, tail = text.rpartition("</think>")
    if closed:
        text = tail
    elif thinking or "<think>" in head + tail:
        return ("truncated" if cut else "none"), None
    last = text.rfind("boxed{")
    if (
        last >= 0
        and text[last + 7 : last + 8] == "}"
        and text[last + 6] in question["letters"]
        and text.rfind("box") == last
    ):
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
