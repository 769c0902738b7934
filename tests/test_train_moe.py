"""train_moe.py against transformers, PEFT's definitions of LoRA and DoRA, and a plain single-process loop; runs that
are killed."""

import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.integration_utils import rewrite_logs

import multipack
import train_moe
from conftest import MOE_FAMILIES, save_tiny_checkpoint, tiny_config, tiny_model, tiny_tokenizer
from fused_moe_lora import FusedMoELoRA
from malaysian_sft import planning
from malaysian_sft.adapter_state import adapter_state_dict
from malaysian_sft.load_base import frozen_tensors, load_weights, reset_adapter
from malaysian_sft.lora import PREFIX, WEIGHTS
from malaysian_sft.micro_batches import EMPTY_PACK
from malaysian_sft.moe_model import (
    LoraLinear,
    SummedCrossEntropy,
    build_model,
    compiled_for_any_length,
    make_mesh,
    nll_and_gradient,
    shard,
)
from malaysian_sft.ranks import Stop
from malaysian_sft.run import Log, claim, router_record
from malaysian_sft.sample_models import upcycle
from malaysian_sft.verify import verify_adapter

ROOT = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------------------------------------------------
# Helpers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{family: directory of a tiny fp32 checkpoint}, biases and all: transformers starts them at zero, where mistakes
    do not show."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in MOE_FAMILIES:
        model = tiny_model(family)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("_proj.bias", "e_score_correction_bias")):
                tensor.data.normal_(0, 0.2)
        model.save_pretrained(root / family)
        tiny_tokenizer().save_pretrained(root / family)
    return {family: str(root / family) for family in MOE_FAMILIES}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A JSONL file that packs into a number of packs that four does not divide."""
    generator = random.Random(0)
    words = ["saya", "makan", "nasi", "lemak", "di", "Ipoh", "esok"]

    def text(most):
        return " ".join(generator.choice(words) for _ in range(generator.randint(1, most)))

    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    rows = [[{"role": "user", "content": text(5)}, {"role": "assistant", "content": text(15)}] for _ in range(35)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


def arguments(model, data, out, *more):
    flags = (
        "--max_seq_length 256 --global_batch_size 4 --r 8 --warmup_steps 2 --learning_rate 1e-2 --dtype float32"
        " --report_to none"
    )
    flags += (
        f" --num_train_epochs 2 --model_name_or_path {model} --dataset {data} --run_name {Path(out).name} --output_dir"
        f" {out}"
    )
    return [*flags.split(), "--data_cache", str(Path(out).parent / "cache"), *map(str, more)]


# a patch for run_processes: each process is killed in step 3, before the optimiser
DIES_IN_STEP_3 = """
clip, calls = train_moe.clip_gradients, []
def dying(*args):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(*args)
train_moe.clip_gradients = dying
"""


def run_processes(count, argv, patch="", local_world_size=None):
    """train_moe.main in `count` processes, `patch` executed in each before it; returns the exit code and the output."""
    script = Path(argv[argv.index("--output_dir") + 1]).parent / "patched.py"
    lines = [
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r})",
        "import malaysian_sft.checkpoints as checkpoints",
        "import train_moe",
        patch,
        "train_moe.main(sys.argv[1:])",
    ]
    script.write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    if count > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), "--rdzv_backend", "c10d"]
        command[1:1] = [*launcher, "--rdzv_endpoint", "localhost:0", "--"]
    done = subprocess.run([*command, *argv], env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out):
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_log(out)]


def saved_adapter(directory):
    return load_file(Path(directory) / WEIGHTS)


def build(checkpoint, *more):
    """(PeftModel, ModelWithLoss) with its weights, in this process, unsharded."""
    args, _, lora_args = train_moe.parse(arguments(checkpoint, "none", "none", *more))
    peft_model, model = build_model(AutoConfig.from_pretrained(checkpoint), args, lora_args)
    load_weights(model.causal_lm, Path(checkpoint), torch.device("cpu"))
    reset_adapter(model.causal_lm, args.seed)
    return peft_model, model


def randomise_adapter(model):
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad:
            with torch.no_grad():
                p.mul_(1 + 0.1 * torch.randn_like(p)) if "magnitude" in name else p.copy_(0.1 * torch.randn_like(p))


def adapted_weights(base, tensors, scaling):
    """{parameter of the transformers model: W + s B A, or DoRA's m (W + s B A) / |W + s B A|}, differentiable in
    `tensors`."""
    prefix = PREFIX
    for disk, ours in (
        ("block_sparse_moe", "mlp"),
        (".w1.", ".gate_proj."),
        (".w2.", ".down_proj."),
        (".w3.", ".up_proj."),
    ):
        tensors = {name.replace(disk, ours): tensor for name, tensor in tensors.items()}

    def adapt(name, W):
        if f"{prefix}{name}.lora_A.weight" not in tensors:
            return W
        W = W + scaling * tensors[f"{prefix}{name}.lora_B.weight"] @ tensors[f"{prefix}{name}.lora_A.weight"]
        # the norm is a constant to the gradient (DoRA, section 4.3)
        if f"{prefix}{name}.lora_magnitude_vector" in tensors:
            W = W * (tensors[f"{prefix}{name}.lora_magnitude_vector"] / W.norm(dim=1).detach())[:, None]
        return W

    adapted = {}
    for name, W in base.items():
        if name.endswith("experts.gate_up_proj"):
            stack, half = name.removesuffix(".gate_up_proj"), W.shape[1] // 2
            parts = [
                (adapt(f"{stack}.{e}.gate_proj", w[:half]), adapt(f"{stack}.{e}.up_proj", w[half:]))
                for e, w in enumerate(W)
            ]
            adapted[name] = torch.stack([torch.cat(part) for part in parts])
        elif name.endswith("experts.down_proj"):
            stack = name.removesuffix(".down_proj")
            adapted[name] = torch.stack([adapt(f"{stack}.{e}.down_proj", w) for e, w in enumerate(W)])
        else:
            adapted[name] = adapt(name.removesuffix(".weight"), W)
    return adapted


def reference_loss(reference, weights, pack):
    """(summed loss, logits) of a pack: transformers' eager model, one document at a time."""
    total, logits = 0.0, []
    for document in pack:
        out = functional_call(
            reference, weights, (), {"input_ids": document["input_ids"][None], "use_cache": False}
        ).logits[0]
        total = total + F.cross_entropy(out[:-1], document["labels"][1:], ignore_index=-100, reduction="sum")
        logits.append(out)
    return total, torch.cat(logits)


def plain_model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", experts_implementation="eager"
    ).eval()  # what is trained is what is served


