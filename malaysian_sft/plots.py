"""The plot of a score report."""

import re

import numpy as np


def split_step(name):
    """ "malaymmlu-run-checkpoint-960" -> ("run", 960); a name without a step -> (name, None)."""
    short = name.removeprefix("malaymmlu-")
    match = re.fullmatch(r"(.+?)(?:-checkpoint)?-(\d+)", short)
    return (match.group(1), int(match.group(2))) if match else (short, None)


def heights(items):
    """Estimates -> (percent, [[below], [above]]) for error bars."""
    y = np.array([100 * item["value"] for item in items])
    below, above = y - [100 * item["low"] for item in items], [100 * item["high"] for item in items] - y
    return y, np.maximum([below, above], 0)


def draw(report, rows, path):
    """PNG: the average by epoch with intervals, one line a run and base models dashed; beside it the average by
    category."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = report["checkpoints"]
    runs = {}
    for entry, row in zip(entries, rows, strict=True):
        run, step = split_step(entry["name"])
        if row.args and row.args.get("adapter") is None:  # a base model, even if its name ends in a number
            run, step = entry["name"].removeprefix("malaymmlu-"), None
        runs.setdefault(run, []).append((step, entry))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4.8), width_ratios=[1, 1.4], layout="constrained")
    most = max(len(points) for points in runs.values())
    categories = list(report["categories"])
    width, bar = 0.8 / len(entries), 0
    for number, (run, points) in enumerate(runs.items()):
        points.sort(key=lambda point: point[0] or 0)
        colour = f"C{number % 10}"
        y, errors = heights([entry["micro"]["average"] for _, entry in points])
        if points[0][0] is None:
            left.axhline(y[0], color=colour, linestyle="--", label=run)
            left.axhspan(y[0] - errors[0][0], y[0] + errors[1][0], color=colour, alpha=0.12, linewidth=0)
        else:
            left.errorbar(range(1, len(y) + 1), y, yerr=errors, color=colour, marker="o", capsize=3, label=run)
        for position, (_, entry) in enumerate(points):
            y, errors = heights([entry["category"][name]["average"] for name in categories])
            x = np.arange(len(categories)) + (bar - (len(entries) - 1) / 2) * width
            alpha = 0.4 + 0.6 * (position + 1) / len(points)  # later epochs are darker
            label = entry["name"].removeprefix("malaymmlu-")
            right.bar(
                x, y, width, yerr=errors, capsize=2, color=colour, alpha=alpha, label=label, error_kw={"linewidth": 0.8}
            )
            bar += 1
    left.set_xticks(range(1, most + 1))
    left.set_xlim(0.5, most + 0.5)
    left.set_xlabel("epoch (checkpoints of a run, in order)")
    left.set_ylabel("questions right, % (average of the samples)")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    right.axhline(100 * report["chance"]["one sample"], color="0.4", linestyle=":", label="chance")
    right.set_xticks(range(len(categories)), [f"{name}\n({report['categories'][name]:,})" for name in categories])
    right.set_ylim(0, 100)
    right.grid(axis="y", alpha=0.3)
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=min(4, len(entries) + 1))
    figure.suptitle(f"MalayMMLU format, {report['questions']:,} questions; bars are 95 % intervals over questions")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
