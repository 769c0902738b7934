"""One self-contained HTML page of a score report; report.html is its template.

What is small (notes, tables, verdicts) stands in the page as JSON. Questions with all letters, and responses in blocks
of questions, are gzip in base64, which the browser unpacks (DecompressionStream) when they are looked at. A page has a
limit: beyond it responses are sampled, evenly over questions and checkpoints, and the page says what is left out.
"""

import base64
import gzip
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np

from malaysian_sft.generations import AMBIGUOUS, MISSING, NONE, TRUNCATED, read_generations
from malaysian_sft.plots import draw
from malaysian_sft.questions import LETTERS
from malaysian_sft.report import contamination_table, notes, tables

PAGE = Path(__file__).with_name("report.html")
MEGABYTES = 25  # a page that can still be sent by mail; a browser opens it in a second or two
TAIL = 1500  # characters kept of a response, its end: the answer is there
BLOCK = 100  # questions whose responses are unpacked together
DENSEST = 12  # more than gzip and base64 shrink a response by, except one that repeats itself
SIGNS = {NONE: "-", AMBIGUOUS: "?", TRUNCATED: "/", MISSING: "."}  # the page explains them


def write_html(report, rows, questions, path, megabytes=MEGABYTES):
    """Write the page: plot, tables that sort, contamination, comparisons, and every question with every checkpoint's
    letters and as many responses as fit.

    megabytes: limit of the file, in 10^6 bytes. Raises ValueError if it is too small for the questions alone.
    """
    picture = io.BytesIO()
    draw(report, rows, picture)
    overlap = set(report.get("contamination", {}).get("questions", []))
    head = {
        "plot": base64.b64encode(picture.getvalue()).decode(),
        "comparisons": [item["verdict"] for item in report["comparisons"]],
        "names": [row.name.removeprefix("malaymmlu-") for row in rows],
        "block": BLOCK,
        "tail": TAIL,
    } | table_parts(report)
    listed = packed([[*facts_of(question), letters_of(rows, i), int(question["id"] in overlap)]
                     for i, question in enumerate(questions)])  # fmt: skip
    template = PAGE.read_text(encoding="utf-8")
    taken = len(template) + len(json.dumps(head)) + len(listed) + 100 * len(questions) // BLOCK + 20_000
    room = int(megabytes * 1e6) - taken
    if room < taken // 20:
        needed = -(-taken * 21 // 20 // 100_000) / 10
        raise ValueError(
            f"--html_megabytes {megabytes:g}: the questions and tables alone take {taken / 1e6:.1f} MB;"
            f" give at least {needed + 0.1:.1f}, or --limit for fewer questions"
        )
    blocks, inside, total = response_blocks(rows, len(questions), room)
    head["notes"] = [f"{report['questions']:,} questions", *notes(report, rows), said_of(inside, total, megabytes)]
    Path(path).write_text(filled(template, head, listed, blocks), encoding="utf-8")


def table_parts(report):
    """The tables for the head, the one of contamination apart."""
    found = {"tables": [(table.title, table.header, table.rows) for table in tables(report)], "contamination": None}
    if "contamination" in report:
        table = contamination_table(report["contamination"], report["questions"])
        found["tables"] = [item for item in found["tables"] if item[0] != table.title]
        found["contamination"] = (table.title, table.header, table.rows)
    return found


def facts_of(question):
    return [question[name] for name in ("id", "prompt", "key", "category", "subject")]


def letters_of(rows, index):
    """ "BBA B-A": a word a checkpoint, a character a sample; SIGNS for what is no letter."""
    return " ".join("".join(LETTERS[a] if a >= 0 else SIGNS[a] for a in row.answers[index].tolist()) for row in rows)


def packed(value):
    """JSON, gzip, base64 -> str; the same value gives the same text."""
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), 6, mtime=0)).decode()


def filled(template, head, listed, blocks):
    """The template with its data. No text can end a script element early, and the policy names the one script that may
    run, by its hash: even markup that slipped in would stay dead."""
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL).group(1)
    parts = {
        "__POLICY__": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "__HEAD__": json.dumps(head).replace("<", "\\u003c"),
        "__QUESTIONS__": listed,
        "__BLOCKS__": "\n".join(
            f'<script type="application/octet-stream" id="block{number}">{block}</script>'
            for number, block in enumerate(blocks)
        ),
    }
    return re.sub("|".join(parts), lambda match: parts[match.group()], template)  # one pass: data is not searched


