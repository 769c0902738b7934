"""Frozen experts in FP8: against the definition of E4M3, a checkpoint in the published layout that is written here by
that definition, the same model with widened weights, and transformers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter import PROMPT, TOLERANCE, log_probabilities, run_vllm
from test_train_moe import (
    DIES_IN_STEP_3,
    adapted_weights,
    arguments,
    build,
    losses,
    moved,
    plain_model,
    random_pack,
    randomise_adapter,
    reference_loss,
    run_processes,
)
from transformers import AutoConfig, AutoModelForCausalLM

import train_moe
from conftest import save_tiny_checkpoint
from fused_moe_lora import FusedMoELoRA, moe_lora_reference, wrap_experts
from malaysian_sft.account import check_trainer
from malaysian_sft.adapter_files import Adapter
from malaysian_sft.adapter_state import adapter_state_dict
from malaysian_sft.fp8 import FP8, SCALE, quantise, scale_shape, widen
from malaysian_sft.load_base import frozen_tensors, load_weights
from malaysian_sft.lora import MANIFEST, WEIGHTS
from malaysian_sft.merge import base_scales, merge_adapter, merge_tensor, unused_faults
from malaysian_sft.moe_widen import WideRoom, widen_stack
from malaysian_sft.safetensors_files import read_sources, read_tensor
from malaysian_sft.verify import verify_adapter

# Two blocks and a ragged one across, one and a ragged one down, whichever way a matrix lies.
SHAPE = dict(hidden_size=288, moe_intermediate_size=160, head_dim=32)
# Every E4M3 value by its bits: a sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7F is no number.
MAGNITUDES = [(m / 8 * 2**-6) if e == 0 else (1 + m / 8) * 2 ** (e - 7) for e in range(16) for m in range(8)][:-1]
VALUES = torch.tensor([*MAGNITUDES, float("nan"), *[-m for m in MAGNITUDES], float("nan")])


def nearest(x):
    """The byte of the E4M3 value nearest to each of x, of two the one with an even mantissa."""
    grid, x64 = torch.tensor(MAGNITUDES, dtype=torch.float64), x.double().abs()
    below = (torch.searchsorted(grid, x64, right=True) - 1).clamp(0, len(grid) - 2)
    nearer = (x64 - grid[below]) - (grid[below + 1] - x64)  # positive: to the one above
    above = (nearer > 0) | ((nearer == 0) & (below % 2 == 1))
    return (below + above + 128 * (x < 0)).to(torch.uint8)


def publish(weight, stretch=1.0):
    """(bytes, scales, the values they stand for) of a matrix, block by block; stretch: times the tightest scales that
    there are."""
    rows, columns = weight.shape
    data, widened = torch.zeros(rows, columns, dtype=torch.uint8), torch.zeros(rows, columns)
    scales = torch.zeros(-(-rows // 128), -(-columns // 128))
    for i in range(0, rows, 128):
        for j in range(0, columns, 128):
            block = weight[i : i + 128, j : j + 128].float()
            scale = block.abs().max() / 448 * stretch
            scales[i // 128, j // 128] = scale
            data[i : i + 128, j : j + 128] = nearest(block / scale)
            widened[i : i + 128, j : j + 128] = VALUES[data[i : i + 128, j : j + 128].long()] * scale
    return data, scales, widened


RUNS = {"published": "widened", "plain": "rounded"}  # a run's base: what its weights stand for
PUBLISHED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.")  # what published checkpoints do not convert


def published(plain, directory, everything=True, scale_dtype=torch.float32):
    """The checkpoint in `plain` in the published FP8 layout in `directory`, in two files, so that some weights and
    their scales are apart; and {name: the values that its weights stand for}."""
    directory.mkdir()
    config = json.loads(Path(plain, "config.json").read_text())
    for path in Path(plain).iterdir():
        if path.suffix == ".json" or path.suffix == ".jinja":
            (directory / path.name).write_bytes(path.read_bytes())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": PUBLISHED}))
    found, stands_for = {}, {}
    for name, weight in load_file(Path(plain, "model.safetensors")).items():
        chosen = ".experts." in name if not everything else weight.dim() == 2 and not any(k in name for k in KEPT)
        if not chosen:
            found[name] = stands_for[name] = weight
            continue
        data, scales, _ = publish(weight, stretch=1.25)
        scales = scales.to(scale_dtype)
        spread = scales.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[: len(data), : data.shape[1]]
        found[name], found[f"{name}_scale_inv"] = data.view(torch.float8_e4m3fn), scales
        stands_for[name] = VALUES[data.long()] * spread
    names = sorted(found)
    index = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({n: found[n] for n in names if index[n] == file}, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return str(directory), stands_for


def with_weights(plain, directory, weights):
    """The checkpoint in `plain` with other weights, in `directory`; returns it as str."""
    directory.mkdir()
    for path in Path(plain).iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories: "plain", an fp32 checkpoint; "published", it in FP8; "widened", in fp32 what that stands for;
    "rounded", `plain` with its experts quantised by the definition and widened again."""
    root = tmp_path_factory.mktemp("bases")
    plain = save_tiny_checkpoint(root / "plain", "glm4_moe", num_hidden_layers=3, n_routed_experts=4, **SHAPE)
    fp8, stands_for = published(plain, root / "published")
    rounded = load_file(f"{plain}/model.safetensors")
    for name in [name for name in rounded if ".experts." in name]:
        rounded[name] = publish(rounded[name])[2]
    return {
        "plain": plain,
        "published": fp8,
        "widened": with_weights(plain, root / "widened", stands_for),
        "rounded": with_weights(plain, root / "rounded", rounded),
    }


