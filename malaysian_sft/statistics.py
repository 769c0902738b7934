"""Measures per question, intervals by resampling questions, paired comparisons; and the original project's block of
scores."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from malaysian_sft.generations import MISSING, OUTCOMES
from malaysian_sft.questions import LETTERS, strata


def original_scores(answers, questions):
    """acc1 and acc3 as the original computes them -> {category: (acc1, acc3)}, categories in the file's order, then
    "average".

    answers: int8 (Q, samples). acc1: the first sample that has an answer is right. acc3: one of the first three that
    have is right. Without an answer a question is wrong. The average is the unweighted mean of the categories.
    """
    keys = np.array([LETTERS.index(question["key"]) for question in questions], np.int8)  # (Q,)
    answered = answers >= 0  # (Q, samples)
    first = np.take_along_axis(answers, answered.argmax(1)[:, None], 1)[:, 0]  # (Q,)
    right_first = answered.any(1) & (first == keys)
    first_three = answered & (answered.cumsum(1) <= 3)
    right_any = (first_three & (answers == keys[:, None])).any(1)
    rows = {}
    for question in questions:
        rows.setdefault(question["category"], []).append(question["index"])
    scores = {
        name: (int(right_first[index].sum()) / len(index), int(right_any[index].sum()) / len(index))
        for name, index in rows.items()
    }
    scores["average"] = tuple(float(np.mean([score[i] for score in scores.values()])) for i in (0, 1))
    return scores


MEASURES = ("acc@1", "average", "majority", "any")


def measure(answers, keys):
    """The four measures question by question -> float64 (Q, 4), in the order of MEASURES. answers: int8 (Q, S); keys:
    int8 (Q,)."""
    right = answers == keys[:, None]  # (Q, S)
    votes = np.stack([(answers == letter).sum(1) for letter in range(len(LETTERS))], 1)  # (Q, 6)
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
        step = max(1, 4_000_000 // n)
        for start in range(0, resamples, step):
            rows = min(step, resamples - start)
            drawn = generator.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
            weights = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float32)
            means[start : start + rows, g] = weights @ chosen / n
    return means


def interval(resampled, n, values=None, level=0.95):
    """Percentile interval of bootstrap means, widened for small samples (the "expanded percentile" of Hesterberg 2015)
    -> (low, high).

    n: questions behind the estimate (of the smallest stratum). values: the per-question values; if they are all the
    same the bootstrap sees no spread at all, and the exact binomial interval is given instead.
    """
    from scipy import special

    if values is not None and np.ptp(values) == 0:
        return binomial_interval(values[0], len(values), level)
    tail = (1 - level) / 2
    if n > 1:
        tail = float(special.ndtr(np.sqrt(n / (n - 1)) * special.stdtrit(n - 1, tail)))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def binomial_interval(share, n, level=0.95):
    """Clopper and Pearson's exact interval for `share` of n -> (low, high); for a share between two counts by the same
    beta quantiles."""
    from scipy import special

    tail, k = (1 - level) / 2, share * n
    low = float(special.betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    return low, float(special.betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0


def mcnemar(first, second):
    """Exact McNemar test of two boolean arrays over the same questions -> (only first right, only second right,
    two-sided p)."""
    from scipy import special

    b, c = int((first & ~second).sum()), int((~first & second).sum())
    return b, c, min(1.0, 2 * float(special.bdtr(min(b, c), b + c, 0.5)))


def holm(p_values):
    """Holm's step-down correction -> adjusted p-values in the order given."""
    order = np.argsort(p_values)
    adjusted, running = np.empty(len(p_values)), 0.0
    for rank, position in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = running
    return [float(p) for p in adjusted]


@dataclass
class Row:
    """One checkpoint with its answers."""

    name: str
    path: Path
    args: dict
    answers: np.ndarray  # int8 (Q, samples)

    @property
    def protocol(self):
        return self.args.get("protocol", "reasoning")