def random_pack(*lengths):
    torch.manual_seed(2)
    pack = []
    for n in lengths:
        ids = torch.randint(5, 320, (n,))
        labels = ids.clone()
        labels[: n // 3 + 1] = -100
        pack.append({"input_ids": ids, "labels": labels})
    return pack


# ----------------------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_logits_loss_and_every_gradient_equal_transformers(family, use_dora, checkpoints, process_group):
    activations = ("none", "selective", "full")[MOE_FAMILIES.index(family) % 3]
    peft_model, model = build(checkpoints[family], "--use_dora", use_dora, "--activations", activations)
    randomise_adapter(model)
    pack = random_pack(40, 7, 61)
    batch = train_moe.to_batch(pack)
    loss, _ = model(batch)
    loss.backward()

    tensors = {name: t.requires_grad_() for name, t in adapter_state_dict(peft_model).items()}
    reference = plain_model(checkpoints[family])
    weights = adapted_weights(dict(reference.named_parameters()), tensors, scaling=2.0)
    expected, expected_logits = reference_loss(reference, weights, pack)
    expected.backward()

    inputs = {key: value for key, value in batch.items() if key not in ("predicting", "targets")}
    torch.testing.assert_close(model.causal_lm(**inputs).logits[0], expected_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for p in model.parameters():
        assert p.requires_grad == (p.grad is not None)
        if p.requires_grad:
            p.data = p.grad
    gradients = adapter_state_dict(peft_model)
    assert gradients.keys() == tensors.keys() and len(gradients) > 50
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, tensors[name].grad, rtol=2e-3, atol=2e-4 * tensors[name].grad.abs().max().item() + 1e-6, msg=name
        )


def test_dropout_of_lora_is_peft_s(checkpoints, process_group):
    peft_model, model = build(checkpoints["qwen3_moe"], "--lora_dropout", 0.5)
    randomise_adapter(model)
    layer = model.causal_lm.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 9, 64)
    torch.manual_seed(0)
    ours = layer(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, super(LoraLinear, layer).forward(x))
    assert not torch.equal(ours, layer(x)), "a second call must drop other values"


def test_fast_parts_change_no_gradient(checkpoints, process_group):
    pack = random_pack(30, 20)
    for family, more in (
        ("qwen3_moe", ()),
        ("glm4_moe", ("--activations", "selective")),
        ("qwen3_moe", ("--use_dora", True)),
    ):
        _, plain = build(checkpoints[family], "--fast_parts", False, *more)
        _, fast = build(checkpoints[family], *more)
        (a, _), (b, _) = plain(train_moe.to_batch(pack)), fast(train_moe.to_batch(pack))
        a.backward(), b.backward()
        torch.testing.assert_close(a, b)
        for (name, p), (_, q) in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_packs_of_other_lengths_compile_nothing_again(checkpoints, process_group, monkeypatch):
    compiled_graphs, compile = [], torch.compile

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend=backend))
    torch._dynamo.reset()
    _, model = build(checkpoints["qwen3_moe"])
    model.chunk_loss = compiled_for_any_length(nll_and_gradient, [0, 0])
    seen = []
    for lengths in ((30, 20), (41, 22), (16, 16), (64, 33, 7)):
        loss, _ = model(train_moe.to_batch(random_pack(*lengths)))
        loss.backward()
        seen.append(len(compiled_graphs))
    torch._dynamo.reset()
    assert seen[0] > 0 and seen[1:] == seen[:1] * 3, seen


def test_summed_cross_entropy():
    def ours(hidden, weight, targets):
        return SummedCrossEntropy.apply(hidden, weight, targets, nll_and_gradient)

    hidden = torch.randn(2500, 16, requires_grad=True)
    weight, targets = torch.randn(50, 16), torch.randint(0, 50, (2500,))
    theirs = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(ours(hidden, weight, targets), theirs)
    expected = torch.autograd.grad(3 * theirs, hidden)
    torch.testing.assert_close(
        torch.autograd.grad(3 * ours(hidden, weight, targets), hidden), expected, rtol=1e-4, atol=1e-4
    )
    nothing = ours(hidden[:0], weight, targets[:0])
    assert nothing.item() == 0 and torch.autograd.grad(nothing, hidden)[0].abs().sum() == 0


