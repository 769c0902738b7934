"""comparisons.py: the sign-flip test against every flip written out and scipy, its level and coverage by simulation,
and verdicts that say what their interval says."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from malaysian_sft import comparisons
from malaysian_sft.comparisons import compare, holm, holm_factors, mcnemar, paired_test
from malaysian_sft.generations import MISSING
from malaysian_sft.statistics import Row, measure, score


def rows_of(**values):
    """Rows whose answers are right where `values` says so; the key is always A."""
    return [
        Row(f"malaymmlu-{name}", Path("."), {}, np.where(np.asarray(right) == 1, 0, 1).astype(np.int8))
        for name, right in values.items()
    ]


def keys(n):
    return np.zeros(n, np.int8)


def flip_p(differences, shift=0.0):
    """The test written out: all 2^n signs of the shifted differences."""
    moved = np.asarray(differences) - shift
    signs = np.array(list(itertools.product((1, -1), repeat=len(moved))))
    return float((np.abs(signs @ moved) >= abs(moved.sum()) - 1e-9).mean())


def test_the_interval_of_drawn_splits_is_that_of_weighted_ones():
    generator = np.random.default_rng(3)
    for size in (1, 10, 9_999, 10_000):
        ends = np.sort(generator.integers(-40, 40, (2, size)) / 7, 0)
        weight = np.full(size, 1 / size)
        for alpha in (0.05, 0.05 / 36, 0.9):
            order, back = np.argsort(ends[0], kind="stable"), np.argsort(-ends[1], kind="stable")
            lower = ends[0][order][np.argmax(weight[order].cumsum() >= alpha)]
            upper = ends[1][back][np.argmax(weight[back].cumsum() >= alpha)]
            assert comparisons.sign_flip_interval((*ends, weight), alpha) == (lower, upper)


@pytest.mark.parametrize("seed", range(6))
def test_the_test_and_its_interval_against_every_flip(seed):
    differences = np.random.default_rng(seed).integers(-3, 4, 9) / 3
    p, _, interval = paired_test(differences, 3)
    assert p == pytest.approx(flip_p(differences))
    low, high = interval(0.05)
    for inside, outside in ((low + 1e-6, low - 1e-6), (high - 1e-6, high + 1e-6)):
        assert flip_p(differences, inside) >= 0.05
        assert flip_p(differences, outside) < 0.05 or abs(outside) > 1


def test_the_p_value_is_scipys_and_drawn_flips_agree_with_enumerated_ones(monkeypatch):
    differences = np.random.default_rng(8).choice([-1, -1 / 3, 0, 0, 1 / 3, 2 / 3, 1], 12)
    expected = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert paired_test(differences, 3)[0] == pytest.approx(expected.pvalue)
    many = np.random.default_rng(1).choice([-1, -2 / 3, -1 / 3, 0, 0, 0, 1 / 3, 2 / 3, 1], 400)
    drawn, (low, high) = paired_test(many, 3, draws=99_999)[0], paired_test(many, 3)[2](0.05)
    wilcoxon_like = stats.ttest_1samp(many, 0)  # the limit for many questions
    assert drawn == pytest.approx(wilcoxon_like.pvalue, abs=0.01)
    assert (low, high) == pytest.approx(tuple(wilcoxon_like.confidence_interval()), abs=0.005)
    assert paired_test(np.ones(400) / 3 + many / 3, 3)[1] and not paired_test(many, 3)[1]  # beyond what was drawn
    sparse = np.concatenate([np.zeros(500), [1] * 9, [-1] * 2])  # the sign test, however many questions are equal
    assert paired_test(sparse, 1)[0] == pytest.approx(stats.binomtest(9, 11).pvalue)


def pairs_without_a_difference(generator, n):
    difficulty = generator.beta(1.2, 1.0, n)[:, None]
    return [(generator.random((n, 3)) < difficulty).astype(float) for _ in range(2)]


@pytest.mark.parametrize("n", [10, 20, 60])
def test_equal_checkpoints_differ_in_five_percent_of_simulations_at_most(n):
    generator, rejected, trials = np.random.default_rng(n), 0, 400
    for _ in range(trials):
        first, second = pairs_without_a_difference(generator, n)
        (item,) = compare(rows_of(a=first, b=second), keys(n))
        rejected += item["differs"]
    assert stats.binomtest(rejected, trials, 0.05, alternative="greater").pvalue > 0.005, rejected / trials
    if n >= 60:  # and the level is used, not wasted
        assert rejected / trials > 0.02


def test_intervals_of_a_difference_cover_it():
    """The true difference is known exactly: 300 simulations of 12 and of 40 questions."""
    generator = np.random.default_rng(3)
    for n in (12, 40):
        hits, trials = 0, 300
        for _ in range(trials):
            difficulty = generator.beta(2, 2, n)[:, None]
            first = (generator.random((n, 3)) < 0.5 * difficulty + 0.4).mean(1)  # 0.65 on average
            second = (generator.random((n, 3)) < difficulty).mean(1)  # 0.50
            low, high = paired_test(first - second, 3)[2](0.05)
            hits += low <= 0.15 <= high
        assert stats.binomtest(hits, trials, 0.95, alternative="less").pvalue > 0.005, (n, hits / trials)


def test_a_real_difference_is_found_and_said():
    generator = np.random.default_rng(7)
    difficulty = generator.beta(2, 1.3, 200)[:, None] * 0.8
    worse, better = generator.random((200, 3)) < difficulty, generator.random((200, 3)) < difficulty + 0.1
    (item,) = compare(rows_of(worse=worse, better=better), keys(200))
    assert item["difference"]["low"] <= -0.1 <= item["difference"]["high"] < 0
    assert item["verdict"].startswith("malaymmlu-better is better than malaymmlu-worse (")
    assert item["difference"]["value"] == pytest.approx(worse.mean() - better.mean())


@pytest.mark.parametrize("seed", range(4))
def test_verdict_p_value_and_interval_agree_in_every_comparison(seed):
    generator, n = np.random.default_rng(seed), (8, 20, 50, 300)[seed]
    rows = rows_of(**{f"c{k}": generator.random((n, 3)) < 0.4 + 0.05 * k for k in range(7)})
    found = compare(rows, keys(n))
    assert len(found) == 21 and (seed == 0 or any(item["differs"] for item in found))
    for item in found:
        zero_inside = item["difference"]["low"] <= 0 <= item["difference"]["high"]
        assert item["differs"] == (item["p_sign_flip_holm"] < 0.05) == (not zero_inside)
        assert ("is better than" in item["verdict"]) == item["differs"]
        assert item["difference"]["low"] <= item["difference"]["value"] <= item["difference"]["high"]


@pytest.mark.parametrize("n", range(1, 13))
@pytest.mark.parametrize("value", [0, 1, -1, 1 / 3])
def test_where_all_differences_are_the_same_interval_and_test_agree(n, value):
    p, _, interval = paired_test(np.full(n, value), 3)
    low, high = interval(0.05)
    assert (p < 0.05) == (low > 0 or high < 0)
    assert low < high and low <= value <= high
    assert value or high == pytest.approx(stats.binomtest(0, n).proportion_ci(0.95, "exact").high)


def test_a_checkpoint_is_not_worse_for_what_it_has_not_answered():
    generator = np.random.default_rng(0)
    whole = generator.random((300, 3)) < 0.7
    rows = rows_of(whole=whole, part=whole)
    rows[1].answers[120:] = MISSING
    rows[1].answers[119, 1:] = MISSING  # of the last one only one sample is there
    rows[0].answers[:5] = MISSING
    (item,) = compare(rows, keys(300))
    assert item["questions"] == 115 and "on the 115 questions that both answered" in item["verdict"]
    assert not item["differs"] and abs(item["difference"]["value"]) < 1 / 115
    rows[0].answers[5:] = MISSING
    (item,) = compare(rows, keys(300))
    assert item["questions"] == 0 and "cannot be told apart" in item["verdict"]


def test_protocols_are_compared_only_when_asked_and_then_said_so():
    rows = rows_of(a=np.ones((30, 3)), b=np.zeros((30, 1)))
    rows[1].args["protocol"] = "first_token"
    assert compare(rows, keys(30)) == []
    (item,) = compare(rows, keys(30), "a:b")
    assert "the same questions by different protocols, reasoning and first_token" in item["verdict"]
    assert item["differs"] and item["difference"]["value"] == 1


def test_names_to_compare_may_be_globs():
    rows = rows_of(base=np.ones((9, 1)), **{f"run-{k}": np.ones((9, 1)) for k in (5, 10)})
    named = [(item["first"], item["second"]) for item in compare(rows, keys(9), "base:run-*")]
    assert named == [("malaymmlu-base", "malaymmlu-run-5"), ("malaymmlu-base", "malaymmlu-run-10")]
    assert len(compare(rows, keys(9), "run-*:run-*")) == 1  # never with itself, never twice
    for wrong in ("base:base", "base:nobody", "base"):
        with pytest.raises(ValueError, match=f"--compare '{wrong}'"):
            compare(rows, keys(9), wrong)


def test_mcnemar_and_holm_against_scipy_and_by_hand():
    generator = np.random.default_rng(3)
    first, second = generator.random(300) < 0.7, generator.random(300) < 0.6
    b, c, p = mcnemar(first, second)
    assert (b, c) == ((first & ~second).sum(), (second & ~first).sum())
    # the exact McNemar test, written out
    assert p == pytest.approx(min(1.0, 2 * stats.binom.cdf(min(b, c), b + c, 0.5)))
    assert mcnemar(first, first) == (0, 0, 1.0)
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([]) == []
    assert holm_factors([0.01, 0.04, 0.03, 0.5]) == [4, 3, 3, 3]


def test_ranks_count_those_that_are_better_beyond_chance():
    found = [
        {"first": "a", "second": "b", "differs": True, "difference": {"value": -0.2}},
        {"first": "a", "second": "c", "differs": True, "difference": {"value": -0.1}},
        {"first": "b", "second": "c", "differs": False, "difference": {"value": 0.1}},
    ]
    assert comparisons.ranks(["a", "b", "c"], found) == {"a": 3, "b": 1, "c": 1}


# ---- strata with few questions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 12, [1, 11], [1, 1, 1, 20], [10], [2, 2, 2, 2, 2, 2], [40, 3, 1]])
def test_intervals_cover_whatever_the_sizes_of_the_categories(sizes):
    """300 simulated benchmarks: 95 % intervals over questions and over categories hold the truth."""
    generator, n, trials, hits = np.random.default_rng(len(sizes)), sum(sizes), 300, {"micro": 0, "macro": 0}
    names = [f"c{g}" for g, size in enumerate(sizes) for _ in range(size)]
    questions = [
        {"index": i, "id": i, "key": "A", "letters": "ABCD", "category": name, "subject": "", "level": ""}
        for i, name in enumerate(names)
    ]
    for trial in range(trials):
        right = generator.random((n, 3)) < generator.beta(1.2, 0.8, n)[:, None]  # 0.6 on average
        (entry,) = score(rows_of(a=right), questions, 200, trial)["checkpoints"]
        for kind in hits:
            hits[kind] += entry[kind]["average"]["low"] <= 0.6 <= entry[kind]["average"]["high"]
    for kind, count in hits.items():
        assert count / trials > 0.9, (kind, count / trials)


def covered(draw, truth, sizes, trials, measure="average"):
    """Of simulated benchmarks, the share whose interval holds `truth` -> the same keys: "micro", "macro", "c0".

    draw(): what is right, a question a row, a sample a column.
    """
    names = [f"c{g}" for g, size in enumerate(sizes) for _ in range(size)]
    questions = [
        {"index": i, "id": i, "key": "A", "letters": "ABCD", "category": name, "subject": "", "level": ""}
        for i, name in enumerate(names)
    ]
    hits = dict.fromkeys(truth, 0)
    for trial in range(trials):
        (entry,) = score(rows_of(a=draw()), questions, 400, trial)["checkpoints"]
        for kind in hits:
            item = (entry["category"] if kind == "c0" else entry)[kind][measure]
            hits[kind] += item["low"] <= truth[kind] <= item["high"]
    return {kind: count / trials for kind, count in hits.items()}


@pytest.mark.parametrize("singles, large", [(1, [60]), (3, []), (1, [30, 30, 30]), (5, [40, 60])])
def test_a_single_question_is_not_as_certain_as_other_categories(singles, large):
    """Categories of one question each, 0.5 on average, beside large ones of 0.95: as the large ones' spread says
    nothing about them, intervals over categories that borrow it hold the truth in 54 to 83 % only."""
    generator, sizes = np.random.default_rng(singles), [1] * singles + large
    mean = np.concatenate([np.full(singles, 0.5), np.full(sum(large), 0.95)])
    truth = {"micro": mean.mean(), "macro": (0.5 * singles + 0.95 * len(large)) / len(sizes)}

    def draw():
        return generator.random((len(mean), 3)) < generator.beta(20 * mean, 20 * (1 - mean))[:, None]

    shares = covered(draw, truth, sizes, 300)
    assert min(shares.values()) > 0.92, shares


@pytest.mark.parametrize("measure", ["acc@1", "average"])
@pytest.mark.parametrize("n", [20, 60])
def test_intervals_of_few_questions_cover_near_the_end_of_the_scale(n, measure):
    """Percentiles and Student's t hold 0.9 of 20 and 0.94 of 60 questions in 88 to 92 % of simulations."""
    generator, (mean, spread) = np.random.default_rng(n), ((0.94, 20) if n == 60 else (0.9, 2))

    def draw():
        return generator.random((n, 3)) < generator.beta(spread * mean, spread * (1 - mean), n)[:, None]

    shares = covered(draw, {"micro": mean, "macro": mean, "c0": mean}, [n], 500, measure)
    for share in shares.values():
        assert stats.binomtest(round(500 * share), 500, 0.95, alternative="less").pvalue > 0.005, shares


