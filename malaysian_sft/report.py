"""A score report as text, markdown and CSV."""

import csv
import io
import json
import re
from dataclasses import dataclass

import numpy as np
from tabulate import tabulate

from malaysian_sft.extraction import extract
from malaysian_sft.generations import read_generations
from malaysian_sft.questions import strata
from malaysian_sft.statistics import FEWEST, MEASURES, keys_of, original_scores
from malaysian_sft.tables import aligned


def print_original(names, all_answers, questions):
    """Print the name and number of answers of each checkpoint, then its block, in the original's format."""
    for name, answers in zip(names, all_answers, strict=True):
        print(name, int((answers >= 0).sum()))
    print()
    groups, keys = strata(questions), keys_of(questions)
    for name, answers in zip(names, all_answers, strict=True):
        print(name)
        for category, (acc1, acc3) in original_scores(answers, questions, groups, keys).items():
            print(category, acc1, acc3)
        print()


def percent(item, digits=2):
    """An estimate as "76.62 [76.10, 77.14]"."""
    return f"{100 * item['value']:.{digits}f} [{100 * item['low']:.{digits}f}, {100 * item['high']:.{digits}f}]"


@dataclass
class Table:
    """A table of strings. Not a data frame: to import pandas takes longer than to score a checkpoint."""

    title: str
    kind: str  # what a row is: "checkpoint", "subject"
    columns: list
    rows: list  # [name, cells]

    @property
    def header(self):
        return [self.kind, *self.columns]

    def text(self):
        return aligned(self.rows, self.header)

    def markdown(self):
        rows = [[escape(name), *cells] for name, *cells in self.rows]  # names come from outside, cells are numbers
        return tabulate(rows, [escape(name) for name in self.header], tablefmt="github", disable_numparse=True)


def tables(report):
    """The report as [`Table`], a checkpoint or a category a row."""
    rows = report["checkpoints"]
    facts = f"{report['questions']:,} questions, 95 % intervals over questions, in percent"
    names = [row["name"] for row in rows]

    def of_checkpoints(title, columns, cells, rows=rows):
        return Table(title, "checkpoint", columns, [[row["name"], *cells(row)] for row in rows])

    def measures(part):
        return lambda row: [str(row["samples"]), *(percent(part(row)[name]) for name in MEASURES)]

    columns, found = ["samples", *MEASURES], leaderboard_tables(report)
    for kind, words in (("micro", "every question weighs the same"), ("macro", "every category weighs the same")):
        found.append(of_checkpoints(f"{kind}: {words} ({facts})", columns, measures(lambda row, kind=kind: row[kind])))
    boxed = [row for row in rows if "strict" in row]
    if boxed:
        title = f"micro by strict reading: only the last box counts, whatever the response says ({facts})"
        found.append(of_checkpoints(title, columns, measures(lambda row: row["strict"]["micro"]), boxed))
    for kind, title in (
        ("category", "average of the samples by category"),
        ("subject", "average by subject"),
        ("level", "average by level"),
    ):
        values = list(rows[0][kind]) if rows else []
        if len(values) < 2:
            continue
        if kind == "category":
            found.append(
                of_checkpoints(
                    title, values, lambda row: [percent(row["category"][v]["average"]) for v in row["category"]]
                )
            )
        else:  # many values: one line each, a column per checkpoint
            cells = [
                [
                    value or "-",
                    str(rows[0][kind][value]["questions"]),
                    *(percent(row[kind][value]["average"], 1) for row in rows),
                ]
                for value in values
            ]
            found.append(Table(title, kind, ["questions", *names], cells))
    if "contamination" in report:
        found.append(contamination_table(report["contamination"], report["questions"]))
    outcomes = list(rows[0]["answers"]) if rows else []
    found.append(of_checkpoints("responses", outcomes, lambda row: [f"{row['answers'][name]:,}" for name in outcomes]))
    return found


def leaderboard_tables(report):
    """A table a protocol, best first; none if no leaderboard was asked for."""
    entries = {entry["name"]: entry for entry in report["checkpoints"]}
    columns = ["rank", "samples", "average", "acc@1", "average by category", "average by strict reading", "answered"]
    found = []
    for part in report.get("leaderboard", []):
        rows = []
        for row in part["rows"]:
            entry = entries[row["name"]]
            strict = f"{100 * entry['strict']['micro']['average']['value']:.2f}" if "strict" in entry else "-"
            answered = f"{100 * entry['answers']['answered'] / sum(entry['answers'].values()):.2f}"
            micro, macro = entry["micro"], entry["macro"]["average"]["value"]
            scores = [percent(micro["average"]), percent(micro["acc@1"]), f"{100 * macro:.2f}", strict, answered]
            rows.append([entry["name"], str(row["rank"] or "unfinished"), str(entry["samples"]), *scores])
        title = (
            f"leaderboard, {part['protocol'].replace('_', '-')} protocol, {report['questions']:,} questions, in percent"
            " (rank: one more than the number of checkpoints that are better beyond chance)"
        )
        found.append(Table(title, "checkpoint", columns, rows))
    return found


