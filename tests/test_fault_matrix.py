"""Every fault at every place of a run, on two ranks, both trainers: how it ends, and that --resume then equals a run
without the fault. The ranks are forks of this process, which has imported everything; test_faults.py has the launcher.

The faults of the second table need one process: the disk, numbers, trackers, and what is found at resume.
Of the first table a case of each fault is in CI, `-m slow` runs the others; the second is in CI whole.
"""

import errno
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import deepspeed  # noqa: F401  (before the forks)
import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_faults import (
    DAMAGES,
    STEPS,
    TRAINERS,
    copy,
    each_micro_batch,
    ends,
    records,
    same,
    train,
    trainer,
    tree,
    unbroken,
    workspace,
)

import train_dense
import train_moe
from malaysian_sft import checkpoints, launch
from malaysian_sft.lora import WEIGHTS
from malaysian_sft.resume_state import state_fault
from malaysian_sft.watchdog import HUNG, process_state

__all__ = ["copy", "train", "trainer", "unbroken", "workspace"]  # fixtures
BOUND = 4  # --ddp_timeout
PLACES = "load step save between".split()
RANK_VARIABLES = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()  # torchrun's


def once(fault, rank):
    """fault() once, on one rank, from the place where it is called."""
    done = []

    def maybe(*_, **__):
        if (dist.get_rank() if dist.is_initialized() else 0) == rank and not done:
            done.append(fault())

    return maybe


def put(fault, place, trainer, patch, rank=1):
    """Have fault() happen on a rank: while the model is loaded; in its first micro-batch of step 3; in the save after
    step 2; or after that save, before step 3."""
    module, maybe = TRAINERS[trainer][1], once(fault, rank)
    first = 3 if rank else 5  # alone, a process has two micro-batches a step

    def before(owner, name, when=lambda *_: True):
        inner = getattr(owner, name)

        def called(*args, **options):
            if when(*args):
                maybe()
            return inner(*args, **options)

        patch.setattr(owner, name, called)

    if place == "load":
        before(module, "build_model")
    elif place == "step":
        each_micro_batch(patch, trainer, lambda number, _: maybe() if number == first else None)
    elif place == "save":
        before(checkpoints, "write_shares", lambda directory, *_: directory.parent.name == "checkpoint-2")
    elif trainer == "moe":
        before(train_moe, "optimizer_step", lambda _, step, *__: step == 2)
    else:
        before(train_dense.DenseTrainer, "get_batch_samples", lambda trainer, *_: trainer.state.global_step == 2)