def said_of(inside, total, megabytes):
    """What of the responses the page has, in a sentence."""
    if inside == total:
        return f"all {total:,} responses are in this page, of long ones the last {TAIL:,} characters"
    return (
        f"{inside:,} of {total:,} responses are in this page, whose limit is {megabytes:g} MB (--html_megabytes): for"
        " each question first one of each checkpoint, in random order, rather one without an answer; then a second of"
        f" each; of long ones the last {TAIL:,} characters. The others are in the generations.jsonl of the checkpoints"
    )


def by_priority(rows, seed=0):
    """Every response that exists, the one to keep first -> (question, row, sample), int32 (N,) each.

    Rounds: in each, a question has one response of each checkpoint. A checkpoint's responses without an answer come
    first, else chance decides; chance also orders checkpoints and questions within a round, so that wherever the
    list is cut, questions differ by one response at most as long as they have any left.
    """
    generator = np.random.default_rng(seed)
    parts = []
    for number, row in enumerate(rows):
        shape = row.answers.shape
        rank = generator.random(shape) + (row.answers >= 0) + 2 * (row.answers == MISSING)  # (Q, samples)
        rounds = rank.argsort(1).argsort(1)
        question, sample = np.nonzero(row.answers != MISSING)
        parts.append((question, np.full(len(question), number), sample, rounds[question, sample]))
    question, row, sample, rounds = (np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True))
    order = np.lexsort((generator.random(len(question)), rounds, question))  # by question, then round
    question, row, sample = question[order], row[order], sample[order]
    place = np.arange(len(question)) - np.searchsorted(question, question)  # a response's place in its question's list
    order = np.lexsort((generator.random(len(question)), place))
    return question[order], row[order], sample[order]


def read_chosen(rows, units, most):
    """Texts of the first `units`, as many as `most` characters hold -> [(text, its whole length)], same order.

    units: as of `by_priority`. How many that is, is guessed from the sizes of the files: nothing is read twice.
    """
    question, row, sample = units
    sizes = [(each.path / "generations.jsonl").stat().st_size for each in rows]
    mean = max(1, min(TAIL, sum(sizes) / max(1, len(question))))
    count = min(len(question), int(most / mean) + 1)
    wanted = [{} for _ in rows]
    for position, unit in enumerate(zip(question[:count].tolist(), row[:count].tolist(), sample[:count].tolist(),
                                        strict=True)):  # fmt: skip
        wanted[unit[1]][unit[0], unit[2]] = position
    texts = [("", 0)] * count
    for each, places in zip(rows, wanted, strict=True):
        if not places:
            continue
        for record in read_generations(each.path / "generations.jsonl"):
            position = places.pop((record["index"], record["sample"]), None)  # the first one written counts
            if position is not None:
                texts[position] = record["text"][-TAIL:], len(record["text"])
    return texts


def response_blocks(rows, questions, room):
    """Responses in blocks of BLOCK questions, at most `room` characters together -> (blocks, how many responses, how
    many there are).

    A block is packed [[question, row, sample, text, whole length]]. How many fit is judged from every eighth block,
    packed with all texts at hand, and corrected after packing.
    """
    units = by_priority(rows)
    texts = read_chosen(rows, units, DENSEST * room)
    place = units[0][: len(texts)] // BLOCK
    lengths = np.array([len(text) + 30 for text, _ in texts], np.int64)
    pilot = np.unique(place)[::8]
    tried = sum(len(packed(block)) for block in unpacked_blocks(units, texts, len(texts), pilot))
    ratio = tried / max(1, lengths[np.isin(place, pilot)].sum())
    count = int(np.searchsorted(lengths.cumsum() * ratio, room, "right"))
    while True:
        blocks = [packed(block) for block in unpacked_blocks(units, texts, count, range(-(-questions // BLOCK)))]
        size = sum(map(len, blocks))
        if size <= room or not count:
            return blocks, count, len(units[0])
        count = int(count * min(0.97, 0.99 * room / size))


def unpacked_blocks(units, texts, count, numbers):
    """Yield the blocks `numbers` of the first `count` responses, in order of question, checkpoint and sample."""
    question, row, sample = (part[:count] for part in units)
    order = np.lexsort((sample, row, question))
    edges = np.searchsorted(question[order], [[n * BLOCK, (n + 1) * BLOCK] for n in numbers])
    for start, end in edges.reshape(-1, 2):
        yield [[int(question[i]), int(row[i]), int(sample[i]), *texts[i]] for i in order[start:end]]
