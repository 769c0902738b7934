"""malaymmlu.py: names, plans and files without an engine; then real vLLM engines that are killed, stopped, split and
compared."""

import argparse
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from multiprocessing import Pipe
from pathlib import Path

import pytest

import malaymmlu
from conftest import save_tiny_checkpoint, tiny_model
from malaysian_sft.engine import engine_environment, llm_options, sample_seed, serve
from malaysian_sft.generations import FIXED, Output, find_directories
from malaysian_sft.questions import load_questions
from malaysian_sft.scheduler import Engine, Scheduler

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = {
    2: "A. Betul\nB. Salah",
    3: "A. 1\nB. 2\nC. 3",
    4: "A.satu\nB.dua\nC.tiga\nD.empat",
    5: "A  a\nB  b\nC  c\nD  d\nE  e",
}


def write_questions(path, count):
    rows = []
    for i in range(count):
        n = 2 + i % 4
        options = PROMPTS[n].split("\n")
        rows.append(
            {
                "id": 100 + i,
                "prompt": f"Soalan nombor {i}?\n{PROMPTS[n]}",
                "answer": options[i % n],
                "year": "",
                "subject": "Matematik",
                "category": ["STEM", "Language"][i % 2],
                "level": "Primary",
                "options": options,
                "num_options": n,
                "key": "ABCDE"[i % n],
            }
        )
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def write_adapter(directory, base, r=8, **more):
    """An adapter directory as far as names and plans look at it."""
    directory.mkdir(parents=True)
    config = {"base_model_name_or_path": base, "r": r, "lora_alpha": 2 * r, **more}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "adapter_model.safetensors").write_bytes(b"weights of " + str(directory).encode())


def arguments(**given):
    return argparse.Namespace(**{**vars(malaymmlu.Arguments()), **given})


# ---- names and plans -------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs in the trainers' layout, over base models that exist, as far as names are concerned."""
    monkeypatch.chdir(tmp_path)
    for base in ("Qwen3-32B", "GLM-4.5-Air"):
        (tmp_path / "models" / base).mkdir(parents=True)
        (tmp_path / "models" / base / "config.json").write_text("{}")
    for step in (960, 320, 1280):
        write_adapter(tmp_path / f"outputs/ds3-qwen3-32b-lora-256/checkpoint-{step}", "models/Qwen3-32B", 256)
    for step in (944, 314):
        write_adapter(
            tmp_path / f"outputs/fsdp2-fused-moe-glm-4.5-air-lora-256/checkpoint-{step}", "models/GLM-4.5-Air", 256
        )
    return tmp_path


def test_both_naming_styles_match_in_natural_order(runs):
    jobs = malaymmlu.find_jobs(arguments(pattern="ds3-qwen3-32b-lora-256*"))
    assert [str(job.directory) for job in jobs] == [
        "malaymmlu-Qwen3-32B",
        "malaymmlu-ds3-qwen3-32b-lora-256-checkpoint-320",
        "malaymmlu-ds3-qwen3-32b-lora-256-checkpoint-960",
        "malaymmlu-ds3-qwen3-32b-lora-256-checkpoint-1280",
    ]
    jobs = malaymmlu.find_jobs(arguments(pattern="GLM-4.5-Air-lora-256-*", base="none"))
    assert [str(job.directory) for job in jobs] == [
        "malaymmlu-GLM-4.5-Air-lora-256-314",
        "malaymmlu-GLM-4.5-Air-lora-256-944",
    ]
    assert jobs[1].adapter == "outputs/fsdp2-fused-moe-glm-4.5-air-lora-256/checkpoint-944"
    assert jobs[1].names == ["fsdp2-fused-moe-glm-4.5-air-lora-256-checkpoint-944", "GLM-4.5-Air-lora-256-944"]


@pytest.mark.parametrize(
    ("base", "asked", "expected"),
    [
        ("meta-llama/Llama-3.1-70B-Instruct", "auto", "assistant"),
        ("/models/Meta-LLAMA-3-8B", "auto", "assistant"),
        ("/llama/Qwen3-32B", "auto", "user"),
        ("Qwen/Qwen3-32B", "assistant", "assistant"),
        ("meta-llama/Llama-3.1-70B-Instruct", "user", "user"),
    ],
)
def test_the_answer_prefix_is_the_official_programs_unless_told(base, asked, expected):
    job = malaymmlu.Job("x", ["x"], base, base, None, Path("x"))
    assert malaymmlu.answer_prefix(arguments(answer_prefix=asked), job) == expected
    assert ("begins the answer" in malaymmlu.said_of_prefix(expected)) == (expected == "assistant")


def test_a_checkpoint_that_is_still_being_written_is_passed_over(runs):
    write_adapter(runs / "outputs/ds3-qwen3-32b-lora-256/checkpoint-1600.tmp", "models/Qwen3-32B", 256)
    assert len(malaymmlu.find_jobs(arguments(pattern="ds3-*", base="none"))) == 3


def test_a_pattern_that_matches_both_names_takes_a_checkpoint_once(runs):
    jobs = malaymmlu.find_jobs(arguments(pattern="*944,*glm*", base="none"))
    assert [job.name for job in jobs] == [
        "fsdp2-fused-moe-glm-4.5-air-lora-256-checkpoint-314",
        "fsdp2-fused-moe-glm-4.5-air-lora-256-checkpoint-944",
    ]


