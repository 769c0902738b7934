"""Tiny models and a tiny tokenizer, made from configs alone, that every test file shares."""

import os
import re
import shlex
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content is defined and m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
VOCAB_SIZE = 320  # 256 bytes + the special tokens, rounded up so that tensor parallelism divides it

COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
    # far above the usual 0.02, so that a tiny random model has losses and gradients that differ from token to token
    initializer_range=0.1,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)

# family -> (transformers config class, arguments). Adding a MoE family starts with a line here.
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3_moe": ("Qwen3MoeConfig", {**MOE, "num_experts": 8, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            **MOE,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "num_mtp_layers": 0,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**MOE, "num_experts": 8, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "mixtral": ("MixtralConfig", {"num_experts_per_tok": 2, "num_local_experts": 4}),
    "phimoe": ("PhimoeConfig", {"num_experts_per_tok": 2, "num_local_experts": 4}),
    "minimax_m2": ("MiniMaxM2Config", {"num_experts_per_tok": 2, "num_local_experts": 4}),
    "olmoe": ("OlmoeConfig", {"num_experts_per_tok": 2, "num_experts": 4}),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", {"moe_k": 2, "moe_num_experts": 4, "moe_intermediate_size": 32}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **MOE,
            **dict(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1),
            **dict(
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=16,
                head_dim=8,
                num_key_value_heads=4,
            ),
        },
    ),
}

MOE_FAMILIES = [family for family, (_, extra) in FAMILIES.items() if {"num_experts_per_tok", "moe_k"} & extra.keys()]


def tiny_config(family, **overrides):
    """The transformers config of a tiny model of `family` (a key of FAMILIES)."""
    import transformers

    name, extra = FAMILIES[family]
    return getattr(transformers, name)(**{**COMMON, **extra, **overrides})


def tiny_model(family, seed=0, dtype=torch.float32, **overrides):
    """A randomly initialised tiny causal LM of `family`; the same seed gives the same weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=dtype)


def tiny_tokenizer(chat_template=CHATML):
    """A byte-level tokenizer with ChatML markers: every string round-trips, no file is needed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:]})
    fast.chat_template = chat_template
    return fast


def save_tiny_checkpoint(directory, family, seed=0, dtype=torch.float32, **overrides):
    """Write a tiny model and its tokenizer as a normal checkpoint directory; returns the directory as str."""
    model = tiny_model(family, seed, dtype, **overrides)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def process_group():
    """One process's group, as a trainer alone has it."""
    import torch.distributed as dist

    from malaysian_sft.run import setup_distributed

    setup_distributed()
    yield
    dist.destroy_process_group()


CONFIGS = {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.json"))}


LAUNCHERS = [path for kind in ("ds3", "fsdp2") for path in sorted(Path(__file__).parents[1].glob(f"{kind}-*.sh"))]


def launcher_flags(launcher):
    """The flags in a launcher's ARGS, without starting it."""
    array = re.search(r"ARGS=\((.*?)\n\)", Path(launcher).read_text(), re.DOTALL)[1]
    return shlex.split(array.replace('"$(basename "$0" .sh)"', Path(launcher).stem), comments=True)


def real_config(name):
    """The published config of one of the launchers' models, by its name on the hub."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(CONFIGS[name])


def adapted_model(family, r=8, use_dora=False):
    """(tiny fp32 model with the trainers' adapters, ready for a backward pass through every layer; LoraArguments)."""
    from fused_moe_lora import wrap_experts
    from malaysian_sft.lora import LoraArguments, apply_lora

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
