"""Scoring speed: calculate_malaymmlu.py on 9 checkpoints x 24,213 questions x 3 samples of made-up responses, on one
core.

    python3 benchmarks/bench_score.py [--checkpoints 9] [--characters 900] [--repeats 3] [--distinct]

Writes responses of every kind (a box, a statement, an option's text, none, several, cut off) whose letters are known
because they were chosen first, and checks the command's answers, first-sample and average scores of every checkpoint
against that count, and the committed example against its hand count. Then times the command from start to end, reading
and imports included, pinned to one core; the second line adds the plot and the report. The floor is what nothing that
scores them can go below: the imports of numpy and scipy, and every line read and decoded. Its sentences recur, as a
model's do, though more often; `--distinct` makes each one different. Modules are compiled beforehand, as they are
after the first run of an installation. Prints a table and one JSON line, and appends the record to results/score.json.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from malaysian_sft.questions import HUB_COUNTS
from malaysian_sft.run import git_commit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


SENTENCES = (
    "Mari kita fikirkan langkah demi langkah. ",
    "Soalan ini meminta kita mengenal pasti ciri yang paling tepat. ",
    "Pertama, kita perlu memahami maksud setiap pilihan yang diberikan. ",
    "Pilihan A kurang sesuai kerana tidak menepati keterangan dalam petikan. ",
    "Seterusnya, kita bandingkan dengan fakta yang dipelajari di sekolah. ",
    "Oleh itu, kita boleh menyingkirkan pilihan yang bercanggah dengan fakta itu.\n",
)
# how a response ends, its share, and whether a letter can be read out of it
ENDINGS = (
    ("Jadi, jawapannya ialah $\\boxed{{{letter}}}$.", 0.80, True),
    ("\\boxed{{\\text{{{letter}. {text}}}}}", 0.08, True),
    ("\nJawapan: {letter}", 0.06, True),
    ("\n{text}", 0.02, True),
    ("Saya tidak pasti tentang hal ini.", 0.02, False),
    ("\\boxed{{A}} atau \\boxed{{A, B}}", 0.01, False),
    ("Maka kita perlu melihat semula", 0.01, False),
)


def make_questions(seed):
    """Questions with MalayMMLU's numbers by category, 2 to 5 options and 22 subjects."""
    generator, rows = random.Random(seed), []
    for category, count in HUB_COUNTS.items():
        for _ in range(count):
            n = generator.choices((2, 3, 4, 5), (5, 40, 50, 5))[0]
            options = [f"{'ABCDE'[j]}. nilai {len(rows)}-{j}" for j in range(n)]
            row = {
                "id": 10_000_000 + len(rows),
                "prompt": f"Soalan {len(rows)}?\n" + "\n".join(options),
                "options": options,
                "num_options": n,
            }
            subject = f"Subjek {len(rows) % 22}"
            rows.append(
                row
                | {
                    "key": "ABCDE"[generator.randrange(n)],
                    "category": category,
                    "subject": subject,
                    "level": "Secondary",
                }
            )
    return rows


