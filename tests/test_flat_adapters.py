"""FlatAdapters against torch.optim.AdamW and clip_grad_norm_ on whole parameters in one process, fp64."""

import os
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import train_moe
from malaysian_sft.flat_adapters import FlatAdapters
from malaysian_sft.frozen_ring import FrozenRing
from malaysian_sft.lora import local_part, local_tensor
from malaysian_sft.moe_model import make_mesh
from malaysian_sft.training_state import get_shares

WIDTHS = (7, 30, 11)  # of the layers' inner products: 49 to 210 values a factor, none a multiple of the alignment
ARGS = SimpleNamespace(learning_rate=0.05, weight_decay=0.1)
STEPS, MICRO_BATCHES = 3, 2


class Layer(nn.Module):
    """x + magnitude * (B tanh(A x)) + W^T tanh(W x) / 600; W is frozen, and large enough to be gathered."""

    def __init__(self, width):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(width, 7)), nn.Parameter(torch.empty(7, width))
        self.magnitude = nn.Parameter(torch.empty(7))
        self.W = nn.Parameter(torch.empty(600, 7), requires_grad=False)

    def forward(self, x):
        trained = self.magnitude * (torch.tanh(x @ self.A.T) @ self.B.T)
        return x + trained + torch.tanh(x @ self.W.T) @ self.W / 600


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, WIDTHS))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def start_values():
    torch.manual_seed(0)
    return {name: 0.5 * torch.randn(p.shape, dtype=torch.float64) for name, p in Model().named_parameters()}


def data(step, micro_batch, rank):
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_batch + rank)
    return torch.randn(5, 7, dtype=torch.float64, generator=generator)


def sharded_model(mesh, frozen):
    """(model, its ring) with the start values, as train_moe.py makes its own; frozen: whether W is sharded as well."""
    with torch.device("meta"):
        model = Model()
    ring = FrozenRing(model.layers, FlatAdapters(model.layers, mesh, torch.float32), frozen)
    ring.allocate(model, torch.device("cpu"))
    values = start_values()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if id(p) in ring.pieces:
                piece = ring.pieces[id(p)]
                piece.shard[: piece.rows].copy_(values[name][piece.first :][: piece.rows])
            else:
                local_tensor(p).copy_(local_part(values[name], p))
    assert len(ring.pieces) == frozen * len(WIDTHS)
    return model, ring


def worker(rank, world, port, local, every, out):
    """One of `world` ranks, `local` of which share a copy: trains and writes {parameter: value}, norms, shares."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(local)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = make_mesh(torch.device("cpu"), 1)
    model, ring = sharded_model(mesh, frozen=every)
    optimizer = train_moe.make_optimizer(model, ARGS)
    shards = [p for group in optimizer.param_groups for p in group["params"]]
    norms = []
    for step in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            last = micro_batch == MICRO_BATCHES - 1
            ring.adapters.begin(reduces=last or every, last=last)
            model(data(step, micro_batch, rank).float()).backward()
            ring.adapters.finish()
        norms.append(train_moe.clip_gradients(shards, 1.0, mesh).item())
        optimizer.step()
        optimizer.zero_grad()
        ring.forget()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: p.sharded.whole(p) for name, p in trained.items()}
    shares, updates = get_shares(trained, optimizer)
    empty = any(not flat.shard.any() and flat.first > 0 for flats in ring.adapters.layers for flat in flats)
    torch.save(
        (whole, norms, {k: (s.start, s.values) for k, s in shares.items()}, updates, empty), out / f"rank-{rank}.pt"
    )
    dist.barrier()
    dist.destroy_process_group()


def reference(world):
    """({parameter: value}, norms, {parameter: AdamW's state}) of the same steps on whole fp64 parameters."""
    model = Model().double()
    model.load_state_dict(start_values())
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named.items() if "magnitude" not in name]},
            {"params": [p for name, p in named.items() if "magnitude" in name], "weight_decay": 0.0},
        ],
        lr=ARGS.learning_rate,
        weight_decay=ARGS.weight_decay,
    )
    norms = []
    for step in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            for rank in range(world):
                model(data(step, micro_batch, rank)).backward()
        norms.append(nn.utils.clip_grad_norm_(named.values(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return named, norms, {name: optimizer.state[p] for name, p in named.items()}


@pytest.mark.parametrize(
    ("world", "local", "every"),
    [(3, 3, False), (4, 2, True)],
    ids=["accumulated", "two copies, every micro-batch"],
)
def test_steps_equal_adamw_on_whole_parameters(world, local, every, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(world, port, local, every, tmp_path), nprocs=world)
    expected, expected_norms, states = reference(world)
    found = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(world)]
    assert any(empty for *_, empty in found), "no rank holds padding alone"
    for whole, norms, _, updates, _ in found:
        assert updates == STEPS and norms == pytest.approx(expected_norms, rel=1e-4)
        for name, p in expected.items():
            torch.testing.assert_close(whole[name].double(), p.detach(), rtol=1e-4, atol=1e-5, msg=name)
    # what is saved to go on from: every value of adapter and moments once
    for name, p in expected.items():
        for kind, value in {"adapter": p.detach(), **states[name]}.items():
            if kind == "step":
                continue
            parts = sorted(
                (shares[f"{kind}/{name}"] for _, _, shares, *_ in found if f"{kind}/{name}" in shares),
                key=lambda part: part[0],
            )
            assert [start for start, _ in parts] == [
                sum(len(values) for _, values in parts[:i]) for i in range(len(parts))
            ]
            together = torch.cat([values for _, values in parts]).double()
            torch.testing.assert_close(together, value.flatten(), rtol=1e-3, atol=1e-5, msg=f"{kind}/{name}")


def test_a_gradient_that_comes_late_is_an_error(process_group):
    """A parameter that an earlier layer uses as well has a gradient after its own layer was reduced."""
    model, ring = sharded_model(make_mesh(torch.device("cpu"), 1), frozen=False)
    early = model.layers[1].magnitude.sum()
    (model(data(0, 0, 0).float() * early)).backward()
    with pytest.raises(RuntimeError, match="layer 1: a gradient came after"):
        ring.adapters.finish()
