"""plan.py against transformers, PEFT, torch's FLOP counter, saved files and published totals; `pytest
tests/test_plan.py`."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

import plan
import train_dense
import train_moe
from conftest import FAMILIES, MOE_FAMILIES, tiny_config, tiny_model
from fused_moe_lora import wrap_experts
from malaysian_sft.account import (
    GIB,
    architecture,
    compare_gemm,
    count_parameters,
    measure_gemm,
    mfu,
    peak_flops,
    recompute_flops,
    train_flops,
)
from malaysian_sft.adapter_state import save_adapter
from malaysian_sft.attention import _import_varlen
from malaysian_sft.load_base import compute_buffers
from malaysian_sft.lora import LoraArguments, apply_lora, expert_rank, lora_targets
from malaysian_sft.memory import compare_peak, experts_saved_bytes, layer_saved_bytes, layer_working_bytes
from malaysian_sft.moe_model import build_model
from malaysian_sft.plan_page import (
    PlanArguments,
    dry_run,
    expected_time,
    plan_evaluation,
    read_results,
    schedule,
)
from malaysian_sft.planning import (
    CHOICES,
    best_policy,
    check_fits,
    options,
    plan_run,
    settle,
    this_machine,
    trainer_flags,
)

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "tests/configs").glob("*.json"))}
LAUNCHERS = sorted(ROOT.glob("ds3-*.sh")) + sorted(ROOT.glob("fsdp2-*.sh"))
# Published on the model cards, in billions: total, total without embeddings, active for a token (GLM's without
# embeddings).
PUBLISHED = {
    "Qwen3-32B": (32.8, 31.2, 32.8),
    "Qwen2.5-72B-Instruct": (72.7, None, 72.7),
    "Llama-3.1-70B-Instruct": (70.6, None, 70.6),
    "GLM-4.5-Air": (106, None, None),
    "Qwen3-30B-A3B-Instruct-2507": (30.5, 29.9, 3.3),
    "Qwen3-235B-A22B-Instruct-2507": (235, 234, 22),
}


def real_config(name):
    return AutoConfig.from_pretrained(CONFIGS[name])


def adapted_model(family, r=8, use_dora=False):
    """A tiny fp32 model with the trainers' adapters, LoRA B away from zero, ready for a backward pass through every
    layer."""
    model = tiny_model(family)
    config = model.config
    lora_args = LoraArguments(r=r, use_dora=use_dora)
    if family in MOE_FAMILIES:
        wrap_experts(model, lora_args.expert_rank(config), lora_args.expert_alpha(config), use_dora=use_dora)
    model = apply_lora(model, lora_args)
    model.set_attn_implementation("eager")
    model.enable_input_require_grads()
    model.train()
    return model, lora_args


def count_flops(model, tokens):
    """FLOPs of one forward and backward over one document, by torch's counter."""
    inputs = torch.randint(5, 300, (1, tokens))
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        model(input_ids=inputs, labels=inputs, use_cache=False).loss.backward()
    return counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_parameters_are_the_published_ones(name):
    counts = count_parameters(real_config(name))
    total, without_embeddings, active = PUBLISHED[name]
    embeddings = counts["base"]["embedding"] + counts["base"]["head"]
    digits = 0 if isinstance(total, int) else 1
    if name == "GLM-4.5-Air":  # the card rounds down; the layer transformers leaves out is another 3.6B
        assert int(counts["total"] / 1e9) == total
        assert round((counts["active"] - embeddings) / 1e9) == 12
        return
    assert round(counts["total"] / 1e9, digits) == total
    assert without_embeddings is None or round((counts["total"] - embeddings) / 1e9, digits) == without_embeddings
    assert counts["active"] / 1e9 == pytest.approx(active, abs=0.06 if digits else 0.5)


