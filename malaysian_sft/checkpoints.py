"""A run's checkpoints, the same in both trainers: complete or not there at all; found, checked and chosen to resume."""

import contextlib
import itertools
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

from malaysian_sft.adapter_files import Adapter
from malaysian_sft.adapter_state import adapter_state_dict, save_adapter
from malaysian_sft.base_model import base_faults
from malaysian_sft.ranks import agreed, everyone_s, on_the_first
from malaysian_sft.resume_state import (
    INDEX,
    RESUME,
    StateReader,
    read_index,
    state_fault,
    sync,
    write_index,
    write_shares,
)
from malaysian_sft.run import is_main
from malaysian_sft.safetensors_files import disk_is_full
from malaysian_sft.training_state import MOMENTS, get_shares, set_shares

KEPT = 2  # checkpoints that keep their resume/: should the newest be damaged, the one before is gone on from


class Saver:
    """Writes checkpoint-<step>/, collectively: an adapter and, in resume/, what the run can go on from.

    All of it is put together under .saving/ and renamed into its place as one, so that a checkpoint is complete or not
    there at all. Only when the disk holds it is the resume/ of older checkpoints removed, but for the one before.
    """

    def __init__(self, output_dir, facts):
        self.output_dir, self.facts = Path(output_dir), facts  # facts: what must be the same when a run is resumed
        self.saving = self.output_dir / ".saving"
        agreed(None)  # all ranks are here: making a group would wait half an hour for one that is lost
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def begin(self, step, elements):
        """Make room for checkpoint-`step` of an adapter of `elements` elements. Raises ValueError on every rank if the
        disk is too full for it."""
        fault = None
        if is_main():
            shutil.rmtree(self.saving, ignore_errors=True)  # of a run that was killed
            needed = 4 * elements * (2 + len(MOMENTS))  # fp32: the adapter twice, in resume/ too
            free = shutil.disk_usage(self.output_dir).free
            if free < needed:
                fault = self.disk_full(step, f"{needed / 2**30:.3g} GiB are needed and {free / 2**30:.3g} are free")
            else:
                try:
                    (self.saving / f"checkpoint-{step}" / RESUME).mkdir(parents=True)
                except OSError as error:
                    fault = self._in_words(step, error)
        if fault := agreed(fault, self.group):
            raise ValueError(fault)
        return self.saving / f"checkpoint-{step}"

    @contextlib.contextmanager
    def or_nothing(self, step):
        """Around what writes a part of checkpoint-`step` before `finish`: what fails leaves nothing behind that would
        fill the disk, and is said in one line, as ValueError."""
        try:
            yield
        except (ValueError, OSError) as error:
            if is_main():
                shutil.rmtree(self.saving, ignore_errors=True)
            raise ValueError(self._in_words(step, error)) from None

    def disk_full(self, step, reason):
        return (
            f"{self.output_dir}: the disk is full, checkpoint-{step} is not saved ({reason}); earlier checkpoints are"
            " whole: make room and go on with --resume"
        )

    def finish(self, step, shares, updates, write_adapter=None):
        """Write this rank's shares and, on rank 0, what write_adapter(directory) writes; publish it. Raises ValueError
        on every rank for what went wrong on one."""
        new = self.saving / f"checkpoint-{step}"
        outcome = {}, f"checkpoint-{step}: a process could not write its part"
        try:
            if write_adapter is not None:
                write_adapter(new)
            outcome = write_shares(new / RESUME, dist.get_rank() if self.group else 0, shares), None
        except (ValueError, OSError, SafetensorError) as error:
            outcome = {}, self._in_words(step, error)
        finally:  # whatever happened here, the others must not wait
            outcomes = everyone_s(outcome, self.group)
        fault = next((fault for _, fault in outcomes if fault), None)
        if is_main() and fault is None:
            files = {name: entry for written, _ in outcomes for name, entry in written.items()}
            try:
                write_index(new, {"step": step, "updates": updates, "facts": self.facts}, files)
                self._publish(new)
            except OSError as error:
                fault = self._in_words(step, error)
        if is_main() and fault is not None:
            shutil.rmtree(self.saving, ignore_errors=True)  # it would fill the disk
        if fault := agreed(fault, self.group):
            raise ValueError(fault)

    def _in_words(self, step, error):
        if disk_is_full(error):
            return self.disk_full(step, "no space left while writing")
        return f"{self.output_dir}: checkpoint-{step} is not saved: {error}"

    def _publish(self, new):
        final = self.output_dir / new.name
        if final.exists():  # incomplete, or the newest would have been gone on from
            os.replace(final, self.saving / "replaced")
        os.replace(new, final)
        sync(self.output_dir)
        older = sorted((step for step, path in checkpoints(self.output_dir).items() if (path / RESUME).is_dir()))
        for step in older[: older.index(int(final.name.split("-")[1]))][: 1 - KEPT or None]:
            shutil.rmtree(self.output_dir / f"checkpoint-{step}" / RESUME)
        shutil.rmtree(self.saving)


