"""The sentences of a response that may name an option, found from the end, cut into clauses."""

import re
from bisect import bisect_left

from malaysian_sft.answer_text import ANSWER_WORD, BOX, NAMED

# clauses that are read from the end; what a longer response said before is not its answer
MOST_CLAUSES = 200
# sentences read before that state nothing, whatever the question ("Pilihan A kurang sesuai"): models repeat themselves
silent, MOST_SILENT = set(), 50_000
LINK_WORDS = "ialah|adalah|iaitu|yaitu|yakni|merupakan|is|are|be|là|是"
LINK = rf"(?:{LINK_WORDS}|[:：=→>–-])"

SMALL_LEADS = (
    *LINK_WORDS.split("|"),
    *":：=→>–-",
    "jawapan",
    "jawaban",
    "jwpn",
    "jwb",
    "nya",
    "pilih",
    "pilihan",
    "option",
)

CONTRAST = r"tetapi|tapi|namun|sebaliknya|melainkan|but|rather|而是"
ASIDE = (
    r"kerana|karena|sebab(?! itu)|because|since|manakala|sedangkan|sementara|while|whereas|walaupun|meskipun|"
    r"walau|although|even though|"
    r"selain|other than"
)
THUS = (
    r"jadi|maka|justeru|(?:dengan|oleh) (?:itu|sebab itu|kerana itu|karena itu|demikian|yang demikian)|"
    r"therefore|thus|hence|so"
)
# line ends, "?!;" and full stops before a space; a set of characters stands first, so that the search skips to them
HARD_BREAK = re.compile(r"[\n?!;.](?<!\.(?!\s|$))(?:(?<=[?!;])[?!;]+)?\s{0,9}")
SOFT_BREAK = re.compile(
    rf",?[ \t]{{1,4}}(?<!oleh )(?=(?:{CONTRAST}|{ASIDE})\b)|,[ \t]{{1,4}}(?=(?:{THUS}|jawapan|jawaban|saya|the|"
    rf"i|yang|pilihan yang)\b)",
    re.I,
)
# a sentence without one of these states nothing
STEMS = tuple(
    "jawap jawab jwpn answer 答案 pilih milih opsyen opti opsi choice choose chose select pick simpul conclu "
    "correct betul benar tepat right best closest hampir sesuai oleh jadi maka justeru therefore thus hence "
    "tetapi tapi sebaliknya melainkan 选 選 正确 demikian cenderung lean tinggal leav left saya kami think believe "
    "guess jwb sebenar sepatut harus mesti actually it's maaf silap sorry eh, oh, oops wait tukar ubah change nampak "
    "sepertinya rasanya agaknya menepati ralat correction koreksi confirm disahkan sahih "
    "muktamad kunci lock final جواڤن பதில் விடை".split()
) + (
    *("go with", "go for", "so ", "but ", "dengan itu", "ya, ", "yes, ", "no, ", "tidak, ", "bukan, ", "salah, "),
    *("it is ", "should be ", BOX),
)
CONTRASTS = CONTRAST.split("|")
CONTRAST_START = re.compile(rf"\W*(?:{CONTRAST})\b\W*(?:yang\b\W*)?(?:{NAMED}\W*)?")
BLOCK = 500  # characters at the end that are searched first
FARTHEST = 1000
LONGEST_HEADING = 60
HEADING = re.compile(
    rf"(?:.*[ ,])?(?:{ANSWER_WORD}|kesimpulan)(?:nya)?\b[^:.\n]{{0,40}}:?|.{{0,40}}\b(?:ialah|"
    r"adalah|is)\s*:"
)
# a byte a character, for a search many times as fast as a pattern's: L a letter A to F in either case, w another letter
# or digit, a space for all else
SIGNS = bytes(
    ord("L" if chr(code) in "ABCDEFabcdef" else "w" if code < 128 and chr(code).isalnum() else " ")
    for code in range(256)
)
VALUE = re.compile(rf"(?:{ANSWER_WORD}|betul|tepat)(?:nya)?\b")
MOST_BETWEEN = 40  # characters between such a word and the link
LINK_START = re.compile(LINK_WORDS + "|:|：|=|→|>|–|-")  # LINK; a search skips to the first letters of words alone
LONGEST_LINK = len("merupakan")