def two_ranks(train, trainer, out, *flags):
    """(exit codes, what both wrote to stderr, seconds) of a run of two forks of this process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log, started, pids = out.with_name("stderr"), time.monotonic(), []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            with open(log, "a") as file:
                os.dup2(file.fileno(), 2)
            with open(out.with_name("stdout"), "a") as file:
                os.dup2(file.fileno(), 1)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            os.environ["RANK_0"] = str((pids or [os.getpid()])[0])
            os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
            AcceleratorState._reset_state(reset_partial_state=True)
            code = 1
            try:
                train(trainer, out, *flags)
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 1
                if not isinstance(ended.code, int):
                    print(ended.code, file=sys.stderr)  # as the interpreter would
            finally:
                os._exit(code)
        pids.append(pid)
    codes, deadline = {}, started + 120
    while len(codes) < 2 and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes and process_state(pid) == "Z":
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.05)
    for pid in pids:
        if pid not in codes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            codes[pid] = "hung"
            os.waitpid(pid, 0)
    return [codes[pid] for pid in pids], log.read_text(), time.monotonic() - started


def myself(name):
    return lambda: os.kill(os.getpid(), getattr(signal, name))


def kill_all():
    os.kill(int(os.environ["RANK_0"]), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(100)


# name -> (what happens on rank 1, the exit codes of both ranks, how the last line begins, None if the run was saved)
KILLED = "error: another process of this run has ended: what it said stands above; go on with --resume"
FAULTS = {
    "kill one": (myself("SIGKILL"), [1, -signal.SIGKILL], KILLED),
    "kill all": (kill_all, [-signal.SIGKILL, -signal.SIGKILL], ""),
    "SIGSTOP": (myself("SIGSTOP"), [HUNG, -signal.SIGABRT], "error: rank 1 does not answer: its process "),
    "hang": (hang, [HUNG, HUNG], f"error: no rank got on for {BOUND} s (--ddp_timeout): rank 0"),
    "SIGTERM": (myself("SIGTERM"), [0, 0], None),
    "SIGINT": (myself("SIGINT"), [0, 0], None),
}
IN_CI = {("kill one", "save"), ("SIGSTOP", "step"), ("hang", "between"), ("SIGTERM", "save")}
CASES = [
    pytest.param(fault, place, marks=() if (fault, place) in IN_CI else pytest.mark.slow)
    for fault in FAULTS
    for place in PLACES
]


@pytest.mark.parametrize(("fault", "place"), CASES)
def test_ends_and_resumes(fault, place, trainer, unbroken, train, tmp_path, monkeypatch):
    """On two ranks; gone on by one, which is another world size too, equal to one that was not broken."""
    happens, expected, line = FAULTS[fault]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        put(happens, place, trainer, patch)
        codes, printed, seconds = two_ranks(train, trainer, out, "--ddp_timeout", BOUND, "--save_steps", 2)
    if place == "load" and line is None:
        expected, line = [1, 128 + getattr(signal, fault)], f"stopped by {fault} while loading; nothing was trained"
    assert codes == expected, printed
    assert "Traceback" not in printed, printed
    if line:
        last = [words for words in printed.splitlines() if words.startswith(("error", "stopped"))]
        assert len(last) == 1 and last[0].startswith(line), printed
    if HUNG in expected:
        assert printed.count("most recent call first") >= 4, "the stacks of both ranks' threads"
        assert seconds < 8 * BOUND
    whole = [path for path in out.glob("checkpoint-*") if state_fault(path) is None]
    assert len(whole) == len(list(out.glob("checkpoint-*"))), "complete or not there at all"
    if place != "load" and (line is None or (trainer == "dense" and place != "save")):
        names = [path.name for path in whole]  # train_moe.py may still have been writing it
        assert "checkpoint-2" in names and set(names) <= {"checkpoint-2", "checkpoint-3"}, "step 3 may be done first"
    flags = ("--resume", "True") if (out / "args.json").exists() else ()  # while loading it was no run yet
    train(trainer, out, "--save_steps", 2, *flags)
    equals_unbroken(out, unbroken[trainer])


def equals_unbroken(out, whole):
    """The same losses, gradient norms and adapter; nothing half written is left."""
    assert same(records(out), records(whole)) and not (out / ".saving").exists()
    found = load_file(out / f"checkpoint-{STEPS}" / WEIGHTS)
    for name, tensor in load_file(whole / f"checkpoint-{STEPS}" / WEIGHTS).items():
        assert found[name].sub(tensor).abs().max() < 1e-4, name


def without(copy, *steps):
    for step in steps:
        shutil.rmtree(copy / f"checkpoint-{step}")


def test_resumed_on_two_ranks(copy, trainer, unbroken, train):
    """At load alone. From two to one: every cell of the first table."""
    without(copy, 4)
    codes, printed, _ = two_ranks(train, trainer, copy, "--resume", "True", "--ddp_timeout", 60)
    assert codes == [0, 0], printed
    equals_unbroken(copy, unbroken[trainer])


# ----------------------------------------------------------------------------------------------------------------------
# One process: what is refused to it, and what it finds
# ----------------------------------------------------------------------------------------------------------------------

SECOND_IN_CI = {("moe", "step"), ("dense", "load")}


@pytest.mark.parametrize(
    ("trainer", "place"),
    [
        pytest.param(*cell, marks=() if cell in SECOND_IN_CI else pytest.mark.slow)
        for cell in itertools.product(TRAINERS, PLACES)
    ],
)
def test_a_second_launcher_at_any_place_is_refused_and_changes_nothing(
    trainer, place, workspace, unbroken, train, tmp_path, monkeypatch
):
    out, seen = tmp_path / "run", []

    def second():
        """The same command, by another process, while this one stands still."""
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        done = subprocess.run([sys.executable, *sys.argv], env=environment, capture_output=True, text=True, timeout=300)
        seen.append((done.returncode, done.stderr.splitlines()[-1]))

    with monkeypatch.context() as patch:
        put(second, place, trainer, patch, rank=0)
        train(trainer, out)
    ((code, line),) = seen
    assert code == 1 and line.startswith(f"error: {out}: another process is training there"), line
    assert str(os.getpid()) in line
    equals_unbroken(out, unbroken[trainer])


REFUSED = {}  # {"under": directory, "number": errno} while writing there is refused
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")


def refuse(event, arguments):
    """An audit hook, for root too, whom no mode keeps out: under REFUSED nothing is made, or opened for writing."""
    if not REFUSED or not (event == "open" or event in CHANGES) or not isinstance(arguments[0], str | os.PathLike):
        return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if REFUSED["number"] == errno.ENOSPC and event not in ("open", "os.mkdir"):
        return  # to remove and to rename needs no room
    path = os.fspath(arguments[0])
    if path.startswith(str(REFUSED["under"])):
        raise OSError(REFUSED["number"], os.strerror(REFUSED["number"]), path)


@pytest.fixture(scope="module")
def audited():
    sys.addaudithook(refuse)  # there is no way to remove one


@pytest.fixture
def mended():
    REFUSED.clear()
    yield REFUSED.clear
    REFUSED.clear()


def fill(out, place):
    """The disk of `out` is full: files that are open already cannot grow either. (Not so at a save, which fails beside
    the next step in train_moe.py: the log's line could come first.)"""
    REFUSED.update(under=out, number=errno.ENOSPC)
    if place == "save":
        return
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            if os.readlink(f"/proc/self/fd/{descriptor}") == str(out / "log.jsonl"):
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, int(descriptor))
                os.close(full)


