"""Experts that compute in FP8: the reference against fp64 products of the quantised operands, the kernels against the
reference (on a CPU in Triton's interpreter and in hopper_simulator.py, in processes of their own), runs of
train_moe.py.

`pytest -m gpu tests/test_fp8_arithmetic.py` on a Hopper GPU runs the kernels in bf16 and prints, for real shapes, how
far every gradient is from fp32, beside bf16's products.
"""

import json
import re
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from test_fp8 import nearest, publish
from test_fused_moe_lora import (
    by_name,
    check_resources,
    compiling,
    in_a_process,
    make_case,
    randomise,
    relative_errors,
    run,
    stack_bytes,
)
from test_train_moe import DIES_IN_STEP_3, arguments, losses, moved, run_processes

import train_moe
from conftest import real_config, save_tiny_checkpoint, tiny_config
from fused_moe_lora import FusedMoELoRA, Projection, moe_lora_reference, quantised_stack
from malaysian_sft import moe_autograd
from malaysian_sft.fp8 import FP8, Quantised, check_arithmetic, quantise, quantise_rows, widen
from malaysian_sft.moe_autograd import moe_lora
from malaysian_sft.moe_fp8 import grouped_gemm_fp8, quantise_activations, transpose_weights
from malaysian_sft.moe_routing import AMPERE, INTERPRETER, route
from malaysian_sft.moe_widen import WideRoom
from malaysian_sft.planning import best_policy, plan_run, trainer_flags

# name of the edge -> rows of each expert, H, I, r, DoRA, mode
BLOCKS = {
    "no, one, 127, 128 and 129 rows": ([0, 1, 127, 128, 129], 256, 128, 8, False, "fast"),
    "dora, frugal": ([3, 0, 40], 128, 256, 20, True, "frugal"),
    "dora, a rank over one block": ([17, 16], 384, 128, 72, True, "fast"),
}
REAL_BLOCKS = {
    "sizes of Qwen3-30B-A3B": ([19, 3], 2048, 768, 32, False, "fast"),
    "sizes of GLM-4.5-Air, dora": ([18], 4096, 1408, 32, True, "fast"),
}
# the same, and what of the Hopper path's sizes is not as usual
SIMULATED = {
    "no, one, 127, 128 and 129 rows": ([0, 1, 127, 128, 129], 256, 128, 8, False, "fast", {}),
    "last column tile moved inwards, several slices of H": ([70, 5, 130], 640, 384, 24, False, "fast", {}),
    "dora, frugal, one column block": ([3, 0, 40], 128, 128, 32, True, "frugal", {"multiprocessors": 5}),
    "dora, a rank over one block": ([17, 66], 256, 256, 72, True, "fast", {"hopper": (3, 1)}),
}
# function of moe_hopper_fp8.py, part of its source, what to put there instead, what has to be found
FENCE, WAIT = " " * 20 + "fence_async_shared()", "warpgroup_mma_wait(num_outstanding=0, deps=(part,))"
EARLY = "mbarrier.arrive(empty.index(slot), count=1)\n                scale = s_smem"
MISTAKES = [
    ("hopper_fp8_consumer", FENCE, " " * 20 + "pass", "tensor cores read .* without a fence"),
    ("hopper_fp8_consumer", "mbarrier.wait(multiplied, count & 1)\n            held", "held", "wrong"),
    ("hopper_fp8_consumer", "held = (step + STAGES - 1) % STAGES", "held = step % STAGES", "deadlock|wrong|arrivals"),
    ("hopper_fp8_consumer", "scale = s_smem", EARLY, "arrivals|deadlock"),
    ("hopper_fp8_consumer", f"{WAIT}\n                if k", "part\n                if k", "before its products"),
    ("hopper_fp8_producer", "(128 + 256) * 128", "(128 + 128) * 128", "more bytes than a barrier expects"),
    ("hopper_fp8_producer", "scales += stride_ask", "pass", "wrong"),
    ("hopper_store_fp8", "rows < last, 1", "rows < last + 1, 1", "wrong|outside a storage"),
]
# H, I of real experts: Qwen3-30B-A3B, Qwen3-235B-A22B, GLM-4.5-Air
REAL = {"30b": (2048, 768), "235b": (4096, 1536), "glm": (4096, 1408)}