def make_responses(path, questions, characters, skill, seed, distinct=False):
    """Write generations.jsonl -> (answers, first samples right, samples right), counted while the letters are
    chosen."""
    generator = random.Random(seed)
    shares = [share for _, share, _ in ENDINGS]
    answers = first = right = 0
    path.parent.mkdir(parents=True)
    with open(path, "w", encoding="utf-8") as file:
        for index, row in enumerate(questions):
            for sample in range(3):
                letter = row["key"] if generator.random() < skill else generator.choice("ABCDE"[: row["num_options"]])
                ending, _, readable = generator.choices(ENDINGS, shares)[0]
                said = generator.choices(SENTENCES, k=max(1, round(generator.expovariate(1) * characters / 60)))
                if distinct:
                    said = [f"{one[:9]}{generator.randrange(10**6)} {one[9:]}" for one in said]
                text = "".join(said)
                text += ending.format(letter=letter, text=row["options"]["ABCDE".index(letter)][3:])
                reason = "length" if ending.startswith("Maka") else "stop"
                record = {"index": index, "id": row["id"], "sample": sample, "text": text, "finish_reason": reason}
                file.write(json.dumps(record | {"prompt_tokens": 150, "completion_tokens": len(text) // 4}) + "\n")
                answers += readable
                first += readable and sample == 0 and letter == row["key"]
                right += readable and letter == row["key"]
    return answers, first, right


def score(cwd, *flags):
    """Run the command; returns ((seconds, seconds of CPU), stdout). Raises SystemExit if it fails."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(
        [sys.executable, str(ROOT / "calculate_malaymmlu.py"), *flags], cwd=cwd, capture_output=True, text=True
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if shown.returncode:
        sys.exit(f"error: calculate_malaymmlu.py failed: {shown.stderr}")
    return (seconds, cpu), shown.stdout


FLOOR = """
import numpy, scipy.special, sys
from malaysian_sft.generations import read_records
for path in sys.argv[1:]:
    for record in read_records(path):
        pass
"""


def floor(paths):
    """Seconds to import numpy and scipy and to read and decode every line, scoring nothing."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", FLOOR, *map(str, paths)], cwd=ROOT, check=True)
    return time.perf_counter() - began


def check(report, expected, questions):
    """Raise SystemExit unless the report's counts are those that were written."""
    for entry in report["checkpoints"]:
        answers, first, right = expected[entry["name"]]
        found = (
            entry["answers"]["answered"],
            entry["micro"]["acc@1"]["value"] * questions,
            entry["micro"]["average"]["value"] * 3 * questions,
        )
        if [round(value, 3) for value in found] != [answers, first, right]:
            sys.exit(
                f"error: {entry['name']}: answered, first right, right are {found}, written were"
                f" {(answers, first, right)}"
            )


def check_sample():
    """The committed example's score, counted by hand, once through the command."""
    known = json.loads((ROOT / "data/sample_generations/known_scores.json").read_text())
    flags = [
        "--pattern",
        "malaymmlu-*",
        "--questions",
        str(ROOT / "data/questions.json"),
        "--limit",
        str(known["limit"]),
    ]
    _, shown = score(ROOT / "data/sample_generations", *flags)
    if shown.splitlines()[: len(known["block"])] != known["block"]:
        sys.exit("error: the committed example does not give its hand-counted score")


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def make_record(args, questions, megabytes, plain, full, floors):
    """What is appended to results/score.json. plain, full: [(seconds, seconds of CPU)]; floors: seconds."""
    return {
        "benchmark": "score",
        "device": cpu_name(),
        "cores": 1,
        "versions": f"python {platform.python_version()}, numpy {importlib.metadata.version('numpy')},"
        f" msgspec {importlib.metadata.version('msgspec')}",
        "commit": git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "questions": len(questions),
        "samples": 3,
        "checkpoints": args.checkpoints,
        "characters": args.characters,
        "megabytes": round(megabytes),
        "repeats": args.repeats,
        "seconds_median": statistics.median(wall for wall, _ in plain),
        "seconds_min": min(plain)[0],
        "seconds_max": max(plain)[0],
        "distinct_sentences": args.distinct,
        "modules_compiled": True,
        "seconds_floor_median": statistics.median(floors),
        "load_average": os.getloadavg()[0],  # more than 1 on one core: something else ran
        "cpu_seconds_median": statistics.median(cpu for _, cpu in plain),
        "seconds_with_plot_and_html_median": statistics.median(wall for wall, _ in full),
        "cpu_seconds_with_plot_and_html_median": statistics.median(cpu for _, cpu in full),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoints", type=int, default=9)
    parser.add_argument("--characters", type=int, default=900, help="mean length of a response")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--distinct", action="store_true", help="no sentence occurs twice")
    args = parser.parse_args()

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
        check_sample()
        questions = make_questions(0)
        (folder / "questions.json").write_text(json.dumps(questions))
        expected = {}
        for number in range(args.checkpoints):
            name = f"malaymmlu-run{number // 3}-checkpoint-{320 * (number % 3 + 1)}"
            expected[name] = make_responses(
                folder / name / "generations.jsonl",
                questions,
                args.characters,
                0.4 + 0.04 * number,
                number,
                args.distinct,
            )
        megabytes = sum(path.stat().st_size for path in folder.glob("*/generations.jsonl")) / 1e6
        flags = ["--pattern", "malaymmlu-*", "--questions", "questions.json"]
        score(folder, *flags, "--json", "report.json")  # warms the page cache and is checked
        check(json.loads((folder / "report.json").read_text()), expected, len(questions))
        plain = [score(folder, *flags)[0] for _ in range(args.repeats)]
        floors = [floor(folder.glob("*/generations.jsonl")) for _ in range(args.repeats)]
        full = [score(folder, *flags, "--plot", "plot.png", "--html", "report.html")[0] for _ in range(args.repeats)]

    record = make_record(args, questions, megabytes, plain, full, floors)
    print(f"floor {statistics.median(floors):.2f} s")
    print("            outputs  responses       MB  median s    min s    max s    CPU s")
    for name, runs in (("text", plain), ("text, plot, html", full)):
        wall, cpu = [one[0] for one in runs], statistics.median(one[1] for one in runs)
        counts = f"{len(questions) * 3 * args.checkpoints:>9,}  {megabytes:>7,.0f}"
        print(
            f"{name:>19}  {counts}  {statistics.median(wall):>8.2f}  {min(wall):>7.2f}  {max(wall):>7.2f}  {cpu:>7.2f}"
        )
    path = ROOT / "results" / "score.json"
    records = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*records, record], indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
