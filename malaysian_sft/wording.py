"""What a response says by its layout or by leaving out, put into words that the rules of `extraction` read.

An answer in a table's column, a tick or a cross beside an option, a check box, text struck out: `in_words`. "Tiada
jawapan lain selain B": `direct`. Every line is looked at once and every pattern is bounded, so that it is linear.
"""

import re

from malaysian_sft.answer_text import LONE_LETTERS, NAMED, TURNED, plain, read_piece

STRUCK = re.compile(
    # as in markdown the signs stand close to the words, so that "Okay~~ B~~" strikes nothing out
    r"(?<![~\w])~~(?=[^\s~])[^~\n]{0,200}(?<=[^\s~])~~(?!~)"
    r"|<(?P<tag>s|del|strike)>[^<\n]{0,200}</(?P=tag)>|\\sout\{[^{}\n]{0,200}\}"
)
TICKS, CROSSES, EMPTY = "✓✔✅☑◉👉➡", "✗✘❌✖", "☐⬜◻○"
SIGN = re.compile(
    rf"[(\[]?(?:(?P<tick>[{TICKS}])|(?P<cross>[{CROSSES}])|[{EMPTY}])\ufe0f?[)\]]?|\[(?:(?P<box>[xX])| ?)\]"
)
START = re.compile(r"[ \t>#•|*_-]{0,12}(?:\d{1,2}[.)] {1,4})?[*_]{0,2}")
MOST_SIGNS = 12  # on a line; a line with more lists no options
CHECK_LIST = re.compile(r"(?:\A|\n)[ \t]{0,9}[-*+] {1,4}\[[xX ]\]|\[ \]")
MORE = re.compile(r"\w{2}[.;!?] \w|\b(?:jawa|jadi|maka|tetapi|tapi|but|so)\b")  # another sentence or clause
REMARK = re.compile(r"[\s.,;|]*(?:\([^()\n]{0,80}\)[\s.|]*)?")
ANSWER_HEAD = re.compile(
    r"(?:(?:kunci|my|the|final|correct|best) )*(?:jawapan|jawaban|jwpn|answer)(?:nya)?"
    r"(?: (?:akhir|saya|yang|paling|betul|benar|tepat|sebenar|dipilih))*"
    r"|(?:pilihan|opsyen|option|choice) (?:yang )?(?:paling )?(?:betul|benar|tepat|dipilih|akhir)"
    r"|(?:correct|best|final|chosen) (?:option|choice)"
)
VERDICT_HEAD = re.compile(
    r"(?:betul|benar|tepat|correct|right|true)(?: ?(?:/|atau|or) ?(?:salah|tidak|wrong|false))?|status|keputusan|"
    r"penilaian|verdict|semakan"
)
OTHERS_HEAD = re.compile(r"\b(?:murid|pelajar|calon|nama|responden|orang|kumpulan|students?|names?|models?|groups?)\b")
RIGHT = re.compile(r"(?:ya|yes|betul|benar|tepat|correct|right|true)(?=\s*(?:[,.:;(–-]|\Z))", re.I)
WRONG = re.compile(
    r"(?:bukan|no|salah|silap|wrong|incorrect|false|(?:tidak|tak|kurang|not)(?: (?:betul|benar|tepat|correct|right))?)"
    r"(?=\s*(?:[,.:;(–-]|\Z))",
    re.I,
)
GOOD = r"(?:betul|benar|tepat|sesuai|correct|right)"
BAD = rf"(?:salah|silap|wrong|incorrect|(?:tidak|tak|kurang|not) {GOOD})"
# "no other option is correct, but B is popular" goes on with something else
BUT = r"(?:,? (?:selain(?: daripada| dari)?|melainkan|kecuali|except(?: for)?|other than)| but)"
# only such words may stand between "tiada" and "selain": "tiada yang salah selain B" says something else
NONE_BUT = re.compile(
    rf"\b(?:tiada|tidak ada|tak ada|takde|no(?:ne)?|there is no)\b(?: (?:{NAMED}|{GOOD}|lain|yang|satu|pun|other|of|"
    rf"them|the|is|are|that|options?|choices?|answers?|lebih|paling)){{1,7}}{BUT} (?=\S)",
    re.I,
)
ALL_WRONG_BUT = re.compile(
    rf"\b(?:semua(?:nya)?|all|every)(?: (?:{NAMED}s?|lain|other|others|the|of|them|itu|yang|adalah|is|are)){{0,5}} "
    rf"{BAD}{BUT} (?=\S)",
    re.I,
)
BESIDES = re.compile(
    rf"\b(?:selain(?: daripada| dari)?|kecuali|other than|apart from|except(?: for)?) ([^,.;?!\n]{{1,60}}),"
    rf" (?:(?:semua(?:nya)?|all|everything)(?: (?:{NAMED}s?|lain|else|other|others|the|of|them|itu|yang|adalah|is|are))"
    rf"{{0,5}} {BAD}|(?:tiada|tidak ada|tak ada|no(?:ne)?)(?: (?:{NAMED}|lain|yang|satu|pun|of|them|is|are|other))"
    rf"{{1,6}} {GOOD})\b",
    re.I,
)


def in_words(text, options):
    """`text` with its tables, ticks and check boxes in words and what is struck out left out."""
    # to look for one sign is quickest, and most texts have none of these
    if ("~" in text and "~~" in text) or ("<" in text and "</" in text) or "\\sout" in text:
        text = STRUCK.sub(" ", text)
    if "|" in text and "--" in text:
        text = with_tables(text, options)
    boxes = "[" in text and ("[x]" in text or "[X]" in text or "[ ]" in text)
    if (boxes and CHECK_LIST.search(text)) or (not text.isascii() and any(sign in text for sign in TICKS + CROSSES)):
        text = "\n".join(lines_with_signs(text.split("\n"), options))
    return text