@pytest.mark.parametrize("name", ["Qwen3-32B", "GLM-4.5-Air", "Qwen3-30B-A3B-Instruct-2507"])
def test_real_parameters_by_hand(name):
    """The sums written out from the config, independent of any model class."""
    c = real_config(name)
    H, L, q, kv = (
        c.hidden_size,
        c.num_hidden_layers,
        c.num_attention_heads * c.head_dim,
        c.num_key_value_heads * c.head_dim,
    )
    norms = (2 * L + 1) * H + (0 if name == "GLM-4.5-Air" else 2 * c.head_dim * L)
    biases = (q + 2 * kv) * L if name == "GLM-4.5-Air" else 0
    expected = {"embedding": c.vocab_size * H, "head": c.vocab_size * H, "attention": L * (2 * q + 2 * kv) * H}
    expected["norms and biases"] = norms + biases
    dense = {"Qwen3-32B": L, "GLM-4.5-Air": 1}.get(name, 0)
    if dense:
        expected["mlp"] = dense * 3 * H * c.intermediate_size
    if name != "Qwen3-32B":
        expected["expert"] = (L - dense) * 128 * 3 * H * c.moe_intermediate_size
        expected["router"] = (L - dense) * 128 * H
    if name == "GLM-4.5-Air":
        expected["shared_expert"] = (L - dense) * 3 * H * c.moe_intermediate_size
    assert count_parameters(c)["base"] == expected


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_parameters_are_those_of_the_trained_model(family, use_dora):
    model, lora_args = adapted_model(family, use_dora=use_dora)
    counts = count_parameters(model.config, lora_args.r, use_dora=use_dora)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["trainable"] == trainable == sum(counts["adapter"].values())
    assert (
        counts["total"]
        == sum(p.numel() for p in model.parameters() if not p.requires_grad)
        == sum(counts["base"].values())
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_matrices_are_the_adapters_targets(family):
    model = tiny_model(family)
    matrices = architecture(model.config).matrices
    ours = {m.name.removesuffix(".weight") for m in matrices if m.adapted and m.kind != "expert"}
    assert ours == set(lora_targets(model))


def test_tied_head_is_counted_once_and_computed():
    tied, untied = tiny_config("llama", tie_word_embeddings=True), tiny_config("llama")
    size = tied.vocab_size * tied.hidden_size
    assert count_parameters(untied)["total"] - count_parameters(tied)["total"] == size
    assert train_flops(untied, 10, 100, 4) == train_flops(tied, 10, 100, 4)


def test_expert_rank_is_the_rank_over_active_experts():
    config = real_config("Qwen3-30B-A3B-Instruct-2507")
    assert expert_rank(config, 256) == 32 == LoraArguments().expert_rank(config)
    assert expert_rank(config, 256, expert_r=5) == 5
    # 48 layers, 128 experts, three projections of 2048 x 768 with rank 32
    assert count_parameters(config, 256)["adapter"]["expert"] == 48 * 128 * 3 * 32 * (2048 + 768)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "glm4_moe"])
def test_adapter_bytes_are_the_saved_files(family, use_dora, tmp_path):
    model, lora_args = adapted_model(family, use_dora=use_dora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data)  # an untrained adapter is refused
    save_adapter(model, str(tmp_path / "checkpoint-1"), "tiny", lora_args=lora_args)
    file = (tmp_path / "checkpoint-1/adapter_model.safetensors").read_bytes()
    tensors = len(file) - 8 - int.from_bytes(file[:8], "little")  # after the length of the header and the header
    kind = "moe" if family in MOE_FAMILIES else "dense"
    planned = plan_run(model.config, kind=kind, gpus=1, r=lora_args.r, use_dora=use_dora)
    assert planned["disk_bytes"]["adapter of every checkpoint, fp32"] == tensors


# ---------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_are_those_torch_counts(family):
    """Without recompute ours is the count, less what eager attention wastes; recompute adds recompute_flops and leaves
    ours alone."""
    tokens, r = 24, 8
    model, _ = adapted_model(family, r)
    config = model.config
    heads = {module.head_dim for module in model.modules() if hasattr(module, "q_proj") and hasattr(module, "head_dim")}
    heads = heads or {config.qk_nope_head_dim + config.qk_rope_head_dim}  # DeepSeek's, as wide as its values here
    width, layers = config.num_attention_heads * heads.pop(), config.num_hidden_layers
    masked_half = tokens * tokens - tokens * (tokens + 1) // 2  # pairs that eager attention computes and then masks
    # positions times frequencies, as a matrix product
    embedding = model.get_base_model().model.rotary_emb
    rotary = tokens * 2 * embedding.inv_freq.numel()
    ours = train_flops(config, tokens, tokens * tokens, r)
    counted = count_flops(model, tokens)
    assert counted == ours + 12 * layers * width * masked_half + rotary

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    recomputed = count_flops(model, tokens) - counted
    expected = recompute_flops(config, "full", "fast", r, expert_rank(config, r), document_length=tokens) * tokens
    assert recomputed == expected + 4 * layers * width * masked_half


def test_flops_of_dora_are_those_of_lora():
    config = tiny_config("qwen3_moe")
    assert train_flops(config, 10, 60, 8, use_dora=True) == train_flops(config, 10, 60, 8)


def test_attention_counts_documents_not_packs():
    config = tiny_config("llama")
    width = config.num_attention_heads * config.head_dim
    alone = sum(train_flops(config, n, n * n, 8) for n in (5, 7, 12))
    assert train_flops(config, 24, 5**2 + 7**2 + 12**2, 8) == alone
    one_document = train_flops(config, 24, 24**2, 8)
    assert one_document - alone == 12 * config.num_hidden_layers * width * (24**2 - 5**2 - 7**2 - 12**2) / 2


