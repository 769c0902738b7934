r"""One normalisation of text, LaTeX, numbers and units, used for a response and for the options it is compared with.

`plain` takes the wrappers off, `key` makes two spellings of one thing equal, `Options` finds which letters a piece of
text names. Every pattern is bounded or cannot backtrack over more than a few characters, so all of it is linear in
the length of the text.
"""

import re
import unicodedata
from fractions import Fraction
from functools import cached_property

AMBIGUOUS = "ambiguous"
ANSWER_WORD = r"jawap(?:an)?|jawab(?:an)?|answer"  # "jawapannya" is one of these and "nya"
NAMED = r"(?:pilihan|opsyen|opsi|option|choice|huruf|letter|jawapan|jawaban|answer|选项)"
BOX = "\x02"  # stands for a box in plain text
LONGEST_BOX = 2000  # characters; more than that is a text, not an answer
RAISED = {char: "^" + digit for char, digit in zip("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789", strict=True)} | {"⁻": "^-", "−": "-"}
# written out, so that a search skips to the first letters
BRACES = re.compile(r"\\boxed\s{0,4}\{?|\\fbox\s{0,4}\{?|boxed\s{0,4}\{?|fbox\s{0,4}\{?|\\[{}]|\{|\}")
# a box whose closing brace was lost, but whose formula ends: "\boxed{B\)"
UNCLOSED = re.compile(r"\\?(?:boxed|fbox)\s{0,4}\{\s{0,4}([A-F])\s{0,4}(?=\\[)\]]|\$)")
BARE = re.compile(r"[ ]{0,4}([A-Fa-f])(?!\w)")
FONTS = (
    r"text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|rm|it|sf|tt|bb)|boldsymbol|bm|mbox|hbox|operatorname|bf|rm|it|sf|"
    r"tiny|small|normalsize|large|Large|LARGE|huge|Huge|displaystyle|left|right|underline|boxed|fbox|ce"
)
# what is written, what it becomes, and parts without one of which the pattern cannot match
LATEX = (
    (
        re.compile(
            r"\\(?:text)?color\s{0,4}\{[^{}]{0,40}\}|\\(?:begin|end)\s{0,4}\{\w{1,20}\*?\}(?:\{[a-z|]{0,20}\})?"
        ),
        "",
        ("color", "\\begin", "\\end"),
    ),
    (re.compile(r"\\?\b[dt]?frac\s{0,4}\{([^{}]{0,80})\}\s{0,4}\{([^{}]{0,80})\}"), r"\1/\2", ("frac",)),
    (re.compile(r"\\[dt]?frac\s{0,4}(\d)\s{0,4}(\d)"), r"\1/\2", ("frac",)),
    (re.compile(r"\^?\s{0,4}\{?\\(?:circ|degree)\b\}?"), "°", ("\\circ", "\\degree")),
    (re.compile(r"\\(?:times|cdot)\b"), "×", ("\\times", "\\cdot")),
    (re.compile(r"\\(?:to|rightarrow|Rightarrow|implies)\b"), "→", ("\\to", "arrow", "\\implies")),
    (re.compile(r"\\approx\b"), "≈", ("\\approx",)),
    (re.compile(r"\\sqrt\b"), "√", ("\\sqrt",)),
    (re.compile(r"\\pi\b"), "π", ("\\pi",)),
    (re.compile(rf"\\(?:{FONTS})(?![a-zA-Z])"), "", ("\\",)),
    (re.compile(r"\\(?:[,;:!\s]|quad\b|qquad\b)"), " ", ("\\",)),
    (re.compile(r"\\[()\[\]]"), "", ("\\",)),
    (re.compile(r"\\([%$#&_{}])"), r"\1", ("\\",)),
)
LOST_BACKSLASH = re.compile(r"\b(?:text(?:bf|it|rm)?|math(?:bf|rm|it|sf)|boldsymbol)(?=\{)")
TAGS = re.compile(r"<\|[\w ]{1,40}\|>|</?[a-zA-Z][^<>\n]{0,80}>")
ANSWER_TAG = re.compile(r"<(?:answer|jawapan|jawaban)>\s{0,20}", re.I)
MARKS = dict.fromkeys('`"“”„«»{}$', "") | {"~": " ", "\xa0": " "}
QUOTES = re.compile(r"(?<![\w’'])['‘’]|['‘’](?!\w)")
# between a letter and a script without spaces or capitals, Jawi, Tamil, Chinese: "答案是B", "Jawapannya是B"
SCRIPT = "\u0600-\u06ff\u0900-\u0dff\u0e00-\u0e7f\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af"
HAN = re.compile(
    rf"(?<=[{SCRIPT}])(?=[A-F](?![A-Za-z0-9]))|(?<![A-Za-z0-9][A-F])(?<=[A-F])(?=[{SCRIPT}])|(?<=[a-z])(?=[{SCRIPT}])"
)
TICKED, CROSSED = (re.compile(rf"[{signs}]\ufe0f?(?=[ \t|]{{0,9}}(?:\n|\Z))") for signs in ("✓✔✅☑", "✗✘❌✖"))  # "B ✓"
# the sign stands first, so that the search skips to it
STARRED = re.compile(
    r"[*_](?:(?<=\*)(?<![\w*].)(\S[^*\n]{0,200}?)\*(?![\w*])|(?<=_)(?<![\w_].)(\S[^_\n]{0,200}?)_(?![\w_]))"
)
# the first one stands for the first line; the other begins with a line end, to which the search can skip
LINE_MARK = re.compile(r"[ \t>#•|]{1,40}(?:[-*+] {1,4})?|[-*+] {1,4}")
LINE_MARKS = re.compile(rf"\n(?:{LINE_MARK.pattern})")
SIMPLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .,()/=%-]*")  # what `plain` leaves as it is, but for double spaces
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
ZEROS = re.compile(r"(\d)\.0+(?!\d)|(\d\.\d{0,20}?[1-9])0+(?!\d)")
# what is written, the one spelling of it, and parts of the words without one of which the pattern cannot match
UNITS = (
    (re.compile(r"\s?\b(?:darjah|degrees?|derajat)\b(?: celsius\b)?"), "°", ("darjah", "degree", "derajat")),
    (re.compile(r"\s?\b(?:peratus|persen|percent)\b"), "%", ("peratus", "persen", "percent")),
    (re.compile(r"(?<![\d.,])(\d[\d.,]{0,20})\s?ringgit\b(?: malaysia\b)?"), r"rm\1", ("ringgit",) * 3),
    (re.compile(r"\bringgit malaysia\b|\bmyr\b"), "rm", ("ringgit", "myr", "myr")),
)
UNIT_SIGNS = dict(
    kilometer="km",
    sentimeter="cm",
    milimeter="mm",
    meter="m",
    kilogram="kg",
    gram="g",
    mililiter="ml",
    liter="l",
    newton="n",
    joule="j",
    watt="w",
    volt="v",
    ampere="a",
)
SPELT_UNITS = re.compile(rf"(?<=\d)\s?({'|'.join(UNIT_SIGNS)})s?\b")
PER = re.compile(r"(?<=\d)\s?(k?[a-z]{1,2})/(s|h|m|kg|min|jam)(?:\^?(\d))?(?![a-z])")  # "10 m/s" is "10 m s^-1"
LEADING_DOT = re.compile(r"(?<![\d.])\.(?=\d)")
NUMBER = re.compile(r"(rm|\$)?(-?\d{1,20}(?:\.\d{1,20})?(?:/\d{1,20})?)([^\d+×÷*=-][^+×÷*=]{0,40})?")  # no sum: "12+3"
ONLY = re.compile(r"\s{1,4}(?:sahaja|saja|only)$")
ROMANS = re.compile(r"[ivx]{1,5}(?:(?:,|&|dan|and|serta| )+[ivx]{1,5})*")
# words that lead to an answer and name none, though an option may consist of them
CUE_WORDS = frozenset(
    "jawapan jawapannya jawaban jawabannya akhir akhirnya ialah adalah yang betul tepat jadi maka oleh itu"
    " justeru the final answer is so"
    " therefore correct kesimpulannya \\[ \\(".split()
)
OUTER = " \t\r\n.,;:!?'()[]"


