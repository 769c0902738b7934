"""A step's packs as batches: which are this rank's, what of them the head needs, and the way to the GPU."""

import torch
import torch.distributed as dist

import multipack

EMPTY_PACK = [{"input_ids": torch.zeros(2, dtype=torch.int64), "labels": torch.full((2,), multipack.IGNORE)}]


def packs_of_step(dataset, step, steps_an_epoch, global_batch_size):
    """Indices of the packs of optimiser step `step` (0-based, over the whole run), in order; sets the dataset's
    epoch."""
    epoch, step = divmod(step, steps_an_epoch)
    if dataset.epoch != epoch:
        dataset.set_epoch(epoch)
    return range(step * global_batch_size, min((step + 1) * global_batch_size, len(dataset)))


def micro_batches(dataset, indices, micro_batches_a_rank):
    """This rank's share of the step's packs, as batches on the CPU: every world_size-th pack.

    The last step of an epoch may have fewer packs than there are places. A place without a pack gets one without
    targets, because every rank has to take part in every forward and backward.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = []
    for i in range(micro_batches_a_rank):
        place = i * world + rank
        batches.append(to_batch(dataset[indices[place]] if place < len(indices) else EMPTY_PACK))
    return batches


def to_batch(pack):
    """multipack.collate's batch of one pack, its labels replaced by `predicting` (n,), the positions whose next token
    is supervised, and `targets` (n,), those tokens. Found here, on the CPU, so that only these reach the head and
    nothing waits."""
    batch = multipack.collate([pack])
    # (T,); a document's first label is always ignored, so none is predicted across a border
    labels = batch.pop("labels")[0]
    predicting = (labels[1:] != multipack.IGNORE).nonzero()[:, 0]
    batch["predicting"], batch["targets"] = predicting, labels[predicting + 1]
    return batch


def to_device(batch, device):
    """The batch's tensors on the device, copied without waiting."""
    pinned = {
        k: v.pin_memory() if device.type == "cuda" and isinstance(v, torch.Tensor) else v for k, v in batch.items()
    }
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in pinned.items()}
