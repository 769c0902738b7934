"""The plot of a score report: dots with intervals, a checkpoint a line; a panel of all questions, one a category."""

import math
import re

FONT = 8.0  # points, of everything but the title
LINE = 0.23  # inches between two lines
MOST_PANELS = 24  # matplotlib refuses pictures of more than 65,536 pixels
ACROSS = 6  # panels side by side
LONGEST = 90  # characters of a name
MARKERS = "osD^v"


def split_step(name):
    """ "malaymmlu-run-checkpoint-960" -> ("run", 960); a name without a step -> (name, None)."""
    short = name.removeprefix("malaymmlu-")
    match = re.fullmatch(r"(.+?)(?:-checkpoint)?-(\d+)", short)
    return (match.group(1), int(match.group(2))) if match else (short, None)


def plain(text, longest=LONGEST):
    """Text from outside as one line of at most `longest` characters, its middle left out."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split()) or "-"
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[:half]}…{text[-half:]}"


def lines_of(entries, rows):
    """Lines of the plot from top to bottom, [{"heading"} or {"label", "entry", "run", "base"}].

    Base models come first. Then the checkpoints, those of the same epoch under one heading: an epoch is a place among
    the checkpoints of a run, in the order of their steps. Without a record of what was loaded, a name without a step
    counts as a base model.
    """
    runs, bases = {}, []
    for entry, row in zip(entries, rows, strict=True):
        run, step = split_step(entry["name"])
        if row.args.get("adapter") is None and (row.args or step is None):  # a base's name may end in a number
            bases.append(entry)
        else:
            runs.setdefault(run, []).append((step or 0, entry))
    epochs = {}
    for number, points in enumerate(runs.values()):
        for epoch, (_, entry) in enumerate(sorted(points, key=lambda point: point[0]), 1):
            epochs.setdefault(epoch, []).append((number, entry))
    groups = [("base models", [(number, entry) for number, entry in enumerate(bases)], True)] if bases else []
    groups += [(f"epoch {epoch}", epochs[epoch], False) for epoch in sorted(epochs)]
    found = []
    for heading, members, base in groups:
        found.append({"heading": heading})
        for number, entry in members:
            label = plain(entry["name"].removeprefix("malaymmlu-"))
            found.append({"label": label, "entry": entry, "run": number, "base": base})
    return found


def panels_of(report):
    """[(title, {checkpoint: estimate} getter)]: all questions, then categories, the largest if they are too many."""
    names = sorted(report["categories"], key=lambda name: -report["categories"][name])[: MOST_PANELS - 1]
    names = [name for name in report["categories"] if name in names]
    found = [(f"all questions\n{report['questions']:,}", lambda entry: entry["micro"]["average"])]
    for name in names if len(report["categories"]) > 1 else []:
        title = f"{plain(name, 22)}\n{report['categories'][name]:,}"
        found.append((title, lambda entry, name=name: entry["category"][name]["average"]))
    return found


def style(line):
    """(colour, marker) of a line: a run keeps its own through the epochs, base models are grey."""
    if line["base"]:
        return "0.35", "s"
    return f"C{line['run'] % 10}", MARKERS[line["run"] // 10 % len(MARKERS)]


def draw_panel(axis, lines, estimate, chance):
    """Dots and intervals of one panel, in percent; a base model is a dashed line through all of it."""
    ends = []
    for y, line in enumerate(lines):
        if "heading" in line:
            axis.axhline(y, color="0.9", linewidth=0.8, zorder=0)
            continue
        value, low, high = (100 * estimate(line["entry"])[name] for name in ("value", "low", "high"))
        colour, marker = style(line)
        ends += [value, low, high]
        axis.plot([low, high], [y, y], color=colour, linewidth=1.3, solid_capstyle="butt")
        axis.plot([value], [y], marker, color=colour, markersize=4.5)
        if line["base"]:
            axis.axvline(value, color=colour, linestyle="--", linewidth=0.8, zorder=0)
    room = max(0.08 * (max(ends) - min(ends)), 0.5)
    axis.set_xlim(min(ends) - room, max(ends) + room)
    if axis.get_xlim()[0] < chance < axis.get_xlim()[1]:
        axis.axvline(chance, color="0.5", linestyle=":", linewidth=0.9, zorder=0)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.locator_params(axis="x", nbins=3, min_n_ticks=2)
    axis.tick_params(labelsize=FONT, length=2)
    axis.grid(axis="x", alpha=0.25)
    axis.set_yticks([])


def width_of(figure, texts, **font):
    """Inches that the widest of `texts` takes."""
    renderer, widest = figure.canvas.get_renderer(), 0.0
    for text in texts:
        item = figure.text(0, 0, text, fontsize=FONT, parse_math=False, **font)
        widest = max(widest, item.get_window_extent(renderer).width / figure.dpi)
        item.remove()
    return widest


def write_labels(axis, lines, names, values):
    """Names left of a panel, under their headings; `values` adds what the dots stand for on its right."""
    place = axis.get_yaxis_transform()  # x as a share of the panel, y in lines
    for y, line in enumerate(lines):
        font = dict(fontsize=FONT, va="center", transform=place, clip_on=False, parse_math=False)
        if "heading" in line:
            axis.annotate(line["heading"], (0, y), (-names * 72, 0), place, textcoords="offset points", weight="bold",
                          fontsize=FONT, va="center", annotation_clip=False)  # fmt: skip
            continue
        axis.annotate(line["label"], (0, y), (-8, 0), place, textcoords="offset points", ha="right", fontsize=FONT,
                      va="center", color=style(line)[0], annotation_clip=False, parse_math=False)  # fmt: skip
        if values:
            axis.text(1.03, y, value_text(line["entry"]), **font)


def value_text(entry):
    item = entry["micro"]["average"]
    return f"{100 * item['value']:.2f} [{100 * item['low']:.2f}, {100 * item['high']:.2f}]"


def compose(report, rows):
    """The plot as a matplotlib figure. Places are in inches, from the measured widths of the texts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines, panels = lines_of(report["checkpoints"], rows), panels_of(report)
    figure = Figure(dpi=130)
    FigureCanvasAgg(figure)
    named = [line for line in lines if "label" in line]
    names = max(
        width_of(figure, [line["label"] for line in named]) + 0.15,
        width_of(figure, [line["heading"] for line in lines if "heading" in line], weight="bold") + 0.1,
    )
    values = width_of(figure, [value_text(line["entry"]) for line in named]) + 0.15
    across = min(ACROSS, len(panels))
    panel, gap = (1.35 if across > 1 else 3.0), 0.22
    width = 0.15 + names + values + across * (panel + gap) + 0.1
    height, above, below = LINE * len(lines), 0.45, 0.5
    down = math.ceil(len(panels) / across)
    title = plot_title(report, panels)
    title_font = dict(fontsize=FONT + 2, parse_math=False)
    title, top = wrap(figure, title, max(width, 5.0) - 0.3)
    width, total = max(width, 5.0), top + down * (above + height + below)
    figure.set_size_inches(width, total)
    figure.text(0.15 / width, 1 - 0.1 / total, title, va="top", **title_font)
    for number, (name, estimate) in enumerate(panels):
        row, column = divmod(number, across)
        left = 0.15 + names + column * (panel + gap) + (values if column else 0)
        bottom = total - top - row * (above + height + below) - above - height
        axis = figure.add_axes((left / width, bottom / total, panel / width, height / total))
        draw_panel(axis, lines, estimate, 100 * report["chance"]["one sample"])
        axis.set_title(name, fontsize=FONT, parse_math=False)
        if column == 0:
            write_labels(axis, lines, names, values=row == 0)
            axis.set_xlabel("questions right, %", fontsize=FONT)
    return figure


def plot_title(report, panels):
    """What the picture shows and how to read it."""
    left_out = len(report["categories"]) - (len(panels) - 1)
    parts = [f"MalayMMLU format, {report['questions']:,} questions: average of the samples, 95 % intervals."]
    parts.append("Each panel has its own scale; dashed: base models; dotted: chance.")
    if left_out > 0 and len(panels) > 1:
        parts.append(f"The {left_out} smallest categories are not drawn.")
    return " ".join(parts)


def wrap(figure, text, width):
    """Text broken into lines of at most `width` inches -> (text, height in inches with a margin)."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if width_of(figure, [longer]) * (FONT + 2) / FONT > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines), 0.2 + 0.19 * len(lines)


def draw(report, rows, path):
    """Write the plot as a PNG."""
    compose(report, rows).savefig(path, dpi=130, format="png")
