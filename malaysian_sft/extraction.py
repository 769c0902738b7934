r"""From a response to the letter that it chooses, read as a reader does.

Collect what is said, then decide by written rules. A response is split into clauses. In each clause everything that
names an option is found: a letter, an option's text, a box. Each naming gets a polarity (affirmed, negated, compared,
conditional) and its clause a kind (final statement, conclusion, mention). `docs/extraction.md` has the rules as a table
with examples. What stays unclear is ambiguous, never a guess.
"""

import re
from functools import partial

from malaysian_sft.answer_text import (
    AMBIGUOUS,
    ANSWER_WORD,
    BOX,
    NAMED,
    ONE_LETTER,
    Options,
    answer_of,
    find_boxes,
    plain,
    read_piece,
)
from malaysian_sft.quick_reading import quick
from malaysian_sft.sentences import ASIDE, CONTRAST, CONTRAST_START, LINK, THUS, Sentences, remember_silent
from malaysian_sft.wording import direct, in_words

FINAL, CONCLUSION, MENTION, GUESS = range(4)  # the kinds, strongest first
ASIDE_START = re.compile(rf"\W*(?:{ASIDE}|jika|if|kalau|sekiranya|unless)\b")
CONDITION = re.compile(r"\b(?:jika|if|kalau|sekiranya|unless|andai)\b")
# "pelajar memilih A", "ramai yang memilih D": what others choose
OTHERS = re.compile(
    r"\b(?:pelajar|murid|ramai|orang|sesetengah|calon|students?|many|people|others?)\b[^:]{0,60}\b(?:pilih|"
    r"memilih|menjawab|jawap|jawab"
    r"|menyangka|choose|chose|pick|select|think|answer)|\b(?:pilihan|jawapan|jawaban|opsyen|options?|choices?|"
    r"answers?) (?:yang )?lain\b"
    r"|\bother (?:options?|choices?|answers?)\b"
    r"|\b(?:soalan|pertanyaan) (?:yang )?(?:sebelum|lain|lepas|lalu|seterusnya|berikutnya)"
    r"|\b(?:previous|next|other) question"
    r"|\b(?:kedua|ketiga|second)[ -](?:ter\w+|paling|best)|\b(?:terbaik|tepat) (?:kedua|ketiga)\b"
)
NEGATED = re.compile(
    r"\b(?:bukan(?:nya|lah)?|tidak|tak|salah|silap|kurang|not|isn't|wrong|incorrect|never|elakkan|elak|jangan|"
    r"don't|avoid|dielakkan|kecuali|except|mengelirukan|بوکن|بوكن|تيدق)\b|[不非没沒别別除错錯]"
)
# "tidak syak lagi jawapannya ialah C" denies nothing
NO_DENIAL = re.compile(
    r"\b(?:tidak|tiada|tak|tanpa) (?:syak|ragu|keraguan)(?: lagi)?\b|\btidak (?:dapat|boleh) (?:dinafikan|disangkal)\b"
    r"|\btidak (?:lain|diragui)(?: (?:dan|dan juga) tidak bukan)?\b"
)
# a clause of such words and an option's name takes back what was said before: "Eh, sebenarnya B"
TAKEN_BACK = re.compile(
    r"\W*(?:(?!saya\s*[,.:;])(?:(?:eh|oh|ah|hmm|alamak|aduh|oops|maaf|sorry|silap|tersilap|tersalah|salah|ralat|tunggu|wait|sekejap|ya|yes|"
    r"no|tidak|tak|bukan|pembetulan|pembetulannya|correction|koreksi|saya|semula)\b ?){1,4}[,.:;!…–-]+\s*"
    r"|(?:sebenarnya|sepatutnya|seharusnya|harusnya|mestinya|actually|i mean|i meant|maksud saya|"
    r"(?:it )?should be|it must be|"
    r"it's|it is|"
    r"(?:(?:saya|i) )?(?:tukar|ubah|change)(?: (?:jawapan|my answer))?(?: saya)? (?:kepada|ke|to))\b[\s,:]*)+"
    rf"(?:(?:saya (?:pilih|maksudkan)|i mean|yang (?:betul|benar|tepat)|ialah|adalah|{NAMED}(?:nya)?)\b[\s,:]*)*"
)
FEELS = re.compile(
    r"\b(?:saya|kami|i) (?:lebih )?(?:rasa|fikir|kira|yakin|percaya|agak|think|believe|guess)\b\W*"
    rf"(?:(?:it's|it is|bahawa|that|{NAMED})\W*)*$|\b(?:nampaknya|sepertinya|rasanya|agaknya)\W*(?:{NAMED}\W*)?$"
)
LEFT = re.compile(
    r"\b(?:tinggal(?:lah|kan)?|yang tinggal|berbaki|leaving|leaves|remaining is|left with)\W*"
    rf"(?:hanya(?:lah)?|only|{NAMED})?\W*$"
)
CONCEDED = re.compile(
    rf"\W*(?:walaupun|meskipun|walau|although|even though|though|while)\b[^,]{{1,150}},\s*((?:{NAMED}\W*)?\(?[A-F]\b)",
    re.I,
)
# the writer takes back what was said; what follows is concluded anew
RETRACTED = re.compile(
    r"(?:[.!?…\n,]\s{0,9}|^)(?:(?:tunggu|wait)(?: (?:dulu|sebentar|sekejap|a minute))?\s?[,.!…]|"
    r"(?P<mine>(?:maaf,? )?(?:saya|i) (?:ter)?"
    r"(?:silap|salah|was wrong|made a mistake))\b|let me reconsider|"
    r"(?:itu|that is|that's) (?:salah|silap|wrong)\s?[.!])",
    re.I,
)
NOTHING_MORE = re.compile(r"\W{0,20}(?:(?:tadi|di (?:situ|sini)|there|here|lah)\W{0,20}){0,3}", re.I)
COORDINATE = re.compile(r"\W*(?:manakala|sedangkan|sementara|while|whereas)\b", re.I)
MORE = re.compile(r"\b(?:lebih|paling|more|most|better|best)\b")
SIGNS_OF_SUMS = ("+", "×", "÷")
TERM = re.compile(r" ?[+×÷] ?\w")
LABELS = re.compile(r"\b(?:soalan|nombor|no|question|langkah|step|ayat|perenggan|rajah|jadual|item|bahagian)\W{1,3}$")
# "manakala jawapan yang betul ialah B" is no aside
TOLD_ASIDE = re.compile(
    rf"\W*(?:manakala|sedangkan|sementara|while|whereas)\b\W*(?:yang|the|{NAMED}|pilihan)\b[^,:]{{0,20}}?"
    rf"\b(?:betul|benar|tepat|correct|right|best)\b[^,:]{{0,20}}?(?:{LINK})"
)
REJECTS = 4  # words: "yang tidak betul ialah \\boxed{A}"
COMPARED = re.compile(r"\b(?:daripada|dari|berbanding|than|over|seperti|antara|between|unlike|mirip|compared)\b")
HEDGE = re.compile(r"\b(?:mungkin|barangkali|maybe|perhaps|possibly|pada mulanya|mula-mula|initially|at first)\b")
WORKING = re.compile(r"\b(?:langkah|step|semak|semakan|check)\b")
JOIN = re.compile(
    rf"(?:[\s,/&().:;–-]|\b(?:dan|atau|and|or|serta|iaitu|yaitu|yakni|either|{NAMED})\b|[或和与與及]\w{{0,2}}|[还還]是)*"
)
REJECTED = re.compile(
    r"[)\]\s,*:–-]*(?:\([^()\n]{0,80}\)\s*)?(?:(?:ialah|adalah|is|are|pula|juga|jelas|boleh|perlu|yang|kerana)\s+)*"
    r"(?:salah|silap|tidak|tak|bukan|kurang|not|wrong|incorrect|di(?:tolak|singkirkan)|ساله)\b|[)\]\s]*(?:不|அல்ல|இல்லை|தவற|是?错|\((?:salah|silap|wrong|incorrect)\b)"
)
VERDICT = re.compile(
    r"[)\]\s.,*:–-]*(?:\([^()\n]{0,80}\)\s*)?,?\s*\(?(?:(?:ialah|adalah|merupakan|is|yang|lebih|paling|memang|sebagai|seems|looks|nampak(?:nya)?|"
    r"as|the|most|pilihan|option)\s+)*"
    r"(?P<word>betul|benar|tepat|sesuai|menepati|correct|right|best|dipilih|jawapan(?:nya)?|jawaban(?:nya)?|answer|正确|对)\b"
    r"(?!\s+(?:yang\s+)?(?:kurang|salah|silap|tidak|wrong|mengelirukan)\b)"
)
# "jawapan A ialah ibu negeri Johor" describes an option
NAME_ONLY = re.compile(r"\b(?:jawapan|jawaban|answer)[\s(\[]*$")
DESCRIBED = re.compile(r"[)\]]*\s+(?:ialah|adalah|merupakan|is|pula|menerangkan|merujuk)\b")
ENDED = re.compile(r"[)\]\s.,*:]*")

