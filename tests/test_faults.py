"""What goes wrong on a shared cluster, and what a run then does: both trainers through the same table of faults."""

import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import multipack
import train_dense
import train_moe
from conftest import save_tiny_checkpoint, tiny_tokenizer
from malaysian_sft import adapter_state, checkpoints, ranks, resume_state, run
from malaysian_sft.conversations import DataArguments
from malaysian_sft.lora import WEIGHTS
from malaysian_sft.resume_state import Share, StateReader, state_fault, write_index, write_shares
from malaysian_sft.watchdog import process_state

ROOT = Path(__file__).resolve().parent.parent
TRAINERS = {"moe": ("qwen3_moe", train_moe, "--dtype float32"), "dense": ("llama", train_dense, "--bf16 False")}
STEPS = 4
FLAGS = (
    "--max_seq_length 128 --global_batch_size 2 --r 4 --warmup_steps 2 --learning_rate 1e-2 --activations none"
    " --report_to none --preprocessing_num_workers 1 --save_steps 1"
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    for name, (family, _, _) in TRAINERS.items():
        save_tiny_checkpoint(root / name, family, num_hidden_layers=1)
    rows = [{"question": f"Berapa {i} + 1?", "answer": f"Jawapannya {i + 1}. " + "Kira. " * (i % 3)} for i in range(16)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def train(workspace, monkeypatch):
    """train(trainer, output directory, *flags): its main in this process."""

    def train(trainer, out, *flags):
        _, module, dtype = TRAINERS[trainer]
        argv = f"{FLAGS} {dtype} --model_name_or_path {workspace / trainer} --dataset {workspace}/train.jsonl"
        argv += f" --data_cache {workspace}/cache --run_name run --output_dir {out} --max_steps {STEPS}"
        argv += " --save_strategy steps --disable_tqdm True" if trainer == "dense" else ""
        monkeypatch.setattr(sys, "argv", [module.__file__, *argv.split(), *map(str, flags)])
        module.main()

    return train


@pytest.fixture(scope="module")
def unbroken(workspace):
    """{trainer: the directory of a run of STEPS steps, a checkpoint after each}."""
    found = {}
    patch = pytest.MonkeyPatch()
    run_to_the_end = train.__wrapped__ if hasattr(train, "__wrapped__") else train.__pytest_wrapped__.obj
    for trainer in TRAINERS:
        found[trainer] = workspace / f"unbroken-{trainer}"
        run_to_the_end(workspace, patch)(trainer, found[trainer])
    patch.undo()
    return found


@pytest.fixture(params=TRAINERS)
def trainer(request):
    return request.param


@pytest.fixture
def copy(trainer, unbroken, tmp_path):
    """A copy of the unbroken run, for damage."""
    return Path(shutil.copytree(unbroken[trainer], tmp_path / "run"))


def records(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def same(found, expected):
    return found == [pytest.approx(line, rel=1e-4) for line in expected]


def tree(out):
    """What is in a run's directory, byte for byte, but for the lock."""
    return {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"}


def ends(train, *arguments):
    """The last line of a run that ends by SystemExit."""
    with pytest.raises(SystemExit) as ended:
        train(*arguments)
    return str(ended.value)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints that are damaged
# ----------------------------------------------------------------------------------------------------------------------


def flip(path, place=0.5):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


class Touch:
    """What a pickle of this executes when it is read: it makes the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mknod, (str(self.path),)


def plant(name):
    def damage(checkpoint):
        path = checkpoint / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(Touch(checkpoint.parent / "executed")))

    return damage


STATE = "resume/rank-00000.safetensors"
DAMAGES = {
    "state cut short": (
        lambda c: os.truncate(c / STATE, (c / STATE).stat().st_size // 2),
        f"{STATE} is cut short",
    ),
    "a bit of the state": (lambda c: flip(c / STATE, 0.9), f"{STATE} is damaged: its checksum is another"),
    "a bit of the adapter": (lambda c: flip(c / WEIGHTS, 0.9), f"{WEIGHTS} is damaged: its checksum is another"),
    "a digit of the index": (
        lambda c: (p := c / "resume/position.json").write_text(p.read_text().replace('"step": 4', '"step": 3')),
        "resume/position.json is damaged: its checksum is another",
    ),
    "no index": (lambda c: (c / "resume/position.json").unlink(), "resume/position.json is not there"),
    "an index that is none": (
        lambda c: (c / "resume/position.json").write_text("[" * 10**5),
        "resume/position.json cannot be read",
    ),
    "no state": (lambda c: (c / STATE).unlink(), f"{STATE} is not there"),
    "a pickle in resume/": (plant("resume/.metadata"), "resume/.metadata is not listed in position.json"),
    "a pickle beside it": (plant("optimizer.pt"), "optimizer.pt may be a pickle, which could execute"),
    "DeepSpeed's pickles": (
        plant("global_step4/mp_rank_00_model_states.pt"),
        "global_step4 may be a pickle, which could execute",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name(damage, copy):
    """The one before it still has what to go on from; nothing that was planted executes."""
    mend, words = DAMAGES[damage]
    mend(copy / f"checkpoint-{STEPS}")
    said = []
    found = checkpoints.newest_checkpoint(copy, True, said.append)
    assert found == copy / f"checkpoint-{STEPS - 1}"
    (line,) = said
    assert line.startswith(f"--resume: {copy}/checkpoint-{STEPS} is incomplete ({words}")
    assert not (copy / "executed").exists()


def test_resumed_from_the_one_before_equals_unbroken(copy, trainer, unbroken, train, capsys):
    flip(copy / f"checkpoint-{STEPS}" / STATE, 0.7)
    expected = load_file(copy / f"checkpoint-{STEPS}" / WEIGHTS)
    train(trainer, copy, "--resume", "True")
    assert f"resuming from {copy}/checkpoint-{STEPS - 1}" in capsys.readouterr().out
    assert same(records(copy), records(unbroken[trainer]))
    found = load_file(copy / f"checkpoint-{STEPS}" / WEIGHTS)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert state_fault(copy / f"checkpoint-{STEPS}") is None, "written again"


def test_no_damage_is_missed(copy):
    """Five hundred mutations a trainer of the files that a resumed run reads: none is taken for what was saved."""
    generator = random.Random(0)
    checkpoint = copy / f"checkpoint-{STEPS}"
    assert state_fault(checkpoint) is None
    files = [checkpoint / name for name in ("resume/position.json", STATE, *resume_state.BESIDE)]
    files = [path for path in files if path.exists()]
    for number in range(500):
        path = generator.choice(files)
        before = path.read_bytes()
        content, place = bytearray(before), generator.randrange(len(before))
        if number % 3 == 0:
            content[place] ^= 1 << generator.randrange(8)
        elif number % 3 == 1:
            del content[place : place + generator.randint(1, 9)]
        else:
            content[place:place] = generator.randbytes(generator.randint(1, 9))
        path.write_bytes(content)
        meant = path.name == "position.json" and _same_json(before, content)  # white space, say
        assert meant or state_fault(checkpoint) is not None, (path, number, place)
        path.write_bytes(before)


def _same_json(one, other):
    with suppress(ValueError):
        return json.loads(one) == json.loads(bytes(other))
    return False


def test_where_all_are_damaged_nothing_is_touched(copy, trainer, train):
    for step in (STEPS - 1, STEPS):
        flip(copy / f"checkpoint-{step}" / STATE)
    before = tree(copy)
    line = ends(train, trainer, copy, "--resume", "True")
    assert line.startswith(f"error: --resume: no checkpoint under {copy} can be gone on from (checkpoint-{STEPS}: ")
    assert line.endswith("--start_anew True") and tree(copy) == before
    train(trainer, copy, "--start_anew", "True", "--max_steps", 1)
    assert {copy / "replaced-1" / path.relative_to(copy): content for path, content in before.items()}.items() <= (
        tree(copy).items()
    )
    assert [path.name for path in copy.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("trainer", "flag"),
    [
        ("moe", "--target_modules q_proj"),
        ("moe", "--dtype bfloat16"),
        ("dense", "--target_modules q_proj"),
        ("dense", "--bf16 True"),
        ("dense", "--adam_beta2 0.5"),
    ],
)
def test_a_run_with_other_layers_or_arithmetic_is_another_run(flag, trainer, copy, train):
    shutil.rmtree(copy / "checkpoint-4")
    before = tree(copy)
    line = ends(train, trainer, copy, "--resume", "True", *flag.split())
    assert line.startswith(f"error: --resume: {flag.split()[0][2:]} is ") and tree(copy) == before


def test_what_is_no_run_is_not_put_aside(trainer, train, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    line = ends(train, trainer, tmp_path, "--start_anew", "True")
    assert "thesis.tex but no args.json" in line and (tmp_path / "thesis.tex").exists()
    for name in (" ", "/", "..", ".", "../thesis", "/tmp/run"):
        with pytest.raises(ValueError, match=f"^--run_name '{name}': expected a name without a slash"):
            run.output_directory(SimpleNamespace(output_dir=None, run_name=name))
    assert run.output_directory(SimpleNamespace(output_dir="/tmp/run", run_name="..")) == "/tmp/run"
    assert run.output_directory(SimpleNamespace(output_dir=None, run_name="a b")) == "outputs/a b"


def test_a_finished_run_that_is_resumed_trains_nothing(copy, trainer, unbroken, train):
    before = {path: content for path, content in tree(copy).items() if path.name != "args.json"}
    for _ in range(2):
        train(trainer, copy, "--resume", "True")
    assert {path: content for path, content in tree(copy).items() if path.name != "args.json"} == before


def test_another_run_is_refused_before_anything_is_written(copy, trainer, train):
    before = tree(copy)
    for flags, words in {"--seed 5": "seed is 5, but .* says 42", "--r 8": "r is 8, but .* says 4"}.items():
        with pytest.raises(SystemExit, match=f"error: --resume: {words}"):
            train(trainer, copy, "--resume", "True", *flags.split())
    assert tree(copy) == before


def test_shares_of_any_number_of_ranks_are_read_by_any_other(tmp_path):
    """13 elements written by 1 to 5 ranks, read in 1 to 5 parts: always the same 13."""
    whole = torch.arange(13.0)
    for writers in range(1, 6):
        checkpoint = tmp_path / str(writers)
        (checkpoint / "resume").mkdir(parents=True)
        size, files = -(-13 // writers), {}
        for rank in range(writers):
            start = min(rank * size, 13)
            files |= write_shares(checkpoint / "resume", rank, {"x": Share(whole[start : start + size], start, 13)})
        write_index(checkpoint, {"step": 1, "updates": 1, "facts": {}}, files)
        assert state_fault(checkpoint) is None
        reader = StateReader(checkpoint)
        for readers in range(1, 6):
            cuts = [13 * i // readers for i in range(readers + 1)]
            parts = [reader.read("x", low, high, 13) for low, high in zip(cuts, cuts[1:], strict=False)]
            assert torch.equal(torch.cat(parts), whole)
        with pytest.raises(ValueError, match="13 elements of x, the model 14"):
            reader.read("x", 0, 14, 14)
        with pytest.raises(ValueError, match="no elements of y, the model 13"):
            reader.read("y", 0, 13, 13)


def test_a_damaged_token_cache_is_refused_by_name(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "Siapa?", "answer": "Ali."}\n' * 4)
    data_args = DataArguments(str(tmp_path / "train.jsonl"), max_seq_length=64, data_cache=str(tmp_path / "cache"))
    multipack.prepare(data_args, tiny_tokenizer(), "tiny")
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    files = [path for path in meta.parent.iterdir() if path.suffix in (".bin", ".npy")]
    assert len(files) == 5
    for path in files:
        before = path.read_bytes()
        flip(path, 0.95)
        with pytest.raises(ValueError, match=f"{path.name}: damaged or not there; delete {meta.parent}"):
            multipack.prepare(data_args, tiny_tokenizer(), "tiny")
        path.write_bytes(before)
    multipack.prepare(data_args, tiny_tokenizer(), "tiny")


# ----------------------------------------------------------------------------------------------------------------------
# While a run is on
# ----------------------------------------------------------------------------------------------------------------------


def each_micro_batch(monkeypatch, trainer, before):
    """Have before(micro-batch's number, its batch) called before each forward in a run, from 1; what it returns
    multiplies the loss."""
    seen = []

    def number(batch):
        seen.append(1)
        return before(len(seen), batch)

    if trainer == "moe":
        forward = train_moe.load_model

        def load_model(*args):
            peft_model, model = forward(*args)
            inner = model.forward

            def called(batch):
                factor = number(batch) if model.training else None
                loss, auxiliary = inner(batch)
                return loss * (1 if factor is None else factor), auxiliary

            model.forward = called
            return peft_model, model

        monkeypatch.setattr(train_moe, "load_model", load_model)
        return
    compute_loss = train_dense.DenseTrainer.compute_loss

    def called(self, model, inputs, *args, **options):
        factor = number(inputs)
        loss = compute_loss(self, model, inputs, *args, **options)
        return loss * (1 if factor is None else factor)

    monkeypatch.setattr(train_dense.DenseTrainer, "compute_loss", called)


def test_a_step_that_is_not_finite_changes_nothing(trainer, unbroken, train, tmp_path, monkeypatch, capsys):
    """Its documents are kept, the schedule goes on, and training after it is finite."""
    out = tmp_path / "run"
    each_micro_batch(monkeypatch, trainer, lambda number, _: math.nan if number == 4 else 1)  # the second of step 2
    train(trainer, out)
    printed = capsys.readouterr().out
    assert printed.count("skipped; its documents are in") == 1 and "step 2: loss nan" in printed
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    assert [line.get("skipped_steps") for line in steps] == [None, 1, None, None]
    assert math.isnan(steps[1]["loss"]) and all(math.isfinite(steps[i]["loss"]) for i in (0, 2, 3))
    before = [json.loads(line) for line in (unbroken[trainer] / "log.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in before if "loss" in line]
    assert [line["learning_rate"] for line in steps] == pytest.approx(rates)
    adapters = [load_file(out / f"checkpoint-{step}" / WEIGHTS) for step in (1, 2, 3)]
    assert all(torch.equal(adapters[0][name], tensor) for name, tensor in adapters[1].items())
    assert any(not torch.equal(adapters[1][name], tensor) for name, tensor in adapters[2].items())
    (record,) = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert record["step"] == 2 and len(set(record["documents"])) == len(record["documents"]) > 0


def test_too_many_in_a_row_end_the_run(trainer, train, tmp_path, monkeypatch):
    each_micro_batch(monkeypatch, trainer, lambda number, _: math.inf if number > 2 else 1)
    line = ends(train, trainer, tmp_path / "run", "--max_skipped_steps", 2)
    assert line.startswith("error: step 3: loss ") and "2 steps in a row were not finite and changed nothing" in line
    assert len((tmp_path / "run/skipped.jsonl").read_text().splitlines()) == 2
    found = checkpoints.newest_checkpoint(tmp_path / "run", True, print)
    one = load_file(tmp_path / "run/checkpoint-1" / WEIGHTS)
    assert all(torch.equal(one[name], tensor) for name, tensor in load_file(found / WEIGHTS).items())


NOT_FINITE_ON_RANK_1 = """
import math, train_dense
compute_loss = train_dense.DenseTrainer.compute_loss

def not_finite(self, *args, **options):
    wrong = self.state.global_step == 1 and self.args.process_index == 1
    return compute_loss(self, *args, **options) * (math.nan if wrong else 1)

train_dense.DenseTrainer.compute_loss = not_finite
train_dense.main()
"""


@pytest.mark.slow
def test_zero3_skips_a_step_that_is_not_finite(workspace, unbroken, tmp_path):
    """In bf16, where DeepSpeed itself looks at no gradient; the schedule goes on."""
    (tmp_path / "rank.py").write_text(NOT_FINITE_ON_RANK_1)
    out = tmp_path / "run"
    flags = f"{FLAGS} --model_name_or_path {workspace}/dense --dataset {workspace}/train.jsonl --data_cache"
    flags += (
        f" {workspace}/cache --output_dir {out} --max_steps {STEPS} --save_strategy steps --deepspeed {ROOT}/ds3.json"
    )
    command = [sys.executable, "-m", "malaysian_sft.launch", "--standalone", "--nproc_per_node", "2", "--"]
    done = subprocess.run(
        [*command, str(tmp_path / "rank.py"), *flags.replace("--r ", "--lora_r ").split()],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (unbroken["dense"] / "log.jsonl").read_text().splitlines()]
    for found, expected in zip(log[:STEPS], before[:STEPS], strict=True):
        assert found["learning_rate"] == pytest.approx(expected["learning_rate"])
        assert math.isfinite(found["loss"]) == (found["step"] != 2)
    adapters = [load_file(out / f"checkpoint-{step}" / WEIGHTS) for step in (1, 2, 3)]
    assert all(torch.equal(adapters[0][name], tensor) for name, tensor in adapters[1].items())
    assert any(not torch.equal(adapters[1][name], tensor) for name, tensor in adapters[2].items())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_in_a_step_saves_and_resumes_equal(name, trainer, unbroken, train, tmp_path, monkeypatch, capsys):
    """Told in the first of step 3's two micro-batches: the step is dropped, step 2 is saved."""
    out, handlers = tmp_path / "run", [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        each_micro_batch(
            patch, trainer, lambda number, _: signal.raise_signal(signal.Signals[name]) if number == 5 else None
        )
        with pytest.raises(SystemExit) as ended:  # what follows in a script is not for a run that is not finished
            train(trainer, out, "--save_steps", 100)
    assert ended.value.code == 128 + signal.Signals[name]
    assert f"stopped by {name} after step 2; go on with --resume" in capsys.readouterr().out
    assert len(records(out)) == 2 and [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    train(trainer, out, "--resume", "True")
    assert same(records(out), records(unbroken[trainer]))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_loading_ends_with_a_line(name, trainer, train, tmp_path, monkeypatch):
    """In a process of its own, which ends at once: no traceback, no checkpoint."""
    monkeypatch.setattr(TRAINERS[trainer][1], "build_model", lambda *_: signal.raise_signal(signal.Signals[name]))
    child = os.fork()
    if child == 0:
        os.dup2(os.open(tmp_path / "stderr", os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w")
        code = 0
        try:
            train(trainer, tmp_path / "run")
        except SystemExit as ended:
            code = ended.code
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.Signals[name]
    printed = (tmp_path / "stderr").read_text()
    assert printed.splitlines()[-1] == f"stopped by {name} while loading; nothing was trained"
    assert "Traceback" not in printed and list((tmp_path / "run").iterdir()) == [tmp_path / "run/.lock"]


def test_a_full_disk_is_said_at_once(trainer, copy, train, monkeypatch):
    """Before anything is written where the disk tells; where it doesn't (a quota), when the first file doesn't fit."""
    shutil.rmtree(copy / f"checkpoint-{STEPS}")
    kept = {path: content for path, content in tree(copy).items() if "checkpoint" in str(path)}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        line = ends(train, trainer, copy, "--resume", "True")
    assert f"error: {copy}: the disk is full, checkpoint-{STEPS} is not saved (" in line and "are free" in line

    def full(*_):
        raise OSError(28, "No space left on device")

    for written_by in (resume_state, adapter_state):
        with monkeypatch.context() as patch:
            patch.setattr(written_by, "save_tensors", full)
            line = ends(train, trainer, copy, "--resume", "True")
        assert line.startswith(f"error: {copy}: the disk is full, checkpoint-{STEPS} is not saved (no space left")
        assert line.endswith("earlier checkpoints are whole: make room and go on with --resume")
        assert {path: content for path, content in tree(copy).items() if "checkpoint" in str(path)} == kept
        assert not (copy / ".saving").exists(), "it would fill the disk"
    train(trainer, copy, "--resume", "True")
    assert len(records(copy)) == STEPS


def test_a_save_that_fails_in_the_background_ends_the_run_soon(train, tmp_path, monkeypatch):
    """train_moe.py writes while it trains: the run ends within a step of the fault, not at the next save."""
    failed, steps = [], []

    def fail(*args):
        failed.append(1)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "write_shares", fail)
    forward_backward = train_moe.forward_backward

    def after_the_save(*args):
        steps.append(1)
        deadline = time.monotonic() + 30
        while len(steps) == 3 and not failed and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1 if failed else 0)  # the thread clears up what it wrote
        return forward_backward(*args)

    monkeypatch.setattr(train_moe, "forward_backward", after_the_save)
    line = ends(train, "moe", tmp_path / "run", "--save_steps", 2)
    assert "checkpoint-2 is not saved: [Errno 5] Input/output error" in line and len(records(tmp_path / "run")) == 2


def test_a_run_that_ended_while_this_one_waited_is_not_written_over(trainer, unbroken, train, tmp_path, monkeypatch):
    """What is in the directory is looked at after it is claimed."""
    claim, out = run.claim, tmp_path / "run"

    def late(directory):
        lock = claim(directory)
        shutil.copytree(unbroken[trainer], out, dirs_exist_ok=True)  # the other run, just before it let go
        return lock

    monkeypatch.setattr(TRAINERS[trainer][1], "claim", late)
    line = ends(train, trainer, out)
    assert line.startswith(f"error: {out}/checkpoint-{STEPS} exists: pass --resume")
    assert {path.relative_to(out) for path in tree(out)} == {
        p.relative_to(unbroken[trainer]) for p in tree(unbroken[trainer])
    }


def test_a_second_launcher_is_refused(trainer, copy, train):
    before = tree(copy)
    with run.claim(copy):
        line = ends(train, trainer, copy, "--resume", "True")
    assert line.startswith(f"error: {copy}: another process is training there") and tree(copy) == before


# ----------------------------------------------------------------------------------------------------------------------
# Trackers and values
# ----------------------------------------------------------------------------------------------------------------------


def test_a_tracker_that_fails_does_not_end_a_run(trainer, unbroken, train, tmp_path, monkeypatch, capsys):
    """It starts, and its second record fails."""
    sent = []

    def log(values):
        sent.append(values)
        if len(sent) == 2:
            raise OSError(28, "No space left on device")

    tracker = SimpleNamespace(init=lambda **_: None, log=log, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    train(trainer, tmp_path / "run", "--report_to", "trackio")
    printed = capsys.readouterr().out
    assert printed.count("the tracker failed") == 1 and "No space left on device" in printed and len(sent) == 2
    assert same(records(tmp_path / "run"), records(unbroken[trainer]))
    assert sent[0]["train/global_step"] == 1 and "train/loss" in sent[0]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no server", "its server doesn't answer; offline"),
        ("init fails", "'no permission to write'; going on without it"),
    ],
)
def test_a_tracker_that_cannot_start_does_not_end_a_run(fault, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "online" if fault == "no server" else "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    modes = []

    def init(**options):
        modes.append(options["mode"])
        if fault == "init fails":
            raise wandb.Error("no permission to write")

    wandb = SimpleNamespace(Error=type("Error", (Exception,), {}), init=init, define_metric=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    started = time.monotonic()
    tracker = run.start_tracker("wandb", "project", "run", str(tmp_path), {})
    assert time.monotonic() - started < 10 and modes == ["offline"]
    assert (tracker is wandb) == (fault == "no server") and words in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag",
    """--r 0|--lora_alpha 0|--lora_alpha -4|--lora_dropout 1|--lora_dropout nan|--expert_r -1|--warmup_steps -5|
    --learning_rate nan|--learning_rate inf|--weight_decay -1|--max_grad_norm 0|--global_batch_size 0|--seed -1|
    --num_train_epochs 0|--save_steps 0|--max_skipped_steps 0""".replace("\n", "")
    .replace(" " * 4, "")
    .split("|"),
)
def test_a_value_that_no_run_can_have_is_refused_before_anything(flag, trainer, train, tmp_path):
    line = ends(train, trainer, tmp_path / "run", *flag.split())
    name, value = flag.split()
    assert line.startswith(f"error: {name} {value}") and ": expected a number" in line.replace("a positive", "a")
    assert not (tmp_path / "run").exists()


def test_what_only_one_trainer_has_is_checked_too(train, tmp_path):
    for trainer, flag, words in (
        ("moe", "--router_aux_loss_coef nan", "--router_aux_loss_coef nan: expected a number of at least 0"),
        ("moe", "--shard_nodes 0", "--shard_nodes 0: expected a positive number"),
        ("dense", "--logging_steps 0", "--logging_steps 0.0: expected a positive number"),
        ("dense", "--optim adafactor", "--optim adafactor: expected one of adamw_torch, adamw_torch_fused"),
        ("dense", "--lr_scheduler_type reduce_lr_on_plateau", "reduce_lr_on_plateau: its rate"),
        ("dense", "--report_to nosuch", "nosuch"),
        ("dense", "--max_steps 0", "--max_steps 0: expected a positive number, or -1"),
        ("dense", "--data_seed 3", "--data_seed 3 is not for this trainer: pass --seed"),
        ("dense", "--gradient_accumulation_steps 7", "it follows from --global_batch_size"),
        ("dense", "--resume_from_checkpoint x", "pass --resume"),
    ):
        assert words in ends(train, trainer, tmp_path / "run", *flag.split())


# ----------------------------------------------------------------------------------------------------------------------
# Several ranks: both trainers end through ranks.py under launch.py; here a process that has nothing else
# ----------------------------------------------------------------------------------------------------------------------

RANK = """
import os, signal, sys, time
import torch, torch.distributed as dist
from malaysian_sft.ranks import Stop, one_last_line

def steps(stop):
    dist.init_process_group("gloo")
    print(f"pid {os.getpid()}\\n", end="", flush=True)  # one write: without a buffer, parts of two ranks' could mix
    stop.watch(4 if FAULT == "stop one" else 100)
    stop.begin_training()
    for step in range(600):
        if FAULT == "an error" and dist.get_rank() == 1 and step == 3:
            raise ValueError("rank 1 can go no further")
        if FAULT == "kill one" and dist.get_rank() == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "stop one" and dist.get_rank() == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.05)
        if stop.agreed():
            print(f"saved after {stop.told}\\n", end="", flush=True)
            return

FAULT = sys.argv[1]
with one_last_line(), Stop() as stop:
    steps(stop)
    dist.barrier()
dist.destroy_process_group()
"""
ENDS = {  # fault -> (exit code, last line of stderr)
    "an error": (1, "error: rank 1 can go no further"),
    "kill one": (
        1,
        "error: the process of rank 1 was killed .SIGKILL, as the kernel does for lack of memory.; go on with --resume",
    ),
    "stop one": (
        1,
        "error: rank 1 does not answer: its process .* was stopped .SIGSTOP.; the others waited 4 s .--ddp_timeout. for"
        " it; the stacks stand above; go on with --resume",
    ),
    "SIGTERM": (128 + signal.SIGTERM, None),
    "kill the launcher": (-signal.SIGKILL, None),
}


def alive(pid):
    return process_state(pid) not in ("", "Z")


def listens_at(pid):
    """The addresses, as /proc/net/tcp and tcp6 have them, at which a process listens."""
    sockets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            sockets.add(os.readlink(descriptor))
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def test_the_ends_of_a_run_on_two_ranks(tmp_path):
    """One rank's fault ends all within seconds, its line stands last, and nothing is left behind."""
    (tmp_path / "rank.py").write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "malaysian_sft.launch", "--standalone", "--nproc_per_node", "2", "--"]
    started = {}
    for number, fault in enumerate(ENDS):
        out, err = (open(tmp_path / f"{number}.{name}", "w") for name in ("out", "err"))
        started[fault] = subprocess.Popen(
            [*command, str(tmp_path / "rank.py"), fault], env=environment, stdout=out, stderr=err
        )
    for number, (fault, process) in enumerate(started.items()):
        out, err = tmp_path / f"{number}.out", tmp_path / f"{number}.err"
        deadline = time.monotonic() + 120
        while out.read_text().count("pid") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        pids = [int(pid) for pid in re.findall(r"pid (\d+)", out.read_text())]
        if fault == "SIGTERM":
            for pid in (process.pid, *pids):
                assert listens_at(pid) <= LOOPBACK, "another machine could connect"
            assert listens_at(process.pid), "where the ranks meet"
            process.terminate()
        if fault == "kill the launcher":
            process.kill()
        code = process.wait(timeout=60)
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        printed = err.read_text()
        expected, line = ENDS[fault]
        assert (code, len(pids)) == (expected, 2) and not any(map(alive, pids)), (fault, printed)
        assert "Traceback" not in printed, (fault, printed)
        if line is not None:
            assert re.fullmatch(line, printed.splitlines()[-1]), (fault, printed)
            if fault == "stop one":
                assert len(re.findall("in steps\n", printed)) == 2, "the stacks of both ranks"
            continue
        assert out.read_text().count("saved after") == 2, (fault, out.read_text(), printed)
    assert ranks.first_to_speak(), "a process alone speaks for itself"
