"""Every family of mixtures from transformers' own checkpoint to a merged one: trained, saved, verified, merged, and
equal to transformers with the weights worked out by hand from the files.

A family is one line in conftest.FAMILIES. What a checkpoint calls its experts is transformers' to say.
"""

import copy
import json

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GraniteMoeConfig, Qwen3_5MoeConfig

import train_moe
from conftest import COMMON, MOE_FAMILIES, save_tiny_checkpoint, tiny_model, tiny_tokenizer
from fused_moe_lora import wrap_experts
from malaysian_sft.adapter_state import load_adapter
from malaysian_sft.disk_names import DiskNames
from malaysian_sft.load_base import load_weights, reset_adapter
from malaysian_sft.lora import PREFIX, WEIGHTS, LoraArguments, apply_lora, base_shapes
from malaysian_sft.merge import merge_adapter
from malaysian_sft.moe_model import ModelWithLoss, build_model
from malaysian_sft.run import setup_distributed
from malaysian_sft.verify import verify_adapter


def trained(base, root):
    """The checkpoint of two steps of train_moe.py on the base in `base`."""
    rows = [json.dumps({"question": f"Apa {i}?", "answer": f"Ialah {i}."}) + "\n" for i in range(8)]
    (root / "train.jsonl").write_text("".join(rows))
    flags = f"--model_name_or_path {base} --dataset {root}/train.jsonl --data_cache {root}/cache"
    flags += f" --output_dir {root}/run --max_seq_length 128 --global_batch_size 2 --max_steps 2 --r 4 --expert_r 2"
    flags += " --learning_rate 0.01 --warmup_steps 1 --dtype float32 --report_to none"
    train_moe.main(flags.split())
    return root / "run" / "checkpoint-2"


def merged_by_hand(base, adapter):
    """{name on disk: W + s B A} from the two files, alpha / r being 2 everywhere."""
    weights, tensors = load_file(f"{base}/model.safetensors"), load_file(adapter / WEIGHTS)
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        B = tensors.pop(key.replace("lora_A", "lora_B"))
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + 2 * B @ tensors.pop(key)
    assert not tensors, "a tensor without a partner"
    return weights


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def check_merge(base, adapter, out):
    """The merged checkpoint has the base's names and the weights by hand."""
    assert verify_adapter(adapter, base) == []
    merge_adapter(base, adapter, out)
    expected, merged = merged_by_hand(base, adapter), load_file(out / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_family_is_trained_saved_verified_and_merged(family, tmp_path):
    base = save_tiny_checkpoint(tmp_path / "base", family)
    adapter = trained(base, tmp_path)
    check_merge(base, adapter, tmp_path / "merged")

    # transformers' eager model of the merged checkpoint, and ours of base and adapter
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", attn_implementation="eager", experts_implementation="eager"
    )
    flags = ["--model_name_or_path", base, "--r", "4", "--expert_r", "2", "--dtype", "float32"]
    args, _, lora_args = train_moe.parse(flags)
    setup_distributed()
    try:
        peft_model, model = build_model(AutoConfig.from_pretrained(base), args, lora_args)
        load_weights(model.causal_lm, tmp_path / "base", torch.device("cpu"))
        reset_adapter(model.causal_lm, 0)
    finally:
        dist.destroy_process_group()
    load_adapter(peft_model, adapter)
    ids = torch.randint(5, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(model.eval().causal_lm, ids), logits(theirs.eval(), ids), rtol=1e-3, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    assert (logits(plain, ids) - logits(theirs, ids)).abs().max() > 1e-3, "the adapter changes nothing"


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_names_are_those_that_transformers_writes(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    disk, own = load_file(tmp_path / "model.safetensors"), dict(model.state_dict())
    names = DiskNames(model)
    assert names.places.keys() == disk.keys()
    for key, (parameter, expert, part) in names.places.items():
        value = own[parameter]
        if expert is not None:
            value = value[expert].chunk(2 if parameter.endswith("gate_up_proj") else 1)[part]
        assert torch.equal(value, disk[key]), key
    adapted = {f"{name}.weight" for name in base_shapes(model)}
    experts = {key for key, place in names.places.items() if place.expert is not None}
    assert len(adapted) == len(adapted & disk.keys()) + len(experts - adapted), (
        "an expert's projection goes by its common name"
    )


def test_experts_that_a_checkpoint_transposes_are_refused_by_name(tmp_path):
    """Qwen3-VL's text model conforms, but its checkpoint does not: transposed while it is read."""
    model = tiny_model("qwen3_moe")
    names = DiskNames(model)
    from transformers.core_model_loading import Transpose, WeightConverter

    names.converters = [WeightConverter(["mlp.experts.gate_up_proj"], ["mlp.experts.gate_up_proj"], [Transpose(1, 2)])]
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.experts.gate_up_proj: transformers makes .* of it by Transpose"
    ):
        names.use(["model.layers.0.mlp.experts.gate_up_proj"])


def test_a_text_model_inside_a_composite_checkpoint(tmp_path):
    """Weights are read under the composite's path, other towers left alone; the adapter has the base's names."""
    extra = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    text = {**COMMON, **extra, "layer_types": ["full_attention"] * COMMON["num_hidden_layers"]}
    composite = Qwen3_5MoeConfig(text_config=text)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(composite.get_text_config()).save_pretrained(tmp_path / "text")
    weights = load_file(tmp_path / "text" / "model.safetensors")
    base = tmp_path / "base"
    composite.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    weights = {f"model.language_{n}" if n.startswith("model.") else n: t for n, t in weights.items()}
    weights["model.visual.patch_embed.proj.weight"] = torch.ones(3)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    adapter = trained(base, tmp_path)
    names = load_file(adapter / WEIGHTS)
    assert f"{PREFIX}model.language_model.layers.0.mlp.experts.3.up_proj.lora_A.weight" in names
    check_merge(str(base), adapter, tmp_path / "merged")


def test_experts_that_cannot_be_named_are_refused_before_training():
    """Granite keeps its experts whole under a name of its own."""
    config = GraniteMoeConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    config.num_local_experts, config.num_experts_per_tok, config.vocab_size = 4, 2, 64
    model = AutoModelForCausalLM.from_config(config)
    wrap_experts(model, 2, 4)
    with pytest.raises(ValueError, match="input_linear.weight: experts that a checkpoint keeps whole under this name"):
        apply_lora(model, LoraArguments(r=4))


@pytest.mark.parametrize(
    "class_name, noise",
    [
        ("MixtralConfig", {"router_jitter_noise": 0.5}),
        ("PhimoeConfig", {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5}),
    ],
)
def test_routers_are_trained_with_as_they_are_served(class_name, noise):
    """transformers' own model in training draws noise; ours in training is what transformers' gives in evaluation."""
    config = getattr(transformers, class_name)(
        **COMMON, num_experts_per_tok=2, num_local_experts=4, attn_implementation="eager", **noise
    )
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, config.vocab_size, (1, 50))
    with torch.no_grad():
        noisy, expected = theirs.train()(ids).logits, theirs.eval()(ids).logits
        assert (noisy - expected).abs().max() > 1e-3
        ours = copy.deepcopy(theirs)
        wrap_experts(ours, 8, 16)
        model = ModelWithLoss(ours).train()
        assert ours.model.layers[0].mlp.experts.training and model.training
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-5)