# ---- cues: what makes a naming a statement -----------------------------------------------------------------

ANSWER = re.compile(
    r"\b(?:jawap(?:an)?(?:nya)?|jawab(?:an)?(?:nya)?|(?:jwpn|jwb)(?:nya)?|answers?)\b|答案|جواڤن|பதில்|விடை"
)
CHOOSE = re.compile(
    r"\b(?:pilih|memilih|choose|select|pick|chose|go with|go for)\b\W*(?:\b(?:untuk|the|jawapan|pilihan|opsyen|"
    r"option|huruf)\b\W*)*$|[选選]择?\W*$"
    r"|\b(?:cenderung|lean(?:ing)?) (?:kepada|ke|memilih|towards?|to)\W*(?:pilihan\W*)?$"
)
TOLD = re.compile(
    r"\b(?:betul|benar|tepat|sesuai|hampir|correct|right|best|closest)\b[^:]{0,30}?"
    rf"(?:\b(?:ialah|adalah|iaitu|yaitu|yakni|merupakan|is|be)\b|[:=→]|是)\W*(?:{NAMED}\W*)?$"
    rf"|\b(?:correct|right|best) {NAMED}\W*$"
)
CHOICE = re.compile(r"\b(?:pilihan|opsyen|opsi|options?|choice)(?:nya)?\b(?P<gap>.{0,60})$")
CHOICE_INSIDE = re.compile(rf"\b{NAMED}\b")  # "Kuala Lumpur, iaitu pilihan B"
CHOICE_LINKED = re.compile(r"\b(?:betul|benar|tepat|sesuai|akhir|final|saya|my|correct|best|terbaik)\b")
CONCLUDED = re.compile(rf"(?:\b(?:{THUS})|\bkesimpulan(?:nya)?|\bin conclusion)\b\W*(?:{NAMED}\W*)?$")
# "Confirm C.", and nothing else: "sila confirm A dengan guru" asks
CONFIRMED = re.compile(
    rf"\W*(?:(?:saya|i|ya|yes|ok(?:ay)?|memang|so|jadi|dah|sudah|yang)\W+){{0,4}}"
    rf"(?:confirm(?:ed)?|disahkan|sahih|muktamad|kunci|lock(?:ed)?(?: in)?|final)\W*(?:{NAMED}\W*)?"
)
PARTICLE = re.compile(r"\s*(?:lah|la|je|jer|sahaja|saja)?\W*")
SUMMED = re.compile(r"\b(?:kesimpulan(?:nya)?|conclusion)\b")
AFTER_LINK = re.compile(
    rf"(?:\b(?:{ANSWER_WORD}|betul|tepat)(?:nya)?\b).{{0,40}}?{LINK}\s*(?P<rest>.+)"
    rf"|\b(?:{ANSWER_WORD})(?:nya)? (?P<value>\d.*)"
)
LETTER = re.compile(r"(?<![\w\\'’+.*^])(?<!\d-)([A-F])(?![\w'’+*^-]|\s?=)(?=(?P<gap>\s+)?(?P<word>[^\W\d_]+)?)")
SMALL = re.compile(
    rf"(?:{LINK}|\b(?:jawapan|jawaban|jwpn|jwb)(?:nya)?|\bpilih(?:an)?|\boption)\s*[(\[]*(?<![a-z0-9])([a-f])[)\]]*"
    r"(?=\s*$|[.,]|\s+(?:kerana|karena|sebab|iaitu|because|since|lah)\b)"
)
FOLLOWERS = frozenset(
    "ialah adalah merupakan iaitu yaitu yakni kerana karena sebab dan atau bukan bukannya lebih paling"
    " sahaja saja lah manakala tetapi yang"
    " betul benar tepat sesuai salah silap tidak tak kurang pula juga jelas boleh perlu"
    " berbanding daripada dengan sebagai memang hanya jika"
    " maka jadi is are was and or not because since as but while"
    " with for only if correct right wrong best seperti untuk dalam serta"
    " la kot je sbb seems looks appears nampak kelihatan"
    " dipilih than over rather incorrect saya di pada ini itu".split()
)

