"""What a run goes on from, taken out of a model and its AdamW and put back: this rank's shares of the adapter and of
both moments, however they are sharded."""

import torch
from torch.distributed.tensor import DTensor

from malaysian_sft.lora import gathered, local_tensor
from malaysian_sft.resume_state import Share

MOMENTS = ("exp_avg", "exp_avg_sq")


def allocated(optimizer, parameter):
    """AdamW's state of one parameter, zeros if there was no step yet."""
    state = optimizer.state[parameter]
    if "step" not in state:
        fused = any(group.get("fused") for group in optimizer.param_groups)
        state["step"] = torch.zeros((), device=local_tensor(parameter).device if fused else "cpu")
        state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
    return state


class WholeOrFsdp:
    """A parameter that a rank has whole, or FSDP2's shard of it along dimension 0; with its AdamW state."""

    def __init__(self, parameter, optimizer):
        self.parameter, self.optimizer = parameter, optimizer
        self.numel, self.start, self.writes = parameter.numel(), 0, True
        self.count = local_tensor(parameter).numel()
        if not isinstance(parameter, DTensor):
            # every rank has all of it: one writes
            self.writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
            return
        mesh, rows = parameter.device_mesh, parameter.shape[0]
        for dim, placement in enumerate(parameter.placements):
            place = mesh.get_local_rank(dim)
            if placement.is_shard(0):
                self.start = min(place * -(-rows // mesh.size(dim)), rows) * (self.numel // rows)
            else:  # a copy of the model on other nodes: the first writes
                self.writes = self.writes and place == 0

    def state(self):
        return allocated(self.optimizer, self.parameter)

    def get(self):
        """{"adapter": (n,), "exp_avg": (n,), "exp_avg_sq": (n,)}, this rank's."""
        state = self.state()
        tensors = {"adapter": self.parameter.detach(), **{moment: state[moment] for moment in MOMENTS}}
        return {kind: local_tensor(tensor).reshape(-1) for kind, tensor in tensors.items()}

    def set(self, read):
        state = self.state()
        tensors = {"adapter": self.parameter.detach(), **{moment: state[moment] for moment in MOMENTS}}
        for kind, tensor in tensors.items():
            local = local_tensor(tensor)
            local.copy_(read(kind, self.start, self.start + self.count).view(local.shape))


class FlatSharded:
    """A parameter of FlatAdapters: a part of what AdamW updates."""

    def __init__(self, parameter, optimizer):
        self.sharded, self.optimizer = parameter.sharded, optimizer
        self.numel, self.start = parameter.numel(), self.sharded.start
        self.count, self.writes = self.sharded.stop - self.start, self.sharded.flat.writes

    def get(self):
        state = allocated(self.optimizer, self.sharded.flat.shard)
        moments = {moment: self.sharded.local(state[moment]) for moment in MOMENTS}
        return {"adapter": self.sharded.local(), **moments}

    def set(self, read):
        for kind, local in self.get().items():
            local.copy_(read(kind, self.start, self.start + self.count))


class Zero3:
    """A parameter that DeepSpeed ZeRO-3 partitioned; its fp32 master is the adapter."""

    def __init__(self, parameter, optimizer):
        self.parameter, self.numel, self.writes = parameter, parameter.ds_numel, True
        zero = parameter._z3_optimizer
        for flat in zero.fp32_partitioned_groups_flat:  # what DeepSpeed has AdamW update
            allocated(optimizer, flat)
        self.partition = parameter.ds_tensor.numel()  # the same on every rank: the last ones are padded
        self.start = min(torch.distributed.get_rank() * self.partition, self.numel)
        self.count = min(self.partition, self.numel - self.start)

    def get(self):
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        tensors = {"adapter": safe_get_local_fp32_param(self.parameter)}
        tensors |= {moment: safe_get_local_optimizer_state(self.parameter, moment) for moment in MOMENTS}
        return {kind: tensor.detach().reshape(-1)[: self.count] for kind, tensor in tensors.items()}

    def set(self, read):
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        # what the forward uses, in the model's dtype; then the master and the moments
        whole = read("adapter", 0, self.numel).view(self.parameter.ds_shape)
        with gathered([self.parameter], write=True):
            self.parameter.copy_(whole)
        padding = (0, self.partition - self.count)
        for kind in ("adapter", *MOMENTS):
            values = torch.nn.functional.pad(read(kind, self.start, self.start + self.count), padding)
            if kind == "adapter":
                safe_set_local_fp32_param(self.parameter, values)
            else:
                safe_set_local_optimizer_state(self.parameter, values, kind)


def _parts(named, optimizer):
    for name, parameter in named.items():
        kind = Zero3 if hasattr(parameter, "ds_id") else FlatSharded if hasattr(parameter, "sharded") else WholeOrFsdp
        yield name, kind(parameter, optimizer)


@torch.no_grad()
def get_shares(named, optimizer):
    """({name: Share}, copied to the CPU; updates made) of the parameters `named` ({name: parameter}) and their AdamW.

    Under ZeRO-3 `optimizer` is the one that DeepSpeed wraps.
    """
    shares = {}
    for name, part in _parts(named, optimizer):
        if part.writes and part.count:
            for kind, values in part.get().items():
                values = values.to("cpu", torch.float32, copy=True, non_blocking=False)
                shares[f"{kind}/{name}"] = Share(values, part.start, part.numel)
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    return shares, int(steps[0]) if steps else 0


@torch.no_grad()
def set_shares(named, optimizer, reader, updates):
    """Put back what get_shares took, by a StateReader. Collective under ZeRO-3."""
    for name, part in _parts(named, optimizer):
        part.set(lambda kind, start, stop, name=name, part=part: reader.read(f"{kind}/{name}", start, stop, part.numel))
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(updates)
