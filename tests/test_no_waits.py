"""A forward and backward in training never wait for the GPU: nothing of a tensor is asked for on the host.

Seen on a CPU, where the operators that would wait are the same. Stood in for: attention over documents and the experts,
which loop over counts on a CPU; their kernels are held to it by tests/test_fused_moe_lora.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, set_seed

import fused_moe_lora
import train_moe
from conftest import save_tiny_checkpoint
from malaysian_sft import attention
from malaysian_sft.attention import register_attention
from malaysian_sft.lora import LoraArguments
from malaysian_sft.moe_model import build_model
from multipack import collate
from train_dense import DenseTrainingArguments

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "bincount"}


class NothingWaits(TorchDispatchMode):
    """Raises AssertionError for an operator, or a method that is none, that has the host wait for a GPU."""

    METHODS = "tolist", "cpu", "numpy"

    def __enter__(self):
        self.kept = {name: getattr(torch.Tensor, name) for name in self.METHODS}
        for name in self.METHODS:
            setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the GPU"))
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self.kept.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name.startswith(("index", "_index")) and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool
            for given in args
            if isinstance(given, (list, tuple))
            for t in given
        )
        assert name not in WAITING and not by_mask, f"{name} waits for the GPU"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def kernels_without_counts(monkeypatch):
    def varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size=None
    ):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    def experts(hidden, index, weights, gate_up, down, *adapters_and_scaling, **_):
        *adapters, _ = adapters_and_scaling
        some = sum(t.sum() for adapter in adapters for t in adapter if t is not None)
        return (hidden * weights.sum(1, keepdim=True) * some).to(hidden.dtype)

    monkeypatch.setattr(attention, "_backend", lambda device: ("stand-in", varlen))
    monkeypatch.setattr(fused_moe_lora, "moe_lora_reference", experts)


def pack_of(*lengths):
    documents = []
    for n in lengths:
        ids = torch.randint(5, 300, (n,))
        documents.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(n) == 0, -100)})
    return documents


def test_the_mode_sees_a_wait():
    with NothingWaits():
        for wait in (lambda t: t[0].item(), lambda t: bool((t > 0).all()), lambda t: t[t > 0], lambda t: t.tolist()):
            with pytest.raises((AssertionError, pytest.fail.Exception), match="waits for the GPU"):
                wait(torch.ones(3))


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "qwen2_moe", "mixtral"])
@pytest.mark.parametrize("more", ["", "--use_dora True", "--activations selective", "--activations full"])
def test_a_mixture_of_experts(family, more, tmp_path, process_group):
    save_tiny_checkpoint(tmp_path, family)
    flags = f"--model_name_or_path {tmp_path} --report_to none --r 8 --dtype bfloat16 --activations none {more}"
    args, _, lora_args = train_moe.parse(flags.split())
    config = train_moe.load_config(str(tmp_path), None)
    _, model = build_model(config, args, lora_args)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.uniform_(tensor, 0.01, 0.02) if tensor.is_floating_point() else tensor.zero_()
    batch = train_moe.to_batch(pack_of(9, 5, 12))
    for _ in range(2):  # DoRA's norms are made in the first
        with NothingWaits():
            loss, _ = model(batch)
            loss.backward()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("activations", ["none", "selective", "full"])
def test_a_dense_model(family, activations, tmp_path):
    from malaysian_sft.dense_model import adapt

    save_tiny_checkpoint(tmp_path, family)
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=register_attention(masks=False)
    )
    args = DenseTrainingArguments(output_dir=str(tmp_path / "out"), activations=activations, use_cpu=True, bf16=False)
    peft_model = adapt(model, LoraArguments(r=4), args).train()
    batch = collate([pack_of(9, 5, 12)])
    with NothingWaits():
        peft_model(**batch, use_cache=False).loss.backward()