def test_sliding_window_caps_the_pairs():
    layers = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    windowed, full = tiny_config("qwen2", **layers), tiny_config("qwen2")
    width = full.num_attention_heads * full.head_dim
    saved = train_flops(full, 64, 64**2, 8) - train_flops(windowed, 64, 64**2, 8)
    assert saved == 12 * width * (64 * 65 / 2 - 64 * 4)  # one of the two layers is windowed


@pytest.mark.parametrize(
    "name, teraflops",
    [("Qwen3-30B-A3B-Instruct-2507", 1.237), ("Qwen3-235B-A22B-Instruct-2507", 4.948), ("GLM-4.5-Air", 4.535)],
)
def test_experts_block_flops(name, teraflops):
    """The base forward of one experts block at 16,384 tokens, as counted when the kernels were designed."""
    layer = [m for m in architecture(real_config(name)).layers()[-1] if m.kind == "expert"]
    forward = sum(2 * m.active * m.out_features * m.in_features for m in layer) * 16384
    assert forward / 1e12 == pytest.approx(teraflops, abs=1e-3)


def test_mfu():
    assert mfu(989.4e12 * 8 * 2 * 0.25, seconds=2, gpus=8, device_name="NVIDIA H100 80GB HBM3") == pytest.approx(0.25)
    assert mfu(1e15, 1, 1, "cpu") is None


@pytest.mark.parametrize(
    "device, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("cpu", None),
    ],
)
def test_peak_flops(device, teraflops):
    assert peak_flops(device) == (teraflops and pytest.approx(teraflops * 1e12))


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "name, mebibytes",
    [("Qwen3-30B-A3B-Instruct-2507", 402), ("Qwen3-235B-A22B-Instruct-2507", 786), ("GLM-4.5-Air", 722)],
)
def test_experts_saved_bytes_are_the_floors(name, mebibytes):
    """The floors were worked out for one A shared by gate and up, separate As add one product; frugal keeps where rows
    go, no more."""
    config = real_config(name)
    arguments = 16384, config.num_experts_per_tok, config.hidden_size, config.moe_intermediate_size, 32
    fast, frugal = (experts_saved_bytes(*arguments, mode) for mode in ("fast", "frugal"))
    rows = 16384 * 8
    assert (fast - rows * 32 * 2) / 2**20 == pytest.approx(mebibytes, abs=0.5)
    assert fast - frugal == rows * 2 * (2 * config.moe_intermediate_size + 3 * 32)
    assert frugal == rows * 16
    assert experts_saved_bytes(*arguments, "fast", use_dora=True) - fast == rows * config.hidden_size * 2


def saved_bytes(forward, known):
    """Bytes that autograd saves while `forward()` runs, each storage once, without the tensors `known`."""
    known = {t.untyped_storage()._cdata for t in known}  # unlike data_ptr(), there on the meta device too
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # noqa: F841 (holds the graph)
    return sum(storage.nbytes() for storage in saved.values())


