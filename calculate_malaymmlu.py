"""Score MalayMMLU generations: the original project's block, then intervals, comparisons, tables, a plot and a report.

    python3 calculate_malaymmlu.py --pattern "malaymmlu-ds3-qwen3-32b-lora-256-checkpoint-*"
    python3 calculate_malaymmlu.py --pattern "malaymmlu-*" --questions data/questions.json --html report.html

Reads `<directory>/generations.jsonl` (and `args.json`, if there is one) of every directory matched, and the question
file; needs no GPU and no vLLM. Prints to stdout; `--json`, `--csv`, `--markdown`, `--plot` and `--html` name files to
write as well.

Measures, per question and then averaged: acc@1 (sample 0 is right), average (share of the samples that are right),
majority (of the samples with an answer; a tie counts as the chance of picking the key among the tied letters), any (one
of the samples is right; its chance level is high, so it is never the headline). Micro weighs every question equally,
macro every category. A sample without an answer is wrong. Intervals resample questions, never samples, because the
samples of a question are not independent; they are stratified by category.
"""

import gc
import json
import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from malaysian_sft.contamination import contamination_report
from malaysian_sft.flags import OneLineParser, check_values, refuse_unknown
from malaysian_sft.generations import find_directories, read_args, read_both
from malaysian_sft.plots import draw
from malaysian_sft.questions import benchmark_questions
from malaysian_sft.report import as_csv, as_markdown, as_text, audit, print_original
from malaysian_sft.report_page import MEGABYTES, write_html
from malaysian_sft.statistics import Row, score


@dataclass
class Arguments:
    pattern: str = field(metadata={"help": "directories to score: comma-separated globs"})
    questions: str | None = field(default=None, metadata={"help": "question file; default: MalayMMLU from the hub"})
    questions_revision: str | None = field(
        default=None,
        metadata={"help": "the hub's revision of the question file; default: the one that was generated from"},
    )
    limit: int | None = field(
        default=None, metadata={"help": "score the first N questions only, as malaymmlu.py --limit asks them"}
    )
    compare: str = field(
        default="all",
        metadata={
            "help": "paired comparisons: all (of one protocol), none, or NAME:NAME,NAME:NAME; a name may be a glob"
        },
    )
    leaderboard: bool = field(
        default=False,
        metadata={
            "help": "rank all directories that share questions and protocol; those with other questions are left out"
        },
    )
    resamples: int = field(default=2000, metadata={"help": "bootstrap resamples"})
    seed: int = field(default=0, metadata={"help": "seed of the bootstrap and of --audit"})
    contamination: str | None = field(
        default=None, metadata={"help": "training data to check the questions against: files or directories"}
    )
    audit: int = field(default=0, metadata={"help": "print N random extractions"})
    json: str | None = field(default=None, metadata={"help": "write everything as JSON"})
    csv: str | None = field(default=None, metadata={"help": "write the scores as CSV, one value a line"})
    markdown: str | None = field(default=None, metadata={"help": "write the tables as markdown"})
    plot: str | None = field(default=None, metadata={"help": "write a PNG"})
    html: str | None = field(default=None, metadata={"help": "write a self-contained report"})
    html_megabytes: float = field(
        default=MEGABYTES, metadata={"help": "limit of that file; beyond it, fewer responses"}
    )


def parse_arguments():
    """The flags of `Arguments`. Not by transformers' HfArgumentParser: to import that takes longer than to score a
    checkpoint."""
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for one in fields(Arguments):
        required = one.default is MISSING
        kind = {int: int, int | None: int, float: float}.get(one.type, str)
        note = "" if required or one.default is None else f" (default: {one.default})"
        text = (one.metadata["help"] + note).replace("%", "%%")
        if one.type is bool:
            parser.add_argument(f"--{one.name}", action="store_true", help=one.metadata["help"])
            continue
        parser.add_argument(f"--{one.name}", type=kind, required=required, default=one.default, help=text)
    refuse_unknown(parser._option_string_actions, sys.argv[1:])
    return Arguments(**vars(parser.parse_args()))


def main():
    gc.disable()  # nothing that is read makes a cycle, and to look for them takes a twentieth of the time
    try:
        args = parse_arguments()
        check_values(args)
        found = [(name, path, read_args(path)) for name, path in find_directories(args.pattern)]
        # without a revision, the one that the first of them was generated from
        questions, facts = benchmark_questions(
            args.questions, args.questions_revision or found[0][2].get("questions_revision")
        )
        found = of_these_questions(found, facts["sha256"], args)
        questions = questions[: args.limit]
        rows = [read_row(name, path, made, questions, bool(args.limit)) for name, path, made in found]
        print_original([row.name for row in rows], [row.answers for row in rows], questions)
        report = score(rows, questions, args.resamples, args.seed, args.compare, args.leaderboard)
        if args.contamination is not None:
            report["contamination"] = contamination_report(rows, questions, args.contamination)
        print(as_text(report, rows))
        write(args, report, rows, questions)
        if args.audit:
            audit(rows, questions, args.audit, args.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        gc.enable()


def of_these_questions(found, sha256, args):
    """The directories to score. One that was generated from other questions is an error; with --questions it is scored
    and named, with --leaderboard left out and named."""
    kept = []
    for name, path, made in found:
        if made.get("questions_sha256") in (None, sha256):
            kept.append((name, path, made))
            continue
        what = f"{name} was generated from questions with sha256 {made['questions_sha256']}, these have {sha256}"
        if args.leaderboard:
            what += "; it is left out"
        elif args.questions:
            kept.append((name, path, made))
        else:
            raise ValueError(f"{what}; score it apart, or against one file with --questions FILE")
        print(f"note: {what}", file=sys.stderr)
    if not kept:
        raise ValueError("no directory was generated from these questions; give their file with --questions")
    return kept


def read_row(name, path, made, questions, limited):
    """A checkpoint's answers, read both ways where boxes were asked for."""
    answers, strict = read_both(path, questions, limited, made.get("samples", 1))
    return Row(name, path, made, answers, strict if made.get("protocol", "reasoning") == "reasoning" else None)


def write(args, report, rows, questions):
    """Write the files asked for."""
    for name, text in (
        ("json", lambda: json.dumps(report, indent=1, ensure_ascii=False) + "\n"),
        ("csv", lambda: as_csv(report)),
        ("markdown", lambda: as_markdown(report, rows)),
    ):
        path = getattr(args, name)
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text(), encoding="utf-8")
    if args.plot:
        Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
        draw(report, rows, args.plot)
    if args.html:
        Path(args.html).parent.mkdir(parents=True, exist_ok=True)
        write_html(report, rows, questions, args.html, args.html_megabytes)


if __name__ == "__main__":
    main()