def answer_of(text, thinking):
    """The part of a response after its reasoning, or None where the reasoning never ended."""
    if not thinking and (">" not in text or "think>" not in text) and "assistantfinal" not in text:
        return text
    head, closed, tail = text.rpartition("</think>")
    before, opened, _ = tail.partition("<think>")
    if closed:
        return before if before.strip() or opened else tail
    if thinking:
        return None
    if opened:
        return before if before.strip() else None
    _, final, rest = text.rpartition("assistantfinal")
    return rest if final else text


def find_boxes(text):
    r"""`text` with every readable `\boxed{...}` replaced by `BOX`, and the contents of those, in order.

    Outermost balanced boxes count, `\boxed B` and a box that only its formula closes too. Empty ones (the repeated
    instruction) go. One pass with a stack: linear, however boxes are nested or left open.
    """
    first = text.find("box") if "x" in text else -1  # to look for one letter, which few words have, is quickest
    if first < 0:
        return text, []
    found, stack = [], []  # found: (start, end, content); stack: where an open brace's box starts, or -1
    for match in BRACES.finditer(text, max(0, first - 2)):  # what is open before the first box closes after it
        token = match.group()
        if token == "{":
            stack.append((-1, 0))
        elif token == "}":
            start, inside = stack.pop() if stack else (-1, 0)
            if start >= 0:
                while found and found[-1][0] >= start:
                    found.pop()
                found.append((start, match.end(), text[inside : min(match.start(), inside + LONGEST_BOX + 1)]))
        elif token[-1] == "{" and token != "\\{":
            stack.append((match.start(), match.end()))
            lost = UNCLOSED.match(text, match.start())
            if lost:
                found.append((match.start(), lost.end(), lost.group(1)))
                stack.pop()
        elif token[0] != "\\" or token[1] in "bf":
            bare = BARE.match(text, match.end())
            if bare and token[0] == "\\":
                found.append((match.start(), bare.end(), bare.group(1)))
    unclosed = [(start, inside, "") for start, inside in stack if start >= 0]
    found = sorted(found + unclosed)
    pieces, boxes, at = [], [], 0
    for index, (start, end, content) in enumerate(found):
        if start < at:
            continue
        if not content and text[end - 1] == "{":  # never closed: nothing was said on the rest of its line
            limit = found[index + 1][0] if index + 1 < len(found) else len(text)
            line = text.find("\n", end, limit)
            end = limit if line < 0 else line
        if not (content.isascii() and content.isalnum()):
            content = plain(content) if len(content) <= LONGEST_BOX else "..."
        pieces.append(text[at:start])
        if content.strip(OUTER):
            pieces.append(BOX)
            boxes.append(content)
        at = end
    return "".join([*pieces, text[at:]]), boxes


