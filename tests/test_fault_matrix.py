"""Every fault at every place of a run, on two ranks, both trainers: how it ends, and that --resume then equals a run
without the fault. The ranks are forks of this process, which has imported everything; test_faults.py has the launcher.

One case of each fault is in CI; `-m slow` runs the others.
"""

import os
import signal
import socket
import sys
import time
from contextlib import suppress

import deepspeed  # noqa: F401  (before the forks)
import pytest
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from test_faults import STEPS, TRAINERS, each_micro_batch, records, same, train, trainer, unbroken, workspace

import train_dense
import train_moe
from malaysian_sft import checkpoints
from malaysian_sft.lora import WEIGHTS
from malaysian_sft.resume_state import state_fault
from malaysian_sft.watchdog import HUNG, process_state

__all__ = ["train", "trainer", "unbroken", "workspace"]  # fixtures
BOUND = 4  # --ddp_timeout
PLACES = "load step save between".split()


def on_rank_1(fault):
    """fault() once, on rank 1, from the place where it is called."""
    done = []

    def maybe(*_, **__):
        if dist.is_initialized() and dist.get_rank() == 1 and not done:
            done.append(fault())

    return maybe


def put(fault, place, trainer, patch):
    """Have fault() happen on rank 1: while the model is loaded; in the first micro-batch of step 3; in the save after
    step 2; or after that save, before step 3."""
    module, maybe = TRAINERS[trainer][1], on_rank_1(fault)

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
        each_micro_batch(patch, trainer, lambda number, _: maybe() if number == 3 else None)
    elif place == "save":
        before(checkpoints, "write_shares", lambda directory, *_: directory.parent.name == "checkpoint-2")
    elif trainer == "moe":
        before(train_moe, "packs_of_step", lambda _, step, *__: step == 2)
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
    assert same(records(out), records(unbroken[trainer]))
    found = load_file(out / f"checkpoint-{STEPS}" / WEIGHTS)
    for name, tensor in load_file(unbroken[trainer] / f"checkpoint-{STEPS}" / WEIGHTS).items():
        assert found[name].sub(tensor).abs().max() < 1e-4, name
