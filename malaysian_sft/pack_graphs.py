"""A pack's forward and backward through the decoder as two CUDA graphs, recorded once and launched as one thing each.

Launched one by one, the kernels of a layer take the host longer than they take a fast GPU to run. In a graph they cost
it nothing, but nothing may change from pack to pack except what is in memory. So every pack is padded to
max_seq_length, by one more document of which nothing is trained or counted, and by documents without tokens to one of a
few numbers of documents; it is copied to where the graphs read it; and gradients are added up where they were when the
first graph was recorded, as DoRA's norms are renewed where they are.

Not in the graphs: the head and its loss, whose work goes by the number of supervised tokens, clipping, the optimiser,
and the reduction of gradients over ranks, which then follows the step's last backward instead of running behind it.
"""

import gc

import torch

DOCUMENTS = 128, 1024  # numbers of documents that packs are padded to, besides max_seq_length, the most there can be


def why_not_recorded(model, args, lora_args, device):
    """What keeps a run's packs from being recorded, in words; None if nothing does. args: with its memory settled."""
    if device.type != "cuda":
        return "there is no GPU"
    if lora_args.lora_dropout > 0:
        return f"--lora_dropout {lora_args.lora_dropout} draws other numbers for every pack"
    if args.router_aux_loss_coef > 0:
        return "the loss of --router_aux_loss_coef would count the padding"
    if args.activations == "full":
        return "--activations full keeps the state of random numbers, which cannot be recorded"
    if args.reduce_every_micro_batch:
        return "--reduce_every_micro_batch True reduces gradients behind the backward"
    if model.document_numbers:
        return "a layer of this model counts its documents anew in every pack"
    return None


def refuse_graphs(model, args, lora_args, device):
    """Raise ValueError for a run with --cuda_graphs True whose packs cannot be recorded."""
    if args.cuda_graphs and (reason := why_not_recorded(model, args, lora_args, device)) is not None:
        raise ValueError(f"--cuda_graphs True: {reason}; pass --cuda_graphs False")


def record_graph(function, pool):
    """`function`, recorded and not run, as a CUDA graph with memory of `pool`; returns what launches it.

    Raises ValueError for what cannot be recorded: a wait for the GPU, say, in a part that runs as transformers wrote
    it.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--cuda_graphs True: this model cannot be recorded ({line}); pass --cuda_graphs False"
        ) from error
    return graph.replay


class Pair:
    """The graphs of packs padded to `documents` documents."""

    def __init__(self, graphs, documents):
        self.graphs, self.documents, self.hidden = graphs, documents, None
        ring = graphs.model.ring
        graphs.forget_held()
        gc.collect()  # what a pack without graphs left must make room for theirs
        self.launch_forward = record_graph(self.forward, graphs.pool)
        if ring is not None:  # the backward's graph follows the forward's as a whole, not an event in it
            ring.ready = [None, None]
        self.launch_backward = record_graph(self.backward, graphs.pool)
        if self.hidden is not None:
            self.hidden = self.hidden.detach()  # what was saved for the recorded backward is no longer to be kept
        graphs.forget_held()

    def forward(self):
        self.hidden = self.graphs.decode(self.documents)

    def backward(self):
        torch.autograd.backward(self.hidden, self.graphs.gradient)
        if self.graphs.model.ring is not None:
            self.graphs.model.ring.adapters.collect_rest()


class Launched(torch.autograd.Function):
    """A Pair as a part of a computation: its forward and backward are the graphs'. `anchor` has autograd call it."""

    @staticmethod
    def forward(ctx, anchor, pair):
        ctx.pair = pair
        pair.launch_forward()
        return pair.hidden.detach()

    @staticmethod
    def backward(ctx, gradient):
        graphs = ctx.pair.graphs
        graphs.gradient.copy_(gradient)
        ctx.pair.launch_backward()
        graphs.forget_held()
        if (ring := graphs.model.ring) is not None:
            ring.adapters.collected.update(range(len(ring.layers)))
        return None, None


