"""A score report as text, markdown, CSV and one self-contained HTML page (report.html is its template)."""

import base64
import json
import tempfile
from pathlib import Path

import numpy as np

from malaysian_sft.extraction import extract
from malaysian_sft.generations import read_generations
from malaysian_sft.plots import draw
from malaysian_sft.statistics import MEASURES, original_scores


def print_original(names, all_answers, questions):
    """Print the name and number of answers of each checkpoint, then its block, in the original's format."""
    for name, answers in zip(names, all_answers, strict=True):
        print(name, int((answers >= 0).sum()))
    print()
    for name, answers in zip(names, all_answers, strict=True):
        print(name)
        for category, (acc1, acc3) in original_scores(answers, questions).items():
            print(category, acc1, acc3)
        print()


def percent(item, digits=2):
    """An estimate as "76.62 [76.10, 77.14]"."""
    return f"{100 * item['value']:.{digits}f} [{100 * item['low']:.{digits}f}, {100 * item['high']:.{digits}f}]"


def tables(report):
    """The report as [(title, header, rows of strings)]."""
    rows = report["checkpoints"]
    facts = f"{report['questions']:,} questions, 95 % intervals over questions, in percent"
    found = []
    for kind, words in (("micro", "every question weighs the same"), ("macro", "every category weighs the same")):
        body = [[row["name"], str(row["samples"]), *(percent(row[kind][name]) for name in MEASURES)] for row in rows]
        found.append(
            (f"{kind}: {words} ({facts})", ["checkpoint", "samples", "acc@1", "average", "majority", "any"], body)
        )
    for kind, title in (
        ("category", "average of the samples by category"),
        ("subject", "average by subject"),
        ("level", "average by level"),
    ):
        names = list(rows[0][kind]) if rows else []
        if len(names) < 2:
            continue
        if kind == "category":
            body = [[row["name"], *(percent(row[kind][name]["average"]) for name in names)] for row in rows]
            found.append((title, ["checkpoint", *names], body))
        else:  # many values: one line each, a column per checkpoint
            body = [
                [
                    name or "-",
                    str(rows[0][kind][name]["questions"]),
                    *(percent(row[kind][name]["average"], 1) for row in rows),
                ]
                for name in names
            ]
            found.append((title, [kind, "questions", *(row["name"] for row in rows)], body))
    outcomes = list(rows[0]["answers"]) if rows else []
    found.append(
        (
            "responses",
            ["checkpoint", *outcomes],
            [[row["name"], *(f"{row['answers'][name]:,}" for name in outcomes)] for row in rows],
        )
    )
    return found


def notes(report, rows):
    """What a reader must know beside the numbers."""
    lines = ["chance: " + ", ".join(f"{100 * value:.2f} % for {name}" for name, value in report["chance"].items())]
    for row in report["checkpoints"]:
        if row["answers"]["missing"]:
            lines.append(
                f"{row['name']}: NOT FINISHED, {row['answers']['missing']:,} of {sum(row['answers'].values()):,}"
                " samples are missing and count as wrong; malaymmlu.py makes them, or --limit scores a beginning"
            )
        if row["protocol"] == "first_token":
            lines.append(
                f"{row['name']}: first-token protocol, whose official score weighs every question:"
                f" {percent(row['micro']['acc@1'])}"
            )
        if row["retries"]:
            lines.append(
                f"{row['name']}: unreadable answers were resampled up to {row['retries']} times, so its samples are not"
                " plain draws"
            )
    for name in ("sampling", "system_prompt", "seed", "questions_sha256", "retries", "chat_template_kwargs"):
        values = {json.dumps(row.args.get(name), sort_keys=True) for row in rows if row.args}
        if len(values) > 1:
            lines.append(f"the checkpoints were generated with different {name}: {'; '.join(sorted(values))}")
    return lines


def as_text(report, rows):
    """Everything after the original's block, as aligned text."""
    lines = [f"note: {line}" for line in notes(report, rows)]
    for title, header, body in tables(report):
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        lines += ["", title]
        for line in [header, *body]:
            lines.append(
                "  ".join(
                    cell.ljust(width) if i == 0 else cell.rjust(width)
                    for i, (cell, width) in enumerate(zip(line, widths, strict=True))
                )
            )
    if report["comparisons"]:
        lines += ["", "paired comparisons (average of the samples; question by question)"]
        lines += [item["verdict"] for item in report["comparisons"]]
    if "contamination" in report:
        part = report["contamination"]
        lines += ["", f"contamination: {part['count']} of {report['questions']} questions overlap {part['source']}"]
        lines += [
            f"{row['name']}: average {show(row['all'])} on all, {show(row['without'])} without them,"
            f" {show(row['only'])} on them"
            for row in part["checkpoints"]
        ]
    return "\n".join(lines)