# ----------------------------------------------------------------------------------------------------------------------
# The format
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 7), (256, 129)])
def test_quantised_by_the_definition(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    weight[: shape[0] // 2, : shape[1] // 2] = 0  # a block of zeros, in the larger shapes
    for given in (weight, weight.bfloat16()):
        values, scales = quantise(given)
        data, expected, widened = publish(given)
        assert scales.shape == scale_shape(*shape) == expected.shape
        torch.testing.assert_close(scales[expected > 0], expected[expected > 0], rtol=0, atol=0)
        there = expected.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]] > 0
        assert torch.equal(values.view(torch.uint8)[there] & 0x7F, data[there] & 0x7F)
        assert torch.equal(widen(values, scales)[there], widened[there]) and not widen(values, scales)[~there].any()
    if shape[0] > 128:  # in parts of whole blocks, as it is read and merged
        parts = [quantise(weight[:128]), quantise(weight[128:])]
        assert all(torch.equal(torch.cat([p[i] for p in parts]).float(), quantise(weight)[i].float()) for i in (0, 1))
        values, scales = quantise(weight)
        assert torch.equal(widen(values[130:], scales, first=130), widen(values, scales)[130:])


INTERPRETED = """
import sys, torch
from malaysian_sft.moe_widen import widen_kernel
values, scales = torch.load(sys.argv[1])
found = [torch.empty(values.shape, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
for out in found:
    widen_kernel[(scales.numel(),)](values, scales, out, *values.shape[1:], *scales.shape[1:], BLOCK=128)
torch.save(found, sys.argv[2])
"""


def test_the_kernel_in_the_interpreter(tmp_path):
    """Every E4M3 value, in matrices with ragged blocks."""
    values = torch.arange(2 * 150 * 200).view(2, 150, 200).to(torch.uint8)
    scales = torch.rand(2, *scale_shape(150, 200)) + 0.1
    torch.save((values, scales), tmp_path / "in")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", INTERPRETED, tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = VALUES[values.long()] * scales.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :150, :200]
    # the interpreter cuts bf16 off where a GPU rounds
    for out, slack in zip(torch.load(tmp_path / "out"), (0, 2**-7), strict=True):
        torch.testing.assert_close(out, expected.to(out.dtype), rtol=slack, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(6, 768, 2048), (3, 150, 200)])