def sentences_from(text, at):
    """Yield (start, end, what ended it, start of the next) of the sentences of a plain text from `at`, where one
    starts; blank ones too.

    A heading ("### Jawapan") takes its next line along.
    """
    length = len(text)
    for match in HARD_BREAK.finditer(text, at):
        start, end = match.span()
        mark = text[start]
        if mark == "\n" and end < length and is_heading(text[at:start]):
            continue
        yield at, start, mark, end
        at = end
    yield at, length, "", length


def sentences_to(text, at, place):
    """The sentences from `at` to the one with `place`, as `sentences_from` yields them."""
    first = HARD_BREAK.search(text, at)  # mostly the end of that one
    if first and first.start() > place and text[first.start()] != "\n":
        return [(at, first.start(), text[first.start()], first.end())]
    found = []
    for sentence in sentences_from(text, at):
        found.append(sentence)
        if sentence[1] > place:
            break
    return found


def start_before(text, place, low=0):
    """Where a sentence starts, whatever stands before it: after the last full stop before `place`, or at `low`.

    Not after a line, which may be a heading.
    """
    near = max(low, place - FARTHEST)  # so that a text without full stops is searched once only
    stop = text.rfind(". ", near, place)
    stop = max(stop, text.rfind(".\n", max(near, stop), place))
    if stop < 0:
        return low
    return HARD_BREAK.match(text, stop).end() if text[stop + 2 : stop + 3].isspace() else stop + 2


def is_heading(line):
    line = line.strip()
    return len(line) <= LONGEST_HEADING and bool(HEADING.fullmatch(line.lower()))


def lone_letters(text, lower):
    """Where a letter A to F stands alone; a small one if words lead to it: a superset of what LETTER and SMALL take."""
    signs, found = b" %b " % text.encode("ascii", "replace").translate(SIGNS), []
    at = signs.find(b" L ")
    while at >= 0:
        found.append(at)
        at = signs.find(b" L ", at + 2)
    if found and ("_" in text or not text.isascii()):  # what was taken for a space may be part of a word
        found = [at for at in found if not (text[at + 1 : at + 2].isalnum() or text[at + 1 : at + 2] == "_")]
    firm = [at for at in found if text[at] < "a" or leads_to_small(lower, at)]
    # after one of these words a clause is read whatever it names
    return firm if len(firm) < len(found) and not any([word in lower for word in CONTRASTS]) else found


def leads_to_small(lower, at):
    """Whether what stands before a small letter may be what SMALL asks for; the English "a" is no answer."""
    before = lower[max(0, at - 40) : at].rstrip("([").rstrip()
    return not before or before.endswith(SMALL_LEADS)


def all_places(text, word, start, end):
    found, at = [], text.find(word, start, end)
    while at >= 0:
        found.append(at)
        at = text.find(word, at + len(word), end)
    return found


def value_places(lower, start, end):
    """Where a word such as "jawapannya" stands with a link or number after it: perhaps an option's value."""
    found = []
    for word in ("jawa", "answer", "betul", "tepat"):
        at = lower.find(word, start, end)
        while at >= 0:
            match = VALUE.match(lower, at)
            if match:
                after = match.end()
                stop = after + MOST_BETWEEN + LONGEST_LINK
                line = lower.find("\n", after, stop)
                link = LINK_START.search(lower, after, stop if line < 0 else line)
                if (
                    link
                    and link.start() <= after + MOST_BETWEEN
                    or (lower[after : after + 1] == " " and lower[after + 1 : after + 2].isdecimal())
                ):
                    found.append(at)
            at = lower.find(word, at + len(word), end)
    return found


