"""Paired comparisons of checkpoints: a sign-flip permutation test of the differences question by question, the interval
that inverts the same test, Holm's correction of both, and ranks.

The test (Fisher 1935): if two checkpoints are equally good, each question's difference is as likely to have the other
sign. It holds its level with any number of questions, and needs no strata, because a flip stays within its question.
"""

import fnmatch
import math

import numpy as np

ALPHA = 0.05
MOST_WAYS = 50_000  # ways to flip the signs that are enumerated; beyond it they are drawn
ZERO_POINTS = 32  # questions without a difference widen the interval only: so many quantiles stand for their binomial


def holm(p_values):
    """Holm's step-down correction -> adjusted p-values in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = np.empty(len(p_values)), 0.0
    for rank, position in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = running
    return [float(p) for p in adjusted]


def holm_factors(p_values, alpha=ALPHA):
    """What Holm's procedure multiplies each p-value with when it decides -> ints in the order given.

    p * factor < alpha is the decision. After the first comparison that is not rejected nothing is, and its factor stays
    for the rest; so an interval at level 1 - alpha / factor leaves zero out exactly when the comparison is rejected.
    """
    factors, stopped = [1] * len(p_values), None
    for rank, position in enumerate(np.argsort(p_values, kind="stable")):
        factor = stopped or len(p_values) - rank
        if stopped is None and p_values[position] * factor >= alpha:
            stopped = factor
        factors[position] = factor
    return factors


def mcnemar(first, second):
    """Exact McNemar test of two boolean arrays over the same questions -> (only first right, only second right,
    two-sided p)."""
    from scipy import special

    b, c = int((first & ~second).sum()), int((~first & second).sum())
    return b, c, min(1.0, 2 * float(special.bdtr(min(b, c), b + c, 0.5)))


def sign_flips(units, draws=9_999, seed=0):
    """The means of both parts of every split of `units` in two -> (lower mean, upper mean, weight), float64 (splits,).

    units: int64 (questions,), the differences as whole numbers of a common denominator. Flipping the signs of one part,
    after a shift d of all differences, gives at least as extreme a sum exactly when d lies between the means of the two
    parts (Hartigan's typical values, 1969): one set of splits is the test at d = 0 and the interval. A part without a
    question has no bound. Splits are counted by value, since equal differences are interchangeable: all of them with
    their probabilities if they are at most MOST_WAYS, else `draws` random ones and the one that flips nothing.
    """
    values, counts = np.unique(units, return_counts=True)
    ways = [
        1.0 * count + 1 if value else min(count + 1, ZERO_POINTS) for value, count in zip(values, counts, strict=True)
    ]
    total, n = int(units.sum()), len(units)
    if math.prod(ways) <= MOST_WAYS:
        kept, kept_sum, weight = np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1)
        for value, count in zip(values, counts, strict=True):
            chosen, share = binomial_points(int(count), None if value else ZERO_POINTS)
            kept = (kept[:, None] + chosen).ravel()
            kept_sum = (kept_sum[:, None] + value * chosen).ravel()
            weight = (weight[:, None] * share).ravel()
    else:
        generator = np.random.default_rng(seed)
        chosen = np.stack([generator.binomial(count, 0.5, draws) for count in counts])  # (values, draws)
        kept = np.append(chosen.sum(0), n)
        kept_sum = np.append(values @ chosen, total)
        weight = np.full(draws + 1, 1 / (draws + 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.stack([kept_sum / kept, (total - kept_sum) / (n - kept)])
    one_part = (kept == 0) | (kept == n)
    return np.where(one_part, -np.inf, parts.min(0)), np.where(one_part, np.inf, parts.max(0)), weight


def binomial_points(count, most=None):
    """How many of `count` fair coins fall heads -> (numbers int64, probabilities); at most `most` of them, as equally
    probable quantiles."""
    from scipy import special

    if most is not None and count + 1 > most:
        middle = (np.arange(most) + 0.5) / most
        return np.rint(count / 2 + np.sqrt(count) / 2 * special.ndtri(middle)).astype(np.int64), np.full(most, 1 / most)
    numbers = np.arange(count + 1)
    return numbers, special.binom(count, numbers) / 2.0**count


def sign_flip_p(splits):
    """Two-sided p-value of no difference."""
    low, high, weight = splits
    return min(1.0, float(weight[(low <= 0) & (high >= 0)].sum()))


def is_bound(splits, p):
    """Whether only the split that flips nothing was as extreme, of those drawn: the p-value is at most this."""
    weight = splits[2]
    return bool(np.ptp(weight) == 0 and p < 1.5 * weight[0])


def sign_flip_interval(splits, alpha=ALPHA):
    """All shifts that the test does not reject at `alpha` -> (low, high), in units, infinite if it cannot reject."""
    low, high, weight = splits
    return lower_bound(low, weight, alpha), -lower_bound(-high, weight, alpha)


def lower_bound(ends, weight, alpha):
    """The end up to which the splits weigh `alpha`, from the least on."""
    if np.ptp(weight) == 0:  # drawn ones weigh the same, and to sort them alone is quicker
        return float(np.sort(ends)[np.argmax(weight.cumsum() >= alpha)])
    order = np.argsort(ends, kind="stable")
    return float(ends[order][np.argmax(weight[order].cumsum() >= alpha)])


def same_everywhere(value, n, alpha):
    """The interval of a mean when all n differences are `value`, in [-1, 1].

    None of n questions was otherwise, so at most a share u of all is (exact binomial bound). With value 0 those may
    differ by one either way; with another value they may have the opposite sign or reach the end of the scale. It
    leaves zero out exactly when the sign-flip test rejects: u < 1/2 is 2 / 2^n < alpha.
    """
    u = 1 - (alpha / 2) ** (1 / n)
    ends = (value * (1 - 2 * u), value + u * (math.copysign(1, value) - value)) if value else (-u, u)
    return min(ends), max(ends)


def paired_test(differences, denominator, draws=9_999, seed=0):
    """Sign-flip test of differences question by question -> (p, whether it is only a bound, interval), where
    interval(alpha) -> (low, high).

    differences: float64 (questions,) in [-1, 1], multiples of 1 / denominator.
    """
    n = len(differences)
    if n == 0:
        return 1.0, False, lambda alpha: (-1.0, 1.0)
    units = np.rint(differences * denominator).astype(np.int64)
    splits = sign_flips(units, draws, seed)

    def interval(alpha):
        if units.min() == units.max():
            low, high = same_everywhere(units[0] / denominator, n, alpha)
        else:
            low, high = (end / denominator for end in sign_flip_interval(splits, alpha))
        return max(-1.0, low), min(1.0, high)

    p = sign_flip_p(splits)
    return p, is_bound(splits, p), interval


def chosen_pairs(pairs, rows):
    """`--compare` -> index pairs. Raises ValueError for an unknown name.

    "all": every pair of one protocol. A part NAME:NAME compares whatever is named; a name may be a glob.
    """
    if pairs == "none":
        return []
    if pairs == "all":
        count = len(rows)
        return [(i, j) for i in range(count) for j in range(i + 1, count) if rows[i].protocol == rows[j].protocol]
    found = []
    for part in pairs.split(","):
        sides = [
            [
                i
                for i, row in enumerate(rows)
                for glob in (name.strip(), f"malaymmlu-{name.strip()}")
                if matches(row, glob)
            ]
            for name in part.split(":")
        ]
        if len(sides) != 2 or not all(sides):
            raise ValueError(
                f"--compare {part!r}: expected NAME:NAME out of {', '.join(row.name for row in rows)}, or all, or none"
            )
        before = len(found)
        for i in sides[0]:
            found += [(i, j) for j in sides[1] if i != j and (i, j) not in found and (j, i) not in found]
        if len(found) == before:
            raise ValueError(f"--compare {part!r}: no two checkpoints that are not compared already")
    return found


def matches(row, glob):
    return row.name == glob or fnmatch.fnmatchcase(row.name, glob)


def shares_right(answers, keys, missing, most=None):
    """Of each question the share of its made samples that are right -> (float64 (Q,), samples used int (Q,)).

    most: int (Q,), how many of a question's samples are used at most, the first ones.
    """
    made = answers != missing
    if most is not None:
        made &= made.cumsum(1) <= most[:, None]
    used = made.sum(1)
    return ((answers == keys[:, None]) & made).sum(1) / np.maximum(used, 1), used


def compare(rows, keys, pairs="all", missing=-4, seed=0):
    """Paired comparisons of the average of the samples -> list of dicts.

    rows: with name, protocol and answers int8 (Q, samples); keys: int8 (Q,). A pair is compared on the questions of
    which both made a sample, and on as many samples of each as both made: what an unfinished run lacks is not wrong,
    and the difference of one sample from an average of eight is skew where most are right, which no flip of signs is.
    """
    chosen, found, intervals = chosen_pairs(pairs, rows), [], []
    shares = {i: shares_right(rows[i].answers, keys, missing) for i in {i for pair in chosen for i in pair}}
    draws = max(9_999, 400 * len(chosen) - 1)  # so that Holm's correction of the smallest p-value stays below 0.05
    for i, j in chosen:
        (first, first_made), (second, second_made) = shares[i], shares[j]
        fewest = np.minimum(first_made, second_made)
        uneven = bool((first_made != second_made)[fewest > 0].any())
        if uneven:
            (first, first_made), (second, second_made) = (
                shares_right(rows[k].answers, keys, missing, fewest) for k in (i, j)
            )
        both = fewest > 0
        denominator = min(math.lcm(*map(int, np.unique([first_made[both], second_made[both]])), 1), 10**9)
        differences = (first - second)[both]
        p, bound, interval = paired_test(differences, denominator, draws, seed)
        begun = (rows[i].answers[:, 0] != missing) & (rows[j].answers[:, 0] != missing)
        right = [(rows[k].answers[begun, 0] == keys[begun]) for k in (i, j)]
        only_first, only_second, p_mcnemar = mcnemar(*right)
        found.append(
            {
                "first": rows[i].name,
                "second": rows[j].name,
                "protocols": [rows[i].protocol, rows[j].protocol],
                "questions": int(both.sum()),
                "same_samples": not uneven,
                "difference": {"value": float(differences.mean()) if both.any() else 0.0},
                "p_sign_flip": p,
                "p_is_bound": bound,
                "only_first_right": only_first,
                "only_second_right": only_second,
                "p_mcnemar": p_mcnemar,
            }
        )
        intervals.append(interval)
    for name in ("p_sign_flip", "p_mcnemar"):
        for item, adjusted in zip(found, holm([item[name] for item in found]), strict=True):
            item[name + "_holm"] = adjusted
    factors = holm_factors([item["p_sign_flip"] for item in found])
    for item, interval, factor in zip(found, intervals, factors, strict=True):
        low, high = interval(ALPHA / factor)
        item["difference"] |= {"low": low, "high": high, "level": 1 - ALPHA / factor}
        item["differs"] = low > 0 or high < 0
        item["verdict"] = verdict(item, len(keys), len(found))
    return found


def points(share):
    """A share as percentage points with two decimals, with more if it would read as zero and is not."""
    value = 100 * share
    return f"{value:.2f}" if abs(value) >= 0.005 or value == 0 else f"{value:.1g}"


def verdict(item, questions, comparisons):
    """A comparison in words. `differs` decides, and the interval printed is the one that decided it."""
    value, low, high = (item["difference"][name] for name in ("value", "low", "high"))
    first, second = item["first"], item["second"]
    if value < 0:
        first, second, value, low, high = second, first, -value, -high, -low
    said = f"{first} is better than {second}" if item["differs"] else f"{first} and {second} cannot be told apart"
    level = f"{100 * item['difference']['level']:.4g}"
    numbers = (
        f"{points(value)} points, {level} % interval {points(low)} to {points(high)}; p {item['p_sign_flip_holm']:.2g}"
    )
    numbers += " by sign flips" + (f", both Holm-corrected for {comparisons} comparisons" if comparisons > 1 else "")
    if item["questions"] < questions:
        numbers += f"; on the {item['questions']:,} questions that both answered"
    if not item["same_samples"]:
        numbers += "; of each question as many samples as both have"
    if len(set(item["protocols"])) > 1:
        numbers += f"; the same questions by different protocols, {item['protocols'][0]} and {item['protocols'][1]}"
    return f"{said} ({numbers})"


def ranks(names, comparisons):
    """Rank of each name: one more than the number of those that are better beyond chance -> {name: rank}."""
    rank = dict.fromkeys(names, 1)
    for item in comparisons:
        if item["differs"]:
            rank[item["second"] if item["difference"]["value"] > 0 else item["first"]] += 1
    return rank


def leaderboard(entries, comparisons):
    """Checkpoints by protocol, best average first -> [{"protocol", "rows": [{"rank", "name"}]}].

    entries: the report's checkpoints. comparisons: all pairs of one protocol. A rank is shared by those that cannot be
    told from each other. A run that has not finished has no rank (None) and stands last, for its score is not final.
    """
    found = []
    for protocol in dict.fromkeys(entry["protocol"] for entry in entries):
        mine = [entry for entry in entries if entry["protocol"] == protocol]
        finished = [entry["name"] for entry in mine if not entry["answers"]["missing"]]
        rank = ranks(finished, [c for c in comparisons if c["first"] in finished and c["second"] in finished])
        mine.sort(key=lambda entry: (entry["name"] not in rank, -entry["micro"]["average"]["value"]))
        rows = [{"rank": rank.get(entry["name"]), "name": entry["name"]} for entry in mine]
        found.append({"protocol": protocol, "rows": rows})
    return found