def show(value):
    return "-" if value is None else f"{100 * value:.2f}"


def as_markdown(report, rows):
    """The same tables as markdown."""
    lines = []
    for title, header, body in tables(report):
        lines += ["", f"**{title}**", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(line) + " |" for line in body]
    lines += (
        [""]
        + [f"- {line}" for line in notes(report, rows)]
        + [f"- {item['verdict']}" for item in report["comparisons"]]
    )
    return "\n".join(lines).lstrip() + "\n"


def as_csv(report):
    """Long format: checkpoint, kind, name, questions, measure, value, low, high."""
    lines = ["checkpoint,kind,name,questions,measure,value,low,high"]

    def quoted(text):
        return '"' + str(text).replace('"', '""') + '"'

    for row in report["checkpoints"]:
        for kind in ("micro", "macro"):
            for name, item in row[kind].items():
                lines.append(
                    f"{quoted(row['name'])},{kind},,{report['questions']},{name},{item['value']},{item['low']},{item['high']}"
                )
        for kind in ("category", "subject", "level"):
            for value, items in row[kind].items():
                for name, item in items.items():
                    if name != "questions":
                        numbers = f"{items['questions']},{name},{item['value']},{item['low']},{item['high']}"
                        lines.append(f"{quoted(row['name'])},{kind},{quoted(value)},{numbers}")
    return "\n".join(lines) + "\n"


PAGE = Path(__file__).with_name("report.html")  # the template; __DATA__ stands for the JSON


def write_html(report, rows, questions, path, budget=20_000_000):
    """One self-contained page: tables that sort, the plot, and every question with every checkpoint's letters.

    Responses are included (their last 1,500 characters) while all of them together stay under `budget` characters;
    otherwise only letters.
    """
    with tempfile.TemporaryDirectory() as folder:
        draw(report, rows, Path(folder) / "plot.png")
        plot = base64.b64encode((Path(folder) / "plot.png").read_bytes()).decode()
    texts = tails(rows, questions, budget)
    listed = []
    for i, question in enumerate(questions):
        item = {name: question[name] for name in ("id", "prompt", "key", "category", "subject")}
        item["a"] = [row.answers[i].tolist() for row in rows]
        if texts:
            item["t"] = [
                [texts[r].get((i, sample), "") for sample in range(row.answers.shape[1])] for r, row in enumerate(rows)
            ]
        listed.append(item)
    data = {
        "notes": (
            [f"{report['questions']:,} questions", *notes(report, rows)]
            + ([] if texts else ["responses are left out: too many for one page"])
        ),
        "plot": plot,
        "tables": tables(report),
        "comparisons": [item["verdict"] for item in report["comparisons"]],
        "names": [row.name.removeprefix("malaymmlu-") for row in rows],
        "questions": listed,
    }
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text can end the script element early
    Path(path).write_text(PAGE.read_text(encoding="utf-8").replace("__DATA__", text), encoding="utf-8")


def tails(rows, questions, budget):
    """The ends of all responses, [{(index, sample): text}] per row, or None if they are too much for a page."""
    if sum((row.path / "generations.jsonl").stat().st_size for row in rows) > 4 * budget:
        return None
    found = [
        {
            (r["index"], r["sample"]): r["text"][-1500:]
            for r in read_generations(row.path / "generations.jsonl")
            if r["index"] < len(questions)
        }
        for row in rows
    ]
    return found if sum(len(text) for row in found for text in row.values()) <= budget else None


def audit(rows, questions, count, seed=0):
    """Print `count` random extractions for a human eye: the end of the response and what was read out of it."""
    generator = np.random.default_rng(seed)
    records = [
        (row, record)
        for row in rows
        for record in read_generations(row.path / "generations.jsonl")
        if record["index"] < len(questions)
    ]
    for position in generator.choice(len(records), min(count, len(records)), replace=False):
        row, record = records[position]
        question = questions[record["index"]]
        outcome, letter = extract(record["text"], question, record.get("finish_reason"), record.get("thinking", False))
        print(f"\n---- {row.name}, question {record['index']} (id {question['id']}), sample {record['sample']}")
        print("\n".join(f"{name}. {text}" for name, text in question["options"].items()))
        print("..." + record["text"][-400:] if len(record["text"]) > 400 else record["text"])
        print(f"---- read as: {letter or outcome}   key: {question['key']}   finish: {record.get('finish_reason')}")