HAN_FOLLOWERS = tuple("正 错 錯 误 誤 对 對 不 是 因 或 和 与 與 及 还 還".split())


def is_part(lower, start, end):
    """Whether a number is a label ("soalan 12") or a term of a sum ("12 + 3"), not a value by itself."""
    before = lower[max(0, start - 20) : start]
    return bool(LABELS.search(before) or before.rstrip()[-1:] in SIGNS_OF_SUMS or TERM.match(lower, end))


def namings(clause, lower, options, boxes):
    """What the clause names: (start, end, letter or AMBIGUOUS, whether it is a box), in order."""
    found = [(*item, False) for item in options.occurrences(lower)]
    found = [
        item
        for item in found
        if not (lower[item[0] : item[1]].strip("rm. ")[:1].isdigit() and is_part(lower, *item[:2]))
    ]
    taken = [(start, end) for start, end, *_ in found]
    for match in LETTER.finditer(clause):
        at, word = match.start(1), match.group("word")
        if any(start <= at < end for start, end in taken):
            continue
        beside = match.group("gap") and any(start == at + 1 + len(match.group("gap")) for start, _ in taken)
        if (
            match.group("gap")
            and word
            and not beside
            and word.lower() not in FOLLOWERS
            and not word.startswith(HAN_FOLLOWERS)
            and not word.lower().startswith("jawa")
        ):
            continue
        found.append((at, at + 1, match.group(1), False))
    if not found:
        found = [(match.start(1), match.end(1), match.group(1).upper(), False) for match in SMALL.finditer(lower)]
    at, boxes = clause.find(BOX), iter(boxes)
    while at >= 0:
        letter = read_piece(next(boxes, ""), options)
        if letter:
            found.append((at, at + 1, letter, True))
        at = clause.find(BOX, at + 1)
    return sorted(found)


