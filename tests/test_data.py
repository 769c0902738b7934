"""The sample data: well formed, consistent with itself, and no question copied into the conversations.

Run: python -m pytest tests/test_data.py. Reads data/ only.
"""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
SYSTEM = r"First, you try to think step-by-step in malay, after that, put your final answer within $\boxed{}$."
FIELDS = {
    "ayat_aktif_pasif": {"input", "output"},
    "coding": {"question", "answer"},
    "malaysian_reasoning": {"system", "input", "answer", "reasoning"},
    "meta_prompt": {"input", "answer"},
    "multiple_choice_qa": {"question", "answer"},
}
CATEGORIES = {"STEM", "Language", "Social science", "Others", "Humanities"}
QUESTION_FIELDS = {
    "id",
    "prompt",
    "answer",
    "year",
    "subject",
    "subject_eng",
    "category",
    "level",
    "options",
    "num_options",
    "key",
}
OPTION = re.compile(r"([A-E])(?:\.\s*|\s{2,})(\S.*)")
BOX = re.compile(r"\$\\boxed\{(.*?)\}\$")
CHOSEN = re.compile(r"^Jawapannya ialah (.+), iaitu pilihan ([A-E])\.$", re.MULTILINE)


@pytest.fixture(scope="module")
def conversations():
    """Schema name -> rows; reading as UTF-8 is strict, so a wrong encoding fails here."""
    found = {}
    for path in sorted((DATA / "conversations").glob("*.jsonl")):
        text = path.read_bytes().decode("utf-8")
        assert text.endswith("\n") and "\r" not in text, path
        found[path.stem] = [json.loads(line) for line in text.removesuffix("\n").split("\n")]
    return found


@pytest.fixture(scope="module")
def questions():
    return json.loads((DATA / "questions.json").read_bytes().decode("utf-8"))


def offered(prompt):
    """The last lines of a prompt that are lettered options -> {letter: text}, in order from A."""
    found = [OPTION.fullmatch(line) for line in prompt.splitlines()]
    found = {match.group(1): match.group(2) for match in found if match}
    assert list(found) == list("ABCDE")[: len(found)] and len(found) >= 2, prompt
    return found


def stem(prompt):
    """A question without its options, case, punctuation and spacing."""
    return words("\n".join(line for line in prompt.splitlines() if not OPTION.fullmatch(line)))


def words(text):
    return tuple(re.findall(r"\w+", text.lower()))


def ngrams(text, n=13):
    tokens = words(text)
    return {tokens[i : i + n] for i in range(len(tokens) - n + 1)}


def balanced(keys, options):
    """No letter takes more than 35 % of the questions that offer exactly four options (25 % is even)."""
    counts = Counter(key for key, count in zip(keys, options, strict=True) if count == 4)
    return max(counts.values()) <= 0.35 * counts.total() and set(counts) == set("ABCD")


def test_conversations_have_the_five_schemas(conversations):
    assert {name: set(rows[0]) for name, rows in conversations.items()} == FIELDS
    for name, rows in conversations.items():
        for row in rows:
            assert set(row) == FIELDS[name], row
            for value in row.values():
                assert isinstance(value, str) and value and value == value.strip(), row
                assert "\ufffd" not in value, row
    assert sum(map(len, conversations.values())) >= 360
    assert len(conversations["malaysian_reasoning"]) >= 240
    assert min(map(len, conversations.values())) >= 20


def test_conversations_are_unique(conversations):
    asked = Counter(words(row.get("input") or row["question"]) for rows in conversations.values() for row in rows)
    assert [text for text, count in asked.items() if count > 1] == []


def test_reasoning_answers_box_the_option_they_name(conversations):
    rows = conversations["malaysian_reasoning"]
    keys, counts = [], []
    for row in rows:
        assert row["system"] == SYSTEM
        options = offered(row["input"])
        boxes, chosen = BOX.findall(row["answer"]), CHOSEN.findall(row["answer"])
        assert len(boxes) == len(chosen) == 1, row
        text, letter = chosen[0]
        assert boxes[0] == letter and options[letter].removesuffix(".") == text, row
        assert row["answer"].endswith(f"Jawapan akhir: $\\boxed{{{letter}}}$"), row
        assert "boxed" not in row["reasoning"] and len(row["reasoning"].split()) < 60, row
        keys.append(letter)
        counts.append(len(options))
    assert balanced(keys, counts)


def test_multiple_choice_answers_name_the_option_they_letter(conversations):
    keys, counts = [], []
    for row in conversations["multiple_choice_qa"]:
        options = offered(row["question"])
        ((text, letter),) = CHOSEN.findall(row["answer"])
        assert options[letter].removesuffix(".") == text, row
        keys.append(letter)
        counts.append(len(options))
    assert balanced(keys, counts)


def test_questions_have_the_fields_of_malaymmlu(questions):
    assert len(questions) >= 100
    assert [row["id"] for row in questions] == list(range(len(questions)))
    for row in questions:
        assert set(row) == QUESTION_FIELDS, row
        for name in QUESTION_FIELDS - {"id", "options", "num_options"}:
            assert isinstance(row[name], str) and row[name].strip(), row
        assert row["level"] in ("Primary", "Secondary"), row
        options = offered(row["prompt"])
        assert row["num_options"] == len(options) == len(row["options"]), row
        assert row["prompt"].split("\n")[1:] == row["options"], row
        assert len(set(options.values())) == len(options), row
        assert row["key"] in options and row["options"]["ABCDE".index(row["key"])] == row["answer"], row


def test_questions_are_spread_over_categories_keys_and_forms(questions):
    by_category = Counter(row["category"] for row in questions)
    assert set(by_category) == CATEGORIES
    assert max(by_category.values()) - min(by_category.values()) <= 2
    assert {row["num_options"] for row in questions} == {2, 3, 4, 5}
    assert balanced([row["key"] for row in questions], [row["num_options"] for row in questions])
    irregular = [
        row for row in questions if not row["options"][0].startswith("A. ") or row["options"][0].startswith("A.  ")
    ]
    assert 0.1 < len(irregular) / len(questions) < 0.4
    assert len({stem(row["prompt"]) for row in questions}) == len(questions)


def test_no_question_is_in_the_conversations(questions, conversations):
    texts = [text for rows in conversations.values() for row in rows for name, text in row.items() if name != "system"]
    trained = set().union(*map(ngrams, texts))
    assert len(trained) > 1000
    stems = {stem(text) for text in texts}
    for row in questions:
        assert not ngrams(row["prompt"]) & trained, row["prompt"]
        assert stem(row["prompt"]) not in stems, row["prompt"]