class PackGraphs:
    """The decoder of `model`, a ModelWithLoss, over packs of at most `tokens` tokens.

    The first pack runs as it would without graphs, padded, and compiles what the graphs launch.
    """

    def __init__(self, model, tokens):
        self.model, self.tokens = model, tokens
        device = next(model.parameters()).device
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.sizes = *(size for size in DOCUMENTS if size < tokens), tokens
        self.at = torch.arange(tokens, device=device)
        self.input_ids, self.position_ids = torch.zeros_like(self.at)[None], torch.zeros_like(self.at)[None]
        self.counted = torch.zeros(tokens, dtype=torch.bool, device=device)
        self.boundaries = torch.zeros(tokens + 1, dtype=torch.int32, device=device)
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.gradient, self.pairs = None, {}
        modules = list(model.causal_lm.modules())
        self.rooms = {id(room): room for room in (getattr(m, "wide_room", None) for m in modules) if room is not None}
        ring = model.ring
        if ring is not None:
            ring.adapters.late = True
            self.sums = [(flat, "sum") for flats in ring.adapters.layers for flat in flats]
        else:
            self.sums = [(p, "grad") for p in model.parameters() if p.requires_grad]
        self.kept = [None] * len(self.sums)

    def __call__(self, batch, counts):
        """The decoder's last hidden states, (1, tokens, H), of a batch of `to_batch` on the device, padding after it.
        counts: whether its tokens are counted in the router's load. Raises ValueError for a pack that is too long."""
        documents = self.fill(batch, counts)
        if self.gradient is None:
            hidden = self.decode(documents)
            self.gradient = torch.empty_like(hidden)
            return hidden
        self.keep_sums()
        if documents not in self.pairs:
            if not self.pairs:
                self.renew_norms()  # in memory of their own
            self.pairs[documents] = Pair(self, documents)
        return Launched.apply(self.anchor, self.pairs[documents])

    def fill(self, batch, counts):
        """Copy a pack to where the graphs read it, padded; returns the number of documents that it was padded to."""
        tokens, documents = batch["input_ids"].shape[1], len(batch["cu_seq_lens_q"]) - 1
        if tokens > self.tokens:
            raise ValueError(f"a pack of {tokens} tokens; --cuda_graphs True expects at most {self.tokens}")
        self.input_ids.zero_()[:, :tokens].copy_(batch["input_ids"])
        torch.sub(self.at, tokens, out=self.position_ids[0])
        self.position_ids[:, :tokens].copy_(batch["position_ids"])
        self.boundaries.fill_(self.tokens)[: documents + 1].copy_(batch["cu_seq_lens_q"])
        torch.lt(self.at, tokens if counts else 0, out=self.counted)
        return next(size for size in self.sizes if documents + (tokens < self.tokens) <= size)

    def decode(self, documents):
        """The decoder over what `fill` left, (1, tokens, H)."""
        boundaries, load = self.boundaries[: documents + 1], self.model.router_load
        load.enabled, load.counted = True, self.counted
        hidden = self.model.causal_lm.base_model(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            cu_seq_lens_q=boundaries,
            cu_seq_lens_k=boundaries,
            max_length_q=self.tokens,
            max_length_k=self.tokens,
            use_cache=False,
        ).last_hidden_state
        load.enabled, load.counted = False, None
        return hidden

    def keep_sums(self):
        """See that gradients are added up where the graphs do it, from zero if they were dropped since."""
        dropped = []
        for i, (holder, name) in enumerate(self.sums):
            found, kept = getattr(holder, name), self.kept[i]
            if kept is None:
                like = holder if name == "grad" else torch.empty(holder.size, device=self.at.device)
                self.kept[i] = torch.zeros_like(like) if found is None else found
            elif found is None:
                dropped.append(kept)
            elif found is not kept:
                kept.copy_(found)
            setattr(holder, name, self.kept[i])
        if dropped:
            torch._foreach_zero_(dropped)

    @torch.no_grad()
    def renew_norms(self):
        """DoRA's norms of the adapter as it is now, where the graphs read them. Collective."""
        if not any(module.has_norms for module in self.model.with_norms):
            return
        ring = self.model.ring
        for i, layer in enumerate(self.model.causal_lm.base_model.layers):
            if ring is not None:
                ring.use(i)
                ring.fetch(i + 1)
            for module in layer.modules():
                if getattr(module, "has_norms", False):
                    module.renew_norms()
        self.forget_held()

    def forget_held(self):
        """What buffers that layers share hold is what a graph left there: nobody is to count on it."""
        for room in self.rooms.values():
            room.holder = None
        if self.model.ring is not None:
            self.model.ring.forget()
