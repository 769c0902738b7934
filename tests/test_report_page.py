"""The HTML report: what is in it, how much of it fits, and how it behaves in Chromium, where there is one."""

import base64
import gzip
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import calculate_malaymmlu
from malaysian_sft.report_page import TAIL, by_priority

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'><!-- __BLOCKS__ " + "x" * 300 + " "
)
RUN = "fsdp2-fused-moe-Qwen3-235B-A22B-lora-256-checkpoint-"
NAMES = ["Qwen3-235B-A22B", *(f"{RUN}{step}" for step in (320, 640, 960))]
CATEGORIES = ["STEM", "Language", "<b onclick=window.hacked=1>Lain</b>"]
WORDS = np.array("ibu negeri sungai gunung daerah bandar laut hujan padi kota lama baru besar kecil tinggi".split())


def make_run(folder, count, samples=3, seed=0):
    """A question file, training data that holds questions 5 and 105, and generations of four checkpoints."""
    generator = np.random.default_rng(seed)
    questions, texts = [], {}
    for i in range(count):
        stem = f"Soalan {i}? {HOSTILE if i == 3 else ''}" + " ".join(generator.choice(WORDS, 20))
        options = [f"{letter}. nilai {letter.lower()}{i}" for letter in "ABCD"]
        questions.append({"id": 1000 + i, "prompt": "\n".join([stem, *options]), "options": options, "num_options": 4,
                          "key": "ABCD"[i % 4], "category": CATEGORIES[i % 3], "subject": f"Mata {i % 5}"})  # fmt: skip
    (folder / "q.json").write_text(json.dumps(questions))
    seen = [json.dumps({"text": questions[i]["prompt"]}) for i in (5, 105) if i < count]
    (folder / "train.jsonl").write_text("\n".join(seen) + "\n")
    for number, name in enumerate(NAMES):
        path = folder / f"malaymmlu-{name}"
        path.mkdir()
        args = {"names": [name], "adapter": name if number else None, "adapter_fingerprint": number, "samples": samples,
                "protocol": "reasoning"}  # fmt: skip
        (path / "args.json").write_text(json.dumps(args))
        with open(path / "generations.jsonl", "w") as file:
            for i in range(count):
                for sample in range(samples):
                    letter = questions[i]["key"] if generator.random() < 0.3 + 0.15 * number else "A"
                    body = " ".join(generator.choice(WORDS, 400 if i == 7 else 40))
                    text = f"{HOSTILE if i == 3 else ''}{name} {i} {sample} {body}"
                    text += f"\n\\boxed{{{letter}}}" if (i + sample) % 11 else ""
                    record = {"index": i, "id": 1000 + i, "sample": sample, "text": text, "finish_reason": "stop"}
                    if (number, i, sample) != (1, 9, samples - 1):  # one is missing
                        texts[number, i, sample] = text
                        file.write(json.dumps(record) + "\n")
    return questions, texts