def test_kept_activations_are_those_autograd_saves(monkeypatch):
    """The attention half of a layer of train_moe.py, and a shared expert, in bf16, against the plan's terms.

    On the meta device, by PyTorch's own attention kernel, which there has shapes and what is saved, and no numbers."""
    import multipack
    import train_moe
    from malaysian_sft.attention_half import attention_half

    tokens, r = 4096, 8
    config = tiny_config("glm4_moe", use_qk_norm=False, max_position_embeddings=8192)
    assert config.rope_parameters["partial_rotary_factor"] < 1
    run, _, lora_args = train_moe.parse(f"--model_name_or_path tiny --activations none --r {r}".split())
    _, model = build_model(config, run, lora_args)
    model.to_empty(device="cpu")
    compute_buffers(model.causal_lm)
    documents = [torch.zeros(n, dtype=torch.int64) for n in (tokens - 96, 96)]
    batch = multipack.collate([[{"input_ids": document, "labels": document} for document in documents]])
    x = torch.zeros(tokens, config.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    rotary = model.causal_lm.base_model.rotary_emb(torch.zeros(1, 1), position_ids=batch["position_ids"])
    rotary = tuple(table.to("meta", torch.bfloat16) for table in rotary)
    layer = model.causal_lm.base_model.layers[1].to("meta")
    varlen = _import_varlen("torch.nn.attention.varlen")
    monkeypatch.setattr("malaysian_sft.attention._backend", lambda device: ("varlen_attn", varlen))

    def planned(*kinds):
        matrices = [m for m in architecture(config).layers()[1] if m.kind in kinds]
        return layer_saved_bytes(config, "moe", matrices, tokens, "none", "fast", r, None)

    borders = batch["cu_seq_lens_q"].to("meta")
    inputs = (x, rotary, borders, batch["max_length_q"])
    kept = saved_bytes(lambda: attention_half(layer, *inputs), [*layer.parameters(), *rotary])
    assert kept == pytest.approx(planned("attention"), rel=0.03)
    shared = saved_bytes(lambda: layer.mlp.shared_experts(x), layer.parameters())
    nothing = planned()  # of the half that every layer has: its input, its output, the attention's log-sum-exp
    assert shared == planned("shared_expert") - nothing + 2 * tokens * config.hidden_size


def test_sharded_terms_by_hand():
    """Qwen3-30B-A3B on 8 GPUs: what has one right answer."""
    config = real_config("Qwen3-30B-A3B-Instruct-2507")
    base, trainable, outside = 30_532_122_624, 1_874_853_888, 2 * 151936 * 2048
    terms = plan_run(config, kind="moe", gpus=8)["gpu_bytes"]
    assert terms["frozen base, bf16"] == (base - outside) * 2 // 8
    assert terms["embedding and head"] == 2 * outside
    assert terms["adapter, fp32"] == trainable // 2
    assert terms["Adam moments, fp32"] == trainable  # 8 bytes each over 8 GPUs
    # full recompute keeps each layer's input; the most is there in the backward of the last but one, while the last
    # one's are reduced
    assert terms["kept activations"] == 47 * 16384 * 2048 * 2
    assert "head and loss" not in terms
    # two layers whole in bf16: 128 experts, attention, router; three layers' adapters
    layer = 128 * 3 * 2048 * 768 + 2 * 2048 * (4096 + 512) + 128 * 2048
    layer_adapter = 128 * 3 * 32 * (2048 + 768) + 256 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert terms["two gathered layers"] == 2 * 2 * layer
    assert terms["gathered adapters"] == 3 * 2 * layer_adapter
    assert terms["gradient reduction"] == (2 + 4 + 4) * layer_adapter
    # four micro-batches a step
    assert terms["whole adapter gradient while accumulating"] == 4 * trainable and "adapter gradient, fp32" not in terms
    reduced = plan_run(config, kind="moe", gpus=8, reduce_every_micro_batch=True)["gpu_bytes"]
    at_once = plan_run(config, kind="moe", gpus=8, global_batch_size=8)["gpu_bytes"]
    for other in (reduced, at_once):
        assert other["adapter gradient, fp32"] == trainable // 2
        assert "whole adapter gradient while accumulating" not in other
    whole = plan_run(config, kind="moe", gpus=8, gather_base=False)["gpu_bytes"]
    assert whole["frozen base, bf16"] == (base - outside) * 2 and "two gathered layers" not in whole
    alone = plan_run(config, kind="moe", gpus=1)["gpu_bytes"]
    assert "gathered adapters" not in alone and alone["frozen base, bf16"] == (base - outside) * 2


def test_as_few_layers_are_frugal_as_must_be():
    config = real_config("Qwen3-30B-A3B-Instruct-2507")
    way = dict(kind="moe", gpus=1, global_batch_size=4, activations="none")
    found = options(config, gpu_memory_gib=139.8, **way)[0]
    assert found["memory_mode"] == "fast" and 0 < found["frugal_layers"] < 24
    limit = 0.96 * found["limit_bytes"]
    fewer = plan_run(config, gpu_memory_gib=139.8, memory_mode="fast", frugal_layers=found["frugal_layers"] - 1, **way)
    assert found["peak_bytes"] <= limit < fewer["peak_bytes"]
    assert f"--frugal_layers {found['frugal_layers']}" in trainer_flags(found)
    fast, frugal = (plan_run(config, memory_mode=mode, **way)["recompute_per_token"] for mode in ("fast", "frugal"))
    assert fast == 0 and found["recompute_per_token"] == pytest.approx(frugal * found["frugal_layers"] / 48)


def test_shards_over_nodes():
    config, shard = real_config("Qwen3-30B-A3B-Instruct-2507"), "frozen base, bf16"
    one, copies, shared = (
        plan_run(config, kind="moe", gpus=8, **nodes)["gpu_bytes"][shard]
        for nodes in ({}, dict(nodes=2), dict(nodes=2, shard_nodes=2))
    )
    assert copies == one and shared == one // 2
    dense = real_config("Qwen3-32B")
    assert (
        plan_run(dense, kind="dense", gpus=8, nodes=2)["gpu_bytes"]["frozen base, bf16 shard"]
        == 32_762_123_264 * 2 // 16
    )


@pytest.mark.parametrize("kind, name", [("dense", "Qwen3-32B"), ("moe", "GLM-4.5-Air")])
def test_more_recompute_needs_less_memory_and_more_flops(kind, name):
    plans = [plan_run(real_config(name), kind=kind, gpus=8, activations=policy) for policy in CHOICES[kind]]
    peaks, extra = [p["peak_bytes"] for p in plans], [p["recompute_per_token"] for p in plans]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    assert extra == sorted(extra) and extra[0] == 0 and len(set(extra)) == len(extra)
    assert len({p["flops_per_token"] for p in plans}) == 1


def test_best_policy_recomputes_no_more_than_it_must():
    config = real_config("Qwen3-30B-A3B-Instruct-2507")
    roomy = best_policy(config, kind="moe", gpus=8, gpu_memory_gib=140)
    tight = best_policy(config, kind="moe", gpus=8, gpu_memory_gib=40)
    assert (roomy["activations"], roomy["memory_mode"], roomy["reduce_every_micro_batch"]) == (
        "none",
        "fast",
        False,
    )
    assert tight["recompute_per_token"] > 0 and tight["peak_bytes"] < 0.96 * tight["limit_bytes"]
    everything = options(config, kind="moe", gpus=8, gpu_memory_gib=40)
    assert len([p for p in everything if not p["frugal_layers"]]) == 5 * 2 * 2 and everything[0] == tight
    comfortable = [p for p in everything if p["peak_bytes"] < 0.96 * p["limit_bytes"]]
    assert tight["gather_base"], "40 GiB do not hold the whole base"
    assert all(p["recompute_per_token"] >= tight["recompute_per_token"] for p in comfortable)
    assert not roomy["gather_base"], "what need not be gathered is not"
    assert any(p["activations"] == "none" and not p["fits"] for p in everything)
    for given in (
        {"activations": "full"},
        {"memory_mode": "frugal"},
        {"activations": "selective", "memory_mode": "fast"},
    ):
        for chosen in options(config, kind="moe", gpus=8, **given):
            assert given.items() <= chosen.items()


def test_what_barely_fits_is_the_second_choice():
    config = real_config("Qwen3-30B-A3B-Instruct-2507")
    way = dict(kind="moe", gpus=8, reduce_every_micro_batch=False)
    fast = plan_run(config, activations="none", **way)
    need = fast["peak_bytes"] / GIB + 4.0
    barely, easily = (options(config, gpu_memory_gib=memory, **way)[0] for memory in (need + 0.01, 1.15 * need))
    assert easily["memory_mode"] == "fast" and barely["recompute_per_token"] > 0
    assert options(config, gpu_memory_gib=need + 0.01, activations="none", memory_mode="fast", **way)[0]["fits"]


def test_without_zero3_every_gpu_holds_all():
    config = real_config("Qwen3-32B")
    alone = plan_run(config, kind="dense", gpus=1, global_batch_size=4)["gpu_bytes"]
    assert plan_run(config, kind="dense", gpus=8, zero3=False)["gpu_bytes"] == alone


@pytest.mark.parametrize(
    "environment, whole, machine",
    [
        ({}, False, (1, 1)),
        ({}, True, (4, 1)),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, True, (8, 2)),
        ({"WORLD_SIZE": "2"}, False, (2, 1)),
    ],
)
def test_this_machine_is_what_torchrun_started(environment, whole, machine, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=79 * 2**30))
    expected = {"gpus": machine[0], "nodes": machine[1], "gpu_memory_gib": 79.0}
    assert this_machine(whole) == expected


