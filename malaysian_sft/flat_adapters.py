"""The layers' adapters, sharded over ranks: fp32 masters in flat shards, gathered in the compute dtype, gradients
reduced a layer at a time.

The trained parameters of a layer lie one after another in a `Flat` (DoRA's magnitudes, which are not decayed, in one of
their own), padded so that every rank has an equal part of it. That part, fp32, is what AdamW updates: one parameter of
the optimiser a Flat. What the model computes with are views of a buffer that the ring gathers the parts into
(frozen_ring.py), beside the layer's frozen weights. Autograd gives these views gradients in their own dtype. Once a
layer's backward is over they are added to an fp32 sum, which the last micro-batch reduces while the next layer's
backward computes.
"""

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

ALIGNED = 64  # values between the starts of parameters, so that kernels' descriptors find them at 128 bytes


def round_up(n, multiple):
    return -(-n // multiple) * multiple


class Flat:
    """Parameters of a layer one after another, each rank holding `length` values from `first` on.

    places: [(module, name of the parameter, the parameter on the meta device)]. writes: whether this rank saves its
    values; of equal shards, those of copies of the model, one does.
    """

    def __init__(self, places, group, writes):
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.group, self.writes = group, writes
        self.places, self.starts, at = places, [], 0
        for _, _, p in places:
            self.starts.append(at)
            at += round_up(p.numel(), ALIGNED)
        self.length = round_up(at, ranks * ALIGNED) // ranks
        self.size, self.first = self.length * ranks, rank * self.length
        self.parameters, self.shard, self.sum = [], None, None

    def allocate(self, whole):
        """Place the parameters in `whole` (size,), a part of a buffer, and make this rank's fp32 shard of them."""
        self.shard = nn.Parameter(torch.zeros(self.length, dtype=torch.float32, device=whole.device))
        for (module, name, p), start in zip(self.places, self.starts, strict=True):
            # .data: what another layer brings into the buffer is no change of what autograd saved, which comes back
            placed = nn.Parameter(whole[start : start + p.numel()].view(p.shape).data)
            placed.sharded = Sharded(self, start, p.numel())
            module._parameters[name] = placed
            self.parameters.append(placed)

    def take_gradients(self):
        """The parameters' gradients in their dtype, (size,), zeros where there is none; leaves them without."""
        parts = []
        for p, start, end in zip(self.parameters, self.starts, [*self.starts[1:], self.size], strict=True):
            parts.append(p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1))
            if end - start > p.numel():
                parts.append(p.new_zeros(end - start - p.numel()))
            p.grad = None
        return torch.cat([part.detach() for part in parts])


@dataclass
class Sharded:
    """Where a parameter's master values are: `numel` of `flat` from `at` on. A parameter has it as `sharded`."""

    flat: Flat
    at: int
    numel: int

    @property
    def start(self):
        """The first of the parameter's values that this rank holds."""
        return min(max(self.flat.first - self.at, 0), self.numel)

    @property
    def stop(self):
        return min(max(self.flat.first + self.flat.length - self.at, 0), self.numel)

    def local(self, of=None):
        """This rank's values of the parameter, fp32 (stop - start,), a view of the shard, or of a tensor beside it."""
        of = self.flat.shard.detach() if of is None else of
        begin = max(self.at + self.start - self.flat.first, 0)
        return of[begin : begin + self.stop - self.start]

    def part(self, whole):
        """What of the parameter's `whole` value belongs to this rank, (stop - start,)."""
        return whole.reshape(-1)[self.start : self.stop]

    def whole(self, parameter):
        """The values of `parameter`, whose Sharded this is, whole, fp32, in its shape. Collective over the shards."""
        whole = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
        self.part(whole).copy_(self.local())
        dist.all_reduce(whole, group=self.flat.group)  # every value is one rank's, and zero on the others
        return whole


class FlatAdapters:
    """The Flats of all `layers` over `mesh`, gathered in `dtype` by a FrozenRing; and the reduction of gradients."""

    def __init__(self, layers, mesh, dtype):
        self.group, self.dtype = mesh["shard"].get_group(), dtype
        copies = "replicate" in mesh.mesh_dim_names
        self.copies = mesh["replicate"].get_group() if copies else None
        writes = not copies or mesh.get_local_rank("replicate") == 0
        self.layers = []
        for layer in layers:
            trained = [
                (module, name, p)
                for path, module in layer.named_modules()
                for name, p in module.named_parameters(prefix=path, recurse=False)
                if p.requires_grad
            ]
            kinds = [[], []]
            for module, name, p in trained:
                kinds["magnitude" in name].append((module, name.rpartition(".")[2], p))
            self.layers.append([Flat(places, self.group, writes) for places in kinds if places])
        self.reduces = self.last = True
        self.late = False  # gradients are reduced when the step's last backward is over, not behind it
        self.collected = set()  # layers, in this backward
        self.flying, self.stream = deque(), None

    def begin(self, reduces, last):
        """A micro-batch begins. reduces: its backward reduces what was added up so far; last: it is the step's last,
        whose sums are also reduced over copies of the model."""
        self.reduces, self.last = reduces, last

    @torch.no_grad()
    def collect(self, i):
        """Layer i's backward is over: add its gradients to its sums, and start reducing them if this is the time."""
        flats = self.layers[i]
        while len(self.flying) > len(flats):  # sums of one layer at a time, besides this one's
            self.land()
        for flat in flats:
            gradients = flat.take_gradients()
            flat.sum = gradients.float() if flat.sum is None else flat.sum.add_(gradients)
            del gradients
            if self.reduces and not self.late:
                self.reduce(flat)
        self.collected.add(i)

    def reduce(self, flat):
        """Start adding up a Flat's sums over the ranks, into the gradient of this rank's shard."""
        part = torch.empty_like(flat.shard)
        before, flat.shard.grad = flat.shard.grad, part if flat.shard.grad is None else flat.shard.grad
        total, flat.sum = flat.sum, None
        if self.stream is None:
            self.add_up(flat.shard.grad, before, part, total)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.add_up(flat.shard.grad, before, part, total)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.flying.append((event, part, total))

    def add_up(self, gradient, before, part, total):
        # as the ring's gathers, in NCCL's own stream, which this one then waits for
        dist.reduce_scatter_tensor(part, total, group=self.group, async_op=True).wait()
        if before is not None:  # of an earlier micro-batch
            gradient.add_(part)
        if self.last and self.copies is not None:
            dist.all_reduce(gradient, group=self.copies, async_op=True).wait()

    def land(self):
        """Wait, on the device, for the oldest reduction; its memory is free for what is queued from now on."""
        event, *_ = self.flying.popleft()
        torch.cuda.current_stream().wait_event(event)

    def collect_rest(self):
        """Collect what no later layer's backward did. Raises RuntimeError if a gradient came after its layer was
        collected."""
        for i, flats in enumerate(self.layers):
            if i not in self.collected:
                self.collect(i)
            elif any(p.grad is not None for flat in flats for p in flat.parameters):
                raise RuntimeError(f"layer {i}: a gradient came after its layer's backward")

    def finish(self):
        """The backward is over: collect the rest, and wait for all reductions, on the device."""
        self.collect_rest()
        if self.reduces and self.late:
            for flats in self.layers:
                while len(self.flying) > len(flats):
                    self.land()
                for flat in flats:
                    self.reduce(flat)
        self.collected.clear()
        while self.flying:
            self.land()