def grouped(lower, found):
    """Namings joined by "dan", "atau", a comma or brackets make one group -> [[start, end, letters, polarity,
    boxed]].
    """
    groups = []
    for start, end, letter, boxed in found:
        between = lower[groups[-1][1] : start] if groups else lower[max(0, start - 120) : start]
        judged = boxed or VERDICT.match(lower, end)
        # "antara B dan D, B lebih tepat", "berbanding A, B lebih tepat"
        weighed = judged and groups and groups[-1][3] == "compared" and "," in between
        weighed = weighed and (letter in groups[-1][2] or len(groups[-1][2]) == 1 and "," == between.strip())
        if groups and JOIN.fullmatch(between) and not weighed:
            groups[-1][1], groups[-1][4] = end, groups[-1][4] or boxed
            groups[-1][2].add(letter)
            continue
        if judged and groups:  # "A salah, B betul": the first one's "salah" does not deny the second
            first = REJECTED.match(between)
            between = between[between.find(",", first.end()) + 1 or 0 :] if first else between
        if boxed:  # a box is stated apart from the sentence before it: only what stands right before it rejects it
            between = " ".join(between.split()[-REJECTS:])
        compared, negated = COMPARED.search(between), NEGATED.search(between)
        polarity = (
            "negated"
            if negated
            else "compared"
            if compared
            and not weighed
            and (groups or not ANSWER.search(between, compared.end()))
            and not (judged and between.rstrip().endswith(","))
            else "affirmed"
        )
        groups.append([start, end, {letter}, polarity, boxed])
    for index, group in enumerate(groups):
        stop = groups[index + 1][0] if index + 1 < len(groups) else group[1] + 120
        match = REJECTED.match(lower[group[1] : stop])
        # not the next one's "bukan"
        if match and (index + 1 == len(groups) or lower[group[1] + match.end() : stop].strip(" *")):
            group[3] = "negated"
    return groups