def test_a_checkpoint_generated_under_its_other_name_is_continued_there(runs):
    there = runs / "malaymmlu-GLM-4.5-Air-lora-256-944"
    there.mkdir()
    (there / "args.json").write_text(
        json.dumps({"names": ["fsdp2-fused-moe-glm-4.5-air-lora-256-checkpoint-944", "GLM-4.5-Air-lora-256-944"]})
    )
    jobs = malaymmlu.find_jobs(arguments(pattern="fsdp2-*-944", base="none"))
    assert [str(job.directory) for job in jobs] == ["malaymmlu-GLM-4.5-Air-lora-256-944"]
    # another run's checkpoint that happens to share that name is not this one
    write_adapter(runs / "outputs/other-run/checkpoint-944", "models/GLM-4.5-Air", 256)
    jobs = malaymmlu.find_jobs(arguments(pattern="other-run*", base="none"))
    assert [str(job.directory) for job in jobs] == ["malaymmlu-other-run-checkpoint-944"]


def test_two_checkpoints_with_one_name_are_refused(runs):
    write_adapter(runs / "outputs/other-run/checkpoint-944", "models/GLM-4.5-Air", 256)
    with pytest.raises(ValueError, match="are both called GLM-4.5-Air-lora-256-944"):
        malaymmlu.find_jobs(arguments(pattern="GLM-4.5-Air-lora-256-*"))


def test_dora_has_its_own_name_and_hub_cache_paths_keep_the_models_name(tmp_path):
    path = "/cache/models--Qwen--Qwen3-30B-A3B-Instruct-2507/snapshots/0123abc"
    names = malaymmlu.checkpoint_names(
        tmp_path / "run/checkpoint-319", {"base_model_name_or_path": path, "r": 256, "use_dora": True}
    )
    assert names == ["run-checkpoint-319", "Qwen3-30B-A3B-Instruct-2507-dora-256-319"]


def test_what_is_not_there_is_named(runs):
    with pytest.raises(ValueError, match="ds3-qwen3-32b-lora-256-checkpoint-320"):
        malaymmlu.find_jobs(arguments(pattern="nothing-*"))
    (runs / "outputs/ds3-qwen3-32b-lora-256/checkpoint-960/adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-960 has no adapter_model.safetensors"):
        malaymmlu.find_jobs(arguments(pattern="ds3-*"))
    with pytest.raises(ValueError, match="give --pattern, or --base"):
        malaymmlu.check_arguments(arguments())
    with pytest.raises(ValueError, match="--limit 0: expected a positive"):  # it would say "done" and ask nothing
        malaymmlu.check_arguments(arguments(pattern="ds3-*", limit=0))


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}",
        b"{",
        b"\xff",
        b"[" * 99999,
        b'{"peft_type": "IA3", "base_model_name_or_path": "x", "r": 8}',
        b'{"base_model_name_or_path": 5, "r": 8}',
        b'{"base_model_name_or_path": "x", "r": true}',
    ],
    ids=lambda content: str(content[:20]),
)
def test_only_what_the_pattern_matches_must_be_an_adapter(runs, capsys, content):
    write_adapter(runs / "outputs/other/checkpoint-5", "models/Qwen3-32B")
    (runs / "outputs/other/checkpoint-5/adapter_config.json").write_bytes(content)
    assert len(malaymmlu.find_jobs(arguments(pattern="ds3-*", base="none"))) == 3
    noted = capsys.readouterr().err
    assert noted.startswith("note: outputs/other/checkpoint-5") and noted.count("\n") == 1
    with pytest.raises(ValueError, match="^outputs/other/checkpoint-5/adapter_config.json"):
        malaymmlu.find_jobs(arguments(pattern="other-*", base="none"))


def test_a_run_may_be_called_what_is_special_in_a_glob(runs):
    write_adapter(runs / "outputs/run[x]/checkpoint-5", "models/Qwen3-32B")
    (job,) = malaymmlu.find_jobs(arguments(pattern="run[x]-checkpoint-5", base="none"))
    job.directory.mkdir()
    (job.directory / "generations.jsonl").touch()
    assert find_directories("malaymmlu-run[x]-checkpoint-5") == [("malaymmlu-run[x]-checkpoint-5", job.directory)]


@pytest.mark.parametrize("given", ["", " ", ","])
@pytest.mark.parametrize("flag", ["pattern", "base"])
def test_an_empty_pattern_or_base_is_refused(flag, given):
    """It would say "done" and ask nothing."""
    with pytest.raises(ValueError, match=f"--{flag} '{given}': expected .*"):
        malaymmlu.check_arguments(arguments(**{"pattern": "x", flag: given}))


def test_gpus_are_split_into_engines(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    plan = malaymmlu.plan_engines(arguments(num_gpus=8, gpu_partition=2))
    assert (plan.device, plan.gpus) == ("cuda", [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]])
    assert malaymmlu.plan_engines(arguments(gpu_partition=8)).gpus == [list("01234567")]
    with pytest.raises(ValueError, match="not a multiple of --gpu_partition 3"):
        malaymmlu.plan_engines(arguments(num_gpus=8, gpu_partition=3))
    with pytest.raises(ValueError, match="8 GPUs are visible"):
        malaymmlu.plan_engines(arguments(num_gpus=16))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(malaymmlu.plan_engines(arguments(num_gpus=2)).gpus) == 2
    assert malaymmlu.plan_engines(arguments()).gpus == [[]]


