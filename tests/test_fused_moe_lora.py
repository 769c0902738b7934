"""The experts block: reference, module and kernels.

`pytest tests/test_fused_moe_lora.py` runs on a CPU: the Triton kernels in Triton's interpreter, the Gluon kernels in
hopper_simulator.py (fp32, small shapes, in processes of their own), and all of them through the compiler for several
GPUs, to see that they fit. `pytest -m gpu tests/test_fused_moe_lora.py` runs them in bf16 on a GPU.
"""

import copy
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from conftest import tiny_config, tiny_model
from fused_moe_lora import FusedMoELoRA, Projection, dora_norm, moe_lora_reference, squared_row_norms, wrap_experts
from malaysian_sft import moe_autograd, moe_hopper, moe_hopper_fp8, moe_routing
from malaysian_sft.moe_autograd import moe_lora
from malaysian_sft.moe_routing import AMPERE, INTERPRETER, route, tiles_for

ADAPTERS = [f"{name}_proj_lora_{part}" for name in ("gate", "up", "down") for part in "AB"]

# name of the edge -> T, H, I, E, top_k, r, DoRA, mode, routing
INTERPRETED = {
    "plain": (24, 32, 16, 4, 2, 8, False, "fast", "random"),
    "dora, nothing fits the tiles": (19, 40, 24, 5, 3, 6, True, "fast", "random"),
    "one token": (1, 24, 20, 5, 2, 4, True, "frugal", "random"),
    "experts without rows": (13, 32, 16, 9, 1, 4, False, "frugal", "random"),
    "all rows to the same experts": (33, 32, 16, 6, 2, 4, True, "fast", "same"),
    "every expert for every token, rank over one block": (10, 24, 16, 3, 3, 20, False, "fast", "random"),
    "gates of zero, large gates": (30, 24, 20, 3, 2, 4, False, "fast", "odd gates"),
    "dora, gates and scales of zero": (30, 24, 20, 3, 2, 4, True, "frugal", "odd gates"),
}
# name of the edge -> the same, and what of the Hopper path's sizes is not as usual
SIMULATED = {
    "last column tile moved inwards, rank between powers of two": (
        200,
        320,
        384,
        3,
        2,
        24,
        False,
        "fast",
        "random",
        {},
    ),
    "dora, several slices of H": (130, 768, 128, 4, 1, 32, True, "fast", "skewed", {}),
    "one token": (1, 128, 128, 4, 2, 16, True, "frugal", "random", {}),
    "experts without rows, column tiles beyond the matrix": (
        90,
        192,
        128,
        9,
        2,
        64,
        False,
        "frugal",
        "skewed",
        {"multiprocessors": 5},
    ),
    "row tiles in several groups, few steps along K": (
        200,
        64,
        256,
        2,
        2,
        8,
        False,
        "fast",
        "same",
        {"hopper": (3, 1)},
    ),
    "rank over one block, and too large for the tensor cores' sweep": (
        100,
        128,
        256,
        3,
        3,
        72,
        True,
        "fast",
        "random",
        {},
    ),
    "gates of zero, large gates": (130, 128, 128, 2, 1, 16, False, "fast", "odd gates", {}),
    "dora, gates and scales of zero": (130, 128, 128, 2, 1, 16, True, "fast", "odd gates", {}),
}
# function, part of its source, what to put there instead, what has to be found
MISTAKES = [
    ("hopper_consumer", " " * 20 + "fence_async_shared()", " " * 20 + "pass", "tensor cores read .* without a fence"),
    ("hopper_consumer", "fence_async_shared()\n            second", "second", "bulk store read .* without a fence"),
    ("hopper_consumer", "mbarrier.wait(multiplied, count & 1)\n            held", "held", "wrong"),
    ("hopper_consumer", "held = (step + STAGES - 1) % STAGES", "held = step % STAGES", "deadlock|wrong"),
    (
        "hopper_consumer",
        "warpgroup_mma_wait(num_outstanding=0, deps=(acc,))",
        "acc",
        "before its products were waited for",
    ),
    ("hopper_hand_back", "tma.store_wait(0)", "tma.store_wait(2)", "wrong"),
    ("hopper_producer", "(128 + 256) * 64 * 2", "(128 + 128) * 64 * 2", "more bytes than a barrier expects"),
    ("hopper_producer", "(128 + 256) * BLOCK_R * 2", "(128 + 256) * BLOCK_R * 2 + 2", "deadlock"),
    ("hopper_store", "rows < last, 1", "rows < last + 1, 1", "wrong|outside a storage"),
    ("hopper_swiglu_backward_kernel", "tma.store_wait(2)", "tma.store_wait(4)", "wrong"),
]
ON_GPU = {
    "hopper tiles": (700, 512, 256, 16, 4, 32, "random"),
    "one token": (1, 256, 128, 8, 2, 32, "random"),
    "all rows to the same experts": (500, 256, 128, 8, 2, 16, "same"),
    "experts without rows, partial column tiles": (300, 1024, 1408, 8, 1, 64, "skewed"),
    "a rank between powers of two": (300, 512, 384, 8, 2, 24, "random"),
    "nothing fits the tiles": (77, 200, 72, 6, 3, 12, "random"),
    "gates and scales of zero, and large ones": (300, 256, 128, 4, 2, 16, "odd gates"),
    "every expert for every token, large rank": (129, 256, 128, 4, 4, 256, "random"),
}