def kind_of(lower, group):
    """The kind of statement that a clause makes of an affirmed group, or None when the group only occurs in it."""
    start, end, _, _, boxed = group
    before, after = lower[max(0, start - 160) : start], lower[end : end + 120]
    verdict = VERDICT.match(after)
    ended = ENDED.fullmatch(after)
    if boxed:
        return MENTION if WORKING.search(before) else FINAL
    if NAME_ONLY.search(before) and not verdict and DESCRIBED.match(after):
        return None
    if ANSWER.search(before) or CHOOSE.search(before) or TOLD.search(before):
        return GUESS if HEDGE.search(before) else FINAL
    choice = CHOICE.search(before)
    if end - start == 1 and LEFT.search(before) or FEELS.search(before) and (ended or verdict):
        return GUESS if HEDGE.search(before) else CONCLUSION
    if choice and CHOICE_LINKED.search(choice.group("gap")):
        return FINAL
    if verdict and verdict.group("word")[:4] in ("jawa", "answ"):
        return FINAL
    if CONCLUDED.search(before) and (ended or verdict):
        return CONCLUSION
    if start < 80 and CONFIRMED.fullmatch(lower, 0, start) and PARTICLE.fullmatch(after):
        return CONCLUSION
    if SUMMED.search(before):
        return CONCLUSION
    if choice and not choice.group("gap").strip(" ([") and (ended and not after.strip().startswith(":") or verdict):
        return MENTION
    return MENTION if verdict or CHOICE_INSIDE.search(lower[start:end]) else None


def statement(clause, ended, options, boxes, following):
    """What one clause states -> (kind, letter or AMBIGUOUS), None for nothing, or "negated" when it only rejects an
    option.
    """
    lower = clause.lower()
    if len(lower) != len(clause):  # a few letters have a longer lower-case form
        lower = clause = lower
    if NO_DENIAL.search(lower):
        lower = NO_DENIAL.sub(lambda match: " " * len(match.group()), lower)
    found = namings(clause, lower, options, boxes)
    if not found:
        match = AFTER_LINK.search(lower)
        same = options.named(match.group("rest") or match.group("value")) if match else []
        return (FINAL, same[0]) if len(same) == 1 and not NEGATED.search(lower) else None
    if (
        "?" in ended
        or (ASIDE_START.match(lower) and not TOLD_ASIDE.match(lower))
        or CONDITION.search(lower)
        or OTHERS.search(lower[: found[-1][0] + 1])
    ):
        return None
    groups = grouped(lower, found)
    start, end, letters, *_ = groups[-1]
    if ended.startswith(".") and end == len(clause) and end - start == 1:  # "B." and then an option's text
        text = following().lower()
        for at, stop, letter in options.occurrences(text[: options.longest]):
            if at == 0 and (letter in letters or not text[stop:].strip(" .")):
                letters.add(letter)
            if at == 0 and text[stop:].strip(" ,").upper() == chr(ord(letter) + 1):  # "A. Ipoh B": the options repeated
                letters.add(AMBIGUOUS)
    rejected = False
    for group in groups:
        rejected = rejected or group[3] == "negated"
        contrast = rejected and group[3] == "affirmed"
        kind = kind_of(lower, group) if group[3] == "affirmed" else None
        if kind is not None or (contrast and re.search(rf"\b(?:{CONTRAST})\b", lower[: group[0]])):
            offered = group[2] & {*options.letters, AMBIGUOUS}
            if offered:
                return kind or FINAL, offered.pop() if len(offered) == 1 else AMBIGUOUS
    return "negated" if rejected else None


