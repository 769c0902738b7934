"""Measures per question, intervals by resampling questions, and the original project's block of scores."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from malaysian_sft.comparisons import compare, leaderboard
from malaysian_sft.generations import MISSING, OUTCOMES
from malaysian_sft.questions import LETTERS, strata


def keys_of(questions):
    """The right letters' numbers -> int8 (Q,)."""
    return np.array([LETTERS.index(question["key"]) for question in questions], np.int8)


def original_scores(answers, questions, groups=None, keys=None):
    """acc1 and acc3 as the original computes them -> {category: (acc1, acc3)}, categories in the file's order, then
    "average".

    answers: int8 (Q, samples). acc1: the first sample that has an answer is right. acc3: one of the first three that
    have is right. Without an answer a question is wrong. The average is the unweighted mean of the categories.
    groups, keys: the questions by category and their `keys_of`, where they are at hand.
    """
    keys = keys_of(questions) if keys is None else keys  # (Q,)
    answered = answers >= 0  # (Q, samples)
    first = np.take_along_axis(answers, answered.argmax(1)[:, None], 1)[:, 0]  # (Q,)
    right_first = answered.any(1) & (first == keys)
    first_three = answered & (answered.cumsum(1) <= 3)
    right_any = (first_three & (answers == keys[:, None])).any(1)
    scores = {
        name: (int(right_first[index].sum()) / len(index), int(right_any[index].sum()) / len(index))
        for name, index in (groups or strata(questions)).items()
    }
    scores["average"] = tuple(float(np.mean([score[i] for score in scores.values()])) for i in (0, 1))
    return scores


MEASURES = ("acc@1", "average", "majority", "any")


def measure(answers, keys):
    """The four measures question by question -> float64 (Q, 4), in the order of MEASURES. answers: int8 (Q, S); keys:
    int8 (Q,)."""
    right = answers == keys[:, None]  # (Q, S)
    votes = np.zeros((len(keys), len(LETTERS)), np.int64)  # (Q, 6)
    for sample in answers.T:  # a sum over the few samples of a question takes several times as long
        votes += sample[:, None] == np.arange(len(LETTERS), dtype=np.int8)
    leaders = (votes == votes.max(1, keepdims=True)) & (votes > 0)
    key_leads = np.take_along_axis(leaders, keys[:, None].astype(np.int64), 1)[:, 0]
    majority = np.where(key_leads, 1.0 / np.maximum(leaders.sum(1), 1), 0.0)
    return np.stack([right[:, 0], right.mean(1), majority, right.any(1)], 1).astype(np.float64)