def test_the_kernel_equals_torch(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape).cuda()
    pairs = [quantise(matrix) for matrix in matrices]
    values, scales = (torch.stack([pair[i] for pair in pairs]) for i in (0, 1))
    assert all(torch.equal(values[i].cpu().float(), quantise(m.cpu())[0].float()) for i, m in enumerate(matrices))
    out, expected = (torch.empty(shape, dtype=torch.bfloat16, device=where) for where in ("cuda", "cpu"))
    widen_stack(values, scales, out)
    widen_stack(values.cpu(), scales.cpu(), expected)
    assert torch.equal(out.cpu(), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", ["fp8", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_published_checkpoint_loads_to_its_values(dtype, base_dtype, bases, process_group, monkeypatch):
    monkeypatch.setattr("malaysian_sft.load_base.CHUNK_BYTES", 288 * 128)  # a matrix takes several reads
    flags = ["--dtype", dtype] + (["--base_dtype", base_dtype] if base_dtype else [])
    _, model = build(bases["published"], *flags)
    _, expected = build(bases["widened"], "--dtype", dtype)
    check_base(model, expected, stored=FP8 if base_dtype else getattr(torch, dtype))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_checkpoint_is_quantised_while_loading(stacked, bases, tmp_path, process_group, monkeypatch):
    monkeypatch.setattr("malaysian_sft.load_base.CHUNK_BYTES", 4 * 288 * 128)
    plain = bases["plain"]
    if stacked:
        weights = {name: p.detach().clone() for name, p in plain_model(plain).state_dict().items()}
        plain = with_weights(plain, tmp_path / "stacked", weights)
    _, model = build(plain, "--base_dtype", "fp8")
    _, expected = build(bases["rounded"])
    check_base(model, expected, stored=FP8)


def check_base(model, expected, stored):
    """Every frozen weight of `model`, experts widened, equals that of `expected`, to the bit."""
    found = frozen_tensors(model.causal_lm)
    experts = 0
    for path, module in model.causal_lm.named_modules():
        if isinstance(module, FusedMoELoRA):
            for name, weight in zip(("gate_up_proj", "down_proj"), module.base_weights(), strict=True):
                assert found[f"{path}.{name}"].dtype == stored
                found[f"{path}.{name}"] = weight.clone()
                found.pop(f"{path}.{name}{SCALE}", None)
                experts += 1
    theirs = frozen_tensors(expected.causal_lm)
    assert found.keys() == theirs.keys() and experts == 4
    for name, tensor in theirs.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_scales_in_bf16_are_read(bases, tmp_path, process_group):
    base, stands_for = published(bases["plain"], tmp_path / "fp8", everything=False, scale_dtype=torch.bfloat16)
    _, model = build(base, "--base_dtype", "fp8")
    experts = model.causal_lm.model.layers[1].mlp.experts
    assert torch.equal(experts.base_weights()[1][3], stands_for["model.layers.1.mlp.experts.3.down_proj.weight"])


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{EXPERT}_scale_inv"), rf"{EXPERT} is F8_E4M3 .* with scales {EXPERT}_scale_inv: none"),
        (lambda t: t.update({f"{EXPERT}_scale_inv": torch.ones(3, 2)}), r"\(3, 2\); expected .* 128 x 128, \(2, 3\)"),
        (lambda t: t.update({EXPERT: t[EXPERT].float().to(torch.float8_e5m2)}), rf"{EXPERT} is F8_E5M2; expected one"),
        (
            lambda t: t.update({f"{EXPERT[:-7]}.input_scale": torch.ones(1)}),
            r"the model does not: .*up_proj.input_scale",
        ),
    ],
    ids=["no scale", "shape", "e5m2", "more"],
)
def test_a_faulty_fp8_checkpoint_is_refused_by_name(damage, message, bases, tmp_path, process_group):
    tensors = {n: t for file in Path(bases["published"]).glob("*.safetensors") for n, t in load_file(file).items()}
    damage(tensors)
    base = with_weights(bases["plain"], tmp_path / "base", tensors)
    with pytest.raises(ValueError, match=message):
        build(base, "--base_dtype", "fp8")


