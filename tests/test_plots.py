"""The plot of a score report: every text whole and apart from the others, whatever the checkpoints are called."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.text import Text

from malaysian_sft import run_plots
from malaysian_sft.plots import compose, lines_of

RUNS = [
    "fsdp2-fused-moe-Qwen3-235B-A22B-lora-256",
    "fsdp2-fused-moe-Qwen3-30B-A3B-lora-256",
    "fsdp2-fused-moe-Qwen3-30B-A3B-dora-256",
    "fsdp2-fused-moe-glm-4.5-air-lora-256",
    "ds3-qwen2.5-72b-lora-256",
    "ds3-llama3.1-70b-lora-256",
]
BASES = ["Qwen3-235B-A22B", "Qwen2.5-72B-Instruct", "Meta-Llama-3.1-70B"]
CATEGORIES = ["STEM", "Language", "Social science", "Others", "Humanities"]


def checkpoints(runs):
    return [f"{run}-checkpoint-{step}" for run in runs for step in (320, 640, 960)]


def reported(bases, tuned, categories=CATEGORIES, spread=0.05):
    """A report and its rows, with scores that differ."""
    generator = np.random.default_rng(len(tuned))

    def estimate():
        value = 0.7 + spread * generator.normal()
        return {"value": value, "low": value - 0.006, "high": value + 0.005}

    entries = [
        {
            "name": f"malaymmlu-{name}",
            "micro": {"average": estimate()},
            "category": {category: {"average": estimate()} for category in categories},
        }
        for name in [*bases, *tuned]
    ]
    report = {
        "checkpoints": entries,
        "categories": {name: 4000 + i for i, name in enumerate(categories)},
        "questions": 24213,
        "chance": {"one sample": 0.26},
    }
    rows = [SimpleNamespace(args={"adapter": None}) for _ in bases] + [
        SimpleNamespace(args={"adapter": "a"}) for _ in tuned
    ]
    return report, rows


def boxes(figure):
    """{text: bounding boxes in pixels} of every text that is drawn, tick labels included."""
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    texts = [item for item in figure.findobj(Text) if item.get_visible() and item.get_text().strip()]
    ticks, shown = [], []
    for axis in figure.axes:
        for n, labels in enumerate((axis.get_xticklabels(), axis.get_yticklabels())):
            low, high = sorted(axis.get_xlim() if n == 0 else axis.get_ylim())
            ticks += labels
            shown += [label for label in labels if low <= label.get_position()[n] <= high]
    texts = [item for item in texts if item not in ticks] + shown
    return [(item.get_text(), item.get_window_extent(renderer)) for item in texts]


HOSTILE = ["$\\frac{1$ <b>", "x" * 300, "日本\n\tnama\x00", "_private"]
CASES = {
    "1 base": (BASES[:1], [], CATEGORIES),
    "1 tuned": ([], checkpoints(RUNS[:1])[:1], CATEGORIES),
    "3": ([], checkpoints(RUNS[:1]), CATEGORIES),
    "9": (BASES[:2], [*checkpoints(RUNS[:2]), "ds3-qwen3-32b-lora-256-checkpoint-640"], CATEGORIES),
    "21": (BASES, checkpoints(RUNS), CATEGORIES),
    "one category": (BASES[:1], checkpoints(RUNS[:1]), ["STEM"]),
    "hostile names": (HOSTILE, [f"{name}-checkpoint-3" for name in HOSTILE], [*HOSTILE, *map(str, range(30))]),
}


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("case", CASES)
def test_no_text_is_clipped_and_no_two_overlap(case):
    bases, tuned, categories = CASES[case]
    figure = compose(*reported(bases, tuned, categories))
    found = boxes(figure)
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in found:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for i, (text, box) in enumerate(found):
        for other, second in found[:i]:
            apart = box.x1 <= second.x0 or second.x1 <= box.x0 or box.y1 <= second.y0 or second.y1 <= box.y0
            assert apart, (text, other)
    shown = [text for text, _ in found]
    for name in [*bases, *tuned]:
        if name in HOSTILE or name.removesuffix("-checkpoint-3") in HOSTILE:
            continue
        assert shown.count(name) == 1  # whole, once
    inside = [axis.get_window_extent() for axis in figure.axes]
    names = [box for text, box in found if text in (*bases, *tuned)]
    assert not any(box.overlaps(axis) for box in names for axis in inside)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.01, 0.3])
def test_ticks_of_neighbouring_panels_do_not_meet(spread):
    figure = compose(*reported(BASES, checkpoints(RUNS[:1]), spread=spread))
    found = boxes(figure)
    for i, (text, box) in enumerate(found):
        assert not any(box.overlaps(second) for _, second in found[:i]), text


def test_checkpoints_of_the_same_epoch_stand_together_under_the_base_models():
    """Steps differ between runs; an epoch is the place among the run's own, by number, not by spelling."""
    tuned = ["big-checkpoint-1000", "big-checkpoint-90", "small-checkpoint-7", "small-checkpoint-8", "merged"]
    report, rows = reported(["Base-2507"], tuned)
    lines = [line.get("heading") or line["label"] for line in lines_of(report["checkpoints"], rows)]
    assert lines == ["base models", "Base-2507", "epoch 1", "big-checkpoint-90", "small-checkpoint-7", "merged",
                     "epoch 2", "big-checkpoint-1000", "small-checkpoint-8"]  # fmt: skip


def test_dots_and_intervals_are_the_report_s():
    report, rows = reported(BASES[:1], checkpoints(RUNS[:1]))
    figure = compose(report, rows)
    drawn = {}
    for axis in figure.axes:
        lines = [line.get_xdata() for line in axis.get_lines()]
        drawn[axis.get_title().split("\n")[0]] = [sorted({round(float(x), 6) for x in line}) for line in lines]
    for entry in report["checkpoints"]:
        parts = {"all questions": entry["micro"]} | entry["category"]
        for title, part in parts.items():
            item = {name: round(100 * value, 6) for name, value in part["average"].items()}
            assert [item["value"]] in drawn[title] and [item["low"], item["high"]] in drawn[title]


@pytest.mark.parametrize("panels", [1, 2, 5])
def test_the_legend_of_runs_fits_the_picture(panels, tmp_path, monkeypatch):
    """Names of launchers, as many as make three columns too wide for two panels."""
    from matplotlib import pyplot

    keys = ["loss", "learning_rate", "tokens_per_second", "peak_gib", "expert_load_max_over_mean"][:panels]
    steps = [{"step": step} | dict.fromkeys(keys, 1.0 + step) for step in range(3)]
    runs = [{"name": name, "flags": {}, "validation": [], "steps": steps} for name in [*RUNS, HOSTILE[0], "x" * 300]]
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    run_plots.draw(runs, tmp_path / "runs.png")
    [figure] = figures
    found = boxes(figure)
    width, height = figure.get_size_inches() * figure.dpi
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for _, box in found)
    for i, (text, box) in enumerate(found):
        assert not any(box.overlaps(second) for _, second in found[:i]), text
    assert {f"{name}, LoRA" for name in RUNS} <= {text for text, _ in found}
    assert all(axis.get_window_extent().height > 0.5 * height for axis in figure.axes)
