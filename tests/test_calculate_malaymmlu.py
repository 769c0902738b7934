"""calculate_malaymmlu.py: extraction against a table, the original's block to the last digit, statistics against scipy
and known truth."""

import argparse
import csv
import json
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import calculate_malaymmlu as scorer
from malaysian_sft.contamination import contamination_report, overlaps
from malaysian_sft.extraction import extract
from malaysian_sft.generations import MISSING, NONE, TRUNCATED, find_directories, read_answers
from malaysian_sft.questions import (
    HUB_COUNTS,
    HUB_DATASET,
    HUB_FILE,
    HUB_LOCK,
    HUB_REVISION,
    OPTION_LINE,
    benchmark_questions,
    checksum,
    load_questions,
    parse_options,
    read_lock,
)
from malaysian_sft.report import notes, percent
from malaysian_sft.statistics import (
    Row,
    bootstrap,
    count_outcomes,
    interval,
    measure,
    original_scores,
    score,
    t_interval,
)

ROOT = Path(__file__).resolve().parent.parent
CASES = [
    json.loads(line) for line in (ROOT / "tests/extraction_cases.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
]

# The published block of Qwen3-32B at step 960: category, questions, acc1, acc3
PUBLISHED = [
    ("STEM", 2443, "0.8088415882112158", "0.8935734752353663"),
    ("Language", 6288, "0.7865776081424937", "0.8956743002544529"),
    ("Social science", 6918, "0.7108991037872218", "0.8519803411390575"),
    ("Others", 4169, "0.7505396977692492", "0.8671144159270808"),
    ("Humanities", 4395, "0.7742889647326507", "0.8873720136518771"),
]
PUBLISHED_AVERAGE = "average 0.7662293925285664 0.8791429092415669"


def question(index, category="STEM", key="A", letters="ABCD", **more):
    options = {letter: f"pilihan {letter}" for letter in letters}
    made = {
        "index": index,
        "id": index,
        "prompt": f"Soalan {index}?",
        "key": key,
        "letters": letters,
        "options": options,
    }
    return made | {"category": category, "subject": "Sains", "level": "Primary"} | more


def raw(index, category="STEM", key="A", n=4):
    options = [f"{'ABCDE'[j]}. nilai {j}" for j in range(n)]
    prompt = f"Soalan {index}?\n" + "\n".join(options)
    return {
        "id": index,
        "prompt": prompt,
        "options": options,
        "num_options": n,
        "key": key,
        "category": category,
        "subject": "Sains",
    }


def save(directory, records, **args):
    directory.mkdir(parents=True)
    lines = (json.dumps({"finish_reason": "stop", **record}, ensure_ascii=False) + "\n" for record in records)
    (directory / "generations.jsonl").write_text("".join(lines), encoding="utf-8")
    if args:
        (directory / "args.json").write_text(json.dumps(args))
    return directory


def run(cwd, *given):
    """The command as a user runs it."""
    command = [sys.executable, str(ROOT / "calculate_malaymmlu.py"), *map(str, given)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def call(monkeypatch, capsys):
    """The same inside this process, which spares the imports -> (exit code, stdout, stderr)."""

    def start(cwd, *given):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["calculate_malaymmlu.py", *map(str, given)])
        capsys.readouterr()
        code = 0
        try:
            scorer.main()
        except SystemExit as stopped:
            code = 1
            print(stopped, file=sys.stderr)
        return argparse.Namespace(returncode=code, **dict(zip(("stdout", "stderr"), capsys.readouterr(), strict=True)))

    return start


# ---- extraction ------------------------------------------------------------------------------------------------------


def test_the_end_of_an_option_is_found_as_by_the_shortest_match():
    slow = re.compile(r"\s*\(?([A-F])(?:\s*[.):\-–]\s*|\s+)(\S.*?)\s*")
    draw = random.Random(6)
    for _ in range(5000):
        line = "".join(
            draw.choices(("A", "B", "(", ")", ".", ":", "-", " ", "  ", "\n", "x", "é", "\t"), k=draw.randrange(12))
        )
        fast, found = OPTION_LINE.fullmatch(line), slow.fullmatch(line)
        assert (fast and fast.groups()) == (found and found.groups()), line


@pytest.mark.parametrize("line", ["A.x y", "A.   x y", "A  x y", "A) x y", "(A) x y", "A: x y", "A - x y"])
def test_irregular_delimiters(line):
    expected = {"A": "x y", "B": "z"}
    assert parse_options([line, line.replace("A", "B").replace("x y", "z")], "") == expected
    assert parse_options(None, "Soalan?\n" + line + "\n" + line.replace("A", "B").replace("x y", "z")) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": "E"}, "`key` must be one of the letters on offer"),
        ({"prompt": " "}, "`prompt` is missing"),
        ({"category": None}, "`category` is missing"),
        ({"num_options": 9}, "`num_options` must be 2 to 6"),
        ({"num_options": float("nan")}, "`num_options` must be 2 to 6, found nan"),
        ({"num_options": float("inf")}, "`num_options` must be 2 to 6, found inf"),  # as 1e400 is read
        ({"num_options": [[[4]]]}, "`num_options` must be 2 to 6"),
        ({"num_options": None, "options": None, "prompt": "Apa?"}, "`num_options` is missing and no options stand in"),
        ({"prompt": "Apa \ud83d?"}, "half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changed, message):
    path = tmp_path / "q.json"
    path.write_text(json.dumps([raw(0), raw(1) | changed]))
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        load_questions(path)


def test_a_question_file_may_be_json_lines_with_any_character(tmp_path):
    rows = [raw(0), raw(1) | {"prompt": "Satu\u2028dua\x85tiga?\nA. x\nB. y\nC. z\nD. w"}]
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    assert [asked["prompt"] for asked in load_questions(tmp_path / "q.jsonl")] == [row["prompt"] for row in rows]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "is not JSON"),
        ("[" * 99999, "is not JSON"),
        ("5", ": expected an object"),
        (json.dumps(raw(3) | {"key": "E"}), ": `key` must be"),
        (json.dumps(raw(3) | {"prompt": "\ud83d"}), ": half of a surrogate pair"),
    ],
    ids=lambda value: value[:10],
)
def test_a_bad_line_of_json_lines_is_called_by_its_number(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text(f"\ufeff{json.dumps(raw(0))}\n\n{json.dumps(raw(2))}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"q.jsonl, line 4 ?{message}"):
        load_questions(path)


def test_a_deeply_nested_list_of_questions_is_refused(tmp_path):
    (tmp_path / "q.json").write_text("[" * 99999)
    with pytest.raises(ValueError, match="q.json is not JSON"):
        load_questions(tmp_path / "q.json")


def test_the_sample_questions_load_and_their_prompts_hold_the_same_options():
    questions = load_questions(ROOT / "data/questions.json")
    assert len(questions) >= 60 and {len(q["letters"]) for q in questions} == {2, 3, 4, 5}
    for asked in questions:
        assert parse_options(None, asked["prompt"]) == asked["options"]


def test_options_keep_their_own_letters_and_their_number_is_checked(tmp_path):
    """A list that has lost its first option must not shift the letters of the others."""
    lost = raw(0, key="D") | {"options": ["B. dua", "C. tiga", "D. empat"], "num_options": 3}
    (tmp_path / "q.json").write_text(json.dumps([lost, raw(1) | {"options": ["satu", "A dua"], "num_options": 2}]))
    first, second = load_questions(tmp_path / "q.json")
    assert (first["letters"], first["options"]) == ("BCD", {"B": "dua", "C": "tiga", "D": "empat"})
    assert extract("Jawapan: tiga", first) == ("answered", "C")
    assert extract("Jawapan: A", first) == ("none", None)
    assert second["options"] == {"A": "satu", "B": "A dua"}
    (tmp_path / "q.json").write_text(json.dumps([raw(0) | {"num_options": 3}]))
    with pytest.raises(ValueError, match="row 0: `num_options` is 3, but `options` has 4"):
        load_questions(tmp_path / "q.json")


# ---- MalayMMLU from the hub ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark_text():
    """A stand-in of the published file: its numbers of questions, and one key that is not among its options."""
    rows = [
        raw(i, category) for i, category in enumerate(name for name, count in HUB_COUNTS.items() for _ in range(count))
    ]
    rows[7] |= {"key": "E", "num_options": 5}
    return json.dumps(rows)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub client without a network, over a cache that the test fills: publish(commit, text) also moves `main`
    there."""
    repository = tmp_path / "cache" / ("datasets--" + HUB_DATASET.replace("/", "--"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def publish(commit, text):
        file = repository / "snapshots" / commit / HUB_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(commit)
        return file

    return publish


def test_the_pinned_release_is_verified(hub, benchmark_text, monkeypatch, capsys, tmp_path):
    file = hub(HUB_REVISION, benchmark_text)
    with pytest.raises(ValueError, match=f"at e765ce2.* has sha256 {checksum(file)}, but the program says 70b67e84"):
        benchmark_questions(None)
    monkeypatch.setattr("malaysian_sft.questions.HUB_SHA256", checksum(file))
    hub("b" * 40, "[]")  # main moves on
    questions, facts = benchmark_questions(None, root=tmp_path)
    assert facts == {
        "source": "UMxYTLAILabs/MalayMMLU/MalayMMLU_0shot.json",
        "revision": HUB_REVISION,
        "sha256": checksum(file),
        "rows": 24213,
    }
    assert not (tmp_path / HUB_LOCK).exists()
    # a slip in the published file is noted, not refused: the official program reads such a row too
    assert (
        questions[7]["letters"] == "ABCDE"
        and "row 7: the key E is not among the options ABCD" in capsys.readouterr().err
    )


def test_another_release_is_trusted_once_and_then_held(hub, benchmark_text, tmp_path):
    first, second = "a" * 40, "b" * 40
    file = hub(first, benchmark_text)
    _, facts = benchmark_questions(None, "main", tmp_path)
    assert json.loads((tmp_path / HUB_LOCK).read_text()) == {"main": {"revision": first, "sha256": facts["sha256"]}}
    hub(second, benchmark_text.replace("Soalan 0?", "Soalan sifar?"))  # main moves on, this evaluation does not
    assert benchmark_questions(None, "main", tmp_path)[1]["revision"] == first
    _, newer = benchmark_questions(None, second, tmp_path)
    assert newer["revision"] == second and set(read_lock(tmp_path / HUB_LOCK)) == {"main", second}
    file.write_text(benchmark_text.replace("Soalan 0?", "Soalan nol?"))
    with pytest.raises(
        ValueError,
        match=f"at main has sha256 {checksum(file)}, but .*malaymmlu.lock.json says {facts['sha256']}",
    ):
        benchmark_questions(None, "main", tmp_path)
    hub("c" * 40, json.dumps([raw(0)]))
    with pytest.raises(ValueError, match="holds {'STEM': 1}, not MalayMMLU's"):
        benchmark_questions(None, "c" * 40, tmp_path)
    (tmp_path / HUB_LOCK).write_text('{"main": 1}')
    with pytest.raises(ValueError, match="malaymmlu.lock.json is damaged"):
        benchmark_questions(None, "main", tmp_path)


def test_checkpoints_of_different_releases_are_not_scored_together(hub, benchmark_text, tmp_path, call):
    commit, records = "a" * 40, [{"index": 0, "id": 0, "sample": 0, "text": "A"}]
    sha256 = checksum(hub(commit, benchmark_text))
    save(tmp_path / "malaymmlu-a", records, names=["a"], questions_revision=commit, questions_sha256=sha256)
    save(tmp_path / "malaymmlu-b", records, names=["b"], questions_revision="b" * 40, questions_sha256="0" * 64)
    shown = call(tmp_path, "--pattern", "malaymmlu-*")
    assert shown.returncode == 1 and "malaymmlu-b was generated from questions with sha256 0000" in shown.stderr
    shown = call(tmp_path, "--pattern", "malaymmlu-a", "--resamples", 20)
    assert "malaymmlu-a: NOT FINISHED, 24,212 of 24,213 samples are missing" in shown.stdout


# ---- the original's block --------------------------------------------------------------------------------------------


def test_the_published_block_to_the_last_digit(tmp_path, call):
    """Integer counts behind the published numbers, spread over responses of all kinds, give the published lines
    again."""
    questions, records, missing = [], [], 72639 - 72634
    for category, n, acc1, acc3 in PUBLISHED:
        first, anywhere = round(float(acc1) * n), round(float(acc3) * n)
        for i in range(n):
            index = len(questions)
            questions.append(raw(index, category, "ABCD"[index % 4]))
            key, wrong = "ABCD"[index % 4], "ABCD"[(index + 1) % 4]
            if i < first:  # right at once; the others do not matter
                answers = [key, wrong, wrong]
            elif i < anywhere:  # right later
                answers = [wrong, wrong, key]
            else:
                answers = [wrong, wrong, wrong]
            if i == 0 and missing:  # five responses without an answer: the first available sample counts instead
                answers = ["", key, wrong] if missing > 1 else [key, wrong, ""]
                missing -= 1
            for sample, letter in enumerate(answers):
                text = rf"Fikir dahulu. \boxed{{{letter}}}" if letter else "Saya tidak tahu."
                records.append({"index": index, "id": index, "sample": sample, "text": text})
    name = "malaymmlu-ds3-qwen3-32b-lora-256-checkpoint-960"
    save(tmp_path / name, records)
    (tmp_path / "q.json").write_text(json.dumps(questions))
    shown = call(
        tmp_path,
        "--pattern",
        "malaymmlu-ds3-qwen3-32b-lora-256-checkpoint-*",
        "--questions",
        "q.json",
        "--resamples",
        50,
    )
    assert shown.returncode == 0, shown.stderr
    block = [
        f"{name} 72634",
        "",
        name,
        *(f"{category} {acc1} {acc3}" for category, _, acc1, acc3 in PUBLISHED),
        PUBLISHED_AVERAGE,
        "",
    ]
    assert shown.stdout.splitlines()[: len(block)] == block


def test_the_committed_sample_has_its_hand_counted_score(tmp_path, call):
    directory = ROOT / "data/sample_generations"
    known = json.loads((directory / "known_scores.json").read_text())
    flags = ["--questions", ROOT / "data/questions.json", "--limit", known["limit"], "--json", tmp_path / "s.json"]
    shown = call(directory, "--pattern", "malaymmlu-*", *flags)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[: len(known["block"])] == known["block"]
    (row,) = json.loads((tmp_path / "s.json").read_text())["checkpoints"]
    assert row["answers"] == known["answers"]
    assert {name: item["value"] for name, item in row["micro"].items()} == pytest.approx(
        {name: float(Fraction(value)) for name, value in known["micro"].items()}
    )


# ---- directories -----------------------------------------------------------------------------------------------------


def test_directories_are_found_by_either_name_once_and_in_natural_order(tmp_path):
    for step in (1280, 960, 320):
        names = [f"run-checkpoint-{step}", f"Base-lora-8-{step}"]
        save(tmp_path / f"malaymmlu-run-checkpoint-{step}", [], names=names, adapter_fingerprint=str(step))
    found = find_directories("malaymmlu-Base-lora-8-*", tmp_path)
    assert [name for name, _ in found] == [f"malaymmlu-Base-lora-8-{step}" for step in (320, 960, 1280)]
    found = find_directories("malaymmlu-*320,malaymmlu-run-*", tmp_path)
    assert [name for name, _ in found] == [f"malaymmlu-run-checkpoint-{step}" for step in (320, 960, 1280)]
    # the same checkpoint again under its other name
    save(
        tmp_path / "malaymmlu-Base-lora-8-320",
        [],
        names=["run-checkpoint-320", "Base-lora-8-320"],
        adapter_fingerprint="320",
    )
    assert len(find_directories("malaymmlu-*", tmp_path)) == 3
    with pytest.raises(ValueError, match="matches 'nothing'.*malaymmlu-run-checkpoint-960"):
        find_directories("nothing", tmp_path)


def test_records_of_another_question_file_are_refused(tmp_path):
    questions = [question(0), question(1)]
    save(tmp_path / "a", [{"index": 1, "id": 77, "sample": 0, "text": "A"}])
    with pytest.raises(ValueError, match="line 1: id 77, but question 1 is 1"):
        read_answers(tmp_path / "a", questions)
    save(tmp_path / "b", [{"index": 5, "id": 5, "sample": 0, "text": "A"}])
    with pytest.raises(ValueError, match="line 1: no question 5"):
        read_answers(tmp_path / "b", questions)


@pytest.mark.parametrize("field", [{"text": None}, {"text": 5}, {"sample": "0"}, {"sample": -1}])
def test_a_record_with_a_wrong_type_is_refused_by_line(tmp_path, field):
    good = {"index": 0, "id": 0, "sample": 0, "text": "A"}
    save(tmp_path / "a", [good, {**good, "sample": 1} | field])
    with pytest.raises(ValueError, match="line 2: expected a text and a sample"):
        read_answers(tmp_path / "a", [question(0)])


def test_half_a_surrogate_pair_is_refused_by_line(tmp_path, call):
    good = {"index": 0, "id": 0, "sample": 0, "text": "Jawapan: A \U0001f600"}
    path = save(tmp_path / "malaymmlu-a", [good]) / "generations.jsonl"
    with open(path, "a") as file:
        file.write(json.dumps(good | {"sample": 1, "text": "Jawapan: A \ud83d"}) + "\n")
    (tmp_path / "q.json").write_text(json.dumps([raw(0)]))
    shown = call(tmp_path, "--pattern", "malaymmlu-a", "--questions", "q.json")
    assert shown.returncode == 1 and shown.stderr.count("\n") == 1
    assert "generations.jsonl, line 2: half of a surrogate pair (such as \\ud83d alone)" in shown.stderr


def test_a_limit_below_one_is_refused(tmp_path, call):
    assert "--limit 0: expected a positive number" in call(tmp_path, "--pattern", "x", "--limit", 0).stderr


@pytest.mark.parametrize("count", [0, -1, 100_000_000])
def test_an_impossible_number_of_resamples_is_refused(tmp_path, call, count):
    shown = call(tmp_path, "--pattern", "x", "--resamples", count)
    assert shown.returncode == 1 and f"--resamples {count}: expected 10 to 100,000" in shown.stderr


def test_a_half_written_last_line_is_passed_over_and_damage_is_not(tmp_path, capsys):
    path = save(tmp_path / "a", [{"index": 0, "id": 0, "sample": 0, "text": "A"}]) / "generations.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"index": 0, "sam')
    assert read_answers(tmp_path / "a", [question(0)]).tolist() == [[0]]
    assert "half written" in capsys.readouterr().err
    path.write_text("{broken\n" + whole)
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_answers(tmp_path / "a", [question(0)])


def test_samples_that_were_asked_for_and_not_made_count_as_wrong_and_are_reported(tmp_path, call):
    records = [{"index": i, "id": i, "sample": s, "text": "Jawapan: A"} for i in range(2) for s in range(2)]
    save(tmp_path / "malaymmlu-x", records, names=["x"], samples=3)
    (tmp_path / "q.json").write_text(json.dumps([raw(0), raw(1)]))
    shown = call(tmp_path, "--pattern", "malaymmlu-x", "--questions", "q.json", "--resamples", 20, "--json", "s.json")
    assert "malaymmlu-x: NOT FINISHED, 2 of 6 samples are missing and count as wrong" in shown.stdout
    assert json.loads((tmp_path / "s.json").read_text())["checkpoints"][0]["micro"]["average"][
        "value"
    ] == pytest.approx(2 / 3)


# ---- measures and statistics -----------------------------------------------------------------------------------------


def test_a_question_written_twice_counts_as_it_was_first_whichever_way_it_is_read(tmp_path):
    lines = (
        "Jadi, jawapannya ialah $\\boxed{A}$.",
        "Saya pilih B.",
        "Entahlah.",
        "Jadi, jawapannya ialah $\\boxed{C}$.",
    )
    orders = [lines[at:] + lines[:at] for at in range(4)]
    records = [
        {"index": index, "id": index, "sample": 0, "text": text} for index, order in enumerate(orders) for text in order
    ]
    records.append(records[0] | {"sample": 2})  # the arrays are widened while the rules have some to read
    path = save(tmp_path / "malaymmlu-x", records)
    read = read_answers(path, [question(index) for index in range(4)])
    assert read.tolist() == [[0, MISSING, 0], [1, MISSING, MISSING], [NONE, MISSING, MISSING], [2, MISSING, MISSING]]


def test_measures_of_hand_made_answers():
    A, B, C = 0, 1, 2
    answers = np.array(
        [
            [A, A, B],  # majority right
            [A, B, C],  # three-way tie that the key is in
            [B, B, A],  # majority wrong
            [NONE, A, B],  # strict acc@1 wrong, tie of two
            [NONE, TRUNCATED, MISSING],
            [B, C, B],
        ],
        np.int8,
    )
    expected = [
        [1, 2 / 3, 1, 1],
        [1, 1 / 3, 1 / 3, 1],
        [0, 1 / 3, 0, 1],
        [0, 1 / 3, 1 / 2, 1],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    assert measure(answers, np.zeros(6, np.int8)) == pytest.approx(np.array(expected))
    original = original_scores(answers, [question(i) for i in range(6)])
    assert original["STEM"] == (3 / 6, 4 / 6)  # the first available answer: questions 0, 1 and 3
    more = np.array([[B, NONE, B, B, A], [B, NONE, B, A, B]], np.int8)  # five samples: the first three answers count
    assert original_scores(more, [question(0), question(1)])["STEM"] == (0.0, 1 / 2)
    assert count_outcomes(answers) == {"answered": 14, "none": 2, "ambiguous": 0, "truncated": 1, "missing": 1}


def simulate(generator, n, truth_mean=0.6, spread=0.3, samples=3):
    """Right or wrong for n questions whose difficulty varies: samples of a question go together. Its true mean is known
    exactly."""
    a = truth_mean * (1 / spread - 1)
    b = (1 - truth_mean) * (1 / spread - 1)
    return (generator.random((n, samples)) < generator.beta(a, b, n)[:, None]).astype(float)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """400 simulated benchmarks of 2 x 60 questions x 3 samples: 95 % intervals, and those that ignore the clusters fail
    the same test."""
    generator = np.random.default_rng(5)
    groups, hits, naive = [np.arange(60), np.arange(60, 120)], 0, 0
    trials = 400
    for trial in range(trials):
        right = simulate(generator, 120)
        value = right.mean(1)
        means = bootstrap(value[:, None], groups, 400, trial)[:, :, 0].mean(1)
        low, high = interval(means, 60, value)
        hits += low <= 0.6 <= high
        half = 1.96 * right.std() / np.sqrt(right.size)
        naive += abs(right.mean() - 0.6) <= half
    assert stats.binomtest(hits, trials, 0.95).pvalue > 0.005, hits / trials
    assert naive / trials < 0.93


def test_bootstrap_spread_equals_the_formula():
    generator = np.random.default_rng(1)
    values = generator.random((500, 2))
    groups = [np.arange(200), np.arange(200, 500)]
    means = bootstrap(values, groups, 4000, 0)
    assert means.shape == (4000, 2, 2)
    for g, index in enumerate(groups):
        assert means[:, g].mean(0) == pytest.approx(values[index].mean(0), abs=2e-3)
        assert means[:, g].std(0) == pytest.approx(values[index].std(0) / np.sqrt(len(index)), rel=0.05)
    # every column sees the same resamples, so a difference of equal columns is exactly zero
    same = bootstrap(np.repeat(values[:, :1], 2, 1), groups, 50, 0)
    assert np.array_equal(same[..., 0], same[..., 1])


def test_bootstrap_in_small_pieces_draws_and_sums_as_in_one():
    values = np.random.default_rng(2).integers(0, 4, (3001, 6)) / 3
    groups = [np.arange(7), np.arange(7, 40), np.arange(40, 3001)]  # the last is drawn in many pieces
    generator = np.random.default_rng(9)
    for g, index in enumerate(groups):
        n, chosen = len(index), values[index].astype(np.float32)
        drawn = generator.integers(0, n, size=(700, n), dtype=np.int32)
        weights = np.stack([np.bincount(one, minlength=n) for one in drawn]).astype(np.float32)
        assert np.array_equal(bootstrap(values, groups, 700, 9)[:, g], (weights @ chosen / n).astype(np.float64))


def test_intervals_of_all_right_and_all_wrong_are_the_exact_binomial_ones():
    for value, k in ((1.0, 20), (0.0, 0)):
        low, high = interval(np.full(50, value), 20, np.full(20, value))
        exact = stats.binomtest(k, 20).proportion_ci(0.95, "exact")
        assert (low, high) == pytest.approx((exact.low, exact.high))
    low, high = t_interval(np.full(12, 2 / 3))  # two of three samples right everywhere: as 8 of 12
    exact = stats.binomtest(8, 12).proportion_ci(0.95, "exact")
    assert (low, high) == pytest.approx((exact.low, exact.high))
    values = np.random.default_rng(0).random(300)
    expected = stats.t.interval(0.95, 299, loc=values.mean(), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)


def test_micro_macro_chance_and_protocols():
    questions = [
        question(0, "STEM"),
        question(1, "STEM", letters="AB"),
        question(2, "STEM"),
        question(3, "Language", letters="ABCDE"),
    ]
    answers = np.array([[0], [0], [1], [0]], np.int8)
    row = Row("malaymmlu-x", Path("."), {"protocol": "first_token"}, answers)
    other = Row("malaymmlu-y", Path("."), {"protocol": "reasoning"}, np.repeat(answers, 3, 1))
    report = score([row, other], questions, 100)
    first = report["checkpoints"][0]
    assert first["micro"]["acc@1"]["value"] == pytest.approx(3 / 4)
    assert first["macro"]["acc@1"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert report["chance"]["one sample"] == pytest.approx((1 / 4 + 1 / 2 + 1 / 4 + 1 / 5) / 4)
    assert report["chance"]["any of 3"] == pytest.approx(1 - (2 * 0.75**3 + 0.5**3 + 0.8**3) / 4)
    assert report["comparisons"] == []  # different protocols are never compared
    assert any("first-token protocol" in line for line in notes(report, [row, other]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r" is \[\]; expected an object"),
        ('{"names": null}', ": names is None; expected a list of names"),
        ('{"names": []}', r": names is \[\]; expected a list of names"),
        ('{"names": [5]}', r": names is \[5\]; expected a list of names"),
        *((f'{{"samples": {value}}}', ": samples is .*; expected a whole") for value in ('"3"', "null", -2, "1e9", 0)),
        ('{"samples": 1000000000}', ": samples is 1000000000; expected a whole number from 1 to 1,000"),
        ('{"protocol": []}', r": protocol is \[\]; expected \"reasoning\" or"),
        ('{"retries": "x"}', ": retries is 'x'; expected a whole number"),
        ('{"answer_prefix": {}}', ": answer_prefix is {}; expected"),
        ('{"questions_revision": 5}', ": questions_revision is 5; expected a text"),
        ("[" * 99999, " is not JSON"),
        ("\udcff", " is not JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_a_damaged_args_json_is_refused_by_key(tmp_path, call, text, message):
    (tmp_path / "q.json").write_text(json.dumps([raw(0), raw(1)]))
    for name in ("malaymmlu-a", "malaymmlu-b"):
        save(tmp_path / name, [{"index": i, "id": i, "sample": 0, "text": "Jawapan: A"} for i in range(2)])
    (tmp_path / "malaymmlu-a/args.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    shown = call(tmp_path, "--pattern", "malaymmlu-*", "--questions", "q.json", "--resamples", 50)
    assert shown.returncode == 1 and re.search(f"^error: malaymmlu-a/args.json{message}.*$", shown.stderr.strip())
    shown = call(tmp_path, "--pattern", "malaymmlu-b", "--questions", "q.json", "--resamples", 50)
    assert shown.returncode == 0 and "malaymmlu-a is passed over" in shown.stderr


# ---- contamination ---------------------------------------------------------------------------------------------------


def test_contamination_finds_shared_runs_of_words_and_whole_short_questions(tmp_path):
    long = " ".join(f"kata{i}" for i in range(30))
    questions = [
        question(0, prompt=long),
        question(1, prompt="Soalan lain " + " ".join(f"asing{i}" for i in range(20))),
        question(2, prompt="Apakah ibu negeri Perak?"),
        question(3, prompt="Apakah ibu negeri Johor?"),
        question(
            4, prompt=" ".join(f"hampir{i}" for i in range(12)) + " beza " + " ".join(f"sama{i}" for i in range(12))
        ),
    ]
    rows = [
        # 13 words of question 0
        {
            "question": "x",
            "answer": "awal, " + " ".join(f"KATA{i}," for i in range(5, 18)) + " akhir",
        },
        {"messages": [{"role": "user", "content": "Soalan: apakah ibu negeri  Perak"}]},
        # 12 at most
        {
            "question": " ".join(f"hampir{i}" for i in range(12)),
            "answer": " ".join(f"sama{i}" for i in range(12)),
        },
    ]
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert overlaps(questions, str(tmp_path / "train"))[0].tolist() == [True, False, True, False, False]
    answers = np.array([[0], [1], [0], [0], [1]], np.int8)
    report = contamination_report([Row("m", Path("."), {}, answers)], questions, str(tmp_path / "train"))
    assert report["questions"] == [0, 2] and report["count"] == 2
    (row,) = report["checkpoints"]
    assert [row[name] for name in ("all", "without", "only")] == pytest.approx([3 / 5, 1 / 3, 1.0])
    assert row["counts"] == {"all": 5, "without": 3, "only": 2}
    with pytest.raises(ValueError, match="no .jsonl, .json or .parquet file"):
        overlaps(questions, str(tmp_path / "nowhere"))


def test_contamination_takes_stems_and_options_apart(tmp_path):
    instruction = "Baca petikan di bawah dengan teliti kemudian pilih satu jawapan yang paling tepat."
    assert len(instruction.split()) == 13

    def asked(index, stem, *options):
        lettered = dict(zip("ABCD", options, strict=False))
        prompt = stem + "\n" + "\n".join(f"{letter}. {text}" for letter, text in lettered.items())
        return question(index, prompt=prompt, options=lettered, letters="ABCD"[: len(options)])

    long = "Apakah nama sungai terpanjang di negeri yang terletak di pantai timur Semenanjung Malaysia itu?"
    questions = [
        asked(0, f"{instruction} {long}", "Pahang", "Perak", "Kelantan"),
        asked(1, f"{instruction} Siapakah pengarang novel Salina?", "A. Samad Said", "Usman Awang", "Shahnon Ahmad"),
        asked(2, "Pilih ejaan yang betul.", "menyapu", "mensapu"),  # the same stem twice
        asked(3, "Pilih ejaan yang betul.", "mengecat", "mencat"),
    ]
    rows = [
        {"question": f"{long}\nA. Kelantan\nB. Pahang\nC. Perak", "answer": "B"},  # shuffled
        {"question": f"{instruction} Sesuatu yang lain sama sekali."},
        {"question": "Pilih ejaan yang betul.", "options": ["mencat", "mengecat"]},
    ]
    text = "\n\n".join(json.dumps(row) for row in rows) + "\n\n"  # blank lines
    (tmp_path / "train.jsonl").write_text(text)
    report = contamination_report([], questions, str(tmp_path / "train.jsonl"))
    assert report["questions"] == [0, 3] and report["with_options"] == [0, 3]
    (tmp_path / "train.jsonl").write_text(text + "{broken\n")
    with pytest.raises(ValueError, match="train.jsonl, line 7: not JSONL"):
        overlaps(questions, str(tmp_path / "train.jsonl"))
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": long}))
    assert contamination_report([], questions, str(tmp_path / "train.jsonl"))["with_options"] == []


@pytest.mark.parametrize("name", ["empty.jsonl", "blank.jsonl", "list.json", "numbers.jsonl", "folder"])
def test_training_data_without_text_is_refused_by_name(tmp_path, name):
    """It would be reported as free of overlap."""
    (tmp_path / "folder").mkdir()
    texts = {"empty.jsonl": "", "blank.jsonl": "\n\n", "list.json": "[]", "numbers.jsonl": "5\n{}\n"}
    for file, text in (texts | {"folder/empty.jsonl": ""}).items():
        (tmp_path / file).write_text(text)
    (tmp_path / "good.jsonl").write_text('{"text": "Apakah ibu negeri Perak?"}\n')
    source = f"{tmp_path}/good.jsonl,{tmp_path / name}"
    with pytest.raises(ValueError, match=f"--contamination: {tmp_path / name} holds no row with text"):
        overlaps([question(0)], source)
    with pytest.raises(ValueError, match="--contamination ' ,': expected .jsonl"):
        overlaps([question(0)], " ,")


def test_a_byte_order_mark_of_training_data_is_passed_over_and_a_directory_is_no_file(tmp_path):
    questions = [question(0, prompt="Apakah ibu negeri Perak?")]
    row = json.dumps({"text": "Apakah ibu negeri Perak?"})
    folder = tmp_path / "train/d.jsonl"
    folder.mkdir(parents=True)
    for path in (tmp_path / "a.jsonl", tmp_path / "a.json", folder / "a.jsonl"):
        path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\n")
        source = path.parent if path.parent == folder else path
        assert overlaps(questions, str(source))[0].tolist() == [True]
    assert overlaps(questions, str(tmp_path / "train"))[0].tolist() == [True]
    (tmp_path / "a.jsonl").write_bytes(row.encode() + b"\n" + row.encode() + b"\n\xff\n")
    with pytest.raises(ValueError, match="a.jsonl, line 3: not JSONL"):
        overlaps(questions, str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("[" * 99999)
    with pytest.raises(ValueError, match="a.jsonl, line 1: not JSONL"):
        overlaps(questions, str(tmp_path / "a.jsonl"))


# ---- written files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two checkpoints and a base model, scored with every output asked for."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "q.json").write_text(json.dumps([raw(i, ["STEM", "Language"][i % 2], "ABCD"[i % 4]) for i in range(40)]))
    generator = np.random.default_rng(0)
    for name, skill, adapter in (("Base", 0.3, None), ("run-checkpoint-5", 0.6, "x"), ("run-checkpoint-10", 0.8, "y")):
        records = []
        for i in range(40):
            for sample in range(3):
                letter = "ABCD"[i % 4] if generator.random() < skill else "ABCD"[(i + 1) % 4]
                text = f"<script>alert(1)</script></script><!-- \\boxed{{{letter}}}"
                records.append({"index": i, "id": i, "sample": sample, "text": text})
        save(
            folder / f"malaymmlu-{name}",
            records,
            names=[name],
            adapter=adapter,
            adapter_fingerprint=adapter,
            protocol="reasoning",
        )
    flags = [
        "--json",
        "out/s.json",
        "--csv",
        "out/s.csv",
        "--markdown",
        "out/s.md",
        "--plot",
        "out/s.png",
        "--html",
        "out/s.html",
    ]
    (folder / "train.jsonl").write_text(json.dumps({"question": raw(3)["prompt"]}) + "\n\n")
    flags += ["--contamination", "train.jsonl"]
    shown = run(folder, "--pattern", "malaymmlu-*", "--questions", "q.json", "--resamples", 200, "--audit", 2, *flags)
    assert shown.returncode == 0, shown.stderr
    return folder / "out", shown.stdout


def test_json_csv_and_markdown_hold_the_same_numbers(written):
    folder, shown = written
    report = json.loads((folder / "s.json").read_text())
    assert [row["name"] for row in report["checkpoints"]] == [
        "malaymmlu-Base",
        "malaymmlu-run-checkpoint-5",
        "malaymmlu-run-checkpoint-10",
    ]
    best = report["checkpoints"][2]
    with open(folder / "s.csv", newline="") as file:
        table = list(csv.DictReader(file))
    wanted = {"checkpoint": "malaymmlu-run-checkpoint-10", "kind": "micro", "measure": "average"}
    [line] = [line for line in table if wanted.items() <= line.items()]
    assert line["questions"] == "40" and float(line["value"]) == best["micro"]["average"]["value"]
    text = percent(best["micro"]["average"])
    assert text in (folder / "s.md").read_text() and text in shown
    contamination = "contamination: 1 of 40 questions overlap train.jsonl (1 with all their options)"
    markdown = (folder / "s.md").read_text()
    assert contamination in shown and contamination in markdown and contamination in (folder / "s.html").read_text()
    without = report["contamination"]["checkpoints"][2]["without"]
    [line] = [line for line in table if line["kind"] == "contamination" and line["name"] == "without"][2:]
    assert line["questions"] == "39" and float(line["value"]) == without
    strict = [line for line in table if line["kind"] == "strict micro" and line["measure"] == "average"]
    assert [float(line["value"]) for line in strict] == [
        row["micro"]["average"]["value"] for row in report["checkpoints"]
    ]
    assert len(report["comparisons"]) == 3 and shown.count("---- read as:") == 2
    assert "malaymmlu-run-checkpoint-10 is better than malaymmlu-Base" in shown


def test_plot_is_a_picture(written):
    from matplotlib import image

    height, width = image.imread(written[0] / "s.png").shape[:2]
    assert width > 600 and height > 200


def test_comparisons_can_be_chosen_and_unknown_names_are_refused(written, call):
    folder = written[0].parent
    shown = call(
        folder,
        "--pattern",
        "malaymmlu-*",
        "--questions",
        "q.json",
        "--resamples",
        50,
        "--compare",
        "Base:run-checkpoint-5",
    )
    assert "paired comparisons" in shown.stdout and "checkpoint-10 is better" not in shown.stdout
    shown = call(folder, "--pattern", "malaymmlu-*", "--questions", "q.json", "--compare", "Base:nobody")
    assert shown.returncode == 1 and shown.stderr.startswith("error: --compare 'Base:nobody'")


def test_seeds_and_protocols_of_one_checkpoint_are_rows_and_a_leaderboard_ranks_them(tmp_path, call):
    (tmp_path / "q.json").write_text(json.dumps([raw(i, key="A") for i in range(60)]))
    sha256 = checksum(tmp_path / "q.json")

    def generate(directory, right, protocol="reasoning", seed=0, count=60, questions=sha256):
        records = [
            {
                "index": i,
                "id": i,
                "sample": 0,
                "text": "A" if protocol == "first_token" else f"Jawapan: {'AB'[i >= right]}",
            }
            for i in range(count)
        ]
        facts = {"names": ["run-5"], "adapter_fingerprint": "x", "samples": 1, "questions_sha256": questions}
        save(tmp_path / directory, records, protocol=protocol, seed=seed, **facts)

    generate("malaymmlu-run-5", 50)
    generate("again/malaymmlu-run-5", 48, seed=1)
    generate("other/malaymmlu-run-5", 60, protocol="first_token")
    generate("bad/malaymmlu-run-5", 5, seed=2)
    generate("part/malaymmlu-run-5", 30, seed=3, count=30)
    generate("elsewhere/malaymmlu-run-5", 60, seed=4, questions="0" * 64)
    pattern = "malaymmlu-*,again/*,other/*,bad/*,part/*,elsewhere/*"
    flags = ["--questions", "q.json", "--resamples", 50, "--json", "s.json", "--leaderboard"]
    shown = call(tmp_path, "--pattern", pattern, *flags, "--compare", "malaymmlu-run-5:other/*,malaymmlu-run-5:part/*")
    assert shown.returncode == 0, shown.stderr
    assert "elsewhere/malaymmlu-run-5 was generated from questions with sha256 0000" in shown.stderr
    report = json.loads((tmp_path / "s.json").read_text())
    reasoning, official = report["leaderboard"]
    assert [(row["rank"], row["name"]) for row in reasoning["rows"]] == [
        (1, "malaymmlu-run-5"),
        (1, "again/malaymmlu-run-5"),  # two questions of sixty are no difference
        (3, "bad/malaymmlu-run-5"),
        (None, "part/malaymmlu-run-5"),
    ]
    assert [row["name"] for row in official["rows"]] == ["other/malaymmlu-run-5"]
    assert "leaderboard, reasoning protocol, 60 questions" in shown.stdout and "unfinished" in shown.stdout
    protocols, part = report["comparisons"]
    assert "the same questions by different protocols, reasoning and first_token" in protocols["verdict"]
    assert part["questions"] == 30 and not part["differs"]  # 30 right of 30, and of the same 30


def test_the_scorer_needs_neither_torch_nor_vllm():
    modules = ("torch", "vllm", "transformers", "pandas")
    code = f"import sys, calculate_malaymmlu; print([m for m in {modules} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "[]"