def make_read_only(out, _):
    """A file that is open already may still be written, as on a directory that loses its w."""
    REFUSED.update(under=out, number=errno.EROFS)


# A cell: (fault, place) -> how the last line begins, {} the run's directory; the exit code is 1
FULL = "the disk is full; checkpoints are whole: make room and go on with --resume"
NOT_SAVED = "{}: checkpoint-N is not saved: [Errno 30] Read-only file system"
DISK = {
    ("full disk", "load"): "{}/args.json.tmp: " + FULL,
    ("full disk", "step"): FULL,
    ("full disk", "save"): "{}: the disk is full, checkpoint-N is not saved (no space left while writing); earlier",
    ("full disk", "between"): FULL,
    ("read-only", "load"): "[Errno 30] Read-only file system: '{}/args.json.tmp'",
    ("read-only", "step"): NOT_SAVED,
    ("read-only", "save"): NOT_SAVED,
    ("read-only", "between"): NOT_SAVED,
}


@pytest.mark.parametrize(("fault", "place"), DISK)
def test_a_disk_that_refuses(fault, place, trainer, unbroken, train, tmp_path, monkeypatch, audited, mended):
    """One line that says where; what was whole stays so; with room again, --resume equals unbroken."""
    out = tmp_path / "run"

    def happens():
        if place in ("step", "between"):  # train_moe.py may still be writing it: that is the place "save"
            wait_for(lambda: (out / "checkpoint-2").exists() and not (out / ".saving").exists())
        (fill if fault == "full disk" else make_read_only)(out, place)

    with monkeypatch.context() as patch:
        put(happens, place, trainer, patch, rank=0)
        line = ends(train, trainer, out, "--save_steps", 2)
    mended()
    expected = "error: " + DISK[fault, place].format(out)
    if trainer == "dense" and fault == "read-only" and place != "load":
        # it opens log.jsonl at every record, and a save is before the step's record
        expected = expected if place == "save" else f"error: [Errno 30] Read-only file system: '{out}/log.jsonl'"
    elif trainer == "dense" and place in ("step", "between"):
        expected = f"error: {out}/log.jsonl: {FULL}"
    step = 2 if place == "save" else 4
    assert line.startswith(expected.replace("checkpoint-N", f"checkpoint-{step}")), line
    found = {path.name for path in out.glob("checkpoint-*")}
    assert found == ({"checkpoint-2"} if place in ("step", "between") else set())
    assert all(state_fault(out / name) is None for name in found)
    if not (out / "args.json").exists():
        assert place == "load"  # it was no run yet
    train(trainer, out, "--save_steps", 2, *(("--resume", "True") if place != "load" else ()))
    equals_unbroken(out, unbroken[trainer])


