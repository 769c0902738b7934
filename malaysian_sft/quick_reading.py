r"""The answers that most responses end with, read without the rules of `extraction`.

Nine in ten responses of a trained model end with `Jadi, jawapannya ialah $\boxed{B}$.`, `\boxed{\text{B. Ipoh}}` or a
last line `Jawapan: B`, and scoring reads hundreds of thousands. What is read here the rules read too, to the same
letter: the statement is final and affirmed, and nothing follows it. When in doubt, the rules.
"""

import re

from malaysian_sft.answer_text import CUE_WORDS, LONE

CLOSING = frozenset("$.)]*\\ \n")
LEAD_MARKS = str.maketrans("$:*,", "    ")
LETTER_AND_TEXT = re.compile(r"(?:\\text\{)?([A-F])(?:\. |\) )([A-Za-z0-9][A-Za-z0-9 .,()/-]*)\}")
LAST_LINE = re.compile(r"(?:\*\*)?([A-Za-z ]{3,40})(?:\*\*)?:(?:\*\*)? ?(?:\*\*)?([A-F])(?:\*\*)?\.?\s*")
ANSWERS = ("jawap", "jawab", "answer")
MOST_LEADS = 10_000  # phrases remembered

leads = {}  # the words before a box -> whether they lead to an answer and name nothing


def leads_to_answer(words):
    """Whether `words` are only such as "Jadi, jawapannya ialah $"."""
    known = leads.get(words)
    if known is None:
        known = len(words) < 200 and CUE_WORDS.issuperset(words.lower().translate(LEAD_MARKS).split())
        if len(leads) < MOST_LEADS:
            leads[words] = known
    return known


def after_heading(text, start):
    """Whether the line before `start` may be a heading that the rules join to what follows.

    When in doubt, True.
    """
    before = text[max(0, start - 80) : start].lower()
    return ":" in before or "jaw" in before or "answ" in before or "simpul" in before


def without_letters(question):
    """Whether no option has a letter A to F standing alone, so that a lone letter never is an option's text."""
    if "lettered" not in question:
        question["lettered"] = LONE.search("\n".join(question["options"].values())) is not None
    return not question["lettered"]


def quick(text, question, thinking):
    """(letter, whether it stands in the last box) of a response that ends as said above.

    None: ask the rules.
    """
    if thinking or "think>" in text or "assistantfinal" in text:
        return None
    last = text.rfind("\\boxed{")
    if last < 0:
        letter = None if "box" in text else last_line(text, question)
        return letter and (letter, False)
    end, letter = last + 8, text[last + 7 : last + 8]
    if text[end : end + 1] != "}":
        end, letter = letter_with_text(text, last + 7, question)
        if letter is None:
            return None
    if letter not in question["letters"] or not CLOSING.issuperset(text[end + 1 :]):
        return None
    line, stop = text.rfind("\n", 0, last) + 1, text.rfind(". ", 0, last) + 1
    start = max(line, stop)
    if text.find("box", line, last) >= 0:  # one left open earlier on the line takes the words after it away
        return None
    if not leads_to_answer(text[start:last]) or (line and line == start and after_heading(text, line)):
        return None
    return letter, True


def letter_with_text(text, start, question):
    r"""A box that holds a letter and its option's own text -> (where its brace closes, letter), else (0, None)."""
    match = LETTER_AND_TEXT.match(text, start)
    if not match or question["options"].get(match.group(1)) != match.group(2) or not without_letters(question):
        return 0, None
    end = match.end() - 1
    if text[start] == "\\":
        end += 1
    return (end, match.group(1)) if text[end : end + 1] == "}" else (0, None)


def last_line(text, question):
    """The letter of a last line such as "Jawapan: B", or None."""
    line = text.rfind("\n", 0, len(text.rstrip())) + 1
    if len(text) - line > 80:
        return None
    match = LAST_LINE.fullmatch(text, line)
    if not match or match.group(2) not in question["letters"]:
        return None
    words = match.group(1).lower().split()
    if not CUE_WORDS.issuperset(words) or not any(word.startswith(ANSWERS) for word in words):
        return None
    if not without_letters(question) or (line and after_heading(text, line)):
        return None
    return match.group(2)