def make_case(T, H, I, E, top_k, r, dora, routing, device="cpu", dtype=torch.float64, seed=0):  # noqa: E741
    """Random inputs, B and scales non-zero: (leaves that get gradients, fixed tensors, upstream gradient)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(device=device, dtype=dtype)

    shapes = {"gate": (I, H), "up": (I, H), "down": (H, I)}
    leaves = {
        "hidden_states": normal(T, H),
        "top_k_weights": torch.rand(T, top_k, generator=generator).to(device=device, dtype=torch.float32),
    }
    for name, (out_features, in_features) in shapes.items():
        leaves[f"{name}_proj_lora_A"] = normal(E, r, in_features, std=in_features**-0.5)
        leaves[f"{name}_proj_lora_B"] = normal(E, out_features, r, std=r**-0.5)
    if dora:
        for name, (out_features, _) in shapes.items():
            leaves[f"{name}_scale"] = 1 + 0.3 * torch.randn(E, out_features, generator=generator).to(device)
    scores = torch.rand(T, E, generator=generator)
    if routing == "same":
        scores += torch.arange(E)
    if routing == "skewed":
        scores[:, : E // 2] -= 0.9
    weights = normal(E, 2 * I, H, std=H**-0.5)
    if routing == "odd gates":
        weights[:, :4] = leaves["gate_proj_lora_B"][:, :4] = 0  # gates of zero, whose gradient is not
        weights[:, 4:6] *= 200  # silu(gate) is gate or, by underflow, zero
        weights[:, I + 6 : I + 9] = leaves["up_proj_lora_B"][:, 6:9] = 0
        if dora:
            leaves["up_scale"][:, 9:12] = 0
            leaves["gate_scale"][:, 12:15] = 0
    fixed = {
        "top_k_index": scores.topk(top_k, dim=-1).indices.to(device),
        "gate_up_proj": weights,
        "down_proj": normal(E, H, I, std=I**-0.5),
    }
    return leaves, fixed, normal(T, H)


def by_name(block, tensors, **options):
    """`block` of the tensors of `make_case`, whose names are flat."""
    tensors = dict(tensors)
    for name in ("gate", "up", "down"):
        A, B = tensors.pop(f"{name}_proj_lora_A"), tensors.pop(f"{name}_proj_lora_B")
        tensors[name] = Projection(A, B, tensors.pop(f"{name}_scale", None))
    return block(**tensors, scaling=0.7, **options)


def run(block, leaves, fixed, upstream, dtype=None, **options):
    """Output and every gradient of `block`, in `dtype` if given."""

    def cast(t):
        return t if dtype is None or not t.is_floating_point() else t.to(dtype)

    leaves = {name: cast(t).detach().clone().requires_grad_() for name, t in leaves.items()}
    out = by_name(block, leaves | {name: cast(t) for name, t in fixed.items()}, **options)
    out.backward(cast(upstream))
    return {"out": out.detach(), **{name: t.grad for name, t in leaves.items()}}


def relative_errors(got, truth):
    return {
        name: ((got[name].double() - t.double()).norm() / t.double().norm().clamp_min(1e-30)).item()
        for name, t in truth.items()
    }


def assert_three_way(case, dora, mode, routing, device, dtype, truth_dtype, slack, contexts=None):
    """error(kernel) <= error(plain PyTorch) + slack, of output and gradients against a truth in more precision; all
    runs bit-identical.

    contexts: a context manager for each run of the kernels; by default two runs as they are.
    """
    leaves, fixed, upstream = make_case(*case, dora, routing, device, dtype)
    truth = run(moe_lora_reference, leaves, fixed, upstream, truth_dtype)
    plain = relative_errors(run(moe_lora_reference, leaves, fixed, upstream), truth)
    results = []
    for context in contexts or (nullcontext(), nullcontext()):
        with context:
            results.append(run(moe_lora, leaves, fixed, upstream, mode=mode))
    errors = relative_errors(results[0], truth)
    wrong = {name: (error, plain[name]) for name, error in errors.items() if not error <= plain[name] * 1.1 + slack}
    assert not wrong, f"(kernel's error, plain PyTorch's error): {wrong}"
    assert all(torch.equal(result[name], results[0][name]) for result in results[1:] for name in result), "runs differ"


def saved_bytes(case, dora, mode):
    """Bytes that autograd keeps for the backward of one block in fp32, each storage once."""
    leaves, fixed, _ = make_case(*case, dora, "random", dtype=torch.float32)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = by_name(moe_lora, {name: t.requires_grad_() for name, t in leaves.items()} | fixed, mode=mode)
    del out
    return sum(kept.values())


def run_interpreted():
    for name, (*case, dora, mode, routing) in INTERPRETED.items():
        assert_three_way(case, dora, mode, routing, "cpu", torch.float32, torch.float64, slack=1e-6)
        print("ok", name, flush=True)
    for name in ("AMPERE", "FULL_PRECISION"):  # the sizes that GPUs get
        sizes = getattr(moe_routing, name)
        context = mock.patch.object(moe_autograd, "tiles_for", lambda device, dtype, sizes=sizes: sizes)
        case = (70, 72, 200, 3, 2, 72)
        assert_three_way(
            case, True, "fast", "random", "cpu", torch.float32, torch.float64, slack=1e-6, contexts=[context]
        )
        print("ok", name, flush=True)
    for dora in (False, True):
        T, H, I, E, top_k, r = case = 20, 24, 16, 4, 2, 4  # noqa: E741
        kept = {mode: saved_bytes(case, dora, mode) for mode in ("fast", "frugal")}
        # frugal: nothing that has a row's values
        assert kept["fast"] - kept["frugal"] == 4 * T * top_k * (2 * I + 3 * r + H * dora), kept
    # an array that is aligned for one T and not for another would have Triton compile anew for every pack
    for T in range(1, 12):
        routing = route(torch.zeros(T, 3, dtype=torch.int64), torch.ones(T, 3), 5, INTERPRETER)
        pointers = {name: getattr(routing, name).data_ptr() % 16 for name in routing._fields}
        assert not any(pointers.values()), (T, pointers)
    for T, E, top_k in ((40, 5, 2), (3, 300, 2), (60, 7, 1)):
        index = torch.rand(T, E).topk(top_k).indices
        index[: 3 * T // 4, 0] = E - 1  # so that one expert is long
        rows = torch.bincount(index.reshape(-1), minlength=E)
        order = route(index, torch.ones(T, top_k), E, INTERPRETER).order
        assert torch.equal(order[:E].long(), rows.argsort(descending=True, stable=True)), (T, E)
        assert order[E] == (rows > 2 * T * top_k // E).sum() >= 1


def run_simulated():
    import hopper_simulator

    @contextmanager
    def simulated(timing, r, options):
        with hopper_simulator.installed(timing, timing, **options) as kernels:
            yield
        assert kernels["hopper_gemm_kernel"].launches >= 4  # else the portable path was taken
        assert kernels["hopper_swiglu_backward_kernel"].launches == (r <= 64)

    for name, (*case, dora, mode, routing, options) in SIMULATED.items():
        contexts = [simulated(timing, case[-1], options) for timing in ("early", "late", "random")]
        assert_three_way(case, dora, mode, routing, "cpu", torch.float32, torch.float64, slack=1e-6, contexts=contexts)
        print("ok", name, flush=True)


def run_mistakes():
    import hopper_simulator

    leaves, fixed, upstream = make_case(300, 192, 256, 3, 2, 24, False, "random", dtype=torch.float32)
    truth = run(moe_lora_reference, leaves, fixed, upstream, torch.float64)
    for function, right, wrong, found in MISTAKES:
        for seed in range(4):
            try:
                with hopper_simulator.installed(seed, "late", mistake=(function, right, wrong)):
                    errors = relative_errors(run(moe_lora, leaves, fixed, upstream, mode="fast"), truth)
                what = "wrong" if not max(errors.values()) < 1e-5 else ""
            except hopper_simulator.Race as race:
                what = str(race)
            if what:
                break
        assert re.search(found, what), f"{right!r} -> {wrong!r} in {function}: expected {found!r}, found {what!r}"
        print("ok", function, flush=True)


# KiB that one program may have, by compute capability
SHARED_MEMORY = {
    80: 163,
    86: 99,
    89: 99,
    90: 227,
    100: 227,
    120: 99,
}
COMPILED = [  # capability, dtype, rank, DoRA
    *[(90, torch.bfloat16, r, dora) for r, dora in ((32, False), (32, True), (64, True))],
    *[(86, torch.bfloat16, r, dora) for r, dora in ((64, False), (256, True))],
    (120, torch.bfloat16, 64, False),
    (86, torch.float32, 64, True),
]
MORE_COMPILED = [
    *[(90, torch.bfloat16, r, dora) for r in (8, 24, 64, 128, 256) for dora in (False, True)],
    *[
        (capability, torch.bfloat16, r, dora)
        for capability in (80, 89, 100, 120)
        for r in (32, 256)
        for dora in (False, True)
    ],
    *[(capability, torch.float32, r, False) for capability in (86, 90) for r in (32, 64, 256)],
]


@contextmanager
def compiling(capability):
    """Within: kernels that are launched are compiled as for a GPU of this capability instead. Yields a list of (name,
    compiled kernel)."""
    import triton
    from triton.backends.compiler import GPUTarget

    launched, cuda = [], SimpleNamespace(type="cuda")

    def launch(kernel, grid):
        return lambda *arguments, **options: launched.append(
            (kernel.fn.__name__, kernel.warmup(*arguments, grid=grid, **options))
        )

    driver = SimpleNamespace(  # the part of one that compiling needs; each capability is a device of its own
        get_current_device=lambda: capability,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    with (
        mock.patch("torch.cuda.get_device_capability", lambda device: divmod(capability, 10)),
        mock.patch.object(triton.runtime.jit.KernelInterface, "__getitem__", launch),
        mock.patch.object(moe_hopper, "multiprocessors", lambda device: 100),
        mock.patch.object(moe_hopper_fp8, "multiprocessors", lambda device: 100),
        mock.patch.object(moe_autograd, "tiles_for", lambda device, dtype: tiles_for(cuda, dtype)),
    ):
        yield launched


def run_compiler(settings=COMPILED):
    """Compile every kernel that a block launches, forward and backward, as for a GPU of each capability; check what it
    would take there."""
    for capability, dtype, r, dora in settings:
        with compiling(capability) as launched:
            leaves, fixed, upstream = make_case(300, 512, 256, 4, 2, r, dora, "random", dtype=dtype)
            run(moe_lora, leaves, fixed, upstream)
        names = {name for name, _ in launched}
        hopper = capability == 90 and dtype == torch.bfloat16
        assert ("hopper_gemm_kernel" in names) == hopper, names
        assert ("hopper_swiglu_backward_kernel" in names) == (hopper and r <= 64), names
        what = f"capability {capability}, {dtype}, rank {r}, DoRA {dora}"
        check_resources(launched, capability, what, stack=0 if hopper and r <= 64 else None)
        print("ok", capability, dtype, r, dora, flush=True)


def check_resources(launched, capability, what, stack=None):
    """Raise unless compiled kernels fit a GPU of this capability, with at most so many bytes of spilled registers."""
    for name, kernel in launched:
        assert kernel.metadata.shared <= SHARED_MEMORY[capability] << 10, (
            f"{name} for {what}: {kernel.metadata.shared} bytes of shared memory"
        )
        if stack is not None:
            spilled = stack_bytes(kernel)
            assert spilled <= stack, f"{name} for {what}: registers spilled into {spilled} bytes a thread"


def stack_bytes(kernel):
    """Bytes of local memory that a thread of a compiled kernel needs: none unless registers do not suffice."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


