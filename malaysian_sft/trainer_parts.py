"""What train_dense.py adds to the Trainer around a step: packs for every rank, the bar, stopping, DeepSpeed's look at
gradients."""

import math
import warnings
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SaveStrategy

import multipack
from malaysian_sft.documents_apart import takes_document_numbers, with_document_numbers


class EvenPacks(Dataset):
    """`packs` followed by as many empty ones (nothing supervised) as make its length a multiple of `multiple`.

    Without them the last step of an epoch would either lose packs, repeat some, or leave ranks waiting for one another.
    """

    def __init__(self, packs, multiple):
        self.packs, self.multiple = packs, multiple

    def __len__(self):
        return math.ceil(len(self.packs) / self.multiple) * self.multiple

    def __getitem__(self, index):
        if index < len(self.packs):
            return self.packs[index]
        return [{"input_ids": torch.zeros(2, dtype=torch.int64), "labels": torch.full((2,), -100)}]

    def set_epoch(self, epoch):
        self.packs.set_epoch(epoch)


class Progress(ProgressCallback):
    """The Trainer's progress bar, without its dictionaries: `DenseTrainer.log` prints a step's line."""

    def on_log(self, *args, **kwargs):
        pass


class StopWhenTold(TrainerCallback):
    """A run that was told to stop (see Stop) drops the step it is in, saves what the last one made, and ends."""

    def __init__(self, trainer, stop):
        self.trainer, self.stop = trainer, stop

    def on_train_begin(self, args, state, control, **kwargs):
        self.stop.begin_training()

    def on_substep_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or self.stop.agreed()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or self.stop.agreed()
        if self.trainer.is_deepspeed_enabled and self.trainer.not_finite.in_a_row:
            self.trainer.lr_scheduler.step()  # the Trainer doesn't, after a step that DeepSpeed skipped

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_training_stop and state.global_step < state.max_steps:
            control.should_log = control.should_evaluate = False
            saved = Path(args.output_dir, f"checkpoint-{state.global_step}", "resume")
            control.should_save = state.global_step > 0 and not saved.exists()
        elif args.save_strategy == SaveStrategy.STEPS and state.global_step < state.max_steps:
            # --save_steps saves as well as every epoch, as train_moe.py's; the last step is saved anyway
            control.should_save = control.should_save or state.global_step % state.save_steps != 0


def collator(model):
    """multipack.collate, with the numbers of documents for a model whose layers ask for them."""
    if takes_document_numbers(model.get_base_model()):
        return lambda packs: with_document_numbers(multipack.collate(packs))
    return multipack.collate


def check_deepspeed(training_args):
    """Raise ValueError for a DeepSpeed configuration whose state can't be saved; quieten DeepSpeed."""
    if training_args.deepspeed:
        # its calls have newer names in PyTorch, which says so hundreds of times a step
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
        stage = training_args.hf_deepspeed_config.config.get("zero_optimization", {}).get("stage")
        if stage != 3:
            raise ValueError(f"--deepspeed {training_args.deepspeed}: ZeRO stage 3 is expected, not {stage}")


def check_gradients(engine):
    """Have DeepSpeed's ZeRO-3 skip a step whose gradients are not finite in every dtype, as it does in fp16 alone."""
    zero = engine.optimizer

    def check(update_scale=True):
        zero.check_overflow()
        return zero._loss_scale_update_and_overflow_cleanup() if update_scale else zero.overflow

    zero._overflow_check_and_loss_scale_update = check


def advance(scheduler, steps):
    """Bring a learning rate schedule to where it was after `steps` steps."""
    with warnings.catch_warnings():  # the optimiser's steps were another process's
        warnings.simplefilter("ignore")
        for _ in range(steps):
            scheduler.step()
