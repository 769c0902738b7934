"""Bytes against what autograd saves, saved files, sums by hand and measured peaks."""

import json
import sys
from pathlib import Path

import pytest
import torch

import train_moe
from conftest import MOE_FAMILIES, adapted_model, real_config, tiny_config
from malaysian_sft.account import (
    GIB,
    architecture,
)
from malaysian_sft.adapter_state import save_adapter
from malaysian_sft.attention import _import_varlen
from malaysian_sft.load_base import compute_buffers
from malaysian_sft.memory import compare_peak, experts_saved_bytes, layer_saved_bytes, layer_working_bytes
from malaysian_sft.moe_model import build_model
from malaysian_sft.planning import best_policy, plan_run, trainer_flags

ROOT = Path(__file__).parents[1]


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
    # two layers whole in bf16: 128 experts, attention, router; two layers' adapters, and the shards they come from
    layer = 128 * 3 * 2048 * 768 + 2 * 2048 * (4096 + 512) + 128 * 2048
    layer_adapter = 128 * 3 * 32 * (2048 + 768) + 256 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert terms["two gathered layers"] == 2 * 2 * layer
    assert terms["gathered adapters"] == 2 * 2 * (layer_adapter + layer_adapter // 8)
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


def test_experts_in_fp8_by_hand():
    config, common = real_config("Qwen3-30B-A3B-Instruct-2507"), dict(kind="moe", gpus=8)
    wide = plan_run(config, **common)["gpu_bytes"]
    terms = plan_run(config, **common, base_dtype="fp8")["gpu_bytes"]
    layer = 128 * 3 * 2048 * 768  # whole blocks, each with a scale of 4 bytes
    stored = layer + layer * 4 // 128**2
    assert terms["frozen experts, FP8"] == 48 * stored // 8
    assert terms["frozen base, bf16"] == wide["frozen base, bf16"] - 48 * layer * 2 // 8
    assert terms["two gathered layers"] == wide["two gathered layers"] - 2 * (2 * layer - stored)
    assert terms["a layer's experts widened, bf16"] == 2 * layer
    same = {"frozen base, bf16", "frozen experts, FP8", "two gathered layers", "a layer's experts widened, bf16"}
    assert {k: v for k, v in terms.items() if k not in same} == {k: v for k, v in wide.items() if k not in same}


def test_the_largest_mixture_fits_eight_gpus_of_80_gib_in_fp8_alone():
    config, common = real_config("Qwen3-235B-A22B-Instruct-2507"), dict(kind="moe", gpus=8, gpu_memory_gib=80.0)
    with pytest.raises(ValueError, match=r"frozen base, bf16 .* Store the experts in FP8 \(--base_dtype fp8"):
        best_policy(config, **common)
    plan = best_policy(config, **common, base_dtype="fp8")
    assert plan["peak_bytes"] < 76 * GIB and "--base_dtype fp8" in trainer_flags(plan)


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


def test_without_zero3_every_gpu_holds_all():
    config = real_config("Qwen3-32B")
    alone = plan_run(config, kind="dense", gpus=1, global_batch_size=4)["gpu_bytes"]
    assert plan_run(config, kind="dense", gpus=8, zero3=False)["gpu_bytes"] == alone


STEPS = [r for r in json.loads((ROOT / "results" / "step.json").read_text()) if r.get("peak_gib")]
STEPS = [r for r in STEPS if r.get("fused", True)]  # DoRA's layers were not, when they were measured
DENSE_STEPS = [
    r
    for r in json.loads((ROOT / "results" / "dense.json").read_text())
    if r.get("peak_gib") and r["implementation"] == "train_dense"
]


@pytest.mark.parametrize("record", DENSE_STEPS, ids=lambda r: f"{r['adapter']}-{r['gpus']}-{r['activations']}")
def test_planned_memory_of_dense_steps_is_what_was_measured(record):
    """By benchmarks/bench_dense.py, within 5 %; but for the first commits, which kept rotated queries and keys, by
    hand: 64 + 8 heads of 128, in bf16. One took another ds3.json, and is left to what it shows."""
    if record.get("zero_optimization", "auto") != "auto":
        assert record["peak_gib"] > 1.05 * record["planned_gib"]  # why it is not ours
        return
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_train_moe

    config = bench_train_moe.shortened(real_config("Qwen3-32B"), record["layers"])
    planned = plan_run(
        config,
        kind="dense",
        gpus=record["gpus"],
        global_batch_size=record["gpus"] * record["packs"],
        max_seq_length=record["tokens"],
        r=record["r"],
        use_dora=record["adapter"] == "dora",
        activations=record["activations"],
        frugal_layers=record["frugal_layers"],
    )["peak_bytes"]
    if record["commit"] in ("dbe5e06", "6523e2c") and record["activations"] != "full":
        planned += record["layers"] * record["tokens"] * 2 * (64 + 8) * 128
    assert planned / GIB == pytest.approx(record["peak_gib"], rel=0.05)


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
        base_dtype=record.get("base_dtype"),
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


def test_peak_is_compared_with_the_plan():
    planned = {"peak_bytes": 20 * 2**30}
    assert compare_peak(planned, 21 * 2**30) == "peak memory: measured 21.00 GiB, planned 20.00 GiB (+5.0%)"