def test_settle_refuses_or_warns(monkeypatch, capsys):
    config = real_config("Qwen2.5-72B-Instruct")
    arguments = dict(kind="dense", gpus=2, nodes=1, gpu_memory_gib=79.0, micro_batch=1, activations=None)
    with pytest.raises(
        ValueError, match="GiB a GPU are needed.*Largest: frozen base, bf16 shard 67.7 GiB.*--ignore_plan True"
    ):
        settle(config, **arguments)
    nearest = settle(config, ignore=True, **arguments)
    assert nearest["activations"] == "full" and not nearest["fits"]
    assert capsys.readouterr().err.startswith("warning: ")
    monkeypatch.setenv("RANK", "1")
    assert settle(config, ignore=True, **arguments) == nearest and capsys.readouterr().err == ""


def test_dry_run_refuses_on_a_gpu_after_printing(monkeypatch, capsys):
    machine = {"gpus": 2, "nodes": 1, "gpu_memory_gib": 79.0}
    monkeypatch.setattr("malaysian_sft.plan_page.this_machine", lambda whole: dict(machine))
    arguments = dict(kind="dense", micro_batch=1, activations="full")
    with pytest.raises(ValueError, match="Take more GPUs"):
        dry_run(str(CONFIGS["Qwen2.5-72B-Instruct"]), None, 3, **arguments)
    assert "1 x 2 GPUs of 79 GiB" in capsys.readouterr().out
    machine["gpu_memory_gib"] = None
    dry_run(str(CONFIGS["Qwen2.5-72B-Instruct"]), None, 3, **arguments)
    assert "No GPU here: planned for 2 of 80 GiB" in capsys.readouterr().out
    monkeypatch.setenv("NUM_GPUS", "4")  # a launcher's
    dry_run(str(CONFIGS["Qwen2.5-72B-Instruct"]), None, 3, **arguments)
    assert "planned for 4 of 80 GiB" in capsys.readouterr().out