def replaced(text, signs):
    """`str.translate` for signs most of which do not occur: it looks every character up once one is not ASCII."""
    for sign, new in signs.items():
        if sign in text:
            text = text.replace(sign, new)
    return text


def plain(text):
    """Take LaTeX commands, HTML, chat tokens, markdown and quotes off.

    Full-width forms become ASCII. Lines stay lines.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", replaced(text, RAISED)).replace("⁄", "/").replace("。", ". ")
        text = CROSSED.sub(" salah", TICKED.sub(" betul", HAN.sub(" ", text)))
    if "<" in text:
        text = TAGS.sub("", ANSWER_TAG.sub("\nJawapan: ", text))
    if "\\" in text:
        for pattern, new, signs in LATEX:
            for sign in signs:
                if sign in text:
                    text = pattern.sub(new, text)
                    break
    if "{" in text and ("text" in text or "math" in text or "boldsymbol" in text):
        text = LOST_BACKSLASH.sub("", text)
    if "*" in text or "_" in text:
        text = text.replace("**", "").replace("__", "")
        if "*" in text or "_" in text:
            text = STARRED.sub(r"\1\2", text)
    text = replaced(text, MARKS)
    first = LINE_MARK.match(text)
    text = LINE_MARKS.sub("\n", text[first.end() :] if first else text).replace("\t", " ")
    if "'" in text or "’" in text or "‘" in text:
        text = QUOTES.sub("", text)
    while "  " in text:  # every pass halves what there is
        text = text.replace("  ", " ")
    return text


def key(text):
    """What two spellings of one answer share.

    Lower case, no spaces, one form of numbers, units, dashes and lists of Roman numerals.
    """
    simple = SIMPLE.fullmatch(text)  # most options: words and numbers; a pattern without its sign in them is idle
    text = " ".join((text if simple else plain(text)).lower().split())
    if "." in text:
        text = LEADING_DOT.sub("0.", text)
    text = text.strip(OUTER)
    if not simple:
        text = text.replace("–", "-").replace("—", "-").replace("_", "")
    if "/" in text:
        text = PER.sub(lambda match: f"{match[1]}{match[2]}^-{match[3] or 1}", text)
    if "er" in text or "gram" in text or "newton" in text or "joule" in text or "tt" in text or "lt" in text:
        text = SPELT_UNITS.sub(lambda match: UNIT_SIGNS[match[1]], text)
    for pattern, new, signs in UNITS:
        if signs[0] in text or signs[1] in text or signs[2] in text:
            text = pattern.sub(new, text)
    if "," in text:
        text = THOUSANDS.sub("", text)
    if "." in text:
        text = ZEROS.sub(r"\1\2", text)
    bare = ONLY.sub("", text) if text.endswith(("sahaja", "saja", "only")) else text
    if bare and bare[0] in "ivx" and ")" in bare:
        bare = bare.replace("(", "").replace(")", "")
    if bare and bare[0] in "ivx" and ROMANS.fullmatch(bare.replace(" ", "")):
        return "roman:" + ",".join(sorted(re.findall(r"\b[ivx]+\b", bare)))
    return text.replace(" ", "")


def number(spelt):
    """A key's number and unit.

    "rm18" -> (Fraction(18), "rm"), "2000n" -> (Fraction(2000), "n"); None for anything else.
    """
    match = NUMBER.fullmatch(spelt)
    if not match:
        return None
    try:
        return Fraction(match.group(2)), (match.group(1) or "") + (match.group(3) or "").replace("^", "")
    except (ValueError, ZeroDivisionError):  # "0.5/2" or "1/0"
        return None


class Options:
    """The options of one question, prepared for comparison.

    `named(piece)` gives the letters that a piece of text names.
    """

    def __init__(self, question):
        self.letters = question["letters"]
        self.longest = 80 + max(map(len, question["options"].values()), default=0)
        self.options = question["options"]
        self.texts = []  # (text, letter), the longest first
        for letter, text in self.options.items():
            line = " ".join((text if SIMPLE.fullmatch(text) else plain(text)).lower().split()).strip(OUTER)
            if not CUE_WORDS.issuperset(line.split()):
                self.texts.append((line, letter))
        self.texts.sort(key=lambda item: -len(item[0]))
        self.read = {}

    @cached_property
    def keys(self):
        """{letter: key of its option}"""
        return {letter: key(text) for letter, text in self.options.items()}

    @cached_property
    def raised(self):
        """Whether an option has a raised number."""
        return any(["^" in spelt for spelt in self.keys.values()])

    @cached_property
    def lettered(self):
        """Whether an option has a letter A to F standing alone, which could be meant by such a letter."""
        return any([LONE.search(text) for text in self.options.values()])

    @cached_property
    def numbers(self):
        return {letter: number(spelt) for letter, spelt in self.keys.items()}

    def named(self, piece):
        """Letters whose option is `piece`.

        The same text, else the same but for raising, else the same number without other unit.
        """
        wanted = key(piece)
        if not wanted:
            return []
        same = [letter for letter, spelt in self.keys.items() if spelt == wanted]
        if not same and ("^" in wanted or self.raised):
            loose = wanted.replace("^", "")
            same = [letter for letter, spelt in self.keys.items() if spelt.replace("^", "") == loose]
        asked = None if same else number(wanted)
        if asked:
            value, unit = asked
            same = [
                letter
                for letter, own in self.numbers.items()
                if own and own[0] == value and (not unit or not own[1] or unit == own[1])
            ]
        return same

    def occurrences(self, lower):
        """Where option texts stand in a lower-case sentence.

        (start, end, letter), longest first, none inside another.
        """
        found = []
        for text, letter in self.texts:
            at = lower.find(text)
            while at >= 0:
                end = at + len(text)
                before = lower[max(0, at - 1) : at]
                outside = not (
                    text[0].isalnum() and before.isalnum() or text[0].isdigit() and before in ("-", ".")
                ) and not (
                    text[-1].isalnum()
                    and (lower[end : end + 1].isalnum() or re.match(r"[.,^/]\d", lower[end : end + 2]))
                )
                equal = [item for item in found if item[0] == at and item[1] == end]
                if outside and (equal or not any(start < end and at < stop for start, stop, _ in found)):
                    found.append((at, end, letter))
                at = lower.find(text, end)
        return found


# ---- a short piece that should be the answer itself --------------------------------------------------------

APART = r"(?:[^\w-]|-(?!\d))*"  # not the sign of "-18"
LEAD = re.compile(rf"(?:{NAMED}\b{APART}(?:akhir\b{APART})?)+(?:(?:ialah|adalah|is)\b{APART})?", re.I)
ONE_LETTER = re.compile(r"[(\[\s]*([A-Fa-f])[)\]\s]*(?:[.:,;!]\s*\1?)?[.:,;!\s]*(?:\s\1\b[.:,;!\s]*)*")
LETTER_AND_TEXT = re.compile(
    r"[(\[]?([A-F])([)\]]?\s*[.):,]\s*|[)\]]?(?:\s+[\-–—]\s*|[–—]\s*|-\s+)|\s+\(?|\)\s*)(\S.*)", re.S
)
TEXT_AND_LETTER = re.compile(rf"(\S.*?)\s*\((?:{NAMED}\s+)?([A-F])\)[.\s]*", re.S | re.I)
JOINED = re.compile(r"[A-F](?:\s?(?:,|/|&|dan|atau|and|or)\s?[A-F])+")
LONE = re.compile(r"(?<![A-Za-z0-9])[A-Fa-f](?![A-Za-z0-9])")
LONE_LETTERS = re.compile(r"(?<![\w\\'’-])([A-F])(?![\w-]|['’]\w)")
# "A: bukan. B: ya.", "A salah, C betul"
ONE_BY_ONE = re.compile(
    rf"(?:{NAMED}\s)?\b(?-i:([A-F]))\)?\s?[:?–—-]?\s?(?:(ya|yes|betul|benar|tepat|correct|right)|bukan|no|salah|silap|"
    r"wrong|incorrect|(?:tidak|tak|not)(?: (?:betul|benar|tepat|correct|right))?)\b(?=\s?(?:[,.;]|dan\b|and\b|\Z))",
    re.I,
)
TURNED = re.compile(r"\b(?:salah|silap|tidak|tak|bukan|not|wrong|incorrect|kecuali|except|false)\b", re.I)
MOST_BEFORE = 4  # words beside the verdicts: "Let me check"


def read_piece(piece, options):
    """A box's content or a whole line, plain -> a letter on offer, AMBIGUOUS, or None when it is not an answer.

    Remembered a question.
    """
    if len(piece) > options.longest:
        return None
    if piece not in options.read:
        options.read[piece] = piece_letter(" ".join(piece.split()), options)
    return options.read[piece]


def piece_letter(piece, options):
    """`read_piece` of what was not read before."""
    bare = LEAD.sub("", piece, count=1) if LEAD.match(piece) else piece
    match = ONE_LETTER.fullmatch(bare)
    if match:
        letter = match.group(1).upper()
        return letter if letter in options.letters else None
    if JOINED.fullmatch(bare) and not options.lettered:  # "A, B" or "A atau C", and no option reads so
        if len(set(LONE_LETTERS.findall(bare)) & set(options.letters)) > 1:
            return AMBIGUOUS
    for spelt in (piece,) if bare == piece else (piece, bare):
        same = options.named(spelt)
        if same:
            return same[0] if len(same) == 1 else AMBIGUOUS
    match = LETTER_AND_TEXT.fullmatch(bare)
    if match and match.group(1) in options.letters:
        letter, between, rest = match.groups()
        same = options.named(rest)
        if same:
            return letter if letter in same else AMBIGUOUS
        text = dict((own, text) for text, own in options.texts).get(letter)
        several = set(LONE_LETTERS.findall(bare)) & set(options.letters)
        if text and rest.lower().startswith(text):
            return letter
        if len(several) > 1:
            return one_by_one(bare, several) or AMBIGUOUS
        if between.strip() and not rest.startswith("="):
            return letter
    match = "(" in bare and TEXT_AND_LETTER.fullmatch(bare)
    if match and match.group(2).upper() in options.letters:
        same = options.named(match.group(1))
        return match.group(2).upper() if not same or match.group(2).upper() in same else AMBIGUOUS
    if "=" in bare or "≈" in bare:
        same = options.named(re.split("[=≈]", bare)[-1])
        return same[0] if len(same) == 1 else None
    named = set(LONE_LETTERS.findall(bare)) & set(options.letters)
    return one_by_one(bare, named) or AMBIGUOUS if len(named) > 1 else None


def one_by_one(piece, named):
    """The one letter that is right where every letter that the piece names has its verdict, else None."""
    said = {match[1]: bool(match[2]) for match in ONE_BY_ONE.finditer(piece)}
    rest = ONE_BY_ONE.sub("", piece)
    right = [letter for letter in said if said[letter]]
    if {*said} != named or len(right) != 1 or len(re.findall(r"\w+", rest)) > MOST_BEFORE or TURNED.search(rest):
        return None
    return right[0]
