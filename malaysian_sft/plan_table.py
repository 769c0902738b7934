"""One table over all launchers, and what is written from it: README's launcher table and the launchers' headers."""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from malaysian_sft.account import GIB
from malaysian_sft.base_model import load_config
from malaysian_sft.plan_page import FREE, PlanArguments, check_launcher, plan_engine, run_time, schedule
from malaysian_sft.planning import options, trainer_flags
from malaysian_sft.tables import text_table

# (nodes, GPUs of a node, GiB of a GPU): what the second table compares, and where README takes the first that fits.
HARDWARE = ((1, 8, 80), (1, 8, 141), (2, 8, 80))
UNMEASURED_LINE = re.compile(r"^# Planned for .* Measured: not yet\.$", re.MULTILINE)
BEGIN, END = "<!-- launchers: python3 plan.py --all --write -->", "<!-- end of launchers -->"


def launched_run(launcher):
    """{"model", "revision", "epochs", "arguments" (planning's)} of a launcher, as its trainer reads its flags."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "run.json")
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the launcher's python3 is this one
        environment = {**os.environ, "PATH": path, "PLAN_RECORD": str(record)}
        command = ["bash", str(launcher), "--dry_run", "True"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not record.is_file():
            what = done.stderr.strip().splitlines()[-1:] or ["it plans nothing with --dry_run"]
            raise ValueError(f"{launcher}: {what[0].removeprefix('error: ')}")
        return json.loads(record.read_text())


def told(what, launchers, results):
    """The list of `results`, one a launcher; a line on stderr as each comes, because all of them take minutes."""
    found = []
    for count, (launcher, result) in enumerate(zip(launchers, results, strict=True), 1):
        found.append(result)
        print(f"{what} {count} of {len(launchers)}: {Path(launcher).name}", file=sys.stderr, flush=True)
    return found


def launched_runs(launchers):
    """`launched_run` of each, two at a time: a trainer's imports take seconds."""
    for launcher in launchers:
        check_launcher(launcher)
    with ThreadPoolExecutor(2) as pool:
        return told("read", launchers, pool.map(launched_run, launchers))


def read_config(model, revision, configs):
    """The model's config: <configs>/<name>.json where there is such a directory, else from the model itself."""
    if configs is None:
        return load_config(model, revision)
    path = Path(configs, f"{model.rpartition('/')[2]}.json")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --configs DIRECTORY expects one for each launcher's model")
    return load_config(str(path), None)


def plan_launcher(launcher, run, hardware, wanted, configs=None):
    """What a launcher, whose run `launched_run` gave, needs and reaches on each (nodes, gpus, gib) of `hardware`.

    Returns a list of {"launcher", "model", "epochs", "hardware", "plan", "flags" (what the launch lacks to fit),
    "time", "engine"}. `plan` is the launch's, or, where that doesn't fit, the best one.
    """
    model, epochs = run["model"], run["epochs"]
    config = read_config(model, run["revision"], configs)
    fixed = {name: value for name, value in run["arguments"].items() if value is not None}
    found = []
    for nodes, gpus, memory in hardware:
        machine = dict(nodes=nodes, gpus=gpus, gpu_memory_gib=memory, reserve_gib=wanted.reserve)
        machine["document_length"] = wanted.document_length
        plan, flags = options(config, **fixed | machine)[0], ""
        if not plan["fits"]:
            free = {name: value for name, value in fixed.items() if name not in FREE}
            plan = options(config, **free | machine)[0]
            flags = trainer_flags(plan) if plan["fits"] else ""
        steps = schedule(wanted.dataset_tokens, plan["max_seq_length"], plan["global_batch_size"], epochs)
        found.append(
            {
                "launcher": Path(launcher).name,
                "model": model,
                "epochs": epochs,
                "hardware": (nodes, gpus, memory),
                "plan": plan,
                "flags": flags,
                "time": run_time(config, plan, steps, wanted) if plan["fits"] else None,
                "engine": plan_engine(config, wanted, memory),
            }
        )
    return found


def machine_name(hardware):
    """ "8 x 80 GB", "2 nodes of 8 x 80 GB"."""
    nodes, gpus, memory = hardware
    return f"{f'{nodes} nodes of ' if nodes > 1 else ''}{gpus} x {memory:g} GB"


def hours(time):
    """A range of hours in words; blank for none."""
    if time is None:
        return ""
    digits = 0 if time["hours_low"] >= 10 else 1
    return f"{time['hours_low']:.{digits}f} to {time['hours_high']:.{digits}f}"


def speed(time):
    """Planned tokens/s a GPU to two digits, which is what a range of a tenth and more leaves; blank for none."""
    return f"{float(format(time['tokens_per_second'], '.2g')):,.0f}" if time else ""