def test_matrix_products_are_measured_and_compared():
    assert measure_gemm(size=64, repeats=2, device="cpu") > 1e6
    line = compare_gemm("NVIDIA H100 80GB HBM3", 791.52e12)
    assert "792 TFLOP/s" in line and "peak of 989 TFLOP/s" in line and "80.0%" in line
    assert "its peak is not known" in compare_gemm("some GPU", 1e12)


def test_a_model_too_large_for_a_node_is_shared_by_two():
    config = real_config("Qwen3-235B-A22B-Instruct-2507")
    with pytest.raises(ValueError, match="Largest: frozen base, bf16 54"):
        best_policy(config, kind="moe", gpus=8, gpu_memory_gib=80)
    best = best_policy(config, kind="moe", gpus=8, nodes=2, gpu_memory_gib=80)
    assert best["shard_nodes"] == 2 and "--shard_nodes 2" in trainer_flags(best)


def test_small_packs_are_batched():
    best = best_policy(real_config("Qwen3-32B"), kind="dense", gpus=8, max_seq_length=4096)
    assert best["micro_batch"] == 4  # four packs of 4,096 fill the GPU as one of 16,384 does


def test_what_cannot_fit_is_refused_with_its_largest_terms():
    config = real_config("Qwen2.5-72B-Instruct")
    with pytest.raises(ValueError, match=r"Largest: frozen base, bf16 shard 67.7 GiB.*Take more GPUs"):
        best_policy(config, kind="dense", gpus=2, gpu_memory_gib=80)
    with pytest.raises(ValueError, match="Largest: kept activations.*max_seq_length"):
        check_fits(plan_run(config, kind="dense", gpus=8, activations="none"))
    check_fits(plan_run(config, kind="dense", gpus=8))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(kind="moe"), "no routed experts"),
        (dict(kind="sparse"), "kind is 'sparse'"),
        (dict(activations="selective"), "activations is 'selective'; expected one of none, full"),
        (dict(memory_mode="frugal"), "memory_mode is 'frugal'"),
        (dict(gpus=7), "no multiple of 7 GPUs"),
        (dict(nodes=2, shard_nodes=3), "no multiple of --shard_nodes 3"),
    ],
)
def test_impossible_plans_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan_run(tiny_config("llama"), **{"kind": "dense", "gpus": 8, **wrong})


def test_evaluation_by_hand():
    """Qwen3-235B over 8 GPUs: 4 key-value heads are replicated, one on each GPU; 94 layers of keys and values of 128 in
    bf16."""
    vllm = plan_evaluation(real_config("Qwen3-235B-A22B-Instruct-2507"), gpu_partition=8)
    assert vllm["kv_bytes_per_token"] == 94 * 2 * 128 * 2
    assert vllm["weights_bytes"] == 235_093_634_560 * 2 // 8
    assert vllm["cache_bytes"] == pytest.approx(0.92 * 80 * 2**30 - 235_093_634_560 * 2 / 8 - 3 * 2**30, abs=2)
    assert vllm["fits"] and not plan_evaluation(real_config("Qwen3-235B-A22B-Instruct-2507"), gpu_partition=4)["fits"]
    with pytest.raises(ValueError, match="64 attention heads"):
        plan_evaluation(real_config("Qwen3-32B"), gpu_partition=3)


# GiB, of four layers and 16,384 tokens, by the GPU test below on an H100 with PyTorch 2.11's own attention: the peak,
# and what the third layer keeps (a twentieth covers that packs are not quite full).
STEPS = [r for r in json.loads((ROOT / "results" / "step.json").read_text()) if r.get("peak_gib")]