def exact_conversions():
    """Triton's interpreter, with FP8 conversions by PyTorch: its own don't carry into the exponent where they round."""
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    theirs = interpreter._convert_float

    def convert(data, source, target, rounding):
        if target == tl.float8e4nv and source == tl.float32:
            values = torch.from_numpy(np.ascontiguousarray(data.view(np.float32)))
            return values.to(FP8).view(torch.uint8).numpy().reshape(data.shape)
        if source == tl.float8e4nv:
            values = torch.from_numpy(np.ascontiguousarray(data.view(np.uint8))).view(FP8)
            wide = {tl.float16: torch.float16, tl.float32: torch.float32}[target]
            bits = {2: np.uint16, 4: np.uint32}[wide.itemsize]
            return values.to(wide).numpy().view(bits).reshape(data.shape)
        return theirs(data, source, target, rounding)

    return mock.patch.object(interpreter, "_convert_float", convert)


def rows_to(counts, seed=0):
    """top_k_index (T, 1) that sends counts[e] tokens to expert e, in a random order."""
    experts = torch.cat([torch.full((count,), e) for e, count in enumerate(counts)])
    return experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(seed))].unsqueeze(1)


def quantised_weights(fixed):
    """gate_up_proj and down_proj of `make_case`, Quantised."""
    return [Quantised(*quantised_stack(fixed[name], parts)) for name, parts in (("gate_up_proj", 2), ("down_proj", 1))]


def widened(weight, dtype=torch.float32):
    """Quantised weights in fp32, exactly."""
    return torch.stack([widen(*pair) for pair in zip(*weight, strict=True)]).to(dtype)


def fp8_case(counts, H, I, r, dora, device="cpu", dtype=torch.float32):  # noqa: E741
    """make_case with given rows of each expert, its weights as FP8 has them, besides in FP8: (leaves, fixed, upstream,
    Quantised weights)."""
    case = make_case(sum(counts), H, I, len(counts), 1, r, dora, "random", device, dtype)
    leaves, fixed, upstream = case
    fixed["top_k_index"] = rows_to(counts).to(device)
    weights = quantised_weights(fixed)
    fixed["gate_up_proj"], fixed["down_proj"] = (widened(weight) for weight in weights)
    return leaves, fixed, upstream, weights


def run_kernels(leaves, fixed, upstream, weights, mode, dtype=None):
    """Output and every gradient by the FP8 kernels."""
    gate_up, down = weights

    def block(gate_up_proj, down_proj, **rest):
        return moe_lora(
            gate_up_proj=gate_up, down_proj=down, mode=mode,
            base=lambda: (gate_up, down, transpose_weights(gate_up), transpose_weights(down)), **rest,
        )  # fmt: skip

    return run(block, leaves, fixed, upstream, dtype)


def run_reference(leaves, fixed, upstream, dtype):
    """The same by the definition, in `dtype`."""
    return run(partial(moe_lora_reference, arithmetic="fp8"), leaves, fixed, upstream, dtype)


