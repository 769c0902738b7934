"""Experts that compute in FP8: the reference against fp64 products of the quantised operands, the kernels against the
reference (on a CPU in Triton's interpreter and in hopper_simulator.py, in processes of their own), runs of
train_moe.py.

`pytest -m gpu tests/test_fp8_arithmetic.py` on a Hopper GPU runs the kernels in bf16 and prints, for real shapes, how
far every gradient is from fp32, beside bf16's products.
"""

from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from test_fused_moe_lora import check_resources, compiling, in_a_process, make_case, relative_errors, run, stack_bytes

from fused_moe_lora import moe_lora_reference, quantised_stack
from malaysian_sft.fp8 import FP8, Quantised, quantise, quantise_rows, widen
from malaysian_sft.moe_autograd import moe_lora
from malaysian_sft.moe_fp8 import grouped_gemm_fp8, quantise_activations, transpose_weights
from malaysian_sft.moe_routing import INTERPRETER, route

# name of the edge -> rows of each expert, H, I, r, DoRA, mode
BLOCKS = {
    "no, one, 127, 128 and 129 rows": ([0, 1, 127, 128, 129], 256, 128, 8, False, "fast"),
    "dora, frugal": ([3, 0, 40], 128, 256, 20, True, "frugal"),
    "dora, a rank over one block": ([17, 16], 384, 128, 72, True, "fast"),
}
# the same, and what of the Hopper path's sizes is not as usual
SIMULATED = {
    "no, one, 127, 128 and 129 rows": ([0, 1, 127, 128, 129], 256, 128, 8, False, "fast", {}),
    "last column tile moved inwards, several slices of H": ([70, 5, 130], 640, 384, 24, False, "fast", {}),
    "dora, frugal, one column block": ([3, 0, 40], 128, 128, 32, True, "frugal", {"multiprocessors": 5}),
    "dora, a rank over one block": ([17, 66], 256, 256, 72, True, "fast", {"hopper": (3, 1)}),
}
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


def rows_to(counts, top_k=1, seed=0):
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


def run_interpreted():
    with exact_conversions():
        check_products()
        print("ok products", flush=True)
        for name, (*sizes, mode) in BLOCKS.items():
            case = fp8_case(*sizes)
            worst = compare(name, run_kernels(*case, mode), case)
            print("ok", name, worst, flush=True)


COMPILED = [  # capability, dtype, rank, DoRA
    *[(90, torch.bfloat16, r, dora) for r in (8, 32, 64) for dora in (False, True)],
    (90, torch.bfloat16, 256, True),
    (90, torch.float32, 32, True),
    *[(capability, torch.bfloat16, 32, dora) for capability in (100, 120) for dora in (False, True)],
]


def run_compiler():
    """Every kernel that a block in FP8 launches, compiled as for a GPU of each capability; what it would take there.

    Of the Hopper kernel's registers two may be kept in memory, those that are needed once a tile.
    """
    for capability, dtype, r, dora in COMPILED:
        case = fp8_case([100, 0, 40], 512, 256, r, dora, dtype=dtype)
        with compiling(capability) as launched:
            run_kernels(*case, "fast")
        names = [name for name, _ in launched]
        hopper = capability == 90 and dtype == torch.bfloat16
        expected = {"hopper_fp8_gemm_kernel" if hopper else "grouped_gemm_fp8_kernel", "transpose_kernel"}
        assert expected <= set(names) and "hopper_gemm_kernel" not in names, names
        # x and dout; the rest is quantised where it is made
        assert names.count("quantise_kernel") == 1 + (not dora) or not hopper or r > 64, names
        check_resources(launched, capability, (capability, dtype, r, dora), stack=8 if hopper and r <= 64 else None)
        for name, kernel in launched:
            if "fp8" in name:
                assert "f32.e4m3.e4m3" in kernel.asm["ptx"] or capability == 100, name
        print("ok", capability, dtype, r, dora, max(map(stack_bytes, (kernel for _, kernel in launched))), flush=True)


def test_kernels_fit_the_gpus_they_are_for():
    in_a_process("run_compiler()", len(COMPILED), module="test_fp8_arithmetic")


@contextmanager
def simulated(timing, rows, options):
    import hopper_simulator

    with hopper_simulator.installed(timing, timing, **options) as kernels:
        yield
    assert kernels["hopper_fp8_gemm_kernel"].launches >= 4 and kernels["hopper_gemm_kernel"].launches == 0


def run_simulated():
    with exact_conversions():
        for name, (*sizes, mode, options) in SIMULATED.items():
            case, found = fp8_case(*sizes), []
            for timing in ("early", "late", "random"):
                with simulated(timing, sizes, options):
                    found.append(run_kernels(*case, mode))
            worst = compare(name, found[0], case)
            assert all(torch.equal(other[key], found[0][key]) for other in found[1:] for key in other), "runs differ"
            print("ok", name, worst, flush=True)


def test_hopper_kernels_on_simulated_schedules():
    in_a_process("run_simulated()", len(SIMULATED), TRITON_INTERPRET="1", module="test_fp8_arithmetic")


def test_kernels_in_the_interpreter():
    in_a_process("run_interpreted()", 1 + len(BLOCKS), TRITON_INTERPRET="1", module="test_fp8_arithmetic")
