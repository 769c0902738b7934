r"""The answers that most responses end with, read without the rules of `extraction`.

Nine in ten responses of a trained model end with `Jadi, jawapannya ialah $\boxed{B}$.`, `\boxed{\text{B. Ipoh}}` or a
last line `Jawapan: B`, and scoring reads hundreds of thousands. What is read here the rules read too, to the same
letter: the statement is final and affirmed, and nothing follows it. When in doubt, the rules.
"""

import re
from functools import lru_cache

from malaysian_sft.answer_text import CUE_WORDS, LONE, answer_of

CLOSING = frozenset("$.)]*\\ \n")
LEAD_MARKS = str.maketrans("$:*,", "    ")
LETTER_AND_TEXT = re.compile(r"(?:\\text\{)?([A-F])(?:\. |\) )([A-Za-z0-9][A-Za-z0-9 .,()/-]*)\}")
LAST_LINE = re.compile(r"(?:\*\*)?([A-Za-z ]{3,40})(?:\*\*)?:(?:\*\*)? ?(?:\*\*)?([A-F])(?:\*\*)?\.?\s*")
ANSWERS = ("jawap", "jawab", "answer")
LONGEST_LEAD = 200  # characters
MOST_ENDINGS = 10_000  # remembered: most responses end in one of a few hundred ways

endings = {}  # a last sentence that has a box -> the letter that it states, "" if it is not as simple as that


@lru_cache(MOST_ENDINGS)
def leads_to_answer(words):
    """Whether `words` are only such as "Jadi, jawapannya ialah $"."""
    return len(words) < LONGEST_LEAD and CUE_WORDS.issuperset(words.lower().translate(LEAD_MARKS).split())


def letter_of_ending(ending):
    r"""The letter of a last sentence such as "Jadi, jawapannya ialah $\boxed{B}$.", or ""."""
    words, _, rest = ending.rpartition("\\boxed{")
    simple = rest[1:2] == "}" and CLOSING.issuperset(rest[2:]) and "box" not in words and leads_to_answer(words)
    letter = rest[0] if simple else ""
    if len(ending) < LONGEST_LEAD and len(endings) < MOST_ENDINGS:
        endings[ending] = letter
    return letter


def after_heading(text, start):
    """Whether the line before `start` may be a heading that the rules join to what follows.

    When in doubt, True.
    """
    before = text[max(0, start - 80) : start].lower()
    # a box left open takes the rest of its line away, and what stands before the box may be a heading
    if text.find("box", text.rfind("\n", 0, max(0, start - 80)) + 1, start) >= 0:
        return True
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
    if thinking or (">" in text and "think>" in text):  # to look for one sign is quickest
        text = answer_of(text, thinking)
        if text is None:
            return None
    line, stop = text.rfind("\n") + 1, text.rfind(". ") + 1
    start = stop if stop > line else line
    ending = text[start:]
    letter = endings.get(ending)
    if letter is None:
        if "\\boxed{" not in ending:
            return quick_by_parts(text, question)
        letter = letter_of_ending(ending)
    if not letter:
        return quick_by_parts(text, question)
    if letter not in question["letters"]:
        return None
    # a box left open earlier on the line takes the words after it away; few words have an x
    if line < start and text.find("x", line, start) >= 0 and text.find("box", line, start) >= 0:
        return None
    return None if line and line == start and after_heading(text, line) else (letter, True)


def quick_by_parts(text, question):
    """`quick` of a response after its reasoning, whatever line or sentence its box stands on."""
    last = text.rfind("\\boxed{") if "\\" in text else -1
    if last < 0:
        letter = last_line(text, question)
        return (letter, False) if letter and not ("x" in text and "box" in text) else None
    end, letter = last + 8, text[last + 7 : last + 8]
    if text[end : end + 1] != "}":
        end, letter = letter_with_text(text, last + 7, question)
        if letter is None:
            return None
    if letter not in question["letters"] or not CLOSING.issuperset(text[end + 1 :]):
        return None
    line, stop = text.rfind("\n", 0, last) + 1, text.rfind(". ", 0, last) + 1
    start = max(line, stop)
    if text.find("x", line, last) >= 0 and text.find("box", line, last) >= 0:
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
    if not CUE_WORDS.issuperset(words) or not any([word.startswith(ANSWERS) for word in words]):
        return None
    if not without_letters(question) or (line and after_heading(text, line)):
        return None
    return match.group(2)
