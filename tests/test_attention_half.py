"""The fused attention half against transformers' own layers: whole models with packed documents, every gradient."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import FAMILIES, save_tiny_checkpoint
from malaysian_sft.attention import register_attention
from malaysian_sft.attention_half import fast_norm, fuse_attention_half, lay_side_by_side, why_not_fusable
from malaysian_sft.fast_parts import use_fast_parts
from malaysian_sft.lora import LoraArguments, apply_lora
from malaysian_sft.lora_linear import use_lora_linear
from malaysian_sft.mlp_half import fuse_dense_layer, set_recompute, swiglu, swiglu_backward
from multipack import collate


def model_of(directory, **lora):
    """A tiny model with LoRA on its linear layers, B not zero; the routed experts stay as they are."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=register_attention()
    )
    apply_lora(model, LoraArguments(r=4, **lora))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
        if "magnitude" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model.train()


def batch_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    documents = []
    for n in lengths:
        ids = torch.randint(5, 300, (n,), generator=generator)
        documents.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(n) == 0, -100)})
    return collate([documents])


def loss_and_gradients(model, batch):
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny_checkpoint(root / family, family) or root / family for family in FAMILIES}


# Those of the launchers and of the quickstart; another family may differ, and then stays as transformers wrote it.
RECOGNISED = ("llama", "qwen2", "qwen3", "qwen3_moe", "glm4_moe", "qwen2_moe")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_loss_and_gradients_are_those_of_transformers(family, adapter, recompute, directories):
    directory, dora = directories[family], adapter == "dora"
    batch = batch_of(7, 12, 3)
    want_loss, want = loss_and_gradients(model_of(directory, use_dora=dora), batch)
    model = model_of(directory, use_dora=dora)
    use_lora_linear(model)
    reasons = [fuse_attention_half(layer) for layer in model.base_model.layers]
    assert family not in RECOGNISED or not any(reasons), reasons
    lay_side_by_side(model)
    for layer in model.base_model.layers:
        layer.recompute_attention = recompute
    got_loss, got = loss_and_gradients(model, batch)
    check_same(got_loss, got, want_loss, want)


def check_same(got_loss, got, want_loss, want):
    torch.testing.assert_close(got_loss, want_loss)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        # DoRA's gradients of B and of magnitudes are differences of larger ones
        slack = dict(rtol=1e-4, atol=2e-5) if "magnitude" in "".join(want) else {}
        torch.testing.assert_close(got[name], gradient, msg=lambda text, name=name: f"{name}: {text}", **slack)


DENSE = ("llama", "qwen2", "qwen3")


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize(("policy", "frugal_layers"), [("none", 0), ("none", 1), ("selective", 0), ("full", 0)])
def test_a_dense_layer_is_that_of_transformers(family, adapter, policy, frugal_layers, directories):
    dora = adapter == "dora"
    batch = batch_of(7, 12, 3)
    want = loss_and_gradients(model_of(directories[family], use_dora=dora), batch)
    model = model_of(directories[family], use_dora=dora)
    use_lora_linear(model)
    assert "whole fused in 2 of 2 layers" == use_fast_parts(model, fuse_dense_layer)
    set_recompute(model, policy, frugal_layers)
    levels = [layer.recompute for layer in model.base_model.layers]
    assert levels == (["selective", "none"] if frugal_layers else [policy] * 2)
    check_same(*loss_and_gradients(model, batch), *want)


@pytest.mark.parametrize(("dora", "mlp_bias"), [(True, False), (False, True), (True, True)])
def test_biases_are_added_after_doras_scale(dora, mlp_bias):
    """Llama with biases: none of the launchers' models, and easy to get wrong."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=mlp_bias,
    )  # fmt: skip
    batch, results = batch_of(7, 12, 3), []
    for fast in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=register_attention())
        apply_lora(model, LoraArguments(r=4, use_dora=dora))
        for name, p in model.named_parameters():
            if "lora_B" in name or name.endswith("bias"):
                torch.nn.init.normal_(p, std=0.1)
        if fast:
            use_lora_linear(model)
            line = use_fast_parts(model, fuse_dense_layer)
            assert ("DoRA and a bias" in line) == (dora and mlp_bias), line
        results.append(loss_and_gradients(model.train(), batch))
    check_same(*results[1], *results[0])


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_that_zero_3_gathers_are_read_again_in_the_backward(dora, directories):
    """What was gathered for the forward is gone by then: nothing may hold it, or every layer's stays in memory."""
    batch = batch_of(7, 5)
    want = loss_and_gradients(model_of(directories["qwen3"], use_dora=dora), batch)
    model = model_of(directories["qwen3"], use_dora=dora)
    use_lora_linear(model)
    assert "2 of 2" in use_fast_parts(model, fuse_dense_layer)
    adapters = [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
    for number, p in enumerate(adapters):
        p.ds_id = number
    loss = model(**batch, use_cache=False).loss
    for p in adapters:
        gathered = p.data
        p.data = gathered.clone()
        gathered.fill_(float("nan"))
    loss.backward()
    check_same(loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, *want)


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("dora", [False, True])
def test_rotated_queries_and_keys_are_made_again_in_the_backward(family, dora, directories, monkeypatch):
    """One document, whose queries attention keeps as they are; more are cut up on a CPU, and kept."""
    from malaysian_sft import attention_half

    calls, rotate = [], attention_half.norm_rope_forward
    monkeypatch.setattr(attention_half, "norm_rope_forward", lambda *args: calls.append(1) or rotate(*args))
    batch = batch_of(17)
    want = loss_and_gradients(model_of(directories[family], use_dora=dora), batch)
    model = model_of(directories[family], use_dora=dora)
    use_lora_linear(model)
    use_fast_parts(model, fuse_dense_layer)
    loss = model(**batch, use_cache=False).loss
    assert len(calls) == 2  # one a layer
    loss.backward()
    assert len(calls) == 4
    check_same(loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, *want)


@pytest.mark.parametrize(("policy", "dora"), [("none", False), ("none", True), ("selective", False)])
def test_a_second_backward_is_right_or_refused(policy, dora, directories):
    """The first may write over what was kept for it."""
    model = model_of(directories["llama"], use_dora=dora)
    use_lora_linear(model)
    use_fast_parts(model, fuse_dense_layer)
    set_recompute(model, policy)
    loss = model(**batch_of(7, 5), use_cache=False).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    if policy == "none" and not dora:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, parameters)
    else:
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), first, rtol=0, atol=0)