def table(rows):
    """What each launcher needs and reaches on its hardware, as text; a row of `plan_launcher` a line."""
    lines = {}
    for row in rows:
        plan, time, engine = row["plan"], row["time"], row["engine"]
        host, disk = (sum(plan[key].values()) / GIB for key in ("host_bytes", "disk_bytes"))
        cache = f"{engine['cache_tokens']:,}" if engine["fits"] else "none"
        lines[row["launcher"].removesuffix(".sh")] = {
            "fits": "yes" if plan["fits"] else "no",
            "activations": f"{plan['activations']}, {plan['memory_mode']}"
            if plan["kind"] == "moe"
            else plan["activations"],
            "GiB a GPU": f"{plan['peak_bytes'] / GIB:.0f}",
            "host GiB": f"{host:.0f}",
            "disk GiB": f"{disk:.0f}",
            "tokens/s a GPU": speed(time),
            "hours an epoch": f"{time['hours_an_epoch']:.1f}" if time else "",
            f"{row['epochs']:g} epochs": hours(time),
            "engine's GPUs": str(engine["gpu_partition"]),
            "KV cache, tokens": cache,
        }
    return text_table(pd.DataFrame.from_dict(lines, orient="index").fillna(""))


def comparison(plans):
    """What a change of hardware does: launchers in lines, GiB a GPU and hours in all on each hardware in columns."""
    lines = {}
    for rows in plans:
        lines[rows[0]["launcher"].removesuffix(".sh")] = {
            machine_name(row["hardware"]): f"{row['plan']['peak_bytes'] / GIB:.0f} GiB, {hours(row['time']) or '?'} h"
            if row["plan"]["fits"]
            else "does not fit"
            for row in rows
        }
    return text_table(pd.DataFrame.from_dict(lines, orient="index"))


def print_all(launchers, wanted, configs=None, write=False):
    """Print the tables of all launchers; with `write` also write README's and the launchers' headers."""
    if write and wanted != PlanArguments():
        raise ValueError("--write writes what the defaults plan: give it no flag but --configs")
    asked = (wanted.nodes or 1, wanted.gpus or 8, wanted.gpu_memory)
    hardware = list(dict.fromkeys([asked, *HARDWARE]))
    runs = launched_runs(launchers)
    each = (plan_launcher(*launched, hardware, wanted, configs) for launched in zip(launchers, runs, strict=True))
    plans = told("planned", launchers, each)
    print(f"On {machine_name(asked)}; attention by {wanted.attention}; hours are planned\n")
    print(table([rows[0] for rows in plans]), end="\n\n")
    for row in (rows[0] for rows in plans):
        if row["flags"]:
            print(f"{row['launcher']} fits with {row['flags']}")
    sources = dict.fromkeys(row["time"]["source"] for rows in plans for row in rows if row["time"])
    print(f"Answers/s: not measured. Rates: {'; '.join(sources) or 'none'}\n")
    print("Other hardware: GiB a GPU, hours in all\n")
    print(comparison(plans))
    if write:
        root = Path(launchers[0]).parent
        for path, text in written(plans, root).items():
            path.write_text(text)
            print(f"wrote {path}")


# ----------------------------------------------------------------------------------------------------------------------
# What is written
# ----------------------------------------------------------------------------------------------------------------------


def first_that_fits(rows):
    """The plan of the first hardware that holds the launch, as it is if it can be."""
    as_launched = [row for row in rows if row["plan"]["fits"] and not row["flags"]]
    return (as_launched or [row for row in rows if row["plan"]["fits"]] or rows)[0]


COLUMNS = ("launcher", "model", "GPUs", "activations", "planned GiB a GPU", "planned hours", "planned tokens/s a GPU")
COLUMNS += ("measured hours",)


def readme_row(row):
    """A launcher's line of README's table; what was measured of a whole run is blank until there is one."""
    plan, time = row["plan"], row["time"]
    kept = f"{plan['activations']}, {plan['memory_mode']}" if plan["kind"] == "moe" else plan["activations"]
    model = f"{row['model']}{', DoRA' * plan['use_dora']}"
    cells = [f"`{row['launcher']}`", model, machine_name(row["hardware"]), kept]
    cells += [f"{plan['peak_bytes'] / GIB:.0f}", hours(time), speed(time), ""]
    return f"| {' | '.join(cells)} |"


def readme_table(plans):
    """README's launcher table in Markdown, between its marks."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([BEGIN, *lines, *(readme_row(first_that_fits(rows)) for rows in plans), END])


def header(row):
    """The line of a launcher's header that says what it needs and reaches."""
    plan, time = row["plan"], row["time"]
    lasts = f", {hours(time)} hours for {row['epochs']:g} epochs" if time else ""
    return (
        f"# Planned for {machine_name(row['hardware'])}: {plan['peak_bytes'] / GIB:.0f} GiB a GPU{lasts}. Measured: not"
        " yet."
    )


def written(plans, root):
    """{path: text} of README.md and the launchers under `root`, with the figures of `plans` in them. A launcher whose
    header has measured figures is left as it is. Raises ValueError, before anything is written, where a time is
    missing."""
    readme = Path(root, "README.md")
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme}: no table between {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    found = {readme: f"{before}{readme_table(plans)}{after}"}
    for rows in plans:
        path, row = Path(root, rows[0]["launcher"]), first_that_fits(rows)
        if row["time"] is None:
            why = "has no rates in --results" if row["plan"]["fits"] else "does not hold it"
            raise ValueError(
                f"{path}: no hours can be planned, {machine_name(row['hardware'])} {why}; --write wrote nothing"
            )
        found[path] = UNMEASURED_LINE.sub(header(row), path.read_text())
    return found