def test_every_sample_has_its_own_seed_whatever_else_is_run():
    seeds = {sample_seed(0, i, s, 0) for i in range(2000) for s in range(3)}
    assert len(seeds) == 6000 and all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(0, 5, 1, 0) == sample_seed(0, 5, 1, 0) != sample_seed(1, 5, 1, 0)


def test_sampling_comes_from_flags_then_generation_config(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.95, "top_k": 20}))
    found = malaymmlu.sampling_settings(arguments(top_p=0.8), tmp_path)
    assert (found["temperature"], found["top_p"], found["top_k"], found["max_tokens"]) == (0.6, 0.8, 20, 4096)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", r" is \[\]; expected an object"),
        (b"\xff", " is not JSON"),
        (b"{", " is not JSON"),
        (b'{"temperature": "hot"}', ": temperature is 'hot'; expected a number of at least 0"),
        (b'{"temperature": NaN}', ": temperature is nan; expected a number"),
        (b'{"top_p": 0}', ": top_p is 0; expected a number above 0"),
        (b'{"top_k": 2.5}', ": top_k is 2.5; expected a whole number"),
        (b'{"min_p": true}', ": min_p is True; expected a number"),
        (b'{"repetition_penalty": [1]}', r": repetition_penalty is \[1\]; expected a number"),
    ],
)
def test_a_damaged_generation_config_is_refused_by_key(tmp_path, content, message):
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/generation_config.json{message}"):
        malaymmlu.sampling_settings(arguments(), tmp_path)


# ---- files -----------------------------------------------------------------------------------------------------------


def wanted(**changed):
    return {**dict.fromkeys(FIXED), "names": ["x"], "protocol": "reasoning", "retries": 0, **changed}


def record(index, sample, text="Jawapan: A"):
    return {
        "index": index,
        "id": 100 + index,
        "sample": sample,
        "text": text,
        "finish_reason": "stop",
        "completion_tokens": 3,
    }


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def output(tmp_path):
    """A function that opens the same output directory with some settings."""
    questions = load_questions(write_questions(tmp_path / "q.json", 4))
    opened = []

    def start(samples=3, **changed):
        job = malaymmlu.Job("x", ["x"], "base", "base", None, tmp_path / "malaymmlu-x")
        opened.append(Output(job, wanted(**changed), questions, samples))
        return opened[-1]

    yield start
    for one in opened:
        one.lock.close()


def test_only_what_is_missing_is_queued_and_a_half_written_line_is_repaired(output):
    first = output()
    assert (first.total, len(first.queue)) == (12, 12)
    first.append([record(0, 0), record(0, 1)])
    first.append([record(3, 2)])
    first.close()
    whole = first.path.read_bytes()
    first.path.write_bytes(whole + b'{"index": 1, "id": 101, "sample": 0, "te')
    second = output()
    assert first.path.read_bytes() == whole
    assert set(second.queue) == {(i, s) for i in range(4) for s in range(3)} - {(0, 0), (0, 1), (3, 2)}
    second.close()
    first.path.write_bytes(whole[:-1])  # a whole record that lost its end of line is made again
    third = output()
    assert (3, 2) in third.queue and first.path.read_bytes().count(b"\n") == 2
    third.close()


def test_no_character_of_an_answer_can_break_a_line(output):
    first = output()
    first.append([record(0, 0, "satu\u2028dua\x85tiga\nempat ألف")])
    assert len(first.path.read_text(encoding="utf-8").splitlines()) == 1
    assert read(first.path)[0]["text"] == "satu\u2028dua\x85tiga\nempat ألف"
    first.close()
    assert output().missing == 11


def test_more_samples_continue_what_is_there(output):
    first = output()
    first.append([record(i, s) for i in range(4) for s in range(3)])
    assert first.missing == 0
    first.close()
    assert set(output(samples=4).queue) == {(i, 3) for i in range(4)}


def test_damage_inside_the_file_is_an_error_that_names_the_line(output):
    first = output()
    first.append([record(0, 0), record(0, 1)])
    first.close()
    whole = first.path.read_bytes()
    first.path.write_bytes(b"{broken\n" + whole)
    with pytest.raises(ValueError, match="line 1 is damaged"):
        output()
    first.path.write_bytes(whole + whole)
    with pytest.raises(ValueError, match="line 3: question 0, sample 0 occurs twice"):
        output()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": 5}, " is damaged: expected a text and a sample and an index from 0 up, got .*; delete the line"),
        ({"index": "0"}, " is damaged: expected a text and a sample and an index"),
        ({"index": [0]}, " is damaged: expected a text and a sample and an index"),
        ({"index": True}, " is damaged: expected a text and a sample and an index"),
        ({"text": "\ud800"}, " is damaged: half of a surrogate pair"),
        ({"index": 4}, r": no question 4 in the question file \(0 to 3\); wrong --questions; or delete the line"),
        ({"index": -1}, ": no question -1"),
        ({"id": 7}, ": id 7, but question 0 is 100; wrong --questions; or delete the line"),
        ({"sample": 9}, ": sample 9, but --samples 3 makes 0 to 2; ask for as many as there are, or delete the line"),
        ({"sample": -1}, ": .*got sample -1; or delete the line"),
    ],
)
def test_a_line_that_scoring_refuses_is_not_called_complete(output, changed, message):
    first = output()
    first.append([record(i, s) for i in range(4) for s in range(3) if (i, s) != (0, 0)])
    first.append([record(0, 0) | changed])
    first.close()
    whole = first.path.read_bytes()
    with pytest.raises(ValueError, match=f"generations.jsonl, line 12{message}"):
        output()
    assert first.path.read_bytes() == whole


