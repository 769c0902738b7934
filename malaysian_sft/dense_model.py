"""The model of train_dense.py: transformers' own, LoRA on it, its layers fused."""

import torch
from transformers import AutoModelForCausalLM, set_seed

from malaysian_sft.attention import register_attention
from malaysian_sft.attention_half import lay_side_by_side
from malaysian_sft.base_model import load_config, name_as_on_disk
from malaysian_sft.fast_parts import use_fast_parts
from malaysian_sft.lora import apply_lora
from malaysian_sft.lora_linear import use_lora_linear
from malaysian_sft.mlp_half import fuse_dense_layer, set_recompute
from malaysian_sft.run import say


def build_model(model_args, lora_args, training_args):
    """The base in bf16 (fp32 without --bf16) with attention that keeps packed documents apart, adapted.

    Of a checkpoint with several towers the text model. Raises ValueError for weights that the checkpoint lacks, which
    transformers would make up.
    """
    name, revision = model_args.model_name_or_path, model_args.model_revision
    model, info = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        config=load_config(name, revision).get_text_config(),
        dtype=torch.bfloat16 if training_args.bf16 else torch.float32,
        attn_implementation=register_attention(masks=False),
        output_loading_info=True,
        use_safetensors=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name}: the checkpoint has no {missing[0]}"
            + (f" and {len(missing) - 1} more weights" if len(missing) > 1 else "")
            + f" of {type(model).__name__}; it is another model's, or incomplete"
        )
    name_as_on_disk(model, name)
    return adapt(model, lora_args, training_args)


def adapt(model, lora_args, training_args):
    """`model` frozen, with LoRA on it, its layers fused (mlp_half.py) where they are of the usual form."""
    model.config.use_cache = False
    set_seed(training_args.seed)  # every rank draws the same A
    peft_model = apply_lora(model, lora_args)
    use_lora_linear(model)  # which computes in the activations' dtype; PEFT's own would in the adapters' fp32
    if training_args.fast_parts:
        say(use_fast_parts(model, fuse_dense_layer))
    set_recompute(model, training_args.activations, training_args.frugal_layers or 0)
    if training_args.deepspeed:
        gather_whole_layers(model)
    else:
        lay_side_by_side(model)
    return peft_model


def gather_whole_layers(model):
    """Have ZeRO-3 gather a fused layer at once, when it is called, instead of module by module: its modules are not
    called. It reduces a layer's gradients when that of the layer's input is known, so the first needs one as well."""
    from deepspeed.utils import set_z3_leaf_module

    fused = [layer for layer in model.base_model.layers if "forward" in vars(layer)]
    for layer in fused:
        set_z3_leaf_module(layer, True)
    if fused:
        model.enable_input_require_grads()
