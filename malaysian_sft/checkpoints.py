"""A run's checkpoints: written in the background, complete or not there at all; found and loaded to resume."""

import json
import os
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from malaysian_sft.adapter_files import Adapter
from malaysian_sft.adapter_state import adapter_state_dict, save_adapter
from malaysian_sft.base_model import base_faults
from malaysian_sft.run import is_main, refuse_another_run


class Checkpointer:
    """Writes outputs/<run>/checkpoint-<step>/ in the background: the adapter and, in resume/, what the run can go on
    from.

    All of it is put together under .saving/ and renamed into its place as one, so that a checkpoint is complete or not
    there at all, and only then is the previous checkpoint's resume/ removed: once the first is written, one complete
    checkpoint exists at any moment.
    """

    def __init__(self, peft_model, model, optimizer, args, lora_args, tokenizer, facts):
        self.peft_model, self.args, self.lora_args, self.tokenizer = peft_model, args, lora_args, tokenizer
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self.facts = facts  # what must be the same when a run is resumed
        self.group = dist.new_group(backend="gloo")  # the background thread's own
        self.pool, self.writing = ThreadPoolExecutor(1), None

    def state(self):
        """The sharded tensors to resume from, by name."""
        states = {name: self.optimizer.state[p] for name, p in self.named.items()}
        return {
            "adapter": {name: p.detach() for name, p in self.named.items()},
            "exp_avg": {name: state["exp_avg"] for name, state in states.items()},
            "exp_avg_sq": {name: state["exp_avg_sq"] for name, state in states.items()},
        }

    def save(self, step):
        """Copy everything to the host, then return and write it in the background. Collective."""
        self.wait()
        tensors = adapter_state_dict(self.peft_model)  # on rank 0
        saving = Path(self.args.output_dir, ".saving")
        if is_main():
            shutil.rmtree(saving, ignore_errors=True)  # of a run that was killed
        dist.barrier()
        resume = dcp.async_save(self.state(), checkpoint_id=saving / "resume", process_group=self.group)
        self.writing = self.pool.submit(self._finish, step, tensors, resume, saving)

    def _finish(self, step, tensors, resume, saving):
        final = Path(self.args.output_dir, f"checkpoint-{step}")
        new = saving / final.name
        if tensors:
            base = self.args.model_name_or_path
            save_adapter(self.peft_model, new, base, self.tokenizer, self.lora_args, tensors=tensors)
        resume.result()  # on rank 0: every rank has written
        if is_main():
            (saving / "resume" / "position.json").write_text(json.dumps({"step": step, **self.facts}, indent=2) + "\n")
            os.replace(saving / "resume", new / "resume")
            previous = [path for path in Path(self.args.output_dir).glob("checkpoint-*/resume") if path.parent != final]
            if final.exists():  # incomplete, or newest_checkpoint would have gone on from it
                os.replace(final, saving / "replaced")
            os.replace(new, final)
            for path in (saving, *previous):
                shutil.rmtree(path)

    def wait(self):
        """Wait until what was being saved is on disk; raises what went wrong there."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None

    def load(self, directory):
        """Read adapter and optimiser state from checkpoint `directory`, written by any number of ranks; returns its
        step. Collective."""
        position = json.loads((directory / "resume" / "position.json").read_text())
        refuse_another_run(self.facts, position, directory)
        if faults := base_faults(Adapter(directory).manifest, self.args.model_name_or_path, self.args.model_revision):
            raise ValueError(f"--resume: {faults[0]}")
        dcp.load(self.state(), checkpoint_id=directory / "resume", process_group=self.group)
        for p in self.named.values():
            self.optimizer.state[p]["step"].fill_(position["step"])
        return position["step"]


def resume_fault(directory):
    """What keeps a run from going on from checkpoint `directory`, in words; None if nothing does."""
    resume = directory / "resume"
    try:
        json.loads((resume / "position.json").read_text())
        for part in dcp.FileSystemReader(resume).read_metadata().storage_data.values():
            file = resume / part.relative_path
            if file.stat().st_size < part.offset + part.length:
                return f"resume/{file.name} is cut short"
    except FileNotFoundError as error:
        return f"{os.path.relpath(error.filename, directory)} is not there"
    except (ValueError, EOFError, pickle.UnpicklingError) as error:
        return f"resume/ cannot be read: {error}"
    return None


def newest_checkpoint(output_dir, resume, fault, say):
    """The newest complete checkpoint-<step> under output_dir, or None to start anew. Raises ValueError rather than
    write over a run.

    fault(directory) says what a checkpoint lacks, None if it is complete; say(line) tells the user. A run that was
    killed must go on by --resume alone: an incomplete checkpoint is passed over, and written again when the run gets
    there; a run that was started and has no complete one starts anew.
    """
    out = Path(output_dir)
    found = {
        int(path.name.split("-")[1]): path
        for path in out.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name)
    }
    if not resume:
        if found:
            raise ValueError(
                f"{found[max(found)]} exists: pass --resume to go on, or another --run_name or --output_dir"
            )
        return None
    for step, directory in sorted(found.items(), reverse=True):
        lacking = fault(directory)
        if lacking is None:
            return directory
        say(
            f"--resume: {directory} is incomplete ({lacking}): skipped, and written again when the run gets to step"
            f" {step}"
        )
    if not found and not (out / "args.json").exists():
        raise ValueError(f"--resume: no run under {out}; check --run_name, or start without --resume")
    say(f"--resume: no complete checkpoint under {out}: starting anew")
    return None