def test_a_run_that_makes_nothing_leaves_args_json_alone(output):
    first = output(date="then")
    first.append([record(i, s) for i in range(4) for s in range(3)])
    first.close()
    second = output(date="now")
    assert second.missing == 0 and json.loads((second.directory / "args.json").read_text())["date"] == "then"
    second.close()
    assert output(samples=4, date="now").missing == 4
    assert json.loads((second.directory / "args.json").read_text())["date"] == "now"


def test_a_second_run_on_the_directory_is_refused(output):
    first = output()
    with pytest.raises(ValueError, match=f"written by another run; .*process {os.getpid()}"):
        output()
    first.close()
    output()


def test_changed_settings_are_refused_by_name(output):
    first = output(seed=0, adapter_fingerprint="abc")
    first.append([record(0, 0)])
    first.close()
    with pytest.raises(ValueError, match="generated with seed = 0, now it is 1"):
        output(seed=1, adapter_fingerprint="abc")
    with pytest.raises(ValueError, match="adapter_fingerprint"):
        output(seed=0, adapter_fingerprint="def")
    assert output(seed=0, adapter_fingerprint="abc").missing == 11


def test_a_damaged_args_json_is_refused_by_name(output):
    first = output()
    first.append([record(0, 0)])
    first.close()
    for text, message in (("[]", "expected an object"), ('{"samples": "3"}', "samples is '3'"), ("{", "not JSON")):
        (first.directory / "args.json").write_text(text)
        with pytest.raises(ValueError, match=f"args.json.*{message}"):
            output()
    with pytest.raises(ValueError, match="--samples 1001: expected up to 1,000"):  # scoring would refuse it
        malaymmlu.check_arguments(arguments(pattern="x", samples=1001))


def test_a_changed_weight_changes_the_fingerprint(tmp_path):
    write_adapter(tmp_path / "a", "base")
    before = malaymmlu.fingerprint(str(tmp_path / "a"))
    weights = tmp_path / "a/adapter_model.safetensors"
    weights.write_bytes(b"W" + weights.read_bytes()[1:])
    malaymmlu.fingerprint.cache_clear()
    assert malaymmlu.fingerprint(str(tmp_path / "a")) != before