@pytest.mark.parametrize("record", STEPS, ids=lambda r: f"{r['model']}-{r['adapter']}-{r['gpus']}-{r['mode']}")
def test_planned_memory_is_what_was_measured(record):
    """Whole models, by benchmarks/bench_step.py: the plan of the same run is within 5 %."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_train_moe

    config = bench_train_moe.make_config(record["model"], record["layers"])
    planned = plan_run(
        config,
        kind="moe",
        gpus=record["gpus"],
        global_batch_size=record["gpus"] * record["packs"],
        max_seq_length=record["tokens"],
        r=record["r"],
        use_dora=record["adapter"] == "dora",
        activations=record["activations"],
        memory_mode=record["mode"],
        frugal_layers=record["frugal_layers"],
        gather_base=record["gather_base"],
    )
    assert planned["peak_bytes"] / GIB == pytest.approx(record["peak_gib"], rel=0.05)


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B-Instruct-2507", "Qwen3-235B-A22B-Instruct-2507", "GLM-4.5-Air"])
@pytest.mark.parametrize("dora, mode", [(False, "fast"), (False, "frugal"), (True, "fast")])
def test_what_the_experts_block_holds_for_a_moment_is_what_was_measured(name, dora, mode):
    """The peak of the block alone, as results/fused_moe_lora.json has it last: what it keeps, its output, what it holds
    for a moment and, if the peak is in the backward, the adapters' gradients (bf16 there), which are another term of
    the plan."""
    config, tokens = real_config(name), 16384
    experts = [m for m in architecture(config).layers()[-1] if m.kind == "expert"]
    down = next(m for m in experts if m.name.endswith("down_proj"))
    shape = (tokens, down.active, down.out_features, down.in_features)
    wanted = dict(
        adapter="dora" if dora else "lora", mode=mode, routing="random", tokens=tokens, implementation="fused_moe_lora"
    )
    records = json.loads((ROOT / "results/fused_moe_lora.json").read_text())
    measured = [
        r for r in records if r["model"] in name.lower() and all(r[key] == value for key, value in wanted.items())
    ][-1]
    output = residual = 2 * tokens * config.hidden_size
    for_the_moment = layer_working_bytes(config, experts, tokens, mode, dora) - 4 * residual
    planned = experts_saved_bytes(*shape, measured["rank"], mode, dora) + output + for_the_moment
    gradients = sum(2 * m.copies * measured["rank"] * (m.out_features + m.in_features) for m in experts)
    assert 0.97 * planned < measured["peak_mib"] * 2**20 < 1.05 * (planned + gradients)


def test_schedule_covers_every_token():
    run = schedule(144e6, 16384, 32, epochs=3)
    assert run["packs"] * 16384 * 0.995 >= 144e6 > (run["packs"] - 1) * 16384 * 0.995
    assert run["steps_per_epoch"] * 32 >= run["packs"] and run["steps"] == 3 * run["steps_per_epoch"]


def test_time_comes_from_measured_records_only(tmp_path):
    config, model = real_config("Qwen3-30B-A3B-Instruct-2507"), "Qwen/Qwen3-30B-A3B-Instruct-2507"
    planned = plan_run(config, kind="moe", gpus=8)
    device = "NVIDIA H100 80GB HBM3"

    def hours(*records, device=device):
        (tmp_path / "bench.json").write_text(json.dumps(records))
        return expected_time(planned, config, model, 1e9, device, read_results(tmp_path))

    block = dict(
        device=device,
        model="qwen3-30b-a3b",
        adapter="lora",
        mode="fast",
        tokens=16384,
        implementation="fused_moe_lora",
        total_ms=6.0,
    )
    step = dict(device=device, model="qwen3-30b-a3b", adapter="lora", tokens_per_second_per_gpu=1.0, mfu=0.25)
    assert hours() is None
    assert (
        hours(
            {**step, "adapter": "dora"}, {**step, "model": "glm-4.5-air"}, {**step, "device": "NVIDIA A100-SXM4-80GB"}
        )
        is None
    )
    lower_bound = hours(block, {**block, "implementation": "torch", "total_ms": 1.0})
    assert lower_bound["low"] == pytest.approx(48 * 6.0 / 16384 * 1e9 / 8 / 3.6e6) and lower_bound["high"] is None
    measured = hours(block, step, {**step, "mfu": 0.5})
    assert measured["high"] == pytest.approx(planned["flops_per_token"] * 1e9 / (0.25 * 989.4e12 * 8) / 3600)
    assert measured["low"] == pytest.approx(measured["high"] / 2)
    assert measured["source"] == "results/bench.json"
    assert hours(step, device="a device without a known peak") is None
    assert hours({**step, "activations": "none"}) is None
    slices = hours({**step, "activations": "full", "layers": 4, "gpus": 1})
    assert slices["source"] == "results/bench.json, 4 of 48 layers on 1 GPUs"


# -------------------------------------------------------------------------------------------------------------- command


TRAINERS = {"ds3": train_dense, "fsdp2": train_moe}


@pytest.fixture
def page(monkeypatch, capsys):
    """page(launcher, *flags, config=, **PlanArguments): what plan.py's launch would print, without its processes."""

    def call(launcher, *flags, config, **wanted):
        text = Path(launcher).read_text()
        array = re.search(r"ARGS=\((.*?)\n\)", text, re.DOTALL)[1].replace('"$(basename "$0" .sh)"', "run")
        asked = PlanArguments(config=str(CONFIGS[config]), **wanted)
        monkeypatch.setenv("PLAN_ARGUMENTS", json.dumps(dataclasses.asdict(asked)))
        monkeypatch.setenv("NUM_GPUS", "8")
        argv = ["trainer", *shlex.split(array), "--dry_run", "True", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", argv)
        TRAINERS[Path(launcher).name.split("-")[0]].main()
        return capsys.readouterr().out

    return call


def rows(printed):
    """The table of ways to run: lists of words, best first."""
    return [line.split() for line in printed.split("best first\n")[1].split("\n\n")[0].splitlines()[1:]]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.stem)
