"""calculate_malaymmlu.py: extraction against a table, the original's block to the last digit, statistics against scipy
and known truth."""

import argparse
import csv
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import calculate_malaymmlu as scorer
from malaysian_sft.contamination import contaminated, contamination_report
from malaysian_sft.extraction import extract
from malaysian_sft.generations import MISSING, NONE, TRUNCATED, find_directories, read_answers
from malaysian_sft.questions import (
    HUB_COUNTS,
    HUB_DATASET,
    HUB_FILE,
    HUB_LOCK,
    HUB_REVISION,
    benchmark_questions,
    checksum,
    load_questions,
    parse_options,
    read_lock,
    strata,
)
from malaysian_sft.report import notes, percent
from malaysian_sft.statistics import (
    Row,
    bootstrap,
    compare,
    count_outcomes,
    holm,
    interval,
    mcnemar,
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


def test_a_limit_below_one_is_refused(tmp_path, call):
    assert "--limit 0: expected a positive number" in call(tmp_path, "--pattern", "x", "--limit", 0).stderr


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


def test_intervals_of_all_right_and_all_wrong_are_the_exact_binomial_ones():
    for value, k in ((1.0, 20), (0.0, 0)):
        low, high = interval(np.full(50, value), 20, np.full(20, value))
        exact = stats.binomtest(k, 20).proportion_ci(0.95, "exact")
        assert (low, high) == pytest.approx((exact.low, exact.high))
    low, high = t_interval(np.full(12, 2 / 3))  # two of three samples right everywhere: as 8 of 12
    exact = stats.binomtest(8, 12).proportion_ci(0.95, "exact")
    assert (low, high) == pytest.approx((exact.low, exact.high))
    values = np.random.default_rng(0).random(30)
    expected = stats.t.interval(0.95, 29, loc=values.mean(), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)


def test_mcnemar_and_holm_against_scipy_and_by_hand():
    generator = np.random.default_rng(3)
    first, second = generator.random(300) < 0.7, generator.random(300) < 0.6
    b, c, p = mcnemar(first, second)
    table = np.array([[(first & second).sum(), b], [c, (~first & ~second).sum()]])
    assert table.sum() == 300
    # the exact McNemar test, written out
    assert p == pytest.approx(min(1.0, 2 * stats.binom.cdf(min(b, c), b + c, 0.5)))
    assert mcnemar(first, first) == (0, 0, 1.0)
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []


def rows_of(values, keys_seed=0):
    """Rows whose answers are right where `values` says so."""
    return [
        Row(f"malaymmlu-{name}", Path("."), {}, np.where(right == 1, 0, 1).astype(np.int8))
        for name, right in values.items()
    ]


def test_paired_comparison_keeps_its_level_and_finds_a_real_difference():
    """Two equal checkpoints are called different in about 5 % of 300 simulations; ten points of difference are found,
    the truth inside."""
    generator = np.random.default_rng(7)
    questions = [question(i, ["STEM", "Language"][i % 2]) for i in range(200)]
    groups = list(strata(questions).values())
    rejected = 0
    for trial in range(300):
        difficulty = generator.beta(2, 1.3, 200)[:, None]
        pair = {name: (generator.random((200, 3)) < difficulty).astype(float) for name in ("a", "b")}
        values = np.stack([measure(row.answers, np.zeros(200, np.int8)) for row in rows_of(pair)], 1)
        means = bootstrap(values.reshape(200, -1), groups, 300, trial).reshape(300, 2, 2, 4)
        (item,) = compare(rows_of(pair), values, means.mean(1), "all")
        rejected += item["p_bootstrap"] < 0.05
    assert stats.binomtest(rejected, 300, 0.05).pvalue > 0.005, rejected / 300
    difficulty = generator.beta(2, 1.3, 200)[:, None] * 0.8
    good = {
        "worse": generator.random((200, 3)) < difficulty,
        "better": generator.random((200, 3)) < difficulty + 0.1,
    }
    report = score(rows_of({k: v.astype(float) for k, v in good.items()}), questions, 500)
    (item,) = report["comparisons"]
    assert item["difference"]["low"] <= -0.1 <= item["difference"]["high"] < 0
    assert item["verdict"].startswith("malaymmlu-better is better than malaymmlu-worse (")


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
    assert contaminated(questions, str(tmp_path / "train")).tolist() == [True, False, True, False, False]
    answers = np.array([[0], [1], [0], [0], [1]], np.int8)
    report = contamination_report([Row("m", Path("."), {}, answers)], questions, str(tmp_path / "train"))
    assert report["questions"] == [0, 2] and report["count"] == 2
    scores = {"name": "m", "all": 3 / 5, "without": 1 / 3, "only": 1.0}
    assert report["checkpoints"][0] == pytest.approx(scores)
    with pytest.raises(ValueError, match="no .jsonl, .json or .parquet file"):
        contaminated(questions, str(tmp_path / "nowhere"))


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
    assert len(report["comparisons"]) == 3 and shown.count("---- read as:") == 2
    assert "malaymmlu-run-checkpoint-10 is better than malaymmlu-Base" in shown


def test_plot_is_a_picture(written):
    from matplotlib import image

    height, width = image.imread(written[0] / "s.png").shape[:2]
    assert width > 1000 and height > 400


def test_html_stands_alone_and_its_data_cannot_leave_the_script(written):
    page = (written[0] / "s.html").read_text()
    assert "http://" not in page and "https://" not in page and "src=" not in page.replace("i.src=", "")
    start = page.index('type="application/json">') + len('type="application/json">')
    data = json.loads(page[start : page.index("</script>", start)])
    assert len(data["questions"]) == 40 and data["names"][1] == "run-checkpoint-5"
    assert data["questions"][0]["t"][0][0].startswith("<script>alert(1)</script></script>")
    letters = ["ABCD"[a] for a in data["questions"][3]["a"][2]]
    assert set(letters) <= {"D", "A"}


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


def test_the_scorer_needs_neither_torch_nor_vllm():
    code = "import sys, calculate_malaymmlu; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "[]"
