"""After a run: what was planned beside what was measured, and one PNG of any number of runs.

    python3 plan.py --compare outputs/RUN [outputs/RUN ...] [--plot FILE]

reads args.json and log.jsonl of each run, and a profile where one was asked for, which is a record of
`python3 benchmarks/bench_step.py --out outputs/RUN/profile.json`, run with the same model and flags.
"""

import json
import math
from pathlib import Path
from statistics import median

import pandas as pd

from malaysian_sft.account import GIB
from malaysian_sft.plan_page import PlanArguments, run_time
from malaysian_sft.plan_table import read_config
from malaysian_sft.planning import CHOICES, plan_run
from malaysian_sft.plots import FONT, plain, width_of
from malaysian_sft.tables import text_table
from malaysian_sft.timing import MEASURED

WARM_UP = 2  # steps that compile and allocate, left out of speeds where there are more
# (title, key of a log record, whether zero belongs to the axis)
PANELS = (
    ("loss", "loss", False),
    ("learning rate", "learning_rate", True),
    ("tokens/s, all GPUs", "tokens_per_second", True),
    ("peak memory, GiB a GPU", "peak_gib", True),
    ("router load, busiest expert over mean", "expert_load_max_over_mean", False),
)
# Flags that a plan is made from, where a trainer has them.
PLANNED_FLAGS = (
    "max_seq_length global_batch_size r expert_r use_dora activations memory_mode reduce_every_micro_batch"
    " frugal_layers transposed_layers gather_base shard_nodes base_dtype expert_arithmetic"
).split()


def _whole(value):
    return type(value) is int and value > 0


def _number(value):
    return type(value) in (int, float)


def _measured(value):
    return value is None or _number(value)


# key -> (what is expected, in words; whether a value is that)
ARGUMENTS = {
    "model": ("a name", lambda value: isinstance(value, str)),
    "world_size": ("a positive whole number", _whole),
    "nodes": ("a positive whole number", lambda value: value is None or _whole(value)),
    "facts": ("an object", lambda value: value is None or isinstance(value, dict)),
    "device": ("a name", lambda value: value is None or isinstance(value, str)),
}
FACTS = {"total_steps": ("a positive whole number", lambda value: value is None or _whole(value))}
STEP = {
    "step": ("a positive whole number", _whole),
    "loss": ("a number", _number),
    "tokens": ("a positive whole number", _whole),
    "tokens_per_second": ("a positive number", lambda value: _number(value) and 0 < value < math.inf),
    **dict.fromkeys("learning_rate peak_gib mfu expert_load_max_over_mean".split(), ("a number", _measured)),
}


def _check(found, kinds, where, advice):
    """Raise ValueError, with the place and the key, for the first value that is not of its kind."""
    for key, (expected, holds) in kinds.items():
        if not holds(found.get(key)):
            raise ValueError(f"{where}: {key} is {str(found.get(key))[:60]!r}, expected {expected}; {advice}")