def test_only_large_gradients_are_clipped(process_group):
    mesh = make_mesh(torch.device("cpu"), 1)
    for length, clipped in ((5.0, 2.0), (1.0, 1.0)):
        parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
        for p in parameters:
            p.grad = torch.full((3,), length / 6**0.5)
        assert train_moe.clip_gradients(parameters, 2.0, mesh).item() == pytest.approx(length)
        assert torch.stack([p.grad for p in parameters]).norm().item() == pytest.approx(clipped, rel=1e-5)


def test_router_loss_and_load_equal_transformers(checkpoints, process_group):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    _, model = build(checkpoints["qwen3_moe"], "--router_aux_loss_coef", 0.1, "--activations", "full")
    batch = train_moe.to_batch(random_pack(50))
    loss, auxiliary = model(batch)
    auxiliary.backward()
    counts = model.router_load.take()
    reference = plain_model(checkpoints["qwen3_moe"])
    logits = reference(batch["input_ids"], output_router_logits=True).router_logits
    torch.testing.assert_close(auxiliary, load_balancing_loss_func(logits, 8, 2))
    chosen = torch.stack([torch.bincount(layer.topk(2).indices.flatten(), minlength=8) for layer in logits])
    assert torch.equal(counts, chosen), "the recomputation in the backward must not count again"
    assert model.router_load.take().sum() == 0
    # B is zero, so the only gradients are lora_B's; the first layer's attention moves its router
    assert model.causal_lm.model.layers[0].self_attn.o_proj.lora_B["default"].weight.grad.abs().sum() > 0
    record = router_record(torch.tensor([[4, 0, 0, 0], [1, 1, 1, 1]]))
    assert record == {"expert_load_max_over_mean": 2.5, "expert_load_worst_layer": 4.0, "dead_experts": 3}
    with pytest.raises(ValueError, match="router_aux_loss_coef: glm4_moe"):
        build(checkpoints["glm4_moe"], "--router_aux_loss_coef", 0.1)


