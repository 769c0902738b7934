"""Parameters and FLOPs against transformers, PEFT, torch's FLOP counter and published totals."""

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from conftest import FAMILIES, adapted_model, real_config, tiny_config, tiny_model
from malaysian_sft.account import (
    architecture,
    compare_gemm,
    count_parameters,
    measure_gemm,
    mfu,
    peak_flops,
    recompute_flops,
    train_flops,
)
from malaysian_sft.lora import LoraArguments, expert_rank, lora_targets

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


def count_flops(model, tokens):
    """FLOPs of one forward and backward over one document, by torch's counter."""
    inputs = torch.randint(5, 300, (1, tokens))
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        model(input_ids=inputs, labels=inputs, use_cache=False).loss.backward()
    return counter.get_total_flops()


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


def test_matrix_products_are_measured_and_compared():
    assert measure_gemm(size=64, repeats=2, device="cpu") > 1e6
    line = compare_gemm("NVIDIA H100 80GB HBM3", 791.52e12)
    assert "792 TFLOP/s" in line and "peak of 989 TFLOP/s" in line and "80.0%" in line
    assert "its peak is not known" in compare_gemm("some GPU", 1e12)