@pytest.mark.parametrize("in_place", [False, True])
def test_swiglu_and_its_gradients(in_place):
    torch.manual_seed(0)
    gate, up, da = (torch.randn(5, 7, dtype=torch.float64).float() for _ in range(3))
    x, y = gate.double().requires_grad_(), up.double().requires_grad_()
    a = torch.nn.functional.silu(x) * y
    want = (a.detach(), *torch.autograd.grad(a, (x, y), da.double()))
    torch.testing.assert_close(swiglu(gate, up).double(), want[0], rtol=1e-6, atol=1e-6)
    kept = gate.clone()
    got = swiglu_backward(gate, up, da, in_place)
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(gate, kept) is not in_place


# families whose forward is the usual one, word for word, and whose rotary embedding is not
INTERLEAVED = {
    "Ernie4_5_MoeConfig": dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_layer_start_index=0),
    "GlmConfig": dict(head_dim=16, pad_token_id=0),
    "CohereConfig": {},
}


@pytest.mark.parametrize("name", INTERLEAVED)
def test_a_rotary_embedding_of_another_kind_is_noticed(name):
    import transformers

    config = getattr(transformers, name)(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, **INTERLEAVED[name],
    )  # fmt: skip
    batch = batch_of(7, 12, 3)
    results = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=register_attention())
        apply_lora(model, LoraArguments(r=4))
        for parameter_name, p in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(p, std=0.1)
        if fast:
            assert "fused in 0 of 2" in use_fast_parts(model)
        results.append(loss_and_gradients(model.train(), batch))
    torch.testing.assert_close(results[0], results[1])


def test_weights_that_lie_apart_give_the_same(directories):
    batch = batch_of(9, 4)
    results = []
    for side_by_side in (False, True):
        model = model_of(directories["qwen3_moe"])
        for layer in model.base_model.layers:
            fuse_attention_half(layer)
        if side_by_side:
            lay_side_by_side(model)
            q, k = (
                getattr(model.base_model.layers[0].self_attn, name).base_layer.weight for name in ("q_proj", "k_proj")
            )
            assert k.data_ptr() == q.data_ptr() + q.numel() * 4
        results.append(loss_and_gradients(model, batch))
    torch.testing.assert_close(results[0], results[1])


def test_what_differs_stays_as_transformers_wrote_it(directories):
    assert "no LoRA, or dropout" in why_not_fusable(model_of(directories["llama"], lora_dropout=0.1).model.layers[0])
    assert "no LoRA" in why_not_fusable(model_of(directories["llama"], target_modules="q_proj").model.layers[0])

    class OtherLayer(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    assert "forward is not" in why_not_fusable(OtherLayer())

    class OffsetRMSNorm(torch.nn.Module):  # as Gemma's, whose weight is added to one
        def forward(self, x):
            return x * (1 + self.weight)

    norm = OffsetRMSNorm()
    fast_norm(norm)
    assert "forward" not in vars(norm)


def test_with_a_cache_or_without_documents_a_layer_is_transformers_own(directories):
    batch = batch_of(6)
    inputs = {"input_ids": batch["input_ids"]}
    want = model_of(directories["qwen3"]).eval()(**inputs).logits
    model = model_of(directories["qwen3"]).eval()
    for layer in model.model.layers:
        fuse_attention_half(layer)
    torch.testing.assert_close(model(**inputs).logits, want)
    torch.testing.assert_close(model(**batch, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("adapter", ["lora", "dora"])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_on_a_gpu_gradients_are_as_near_to_fp32_as_transformers_own_in_bf16(adapter, policy):
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128,
    )  # fmt: skip
    batch = {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch_of(200, 77, 128, 1).items()}

    def gradients(dtype, fused):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=register_attention())
        apply_lora(model, LoraArguments(r=16, use_dora=adapter == "dora"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05)
            if "lora_" not in name:
                p.data = p.data.to(torch.bfloat16).to(dtype)  # the same weights in both
        model.cuda().train()
        use_lora_linear(model)
        if fused:
            assert "2 of 2" in use_fast_parts(model, fuse_dense_layer)
            set_recompute(model, policy)
            lay_side_by_side(model)
        return loss_and_gradients(model, batch)

    (exact_loss, exact), (plain_loss, plain), (loss, ours) = (
        gradients(torch.float32, False), gradients(torch.bfloat16, False), gradients(torch.bfloat16, True)
    )  # fmt: skip
    assert abs(loss - exact_loss) < 2 * abs(plain_loss - exact_loss) + 2e-3
    kinds = {}
    for name, want in exact.items():
        kind = name.split("layers.")[1].split(".", 1)[1]
        found = kinds.setdefault(kind, [0.0, 0.0, 0.0])
        for i, got in enumerate((ours, plain)):
            found[i] += (got[name].float() - want).square().sum().item()
        found[2] += want.square().sum().item()
    for kind, (mine, theirs, size) in kinds.items():
        assert (mine / size) ** 0.5 < 1.3 * (theirs / size) ** 0.5 + 2e-3, (kind, mine, theirs, size)