def naming_places(text, lower, options, start, end):
    """Where something may name an option -> (lone letters and boxes, options' texts and values said to be the answer).

    start, end: of sentences. More than the rules will take, never less, and found at the speed of a search: what has
    none needs no rules.
    """
    letters = lone_letters(text[start:end], lower[start:end])
    letters = [start + at for at in letters] if start else letters
    if BOX in text:
        letters += all_places(text, BOX, start, end)
    found = value_places(lower, start, end)
    for own, _ in options.texts:
        at = lower.find(own, start, end + len(own) - 1)
        if at >= 0:
            found += all_places(lower, own, at, end + len(own) - 1)
    return letters, sorted(found)


class Sentences:
    """The sentences of a plain text that have a cue and may name an option, from the end, cut into clauses."""

    def __init__(self, text, options):
        self.lower = text.lower()
        # a few letters have a longer lower-case form
        self.text = text if len(self.lower) == len(text) else self.lower
        self.options = options
        self.values, self.places = [], []  # `naming_places` of what was read

    def from_end(self):
        """Yield ((start, end, start of the next), clauses, whether it opens with "tetapi", key), the last sentence
        first.

        clauses: [(start, end, what ended it)]. key: of `silent`, None if the sentence has a box, an option's text or a
        value. Sentences known to be silent are passed over, unless one with "tetapi" follows.
        """
        count, contrast = 0, None
        for start, end, mark, after in self.naming_from_end():
            if count >= MOST_CLAUSES:
                return
            key = None
            if end - start < 200 and mark != "?" and not self.has_value(start, end):
                key = self.text[start:end], self.options.letters
                if not contrast and key in silent:
                    continue
            if not has_cue(self.lower[start:end]):
                continue
            clauses = self.clauses(start, end, mark)
            count += len(clauses)
            contrast = CONTRAST_START.match(self.lower[clauses[0][0] : clauses[0][1]])
            yield (start, end, after), clauses, contrast, None if contrast or key and BOX in key[0] else key

    def naming_from_end(self):
        """Yield the sentences that may name an option as `sentences_from` does, the last one first.

        The end is searched first, since most have their answer there, and the text is cut only around what was found.
        """
        stop = len(self.text)
        while stop:
            last = stop == len(self.text) and stop > 2 * BLOCK
            start = start_before(self.text, stop - BLOCK) if last else 0
            letters, values = naming_places(self.text, self.lower, self.options, start, stop)
            places = sorted(letters + values)
            self.values, self.places = values + self.values, places + self.places
            while places:
                begin = start_before(self.text, places[-1], start)
                for sentence in reversed(sentences_to(self.text, begin, places[-1])):
                    if places and places[-1] >= sentence[0]:
                        yield sentence
                        while places and places[-1] >= sentence[0]:
                            places.pop()
            stop = start

    def clauses(self, start, end, mark):
        """A sentence cut before "tetapi", "kerana", ", jadi" -> [(start, end, what ended it)], none of them blank."""
        found, start = [], start + len(self.text[start:end]) - len(self.text[start:end].lstrip())
        for match in SOFT_BREAK.finditer(self.text, start, end):
            found.append((start, match.start(), ","))
            start = match.end()
        found.append((start, end, mark))
        return [part for part in found if self.text[part[0] : part[1]].strip()]

    def following(self, after):
        """The next sentence that is not blank; after: where it or a blank one starts."""
        later = (self.text[start:end].strip() for start, end, *_ in sentences_from(self.text, after))
        return next(filter(None, later), "")

    def adjoining(self, earlier, later):
        """Whether no sentence with a cue stands between the two."""
        return not has_cue(self.lower[earlier[1] : later[0]])

    def has_value(self, start, end):
        return self.values and bisect_left(self.values, start) < bisect_left(self.values, end)

    def names(self, start, end):
        return bisect_left(self.places, start) < bisect_left(self.places, end)


def has_cue(sentence):
    for stem in STEMS:
        if stem in sentence:
            return True
    return False


def remember_silent(key):
    """Keep a sentence that states nothing; `silent` is emptied when it is full."""
    if len(silent) >= MOST_SILENT:
        silent.clear()
    silent.add(key)
