"""documents_apart.py: every kind of layer that carries a state along the sequence is found, and no attention is."""

import sys

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import multipack
import train_dense
import train_moe
from conftest import COMMON, FAMILIES, tiny_model, tiny_tokenizer
from malaysian_sft.account import architecture, check_trainer
from malaysian_sft.attention import register_attention
from malaysian_sft.documents_apart import check_documents_apart, with_document_numbers
from malaysian_sft.planning import plan_run

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8, mamba_n_groups=1)
GATED_DELTA = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, **EXPERTS
)
STATEFUL = {
    "Qwen3NextConfig": (
        GATED_DELTA | dict(layer_types=["linear_attention", "full_attention"]),
        "Qwen3NextGatedDeltaNet",
    ),
    "Lfm2Config": (dict(layer_types=["full_attention", "conv"]), "Lfm2ShortConv"),
    "MiniMaxConfig": (
        dict(num_local_experts=4, num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"]),
        "MiniMaxLightningAttention",
    ),
    "FalconH1Config": (MAMBA | dict(mamba_d_ssm=64, mamba_d_head=16), "FalconH1Mixer"),
    "BambaConfig": (MAMBA | dict(attn_layer_indices=[1]), "BambaMixer"),
    "GraniteMoeHybridConfig": (
        MAMBA | dict(num_local_experts=4, num_experts_per_tok=2, layer_types=["mamba", "attention"]),
        "GraniteMoeHybridMambaLayer",
    ),
}


def stateful_config(name):
    return getattr(transformers, name)(**{**COMMON, **STATEFUL[name][0]})


def forward_of(model):
    def forward(pack):
        batch = multipack.collate([pack])
        assert (batch.pop("labels") == multipack.IGNORE).all()
        return model.base_model(**batch, use_cache=False)

    return forward


@pytest.mark.parametrize("name", STATEFUL)
def test_layers_with_a_state_are_refused_by_name(name):
    torch.manual_seed(0)
    config = stateful_config(name)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register_attention()).eval()
    with pytest.raises(
        ValueError, match=rf"documents in a pack see each other in model\.layers.*\({STATEFUL[name][1]}"
    ):
        check_documents_apart(model, forward_of(model))
    assert architecture(config).stateful == (STATEFUL[name][1],), "the plan says so before anything is loaded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_keeps_documents_apart(family, dtype):
    model = tiny_model(family, dtype=dtype).eval()
    model.set_attn_implementation(register_attention())
    check_documents_apart(model, forward_of(model))
    assert architecture(model.config).stateful == ()


def test_attention_that_ignores_the_boundaries_is_found():
    model = tiny_model("llama").eval()
    model.set_attn_implementation("eager")

    def one_document(pack):
        return model.base_model(input_ids=multipack.collate([pack])["input_ids"], use_cache=False)

    with pytest.raises(ValueError, match=r"model.layers.0.self_attn \(LlamaAttention\)"):
        check_documents_apart(model, one_document)


def test_numbers_of_documents():
    pack = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (9, 7)]
    assert with_document_numbers(multipack.collate([pack]))["seq_idx"].tolist() == [[0] * 9 + [1] * 7]


def test_a_model_whose_layers_say_nothing_is_not_taken_for_checked():
    model = tiny_model("llama").eval()
    with pytest.raises(ValueError, match="LlamaForCausalLM: .* not checked for leaks"):
        check_documents_apart(model, lambda pack: None)


def checkpoint(directory, name):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(stateful_config(name)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    (directory / "train.jsonl").write_text('{"question": "Siapa?", "answer": "Ali."}\n' * 4)
    words = f"--model_name_or_path {directory} --dataset {directory}/train.jsonl --data_cache {directory}/cache"
    return f"{words} --output_dir {directory}/run --max_seq_length 64 --global_batch_size 1 --report_to none".split()


def test_the_dense_trainer_refuses(tmp_path, monkeypatch):
    flags = checkpoint(tmp_path, "Lfm2Config")
    monkeypatch.setattr(sys, "argv", ["train_dense.py", *flags, "--bf16", "False", "--r", "4"])
    with pytest.raises(
        SystemExit, match=r"error: documents in a pack see each other in .*layers.1.conv \(Lfm2ShortConv"
    ):
        train_dense.main()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_trainer_of_mixtures_refuses(tmp_path):
    flags = checkpoint(tmp_path, "Qwen3NextConfig")
    with pytest.raises(SystemExit, match=r"error: documents in a pack see each other in .*Qwen3NextGatedDeltaNet"):
        train_moe.main([*flags, "--dtype", "float32", "--r", "4"])
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_plan_and_trainer_ask_the_same_of_experts():
    config = transformers.GptOssConfig(**{**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2})
    for ask in (lambda: check_trainer(config, "moe"), lambda: plan_run(config, kind="moe", gpus=1)):
        with pytest.raises(ValueError, match="gpt_oss cannot be trained: .*its weights are transposed"):
            ask()


def test_a_convolution_is_no_expert():
    arch = architecture(stateful_config("Lfm2Config"))
    assert not any(m.kind == "expert" for m in arch.matrices)


def test_the_dense_trainer_refuses_a_quantised_base_at_once():
    config = tiny_model("llama").config
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(ValueError, match=r"the base is quantised \(fp8\); take the bf16 checkpoint that it was made"):
        check_trainer(config, "dense")