def statements_from_end(text, options, boxes):
    """Yield every statement of a plain text as (kind, letter or AMBIGUOUS), the last one first."""
    sentences, at = Sentences(text, options), len(boxes)
    stream = sentences.from_end()
    sentence = next(stream, None)
    while sentence:
        chain = [sentence]  # one that opens with "tetapi" is read after the one it contrasts with
        sentence = next(stream, None)
        while sentence and chain[-1][2] and sentences.adjoining(sentence[0], chain[-1][0]):
            chain.append(sentence)
            sentence = next(stream, None)
        clauses = [(*clause, place[2]) for place, parts, *_ in reversed(chain) for clause in parts]
        first = at - sum(sentences.text.count(BOX, start, end) for start, end, *_ in clauses)
        found = [*read_clauses(clauses, sentences, options, boxes[first:at])]
        key = chain[0][3]
        if not found and key and len(chain) == 1:
            remember_silent(key)
        yield from reversed(found)
        at = first


def read_clauses(clauses, sentences, options, boxes):
    """Statements of clauses that follow one another, in order; boxes: the contents of theirs."""
    rejected, at = False, 0
    for start, end, ended, after in clauses:
        clause = sentences.text[start:end]
        own = boxes[at : at + clause.count(BOX)]
        at += len(own)
        if len(clause) > 600:  # no clause is that long; the naming is at one of its ends
            clause = clause[-300:]
            own = own[len(own) - clause.count(BOX) :]
        clause, said = clause.strip(), None
        following = partial(sentences.following, after)
        turned = CONTRAST_START.match(clause.lower())
        contrast = turned if rejected else None
        conceded = CONCEDED.match(clause)
        if conceded and VERDICT.match(clause.lower(), conceded.end(1)):  # "walaupun A menarik, B lebih tepat"
            clause = clause[conceded.start(1) :]
            own = own[len(own) - clause.count(BOX) :]
        if rejected and COORDINATE.match(clause):  # "A tidak betul, manakala B betul"
            clause = COORDINATE.sub("", clause)
        back = TAKEN_BACK.match(clause.lower())
        if back and "?" not in ended:
            said = read_piece(clause[back.end() :], options)
            said = said and (FINAL, said)
        if contrast and not said:
            rest = clause[contrast.end() :]
            said = read_piece(rest, options) or statement("jawapan: " + rest, ended, options, own, following)
            said = (FINAL, said) if isinstance(said, str) and said != "negated" else said
        if not said and sentences.names(start, end):
            said = statement(clause, ended, options, own, following)
        if turned and said and said[0] == MENTION and MORE.search(clause.lower()):
            said = CONCLUSION, said[1]  # "A betul, tetapi C lebih tepat"
        rejected = said == "negated"
        if said and not rejected:
            yield said


OPENS = re.compile(rf"(?:(?i:{NAMED})\b\W*)?\(?([A-F])(?:\s*[.):–-]\s*|\s+|\)|$)")


def read_lines(text, options):
    """A lone letter or an option's text on the last line, failing that on the first.

    Options repeated without a choice: AMBIGUOUS.
    """
    lines = [line for line in text.splitlines() if line and (line[0].isalnum() or any(map(str.isalnum, line)))]
    if not lines:
        return None
    last = read_piece(lines[-1].strip(), options)
    opened = {match.group(1) for match in map(OPENS.match, lines) if match and match.group(1) in options.letters}
    if last == AMBIGUOUS or (last and (len(opened) < 2 or ONE_LETTER.fullmatch(lines[-1].strip()))):
        return last
    if len(opened) > 1:
        return AMBIGUOUS
    return read_piece(lines[0].strip(), options)


# ---- the decision ------------------------------------------------------------------------------------------