def test_a_place_without_a_pack_counts_in_nothing(checkpoints, process_group):
    """The last step of an epoch has some: no load of their tokens, no gradient of a load-balancing loss, and none less
    for the others."""
    _, model = build(checkpoints["qwen3_moe"], "--router_aux_loss_coef", 0.1)
    args = train_moe.parse(
        arguments("none", "none", "none", "--router_aux_loss_coef", 0.1, "--reduce_every_micro_batch", False)
    )[0]
    randomise_adapter(model)
    shard(model, make_mesh(torch.device("cpu"), 1), args, use_dora=False)
    pack, empty = train_moe.to_batch(random_pack(40, 12)), train_moe.to_batch(EMPTY_PACK)

    def step(*batches):
        model.zero_grad()
        totals = train_moe.forward_backward(model, batches, torch.tensor(20.0), args, torch.device("cpu"), packs=1)
        return totals, model.router_load.take(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    _, counts, gradients = step(empty)
    assert counts.sum() == 0 and not any(gradient.any() for gradient in gradients)
    alone, with_empty = step(pack), step(empty, pack)
    assert alone[0][1] > 0 and alone[1].sum() == 2 * 2 * 52, "2 layers, 2 experts a token"
    for ours, expected in zip(with_empty, alone, strict=True):
        torch.testing.assert_close(ours, expected)


def test_upcycled_model_computes_the_same_function(tmp_path):
    save_tiny_checkpoint(tmp_path / "dense", "llama", tie_word_embeddings=True)
    upcycle(tmp_path / "dense", tmp_path / "moe")
    dense, moe = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "moe"))
    ids = torch.randint(0, 320, (1, 60))
    torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    assert moe.config.num_experts == 4
    # vLLM makes these biases in any case, and what it finds no value for stays as it was in memory
    assert "model.layers.0.self_attn.q_proj.bias" in load_file(tmp_path / "moe" / "model.safetensors")
    save_tiny_checkpoint(tmp_path / "qwen", "qwen3")
    with pytest.raises(ValueError, match="expected a Llama model"):
        upcycle(tmp_path / "qwen", tmp_path / "no")


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_and_buffer_is_the_checkpoint_s(tied, tmp_path, process_group):
    bias = torch.linspace(-1, 1, 8)
    model = tiny_model("glm4_moe", tie_word_embeddings=tied, num_mtp_layers=1)
    model.model.layers[1].mlp.gate.e_score_correction_bias.copy_(bias)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(3)  # the layer that predicts one token further ahead
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    _, ours = build(str(tmp_path), "--dtype", "bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    loaded = {**frozen_tensors(ours.causal_lm), **dict(ours.causal_lm.named_buffers())}
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    assert torch.equal(loaded["model.layers.1.mlp.gate.e_score_correction_bias"], bias)
    assert loaded["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    if tied:
        assert ours.causal_lm.lm_head.weight is ours.causal_lm.model.embed_tokens.weight


def test_stacked_experts_are_read_as_they_are(checkpoints, tmp_path, process_group):
    shutil.copytree(checkpoints["qwen3_moe"], tmp_path, dirs_exist_ok=True)
    reference = plain_model(checkpoints["qwen3_moe"])
    save_file({name: p.detach().clone() for name, p in reference.named_parameters()}, tmp_path / "model.safetensors")
    _, model = build(str(tmp_path))
    for name, p in reference.named_parameters():
        assert torch.equal(frozen_tensors(model.causal_lm)[name], p), name


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def break_shape(tensors):
    tensors[EXPERT] = tensors[EXPERT].T.contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(EXPERT), rf"lacks: {re.escape(EXPERT)}"),
        (
            lambda t: t.update({"model.layers.7.mlp.gate.weight": torch.ones(2)}),
            r"has, and the model does not: model\.layers\.7\.mlp",
        ),
        (break_shape, rf"another shape: {re.escape(EXPERT)} is \(64, 32\), not \(32, 64\)"),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_faulty_checkpoint_is_refused_by_name(damage, message, checkpoints, tmp_path, process_group):
    shutil.copytree(checkpoints["qwen3_moe"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        build(str(tmp_path))


def test_a_truncated_or_absent_file_is_refused(checkpoints, tmp_path, process_group):
    shutil.copytree(checkpoints["qwen3_moe"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    with pytest.raises(ValueError, match="truncated"):
        build(str(tmp_path))
    path.unlink()
    with pytest.raises(ValueError, match="no .*safetensors file"):
        build(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "model-00001.safetensors"}}'
    )
    with pytest.raises(ValueError, match="model-00001.safetensors: missing"):
        build(str(tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# Runs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(checkpoints, conversations, tmp_path_factory):
    """An unbroken run of one process: (argv, output directory, the model after training)."""
    out = tmp_path_factory.mktemp("one") / "run"
    argv = arguments(checkpoints["qwen3_moe"], conversations, out, "--save_steps", 1)
    models = []
    load, patch = load_weights, pytest.MonkeyPatch()
    patch.setattr(
        "train_moe.load_weights",
        lambda causal_lm, *rest: (models.append(causal_lm), load(causal_lm, *rest)),
    )
    train_moe.main(argv)
    patch.undo()
    return argv, out, models[0]


def moved(argv, out, *more):
    """The same arguments with another output directory."""
    argv = [*argv, *map(str, more)]
    for flag, value in (("--output_dir", str(out)), ("--data_cache", str(Path(out).parent / "cache"))):
        argv[argv.index(flag) + 1] = value
    return argv


def test_steps_equal_a_plain_loop(checkpoints, conversations, one_process, tmp_path, process_group):
    argv, out, _ = one_process
    args, data_args, _ = train_moe.parse(argv)
    peft_model, _ = build(checkpoints["qwen3_moe"])
    tensors = {name: t.requires_grad_() for name, t in adapter_state_dict(peft_model).items()}
    reference = plain_model(checkpoints["qwen3_moe"])
    dataset = multipack.prepare(
        data_args, AutoTokenizer.from_pretrained(args.model_name_or_path), args.model_name_or_path
    )
    steps = -(-len(dataset) // 4)
    assert len(dataset) % 4 != 0 and steps >= 3, "the last step of an epoch must be a smaller one"
    optimizer = torch.optim.AdamW(tensors.values(), weight_decay=0.01, fused=False)
    found, rates = losses(out), [record["learning_rate"] for record in read_log(out)]
    assert len(found) == 2 * steps
    for step in range(steps + 1):
        if step == steps:
            dataset.set_epoch(1)
        first = step % steps * 4
        packs = [dataset[i] for i in range(first, min(first + 4, len(dataset)))]
        count = sum((document["labels"] != -100).sum() for pack in packs for document in pack)
        weights = adapted_weights(dict(reference.named_parameters()), tensors, scaling=2.0)
        loss = sum(reference_loss(reference, weights, pack)[0] for pack in packs) / count
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 2 if step < 2 else 1e-2 * (2 * steps - step) / (2 * steps - 2)
        assert rates[step] == pytest.approx(group["lr"])
        optimizer.step()
        optimizer.zero_grad()
        assert found[step] == pytest.approx((step + 1, loss.item(), norm.item()), rel=1e-4)
        saved = saved_adapter(out / f"checkpoint-{step + 1}")
        assert saved.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(saved[name], tensor.detach(), rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_bf16_follows_fp32(use_dora, one_process, tmp_path):
    """LoRA is cast to bf16 for the arithmetic; with DoRA adapters stay fp32. What is trained and saved is fp32 in
    both."""
    runs = {}
    for dtype in ("float32", "bfloat16"):
        argv = moved(
            one_process[0],
            tmp_path / dtype,
            "--dtype",
            dtype,
            "--use_dora",
            use_dora,
            "--max_steps",
            4,
            "--activations",
            "none",
        )
        train_moe.main(argv)
        runs[dtype] = [line[1] for line in losses(tmp_path / dtype)]
    assert runs["bfloat16"] != runs["float32"] and runs["bfloat16"] == pytest.approx(runs["float32"], rel=5e-3)
    rates = [record["learning_rate"] for record in read_log(tmp_path / "bfloat16")]
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3]), "the schedule is that of --max_steps"
    saved = saved_adapter(tmp_path / "bfloat16" / "checkpoint-4")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert any((tensor != tensor.bfloat16().float()).any() for name, tensor in saved.items() if "lora_B" in name)
    if use_dora:
        magnitudes = [tensor for name, tensor in saved.items() if "magnitude" in name]
        assert magnitudes and all((tensor != tensor.bfloat16().float()).any() for tensor in magnitudes)


def test_max_steps_in_place_of_epochs(one_process, tmp_path):
    """More steps than the epochs have: on into further epochs, under one schedule, and resumed under that one only."""
    steps = len(losses(one_process[1]))
    argv = moved(one_process[0], tmp_path / "run", "--save_steps", 100, "--num_train_epochs", 1, "--max_steps", steps)
    train_moe.main(argv)
    assert (
        losses(tmp_path / "run") == unchanged(losses(one_process[1])) and read_log(tmp_path / "run")[-1]["epoch"] == 2.0
    )
    train_moe.main(moved(one_process[0], tmp_path / "run", "--resume", "True"))  # as many, counted in epochs
    with pytest.raises(SystemExit, match=f"--resume: total_steps is {steps + 1}, but .* says {steps}"):
        train_moe.main([*argv, "--resume", "True", "--max_steps", str(steps + 1)])


def test_norms_of_dora_are_those_of_the_step(one_process, tmp_path, monkeypatch):
    """They are kept from micro-batch to micro-batch and dropped after an optimiser step, in every layer that has
    some."""
    flags = ["--use_dora", True, "--max_steps", 3, "--save_steps", 10]
    train_moe.main(moved(one_process[0], tmp_path / "kept", *flags))

    def forgetting(forward):
        return lambda module, *inputs: (module.forget_norms(), forward(module, *inputs))[1]

    for kind in (LoraLinear, FusedMoELoRA):
        monkeypatch.setattr(kind, "forward", forgetting(kind.forward))
    train_moe.main(moved(one_process[0], tmp_path / "never-kept", *flags))
    assert losses(tmp_path / "kept") == [pytest.approx(line, rel=1e-5) for line in losses(tmp_path / "never-kept")]


def test_the_record_of_a_run(one_process):
    argv, out, causal_lm = one_process
    record = json.loads((out / "args.json").read_text())
    assert (
        record["launcher"] == "run"
        and record["arguments"]["learning_rate"] == 1e-2
        and re.fullmatch(r"[0-9a-f]{40}\+?", record["commit"])
    )
    log = read_log(out)
    assert [line["step"] for line in log] == list(range(1, len(log) + 1)) and log[-1]["epoch"] == 2.0
    assert all(line["tokens"] > line["supervised_tokens"] > 0 and line["tokens_per_second"] > 0 for line in log)
    assert record["arguments"]["activations"] == "full" and record["arguments"]["memory_mode"] == "fast", (
        "chosen, so written down"
    )
    assert len(list(out.glob("checkpoint-*"))) == len(log)
    assert {path.parent.name for path in out.glob("checkpoint-*/resume")} == {
        f"checkpoint-{step}" for step in (len(log) - 1, len(log))
    }, "the newest two are kept"
    assert verify_adapter(out / f"checkpoint-{len(log)}", record["model"]) == []


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_gets_the_names_that_the_dense_runs_have(tracker, process_group, tmp_path, monkeypatch):
    """transformers' callback names the dense trainer's records; those of both trainers belong in the same charts."""
    sent, options = [], {}
    functions = {
        "init": options.update,
        "log": sent.append,
        "define_metric": lambda *_, **__: None,
        "finish": lambda: None,
    }
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(
        sys.modules, tracker, SimpleNamespace(**{key: lambda *a, f=f, **k: f(*a, **k) for key, f in functions.items()})
    )
    args, *_ = train_moe.parse(arguments("none", "none", tmp_path, "--report_to", tracker))
    log = Log(args, {}, 0, 10)
    record = {"step": 3, "epoch": 0.5, "loss": 2.0, "grad_norm": 0.5, "learning_rate": 1e-4, "tokens_per_second": 9.5}
    record["mfu"] = None
    log.write(record)
    log.close()
    known = {key: value for key, value in record.items() if value is not None}
    assert sent == [rewrite_logs(known) | {"train/global_step": 3}] and options["name"] == args.run_name
    assert read_log(tmp_path) == [record]


def test_frozen_weights_do_not_change(one_process, checkpoints):
    _, _, causal_lm = one_process
    frozen = frozen_tensors(causal_lm)
    for name, p in AutoModelForCausalLM.from_pretrained(checkpoints["qwen3_moe"]).named_parameters():
        assert torch.equal(frozen[name], p), name


@pytest.fixture(scope="module")
def two_processes(one_process, tmp_path_factory):
    """The same run in two processes: its output directory."""
    out = tmp_path_factory.mktemp("two") / "run"
    code, output = run_processes(2, moved(one_process[0], out))
    assert (out / "log.jsonl").exists(), output
    return out


def test_two_processes_equal_one(one_process, two_processes):
    assert losses(two_processes) == [pytest.approx(line, rel=1e-4) for line in losses(one_process[1])]
    last = f"checkpoint-{len(losses(two_processes))}"
    ours, theirs = saved_adapter(two_processes / last), saved_adapter(one_process[1] / last)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def test_copies_of_the_model_on_two_nodes_equal_one_process(one_process, tmp_path):
    """Two "nodes" of one process each hold a copy; gradients are added up across them, once a step."""
    patch = "os.environ['LOCAL_WORLD_SIZE'] = '1'"
    argv = moved(
        one_process[0], tmp_path / "run", "--max_steps", 3, "--reduce_every_micro_batch", True, "--use_dora", True
    )
    code, output = run_processes(2, argv, patch)
    alone = moved(one_process[0], tmp_path / "alone", "--max_steps", 3, "--use_dora", True)
    train_moe.main(alone)
    assert losses(tmp_path / "run") == [pytest.approx(line, rel=1e-4) for line in losses(tmp_path / "alone")], output
    assert len(losses(tmp_path / "alone")) == 3


def test_two_processes_in_bf16_with_the_whole_base(one_process, tmp_path):
    """Adapters alone are gathered, in bf16; their masters, and what is saved, are fp32."""
    flags = ["--max_steps", 3, "--dtype", "bfloat16", "--activations", "none"]
    code, output = run_processes(2, moved(one_process[0], tmp_path / "two", *flags, "--gather_base", False))
    assert code == 0, output
    train_moe.main(moved(one_process[0], tmp_path / "one", *flags))
    ours, theirs = ([loss for _, loss, _ in losses(tmp_path / name)] for name in ("two", "one"))
    assert ours == pytest.approx(theirs, rel=5e-3) and len(ours) == 3
    saved = saved_adapter(tmp_path / "two" / "checkpoint-3")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    assert any((tensor != tensor.bfloat16().float()).any() for name, tensor in saved.items() if "lora_B" in name)


def unchanged(lines):
    """`lines` but for the last bits: matrix products on a CPU may round differently where memory happens to be aligned
    differently."""
    return [pytest.approx(line, rel=1e-5) for line in lines]


def test_killed_in_a_step_and_resumed(one_process, two_processes, tmp_path):
    """Rank 1 dies by kill -9 between the backward and the update of step 4; the resumed run's losses are those of the
    unbroken one."""
    patch = """
clip = train_moe.clip_gradients
calls = []
def dying(*args):
    calls.append(1)
    if len(calls) == 4 and train_moe.dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return clip(*args)
train_moe.clip_gradients = dying
"""
    out = tmp_path / "run"
    argv = moved(one_process[0], out)
    code, output = run_processes(2, argv, patch)
    assert code != 0 and len(losses(out)) == 3, output
    shutil.copytree(tmp_path, tmp_path / "copy")
    # as if the next checkpoint had been cut short: its adapter is there, what to resume from is not
    shutil.copytree(out / "checkpoint-1", out / "checkpoint-4")
    code, output = run_processes(2, [*argv, "--resume", "True"])
    assert output.count(f"{out}/checkpoint-4 is incomplete (resume/position.json is not there): skipped") == 1, output
    assert f"resuming from {out}/checkpoint-3" in output
    assert losses(out) == unchanged(losses(two_processes)), output
    ours, theirs = saved_adapter(out / "checkpoint-4"), saved_adapter(two_processes / "checkpoint-4")
    assert all(torch.allclose(ours[name], tensor, rtol=1e-3, atol=2e-4) for name, tensor in theirs.items()), (
        "not written again"
    )
    # and on another number of processes
    train_moe.main(moved(argv, tmp_path / "copy" / "run", "--resume", True))
    assert losses(tmp_path / "copy" / "run") == [pytest.approx(line, rel=1e-4) for line in losses(one_process[1])]


@pytest.fixture(scope="module")
def killed_in_a_save(one_process, tmp_path_factory):
    """The directory of a run that died by kill -9 when its second checkpoint, all of it written, was about to be
    renamed."""
    patch = """
replace = os.replace
def dying(source, target):
    if str(target).endswith("run/checkpoint-2"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
checkpoints.os = type("os", (), {**vars(os), "replace": staticmethod(dying)})
"""
    out = tmp_path_factory.mktemp("killed") / "run"
    code, output = run_processes(1, moved(one_process[0], out), patch)
    assert code == -signal.SIGKILL, f"exit code {code}, not that of the kill: {output}"
    assert (out / "checkpoint-1/resume/position.json").exists() and not (out / "checkpoint-2").exists(), output
    assert (out / ".saving/checkpoint-2/resume/position.json").exists(), output
    return out


def cut_short(checkpoint):
    """Leave half of what a checkpoint's tensors to resume from take."""
    (file,) = (checkpoint / "resume").glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)


def lose_the_newest(out):
    """A second checkpoint of which a part never reached the disk."""
    shutil.copytree(out / ".saving/checkpoint-2", out / "checkpoint-2")
    cut_short(out / "checkpoint-2")


def lose_all(out):
    """The first checkpoint is cut short, and the second has an adapter alone."""
    cut_short(out / "checkpoint-1")
    shutil.copytree(out / ".saving/checkpoint-2", out / "checkpoint-2", ignore=shutil.ignore_patterns("resume"))


def lose_the_directories(out):
    """Killed before the first checkpoint."""
    shutil.rmtree(out / "checkpoint-1")


@pytest.mark.parametrize(
    ("damage", "lines"),
    [
        (None, ["resuming from RUN/checkpoint-1"]),
        (
            lose_the_newest,
            [
                (
                    "RUN/checkpoint-2 is incomplete (resume/rank-00000.safetensors is cut short): skipped, and written"
                    " again when the run gets to step 2"
                ),
                "resuming from RUN/checkpoint-1",
            ],
        ),
        (
            lose_all,
            [
                "RUN/checkpoint-2 is incomplete (resume/position.json is not there): skipped",
                "RUN/checkpoint-1 is incomplete (resume/rank-00000.safetensors is cut short): skipped",
                "no checkpoint under RUN can be gone on from (checkpoint-2: resume/position.json is not there; check",
            ],
        ),
        (lose_the_directories, ["no checkpoint under RUN yet: starting anew"]),
    ],
)
def test_killed_in_a_save_and_resumed(damage, lines, killed_in_a_save, one_process, tmp_path, capsys):
    """A run goes on from the newest complete checkpoint, from the start if there is none yet, says so, and ends like
    the unbroken one. Where all it trained is damaged it touches nothing, until it is told to start anew."""
    shutil.copytree(killed_in_a_save.parent, tmp_path, dirs_exist_ok=True)
    out = tmp_path / "run"
    if damage is not None:
        damage(out)
    error = ""
    if damage is lose_all:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
        with pytest.raises(SystemExit) as ended:
            train_moe.main([*moved(one_process[0], out), "--resume", "True"])
        error = str(ended.value)
        assert {path: path.read_bytes() for path in before} == before
        train_moe.main([*moved(one_process[0], out), "--start_anew", "True"])
        assert (out / "replaced-1/checkpoint-1/adapter_model.safetensors").exists()
        shutil.rmtree(out / "replaced-1")
    else:
        train_moe.main([*moved(one_process[0], out), "--resume", "True"])
    output = capsys.readouterr().out + error
    places = [output.find(line.replace("RUN", str(out))) for line in lines]
    assert min(places) >= 0 and places == sorted(places), output
    assert output.count("skipped") == len(lines) - 1 and output.count("resuming from") == ("resuming" in lines[-1])
    assert losses(out) == unchanged(losses(one_process[1]))
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in one_process[1].iterdir()), (
        "nothing is left over"
    )
    for checkpoint in one_process[1].glob("checkpoint-*"):
        assert verify_adapter(out / checkpoint.name) == []
        assert (out / checkpoint.name / "resume").exists() == (checkpoint / "resume").exists(), checkpoint.name


def test_sigterm_saves_and_exits(one_process, tmp_path, monkeypatch):
    step = train_moe.forward_backward
    calls = []

    def told(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(train_moe, "forward_backward", told)
    argv = moved(one_process[0], tmp_path / "run")
    argv[argv.index("--save_steps") + 1] = "100"
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        train_moe.main(argv)
    # the second step has several micro-batches, and is dropped after the first of them
    assert len(losses(tmp_path / "run")) == 1 and (tmp_path / "run" / "checkpoint-1" / "resume").is_dir()
    train_moe.main([*argv, "--resume", "True"])
    assert losses(tmp_path / "run") == unchanged(losses(one_process[1]))


def test_validation_is_no_part_of_a_step_s_time(one_process, tmp_path, monkeypatch):
    late = [0.0]

    def validate(*_):
        late[0] += 1000
        return 1.0

    monkeypatch.setattr(train_moe, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0]))
    monkeypatch.setattr(train_moe, "validate", validate)
    train_moe.main(moved(one_process[0], tmp_path / "run", "--validation_share", 0.2, "--save_steps", 100))
    log = read_log(tmp_path / "run")
    assert sum("validation_loss" in record for record in log) == 2
    assert all(record["seconds"] < 1000 > record["data_wait"] for record in log)


def test_validation_loss_is_that_of_the_held_out_documents(one_process, checkpoints, tmp_path, process_group):
    argv = moved(one_process[0], tmp_path / "run", "--validation_share", 0.2)
    args, data_args, _ = train_moe.parse(argv)
    dataset = multipack.prepare(
        data_args, AutoTokenizer.from_pretrained(args.model_name_or_path), args.model_name_or_path
    )
    _, model = build(checkpoints["qwen3_moe"])  # B is zero: the base model
    reference = plain_model(checkpoints["qwen3_moe"])
    documents = [document for i in range(len(dataset.validation)) for document in dataset.validation[i]]
    total, _ = reference_loss(reference, dict(reference.named_parameters()), documents)
    count = sum((document["labels"] != -100).sum() for document in documents)
    found = train_moe.validate(model, dataset.validation, torch.device("cpu"), Stop())
    assert found == pytest.approx((total / count).item(), rel=1e-5)
    assert model.training


@pytest.fixture
def a_gpu(monkeypatch):
    """Lets plan.py believe in GPUs; returns the machine, whose numbers a test may change."""
    machine = {"gpus": 1, "nodes": 1, "gpu_memory_gib": 80.0}
    for module in (train_moe, planning):
        monkeypatch.setattr(module, "this_machine", lambda whole=False: dict(machine))
    return machine


def forbid(monkeypatch, *names):
    """Make any use of these functions an error."""

    def used(*_, **__):
        raise AssertionError("used before the plan was settled")

    for module, name in names:
        monkeypatch.setattr(module, name, used)


LOADING = [
    (train_moe, "find_base"),
    (train_moe, "load_weights"),
    (train_moe, "build_model"),
    (multipack, "prepare"),
]


def test_dry_run_prints_the_plan_and_loads_nothing(checkpoints, tmp_path, monkeypatch, capsys):
    forbid(monkeypatch, *LOADING, (train_moe, "setup_distributed"))
    argv = arguments(checkpoints["qwen3_moe"], "nowhere.jsonl", tmp_path / "run", "--dry_run", True)
    train_moe.main(argv)
    printed = capsys.readouterr().out
    assert "No GPU here: planned for 1 of 80 GiB" in printed and "qwen3_moe, LoRA r 8" in printed and "peak" in printed
    assert "--activations none --memory_mode fast" in printed
    train_moe.main([*argv, "--prepare_only", "True"])  # what a launcher starts first
    assert capsys.readouterr().out == printed and not (tmp_path / "run").exists()


def test_a_run_that_cannot_fit_is_refused_before_loading(a_gpu, one_process, tmp_path, monkeypatch, capsys):
    argv = moved(one_process[0], tmp_path / "run", "--dtype", "bfloat16", "--max_steps", 2)
    a_gpu["gpu_memory_gib"] = 4.0001  # 4 are reserved
    with monkeypatch.context() as patch:
        forbid(patch, *LOADING)
        with pytest.raises(SystemExit, match=r"error: .* GiB a GPU are needed.*Largest: \w.*--ignore_plan True"):
            train_moe.main(argv)
    train_moe.main([*argv, "--ignore_plan", "True"])
    captured = capsys.readouterr()
    assert "warning: " in captured.err and "are needed" in captured.err and len(losses(tmp_path / "run")) == 2
    assert captured.out.count("peak memory: measured 0.00 GiB, planned") == 1, "compared after the first step"
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["arguments"]["activations"] == "full" and record["planned_gib"] is not None


def test_auto_recomputes_what_the_memory_asks_for(a_gpu, process_group, monkeypatch):
    config = AutoConfig.from_pretrained(ROOT / "tests/configs/Qwen3-30B-A3B-Instruct-2507.json")
    a_gpu["gpus"] = 8

    def settle(memory, *flags):
        a_gpu["gpu_memory_gib"] = memory
        args, data_args, lora_args = train_moe.parse(["--model_name_or_path", "none", *flags])
        args, planned = train_moe.settle_memory(config, args, data_args, lora_args)
        return (args.activations, args.memory_mode, args.reduce_every_micro_batch), planned

    (roomy, planned), (tight, tighter) = settle(140.0), settle(26.0)
    assert roomy == ("none", "fast", False) and tight == ("full", "fast", True)
    assert planned["recompute_per_token"] == 0 < tighter["recompute_per_token"]
    given = ["--activations", "selective", "--memory_mode", "fast", "--reduce_every_micro_batch", "True"]
    assert settle(140.0, *given)[0] == ("selective", "fast", True), "what is asked for is not changed"
    # the GPU with the least memory decides for all ranks
    reduced = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: (reduced.append(op), tensor.fill_(26.0)))
    assert settle(140.0)[0] == tight and reduced == [dist.ReduceOp.MIN]
    # without a known memory, and in a dtype that plan.py does not know
    assert settle(None) == (("full", "fast", False), None) == settle(140.0, "--dtype", "float32")
    assert settle(None, "--activations", "selective")[0] == ("selective", "frugal", False)
    assert settle(None, *given)[0] == ("selective", "fast", True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "True"], "no run under"),
        (["--global_batch_size", "0"], "global_batch_size 0"),
        (["--model_name_or_path", "nobody/nothing"], "nobody/nothing"),
    ],
)
def test_mistakes_end_in_one_line(flags, message, one_process, tmp_path):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        train_moe.main([*moved(one_process[0], tmp_path / "run"), *flags])