def contamination_table(part, questions):
    """Averages with and without the questions that the training data has."""

    def cell(row, name):
        if row[name] is None:
            return "-"
        low, high = row["intervals"][name]
        return percent({"value": row[name], "low": low, "high": high})

    title = (
        f"contamination: {part['count']:,} of {questions:,} questions overlap {part['source']}"
        f" ({len(part['with_options']):,} with all their options); average of the samples"
    )
    cells = [[row["name"], *(cell(row, name) for name in ("all", "without", "only"))] for row in part["checkpoints"]]
    return Table(title, "checkpoint", ["all questions", "without them", "on them"], cells)


def notes(report, rows):
    """What a reader must know beside the numbers."""
    lines = ["chance: " + ", ".join(f"{100 * value:.2f} % for {name}" for name, value in report["chance"].items())]
    words = {"assistant": "begins the answer", "user": "ends the question"}
    prefixes = {
        row.name: f"; 'Jawapan:' {words[row.args['answer_prefix']]}"
        for row in rows
        if row.args.get("answer_prefix") in words
    }
    if report["pooled"]:
        pooled = ", ".join(name or "-" for name in report["pooled"])
        lines.append(f"categories of fewer than {FEWEST} questions are pooled for their spread: {pooled}")
    for row in report["checkpoints"]:
        if row["answers"]["missing"]:
            lines.append(
                f"{row['name']}: NOT FINISHED, {row['answers']['missing']:,} of {sum(row['answers'].values()):,}"
                " samples are missing and count as wrong (not in the comparisons, which use what both answered);"
                " malaymmlu.py makes them, or --limit scores a beginning"
            )
        if row["protocol"] == "first_token":
            lines.append(
                f"{row['name']}: first-token protocol, whose official score weighs every question:"
                f" {percent(row['micro']['acc@1'])}" + prefixes.get(row["name"], "")
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
    for table in tables(report):
        lines += ["", table.title, table.text()]
    if report["comparisons"]:
        lines += ["", "paired comparisons (average of the samples; question by question, by sign-flip permutation)"]
        lines += [item["verdict"] for item in report["comparisons"]]
    return "\n".join(lines)


def as_markdown(report, rows):
    """The same tables as markdown."""
    lines = []
    for table in tables(report):
        lines += ["", f"**{escape(table.title)}**", "", table.markdown()]
    lines += ["", *(f"- {escape(line)}" for line in notes(report, rows))]
    lines += [f"- {escape(item['verdict'])}" for item in report["comparisons"]]
    return "\n".join(lines).lstrip() + "\n"


def escape(text):
    """Text from outside (names of directories, categories, arguments) as markdown shows it: nothing of it is markup."""
    return re.sub(r"([\\|`*_<>\[\]#])", r"\\\1", str(text).replace("\n", " "))


def as_csv(report):
    """Long format: checkpoint, kind, name, questions, measure, value, low, high."""
    found = []
    for row in report["checkpoints"]:
        totals = [(kind, row[kind]) for kind in ("micro", "macro")]
        totals += [(f"strict {kind}", row["strict"][kind]) for kind in ("micro", "macro") if "strict" in row]
        for kind, items in totals:
            found += [(row["name"], kind, "", report["questions"], name, item) for name, item in items.items()]
        for kind in ("category", "subject", "level"):
            for value, items in row[kind].items():
                measures = {name: item for name, item in items.items() if name != "questions"}
                found += [(row["name"], kind, value, items["questions"], name, item) for name, item in measures.items()]
    for row in report["contamination"]["checkpoints"] if "contamination" in report else []:
        for name, ends in row["intervals"].items():
            if ends:
                item = {"value": row[name], "low": ends[0], "high": ends[1]}
                found.append((row["name"], "contamination", name, row["counts"][name], "average", item))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["checkpoint", "kind", "name", "questions", "measure", "value", "low", "high"])
    writer.writerows((*facts, item["value"], item["low"], item["high"]) for *facts, item in found)
    return file.getvalue()


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