def bootstrap(values, groups, resamples=2000, seed=0):
    """Cluster bootstrap over questions, stratified: means of every group in every resample -> float64 (resamples,
    groups, columns).

    values: (Q, columns), a row per question. groups: list of index arrays, the strata. Every column sees the same
    resamples, so that differences of columns are paired.
    """
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, len(groups), values.shape[1]))
    for g, index in enumerate(groups):
        n, chosen = len(index), values[index].astype(np.float32)  # (n, columns)
        step, few = max(1, 4_000_000 // n), max(1, 100_000 // n)  # resamples a product; resamples that fit in the cache
        weights, offsets = np.empty((step, n), np.float32), np.arange(few)[:, None] * n
        for start in range(0, resamples, step):
            rows = min(step, resamples - start)
            for at in range(0, rows, few):
                size = min(few, rows - at), n
                drawn = generator.integers(0, n, size=size, dtype=np.int32) + offsets[: size[0]]
                weights[at : at + size[0]] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(size)
            means[start : start + rows, g] = weights[:rows] @ chosen / n
    return means


def interval(resampled, n, values=None, level=0.95):
    """Percentile interval of bootstrap means, widened for small samples (the "expanded percentile" of Hesterberg 2015)
    -> (low, high).

    n: questions behind the estimate. values: the per-question values; with fewer than MANY of them their shape is not
    that of percentiles, and `t_interval` is given instead.
    """
    if values is not None and len(values) < MANY:
        return t_interval(values, level)
    if values is not None and np.ptp(values) == 0:
        return binomial_interval(values[0], len(values), level)
    return expanded(resampled, np.sqrt(n / (n - 1)) if n > 1 else 1.0, max(n - 1, 1), level)


def expanded(resampled, widening, freedom, level=0.95):
    """Percentiles of `resampled` where Student's quantile for `freedom`, times `widening`, lies on the normal scale.

    widening: how much larger the unbiased standard error is than the bootstrap's, sqrt(n / (n - 1)) for n questions.
    """
    from scipy import special

    tail = float(special.ndtr(widening * special.stdtrit(freedom, (1 - level) / 2)))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


FEWEST = 5  # questions of a category from which its spread can be told
POOL = 10  # questions from which a pool's spread can be told
MANY = 200  # degrees of freedom from which a mean of shares is about normal, however near to 0 or 1 it is


class Strata:
    """Categories as strata of a bootstrap. Those with fewer than FEWEST questions have no spread to speak of, one with
    a single question has none: they are pooled.

    The pool lends them the spread of all its questions. One of fewer than POOL questions says little about that, and
    other categories say nothing: it has a wrong and a right answer besides, which nobody gave (as Laplace's rule has).
    """

    def __init__(self, groups):
        self.groups = groups  # {category: int array of questions}
        self.questions = sum(map(len, groups.values()))
        self.own = {name: index for name, index in groups.items() if len(index) >= FEWEST}
        self.small = {name: index for name, index in groups.items() if len(index) < FEWEST}
        self.sampled, self.lent = list(self.own.values()), False
        if self.small:
            pool = np.concatenate([*self.small.values()])
            self.lent = len(pool) < POOL
            added = [self.questions, self.questions + 1] if self.lent else []  # rows of `extended`
            self.sampled.append(np.append(pool, added).astype(pool.dtype))

    def extended(self, values):
        """`values`, a row per question, with the wrong and the right answer that a pool may have."""
        return np.concatenate([values, np.zeros_like(values[:1]), np.ones_like(values[:1])])

    def weights(self, by_category):
        """What each sampled stratum weighs in the mean over questions, or over categories, and how much its deviation
        is stretched -> float64 (strata,) twice.

        The pool's questions may weigh differently (a category's share over its questions), and the pool may have other
        questions than those it stands for: its mean is stretched to the standard error of their weighted mean.
        """

        def weight(index):
            return 1 / len(self.groups) if by_category else len(index) / self.questions

        weights, stretch = [weight(index) for index in self.own.values()], [1.0] * len(self.own)
        if len(self.sampled) > len(self.own):
            shares = [weight(index) for index in self.small.values()]
            squares = sum(share**2 / len(index) for share, index in zip(shares, self.small.values(), strict=True))
            weights.append(sum(shares))
            stretch.append(np.sqrt(len(self.sampled[-1]) * squares) / sum(shares))
        return np.array(weights), np.array(stretch)

    def estimate(self, values, means, by_category):
        """Mean and interval -> {"value", "low", "high"}. values: (Q,); means: the bootstrap's, (resamples, strata).

        The bootstrap's deviations are stretched to the unbiased standard error of a stratified mean, and the
        percentiles are those of Student's t with its degrees of freedom (Satterthwaite 1946), on the normal scale. With
        fewer than MANY of these the interval is `share_interval`'s. Where all questions have one value it is the exact
        binomial one of as many questions as would weigh the same; where no stratum has any spread, though they differ,
        the questions are taken as one sample.
        """
        value = np.mean([values[i].mean() for i in self.groups.values()]) if by_category else values.mean()
        if np.ptp(values) == 0:
            count = len(values)
            if by_category:
                count = len(self.groups) ** 2 / sum(1 / len(index) for index in self.groups.values())
            return estimate(value, *binomial_interval(values[0], count))
        weights, stretch = self.weights(by_category)
        sizes, values = np.array([len(index) for index in self.sampled]), self.extended(values)
        variance = np.array([values[index].var(ddof=1) for index in self.sampled]) * (weights * stretch) ** 2 / sizes
        if not variance.sum():
            sample = values[: self.questions]
            low, high = t_interval(sample)
            return estimate(value, max(0.0, value + low - sample.mean()), min(1.0, value + high - sample.mean()))
        # a pool with answers that nobody gave has about the most spread that there can be: it is not in doubt
        told = len(self.own) if self.lent else len(sizes)
        doubt = (variance**2 / (sizes - 1))[:told].sum()
        freedom = variance.sum() ** 2 / doubt if doubt else np.inf
        if freedom < MANY or self.lent:
            return estimate(value, *share_interval(value, np.sqrt(variance.sum()), freedom))
        centres = np.array([values[index].mean() for index in self.sampled])
        widening = np.sqrt(variance.sum() / (variance * (1 - 1 / sizes)).sum())
        deviations = (means - centres) @ (weights * stretch) * widening
        low, high = expanded(value + deviations, 1.0, freedom)
        return estimate(value, max(0.0, low), min(1.0, high))


def binomial_interval(share, n, level=0.95):
    """Clopper and Pearson's exact interval for `share` of n -> (low, high); for a share between two counts by the same
    beta quantiles."""
    from scipy import special

    tail, k = (1 - level) / 2, share * n
    low = float(special.betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    return low, float(special.betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0


def share_interval(share, error, freedom, level=0.95):
    """Interval of a mean of values in [0, 1] by the exact binomial one for as many answers as have its standard error
    (Korn and Graubard 1998) -> (low, high).

    Near 0 and 1 the mean of few questions is skew: percentiles and Student's t leave the truth out too often there.
    """
    from scipy import special

    tail = (1 - level) / 2
    freedom = min(freedom, 1e9)  # of which stdtrit knows the quantile
    count = share * (1 - share) / error**2 * (special.ndtri(tail) / special.stdtrit(freedom, tail)) ** 2
    return binomial_interval(share, float(count), level)


@dataclass
class Row:
    """One checkpoint with its answers."""

    name: str
    path: Path
    args: dict
    answers: np.ndarray  # int8 (Q, samples)
    strict: np.ndarray | None = None  # the same by strict reading; None where it was not read

    @property
    def protocol(self):
        return self.args.get("protocol", "reasoning")


def score(rows, questions, resamples=2000, seed=0, pairs="all", ranked=False):
    """All numbers about `rows` as one JSON-ready dict: chance levels, per checkpoint scores with intervals,
    comparisons; ranked: a leaderboard too, by all pairs whatever `pairs` are."""
    keys = keys_of(questions)
    offered = np.array([len(question["letters"]) for question in questions])
    parts = Strata(strata(questions))
    read = [row.answers for row in rows] + [row.strict for row in rows if row.strict is not None]
    values = np.stack([measure(answers, keys) for answers in read], 1)  # (Q, readings, measures)
    means = bootstrap(parts.extended(values.reshape(len(questions), -1)), parts.sampled, resamples, seed).reshape(
        resamples, len(parts.sampled), len(read), len(MEASURES)
    )
    report = {
        "questions": len(questions),
        "categories": {name: len(i) for name, i in parts.groups.items()},
        "pooled": list(parts.small),
        "resamples": resamples,
        "seed": seed,
        "chance": {"one sample": float((1 / offered).mean())},
        "checkpoints": [],
    }
    others = {kind: strata(questions, kind) for kind in ("subject", "level")}
    strict_at = len(rows)
    for r, row in enumerate(rows):
        width = row.answers.shape[1]
        report["chance"][f"any of {width}"] = float((1 - (1 - 1 / offered) ** width).mean())
        entry = {
            "name": row.name,
            "directory": str(row.path),
            "protocol": row.protocol,
            "samples": width,
            "retries": row.args.get("retries", 0),
            "answers": count_outcomes(row.answers),
            "original": {
                name: list(pair) for name, pair in original_scores(row.answers, questions, parts.groups, keys).items()
            },
            **totals(values[:, r], means[:, :, r], parts),
            **by_part(values[:, r], means[:, :, r], parts, others),
        }
        if row.strict is not None:
            strict = totals(values[:, strict_at], means[:, :, strict_at], parts)
            entry["strict"] = {"answers": count_outcomes(row.strict), **strict}
            strict_at += 1
        report["checkpoints"].append(entry)
    report["comparisons"] = compare(rows, keys, pairs, MISSING, seed)
    if ranked:
        every = report["comparisons"] if pairs == "all" else compare(rows, keys, "all", MISSING, seed)
        report["leaderboard"] = leaderboard(report["checkpoints"], every)
    return report


def totals(values, means, parts):
    """All measures over questions and over categories. values: (Q, measures); means: (resamples, strata, measures)."""
    return {
        kind: {name: parts.estimate(values[:, m], means[:, :, m], kind == "macro") for m, name in enumerate(MEASURES)}
        for kind in ("micro", "macro")
    }


def by_part(values, means, parts, others):
    """All measures by category, the average by subject and level (`others`). values and means as in `totals`."""
    entry, numbers = {"category": {}, "subject": {}, "level": {}}, {name: g for g, name in enumerate(parts.own)}
    for category, i in parts.groups.items():
        entry["category"][category] = {"questions": len(i)}
        for m, name in enumerate(MEASURES):
            mine = values[i, m]
            ends = interval(means[:, numbers[category], m], len(i), mine) if category in numbers else t_interval(mine)
            entry["category"][category][name] = estimate(mine.mean(), *ends)
    for kind, groups in others.items():
        for value, i in groups.items():
            average = estimate(values[i, 1].mean(), *t_interval(values[i, 1]))
            entry[kind][value] = {"questions": len(i), "average": average}
    return entry


def estimate(value, low, high):
    return {"value": float(value), "low": float(low), "high": float(high)}


def t_interval(values, level=0.95):
    """Student interval of a mean over questions, inside [0, 1]; of fewer than MANY `share_interval`'s; the exact
    binomial one when all values are the same."""
    from scipy import special

    n = len(values)
    if np.ptp(values) == 0:
        return binomial_interval(values[0], n, level)
    if n < MANY:
        return share_interval(values.mean(), values.std(ddof=1) / np.sqrt(n), n - 1, level)
    half = special.stdtrit(n - 1, 0.5 + level / 2) * values.std(ddof=1) / np.sqrt(n)
    return max(0.0, float(values.mean() - half)), min(1.0, float(values.mean() + half))


def count_outcomes(answers):
    """How many responses were answered, gave no answer, several, were cut off, or do not exist."""
    counts = {"answered": int((answers >= 0).sum())}
    counts |= {name: int((answers == code).sum()) for name, code in OUTCOMES.items()}
    return counts | {"missing": int((answers == MISSING).sum())}