def write_page(folder, *flags):
    """Score `folder` as a user does, in this process -> (path of the page, scores)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        given = ["--pattern", "malaymmlu-*", "--questions", "q.json", "--resamples", "20", "--compare", "none"]
        patch.setattr(sys, "argv", ["calculate_malaymmlu.py", *given, "--json", "s.json", "--html", "r.html", *flags])
        calculate_malaymmlu.main()
    return folder / "r.html", json.loads((folder / "s.json").read_text())


def unpack(page):
    """(head, questions, {(row, question, sample): (text, whole length)}) of a page, read as its script reads it."""
    elements = re.findall(r'<script id="(\w+)" type="[^"]+">(.*?)</script>', page, re.DOTALL)
    parts = dict(elements)
    blocks = re.findall(r'<script type="application/octet-stream" id="block\d+">(.*?)</script>', page)

    def opened(text):
        return json.loads(gzip.decompress(base64.b64decode(text, validate=True)))

    responses = {}
    for number, block in enumerate(blocks):
        for question, row, sample, text, length in opened(block):
            assert question // 100 == number and (row, question, sample) not in responses
            responses[row, question, sample] = text, length
    return json.loads(parts["head"]), opened(parts["questions"]), responses


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    questions, texts = make_run(folder, 130)
    path, scores = write_page(folder, "--contamination", "train.jsonl")
    return {"path": path, "questions": questions, "texts": texts, "scores": scores}


def test_a_page_that_fits_has_every_response(made):
    page = made["path"].read_text()
    head, listed, responses = unpack(page)
    assert {unit: (text[-TAIL:], len(text)) for unit, text in made["texts"].items()} == responses
    assert [item[0] for item in listed] == [question["id"] for question in made["questions"]]
    assert listed[9][5].split()[1][2] == "." and listed[0][5].split()[0][0] == "-"  # missing; without an answer
    assert any("all 1,559 responses are in this page" in note for note in head["notes"])
    assert head["names"] == NAMES
    assert [item[0] for item in listed if item[6]] == [1005, 1105]
    assert "http://" not in page and "https://" not in page


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """A run that is too large for its page."""
    folder = tmp_path_factory.mktemp("sampled")
    _, texts = make_run(folder, 350, seed=1)
    return write_page(folder, "--html_megabytes", "0.3")[0], texts


def test_beyond_the_limit_responses_are_sampled_evenly_and_the_page_says_so(sampled):
    """The limit holds and is used, questions differ by one response, no checkpoint is favoured, and each response is
    what was generated."""
    path, texts = sampled
    head, _, responses = unpack(path.read_text())
    assert 0.85 * 300_000 < path.stat().st_size <= 300_000
    assert all((text, length) == (texts[unit][-TAIL:], len(texts[unit])) for unit, (text, length) in responses.items())
    by_question = Counter(question for _, question, _ in responses)
    assert len(by_question) == 350 and max(by_question.values()) - min(by_question.values()) <= 1
    for question in range(350):  # one of each checkpoint before a second of any
        own = Counter(row for row, of, _ in responses if of == question)
        assert max(own.values()) - min(own[row] for row in range(4)) <= 1
    by_row = Counter(row for row, _, _ in responses)
    assert max(by_row.values()) < 1.15 * min(by_row.values())
    assert any(f"{len(responses):,} of {len(texts):,} responses are in this page" in note for note in head["notes"])


def test_a_limit_too_small_for_the_questions_is_one_line(tmp_path):
    make_run(tmp_path, 40, samples=1)
    with pytest.raises(SystemExit, match=r"error: --html_megabytes 0: the questions .* give at least \d"):
        write_page(tmp_path, "--html_megabytes", "0")


def test_a_checkpoint_gives_first_what_has_no_answer_and_nothing_that_is_missing():
    class Row:
        answers = np.array([[0, -1, 2, -4], [1, 1, -4, -4]], np.int8)

    question, row, sample = by_priority([Row, Row])
    assert len(question) == 10 and (question, row, sample)[0].dtype == np.int32
    first = {(q, r): s for q, r, s in zip(question[:4], row[:4], sample[:4], strict=True)}
    assert len(first) == 4 and first[0, 0] == first[0, 1] == 1  # one of each checkpoint and question
    assert Row.answers[question, sample].min() == -1


# --- in a browser ---


def natural(name):
    """Sort key: numbers by size, letters whatever their case."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on PATH: apt-get install chromium")
    quiet = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync"
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=chromium, args=quiet.split())
        yield found
        found.close()


@pytest.fixture
def look(browser, made):
    """Open the page at a width, without a network; what went wrong or was asked for outside fails the test."""
    contexts, faults = [], []

    def opened(width=1366, path=None):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append("dialog"))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        page.on("request", lambda asked: None if asked.url.startswith(("file:", "data:", "blob:"))
                else faults.append(asked.url))  # fmt: skip
        page.goto(Path(path or made["path"]).as_uri())
        # not wait_for_function: the page's policy forbids what it evaluates, unless it is true at once
        page.locator("#list details").first.wait_for(state="attached")
        return page

    opened.faults = faults
    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def found(page):
    """Ids of the questions listed."""
    return [int(text.split(" ")[0]) for text in page.locator("#list summary > span:first-child").all_inner_texts()]


@pytest.mark.parametrize("width", [390, 1366])
def test_the_page_never_scrolls_sideways(look, width):
    page = look(width)
    for place in (0, 3, 7):  # 3 is hostile, 7 long
        page.locator("#list summary").nth(place).click()
    page.locator("#list h3").nth(11).wait_for(state="attached")
    assert page.locator("#list h3").count() == 12
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """width => [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') &&
        e.getBoundingClientRect().right > width + 0.5).map(e => e.tagName + ' ' + e.id)"""
    assert page.evaluate(outside, width) == []