class Checkpointer:
    """train_moe.py's: saves in the background, from copies on the host."""

    def __init__(self, peft_model, model, optimizer, args, lora_args, tokenizer, facts):
        self.peft_model, self.args, self.lora_args, self.tokenizer = peft_model, args, lora_args, tokenizer
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self.saver = Saver(args.output_dir, facts)
        self.pool, self.writing = ThreadPoolExecutor(1), None

    def save(self, step):
        """Copy everything to the host, then return and write it in the background. Collective."""
        self.wait()
        self.saver.begin(step, sum(p.numel() for p in self.named.values()))
        tensors = adapter_state_dict(self.peft_model)  # on rank 0
        shares, updates = get_shares(self.named, self.optimizer)
        write_adapter = (lambda directory: self._write_adapter(directory, tensors)) if tensors else None
        self.writing = self.pool.submit(self.saver.finish, step, shares, updates, write_adapter)

    def _write_adapter(self, directory, tensors):
        base = self.args.model_name_or_path
        save_adapter(self.peft_model, directory, base, self.tokenizer, self.lora_args, tensors=tensors)

    def failed(self):
        """Whether what was being saved is known to have failed; `wait` raises why."""
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def wait(self):
        """Wait until what was being saved is on disk; raises what went wrong there."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def load(self, checkpoint):
        """Read adapter and optimiser state from a checkpoint, written by any number of ranks; returns its step."""
        return load_state(self.named, self.optimizer, checkpoint)


def load_state(named, optimizer, checkpoint):
    """Put a checkpoint's training state into the parameters `named` and their AdamW; returns its step."""
    index = read_index(Path(checkpoint))
    set_shares(named, optimizer, StateReader(checkpoint), index["updates"])
    return index["step"]


def checkpoints(output_dir):
    """{step: path} of every checkpoint-<step> under output_dir, whatever is in it."""
    return {
        int(path.name.split("-")[1]): path
        for path in Path(output_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name)
    }


def newest_checkpoint(output_dir, resume, say, start_anew=False):
    """The newest complete checkpoint-<step> under output_dir, or None to start at the first step. Collective; to be
    called by a run that has claimed output_dir. Raises ValueError rather than write over a run.

    say(line) tells the user. A run that was killed must go on by --resume alone: an incomplete or damaged checkpoint is
    passed over, and written again when the run gets there; a run that has trained no checkpoint yet starts anew.
    start_anew puts all that is there aside, under replaced-<number>/.
    """
    out = Path(output_dir)
    found = checkpoints(out)
    if start_anew:
        _put_aside(out, say)
        return None
    if not resume:
        if found:
            raise ValueError(
                f"{found[max(found)]} exists: pass --resume to go on, or another --run_name or --output_dir"
            )
        return None
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    faults = []
    for step, directory in sorted(found.items(), reverse=True):
        fault = agreed(state_fault(directory, rank, world), None)
        if fault is None:
            return directory
        faults.append(f"{directory.name}: {fault}")
        say(
            f"--resume: {directory} is incomplete ({fault}): skipped, and written again when the run gets to step"
            f" {step}"
        )
    if faults:
        raise ValueError(
            f"--resume: no checkpoint under {out} can be gone on from ({'; '.join(faults)}); nothing was changed. To"
            " put them aside and train from the first step: --start_anew True"
        )
    if not (out / "args.json").exists():
        raise ValueError(f"--resume: no run under {out}; check --run_name, or start without --resume")
    say(f"--resume: no checkpoint under {out} yet: starting anew")
    return None


def _put_aside(out, say):
    """Move a run's files to out/replaced-<number>/. Collective."""

    def move():
        old = [path for path in sorted(out.iterdir()) if path.name != ".lock" and not path.name.startswith("replaced-")]
        if not old:
            return
        if not (out / "args.json").exists():
            raise ValueError(
                f"--start_anew: {out} holds {old[0].name} but no args.json, so it is no run's directory; nothing was"
                " moved. Take another --run_name or --output_dir"
            )
        aside = next(path for n in itertools.count(1) if not (path := out / f"replaced-{n}").exists())
        aside.mkdir()
        for path in old:
            os.replace(path, aside / path.name)
        say(f"--start_anew: what was in {out} is in {aside}")

    on_the_first(move)


def recorded_facts(checkpoint):
    """(the facts of the run that wrote a checkpoint, the file that has them)."""
    return read_index(Path(checkpoint))["facts"], Path(checkpoint) / RESUME / INDEX


def refuse_another_base(checkpoint, model, revision):
    """Raise ValueError if a checkpoint's adapter was trained on another base."""
    if faults := base_faults(Adapter(checkpoint).manifest, model, revision):
        raise ValueError(f"--resume: {faults[0]}")
