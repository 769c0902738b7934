"""The decoder layers' weights, sharded over ranks and gathered into a ring of two buffers.

FSDP2 gathers by copying: shards into one flat buffer, and out of it into parameters, forward and backward, although
frozen weights never change. Here a rank holds rows of every large frozen weight (of a stack of experts: whole experts).
Layer i is gathered into buffer i % 2, each weight straight to its place, as the bytes that it is stored in, and its
parameters are views of that place from the start: nothing is copied, and nothing is set from step to step. A layer is
gathered on a stream of its own while the one before it computes, in the forward and in the backward. Two layers are
whole at any time.

Adapters do change: their fp32 shards (flat_adapters.py) are cast to the compute dtype each time they are gathered, and
`forget` has to follow every change. Norms, embedding and head stay whole on every rank, and so does all that is frozen
if only adapters are gathered.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from malaysian_sft.fp8 import SCALE

SMALLEST = 1 << 12  # values; a weight with fewer stays whole on every rank
ALIGNED = 128  # bytes, for NCCL and for the kernels' descriptors


@dataclass
class Piece:
    """A frozen weight of a layer, or a Flat: this rank's rows, and the place where all ranks' rows come together."""

    shard: torch.Tensor  # (rows a rank, ...): this rank's rows, the last rank's padded
    first: int  # row of the whole weight that the shard begins with
    rows: int  # of the shard that are the weight's
    whole: torch.Tensor  # (rows a rank * ranks, ...), a part of a buffer
    master: torch.Tensor | None = None  # an adapter's: what the shard is cast from before it is gathered


class FrozenRing:
    """Shards of `adapters` (FlatAdapters), and if `frozen` of the frozen weights of `layers`, over the adapters' group;
    and the two buffers they are gathered into.

    Made of a model on the meta device. `allocate` takes the place of `to_empty` for it; then `pieces`, by id of the
    parameter, says what to read. Layers must be called in order; hooks on them do the rest.
    """

    def __init__(self, layers, adapters, frozen=True):
        self.layers, self.adapters, self.frozen, group = list(layers), adapters, frozen, adapters.group
        self.group = group
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.places = [  # for each layer: (module, name of the parameter, the parameter on the meta device)
            [
                (module, name, p)
                for module in layer.modules()
                for name, p in module.named_parameters(recurse=False)
                if self.spreads(getattr(module, name.removesuffix(SCALE)))  # scales go with their weight
            ]
            for layer in self.layers
        ]
        self.pieces, self.by_layer = {}, []
        self.holds, self.ready = [None, None], [None, None]  # the layer that each buffer holds; when it is all there
        self.backward, self.stream = False, None
        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda *_, i=i: self.before_forward(i))
            layer.register_forward_hook(lambda _, inputs, output, i=i: BeforeBackward.apply(output, self, i))

    def spreads(self, p):
        return (
            self.frozen and not p.requires_grad and p.dim() >= 2 and p.numel() >= SMALLEST and p.shape[0] >= self.ranks
        )

    def allocate(self, causal_lm, device):
        """Give the model storage on `device`: the ring's weights as shards and places in buffers, the rest whole."""
        flats, dtype = self.adapters.layers, self.adapters.dtype
        for layer, held in zip(self.places, flats, strict=True):
            for module, name, _ in [*layer, *(place for flat in held for place in flat.places)]:
                module._parameters[name] = None  # or to_empty would allocate the whole model
        causal_lm.to_empty(device=device)
        if device.type == "cuda":
            self.stream, self.adapters.stream = torch.cuda.Stream(device), torch.cuda.Stream(device)

        def size(p):
            """Bytes of a weight in its buffer, padded to as many rows for every rank."""
            size = -(-p.shape[0] // self.ranks) * self.ranks * p[0].numel() * p.element_size()
            return -(-size // ALIGNED) * ALIGNED

        sizes = [
            sum(size(p) for _, _, p in layer) + sum((flat.size + flat.length) * dtype.itemsize for flat in held)
            for layer, held in zip(self.places, flats, strict=True)
        ]
        buffers = [torch.empty(max(sizes[i::2], default=0), dtype=torch.uint8, device=device) for i in (0, 1)]
        for i, layer in enumerate(self.places):
            at = 0
            self.by_layer.append([])
            for module, name, p in layer:
                rows = -(-p.shape[0] // self.ranks)
                length = rows * p[0].numel() * p.element_size()  # of a shard
                whole = buffers[i % 2][at : at + length * self.ranks].view(p.dtype).view(-1, *p.shape[1:])
                at += size(p)
                first = self.rank * rows
                shard = torch.zeros(length, dtype=torch.uint8, device=device).view(p.dtype).view(rows, *p.shape[1:])
                piece = Piece(shard, first, max(0, min(rows, p.shape[0] - first)), whole)
                placed = torch.nn.Parameter(whole[: p.shape[0]], requires_grad=False)
                module._parameters[name] = placed
                self.pieces[id(placed)] = piece
                self.by_layer[-1].append(piece)
            for flat in flats[i]:
                ends = at + flat.size * dtype.itemsize, at + (flat.size + flat.length) * dtype.itemsize
                # .data: a cast into the shard is no change of what autograd saved of the buffer
                whole, shard = (buffers[i % 2][a:b].view(dtype).data for a, b in ((at, ends[0]), ends))
                flat.allocate(whole)
                self.by_layer[-1].append(Piece(shard, flat.first, flat.length, whole, flat.shard.detach()))
                at = ends[1]

    @torch.no_grad()
    def fetch(self, i):
        """See that layer i is, or will be, in its buffer; what is queued so far may still read what was there."""
        slot = i % 2
        if not 0 <= i < len(self.layers) or self.holds[slot] == i:
            return
        self.holds[slot], self.ready[slot] = i, None
        if not self.by_layer[i]:
            return
        if self.stream is None:
            self.cast(i)
            for piece in self.by_layer[i]:
                self.gather(piece)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.cast(i)
            device = self.by_layer[i][0].shard.device
            # one launch of NCCL for all weights of the layer
            with dist._coalescing_manager(group=self.group, device=device, async_ops=True) as works:
                for piece in self.by_layer[i]:
                    self.gather(piece)
            works.wait()  # makes this stream wait, not the host
            self.ready[slot] = torch.cuda.Event()
            self.ready[slot].record(self.stream)

    def cast(self, i):
        """Layer i's adapter shards as they are now, in the compute dtype."""
        for piece in self.by_layer[i]:
            if piece.master is not None:
                piece.shard.copy_(piece.master)

    def forget(self):
        """The adapters changed: what the buffers hold of them is old."""
        self.holds, self.ready = [None, None], [None, None]

    def gather(self, piece):
        whole, shard = (tensor.flatten().view(torch.uint8) for tensor in (piece.whole, piece.shard))
        dist.all_gather_into_tensor(whole, shard, group=self.group)

    def use(self, i):
        """Layer i's weights are in place for whatever is queued to compute next."""
        self.fetch(i)
        if self.ready[i % 2] is not None:
            torch.cuda.current_stream().wait_event(self.ready[i % 2])

    def before_forward(self, i):
        """Hook: use layer i, and gather the next one behind it, unless this is a recomputation in the backward."""
        if i == 0 or not torch.is_grad_enabled():  # a recomputation of layer 0 ends the backward, which is as good
            self.backward = False
        self.use(i)
        if not self.backward:
            self.fetch(i + 1)

    def before_backward(self, i):
        """Use layer i for its backward, and gather the one before it behind it. The backward of the layer after it is
        over: autograd runs what was made last first, and adds to a parameter's gradient before anything else."""
        self.backward = True
        self.use(i)
        self.fetch(i - 1)
        if i + 1 < len(self.layers):
            self.adapters.collect(i + 1)


class BeforeBackward(torch.autograd.Function):
    """The identity; its backward runs right before that of the layer whose output it is given."""

    @staticmethod
    def forward(ctx, output, ring, i):
        ctx.ring, ctx.i = ring, i
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        ctx.ring.before_backward(ctx.i)
        return gradient, None, None