def without_questions(generator, answers):
    answers[generator.random(len(answers)) < 0.4] = -4


def without_samples(generator, answers):
    answers[generator.random(answers.shape) < 0.5] = -4


def without_last_samples(generator, answers):
    answers[:, 1:] = -4


@pytest.mark.parametrize("stop", [without_questions, without_samples, without_last_samples])
def test_equal_checkpoints_differ_in_five_percent_also_where_one_is_unfinished(stop):
    generator, rejected, trials = np.random.default_rng(4), 0, 400
    for _ in range(trials):
        rows = rows_of(**dict(zip("ab", pairs_without_a_difference(generator, 40), strict=True)))
        stop(generator, rows[1].answers)
        (item,) = compare(rows, keys(40))
        rejected += item["differs"]
    assert stats.binomtest(rejected, trials, 0.05, alternative="greater").pvalue > 0.005, rejected / trials


def test_one_sample_against_eight_is_no_difference():
    """Where most are right, one sample less an average of eight is skew: 10 % of equal checkpoints differ by it."""
    generator, rejected, trials = np.random.default_rng(6), 0, 600
    for _ in range(trials):
        rows = rows_of(a=generator.random((60, 8)) < 0.95, b=generator.random((60, 8)) < 0.95)
        rows[1].answers[:, 1:] = -4
        (item,) = compare(rows, keys(60))
        rejected += item["differs"]
    assert stats.binomtest(rejected, trials, 0.05, alternative="greater").pvalue > 0.005, rejected / trials
    assert "as many samples as both have" in item["verdict"] and not item["same_samples"]