@pytest.mark.parametrize(
    "other",
    [
        {"quant_method": "compressed-tensors"},
        {"quant_method": "awq", "bits": 4},
        PUBLISHED | {"weight_block_size": None},
        PUBLISHED | {"weight_block_size": [1, 128]},
        PUBLISHED | {"activation_scheme": "static"},
        PUBLISHED | {"fmt": "e5m2"},
    ],
    ids=lambda other: " ".join(map(str, other.values())),
)
def test_other_quantisations_are_refused_by_name(other, bases):
    config = AutoConfig.from_pretrained(bases["plain"])
    config.quantization_config = other
    with pytest.raises(ValueError, match=rf"the base is quantised \({other['quant_method']}\).*take the bf16 check"):
        check_trainer(config, "moe")
    config.quantization_config = PUBLISHED
    check_trainer(config, "moe")


# ----------------------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------------------


def gradients(peft_model, model, pack):
    """(loss, {name on disk: gradient}) of a pack."""
    loss, _ = model(train_moe.to_batch(pack))
    loss.backward()
    for p in model.parameters():
        assert p.requires_grad == (p.grad is not None)
        if p.requires_grad:
            p.data = p.grad
    return loss.item(), adapter_state_dict(peft_model)


@pytest.mark.parametrize(
    ("ours", "use_dora", "activations"),
    [
        ("published", False, "none"),
        ("published", True, "full"),
        ("plain", False, "full"),
        ("plain", False, "selective"),
        ("plain", True, "none"),
    ],
)
def test_loss_and_every_gradient_equal_widened_weights(ours, use_dora, activations, bases, process_group):
    flags = ["--use_dora", use_dora, "--activations", activations]
    found = []
    for base, more in ((ours, ["--base_dtype", "fp8"]), (RUNS[ours], [])):
        peft_model, model = build(bases[base], *flags, *more)
        randomise_adapter(model)
        found.append(gradients(peft_model, model, random_pack(40, 7)))
    (loss, given), (expected_loss, expected) = found
    assert loss == expected_loss and given.keys() == expected.keys() and len(given) > 50
    for name, gradient in expected.items():
        assert torch.equal(given[name], gradient), name


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_loss_and_every_gradient_equal_transformers(use_dora, bases, process_group):
    peft_model, model = build(bases["published"], "--base_dtype", "fp8", "--use_dora", use_dora)
    randomise_adapter(model)
    pack = random_pack(20, 7)
    tensors = {name: t.requires_grad_() for name, t in adapter_state_dict(peft_model).items()}
    loss, given = gradients(peft_model, model, pack)
    reference = plain_model(bases["widened"])
    weights = adapted_weights(dict(reference.named_parameters()), tensors, scaling=2.0)
    expected, _ = reference_loss(reference, weights, pack)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in given.items():
        largest = tensors[name].grad.abs().max().item()
        torch.testing.assert_close(gradient, tensors[name].grad, rtol=2e-3, atol=2e-4 * largest + 1e-6, msg=name)


def test_the_room_is_one_and_is_not_kept_for_the_backward(bases, process_group):
    _, model = build(bases["plain"], "--base_dtype", "fp8", "--activations", "none")
    rooms = {module.wide_room for module in model.modules() if isinstance(module, FusedMoELoRA)}
    assert len(rooms) == 1
    saved, room = [], rooms.pop()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(train_moe.to_batch(random_pack(20)))
    assert len(saved) > 50 and room.room.numel() == 4 * 4 * 3 * 288 * 160  # bytes
    assert all(t.untyped_storage().data_ptr() != room.room.untyped_storage().data_ptr() for t in saved)


def test_experts_of_a_loaded_model_are_quantised_when_they_are_wrapped(bases):
    model, rounded = plain_model(bases["plain"]), plain_model(bases["rounded"])
    wrap_experts(model, r=4, lora_alpha=8, fp8=True)
    layer, expected = model.model.layers[1].mlp.experts, rounded.model.layers[1].mlp.experts
    assert layer.gate_up_proj.dtype == FP8 and not layer.gate_up_proj_scale_inv.requires_grad
    torch.manual_seed(0)
    x, index, weights = torch.randn(9, 288), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    torch.testing.assert_close(layer(x, index, weights), expected(x, index, weights), rtol=1e-4, atol=1e-5)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["down_proj_scale_inv"] *= 2
    layer.load_state_dict(state)  # what was widened before is forgotten
    again = moe_lora_reference(
        x, index, weights, expected.gate_up_proj, 2 * expected.down_proj, *layer.adapters(), layer.scaling
    )
    torch.testing.assert_close(layer(x, index, weights), again, rtol=1e-4, atol=1e-5)
    assert isinstance(layer.wide_room, WideRoom)


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------

