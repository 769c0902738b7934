"""Ends a run in which a rank was stopped or hangs: every rank's stacks on stderr, one line last, a non-zero exit.

Without it the others wait in a collective for PyTorch's 10 (NCCL) to 30 minutes (gloo), and nobody says for whom.
"""

import faulthandler
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

HUNG = 124  # a rank's exit status, as of timeout(1); launch.py then has nothing to add
KEY = "malaysian_sft/hung"
ENDING = "malaysian_sft/ending"  # a counter: who makes it 1 says why the run ends

# --ddp_timeout's help
WAITING = (
    "seconds that ranks wait for one that was stopped or hangs, before all end; more than a micro-batch or the writing"
    " of a checkpoint takes"
)


def default_store():
    """A client of the store that the ranks met at, for one thread; None in a process alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store().clone()


def place(frame):
    """Where a thread is, and what of this repository called it: "all_reduce (distributed_c10d.py:3011), called by
    agreed (ranks.py:105)"."""
    words = [frame]
    while frame.f_back is not None and "/lib/python" in frame.f_code.co_filename:
        frame = frame.f_back
    words += [frame] if frame is not words[0] else []
    return ", called by ".join(f"{f.f_code.co_name} ({Path(f.f_code.co_filename).name}:{f.f_lineno})" for f in words)


def grouped(places):
    """{rank: its place} in words, the rarest place first: what hangs is seldom where most wait."""
    ranks = {}
    for rank, where in sorted(places.items()):
        ranks.setdefault(where, []).append(rank)
    words = []
    for where, those in sorted(ranks.items(), key=lambda item: len(item[1])):
        many = len(those) > 4
        words.append((f"{len(those)} ranks" if many else f"rank {', '.join(map(str, those))}") + f" in {where}")
    return "; ".join(words)


def process_state(pid):
    """The letter that Linux gives a process (T: stopped, Z: ended), "" where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return ""


class Watchdog:
    """A thread of every rank. While `armed`, a rank that has not called beat() for `seconds` gives the alarm.

    The alarm is a key in the ranks' store, which every thread looks for, armed or not. Each then writes its process's
    stacks. A rank on this host that does not is stopped, or hangs outside of Python: it gets SIGABRT, at which
    faulthandler writes its stacks.
    """

    def __init__(self, seconds):
        self.seconds, self.last_beat, self.armed = seconds, time.monotonic(), False
        self.store, self.alarm, self.ended = default_store(), threading.Lock(), threading.Event()
        self.interval = min(seconds / 10, 5.0)
        self.thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        if self.store is None:
            return
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        faulthandler.enable()  # SIGABRT, which NCCL's own time limit ends in too, writes stacks
        self.store.set_timeout(timedelta(seconds=max(1.0, self.interval)))
        self.store.set(f"{KEY}/process/{self.rank}", f"{os.getpid()} {socket.gethostname()}")
        self.thread.start()

    def arm(self):
        """Training begins: from here on every rank gets on, or the run ends.

        NCCL's own time limits end a process without a word about the others: they get a tenth more.
        """
        self.beat()
        self.armed = True
        for group in list(dist.distributed_c10d._world.pg_map if self.store else ()):
            if "nccl" in dist.get_backend_config(group):
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1.1 * self.seconds), group)

    def beat(self):
        """To be called whenever the run gets on: after a micro-batch, a validation batch, a part of a save."""
        self.last_beat = time.monotonic()

    def end(self):
        """The run is over."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()

    def _watch(self):
        while not self.ended.wait(self.interval):
            if self.armed and time.monotonic() - self.last_beat > self.seconds:
                return self.give_alarm()
            try:
                if self.store.check([KEY]):
                    return self.give_alarm()
            except dist.DistError:  # the store is the launcher's, which is gone: so is the run
                return

    def given(self):
        """Whether there is an alarm, which will end this process."""
        return self.alarm.locked()

    def give_alarm(self, traceback=None):
        """Report and end this process, by whichever of its threads comes first; does not return.

        traceback: of the error that main has raised since it waited.
        """
        if not self.alarm.acquire(blocking=False):
            time.sleep(60)  # the other thread ends the process
            os._exit(HUNG)
        main = sys._current_frames().get(threading.main_thread().ident)
        while traceback is not None:
            main, traceback = traceback.tb_frame, traceback.tb_next
        self._write_stacks()
        with suppress(dist.DistError):
            self.store.set(KEY, "1")
            self.store.set(f"{KEY}/place/{self.rank}", place(main) if main else "?")
            time.sleep(2 * self.interval + 1)  # the others look at the key every interval
            places = self._found("place")
            silent = self._silent(places)
            if self.store.add(ENDING, 1) == 1:
                sys.stderr.write(self._line(places, silent) + "\n")
        sys.stderr.flush()
        os._exit(HUNG)

    def _write_stacks(self):
        """This process's stacks, in one write: other ranks write to the same stderr."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            sys.stderr.write(f"rank {self.rank}, process {os.getpid()}, is here:\n{file.read()}\n")
        sys.stderr.flush()

    def _found(self, kind):
        """{rank: what it has written under `kind`} of the ranks that have."""
        keys = {rank: f"{KEY}/{kind}/{rank}" for rank in range(self.world)}
        return {rank: self.store.get(key).decode() for rank, key in keys.items() if self.store.check([key])}

    def _silent(self, places):
        """{rank: what is known of its process} of the ranks that didn't answer; those on this host are ended."""
        silent = {}
        for rank, process in self._found("process").items():
            if rank in places:
                continue
            pid, host = process.split(" ", 1)
            if host != socket.gethostname():
                silent[rank] = f"process {pid} on {host}"
                continue
            state = process_state(pid)
            kind = {"T": "was stopped (SIGSTOP)", "Z": "has ended", "": "has ended"}.get(state, "hangs")
            silent[rank] = f"process {pid} {kind}"
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGABRT)
                os.kill(int(pid), signal.SIGCONT)
        time.sleep(1 if silent else 0)  # their stacks come before the line
        return silent

    def _line(self, places, silent):
        bound = f"{self.seconds:g} s (--ddp_timeout)"
        rest = "the stacks stand above; go on with --resume"
        if silent:
            who = ", ".join(f"rank {rank} does not answer: its {what}" for rank, what in sorted(silent.items()))
            return f"error: {who}; the others waited {bound} for it; {rest}"
        return f"error: no rank got on for {bound}: {grouped(places)}; {rest}"