def score(rows, questions, resamples=2000, seed=0, pairs="all"):
    """All numbers about `rows` as one JSON-ready dict: chance levels, per checkpoint scores with intervals,
    comparisons."""
    keys = np.array([LETTERS.index(question["key"]) for question in questions], np.int8)
    offered = np.array([len(question["letters"]) for question in questions])
    groups = strata(questions)
    index = list(groups.values())
    sizes = np.array([len(i) for i in index])
    values = np.stack([measure(row.answers, keys) for row in rows], 1)  # (Q, rows, measures)
    means = bootstrap(values.reshape(len(questions), -1), index, resamples, seed).reshape(
        resamples, len(index), len(rows), len(MEASURES)
    )
    micro = np.einsum("bgrm,g->brm", means, sizes / sizes.sum())
    macro = means.mean(1)
    report = {
        "questions": len(questions),
        "categories": {name: len(i) for name, i in groups.items()},
        "resamples": resamples,
        "seed": seed,
        "chance": {"one sample": float((1 / offered).mean())},
        "checkpoints": [],
    }
    for r, row in enumerate(rows):
        width = row.answers.shape[1]
        report["chance"][f"any of {width}"] = float((1 - (1 - 1 / offered) ** width).mean())
        mine = values[:, r]  # (Q, measures)
        entry = {
            "name": row.name,
            "directory": str(row.path),
            "protocol": row.protocol,
            "samples": width,
            "retries": row.args.get("retries", 0),
            "answers": count_outcomes(row.answers),
            "original": {name: list(pair) for name, pair in original_scores(row.answers, questions).items()},
            "micro": {},
            "macro": {},
            "category": {},
            "subject": {},
            "level": {},
        }
        for m, name in enumerate(MEASURES):
            entry["micro"][name] = estimate(mine[:, m].mean(), *interval(micro[:, r, m], sizes.min(), mine[:, m]))
            by_group = np.mean([mine[i, m].mean() for i in index])
            entry["macro"][name] = estimate(by_group, *interval(macro[:, r, m], sizes.min(), mine[:, m]))
        for g, (category, i) in enumerate(groups.items()):
            entry["category"][category] = {"questions": len(i)} | {
                name: estimate(mine[i, m].mean(), *interval(means[:, g, r, m], len(i), mine[i, m]))
                for m, name in enumerate(MEASURES)
            }
        for kind in ("subject", "level"):
            for value, i in strata(questions, kind).items():
                entry[kind][value] = {
                    "questions": len(i),
                    "average": estimate(mine[i, 1].mean(), *t_interval(mine[i, 1])),
                }
        report["checkpoints"].append(entry)
    report["comparisons"] = compare(rows, values, micro, pairs)
    return report


def estimate(value, low, high):
    return {"value": float(value), "low": float(low), "high": float(high)}


def t_interval(values, level=0.95):
    """Student interval of a mean over questions, inside [0, 1]; the exact binomial one when all values are the same."""
    from scipy import special

    n = len(values)
    if np.ptp(values) == 0:
        return binomial_interval(values[0], n, level)
    half = special.stdtrit(n - 1, 0.5 + level / 2) * values.std(ddof=1) / np.sqrt(n)
    return max(0.0, float(values.mean() - half)), min(1.0, float(values.mean() + half))


def count_outcomes(answers):
    """How many responses were answered, gave no answer, several, were cut off, or do not exist."""
    counts = {"answered": int((answers >= 0).sum())}
    counts |= {name: int((answers == code).sum()) for name, code in OUTCOMES.items()}
    return counts | {"missing": int((answers == MISSING).sum())}


def chosen_pairs(pairs, rows):
    """`--compare` -> index pairs. Raises ValueError for an unknown name."""
    if pairs == "none":
        return []
    if pairs == "all":
        return [(i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))]
    found = []
    for part in pairs.split(","):
        names = [name.strip() for name in part.split(":")]
        where = [
            next((i for i, row in enumerate(rows) if row.name in (name, f"malaymmlu-{name}")), None) for name in names
        ]
        if len(where) != 2 or None in where:
            raise ValueError(
                f"--compare {part!r}: expected NAME:NAME out of {', '.join(row.name for row in rows)}, or all, or none"
            )
        found.append(tuple(where))
    return found


def compare(rows, values, micro, pairs):
    """Paired comparisons -> list of dicts. values: (Q, rows, measures); micro: (resamples, rows, measures), the same
    resamples for all."""
    from scipy import special

    found = []
    for i, j in chosen_pairs(pairs, rows):
        if rows[i].protocol != rows[j].protocol:
            continue  # a first-token score and a reasoning score are not the same quantity
        difference = float((values[:, i, 1] - values[:, j, 1]).mean())
        resampled = micro[:, i, 1] - micro[:, j, 1]
        spread = float(resampled.std(ddof=1))
        low, high = interval(resampled, len(values))
        p = float(2 * special.ndtr(-abs(difference) / spread)) if spread > 0 else float(difference == 0)
        only_first, only_second, p_mcnemar = mcnemar(values[:, i, 0] == 1, values[:, j, 0] == 1)
        found.append(
            {
                "first": rows[i].name,
                "second": rows[j].name,
                "difference": estimate(difference, low, high),
                "p_bootstrap": p,
                "only_first_right": only_first,
                "only_second_right": only_second,
                "p_mcnemar": p_mcnemar,
            }
        )
    for name in ("p_bootstrap", "p_mcnemar"):
        for item, adjusted in zip(found, holm([item[name] for item in found]), strict=True):
            item[name + "_holm"] = adjusted
    for item in found:
        item["verdict"] = verdict(item)
    return found


def verdict(item):
    """A comparison in words."""
    points, p = 100 * item["difference"]["value"], item["p_bootstrap_holm"]
    better, worse = (item["first"], item["second"]) if points >= 0 else (item["second"], item["first"])
    sides = sorted(
        abs(100 * x) if (x >= 0) == (points >= 0) else -abs(100 * x)
        for x in (item["difference"]["low"], item["difference"]["high"])
    )
    interval_text = f"95 % interval {sides[0]:.2f} to {sides[1]:.2f}"
    p_text = f"p {p:.2g} by bootstrap, {item['p_mcnemar_holm']:.2g} by McNemar"
    numbers = f"{abs(points):.2f} points, {interval_text}; {p_text}"
    if p < 0.05:
        return f"{better} is better than {worse} ({numbers}, Holm-corrected)"
    return f"{better} and {worse} cannot be told apart ({numbers}, Holm-corrected)"