def test_a_full_disk_leaves_whole_lines_and_a_clear_message(output):
    """A limit on the file's size stands for a full disk: the write is cut short in the same way."""
    first = output()
    first.append([record(0, 0)])
    size = first.path.stat().st_size
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, old[1]))
    try:
        with pytest.raises(RuntimeError, match="1 of 12 samples are safe; make room"):
            first.append([record(1, 0, "x" * 50), record(1, 1, "x" * 5000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert first.path.stat().st_size == size
    first.append([record(2, 2)])  # there is room again
    first.close()
    assert output().missing == 10


# ---- the scheduler, with engines that do nothing by themselves -------------------------------------------------------


class StandIn(Engine):
    """An engine slot without a process: the test says what it does."""

    log = Path("engine.log")

    @property
    def alive(self):
        return self.output is not None

    def start(self, output, config):
        self.pipe, self.sent = argparse.Namespace(send=lambda sent: self.sent.append(sent)), []
        self.load(output, "loads")
        self.ready = True

    def stop(self, grace=0.0):
        self.output = None


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """A function: a scheduler with some engine slots over two rows of 4 questions x 3 samples."""
    questions = load_questions(write_questions(tmp_path / "q.json", 4))
    rows = []
    for name in ("a", "b"):
        job = malaymmlu.Job(name, [name], "base", "base", None, tmp_path / f"malaymmlu-{name}")
        rows.append(Output(job, wanted(), questions, 3))
    monkeypatch.setattr("malaysian_sft.scheduler.Engine", StandIn)

    def make(slots, max_num_seqs=256, **given):
        plan = malaymmlu.Plan("cpu", [[] for _ in range(slots)], 1, max_num_seqs, True)
        return Scheduler(arguments(**given), plan, questions, rows)

    yield make
    for row in rows:
        row.close()


def test_work_is_shared_fairly_and_kept_within_the_engines_capacity(scheduler):
    made = scheduler(2)
    made.assign()
    made.dispatch()
    assert [len(engine.units) for engine in made.engines] == [6, 6]
    # samples of a question stay together, so that its prompt is computed once
    assert made.engines[0].units == {(i, s) for i in (0, 1) for s in range(3)}
    small = scheduler(1, max_num_seqs=2)
    small.outputs = small.outputs[1:]
    small.assign()
    small.dispatch()
    assert len(small.engines[0].units) == 4  # two being written and two waiting


def finish(engine, keep=0):
    """All but `keep` of what an engine works on comes back."""
    for unit in sorted(engine.units)[keep:]:
        engine.output.append([record(*unit)])
        engine.units.discard(unit)


def test_an_idle_engine_takes_the_next_rows_weights_while_others_finish(scheduler):
    made = scheduler(2)
    made.assign()
    made.dispatch()
    first, second = made.outputs
    slow, quick = made.engines
    finish(quick)
    quick.deaths = 2
    made.assign()
    made.dispatch()
    assert [engine.output for engine in made.engines] == [first, second]
    assert not quick.ready and not quick.units and quick.deaths == 0 and len(slow.units) == 6
    kind, config = quick.sent[-1]
    assert kind == "load" and config == made.engine_config(second)
    quick.ready = True
    made.dispatch()
    assert len(quick.units) == 12 and quick.sent[-1][0] == "units"
    finish(slow)
    made.assign()
    assert slow.output is first and slow.alive  # nothing is left for it to do


def test_another_base_model_gets_another_engine(scheduler, monkeypatch):
    made = scheduler(1)
    second = made.outputs[1]
    monkeypatch.setattr(second, "job", dataclasses.replace(second.job, model="other"))
    made.assign()
    made.dispatch()
    engine, stopped = made.engines[0], []
    monkeypatch.setattr(engine, "stop", lambda grace: (stopped.append(engine.output), StandIn.stop(engine)))
    finish(engine)
    made.assign()
    assert stopped == [made.outputs[0]] and engine.output is second and engine.sent == []


@pytest.mark.parametrize("message", ["other", None], ids=["it says that it cannot", "it dies"])
def test_an_engine_that_cannot_take_weights_costs_no_restart(scheduler, message):
    made = scheduler(1, restarts=0)
    made.assign()
    made.dispatch()
    engine, second = made.engines[0], made.outputs[1]
    finish(engine)
    made.assign()
    assert engine.taking
    engine.pipe, theirs = Pipe()
    if message:
        theirs.send((message, None))
    theirs.close()
    made.collect()
    assert not engine.alive and engine.takes == (message == "other")
    made.assign()
    assert engine.output is second and engine.deaths == 0 and engine.sent == [] and not engine.taking
    made.dispatch()
    assert len(engine.units) == 12
    with pytest.raises(RuntimeError, match="failed 1 times"):  # that it began with these weights changes no promise
        made.died(engine, "gone")


def test_a_dead_engine_on_a_full_disk_ends_the_run_at_once(scheduler, monkeypatch):
    made = scheduler(1, restarts=3)
    made.assign()
    made.dispatch()
    monkeypatch.setattr("malaysian_sft.scheduler.shutil.disk_usage", lambda path: argparse.Namespace(free=0))
    with pytest.raises(RuntimeError, match="no space left on the disk of .*0 of 12 samples are safe; make room"):
        made.died(made.engines[0], "gone")


def test_a_dead_engines_questions_go_back_and_restarts_are_bounded(scheduler):
    made = scheduler(1, restarts=2, restart_backoff=0.0)
    made.assign()
    made.dispatch()
    first, engine = made.outputs[0], made.engines[0]
    for death in (1, 2):
        made.died(engine, "gone")
        assert list(first.queue) == [(i, s) for i in range(4) for s in range(3)] and not engine.alive
        made.assign()
        made.dispatch()
        assert engine.alive and len(engine.units) == 12 and engine.deaths == death
    with pytest.raises(RuntimeError, match="failed 3 times on a, last: gone"):
        made.died(engine, "gone")


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """A function: what the engine's process writes to its log."""
    monkeypatch.setattr(StandIn, "log", tmp_path / "engine.log")

    def write(engine, text):
        engine.log_start = engine.log.stat().st_size if engine.log.exists() else 0
        with open(engine.log, "a", encoding="utf-8") as file:
            file.write(text)

    return write


def test_the_same_error_twice_ends_the_run_and_is_said(scheduler, capsys, logged):
    made = scheduler(1, restarts=9, restart_backoff=0.0)
    engine, first = made.engines[0], made.outputs[0]
    log = "(EngineCore pid=%d) ERROR 01-01 [core.py:1] ValueError: only %d GiB are free\n  File x\n"
    log += "RuntimeError: Engine core initialization failed. See root cause above.\n"

    def fail(text):
        made.assign()
        logged(engine, text)
        made.died(engine, "its process is gone")

    fail(log % (1, 5))
    assert "failed (its process is gone: ValueError: only 5 GiB are free); restart 1 of 9" in capsys.readouterr().out
    fail("OSError: another\n")
    fail("killed\n")  # no error of its own: those before it are another process's
    assert "failed (its process is gone); restart 3" in capsys.readouterr().out
    fail("killed\n")
    fail(log % (2, 5))
    with pytest.raises(RuntimeError, match="failed twice on a .*: ValueError: only 4 GiB are free; 0 of 12 samples"):
        fail(log % (3, 4))
    made.assign()
    first.append([record(0, 0)])  # something was answered: the restarts count
    fail(log % (4, 4))
    assert "restart 7 of 9" in capsys.readouterr().out


def test_restarts_wait_longer_every_time(scheduler):
    made = scheduler(1, restart_backoff=50.0)
    made.assign()
    for pause in (50, 100):
        made.died(made.engines[0], "gone")
        assert made.engines[0].not_before - time.monotonic() == pytest.approx(pause, abs=2)
        made.assign()
        assert not made.engines[0].alive
        made.engines[0].not_before = 0.0
        made.assign()


def test_a_silent_engine_counts_as_hung_only_while_it_has_work(scheduler):
    made = scheduler(1, hang_timeout=100.0)
    made.assign()
    engine = made.engines[0]
    engine.heard -= 101
    made.watch()
    assert engine.alive
    made.dispatch()
    made.watch()
    assert engine.alive  # new work, new patience
    engine.heard -= 101
    made.watch()
    assert not engine.alive and len(made.outputs[0].queue) == 12


# ---- an engine process's loop, with a model that says what the test wants --------------------------------------------


class Scripted:
    """vLLM's engine as far as `serve` uses it: answers every request at the next step with `reply(question,
    attempt)`."""

    def __init__(self, reply, max_model_len=4096):
        self.reply, self.requests, self.asked = reply, [], []
        self.model_config = argparse.Namespace(max_model_len=max_model_len)
        self.llm_engine = self

    def add_request(self, name, prompt, params, lora_request=None):
        self.requests.append((name, prompt, params))
        self.asked.append((name, params))

    def step(self):
        results = []
        for name, prompt, _ in self.requests:
            text, reason = self.reply(name)
            output = argparse.Namespace(text=text, finish_reason=reason, token_ids=[1, 2])
            results.append(
                argparse.Namespace(
                    request_id=name, outputs=[output], prompt_token_ids=prompt["prompt_token_ids"], finished=True
                )
            )
        self.requests = []
        return results


def serve_scripted(tmp_path, reply, units, template=None, max_model_len=4096, **changed):
    """Run `serve` over `units` -> (records by unit, what it refused or None, the engine)."""
    from conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer(template) if template else tiny_tokenizer()
    sampling = {"temperature": 1.0, "max_tokens": 64}
    config = {
        "questions": load_questions(write_questions(tmp_path / "q.json", 4)),
        "sampling": sampling,
        "seed": 0,
        "retries": 0,
    }
    config |= {"protocol": "reasoning", "system_prompt": "Fikir.", "chat_template_kwargs": {}, **changed}
    ours, theirs = Pipe()
    engine = Scripted(reply, max_model_len)
    loop = threading.Thread(target=serve, args=(theirs, engine, None, tokenizer, config), daemon=True)
    loop.start()
    ours.send(("units", units))
    records, refused = {}, None
    while len(records) < len(units) and refused is None:
        assert ours.poll(60), "no word from serve"
        kind, content = ours.recv()
        refused = content if kind == "refused" else None
        records |= {(r["index"], r["sample"]): r for r in content} if kind == "records" else {}
    ours.send(("end", None))
    loop.join(60)
    return records, refused, engine


def test_an_unreadable_answer_is_asked_again_with_another_seed_as_often_as_retries_say(tmp_path):
    readable = ("0-0-2", "1-0-0")  # question, sample, attempt
    reply = lambda name: ("Jawapan: A" if name in readable else "Entahlah", "stop")  # noqa: E731
    records, _, engine = serve_scripted(tmp_path, reply, [(0, 0), (1, 0), (2, 0)], retries=2)
    assert [records[i, 0].get("attempts") for i in range(3)] == [3, None, 3]
    assert [records[i, 0]["text"] for i in range(3)] == ["Jawapan: A", "Jawapan: A", "Entahlah"]
    assert len(engine.asked) == 7 and len({params.seed for _, params in engine.asked}) == 7
    records, _, engine = serve_scripted(tmp_path, reply, [(0, 0), (2, 0)])
    assert len(engine.asked) == 2 and records[0, 0]["text"] == "Entahlah"


def test_a_template_that_opens_the_reasoning_is_noted_and_its_marker_kept_in_the_text(tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor"
        " %}<|im_start|>assistant\n<think>\n"
    )
    records, _, engine = serve_scripted(tmp_path, lambda name: ("Mungkin A", "length"), [(0, 0)], template=template)
    assert records[0, 0]["thinking"] is True
    # <think> is special in this tokenizer, and reasoning ends at </think>
    assert engine.asked[0][1].skip_special_tokens is False
    records, _, _ = serve_scripted(tmp_path, lambda name: ("A", "stop"), [(0, 0)])
    assert "thinking" not in records[0, 0]


def test_a_prompt_that_leaves_no_room_is_refused_by_name(tmp_path):
    _, refused, _ = serve_scripted(tmp_path, lambda name: ("A", "stop"), [(1, 2)], max_model_len=100)
    assert refused.startswith("question 1 (id 101) has a prompt of") and "--max_model_len" in refused


# ---- what vLLM is asked for ------------------------------------------------------------------------------------------


def engine_config(model, **changed):
    config = {
        "model": model,
        "adapter": None,
        "serve_lora": False,
        "device": "cuda",
        "engines": 4,
        "tensor_parallel": 2,
        "seed": 0,
    }
    config |= {
        "max_num_seqs": 256,
        "enforce_eager": False,
        "gpu_memory_utilization": 0.92,
        "max_model_len": None,
        "dtype": "auto",
    }
    return config | {"batch_invariant": True, "sampling": {"temperature": 1.0, "max_tokens": 4096}} | changed


@pytest.mark.parametrize("serve_lora", [None, True, False])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_vllm_takes_the_arguments_of_every_kind_of_engine(tiny, tmp_path, device, serve_lora):
    """The engines of a GPU cannot run here, but vLLM's own EngineArgs is what checks their arguments."""
    from vllm import EngineArgs

    adapter = None
    if serve_lora is not None:
        write_adapter(tmp_path / "checkpoint-1", tiny, 256)
        adapter = str(tmp_path / "checkpoint-1")
    options, lora = llm_options(engine_config(tiny, device=device, adapter=adapter, serve_lora=bool(serve_lora)))
    made = EngineArgs(**options)
    assert (made.tensor_parallel_size, made.max_num_seqs, made.enable_prefix_caching) == (2, 256, True)
    assert made.load_format == ("merge_adapter" if serve_lora is False else "auto")
    assert (made.enable_lora, made.max_lora_rank, lora is not None) == (
        (True, 256, True) if serve_lora else (False, 16, False)
    )


def test_batch_invariance_is_what_the_flag_says_and_vllm_reads_it(monkeypatch):
    import vllm.envs

    for left_behind in ("0", "1"):
        for flag in (True, False):
            monkeypatch.setenv("VLLM_BATCH_INVARIANT", left_behind)
            for name in ("CUDA_VISIBLE_DEVICES", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK", "TOKENIZERS_PARALLELISM"):
                monkeypatch.setenv(name, os.environ.get(name, "1"))  # so that it is put back afterwards
            engine_environment(["0", "1"], engine_config("m", batch_invariant=flag))
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
            assert vllm.envs.environment_variables["VLLM_BATCH_INVARIANT"]() is flag
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ValueError, match="--batch_invariant needs a GPU"):
        malaymmlu.plan_engines(arguments(batch_invariant=True))


# ---- real engines ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Qwen3 checkpoint; vLLM's CPU attention wants heads of at least 32."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "qwen3", head_dim=32)


def command(*given):
    return [
        sys.executable,
        str(ROOT / "malaymmlu.py"),
        "--log_every",
        "2",
        "--restart_backoff",
        "0.1",
        *map(str, given),
    ]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_KVCACHE_SPACE": "1"}


def group_of_engines(driver):
    """Process ids of the engine processes of a driver: its children that lead a group of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == driver and int(fields[2]) == int(path.parent.name):
            found.append(int(path.parent.name))
    return sorted(found)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early with {process.returncode}: {Path(process.log).read_text()[-3000:]}"
        assert time.monotonic() < end, "waited too long: " + Path(process.log).read_text()[-3000:]
        time.sleep(0.05)


def start(cwd, name, *given):
    log = cwd / f"{name}.txt"
    with open(log, "w") as file:
        process = subprocess.Popen(command(*given), cwd=cwd, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    process.log = log
    return process


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def disk(tmp_path):
    """A file system of its own: (its directory, a function that sets its size in bytes, why there is none or None)."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", where], capture_output=True, text=True)
    why = mounted.stderr.strip() or "mount failed" if mounted.returncode else None
    yield where, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", where], check=True), why
    if not mounted.returncode:
        subprocess.run(["umount", "-l", where], check=True)


def test_killed_and_hung_engines_a_killed_driver_and_a_full_disk_lose_and_repeat_nothing(tiny, tmp_path, disk):
    """Two engines. One is killed, one is stopped (hangs): both are replaced. Then the driver is killed. The same
    command goes on until the disk is full, which it says in one line; with room again, it finishes."""
    count = 90
    root, resize, no_disk = disk
    flags = [
        "--base",
        tiny,
        "--questions",
        write_questions(tmp_path / "q.json", count),
        "--num_gpus",
        2,
        "--max_tokens",
        300,
    ]
    flags += ["--max_num_seqs", 4, "--hang_timeout", 10, "--dtype", "float32", "--output_root", root]
    path = root / "malaymmlu-tiny/generations.jsonl"
    driver = start(tmp_path, "first", *flags)
    said = lambda: driver.log.read_text()  # noqa: E731
    wait_for(lambda: lines(path) >= 8 and said().count("is ready") == 2, driver)
    engines = group_of_engines(driver.pid)
    assert len(engines) == 2
    os.kill(engines[0], signal.SIGKILL)
    os.kill(engines[1], signal.SIGSTOP)
    second = subprocess.run(command(*flags), cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert second.returncode == 1 and f"process {driver.pid})" in second.stderr
    before = lines(path)
    # the killed one is replaced within moments and works alone until the silence of the other is noticed
    both = ("its process is gone", "has been silent for")
    wait_for(
        lambda: all(words in said() for words in both) and said().count("is ready") >= 3 and lines(path) >= before + 20,
        driver,
    )
    assert path.read_bytes().endswith(b"\n") and lines(path) < 3 * count, (
        "the run ended before the driver could be killed"
    )
    engines += group_of_engines(driver.pid)
    driver.kill()
    driver.wait()
    end = time.monotonic() + 20
    while not all(gone(pid) for pid in engines):
        assert time.monotonic() < end, "engines outlived their driver"
        time.sleep(0.1)
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"index": 7, "id": 107, "samp')
    flags[flags.index("--num_gpus") + 1] = 1  # how many engines there are changes no answer
    if no_disk is None:
        space = os.statvfs(root)
        # room for the engine's log and some answers
        resize((space.f_blocks - space.f_bfree) * space.f_frsize + (32 << 10))
        full = subprocess.run(
            command(*flags), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900
        )
        assert full.returncode == 1 and "cut off a half-written last line" in full.stdout, full.stdout + full.stderr
        assert (
            "Traceback" not in full.stderr and path.read_bytes().startswith(kept) and path.read_bytes().endswith(b"\n")
        )
        error = full.stderr.strip().splitlines()[-1]
        assert error.startswith("error: ") and "o space left on" in error, error
        assert f"{lines(path)} of {3 * count} samples are safe; make room and run the same command again" in error
        assert lines(path) < 3 * count
        kept = path.read_bytes()
        resize("64m")
    missing = 3 * count - kept.count(b"\n")
    again = subprocess.run(
        command(*flags), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert (
        f"{3 * count - missing} of {3 * count} samples there, {missing} to make" in again.stdout
        and "leaked" not in again.stderr
    )
    assert path.read_bytes().startswith(kept)
    records = read(path)
    assert Counter((r["index"], r["sample"]) for r in records) == {(i, s): 1 for i in range(count) for s in range(3)}
    assert all(
        r["id"] == 100 + r["index"] and 1 <= r["completion_tokens"] <= 300 and r["prompt_tokens"] > 50 for r in records
    )
    # three samples of a question are three draws
    texts = {(r["index"], r["sample"]): r["text"] for r in records}
    assert sum(len({texts[i, s] for s in range(3)}) == 3 for i in range(count)) > 0.95 * count
    changed = subprocess.run(
        command(*flags, "--seed", 1), cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert changed.returncode == 1 and "generated with seed = 0, now it is 1" in changed.stderr
    if no_disk:
        pytest.skip(
            f"everything passed but for the full disk, because mounting a tmpfs is not permitted here: {no_disk}"
        )


def first_token_logprobs(model, tokenizer, question):
    """({letter: log-probability}, tokens of the prompt) of a question by the official protocol, by transformers."""
    import torch

    text = (
        f"Berikut adalah soalan aneka pilihan tentang Matematik. Sila berikan jawapan sahaja.\n\n{question['prompt']}"
        "\nJawapan:"
    )
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(rendered, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
    return {
        letter: float(logprobs[tokenizer.convert_tokens_to_ids(letter)]) for letter in question["letters"]
    }, ids.shape[1]


@pytest.mark.parametrize("how", ["merged, two tensor-parallel ranks", "served as LoRA"])
def test_one_engine_answers_for_every_checkpoint_as_transformers_does(tiny, tmp_path, how):
    """One engine takes the weights of one checkpoint after another, and each answers as PEFT in transformers does,
    letter by letter. Rows ask the same prompts, so keys and values left in the cache would show."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    served = how == "served as LoRA"
    models = {"malaymmlu-tiny": tiny_model("qwen3", head_dim=32)}
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for step, dora in ((7, False), (9, not served)):
        torch.manual_seed(step)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=every, use_dora=dora)
        model = get_peft_model(tiny_model("qwen3", head_dim=32), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.peft_config["default"].base_model_name_or_path = tiny
        model.save_pretrained(tmp_path / f"outputs/run/checkpoint-{step}")
        models[f"malaymmlu-tiny-{'dora' if dora else 'lora'}-8-{step}"] = model
    questions = write_questions(tmp_path / "q.json", 12)
    given = ["--pattern", "tiny-*", "--questions", questions, "--protocol", "first_token", "--dtype", "float32"]
    given += ["--serve_lora", "--num_gpus", 1] if served else ["--num_gpus", 2, "--gpu_partition", 2]
    run = subprocess.run(command(*given), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=900)
    logs = "".join(path.read_text()[-3000:] for path in tmp_path.glob("malaymmlu-*/engine-*.log"))
    assert run.returncode == 0, run.stdout + run.stderr + logs
    # served adapters need an engine with room for them, which the base's has not
    assert run.stdout.count("engine 0 loads, log") == (2 if served else 1) and "could not" not in run.stdout
    assert run.stdout.count("engine 0 loads weights in place, log") == 2
    tokenizer, picks = AutoTokenizer.from_pretrained(tiny), set()
    for name, model in models.items():
        settings = json.loads((tmp_path / name / "args.json").read_text())
        adapted = name != "malaymmlu-tiny"
        assert settings["how"] == (how.split(",")[0].replace("merged", "merged while loading") if adapted else None)
        assert settings["protocol"] == "first_token" and settings["engines"]["tensor_parallel"] == (1 if served else 2)
        records = {r["index"]: r for r in read(tmp_path / name / "generations.jsonl")}
        assert sorted(records) == list(range(12))
        model.eval()
        for question in load_questions(questions):
            expected, tokens = first_token_logprobs(model, tokenizer, question)
            found = records[question["index"]]
            assert found["prompt_tokens"] == tokens and found["logprobs"] == pytest.approx(expected, abs=2e-4)
            assert found["text"] == max(expected, key=expected.get)
            picks.add(found["text"])
    assert json.loads((tmp_path / "malaymmlu-tiny-lora-8-7/args.json").read_text())["names"] == [
        "run-checkpoint-7",
        "tiny-lora-8-7",
    ]
    assert len(picks) > 1, "a test that always sees the same letter proves little"