def check_products():
    """Quantised activations and grouped products against the definition: the former to the bit."""
    torch.manual_seed(0)
    x = torch.randn(70, 512) * torch.logspace(-3, 3, 512)
    x[5], x[6, 128:256] = 0, 1e-30
    for given in (x, x[:, 128:384]):
        values, scales = quantise_activations(given)
        expected, expected_scales = quantise_rows(given)
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales.T, expected_scales)
    counts, N, K, r = [0, 1, 127, 128, 129], 256, 384, 24
    index = rows_to(counts)
    S = len(index)
    routing = route(index, torch.ones(S, 1), len(counts), INTERPRETER)
    pairs = [quantise(torch.randn(N, K)) for _ in counts]
    weight = Quantised(*(torch.stack([pair[i] for pair in pairs]) for i in (0, 1)))
    room = WideRoom()
    held = room.transposed(room, [(*weight, 1), (*weight, 2)])
    assert all(torch.equal(widened(turned), widened(weight).transpose(1, 2)) for turned in held)
    assert room.transposed(room, []) is held and room.room.numel() == 2 * weight.values.numel()
    experts = FusedMoELoRA(5, K, N, 8, 16, wide_room=room)
    for stack, parts in (("gate_up_proj", 2), ("down_proj", 1)):
        shape = getattr(experts, stack).shape
        values, scales = quantised_stack(torch.randn(shape), parts)
        getattr(experts, stack).data, getattr(experts, stack + "_scale_inv").data = values, scales
    given = [widened(w).clone() for w in experts.stored_and_transposed()]
    experts.keep_transposed, room.holder = True, None
    kept = experts.stored_and_transposed()
    assert all(torch.equal(widened(w), other) for w, other in zip(kept, given, strict=True)) and room.holder is None
    assert all(a.values is b.values for a, b in zip(kept[2:], experts.stored_and_transposed()[2:], strict=True))
    back = transpose_weights(transpose_weights(weight))
    assert torch.equal(widened(back), widened(weight))
    assert torch.equal(widened(transpose_weights(weight)), widened(weight).transpose(1, 2))
    order = index[:, 0].argsort(stable=True)
    for gather, segments, loras in ((True, 2, 2), (False, 1, 1), (False, 1, 2), (True, 1, 1)):
        a, u = torch.randn(S, K), torch.randn(loras, S, r)
        ls = [torch.randn(len(counts), N // segments, r) for _ in range(loras)]
        out = torch.full((S, N), float("nan"))
        a8 = quantise_activations(a)
        grouped_gemm_fp8(a8, weight, out, routing, INTERPRETER, gather=gather, lora=(u, ls), segments=segments)
        values, scales = quantise_rows(a)
        wide = values.double() * scales.double().repeat_interleave(128, dim=1)
        wide = wide[order] if gather else wide
        for e, rows in enumerate(torch.arange(S).split(counts)):
            expected = wide[rows] @ widened(weight)[e].double().T
            parts = [u[i, rows].double() @ ls[i][e].double().T for i in range(loras)]
            expected += torch.cat(parts, dim=1) if segments == 2 else sum(parts)
            torch.testing.assert_close(out[rows].double(), expected, rtol=1e-5, atol=1e-4)


def compare(name, found, case, dtype=torch.float64, slack=2e-3):
    """Raise unless output and gradients are those of the reference in fp64. Values that a rounding of fp32 moves over
    the middle between two of FP8 are rare, so that errors are small in the norm, and a mistake is not."""
    errors = relative_errors(found, run_reference(*case[:3], dtype))
    wrong = {name: error for name, error in errors.items() if not error <= slack}
    assert not wrong, f"{name}: {wrong}"
    return max(errors.values())


def run_interpreted(blocks=BLOCKS):
    with exact_conversions():
        if blocks is BLOCKS:
            check_products()
            print("ok products", flush=True)
        for name, (*sizes, mode) in blocks.items():
            case = fp8_case(*sizes)
            worst = compare(name, run_kernels(*case, mode), case)
            print("ok", name, worst, flush=True)


COMPILED = [  # capability, dtype, rank, DoRA
    (90, torch.bfloat16, 32, False),
    (90, torch.bfloat16, 64, True),
    (120, torch.bfloat16, 32, False),
]
MORE_COMPILED = [
    *[(90, torch.bfloat16, r, dora) for r, dora in ((8, False), (8, True), (32, True), (64, False), (256, True))],
    (90, torch.float32, 32, True),
    (100, torch.bfloat16, 32, False),
    *[(capability, torch.bfloat16, 32, True) for capability in (100, 120)],
]


def run_compiler(settings=COMPILED):
    """Every kernel that a block in FP8 launches, compiled as for a GPU of each capability; what it would take there."""
    for capability, dtype, r, dora in settings:
        case = fp8_case([100, 0, 40], 512, 256, r, dora, dtype=dtype)
        with compiling(capability) as launched:
            run_kernels(*case, "fast")
        names = [name for name, _ in launched]
        hopper = capability == 90 and dtype == torch.bfloat16
        expected = {"hopper_fp8_gemm_kernel" if hopper else "grouped_gemm_fp8_kernel", "transpose_kernel"}
        assert expected <= set(names) and "hopper_gemm_kernel" not in names, names
        # x and dout; the rest is quantised where it is made
        assert names.count("quantise_kernel") == 1 + (not dora) or not hopper or r > 64, names
        check_resources(launched, capability, (capability, dtype, r, dora), stack=0 if hopper and r <= 64 else None)
        for name, kernel in launched:
            if "fp8" in name:
                assert "f32.e4m3.e4m3" in kernel.asm["ptx"] or capability == 100, name
        print("ok", capability, dtype, r, dora, max(map(stack_bytes, (kernel for _, kernel in launched))), flush=True)


def test_kernels_fit_the_gpus_they_are_for():
    in_a_process("run_compiler()", len(COMPILED), module="test_fp8_arithmetic")


@pytest.mark.slow
def test_kernels_fit_more_gpus():
    in_a_process("run_compiler(t.MORE_COMPILED)", len(MORE_COMPILED), module="test_fp8_arithmetic")


@contextmanager
def simulated(timing, options):
    import hopper_simulator

    with hopper_simulator.installed(timing, timing, **options) as kernels:
        yield
    assert kernels["hopper_fp8_gemm_kernel"].launches >= 4 and kernels["hopper_gemm_kernel"].launches == 0


def run_simulated():
    with exact_conversions():
        for name, (*sizes, mode, options) in SIMULATED.items():
            case, found = fp8_case(*sizes), []
            for timing in ("late", "random"):
                with simulated(timing, options):
                    found.append(run_kernels(*case, mode))
            worst = compare(name, found[0], case)
            assert all(torch.equal(other[key], found[0][key]) for other in found[1:] for key in other), "runs differ"
            print("ok", name, worst, flush=True)


def run_mistakes():
    import hopper_simulator

    case = fp8_case([200, 40, 90], 256, 256, 24, False)
    with exact_conversions():
        for function, right, wrong, found in MISTAKES:
            for seed in range(4):
                try:
                    with hopper_simulator.installed(seed, "late", mistake=(function, right, wrong)):
                        errors = relative_errors(run_kernels(*case, "fast"), run_reference(*case[:3], torch.float64))
                    what = "wrong" if not max(errors.values()) < 1e-3 else ""
                except hopper_simulator.Race as race:
                    what = str(race)
                if what:
                    break
            assert re.search(found, what), f"{right!r} -> {wrong!r} in {function}: expected {found!r}, found {what!r}"
            print("ok", function, flush=True)


def test_the_simulator_finds_mistakes():
    in_a_process("run_mistakes()", len(MISTAKES), TRITON_INTERPRET="1", module="test_fp8_arithmetic")


def test_hopper_kernels_on_simulated_schedules():
    in_a_process("run_simulated()", len(SIMULATED), TRITON_INTERPRET="1", module="test_fp8_arithmetic")


def run_sizes_of_a_gpu():
    """The portable kernels with the tile sizes of a GPU, which quantise in DoRA's."""
    with exact_conversions(), mock.patch.object(moe_autograd, "tiles_for", lambda *_: AMPERE):
        for dora in (False, True):
            case = fp8_case([130, 0, 5], 256, 128, 8, dora)
            print("ok", dora, compare("AMPERE", run_kernels(*case, "fast"), case), flush=True)


def test_kernels_in_the_interpreter_with_sizes_of_a_gpu():
    in_a_process("run_sizes_of_a_gpu()", 2, TRITON_INTERPRET="1", module="test_fp8_arithmetic")


@pytest.mark.slow
def test_real_sizes_in_the_interpreter():
    in_a_process("run_interpreted(t.REAL_BLOCKS)", 2, TRITON_INTERPRET="1", module="test_fp8_arithmetic")


def test_kernels_in_the_interpreter():
    in_a_process("run_interpreted()", 1 + len(BLOCKS), TRITON_INTERPRET="1", module="test_fp8_arithmetic")


# ----------------------------------------------------------------------------------------------------------------------
# The definition
# ----------------------------------------------------------------------------------------------------------------------


def test_activations_are_quantised_by_the_definition():
    """Row by row what `publish` makes of a block, but for the last bit of a value between two."""
    torch.manual_seed(0)
    x = torch.randn(5, 300) * torch.logspace(-4, 4, 300)
    x[2, :128], x[3, 7] = 0, -500
    values, scales = quantise_rows(x)
    assert scales.shape == (5, 3) and values.shape == x.shape
    for row in range(5):
        for block in range(3):
            part = slice(128 * block, 128 * block + 128)
            largest = x[row, part].abs().max()
            if largest == 0:
                assert scales[row, block] > 0 and not values[row, part].float().any()
                continue
            assert scales[row, block] == largest / 448
            expected = nearest(x[row, part] * (1 / scales[row, block]))
            assert torch.equal(values[row, part].view(torch.uint8) & 0x7F, expected & 0x7F)
            assert torch.equal(values[row, part].float().sign(), x[row, part].sign() * (values[row, part].float() != 0))
    assert quantise_rows(torch.full((1, 128), float("inf")))[0].float().isnan().all()  # nothing not finite gets lost
    x[0, 0] = float("nan")
    assert quantise_rows(x)[0][0, 0].float().isnan()


def by_hand(x):
    """Values of rows as FP8 has them, fp64, by the definition of E4M3 and blocks of 1 x 128."""
    rows = [[publish(block)[2] for block in row.split(128, dim=1)] for row in x.split(1)]
    return torch.cat([torch.cat(row, dim=1) for row in rows]).double()


def test_the_reference_multiplies_quantised_operands():
    """One expert, weights of one, no LoRA: every product by hand in fp64, forward and backward."""
    torch.manual_seed(0)
    T, H, I = 6, 256, 128  # noqa: E741
    case, fixed, upstream, weights = fp8_case([T], H, I, 4, False)
    W1, W2 = (by_blocks[0].double() for by_blocks in (fixed["gate_up_proj"], fixed["down_proj"]))
    assert torch.equal(W2, widened(weights[1])[0].double())
    leaves = {name: torch.ones_like(t) if "weights" in name else t for name, t in case.items()}
    leaves |= {name: torch.zeros_like(t) for name, t in leaves.items() if name.endswith("_B")}
    found = run_reference(leaves, fixed, upstream, torch.float32)
    x = by_hand(leaves["hidden_states"])
    gate, up = (x @ W1.T).float().double().chunk(2, dim=1)
    a = torch.nn.functional.silu(gate) * up
    y = by_hand(a.float()) @ W2.T
    da = by_hand(upstream) @ W2
    sigmoid = gate.sigmoid()
    dgate, dup = da * up * sigmoid * (1 + gate * (1 - sigmoid)), da * gate * sigmoid
    dx = by_hand(dgate.float()) @ W1[:I] + by_hand(dup.float()) @ W1[I:]
    dw = (a * da).sum(dim=1, keepdim=True)
    truth = {"out": y, "hidden_states": dx, "top_k_weights": dw}
    assert max(relative_errors({name: found[name] for name in truth}, truth).values()) < 1e-3
    exact = run(moe_lora_reference, leaves, fixed, upstream, torch.float64)
    rounding = relative_errors({name: found[name] for name in truth}, {name: exact[name] for name in truth})
    assert all(0.01 < error < 0.06 for error in rounding.values()), rounding


def module(r=4, use_dora=False, arithmetic="fp8", H=256, I=128):  # noqa: E741
    """FusedMoELoRA of 3 experts on random weights in FP8."""
    torch.manual_seed(0)
    experts = FusedMoELoRA(3, H, I, r, 2 * r, use_dora, wide_room=WideRoom(), arithmetic=arithmetic)
    state = dict(experts.state_dict())
    for name, parts in (("gate_up_proj", 2), ("down_proj", 1)):
        weight = torch.randn(state[name].shape) * state[name].shape[2] ** -0.5
        state[name], state[f"{name}_scale_inv"] = quantised_stack(weight, parts)
    experts.load_state_dict(state)
    experts.reset_lora_parameters()
    randomise(experts)
    return experts


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_module_computes_the_reference(use_dora):
    experts = module(use_dora=use_dora)
    x, index, weights = torch.randn(40, 256), torch.rand(40, 3).topk(2).indices, torch.rand(40, 2)
    found = experts(x, index, weights)
    adapters = [Projection(*(t if t is None else t.detach() for t in adapter)) for adapter in experts.adapters()]
    wide = [weight.clone() for weight in experts.exact_weights()]
    expected = moe_lora_reference(x, index, weights, *wide, *adapters, experts.scaling, arithmetic="fp8")
    assert torch.equal(found, expected) and "computed in FP8" in repr(experts)
    in_bf16 = module(use_dora=use_dora, arithmetic="bf16")(x, index, weights)
    assert 0.003 < relative_errors({"out": found}, {"out": in_bf16})["out"] < 0.06
    assert all(torch.equal(widened(w), exact) for w, exact in zip(experts.stored_weights(), wide, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("fp8", None, 256, 128), r"--expert_arithmetic fp8 needs experts stored in FP8: add --base_dtype fp8"),
        (("fp8", "fp8", 288, 160), r"multiples of 128; the model's are 288 x 160: leave it at bf16"),
        (("fp8", "fp8", 256, 128, (8, 9)), r"needs a Hopper GPU .* this one has 8.9: leave it at bf16"),
        (("fp4", "fp8", 256, 128), r"--expert_arithmetic fp4: expected one of bf16, fp8"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given, message):
    with pytest.raises(ValueError, match=message) as error:
        check_arithmetic(*given)
    assert "\n" not in str(error.value)
    check_arithmetic("bf16", None, 288, 160, (8, 0))
    check_arithmetic("fp8", "fp8", 256, 128, (9, 0))


def test_kernels_want_both_weights_and_their_transposes():
    leaves, fixed, _, (gate_up, down) = fp8_case([3], 128, 128, 4, False)
    fixed |= {"gate_up_proj": gate_up, "down_proj": down}
    with pytest.raises(ValueError, match="expected both, and base"):
        by_name(moe_lora, leaves | fixed)


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------

STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    return save_tiny_checkpoint(root / "plain", "qwen3_moe", hidden_size=128, moe_intermediate_size=128, head_dim=32)


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "dora"])
def unbroken(request, base, tmp_path_factory):
    """(argv, output directory) of a run of one process."""
    root = tmp_path_factory.mktemp("runs")
    rows = [json.dumps({"question": f"Apa {i}?", "answer": f"Ialah {i}."}) + "\n" for i in range(12)]
    (root / "train.jsonl").write_text("".join(rows))
    argv = arguments(base, root / "train.jsonl", root / "unbroken", "--max_steps", STEPS, "--save_steps", 1)
    argv += ["--base_dtype", "fp8", "--expert_arithmetic", "fp8", "--use_dora", str(request.param)]
    argv += ["--global_batch_size", "2", "--max_seq_length", "64"]
    train_moe.main(argv)
    return argv, root / "unbroken"


def test_a_run_computes_in_fp8_and_says_so(unbroken, tmp_path):
    argv, out = unbroken
    record = json.loads((out / "args.json").read_text())
    assert record["arguments"]["expert_arithmetic"] == record["facts"]["expert_arithmetic"] == "fp8"
    in_bf16 = moved(argv, tmp_path / "run")
    at = in_bf16.index("--expert_arithmetic")
    del in_bf16[at : at + 2]
    train_moe.main(in_bf16)
    found, other = losses(out), losses(tmp_path / "run")
    assert len(found) == STEPS and found != other and found[0][1] == pytest.approx(other[0][1], rel=2e-2)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["arguments"]["expert_arithmetic"] == "bf16"


def test_a_resumed_run_equals_an_unbroken_one(unbroken, tmp_path):
    argv, expected = moved(unbroken[0], tmp_path / "run"), losses(unbroken[1])
    code, output = run_processes(1, argv, DIES_IN_STEP_3)
    assert code and losses(tmp_path / "run") == expected[:2], output
    at = argv.index("--expert_arithmetic")
    with pytest.raises(SystemExit, match="--resume: expert_arithmetic is bf16, but .* says fp8; that is another run"):
        train_moe.main([*argv[:at], *argv[at + 2 :], "--resume", "True"])
    train_moe.main([*argv, "--resume", "True"])
    assert losses(tmp_path / "run") == expected


SLOW_WITH_DORA = [pytest.param(False, id="lora"), pytest.param(True, id="dora", marks=pytest.mark.slow)]


@pytest.mark.parametrize("unbroken", SLOW_WITH_DORA, indirect=True)
def test_two_processes_equal_one(unbroken, tmp_path):
    code, output = run_processes(2, moved(unbroken[0], tmp_path / "run"))
    assert not code, output
    found, expected = losses(tmp_path / "run"), losses(unbroken[1])
    # sums in another order, of which FP8 makes more from step to step
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found == [pytest.approx(line, rel=1e-2) for line in expected]


def test_a_model_whose_sizes_do_not_fit_is_refused_before_it_is_loaded(tmp_path):
    base = save_tiny_checkpoint(tmp_path / "plain", "qwen3_moe", num_hidden_layers=1)
    argv = arguments(base, "none.jsonl", tmp_path / "run", "--base_dtype", "fp8", "--expert_arithmetic", "fp8")
    with pytest.raises(SystemExit, match="multiples of 128; the model's are 64 x 32"):
        train_moe.main(argv)
    with pytest.raises(SystemExit, match="add --base_dtype fp8"):
        train_moe.main([word for word in argv if word != "--base_dtype"][:-3] + argv[-2:])


def test_what_the_plan_says():
    config, common = real_config("Qwen3-30B-A3B-Instruct-2507"), dict(kind="moe", gpus=1, base_dtype="fp8")
    stored, computed = (plan_run(config, **common, expert_arithmetic=a)["gpu_bytes"] for a in ("bf16", "fp8"))
    layer = 128 * 3 * 2048 * 768
    assert stored["a layer's experts widened, bf16"] == 2 * layer and "a layer's experts transposed, FP8" not in stored
    assert computed["a layer's experts transposed, FP8"] == layer and "a layer's experts widened, bf16" not in computed
    dora = plan_run(config, **common, expert_arithmetic="fp8", use_dora=True)
    assert dora["gpu_bytes"]["a layer's experts widened, bf16"] == 2 * layer  # for its norms
    assert "--base_dtype fp8 --expert_arithmetic fp8" in trainer_flags(dora)
    with pytest.raises(ValueError, match="add --base_dtype fp8"):
        plan_run(config, kind="moe", gpus=1, expert_arithmetic="fp8")
    with pytest.raises(ValueError, match="multiples of 128"):
        plan_run(tiny_config("qwen3_moe"), **common, expert_arithmetic="fp8")


def test_transposes_are_kept_where_memory_is_left():
    config = real_config("Qwen3-30B-A3B-Instruct-2507")
    common = dict(kind="moe", base_dtype="fp8", expert_arithmetic="fp8")
    layer, without = 128 * 3 * 2048 * 768, plan_run(config, gpus=1, **common, activations="none")
    one = best_policy(config, gpus=1, gpu_memory_gib=139.8, **common)
    count = one["transposed_layers"]
    assert one["gpu_bytes"]["experts kept transposed, FP8"] == count * layer
    assert one["peak_bytes"] == without["peak_bytes"] + count * layer <= 0.96 * one["limit_bytes"]
    assert count == 48 or one["peak_bytes"] + layer > 0.96 * one["limit_bytes"]
    assert one["frugal_layers"] == 0 and f"--transposed_layers {count}" in trainer_flags(one)
    assert best_policy(config, gpus=1, gpu_memory_gib=139.8, **common, transposed_layers=3)["transposed_layers"] == 3
    # none where something is recomputed to fit, where they would have to be gathered, and in bf16
    small = best_policy(config, gpus=1, gpu_memory_gib=80.0, **common)
    assert small["transposed_layers"] == 0 and (small["frugal_layers"] or small["activations"] != "none")
    assert best_policy(config, gpus=8, gpu_memory_gib=80.0, gather_base=True, **common)["transposed_layers"] == 0
    assert best_policy(config, gpus=1, gpu_memory_gib=139.8, kind="moe")["transposed_layers"] == 0
    for given, said in ((dict(expert_arithmetic="bf16"), "--expert_arithmetic bf16"), (dict(gpus=2), "gathered")):
        with pytest.raises(ValueError, match=f"--transposed_layers 3: .*{said}.* expected 0"):
            plan_run(config, **(dict(gpus=1) | common | given), transposed_layers=3)


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no Hopper GPU, nor a newer one")
    torch.backends.cuda.matmul.allow_tf32 = False
    return "cuda"


ON_GPU = {
    "no, one, 127, 128 and 129 rows": ([0, 1, 127, 128, 129], 256, 128, 32),
    "one token": ([0, 1, 0], 256, 128, 32),
    "slices of H that are no whole tiles, a rank between powers of two": ([300, 0, 70], 640, 384, 24),
    "a rank over one block": ([300, 5], 512, 256, 72),
    **{f"sizes of {name}": ([129, 0, 127, 700], *sizes, 32) for name, sizes in REAL.items()},
}


@pytest.mark.gpu
def test_operands_equal_the_cpu_s_to_the_bit(cuda):
    torch.manual_seed(0)
    x = torch.randn(1000, 1408) * torch.logspace(-3, 3, 1408)
    x[5], x[6, 128:256] = 0, 1e-30
    for given in (x, x.bfloat16()):
        values, scales = quantise_activations(given.to(cuda))
        expected, expected_scales = quantise_rows(given)
        assert torch.equal(values.cpu().view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales.T.cpu(), expected_scales)
    weight = Quantised(torch.randn(3, 768, 2048).to(FP8), torch.rand(3, 6, 16))
    turned = transpose_weights(Quantised(*(t.to(cuda) for t in weight)))
    assert torch.equal(turned.values.cpu().view(torch.uint8), weight.values.view(torch.uint8).transpose(1, 2))
    assert torch.equal(turned.scales.cpu(), weight.scales.transpose(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["this GPU's", "portable"])
@pytest.mark.parametrize("mode", ["fast", "frugal"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("edge", ON_GPU)
def test_kernels_in_bf16(cuda, monkeypatch, edge, dora, mode, path):
    """error(kernel) <= error(plain PyTorch in bf16) + slack, of the same definition, against it in fp32."""
    if path == "portable":
        monkeypatch.setattr("malaysian_sft.moe_autograd.tiles_for", lambda device, dtype: AMPERE)
    case = fp8_case(*ON_GPU[edge], dora, cuda, torch.bfloat16)
    truth = run_reference(*case[:3], torch.float32)
    plain = relative_errors(run(partial(moe_lora_reference, arithmetic="fp8"), *case[:3]), truth)
    results = [run_kernels(*case, mode) for _ in range(2)]
    assert all(torch.equal(results[1][name], results[0][name]) for name in results[0]), "runs differ"
    errors = relative_errors(results[0], truth)
    slack = 2e-2 if edge == "one token" else 3e-3
    wrong = {name: (error, plain[name]) for name, error in errors.items() if not error <= plain[name] * 1.25 + slack}
    assert not wrong, f"(kernel's error, plain PyTorch's error): {wrong}"


@pytest.mark.gpu
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", REAL)
def test_gradients_beside_bf16_s(cuda, name, dora):
    """Relative errors against fp32 products of the same weights, FP8's beside bf16's; `-s` prints them."""
    case = fp8_case([1000, 129, 1, 0, 900], *REAL[name], 32, dora, cuda, torch.bfloat16)
    leaves, fixed, upstream, _ = case
    truth = run(moe_lora_reference, leaves, fixed, upstream, torch.float32)
    in_fp8 = relative_errors(run_kernels(*case, "fast"), truth)
    fixed = fixed | {key: fixed[key].bfloat16() for key in ("gate_up_proj", "down_proj")}
    in_bf16 = relative_errors(run(moe_lora, leaves, fixed, upstream, mode="fast"), truth)
    for key, error in in_fp8.items():
        print(f"{name} {'dora' if dora else 'lora'} {key:22} FP8 {error:.5f}  bf16 {in_bf16[key]:.5f}")
    assert max(in_bf16.values()) < 0.02 and max(in_fp8.values()) < 0.1


@pytest.mark.gpu
def test_the_module_on_a_gpu_follows_it_on_a_cpu(cuda):
    for use_dora in (False, True):
        torch.manual_seed(1)
        inputs = torch.randn(150, 256), torch.rand(150, 3).topk(2).indices, torch.rand(150, 2)
        there = module(use_dora=use_dora), module(use_dora=use_dora).to(cuda)
        there[1].wide_room.forget(there[1])
        for experts, given in zip(there, (inputs, [t.to(cuda) for t in inputs]), strict=True):
            experts(*given).square().sum().backward()
        for (name, ours), theirs in zip(there[1].named_parameters(), there[0].parameters(), strict=True):
            if ours.requires_grad:
                error = (ours.grad.cpu() - theirs.grad).norm() / theirs.grad.norm()
                assert error < 5e-3, (name, use_dora, error)