def test_hostile_text_is_shown_and_not_run(look, made):
    page = look()
    page.locator("#list summary").nth(3).click()
    page.wait_for_selector("#list h3")
    shown = page.locator("#list details").nth(3).locator("pre").all_inner_texts()
    assert "</script><script>window.hacked=1</script><img src=x" in shown[0] and len(shown) == 13
    assert page.locator("#list img, #list script, #list b[onclick]").count() == 0
    page.evaluate("""() => { const e = document.createElement('div'); document.body.append(e);
        e.innerHTML = '<b onclick="window.hacked=2">x</b>'; e.firstChild.click(); }""")
    assert page.evaluate("window.hacked") is None  # the policy: even markup that came in would not run
    assert look.faults and all("Content Security Policy" in fault for fault in look.faults)
    look.faults.clear()


def test_opened_question_shows_each_response_under_its_checkpoint(look, made):
    page = look()
    page.fill("#id", "1007")
    assert found(page) == [1007]
    page.locator("#list summary").click()
    page.wait_for_selector("#list h3")
    assert page.locator("#list h3").all_inner_texts() == NAMES
    texts = page.locator("#list pre").evaluate_all("all => all.map(e => e.textContent)")
    assert texts[0] == made["questions"][7]["prompt"]
    assert texts[1:] == [made["texts"][n, 7, sample][-TAIL:] for n in range(4) for sample in range(3)]
    whole = len(made["texts"][0, 7, 0])
    assert f"the last {TAIL} of {whole} characters" in page.locator("#list details").inner_text()


def test_letters_stand_beside_their_checkpoint(look, made):
    page = look()
    _, listed, _ = unpack(made["path"].read_text())
    for place in (0, 9):
        items = page.locator("#list details").nth(place).locator(".letters > span")
        assert items.evaluate_all("all => all.map(e => e.title)") == NAMES
        shown = items.all_inner_texts()
        for name, text, word in zip(NAMES, shown, listed[place][5].split(), strict=True):
            assert text == f"{name} {word.replace('-', chr(0x2212))}"


def test_questions_are_found_by_whole_id_text_and_choice(look, made):
    page = look()
    page.fill("#id", "100")  # the beginning of many
    assert found(page) == [] and "0 questions" in page.inner_text("#page")
    page.fill("#id", "1100")
    assert found(page) == [1100]
    page.fill("#id", "")
    page.fill("#find", "soalan 12?")
    assert found(page) == [1012]
    page.fill("#find", "")
    page.select_option("#category", CATEGORIES[2])
    page.select_option("#subject", "Mata 1")
    wanted = [q["id"] for q in made["questions"] if q["category"] == CATEGORIES[2] and q["subject"] == "Mata 1"]
    assert found(page) == wanted
    page.select_option("#category", index=0)
    page.select_option("#subject", index=0)
    page.click("#next")
    assert found(page) == list(range(1025, 1050))


def test_every_column_sorts_both_ways_on_its_own(look, made):
    """The order of numbers, against Python's, for the table of averages and for that of subjects."""
    page = look()
    for title in ("micro: every question", "average by subject"):
        table = page.locator("h2", has_text=title).first.locator("xpath=following-sibling::div[1]//table")
        columns = table.locator("th button").count()
        for column in range(1, columns):
            for turn in range(2):
                table.locator("th button").nth(column).click()
                cells = table.locator(f"tbody td:nth-child({column + 1})").all_inner_texts()
                numbers = [float(cell.split(" ")[0]) for cell in cells]
                assert numbers == sorted(numbers, reverse=turn == 0), (title, column, turn)
                assert table.locator("th[aria-sort]").count() == 1
        table.locator("th button").nth(0).click()
        names = table.locator("tbody td:first-child").all_inner_texts()
        assert names == sorted(names, key=natural)


def test_contamination_is_a_section_and_a_choice(look, made):
    page = look()
    part = made["scores"]["contamination"]
    shown = page.inner_text("#contamination")
    assert "2 of 130 questions overlap train.jsonl" in shown
    for row in part["checkpoints"]:
        assert f"{100 * row['without']:.2f} [" in shown
    page.locator("#contamination > button").click()
    assert found(page) == part["questions"] == [1005, 1105]
    page.select_option("#status", "no overlap")
    assert "128 questions" in page.inner_text("#page")


def test_what_is_left_out_is_said_at_its_place(look, sampled):
    path, texts = sampled
    _, _, responses = unpack(path.read_text())
    page = look(path=path)
    assert f"{len(responses):,} of {len(texts):,} responses are in this page" in page.inner_text("#notes")
    page.locator("#list summary").nth(20).click()
    page.wait_for_selector("#list h3")
    inside = sum(question == 20 for _, question, _ in responses)
    text = page.locator("#list details").nth(20).inner_text()
    assert 0 < inside < 12 and text.count("not in this page: generations.jsonl, index 20") == 12 - inside