def lines_with_signs(lines, options):
    """Lines with their signs in words; under a heading such as "Pilihan yang salah:" a tick says wrong too."""
    turned, read = False, {}
    for line in lines:
        if line.rstrip(" *").endswith(":"):
            turned = TURNED.search(line)
        elif not SIGN.search(line):
            turned = turned and not line.strip()
        key = line, bool(turned)
        if key not in read:
            read[key] = with_signs(line, options, key[1])
        yield read[key]


def direct(text):
    """A plain text in which "tiada jawapan lain selain B" is "jawapannya ialah B"."""
    if (
        "elain" in text
        or "ecuali" in text
        or " but " in text
        or "xcept" in text
        or "ther than" in text
        or "part" in text
    ):
        text = NONE_BUT.sub("jawapannya ialah ", text)
        text = ALL_WRONG_BUT.sub("jawapannya ialah ", text)
        text = BESIDES.sub(r"jawapannya ialah \1", text)
    return text


def verdict(letter, right):
    return f"Pilihan {letter} {'betul' if right else 'salah'}."


def with_signs(line, options, turned):
    """A line of nothing but options and the signs before or after them, in words; any other line as it is."""
    signs = [*SIGN.finditer(line)]
    if not signs or len(signs) > MOST_SIGNS:
        return line
    first = START.match(line).end()
    ends = [sign.end() for sign in signs]
    starts = [sign.start() for sign in signs]
    if starts[0] == first:  # before the options
        pieces = [line[start:end] for start, end in zip(ends, [*starts[1:], len(line)], strict=True)]
    elif REMARK.fullmatch(line, ends[-1]):
        pieces = [line[start:end] for start, end in zip([first, *ends[:-1]], starts, strict=True)]
    else:
        return line
    letters = [read_option(piece, options) for piece in pieces]
    # "✅ Jawapan: B" says it in words already
    if None in letters or any("jawa" in piece.lower() or "answer" in piece.lower() for piece in pieces):
        return line
    if not {*letters} <= {*options.letters}:  # "✅ B. Ipoh", where Ipoh is C: it is the text that is unclear
        return " ".join(pieces)
    said = [
        verdict(letter, not (sign["cross"] or turned))
        for sign, letter in zip(signs, letters, strict=True)
        if sign["tick"] or sign["cross"] or sign["box"]
    ]
    return " ".join(said) or line


def read_option(piece, options):
    """The letter of a piece that is an option and no more, AMBIGUOUS or None."""
    letter = None if "box" in piece else read_cell(piece, options)
    if letter in options.options:
        others = {own for *_, own in options.occurrences(plain(piece).lower())} - {letter}
        lone = set() if options.lettered else {*LONE_LETTERS.findall(piece)} - {letter}
        return None if others or lone or MORE.search(piece) or TURNED.search(piece) else letter
    return letter


def read_cell(cell, options):
    return read_piece(plain(cell).strip(), options) if len(cell) <= 2 * options.longest else None


def cells_of(line):
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def with_tables(text, options):
    """Each table that has an answer in a column, or a verdict beside each option, as a sentence."""
    lines, kept, at = text.split("\n"), [], 0
    while at < len(lines):
        line = lines[at]
        if kept and "|" in kept[-1] and "--" in line and "|" in line and {*line} <= {*"|-: \t\r"}:
            stop, end = at + 1, "|" if kept[-1].rstrip().endswith("|") else ""
            rows = lines[stop : stop + MOST_SIGNS + 1]  # with more it is no list of options
            while stop - at <= len(rows) and "|" in lines[stop] and lines[stop].rstrip().endswith(end):  # not cut short
                stop += 1
            said = said_by_table(kept[-1], lines[at + 1 : stop], options)
            if said:
                kept[-1:] = [said]
                at = stop
                continue
        kept.append(line)
        at += 1
    return "\n".join(kept)


def said_by_table(head, rows, options):
    names = [re.sub(r"\([^()]{0,40}\)", "", plain(cell)).lower().strip(" ?:.") for cell in cells_of(head)]
    table = [row for row in map(cells_of, rows) if len(row) == len(names)]
    answers = [column for column, name in enumerate(names) if ANSWER_HEAD.fullmatch(name)]
    judged = answers + [column for column, name in enumerate(names) if VERDICT_HEAD.fullmatch(name)]
    if not table or len(table) > MOST_SIGNS or len(judged) != 1 or any(map(OTHERS_HEAD.search, names)):
        return None
    column = judged[0]
    if any("box" in cell for row in table for cell in row[:column] + row[column + 1 :]):  # says more than its column
        return None
    if len(table) == 1:
        letter = read_cell(table[0][column], options) if answers else None
        return f"Jawapan: {letter}" if letter and letter in options.letters else None
    said = [right_or_wrong(row[column]) for row in table]
    for other in range(len(names)):
        letters = [read_cell(row[other], options) for row in table] if other != column else []
        if None not in said and letters and {*letters} <= {*options.letters} and len({*letters}) == len(letters):
            return " ".join(verdict(letter, right) for letter, right in zip(letters, said, strict=True))
    return None


def right_or_wrong(cell):
    """Whether a table's cell says that its row is right; None: it says neither."""
    sign = SIGN.match(cell)
    if sign and (sign["tick"] or sign["cross"]):
        return bool(sign["tick"])
    words = plain(cell).strip()
    if "box" in cell or MORE.search(words):
        return None
    return True if RIGHT.match(words) else False if WRONG.match(words) else None