@pytest.mark.parametrize("flags", [[], ["--prepare_only", "True"]])
def test_a_dense_model_is_refused(flags, one_process, tmp_path):
    tiny_config("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(SystemExit, match="error: llama has no routed experts: train it with train_dense.py"):
        train_moe.main(
            [*moved(one_process[0], tmp_path / "run"), "--model_name_or_path", str(tmp_path / "llama"), *flags]
        )


def test_a_run_is_not_written_over(one_process):
    with pytest.raises(SystemExit, match="pass --resume"):
        train_moe.main(one_process[0])


def test_two_runs_do_not_share_a_directory(one_process, tmp_path):
    """Workers that outlive a killed torchrun, say, and the run that was started to go on from it."""
    with claim(tmp_path / "run"), pytest.raises(SystemExit, match="error: .*run: another process is training there"):
        train_moe.main(moved(one_process[0], tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    train_moe.main(moved(one_process[0], tmp_path / "run", "--max_steps", 1))
    with claim(tmp_path / "run"):
        assert len(losses(tmp_path / "run")) == 1


def other_base(directory, copy):
    """`copy`: the model in `directory` with other values in every weight."""
    shutil.copytree(directory, copy)
    for path in copy.glob("*.safetensors"):
        save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return copy


def test_another_run_is_not_resumed(one_process, tmp_path):
    shutil.copytree(one_process[1], tmp_path / "run")
    for key, value in dict(seed=5, lora_alpha=5, learning_rate=0.5, warmup_steps=5).items():
        with pytest.raises(SystemExit, match=f"{key} is {value}, but .* says"):
            train_moe.main(moved(one_process[0], tmp_path / "run", "--resume", "True", f"--{key}", value))
    other = other_base(one_process[0][one_process[0].index("--model_name_or_path") + 1], tmp_path / "other")
    with pytest.raises(
        SystemExit, match="error: --resume: base .*other: .* is not that of .*: this is another base model's adapter"
    ):
        train_moe.main(moved(one_process[0], tmp_path / "run", "--resume", "True", "--model_name_or_path", other))


def test_the_collector_runs_once_a_micro_batch_and_no_more(checkpoints, conversations, tmp_path, monkeypatch):
    """What refers to itself is gone when a micro-batch is over; nothing else starts the collector in training, and
    afterwards all is as before."""
    seen, forward = [], train_moe.optimizer_step

    class Cycle:
        def __init__(self):
            self.itself = self

    def watched(*args):
        cycle = Cycle()
        alive = weakref.ref(cycle)
        del cycle
        record = forward(*args)
        seen.append((gc.isenabled(), alive() is None))
        return record

    monkeypatch.setattr(train_moe, "optimizer_step", watched)
    train_moe.main(arguments(checkpoints["qwen3_moe"], conversations, tmp_path / "run", "--max_steps", 2))
    assert seen == [(False, True)] * 2 and gc.isenabled() and gc.get_freeze_count() == 0