def read_run(directory):
    """{"name", "args": args.json, "steps": records of steps, "validation": records with a validation loss}. Raises
    ValueError, with file and line, for what isn't a run."""
    directory = Path(directory)
    arguments = directory / "args.json"
    if not arguments.is_file():
        raise ValueError(f"{arguments}: no such file; --compare expects directories of runs, such as outputs/RUN")
    try:
        args = json.loads(arguments.read_text())
        flags = dict(args["arguments"])
    except (RecursionError, ValueError, KeyError, TypeError):
        raise ValueError(f"{arguments}: not what a trainer writes there; --compare expects a run of this one") from None
    advice = "put back what the trainer wrote there"
    _check(args, ARGUMENTS, arguments, advice)
    _check(args.get("facts") or {}, FACTS, f"{arguments}, facts", advice)
    log = directory / "log.jsonl"
    if not log.is_file():
        raise ValueError(f"{log}: no such file; the run has not made a step yet")
    steps, validation = [], []
    for number, line in enumerate(log.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break  # cut short: the run is still writing, or was killed
        try:
            record = json.loads(line)
            step = record["step"]
        except (RecursionError, ValueError, KeyError, TypeError):
            raise ValueError(f"{log}, line {number}: no record of a step; remove the line") from None
        where, advice = f"{log}, line {number}", "put it right or remove the line"
        _check(record, {"validation_loss": ("a number", _measured)}, where, advice)
        if "loss" in record and "tokens_per_second" in record:
            _check(record, STEP, where, advice)
            while steps and steps[-1]["step"] >= step:  # resumed: these steps were made again
                steps.pop()
            steps.append(record)
        if record.get("validation_loss") is not None:
            validation.append(record)
    if not steps:
        raise ValueError(f"{log}: no record of a step")
    return {"name": directory.resolve().name, "directory": directory, "args": args, "flags": flags, "steps": steps,
            "validation": validation}  # fmt: skip


def planned_run(run, wanted, configs=None):
    """(config, plan, time or None) of what a run was: its arguments, planned anew. Raises ValueError where the model's
    config can't be read."""
    flags, args = run["flags"], run["args"]
    config = read_config(args["model"], flags.get("model_revision"), configs)
    kind = "moe" if "gather_base" in flags else "dense"
    for name in ("activations", *(() if kind == "moe" else ("per_device_train_batch_size",))):
        if name not in flags:
            raise ValueError(f"{run['directory'] / 'args.json'}: no {name} in arguments")
    chosen = {name: flags[name] for name in PLANNED_FLAGS if flags.get(name) is not None}
    if kind == "dense":
        chosen |= {"micro_batch": flags["per_device_train_batch_size"], "zero3": bool(flags.get("deepspeed"))}
        chosen = {name: value for name, value in chosen.items() if name != "expert_r"}
    if chosen["activations"] not in CHOICES[kind]:
        raise ValueError(f"activations {chosen['activations']}: no choice of a {kind} run")
    nodes = args.get("nodes") or 1
    plan = plan_run(
        config,
        kind=kind,
        gpus=args["world_size"] // nodes,
        nodes=nodes,
        gpu_memory_gib=wanted.gpu_memory,
        document_length=wanted.document_length,
        **chosen,
    )
    steps = {
        "steps": total_steps(run) or run["steps"][-1]["step"],
        "steps_per_epoch": 1,
        "tokens_per_epoch": tokens_a_step(run),
    }
    if args.get("device") and not wanted.device:
        wanted = PlanArguments(**{**vars(wanted), "device": args["device"]})
    return config, plan, run_time(config, plan, steps, wanted)


def total_steps(run):
    """Optimiser steps that the run was to make; None in a record older than that fact."""
    return (run["args"].get("facts") or {}).get("total_steps")


def warm(run):
    """The steps whose speed counts."""
    return run["steps"][WARM_UP:] or run["steps"]


def tokens_a_step(run):
    return sum(record["tokens"] for record in warm(run)) / len(warm(run))


def comparison(run, plan=None, time=None):
    """{figure: [planned, measured, difference]} of a run, as text; what isn't known is blank."""
    world = run["args"]["world_size"]
    seconds = median(record["tokens"] / record["tokens_per_second"] for record in warm(run))
    peaks = [record["peak_gib"] for record in run["steps"] if record.get("peak_gib")]
    shares = [record["mfu"] for record in warm(run) if record.get("mfu")]
    figures = {
        "peak, GiB a GPU": (plan and plan["peak_bytes"] / GIB, max(peaks, default=None), ".1f"),
        "a step, seconds": (time and time["ms"] / 1e3, seconds, ".2f"),
        "tokens/s a GPU": (time and time["tokens_per_second"], tokens_a_step(run) / seconds / world, ",.0f"),
        "MFU": (time and time["mfu"], median(shares) if shares else None, ".1%"),
        "steps": (total_steps(run), run["steps"][-1]["step"], ",d"),
        "tokens": (None, sum(record["tokens"] for record in run["steps"]), ",d"),
        "hours": (
            time and time["hours"],
            sum(r["tokens"] / r["tokens_per_second"] for r in run["steps"]) / 3600,
            ".2f",
        ),
        "loss, last step": (None, run["steps"][-1]["loss"], ".4f"),
    }
    if run["validation"]:
        figures["validation loss, last"] = (None, run["validation"][-1]["validation_loss"], ".4f")
    return {name: _cells(*values) for name, values in figures.items()}


def _cells(planned, measured, form):
    difference = f"{measured / planned - 1:+.0%}" if planned and measured else ""
    return [*("" if value is None else format(value, form) for value in (planned, measured)), difference]


def profiled(run, time):
    """{component: [planned, measured, difference]} ms of a pack, from the run's profile.json; {} without one."""
    path = run["directory"] / "profile.json"
    if not path.is_file():
        return {}
    try:
        (*_, record) = json.loads(path.read_text())
        parts, hidden = record["components_ms"], {"links": "communication_not_hidden_ms", "gaps": "gaps_ms"}
        measured = {name: sum(parts.get(part, 0.0) for part in of) for name, of in MEASURED.items()}
        measured |= {name: record[key] for name, key in hidden.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: no profile; write it with benchmarks/bench_step.py --out {path}") from None
    packs = time["micro_batches"] if time else math.inf
    planned = {name: time["components"].get(name, 0.0) / packs if time else None for name in measured}
    return {name: _cells(planned[name], ms, ".1f") for name, ms in measured.items() if ms or planned[name]}


def compare(directories, plot=None, wanted=None, configs=None):
    """Print planned beside measured of every run, and draw them all into one PNG."""
    wanted, runs = wanted or PlanArguments(), [read_run(directory) for directory in directories]
    for run in runs:
        plan = time = None
        if run["args"].get("planned_gib") is not None:  # else it ran where nothing is planned: on a CPU, or in fp32
            try:
                _, plan, time = planned_run(run, wanted, configs)
            except ValueError as error:
                print(f"{run['name']}: not planned anew ({error})")
        print(f"{run['name']}, {adapter(run)}, {run['args']['world_size']} ranks\n")
        print(_text(comparison(run, plan, time)), end="\n\n")
        if parts := profiled(run, time):
            print(f"Of a pack, ms, on the GPU\n{_text(parts)}", end="\n\n")
    path = Path(plot) if plot else runs[0]["directory"] / "plan.png"
    draw(runs, path)
    print(f"wrote {path}")


def _text(rows):
    return text_table(pd.DataFrame.from_dict(rows, orient="index", columns=["planned", "measured", "difference"]))


def adapter(run):
    return "DoRA" if run["flags"].get("use_dora") else "LoRA"


def draw(runs, path):
    """PNG: loss, learning rate, tokens/s, memory and router load over steps; a colour a run, DoRA dashed. A panel that
    no run has values for is left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    drawn = [panel for panel in PANELS if any(_line(run, panel)[0] for run in runs)]
    labels = [plain(f"{run['name']}, {adapter(run)}", 60) for run in runs]
    width = 4.2 * len(drawn)
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(width, 4), squeeze=False, layout="constrained")
    label = width_of(figure, labels) + 0.8  # inches, with its line and a gap
    columns = max(1, min(3, int(width / label)))
    figure.set_size_inches(max(width, label + 0.2), 3.7 + 0.2 * math.ceil(len(labels) / columns))
    for axis, panel in zip(axes[0], drawn, strict=True):
        for number, run in enumerate(runs):
            x, y = _line(run, panel)
            style = style_of(run, number)
            axis.plot(x, y, linewidth=1.2, **style)
            if panel[0] == "loss" and run["validation"]:
                points = run["validation"]
                axis.plot(
                    [r["step"] for r in points], [r["validation_loss"] for r in points], "o", color=style["color"]
                )
        axis.set_title(panel[0] + (" (points: validation)" if panel[0] == "loss" and has_validation(runs) else ""))
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if panel[2]:
            axis.set_ylim(bottom=0)
    lines = [Line2D([], [], **style_of(run, number)) for number, run in enumerate(runs)]
    legend = figure.legend(lines, labels, loc="outside lower center", ncols=columns, fontsize=FONT)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names come from outside
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); name another file with --plot") from None
    finally:
        pyplot.close(figure)


def style_of(run, number):
    return dict(color=f"C{number % 10}", linestyle="--" if adapter(run) == "DoRA" else "-")


def has_validation(runs):
    return any(run["validation"] for run in runs)


def _line(run, panel):
    """(steps, values) of a panel: what the log has of it."""
    points = [(record["step"], record[panel[1]]) for record in run["steps"] if record.get(panel[1]) is not None]
    return [x for x, _ in points], [y for _, y in points]