STEPS = 4


@pytest.fixture(scope="module")
def runs(bases, tmp_path_factory):
    """{base: (argv, output directory, [the frozen weights before and after])} of unbroken runs of one process with FP8
    storage, the first LoRA, the second DoRA."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    rows = [json.dumps({"question": f"Apa {i}?", "answer": f"Ialah {i}."}) + "\n" for i in range(12)]
    (root / "train.jsonl").write_text("".join(rows))
    for base in RUNS:
        out = root / base
        argv = arguments(bases[base], root / "train.jsonl", out, "--max_steps", STEPS, "--save_steps", 1)
        argv += ["--base_dtype", "fp8", "--use_dora", str(base == "plain"), "--global_batch_size", "2"]
        argv += ["--max_seq_length", "64"]
        models, patch = [], pytest.MonkeyPatch()

        def load(causal_lm, *rest, models=models):
            done = load_weights(causal_lm, *rest)
            models.extend([causal_lm, copies(causal_lm)])
            return done

        patch.setattr("train_moe.load_weights", load)
        train_moe.main(argv)
        patch.undo()
        found[base] = argv, out, [models[1], copies(models[0])]
    return found


def copies(causal_lm):
    return {name: tensor.detach().clone() for name, tensor in frozen_tensors(causal_lm).items()}


def test_frozen_weights_do_not_change(runs):
    for _, _, (before, after) in runs.values():
        assert sum(tensor.dtype == FP8 for tensor in before.values()) == 4 and before.keys() == after.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize("base", RUNS)
def test_a_run_on_widened_weights_has_the_same_losses(base, runs, bases, tmp_path):
    argv = moved(runs[base][0], tmp_path / "run", "--model_name_or_path", bases[RUNS[base]])
    at = argv.index("--base_dtype")
    del argv[at : at + 2]
    train_moe.main(argv)
    assert losses(tmp_path / "run") == losses(runs[base][1]) and len(losses(tmp_path / "run")) == STEPS


@pytest.mark.parametrize("base", [pytest.param("published", marks=pytest.mark.slow), "plain"])
def test_two_processes_equal_one_and_resume(base, runs, tmp_path):
    """Rank 1 dies in step 3, after two checkpoints; one process goes on."""
    argv, expected = moved(runs[base][0], tmp_path / "run"), losses(runs[base][1])
    code, output = run_processes(2, argv, DIES_IN_STEP_3)
    assert code and losses(tmp_path / "run") == [pytest.approx(line, rel=1e-4) for line in expected[:2]], output
    without = [word for word in argv if word not in ("--base_dtype", "fp8")]
    with pytest.raises(SystemExit, match="--resume: base_dtype is None, but .* says fp8; that is another run"):
        train_moe.main([*without, "--resume", "True"])
    train_moe.main([*argv, "--resume", "True"])
    assert losses(tmp_path / "run") == [
        pytest.approx(line, rel=5e-4) for line in expected
    ]  # sums by other numbers of threads, then Adam


@pytest.mark.parametrize("base", RUNS)
def test_merged_equals_transformers_with_widened_weights(base, runs, bases, tmp_path, monkeypatch):
    monkeypatch.setattr("malaysian_sft.merge.CHUNK", 288 * 128)  # a matrix takes several blocks of rows
    adapter = runs[base][1] / f"checkpoint-{STEPS}"
    manifest = json.loads((adapter / MANIFEST).read_text())
    quantised = "checkpoint" if base == "published" else "while loading"
    assert manifest["base_quantisation"] == {
        "quantised": quantised, "format": "float8_e4m3fn", "weight_block_size": [128, 128], "widened_to": "float32"
    }  # fmt: skip
    assert verify_adapter(adapter, bases[base]) == []
    merge_adapter(bases[base], adapter, tmp_path / "merged", workers=1)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())

    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    reference, tensors = plain_model(bases[RUNS[base]]), load_file(adapter / WEIGHTS)
    with torch.no_grad():
        expected = adapted_weights(dict(reference.named_parameters()), tensors, scaling=2.0)
    found = dict(merged.named_parameters())
    rounding = {"rtol": 2**-8, "atol": 0} if base == "published" else {"rtol": 1e-5, "atol": 1e-6}
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, **rounding, msg=lambda m, name=name: f"{name}: {m}")
    files = read_sources(tmp_path / "merged")
    kinds = {source.dtype for source in files.values()}
    assert kinds == ({torch.bfloat16, torch.float32} if base == "published" else {torch.float32})
    if base == "published":
        index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == files.keys()
        shards = [load_file(tmp_path / "merged" / name) for name in set(index["weight_map"].values())]
        assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in shard.values())

    # as vLLM reads it, tensor by tensor
    sources, reader = read_sources(Path(bases[base])), Adapter(adapter)
    for name, weight in merged_files(tmp_path / "merged").items():
        source = sources[name]
        scale = None if source.scale is None else read_tensor(source.scale)
        streamed = merge_tensor(reader, name, read_tensor(source), dtype=weight.dtype, scale=scale)
        assert torch.equal(streamed.to(weight.dtype), weight), name
    assert not unused_faults(reader, reader.used)


def merged_files(directory):
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("adapter", "base", "message"),
    [
        ("published", "plain", "it is not quantised; the adapter was trained on .*published, quantised to FP8"),
        ("plain", "published", "it is quantised to FP8; the adapter was trained on .*plain, not quantised"),
    ],
)
def test_another_base_is_refused(adapter, base, message, runs, bases, tmp_path):
    directory = runs[adapter][1] / f"checkpoint-{STEPS}"
    assert any(re.search(message, fault) for fault in verify_adapter(directory, bases[base]))
    with pytest.raises(ValueError, match=message):
        merge_adapter(bases[base], directory, tmp_path / "out")


def test_a_published_base_is_trained_in_its_widened_weights_without_the_flag(runs, bases, tmp_path):
    argv = moved(runs["published"][0], tmp_path / "run")
    at = argv.index("--base_dtype")
    del argv[at : at + 2]
    train_moe.main(argv)
    assert losses(tmp_path / "run") == losses(runs["published"][1])
    adapter = tmp_path / "run" / f"checkpoint-{STEPS}"
    assert json.loads((adapter / MANIFEST).read_text())["base_quantisation"]["quantised"] == "checkpoint"
    merge_adapter(bases["published"], adapter, tmp_path / "merged", workers=1)


def test_vllm_s_layers_for_quantised_weights_are_refused(bases):
    def model_config(base, hf_config):
        return SimpleNamespace(model=bases[base], revision=None, hf_config=SimpleNamespace(**hf_config))

    with pytest.raises(ValueError, match="published is in FP8, the merged weights are not: pass {'hf_overrides'"):
        base_scales(model_config("published", {"quantization_config": PUBLISHED}))
    scales = base_scales(model_config("published", {"quantization_config": None}))
    assert scales[EXPERT].shape == (2, 3) and base_scales(model_config("plain", {})) == {}


@pytest.mark.slow
def test_vllm_serves_what_was_trained(runs, bases, tmp_path):
    """Log-probabilities of merged while loading equal transformers' of widened weights and delta."""
    jobs = []
    for base in RUNS:
        adapter = str(runs[base][1] / f"checkpoint-{STEPS}")
        jobs.append(dict(name=base, how="merged", base=bases[base], adapter=adapter, prompt=PROMPT, tp=1))
    jobs[0]["options"] = {"hf_overrides": {"quantization_config": None}}
    results, log = run_vllm(tmp_path, jobs, multiprocessing=False)
    assert results is not None, log[-5000:]
    for base in RUNS:
        reference = plain_model(bases[RUNS[base]])
        tensors = load_file(runs[base][1] / f"checkpoint-{STEPS}" / WEIGHTS)
        with torch.no_grad():
            weights = adapted_weights(dict(reference.named_parameters()), tensors, scaling=2.0)
            reference.load_state_dict(weights, strict=False)
        expected = log_probabilities(reference, PROMPT)
        assert torch.allclose(torch.tensor(results[base]["log_probabilities"]), expected, atol=TOLERANCE, rtol=0)