def test_a_loss_that_is_not_finite_ends_a_run_that_may_skip_none(trainer, unbroken, train, tmp_path, monkeypatch):
    """At a step alone: nowhere else is there a loss. (Skipped and gone on with: test_faults.py.)"""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        each_micro_batch(patch, trainer, lambda number, _: math.nan if number == 5 else 1)
        line = ends(train, trainer, out, "--save_steps", 2, "--max_skipped_steps", 1)
    assert line.startswith("error: step 3: loss nan") and line.endswith(f"their documents are in {out}/skipped.jsonl")
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [json.loads(words)["step"] for words in (out / "skipped.jsonl").read_text().splitlines()] == [3]
    train(trainer, out, "--save_steps", 2, "--resume", "True")
    equals_unbroken(out, unbroken[trainer])


TRACKER = {  # place -> what is said; at the end, what it has not sent is sent
    "load": "trackio: ConnectionRefusedError: '[Errno 111] no server'; going on without it",
    "step": "the tracker failed ('[Errno 111] no server'); going on without it",
    "save": "the tracker failed ('[Errno 111] no server'); going on without it",
    "between": "the tracker failed ('[Errno 111] no server'); going on without it",
    "end": "the tracker failed at the end ('[Errno 111] no server'); the run itself is whole",
}


@pytest.mark.parametrize("place", TRACKER)
def test_a_tracker_that_goes_down(place, trainer, unbroken, train, tmp_path, monkeypatch, capsys):
    """One line, exit code 0, and the run equals one without a tracker."""
    down = []

    def works(**_):
        if down:
            raise OSError(111, "no server")

    def finish():
        down.extend([1] * (place == "end"))
        works()

    tracker = SimpleNamespace(init=works, log=lambda _: works(), finish=finish)
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    if place != "end":
        put(lambda: down.append(1), place, trainer, monkeypatch, rank=0)
    train(trainer, tmp_path / "run", "--report_to", "trackio", "--save_steps", 2)
    printed = capsys.readouterr().out
    assert printed.count("no server") == 1 and TRACKER[place] in printed
    equals_unbroken(tmp_path / "run", unbroken[trainer])


FIVE = "state cut short|a bit of the adapter|a digit of the index|no state|a pickle in resume/".split("|")


@pytest.mark.parametrize("damage", FIVE)
def test_a_damaged_newest_checkpoint_is_trained_again(damage, copy, trainer, unbroken, train, capsys):
    """At load alone: nothing reads a checkpoint later. Exit code 0; the damage is named, the step written again."""
    mend, words = DAMAGES[damage]
    mend(copy / f"checkpoint-{STEPS}")
    train(trainer, copy, "--resume", "True")
    printed = capsys.readouterr().out
    assert f"checkpoint-{STEPS} is incomplete ({words}" in printed
    assert f"resuming from {copy}/checkpoint-{STEPS - 1}" in printed and not (copy / "executed").exists()
    assert state_fault(copy / f"checkpoint-{STEPS}") is None
    equals_unbroken(copy, unbroken[trainer])


def test_resumed_with_other_data(copy, trainer, unbroken, train, workspace, tmp_path):
    """At load alone. One word of one row is enough; refused, nothing changes, and the data itself goes on."""
    without(copy, 4)
    before, rows = tree(copy), (workspace / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(rows.replace("Jawapannya 1.", "Jawapannya 2.", 1))
    line = ends(train, trainer, copy, "--resume", "True", "--dataset", tmp_path / "train.jsonl")
    assert line.startswith("error: --resume: data is ") and line.endswith("that is another run, for another --run_name")
    assert tree(copy) == before
    train(trainer, copy, "--resume", "True")
    equals_unbroken(copy, unbroken[trainer])


def wait_for(true):
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_second_launcher_on_the_port(monkeypatch, capfd):
    """It ends before it has a rank, so the place of the first and the trainer make no difference."""
    monkeypatch.setattr(launch, "run", lambda _: pytest.fail("it started ranks"))
    with socket.create_server((launch.LOOPBACK, 0)) as first, pytest.raises(SystemExit) as ended:
        port = first.getsockname()[1]
        launch.main(["--nnodes", "1", "--nproc_per_node", "2", "--master_port", str(port), "--", "train_moe.py"])
    assert ended.value.code == f"error: cannot listen at 127.0.0.1:{port}: another run has the port; set MASTER_PORT"