def in_a_process(call, count, timeout=900, module="test_fused_moe_lora", **environment):
    """Call one of the functions above, which change Triton as a whole, in a process of its own; it prints "ok" `count`
    times."""
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", f"import {module} as t; t.{call}"]
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=timeout
    )
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-3000:]
    assert result.stdout.count("ok ") == count


def test_kernels_in_the_interpreter():
    in_a_process("run_interpreted()", len(INTERPRETED) + 2, TRITON_INTERPRET="1")


def test_hopper_kernels_on_simulated_schedules():
    in_a_process("run_simulated()", len(SIMULATED), TRITON_INTERPRET="1")


def test_the_simulator_finds_mistakes():
    in_a_process("run_mistakes()", len(MISTAKES), TRITON_INTERPRET="1")


def test_kernels_fit_the_gpus_they_are_for():
    in_a_process("run_compiler()", len(COMPILED))


@pytest.mark.slow
def test_kernels_fit_more_gpus():
    in_a_process("run_compiler(t.MORE_COMPILED)", len(MORE_COMPILED), timeout=900)


# ----------------------------------------------------------------------------------------------------------------------
# Reference
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True])
def test_reference_gradcheck(dora):
    leaves, fixed, _ = make_case(4, 6, 5, 4, 2, 2, dora, "random")
    names = list(leaves)
    values = [t.double().requires_grad_() for t in leaves.values()]
    assert torch.autograd.gradcheck(
        lambda *v: by_name(moe_lora_reference, dict(zip(names, v, strict=True)) | fixed), values
    )