def options_of(question):
    """The question's `Options`, prepared once and kept in the question."""
    if "read" not in question:
        question["read"] = Options(question)
    return question["read"]


def extract(text, question, finish_reason="stop", thinking=False):
    """Read the chosen letter out of a response.

    text: the raw response. question: a dict with `letters` ("ABCD") and `options` ({letter: text}), which keeps what
    was prepared under "read".
    finish_reason: vLLM's; "length" means cut off. thinking: the prompt had already opened a `<think>` block. Returns
    (outcome, letter): ("answered", "B"), or one of ("ambiguous", None), ("truncated", None), ("none", None). Of a cut
    response the lone lines are not read.
    """
    found = quick(text, question, thinking)
    return ("answered", found[0]) if found else by_rules(text, question, finish_reason, thinking)


def extract_both(text, question, finish_reason="stop", thinking=False):
    """`extract` and `extract_strict` of one response, at the price of one -> (outcome, letter) twice."""
    found = quick(text, question, thinking)
    if not found:
        return both_by_rules(text, question, finish_reason, thinking)
    said = "answered", found[0]
    return said, said if found[1] else (("truncated" if finish_reason == "length" else "none"), None)


def by_rules(text, question, finish_reason="stop", thinking=False):
    """`extract` without its quick way; the same answer."""
    return both_by_rules(text, question, finish_reason, thinking)[0]


def both_by_rules(text, question, finish_reason, thinking):
    """`extract_both` without its quick way."""
    unread = ("truncated" if finish_reason == "length" else "none"), None
    text = answer_of(text, thinking)
    if text is None:
        return unread, unread
    text, options = text.replace(BOX, ""), options_of(question)
    worded = in_words(text, options)
    read, boxes = find_boxes(worded)
    letter = letter_of(read, boxes, options, finish_reason == "length")
    boxes = boxes if worded == text else find_boxes(text)[1]  # of a table too
    in_box = read_piece(boxes[-1], options) if boxes else None
    return outcome(letter, unread), outcome(in_box, unread)


def outcome(said, unread):
    return unread if said is None else (AMBIGUOUS, None) if said == AMBIGUOUS else ("answered", said)


def letter_of(text, boxes, options, cut):
    """The letter, AMBIGUOUS or None that a text says in which `BOX` stands for the boxes."""
    text = direct(plain(text))
    letter = decide(statements_from_end(text, options, boxes), cut)
    retracted = [*RETRACTED.finditer(text)]
    if retracted:
        rest = text[retracted[-1].end() :]
        later = [said for said in statements_from_end(rest, options, boxes[len(boxes) - rest.count(BOX) :])]
        if later and later[0][0] == CONCLUSION and all(kind != FINAL for kind, _ in later):
            letter = later[0][1]
        elif retracted[-1]["mine"] and not later:  # taken back: what stands in its place, if anything does
            letter = read_piece(rest.strip(" .,:;!\n"), options) or (
                AMBIGUOUS if NOTHING_MORE.fullmatch(rest) else letter
            )
    return read_lines(text, options) if letter is None and not cut else letter


def decide(statements, cut=False):
    """The last final statement; without one the last conclusion; without one what all affirming mentions agree on.

    statements: the last one first. What stands before a final statement is not read. cut: the response breaks off, so
    "mungkin A" was not its last word.
    """
    conclusion, mentioned = None, set()
    for kind, letter in statements:
        if kind == FINAL:  # "A, B dan C betul, jadi D": the conclusion says which
            return conclusion if letter == AMBIGUOUS and conclusion else letter
        if kind == CONCLUSION:
            conclusion = conclusion or letter
        if not (cut and kind == GUESS):
            mentioned.add(letter)
    return conclusion or (mentioned.pop() if len(mentioned) == 1 else AMBIGUOUS if mentioned else None)


def extract_strict(text, question, finish_reason="stop", thinking=False):
    r"""`extract` by the last `\boxed{...}` alone: what a response is worth without reading its sentences."""
    return extract_both(text, question, finish_reason, thinking)[1]
