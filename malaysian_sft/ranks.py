"""What the ranks of a run decide together, and how a run ends: told to stop, or with one clear last line."""

import contextlib
import ctypes
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from malaysian_sft.safetensors_files import disk_is_full
from malaysian_sft.watchdog import ENDING, Watchdog


def start_deepspeed_on_cpus(seconds=1800):
    """The default group, gloo, as DeepSpeed starts it; without the extension that it would compile for inference.

    That one is compiled and loaded under a lock file that a kill leaves behind, and for which all later runs of the
    user wait without a word (torch.utils.file_baton). seconds: how long a collective may wait for another rank.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=seconds))


def everyone_s(value, group=None):
    """[value of every rank]. Collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def agreed(fault, group=None):
    """The fault (words or None) of the first rank that has one, on every rank. Collective."""
    return next((words for words in everyone_s(fault, group) if words), None)


def on_the_first(action, error=(ValueError, OSError)):
    """action() on rank 0, and its result there; None on the others. Raises ValueError on every rank if it failed.
    Collective."""
    result = fault = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = action()
        except error as raised:
            fault = str(raised)
    if fault := agreed(fault):
        raise ValueError(fault)
    return result


class Stop:
    """SIGTERM (a scheduler's eviction, torchrun's shutdown) and SIGINT (Ctrl-C), as a context manager.

    While the model is loaded they end the process at once. From `training` on they are noted: the run saves and stops
    as soon as all ranks know, between two micro-batches at the latest. A second Ctrl-C doesn't wait for that.
    """

    def __init__(self):
        self.told = None  # the signal's name
        self.training = False
        self.process = os.getpid()
        self.watchdog = None  # until the ranks have met

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            # kill -9 of the launcher would leave its processes training: have the kernel send them SIGTERM
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        return self

    def watch(self, seconds):
        """From here on a rank that others wait for in vain ends the run; each may take `seconds` a micro-batch."""
        self.watchdog = Watchdog(seconds)

    def begin_training(self):
        """From here on a signal is noted, and `agreed` or `beat` is called again and again."""
        self.training = True
        if self.watchdog is not None:
            self.watchdog.arm()

    def beat(self):
        """This rank gets on, in something that takes long (see Watchdog)."""
        if self.watchdog is not None:
            self.watchdog.beat()

    def __exit__(self, kind, error, traceback):
        if self.watchdog is not None:
            if self.watchdog.given() or (isinstance(error, RuntimeError) and waited_in_vain(error)):
                self.watchdog.give_alarm(traceback)
            self.watchdog.end()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _):
        if self.watchdog is not None and self.watchdog.given():
            return  # it is about to end this process, with more to say
        if self.training and not (number == signal.SIGINT and self.told == "SIGINT"):
            self.told = signal.Signals(number).name
            return
        if os.getpid() != self.process:  # a tokenising process
            os._exit(128 + number)
        if first_to_speak():
            what = "; nothing new was saved" if self.training else " while loading; nothing was trained"
            print(f"stopped by {signal.Signals(number).name}{what}", file=sys.stderr, flush=True)
        if dist.is_initialized() and dist.get_world_size() > 1:
            os._exit(128 + number)  # to tidy up would be to wait for other ranks
        raise SystemExit(128 + number)

    def leave(self):
        """End a process that was told to stop, and has saved, by the signal's exit code: what follows in a script must
        not take the run for finished. Of several ranks launch.py does that."""
        if self.told and "RANK" not in os.environ:
            raise SystemExit(128 + getattr(signal, self.told))

    def agreed(self):
        """Whether any rank was told. Collective, on the CPU: the GPU goes on meanwhile."""
        told = torch.tensor(float(self.told is not None))
        if dist.is_initialized():
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group())
        self.beat()
        return bool(told)

    def _group(self):
        """A group that reduces on the CPU: NCCL alone, which the Trainer starts on GPUs, doesn't."""
        if not hasattr(self, "group"):
            self.group = None if "gloo" in dist.get_backend_config() else dist.new_group(backend="gloo")
        return self.group


def first_to_speak():
    """Whether no other rank has said yet why the run ends: one line stands last, not one a rank."""
    if not dist.is_initialized():
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    try:
        return dist.distributed_c10d._get_default_store().add(ENDING, 1) == 1
    except dist.DistError:  # the store is torchrun's, which is gone
        return True


def lost_rank(error):
    """Whether a RuntimeError says that another rank has gone."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error) or "Connection closed" in str(error)


def waited_in_vain(error):
    """Whether a RuntimeError says that another rank did not come within a process group's time limit."""
    return "timed out" in str(error).lower() and (lost_rank(error) or "waiting" in str(error))


@contextlib.contextmanager
def one_last_line():
    """Ends a rank by SystemExit with "error: ..." for what the user can put right; silently where another rank did."""
    try:
        yield
    except (ValueError, OSError) as error:
        words = str(error)
        if disk_is_full(error):  # of a write to a file that was open already, it names no file
            where = f"{error.filename}: " if getattr(error, "filename", None) else ""
            words = f"{where}the disk is full; checkpoints are whole: make room and go on with --resume"
        sys.exit(f"error: {words}" if first_to_speak() else 1)
    except RuntimeError as error:
        if waited_in_vain(error):  # before there was a watchdog
            sys.exit("error: other processes of this run didn't come: see what they said" if first_to_speak() else 1)
        if not lost_rank(error):
            first_to_speak()  # the traceback that follows is what stands last
            raise
        sys.exit(
            "error: another process of this run has ended: what it said stands above; go on with --resume"
            if first_to_speak()
            else 1
        )