def mixtral():
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def family_model(family):
    return mixtral() if family == "mixtral" else tiny_model(family)


def randomise(experts, seed=0):
    """Give every adapter parameter a random value, so that nothing is at its start (B = 0, magnitude = ||W||)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if name.endswith("magnitude"):
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
            elif "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def merged_weight(weight, lora_A, lora_B, scaling, magnitude=None):
    merged = weight + scaling * lora_B @ lora_A
    return merged if magnitude is None else merged * (magnitude / merged.norm(dim=-1))[..., None]


def merge(experts):
    """gate_up_proj and down_proj with the adapters of a FusedMoELoRA merged in, by the definition of LoRA and DoRA."""
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    weights = {"gate": gate, "up": up, "down": experts.down_proj}
    merged = {
        name: merged_weight(
            weight,
            getattr(experts, f"{name}_proj_lora_A"),
            getattr(experts, f"{name}_proj_lora_B"),
            experts.scaling,
            getattr(experts, f"{name}_proj_lora_magnitude", None),
        )
        for name, weight in weights.items()
    }
    return torch.cat([merged["gate"], merged["up"]], dim=1), merged["down"]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "qwen2_moe", "mixtral"])
def test_wrapped_model_equals_transformers_with_merged_weights(family, dora):
    model = family_model(family)
    merged = copy.deepcopy(model)
    tokens = torch.randint(5, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    before = model(tokens).logits
    count = wrap_experts(model, r=4, lora_alpha=8, use_dora=dora)
    assert count == sum(name.endswith("mlp.experts") for name, _ in merged.named_modules()) > 0
    torch.testing.assert_close(model(tokens).logits, before, atol=2e-5, rtol=1e-4)  # the start changes nothing
    for name, module in model.named_modules():
        if isinstance(module, FusedMoELoRA):
            randomise(module)
            target = merged.get_submodule(name)
            with torch.no_grad():
                gate_up, down = merge(module)
                target.gate_up_proj.copy_(gate_up)
                target.down_proj.copy_(down)
    after = model(tokens).logits
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(after, merged(tokens).logits, atol=2e-4, rtol=1e-3)


def test_dora_equals_peft_on_every_expert():
    """One PEFT-adapted MLP per expert (nn.Linear with use_dora), same numbers: same output and the same gradient of
    every parameter."""
    from peft import LoraConfig, get_peft_model

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(12, 8, bias=False), nn.Linear(12, 8, bias=False)
            self.down_proj = nn.Linear(8, 12, bias=False)

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    torch.manual_seed(0)
    experts = FusedMoELoRA(2, 12, 8, r=3, lora_alpha=6, use_dora=True)
    with torch.no_grad():
        experts.gate_up_proj.normal_()
        experts.down_proj.normal_()
    experts.reset_lora_parameters()
    randomise(experts)
    x, index, weights = (
        torch.randn(7, 12),
        torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [0, 1], [1, 0]]),
        torch.rand(7, 2),
    )
    upstream = torch.randn(7, 12)
    out = experts(x, index, weights)
    out.backward(upstream)
    expected = torch.zeros(7, 12)
    for e in range(2):
        mlp = MLP()
        peft = get_peft_model(
            mlp, LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["gate_proj", "up_proj", "down_proj"])
        )
        gate, up = experts.gate_up_proj[e].chunk(2)
        for name, weight in (("gate", gate), ("up", up), ("down", experts.down_proj[e])):
            layer = getattr(mlp, f"{name}_proj")
            with torch.no_grad():
                layer.base_layer.weight.copy_(weight)
                layer.lora_A["default"].weight.copy_(getattr(experts, f"{name}_proj_lora_A")[e])
                layer.lora_B["default"].weight.copy_(getattr(experts, f"{name}_proj_lora_B")[e])
                layer.lora_magnitude_vector["default"].weight.copy_(getattr(experts, f"{name}_proj_lora_magnitude")[e])
        weight_of_e = (weights * (index == e)).sum(dim=1, keepdim=True)
        contribution = peft(x) * weight_of_e
        contribution.backward(upstream)
        expected += contribution.detach()
        for name in ("gate", "up", "down"):
            layer = getattr(mlp, f"{name}_proj")
            for ours, theirs in (
                ("lora_A", layer.lora_A),
                ("lora_B", layer.lora_B),
                ("lora_magnitude", layer.lora_magnitude_vector),
            ):
                grad = getattr(experts, f"{name}_proj_{ours}").grad[e]
                torch.testing.assert_close(grad, theirs["default"].weight.grad, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Module
# ----------------------------------------------------------------------------------------------------------------------


def test_dora_norm_equals_the_norm_of_the_merged_weight():
    torch.manual_seed(0)
    weight, lora_A, lora_B = torch.randn(3, 10, 16), torch.randn(3, 4, 16), torch.randn(3, 10, 4)
    direct = (weight.double() + 1.5 * lora_B.double() @ lora_A.double()).norm(dim=-1)
    torch.testing.assert_close(
        dora_norm(weight, squared_row_norms(weight), lora_A, lora_B, 1.5).double(), direct, atol=1e-5, rtol=1e-5
    )


def test_start_values_on_the_meta_device_and_after_loading():
    reference_model = tiny_model("qwen3_moe")
    with torch.device("meta"):
        model = tiny_model("qwen3_moe")
    assert wrap_experts(model, r=4, lora_alpha=8, use_dora=True) == 2
    assert all(p.is_meta for p in model.parameters())
    experts = model.model.layers[0].mlp.experts.to_empty(device="cpu")
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(experts, name).copy_(getattr(reference_model.model.layers[0].mlp.experts, name))
    torch.manual_seed(3)
    experts.reset_lora_parameters()
    for name, in_features in (("gate_proj", 64), ("up_proj", 64), ("down_proj", 32)):
        lora_A = getattr(experts, f"{name}_lora_A")
        bound = in_features**-0.5  # of the expert's own fan-in, whatever the number of experts
        assert 0.95 * bound < lora_A.abs().max() <= bound
        assert getattr(experts, f"{name}_lora_B").abs().max() == 0
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    torch.testing.assert_close(experts.up_proj_lora_magnitude.detach(), up.norm(dim=-1))
    torch.testing.assert_close(experts.gate_proj_lora_magnitude.detach(), gate.norm(dim=-1))
    trainable = {name for name, p in experts.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in experts.named_parameters()} - {"gate_up_proj", "down_proj"}
    assert all(p.dtype == torch.float32 for n, p in experts.named_parameters() if n in trainable)


def test_cached_norms_are_used_until_forgotten():
    torch.manual_seed(0)
    experts = FusedMoELoRA(3, 16, 8, r=2, lora_alpha=4, use_dora=True, cache_norms=True)
    with torch.no_grad():
        experts.gate_up_proj.normal_()
        experts.down_proj.normal_()
    experts.reset_lora_parameters()
    inputs = torch.randn(9, 16), torch.randint(3, (9, 2)), torch.rand(9, 2)
    experts(*inputs)
    randomise(experts)
    stale = experts(*inputs)
    experts.forget_norms()
    fresh = experts(*inputs)
    gate_up, down = merge(experts)
    shapes = ((2, 16), (8, 2)), ((2, 16), (8, 2)), ((2, 8), (16, 2))
    zeros = [Projection(torch.zeros(3, *A), torch.zeros(3, *B)) for A, B in shapes]
    merged = moe_lora_reference(*inputs, gate_up, down, *zeros, 1.0)
    torch.testing.assert_close(fresh, merged, atol=1e-4, rtol=1e-3)
    assert (stale - fresh).abs().max() > 1e-2


def test_dtypes_that_the_kernels_cannot_compute_in_are_refused():
    leaves, fixed, _ = make_case(3, 16, 8, 2, 1, 4, False, "random", dtype=torch.float16)
    with pytest.raises(ValueError, match="float16; the kernels compute in torch.bfloat16 or torch.float32"):
        by_name(moe_lora, leaves | fixed)
    with pytest.raises(ValueError, match="expected one dtype"):
        by_name(moe_lora, leaves | fixed | {"hidden_states": leaves["hidden_states"].float()})


def test_refusals_say_what_differs():
    import transformers

    config = transformers.GptOssConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_local_experts=4, vocab_size=64, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        gpt_oss = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="GptOssExperts.*transposed.*interleaved.*biases"):
        wrap_experts(gpt_oss, 4, 8)
    assert not any(isinstance(m, FusedMoELoRA) for m in gpt_oss.modules())
    with pytest.raises(ValueError, match="no module named experts"):
        wrap_experts(tiny_model("qwen3"), 4, 8)
    with torch.device("meta"):
        gelu = transformers.AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", hidden_act="gelu"))
    with pytest.raises(ValueError, match="not SiLU"):
        wrap_experts(gelu, 4, 8)
    with pytest.raises(ValueError, match="expected .fast. or .frugal."):
        FusedMoELoRA(2, 8, 8, 2, 4, mode="slow")


def test_fsdp2_shards_experts_and_trains_fp32_adapters(tmp_path):
    """fully_shard with bf16 compute: start values do not depend on the sharding, gradients of the adapters arrive in
    fp32."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def build():
        torch.manual_seed(0)
        module = FusedMoELoRA(4, 16, 8, r=2, lora_alpha=4, use_dora=True, dtype=torch.bfloat16)
        with torch.no_grad():
            module.gate_up_proj.normal_(std=0.3)
            module.down_proj.normal_(std=0.3)
        return module

    plain, sharded = build(), build()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(
            sharded, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        )
        for module in (plain, sharded):
            torch.manual_seed(5)
            module.reset_lora_parameters()
        for name, parameter in sharded.named_parameters():
            torch.testing.assert_close(parameter.full_tensor(), dict(plain.named_parameters())[name])
        x, index, weights = torch.randn(6, 16, dtype=torch.bfloat16), torch.randint(4, (6, 2)), torch.rand(6, 2)
        sharded(x, index, weights).float().square().sum().backward()
        grad = sharded.gate_proj_lora_B.grad
        assert grad.dtype == torch.float32 and grad.full_tensor().abs().max() > 0
        assert sharded.gate_up_proj.grad is None
    finally:
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["this GPU's", "portable"])
@pytest.mark.parametrize("mode", ["fast", "frugal"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("edge", ON_GPU)
def test_kernels_in_bf16(cuda, monkeypatch, edge, dora, mode, path):
    if path == "portable":
        monkeypatch.setattr("malaysian_sft.moe_autograd.tiles_for", lambda device, dtype: AMPERE)
    *case, routing = ON_GPU[edge]
    slack = 1e-3 if edge == "one token" else 5e-4  # a gradient of two numbers has whatever error they happen to have
    assert_three_way(case, dora, mode, routing, cuda, torch.bfloat16, torch.float32, slack)


@pytest.mark.gpu
@pytest.mark.parametrize("dora", [False, True])
def test_kernels_in_fp32_on_gpu(cuda, dora):
    assert_three_way((100, 128, 96, 8, 2, 8), dora, "fast", "random", cuda, torch.float32, torch.float64, slack=1e-6)


def gpu_step(cuda, dora=False, mode="fast", seed=0):
    leaves, fixed, upstream = make_case(512, 512, 256, 16, 4, 32, dora, "random", cuda, torch.bfloat16, seed)
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}

    def step():
        for leaf in leaves.values():
            leaf.grad = None
        out = by_name(moe_lora, leaves | fixed, mode=mode)
        out.backward(upstream)
        return out

    return step, leaves, fixed


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fast", "frugal"])
def test_nothing_leaks_and_nothing_synchronises(cuda, mode):
    step, _, _ = gpu_step(cuda, dora=True, mode=mode)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_replays_in_a_cuda_graph_with_other_inputs_and_other_routing(cuda):
    step, leaves, fixed = gpu_step(cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    captured_grads = {name: leaf.grad for name, leaf in leaves.items()}
    with torch.no_grad():
        leaves["hidden_states"].normal_()
        fixed["top_k_index"].copy_(torch.rand(512, 16, device=cuda).topk(4, dim=-1).indices)
    graph.replay()
    replayed, replayed_grads = captured.clone(), {name: grad.clone() for name, grad in captured_grads.items()}
    assert torch.equal(step(), replayed)
    assert all(torch.equal(leaf.grad, replayed_grads[name]) for name, leaf in leaves.items())


@pytest.mark.gpu
def test_a_second_backward_is_refused(cuda):
    leaves, fixed, upstream = make_case(16, 128, 128, 4, 2, 16, False, "random", cuda, torch.bfloat16)
    out = by_name(moe_lora, {name: t.requires_grad_() for name, t in leaves.items()} | fixed)
    out.backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward twice"):
        out.backward(upstream)


@pytest.mark.gpu
def test_offsets_beyond_32_bits(cuda):
    """S * H > 2^31 elements in DoRA's y: a sample of tokens equals what the reference makes of them alone."""
    T = 34_000
    leaves, fixed, upstream = make_case(T, 2048, 128, 32, 32, 16, True, "random", cuda, torch.bfloat16)
    got = run(moe_lora, leaves, fixed, upstream)
    rows = torch.tensor([0, 1, 17_777, T - 2, T - 1], device=cuda)

    def sample(tensors):
        return {
            name: t[rows] if name in ("hidden_states", "top_k_weights", "top_k_index") else t
            for name, t in tensors.items()
        }

    truth = run(moe_lora_reference, sample(leaves), sample(fixed), upstream[rows], torch.float32)
    for name, values in (
        ("out", got["out"][rows]),
        ("hidden_states", got["hidden_states"][rows]),
        ("top_k_weights", got["top_k_weights"][rows]),
    ):
        assert relative_errors({name: values}, {name: truth[name]})[name] < 1e-2, name


@pytest.mark.gpu
def test_module_on_gpu_equals_module_on_cpu(cuda):
    torch.manual_seed(0)
    experts = FusedMoELoRA(8, 256, 128, r=16, lora_alpha=32, use_dora=True)
    with torch.no_grad():
        experts.gate_up_proj.normal_(std=256**-0.5)
        experts.down_proj.normal_(std=128**-0.5)
    experts.reset_lora_parameters()
    randomise(experts)
    x, index, weights = torch.randn(50, 256), torch.rand(50, 8).topk(2).indices, torch.rand(50, 2)
    on_gpu = copy.deepcopy(experts).to(cuda)
    for module, inputs in ((experts, (x, index, weights)), (on_gpu, (x.cuda(), index.cuda(), weights.cuda()))):
        module(*inputs).square().sum().backward()
    for (name, ours), theirs in zip(on_gpu.named_parameters(), experts.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(
                ours.grad.cpu(), theirs.grad, atol=1e-3, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
            )