def test_samples_that_only_one_has_are_not_compared():
    answers = {"a": [[1, 1, 1], [0, 1, 1], [1, 0, 0]], "b": [[1, 0, 0], [0, 1, 0], [1, 1, 1]]}
    rows = rows_of(**{name: np.array(right) == 1 for name, right in answers.items()})
    rows[1].answers[:] = np.where([[0, 1, 1], [1, 0, 0], [0, 0, 0]], -4, rows[1].answers)
    (item,) = compare(rows, keys(3))
    # a: 1 of 1, 1 of 2, 1 of 3; b: 1 of 1, 1 of 2 (its second and third), 3 of 3
    assert item["difference"]["value"] == pytest.approx((0 + 0 - 2 / 3) / 3)
    assert item["only_first_right"] == item["only_second_right"] == 0  # the first samples that both have


def test_single_questions_are_pooled_and_their_spread_is_seen():
    generator = np.random.default_rng(1)
    right = generator.random((30, 3)) < 0.5
    answers = np.where(right, 0, 1).astype(np.int8)
    questions = [
        {"index": i, "id": i, "key": "A", "letters": "AB", "category": f"c{i}", "subject": "", "level": ""}
        for i in range(30)
    ]
    report = score([Row("a", Path("."), {}, answers)], questions, 4000)
    values = measure(answers, keys(30))[:, 1]
    expected = stats.t.interval(0.95, 29, loc=values.mean(), scale=stats.sem(values))
    item = report["checkpoints"][0]["micro"]["average"]
    assert report["pooled"] == [f"c{i}" for i in range(30)]
    assert (item["low"], item["high"]) == pytest.approx(expected, abs=0.02)
    assert item == pytest.approx(report["checkpoints"][0]["macro"]["average"])