def test_every_launcher_can_be_planned(launcher, page):
    name = re.search(r"--model_name_or_path \S*?/?([^/\s]+)\n", launcher.read_text())[1]
    if name not in CONFIGS:
        pytest.skip(f"no tests/configs/{name}.json: add the model's config.json to have its launcher planned here")
    printed = page(launcher, config=name, gpu_memory=140)
    adapter_kind = "DoRA" if "dora" in launcher.stem else "LoRA"
    assert f"{adapter_kind} r 256" in printed and "A step: 8 GPUs x 1 x 4 micro-batches = 32 packs" in printed
    assert "best" in " ".join(rows(printed)[0]) and printed.count("as launched") == 1
    assert f"{count_parameters(real_config(name))['total']:,}" in printed


def test_a_page_refuses_what_cannot_fit_and_takes_the_trainers_flags(page):
    launcher, config = ROOT / "ds3-qwen2.5-72b-lora-256.sh", "Qwen2.5-72B-Instruct"
    with pytest.raises(
        SystemExit, match="Largest: kept activations 19.8 GiB, frozen base, bf16 shard 16.9 GiB.*Lower --max_seq_length"
    ):
        page(launcher, config=config, gpu_memory=24)
    flags = "--lora_r 64 --max_seq_length 4096 --per_device_train_batch_size 2".split()
    printed = page(launcher, *flags, config=config)
    assert "LoRA r 64" in printed and "8 GPUs x 2 x 2 micro-batches = 32 packs of 4,096 tokens" in printed


def test_a_page_marks_what_is_better_than_the_launch(page):
    launcher, config = ROOT / "fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh", "Qwen3-30B-A3B-Instruct-2507"
    table = rows(page(launcher, "--activations", "full", config=config, gpu_memory=140))
    assert table[0][1] == "none" and "best" in table[0]
    (launched,) = [row for row in table if "launched" in row]
    assert launched[1] == "full" and "best" not in launched


@pytest.mark.parametrize("memory, activations", [(140, "none"), (26, "full")])
def test_a_page_chooses_what_the_launcher_leaves_open(memory, activations, page):
    launcher, config = ROOT / "fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh", "Qwen3-30B-A3B-Instruct-2507"
    for flags in ([], ["--activations", "auto"]):
        table = rows(page(launcher, *flags, config=config, gpu_memory=memory))
        assert table[0][1] == activations and table[0][-3:] == ["best,", "as", "launched"]


def test_a_page_says_which_flags_would_fit(page, capsys):
    launcher, config = ROOT / "ds3-qwen3-32b-lora-256.sh", "Qwen3-32B"
    with pytest.raises(SystemExit, match="Largest: kept activations 160.0 GiB"):
        flags = "--per_device_train_batch_size 4 --max_seq_length 65536 --activations full".split()
        page(launcher, *flags, config=config)
    assert not any("best" in " ".join(row) for row in rows(capsys.readouterr().out))
    with pytest.raises(SystemExit, match="--activations none"):
        page(launcher, "--activations", "none", config=config)
    printed = capsys.readouterr().out
    assert "This launch doesn't fit; with --activations full --per_device_train_batch_size 1 it does." in printed


def test_peak_is_compared_with_the_plan():
    planned = {"peak_bytes": 20 * 2**30}
    assert compare_peak(planned, 21 * 2**30) == "peak memory: measured 21.00 GiB, planned 20.00 GiB (+5.0%)"


def run_plan(*words):
    """plan.py as a command."""
    command = [sys.executable, str(ROOT / "plan.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_the_command_is_the_launcher_with_dry_run(tmp_path):
    words = ["--config", CONFIGS["Qwen3-32B"], "--gpu_memory", 80, "--nodes", 2, "--global_batch_size", 64]
    done = run_plan(ROOT / "ds3-qwen3-32b-lora-256.sh", *words)
    assert done.returncode == 0, done.stderr
    assert "2 x 8 GPUs of 80 GiB" in done.stdout and "= 64 packs of 16,384 tokens" in done.stdout
    launcher = tmp_path / "mine.sh"
    launcher.write_text(f'python3 {ROOT}/train_dense.py --model_name_or_path nobody/no-such-model "$@"\n')
    done = run_plan(launcher)
    assert done.returncode and re.search(r"error: nobody/no-such-model.*--config FILE", done.stderr), done.stderr


@pytest.mark.parametrize(
    "text, message",
    [
        ("touch {folder}/ran\n", "starts neither train_dense.py nor train_moe.py"),
        ("touch {folder}/ran\npython3 train_moe.py --r 8\n", "does not hand its flags to the trainer"),
        (None, "no such launcher"),
    ],
)
def test_what_is_no_launcher_is_not_run(text, message, tmp_path):
    launcher = tmp_path / "mine.sh"
    if text is not None:
        launcher.write_text(text.format(folder=tmp_path))
    with pytest.raises(ValueError, match=message):
        plan.check_launcher(launcher)
    assert not (tmp_path / "ran").exists()
