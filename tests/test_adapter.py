"""adapter.py against PEFT, transformers, vLLM and hand-computed merges; and against the ways adapters get damaged."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapter
import fused_moe_lora
from conftest import save_tiny_checkpoint, tiny_config, tiny_model, tiny_tokenizer
from malaysian_sft import merge
from malaysian_sft.adapter_files import Adapter, in_groups
from malaysian_sft.adapter_state import adapter_state_dict, load_adapter, save_adapter
from malaysian_sft.convert import convert_adapter
from malaysian_sft.lora import (
    CONFIG,
    EXPERT,
    MANIFEST,
    PREFIX,
    WEIGHTS,
    LoraArguments,
    _targets_as_written,
    apply_lora,
    lora_targets,
    reset_lora_parameters,
)
from malaysian_sft.merge import merge_adapter
from malaysian_sft.ranks import start_deepspeed_on_cpus
from malaysian_sft.safetensors_files import disk_is_full
from malaysian_sft.verify import verify_adapter

HEAD_DIM = 32  # the least that vLLM's CPU attention takes
CASES = [(family, kind) for family in ("llama", "qwen3_moe", "glm4_moe") for kind in ("lora", "dora")]
PROMPT = list(range(5, 45))
TOLERANCE = 1e-5


def adapted(family, kind, r=8, seed=0, **overrides):
    """A tiny model with LoRA or DoRA everywhere, as the trainers build it."""
    model = tiny_model(family, seed, head_dim=HEAD_DIM, **overrides)
    args = LoraArguments(r=r, use_dora=kind == "dora")
    if family.endswith("moe"):
        fused_moe_lora.wrap_experts(
            model, args.expert_rank(model.config), args.expert_alpha(model.config), use_dora=args.use_dora
        )
    return apply_lora(model, args), args


def train(model, seed=1, steps=2):
    """Random B and magnitudes far from their start, then a few steps, so that every tensor matters and none is
    special."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "magnitude" in name:
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        tokens = torch.randint(5, 300, (1, 64), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def log_probabilities(model, prompt=PROMPT):
    """log p(token | the tokens before it) of every token of the prompt but the first."""
    tokens = torch.tensor([prompt])
    return model(input_ids=tokens).logits.float().log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]


class Trained:
    """A tiny base on disk, an adapter trained on it and saved, and the trained model's log-probabilities."""

    def __init__(self, directory, family, kind):
        self.family, self.kind = family, kind
        self.base = save_tiny_checkpoint(directory / "base", family, head_dim=HEAD_DIM)
        self.model, self.args = adapted(family, kind)
        train(self.model)
        self.truth = log_probabilities(self.model)
        self.directory = directory / "run" / "checkpoint-2"
        save_adapter(self.model, self.directory, self.base, tiny_tokenizer(), self.args)
        self.merged = directory / "merged"
        merge_adapter(self.base, self.directory, self.merged, log=lambda line: None)

    def copy(self, tmp_path):
        return Path(shutil.copytree(self.directory, tmp_path / "adapter"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    made = {}

    def get(family, kind):
        if (family, kind) not in made:
            made[family, kind] = Trained(tmp_path_factory.mktemp(f"{family}-{kind}"), family, kind)
        return made[family, kind]

    return get


def rewrite(directory, change):
    """Load the adapter's tensors, let `change` edit them, write them back."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)


def edit_config(directory, **changes):
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_a_layer(tensors):
    tensors.update({key.replace("layers.1.", "layers.2."): tensors[key].clone() for key in list(tensors)})


# ----------------------------------------------------------------------------------------------------------------------
# Arguments and targets
# ----------------------------------------------------------------------------------------------------------------------


def test_default_shape_of_the_adapter():
    config = tiny_config("qwen3_moe", num_experts_per_tok=8)
    args = LoraArguments()
    assert (args.r, args.alpha, args.expert_rank(config), args.expert_alpha(config)) == (256, 512, 32, 64)
    args = LoraArguments(r=16, lora_alpha=8, expert_r=4)
    assert (args.alpha, args.expert_rank(config), args.expert_alpha(config)) == (8, 4, 2)


def test_targets_are_all_linear_layers_but_routers_and_heads():
    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    mlp = [f"{p}_proj" for p in ("gate", "up", "down")]
    layers = {
        "llama": [attention + [f"mlp.{p}" for p in mlp]] * 2,
        "qwen3_moe": [attention] * 2,
        "glm4_moe": [attention + [f"mlp.{p}" for p in mlp], attention + [f"mlp.shared_experts.{p}" for p in mlp]],
        "qwen2_moe": [attention + [f"mlp.shared_expert.{p}" for p in mlp]] * 2,
    }
    for family, expected in layers.items():
        names = {f"model.layers.{i}.{name}" for i, layer in enumerate(expected) for name in layer}
        model = tiny_model(family)
        assert set(lora_targets(model)) == names
        if family.endswith("moe"):
            fused_moe_lora.wrap_experts(model, 4, 8)
            assert set(lora_targets(model)) == names


@pytest.mark.parametrize("family", ["glm4_moe", "qwen2_moe"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_apply_lora_trains_the_adapter_in_fp32_and_nothing_else(family, kind):
    model, args = adapted(family, kind, dtype=torch.bfloat16)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}
    parameters = dict(model.named_parameters())
    assert {parameters[name].dtype for name in trainable} == {torch.float32}
    layers = {name.removeprefix(PREFIX).split(".lora_A")[0] for name in trainable if ".lora_A." in name}
    assert layers == set(lora_targets(tiny_model(family, head_dim=HEAD_DIM)))
    assert sum("experts.down_proj_lora_B" in name for name in trainable) == (1 if family == "glm4_moe" else 2)
    name = f"{PREFIX}model.layers.1.self_attn.q_proj"
    assert parameters[f"{name}.base_layer.weight"].dtype == torch.bfloat16
    # Kaiming-uniform with a = sqrt 5 over a fan-in of 64
    assert parameters[f"{name}.lora_A.default.weight"].abs().max() <= 64**-0.5
    assert parameters[f"{name}.lora_A.default.weight"].std().item() == pytest.approx((1 / 3 / 64) ** 0.5, rel=0.1)
    assert not parameters[f"{name}.lora_B.default.weight"].any()
    if kind == "dora":
        norm = parameters[f"{name}.base_layer.weight"].double().norm(dim=1)
        assert torch.allclose(parameters[f"{name}.lora_magnitude_vector.default.weight"].double(), norm, rtol=1e-6)


def test_reset_after_a_meta_device_build():
    with torch.device("meta"):
        model = tiny_model("llama")
    model = apply_lora(model, LoraArguments(r=8, use_dora=True))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    reset_lora_parameters(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight.norm(dim=1))
    assert not layer.lora_B["default"].weight.any()
    assert layer.lora_A["default"].weight.abs().max() <= 64**-0.5


def test_target_modules_selects_and_refuses_unknown_names():
    model = apply_lora(tiny_model("llama"), LoraArguments(r=4, target_modules="q_proj, layers.1.mlp.up_proj"))
    names = {
        name.split(".lora_A")[0].removeprefix(PREFIX) for name, _ in model.named_parameters() if ".lora_A." in name
    }
    assert names == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    with pytest.raises(ValueError, match="--target_modules wq: .*choose from down_proj, gate_proj"):
        apply_lora(tiny_model("llama"), LoraArguments(target_modules="wq"))


# ----------------------------------------------------------------------------------------------------------------------
# Save and load
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_saved_names_and_values_are_the_base_checkpoints(trained, family, kind):
    run = trained(family, kind)
    tensors = load_file(run.directory / WEIGHTS)
    parts = ["lora_A.weight", "lora_B.weight"] + (["lora_magnitude_vector"] if kind == "dora" else [])
    base = load_file(Path(run.base) / "model.safetensors")  # per-expert names, as every published checkpoint has them
    frozen = ("norm", "embed_tokens", "lm_head", "mlp.gate.", "bias", "e_score")
    modules = [name.removesuffix(".weight") for name in base if not any(word in name for word in frozen)]
    assert set(tensors) == {f"base_model.model.{module}.{part}" for module in modules for part in parts}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    if family.endswith("moe"):
        experts = run.model.base_model.model.model.layers[1].mlp.experts
        name = "base_model.model.model.layers.1.mlp.experts.5.up_proj"
        assert torch.equal(tensors[f"{name}.lora_A.weight"], experts.up_proj_lora_A[5])
        if kind == "dora":
            assert torch.equal(tensors[f"{name}.lora_magnitude_vector"], experts.up_proj_lora_magnitude[5])
    assert verify_adapter(run.directory, run.base) == []
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"} <= set(
        os.listdir(run.directory)
    )


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_load_adapter_restores_the_trained_model(trained, family, kind):
    run = trained(family, kind)
    model, _ = adapted(family, kind)
    assert not torch.allclose(log_probabilities(model), run.truth, atol=0.1)
    load_adapter(model, run.directory)
    assert torch.equal(log_probabilities(model), run.truth)


def test_load_adapter_refuses_what_does_not_fit(trained, tmp_path):
    directory = trained("llama", "lora").directory
    with pytest.raises(ValueError, match="q_proj.lora_A.weight is .8, 64., the model's is .4, 64."):
        load_adapter(adapted("llama", "lora", r=4)[0], directory)
    with pytest.raises(ValueError, match="nothing in the model takes 7 modules, first model.layers.1.mlp.down_proj"):
        load_adapter(adapted("llama", "lora", num_hidden_layers=1)[0], directory)
    with pytest.raises(ValueError, match="no base_model.model.model.layers.2.self_attn.q_proj"):
        load_adapter(adapted("llama", "lora", num_hidden_layers=3)[0], directory)
    with pytest.raises(ValueError, match="the adapter is LoRA, the model DoRA"):
        load_adapter(adapted("llama", "dora")[0], directory)
    with pytest.raises(ValueError, match="the adapter is DoRA, the model has no lora_magnitude_vector"):
        load_adapter(adapted("llama", "lora")[0], trained("llama", "dora").directory)
    copy = trained("llama", "lora").copy(tmp_path)
    edit_config(copy, lora_alpha=8)
    with pytest.raises(ValueError, match="lora_alpha is 8, it was 16"):
        load_adapter(adapted("llama", "lora")[0], copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(ValueError, match="scaling 1, the model has 2"):
        load_adapter(adapted("llama", "lora")[0], copy)


def test_a_save_that_is_not_sound_raises_and_leaves_no_adapter(tmp_path):
    model, _ = adapted("llama", "lora")
    with pytest.raises(ValueError, match="every lora_B is zero: nothing was trained"):
        save_adapter(model, tmp_path / "a", "tiny")
    assert not (tmp_path / "a").exists()
    save_adapter(model, tmp_path / "a", "tiny", allow_zero=True)
    assert verify_adapter(tmp_path / "a", allow_zero=True) == []
    train(model)
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.lora_B.weight has 1 values that are not finite"):
        save_adapter(model, tmp_path / "b", "tiny")
    with pytest.raises(ValueError, match="r is 8 in the model but 16 in the arguments"):
        save_adapter(model, tmp_path / "c", "tiny", lora_args=LoraArguments(r=16))


def test_a_lost_shard_is_refused_when_saving(tmp_path):
    model, args = adapted("qwen3_moe", "lora")
    tensors = adapter_state_dict(train(model))
    whole = dict(tensors)
    name = "base_model.model.model.layers.0.mlp.experts.7.down_proj.lora_A.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    with pytest.raises(ValueError, match="experts.7.down_proj.lora_A.weight has rows of zeros"):
        save_adapter(model, tmp_path / "a", "tiny", tensors=tensors)
    del tensors[name]
    with pytest.raises(ValueError, match="experts.7.down_proj.lora_A.weight is missing"):
        save_adapter(model, tmp_path / "a", "tiny", tensors=tensors)
    half = {key: value[: len(value) // 2] if "q_proj.lora_B" in key else value for key, value in whole.items()}
    with pytest.raises(ValueError, match="q_proj is for a weight of shape .64, 64., the base has .128, 64."):
        save_adapter(model, tmp_path / "a", "tiny", tensors=half)
    untrained = {
        key: torch.zeros_like(value) if "experts" in key and "gate_proj.lora_B" in key else value
        for key, value in whole.items()
    }
    with pytest.raises(ValueError, match=r"experts.\*.gate_proj: lora_B is all zeros: it was not trained"):
        save_adapter(model, tmp_path / "a", "tiny", tensors=untrained)
    one = {
        key: torch.zeros_like(value) if "experts.3." in key and "lora_B" in key else value
        for key, value in whole.items()
    }
    save_adapter(model, tmp_path / "a", "tiny", tensors=one)  # an expert that the router never chose
    save_adapter(model, tmp_path / "other", "tiny", tensors={})  # what ranks other than 0 do
    assert not (tmp_path / "other").exists()


def test_saving_over_an_adapter_keeps_what_else_the_directory_holds(trained, tmp_path):
    directory = trained("llama", "lora").copy(tmp_path)
    (directory / "trainer_state.json").write_text("{}")
    model, _ = adapted("llama", "lora")
    save_adapter(train(model, seed=5), directory, "tiny")
    assert (directory / "trainer_state.json").exists() and not directory.with_name("adapter.tmp").exists()
    assert verify_adapter(directory) == []
    again, _ = adapted("llama", "lora")
    load_adapter(again, directory)
    assert torch.equal(log_probabilities(again), log_probabilities(model))


def test_bf16_on_disk_when_asked_for(tmp_path):
    model, _ = adapted("llama", "lora")
    save_adapter(train(model), tmp_path / "a", "tiny", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a" / WEIGHTS).values()} == {torch.bfloat16}
    assert verify_adapter(tmp_path / "a") == []


# ----------------------------------------------------------------------------------------------------------------------
# PEFT, transformers, vLLM: the same log-probabilities as the trained model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"), [case for case in CASES if case[1] == "lora"] + [("llama", "dora"), ("qwen2_moe", "lora")]
)
def test_peft_loads_the_adapter(trained, family, kind):
    from peft import PeftModel

    run = trained(family, kind)
    model = PeftModel.from_pretrained(tiny_model(family, head_dim=HEAD_DIM), run.directory)
    assert torch.allclose(log_probabilities(model), run.truth, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("family", "kind"), [*CASES, ("qwen2_moe", "dora")])
def test_merged_checkpoint_in_transformers(trained, family, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trained(family, kind)
    model = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    assert torch.allclose(log_probabilities(model), run.truth, atol=TOLERANCE, rtol=0)
    assert AutoTokenizer.from_pretrained(run.merged).chat_template == tiny_tokenizer().chat_template
    # every weight against fp64, computed here
    base, merged = load_file(Path(run.base) / "model.safetensors"), load_file(run.merged / "model.safetensors")
    tensors = {name: tensor.double() for name, tensor in load_file(run.directory / WEIGHTS).items()}
    for name, weight in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight.double()
        if f"{module}.lora_A.weight" in tensors:
            expected = expected + 2.0 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
            if kind == "dora":
                expected *= (tensors[f"{module}.lora_magnitude_vector"] / expected.norm(dim=1))[:, None]
        else:
            assert torch.equal(merged[name], weight)
        assert torch.allclose(merged[name].double(), expected, atol=1e-6), name


VLLM_SCRIPT = """
import gc, json, os, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from malaysian_sft.engine import take_weights


def log_probabilities(llm, prompt, **extra):
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
    output = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False, **extra)[0]
    return [next(iter(position.values())).logprob for position in output.prompt_logprobs[1:]]


def loading_check(model, directory):
    # what vLLM's LoRA worker does with an adapter's directory before anything runs
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.utils import get_supported_lora_modules, process_packed_modules_mapping

    packed, expected = process_packed_modules_mapping(model), []
    for module in get_supported_lora_modules(model):
        expected += packed.get(module, [module])
        if module == "experts":
            expected.append(module)
    helper = PEFTHelper.from_local_dir(directory, None)
    helper.validate_legal(LoRAConfig(max_lora_rank=8))
    lora = LoRAModel.from_local_checkpoint(directory, set(expected), helper, lora_model_id=1, device="cpu")
    return {name: [list(one.lora_a.shape), list(one.lora_b.shape), one.scaling] for name, one in lora.loras.items()}


if __name__ == "__main__":
    results = {}
    for job in json.loads(sys.argv[2]):
        common = dict(dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=1, disable_log_stats=True)
        if job["how"] == "unmerged":
            llm = LLM(job["base"], enable_lora=True, max_lora_rank=8, **common)
            extra = {"lora_request": LoRARequest("tiny", 1, job["adapter"])}
        else:
            extra = {}
            common |= {"load_format": "merge_adapter", "model_loader_extra_config": {"adapter": job["adapter"]}}
            common |= {"worker_extension_cls": "malaysian_sft.engine.WorkerExtension"}
            try:
                llm = LLM(job["base"], tensor_parallel_size=job["tp"], **common, **job.get("options", {}))
            except ValueError as error:
                results[job["name"]] = str(error)
                continue
        result = {"log_probabilities": log_probabilities(llm, job["prompt"], **extra)}
        for adapter in job.get("then", []):  # its weights in place of those that the engine has
            wanted = common | {"model_loader_extra_config": {"adapter": adapter}}
            if not take_weights(llm, common, wanted):
                break
            common = wanted
            result.setdefault("then", []).append(log_probabilities(llm, job["prompt"]))
        if job.get("check"):
            result["check"] = llm.apply_model(lambda model: loading_check(model, job["adapter"]))[0]
        results[job["name"]] = result
        del llm
        gc.collect()
    json.dump(results, open(sys.argv[1], "w"))
"""


def run_vllm(tmp_path, jobs, multiprocessing):
    script, output = tmp_path / "vllm_jobs.py", tmp_path / "results.json"
    script.write_text(VLLM_SCRIPT)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(multiprocessing)),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, script, output, json.dumps(jobs)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    return (json.loads(output.read_text()) if output.exists() else None), done.stdout + done.stderr


def vllm_job(run, name, how="merged", tp=1, check=False):
    return dict(name=name, how=how, base=run.base, adapter=str(run.directory), prompt=PROMPT, tp=tp, check=check)


def scaled_layers(trained, tmp_path):
    """An adapter with another alpha / r in some layers, inside what vLLM packs as one module too."""
    directory = trained("llama", "lora").copy(tmp_path)
    (directory / MANIFEST).unlink()
    edit_config(directory, alpha_pattern={"up_proj": 48, r"layers\.0\.self_attn\.q_proj": 2, "o_proj": 32})
    return directory


@pytest.fixture(scope="session")
def vllm_results(trained, tmp_path_factory):
    """All single-process engines in one process, one after another: importing vLLM is most of the time."""
    jobs = [
        vllm_job(trained(*case), " ".join(case), check=case[0].endswith("moe") and case[1] == "lora") for case in CASES
    ]
    for job, (family, kind) in zip(jobs, CASES, strict=True):
        if kind == "lora":  # the engine then takes the other adapter's weights, and its own again
            job["then"] = [str(trained(family, other).directory) for other in ("dora", "lora")]
    jobs.append(vllm_job(trained("llama", "lora"), "unmerged", how="unmerged"))
    scaled = scaled_layers(trained, tmp_path_factory.mktemp("scaled"))
    for how in ("unmerged", "merged"):
        jobs.append(vllm_job(trained("llama", "lora"), f"scaled, {how}", how=how) | {"adapter": str(scaled)})
    longer = trained("llama", "lora").copy(tmp_path_factory.mktemp("longer"))
    (longer / MANIFEST).unlink()
    rewrite(longer, add_a_layer)
    jobs.append(vllm_job(trained("llama", "lora"), "refused") | {"adapter": str(longer)})
    results, log = run_vllm(tmp_path_factory.mktemp("vllm"), jobs, multiprocessing=False)
    assert results is not None, log[-5000:]
    return results


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_merged_while_vllm_loads(trained, vllm_results, family, kind):
    found = torch.tensor(vllm_results[f"{family} {kind}"]["log_probabilities"])
    assert torch.allclose(found, trained(family, kind).truth, atol=TOLERANCE, rtol=0)


def test_a_running_engine_takes_other_weights(trained, vllm_results):
    dora, lora = torch.tensor(vllm_results["llama lora"]["then"])
    assert torch.allclose(dora, trained("llama", "dora").truth, atol=TOLERANCE, rtol=0)
    assert lora.tolist() == vllm_results["llama lora"]["log_probabilities"]
    assert (dora - lora).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_an_engine_whose_kernels_arrange_weights_takes_none(vllm_results, family):
    """vLLM's kernel for experts on CPUs, which would be left with the weights before."""
    assert "then" not in vllm_results[f"{family} lora"]


def test_vllm_refuses_keys_that_match_nothing(vllm_results):
    assert "7 adapter modules match nothing in the base: model.layers.2.mlp.down_proj, " in vllm_results["refused"]


def test_vllm_serves_the_unmerged_adapter(trained, vllm_results):
    found = torch.tensor(vllm_results["unmerged"]["log_probabilities"])
    assert torch.allclose(found, trained("llama", "lora").truth, atol=TOLERANCE, rtol=0)


def test_a_scaling_of_its_own_in_a_layer_is_sound_and_served(trained, vllm_results, tmp_path):
    from peft import PeftModel

    directory = scaled_layers(trained, tmp_path)
    assert verify_adapter(directory, trained("llama", "lora").base) == []
    truth = log_probabilities(PeftModel.from_pretrained(tiny_model("llama", head_dim=HEAD_DIM), directory))
    assert (truth - trained("llama", "lora").truth).abs().max() > 100 * TOLERANCE
    for how in ("unmerged", "merged"):
        found = torch.tensor(vllm_results[f"scaled, {how}"]["log_probabilities"])
        assert torch.allclose(found, truth, atol=TOLERANCE, rtol=0), how


def test_experts_of_several_ranks_are_merged_but_not_served(trained, tmp_path):
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper

    from malaysian_sft.engine import served_lora

    run, stack = trained("qwen3_moe", "lora"), "model.layers.1.mlp.experts"
    served_lora(run.directory, {})
    directory = run.copy(tmp_path)
    (directory / MANIFEST).unlink()
    config = json.loads((directory / CONFIG).read_text())
    expert = r"layers\.1\.mlp\.experts\.5\.up_proj"
    edit_config(
        directory,
        rank_pattern={expert: 2, **config["rank_pattern"]},
        alpha_pattern={expert: 4, **config["alpha_pattern"]},
    )

    def halve(tensors):
        A, B = (f"base_model.model.{stack}.5.up_proj.lora_{part}.weight" for part in "AB")
        tensors[A], tensors[B] = tensors[A][:2], tensors[B][:, :2]

    rewrite(directory, halve)
    assert verify_adapter(directory, run.base) == []
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.\*.up_proj have \[2, 4\]; leave --serve_lora off"):
        served_lora(directory, {})
    helper = PEFTHelper.from_dict(json.loads((directory / CONFIG).read_text()))
    loras = LoRAModel.from_lora_tensors(1, load_file(directory / WEIGHTS), helper, device="cpu").loras
    names = [f"{stack}.{e}.{kind}_proj" for e in range(8) for kind in ("gate", "down", "up")]
    with pytest.raises(ValueError, match="different LoRA ranks"):  # that vLLM refuses it, too
        PackedLoRALayerWeights.pack_moe([loras[name] for name in names], stack)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_vllm_accepts_unmerged_experts(trained, vllm_results, family):
    loras = vllm_results[f"{family} lora"]["check"]
    slots = Adapter(trained(family, "lora").directory).slots
    assert set(loras) == set(slots)
    assert loras["model.layers.1.mlp.experts.7.gate_proj"] == [[4, 64], [32, 4], 2.0]
    assert loras["model.layers.1.self_attn.q_proj"] == [[8, 64], [128, 8], 2.0]


# an engine of two processes takes 40 s to start and stop on two cores
IN_CI = [
    ("llama", "lora"),
    ("qwen3_moe", "dora"),
]


@pytest.mark.parametrize(
    "cases", [IN_CI, pytest.param([case for case in CASES if case not in IN_CI], marks=pytest.mark.slow)]
)
def test_merged_while_vllm_loads_with_tensor_parallelism(trained, tmp_path, cases):
    results, log = run_vllm(
        tmp_path, [vllm_job(trained(*case), " ".join(case), tp=2) for case in cases], multiprocessing=True
    )
    assert results is not None, log[-5000:]
    for case in cases:
        found = torch.tensor(results[" ".join(case)]["log_probabilities"])
        assert torch.allclose(found, trained(*case).truth, atol=TOLERANCE, rtol=0), case


# ----------------------------------------------------------------------------------------------------------------------
# Damage
# ----------------------------------------------------------------------------------------------------------------------

EXPERT_5 = "base_model.model.model.layers.0.mlp.experts.5."
UP_A = f"{EXPERT_5}up_proj.lora_A.weight"


def truncate(directory):
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def zero_a_shard(directory):
    rewrite(directory, lambda t: [t[key].zero_() for key in t if ".experts.4." in key or ".experts.5." in key])


def lose_an_expert(directory):
    rewrite(directory, lambda t: [t.pop(key) for key in list(t) if key.startswith(EXPERT_5)])


def lose_a_layer(directory):
    rewrite(directory, lambda t: [t.pop(key) for key in list(t) if ".layers.1." in key])


def swap_gate_and_up(directory):
    def swap(t):
        for part in ("lora_A", "lora_B"):
            gate, up = f"{EXPERT_5}gate_proj.{part}.weight", f"{EXPERT_5}up_proj.{part}.weight"
            t[gate], t[up] = t[up], t[gate]

    rewrite(directory, swap)


def half_the_rows(directory):
    rewrite(directory, lambda t: t.update({key: t[key][:64] for key in t if "q_proj.lora_B" in key}))


DAMAGE = {
    "truncated file": (truncate, "adapter_model.safetensors: truncated or damaged: .* bytes, its header asks for"),
    "empty file": (lambda d: (d / WEIGHTS).write_bytes(b""), "truncated"),
    "no tensors": (lambda d: save_file({}, d / WEIGHTS), "holds no tensors"),
    "no file": (lambda d: (d / WEIGHTS).unlink(), "no adapter_model.safetensors"),
    "no configuration": (lambda d: (d / CONFIG).unlink(), "no adapter_config.json"),
    "zeroed shard": (zero_a_shard, r"experts.4.gate_proj.lora_A.weight is all zeros \(its checksum differs"),
    "one expert missing": (
        lose_an_expert,
        r"model.layers.0.mlp.experts.5.gate_proj is missing",
    ),
    "a layer missing": (lose_a_layer, "model.layers.1.self_attn.q_proj is missing"),
    "swapped gate and up": (
        swap_gate_and_up,
        "5.gate_proj.lora_B.weight holds what was saved as .*experts.5.up_proj.lora_B.weight",
    ),
    "a value changed": (
        lambda d: rewrite(d, lambda t: t[UP_A].mul_(1.01)),
        "up_proj.lora_A.weight is not what was saved",
    ),
    "not finite": (
        lambda d: rewrite(d, lambda t: t[UP_A][0].fill_(float("inf"))),
        "has 64 values that are not finite",
    ),
    "one rank's rows": (half_the_rows, "q_proj is for a weight of shape .64, 64., the base has .128, 64."),
    "wrong alpha": (lambda d: edit_config(d, lora_alpha=8), "lora_alpha is 8, it was 16 when the adapter was saved"),
    "wrong rank": (lambda d: edit_config(d, r=16), r"lora_A \[8, 64\] and lora_B \[\d+, 8\] do not have the rank 16"),
    "patterns lost": (
        lambda d: edit_config(d, rank_pattern={}, alpha_pattern={}),
        "do not have the rank 8 that adapter_config",
    ),
    "DoRA claimed": (lambda d: edit_config(d, use_dora=True), "lora_magnitude_vector is missing"),
    "unknown tensor": (
        lambda d: rewrite(d, lambda t: t.update({"lm_head.weight": torch.ones(2)})),
        "lm_head.weight is not a LoRA tensor",
    ),
    "layer that is not there": (
        lambda d: rewrite(d, add_a_layer),
        "model.layers.2.self_attn.q_proj is no linear layer of the base model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(trained, tmp_path, capsys, damage):
    run = trained("qwen3_moe", "lora")
    directory = run.copy(tmp_path)
    break_it, message = DAMAGE[damage]
    assert verify_adapter(directory, run.base) == []
    break_it(directory)
    with pytest.raises(ValueError):  # whoever reads it notices, verified or not
        merge_adapter(run.base, directory, tmp_path / "out")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        adapter.main(["verify", str(directory), "--base", run.base])
    assert exit.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert any(re.search(message, line) for line in lines), lines


def test_without_a_manifest_structure_is_still_checked(trained, tmp_path):
    directory = trained("qwen3_moe", "lora").copy(tmp_path)
    (directory / MANIFEST).unlink()
    assert verify_adapter(directory) == []
    zero_a_shard(directory)
    assert any("experts.5.up_proj.lora_A.weight has rows of zeros" in fault for fault in verify_adapter(directory))


def test_another_base_is_refused(trained, tmp_path):
    run = trained("llama", "lora")
    twin = save_tiny_checkpoint(tmp_path / "twin", "llama", seed=3, head_dim=HEAD_DIM)
    wide = save_tiny_checkpoint(tmp_path / "wide", "llama", head_dim=HEAD_DIM, intermediate_size=128)
    other = save_tiny_checkpoint(tmp_path / "other", "qwen3", head_dim=HEAD_DIM)
    assert "this is another base model's adapter" in "\n".join(verify_adapter(run.directory, twin))
    faults = "\n".join(verify_adapter(run.directory, wide))
    assert "intermediate_size is 128; the adapter was trained on" in faults
    assert "mlp.up_proj is for a weight of shape (96, 64), the base has (128, 64)" in faults
    assert "model_type is qwen3;" in "\n".join(verify_adapter(run.directory, other))
    assert "base nowhere/at-all:" in verify_adapter(run.directory, "nowhere/at-all")[0]
    bf16 = save_tiny_checkpoint(tmp_path / "bf16", "llama", dtype=torch.bfloat16, head_dim=HEAD_DIM)
    assert verify_adapter(run.directory, bf16) == []  # the same base in another dtype
    with pytest.raises(ValueError, match="this is another base model's adapter"):
        merge_adapter(twin, run.directory, tmp_path / "out")
    adapter.main(["merge", twin, str(run.directory), str(tmp_path / "out"), "--any_base"])
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
        ({"r": 0}, "r is 0; expected a positive number"),
    ],
)
def test_configurations_that_would_merge_wrongly_are_refused(trained, tmp_path, change, message):
    directory = trained("llama", "lora").copy(tmp_path)
    edit_config(directory, **change)
    assert message in verify_adapter(directory)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Adapters written by PEFT, and conversion
# ----------------------------------------------------------------------------------------------------------------------


def peft_stacked(family, directory, names=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), **settings):
    """PEFT's own adapter on stacked expert parameters, random, saved by PEFT; returns its model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=6,
        lora_alpha=9,
        target_modules=["q_proj", "v_proj"],
        target_parameters=list(names),
        task_type="CAUSAL_LM",
        **settings,
    )
    model = get_peft_model(tiny_model(family, head_dim=HEAD_DIM), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return model


def merged_model(base, directory, out):
    from transformers import AutoModelForCausalLM

    merge_adapter(base, directory, out, log=lambda line: None)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize(
    "settings", [{}, {"rank_pattern": {"gate_up_proj": 4}, "alpha_pattern": {"gate_up_proj": 20}}, {"use_rslora": True}]
)
def test_pefts_stacked_adapters_are_read_merged_and_converted(trained, tmp_path, family, settings):
    from peft import PeftModel

    truth = log_probabilities(peft_stacked(family, tmp_path / "stacked", **settings))
    base = trained(family, "lora").base
    assert verify_adapter(tmp_path / "stacked", base) == []
    merged = merged_model(base, tmp_path / "stacked", tmp_path / "merged")
    assert torch.allclose(log_probabilities(merged), truth, atol=TOLERANCE, rtol=0)

    convert_adapter(tmp_path / "stacked", tmp_path / "2d", "2d")
    keys = set(load_file(tmp_path / "2d" / WEIGHTS))
    assert "base_model.model.model.layers.1.mlp.experts.7.up_proj.lora_B.weight" in keys and not any(
        "base_layer" in key for key in keys
    )
    again = PeftModel.from_pretrained(tiny_model(family, head_dim=HEAD_DIM), tmp_path / "2d")
    assert torch.allclose(log_probabilities(again), truth, atol=TOLERANCE, rtol=0)
    merged = merged_model(base, tmp_path / "2d", tmp_path / "merged-2d")
    assert torch.allclose(log_probabilities(merged), truth, atol=TOLERANCE, rtol=0)


SCALINGS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 2}, "alpha_pattern": {"up_proj": 20}},
    {"use_rslora": True, "rank_pattern": {"mlp.*": 3}, "alpha_pattern": {r"layers\.0\..*": 5, "v_proj": 7}},
]


@pytest.mark.parametrize("settings", SCALINGS)
def test_the_scaling_read_is_that_of_peft_and_of_vllm(tmp_path, settings):
    from peft import LoraConfig, get_peft_model
    from vllm.lora.peft_helper import PEFTHelper

    targets = ["q_proj", "v_proj", "up_proj"]
    config = LoraConfig(r=6, lora_alpha=9, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(tiny_model("llama", head_dim=HEAD_DIM), config)
    model.save_pretrained(tmp_path)
    truth = {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    read = {name: (slot.rank, slot.scaling) for name, slot in Adapter(tmp_path).slots.items()}
    assert read.keys() == truth.keys()
    served = PEFTHelper.from_dict(json.loads((tmp_path / CONFIG).read_text()))
    for name, expected in truth.items():
        assert read[name] == pytest.approx(expected) and served.get_rank_and_scaling(name) == pytest.approx(expected)
    assert len({scaling for _, scaling in truth.values()}) > 1 or "alpha_pattern" not in settings


def test_a_model_with_rslora_is_not_saved_as_one_without(tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", use_rslora=True)
    model = get_peft_model(tiny_model("llama", head_dim=HEAD_DIM), config)
    with pytest.raises(ValueError, match="q_proj trains with scaling 4, its alpha / r is 2: rsLoRA and other"):
        save_adapter(model, tmp_path / "a", "tiny", allow_zero=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("change", [{"use_rslora": True}, {"alpha_pattern": {"up_proj": 40}}])
def test_an_adapter_of_another_scaling_is_not_trained_on(trained, tmp_path, change):
    directory = trained("llama", "lora").copy(tmp_path)
    (directory / MANIFEST).unlink()
    edit_config(directory, **change)
    model, _ = adapted("llama", "lora")
    with pytest.raises(ValueError, match="has scaling .*, the model has 2"):
        load_adapter(model, directory)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_stack_on_its_own_is_told_apart_by_the_configuration(trained, tmp_path, name):
    truth = log_probabilities(peft_stacked("qwen3_moe", tmp_path / "one", names=[f"mlp.experts.{name}"]))
    merged = merged_model(trained("qwen3_moe", "lora").base, tmp_path / "one", tmp_path / "merged")
    assert torch.allclose(log_probabilities(merged), truth, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_our_adapters_stacked_load_in_peft_and_come_back_unchanged(trained, tmp_path, family):
    from peft import PeftModel

    run = trained(family, "lora")
    adapter.main(["convert", str(run.directory), str(tmp_path / "stacked"), "--layout", "stacked"])
    tensors = load_file(tmp_path / "stacked" / WEIGHTS)
    assert tensors["base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"].shape == (8 * 2 * 4, 64)
    assert tensors["base_model.model.model.layers.1.mlp.experts.lora_B.weight"].shape == (64, 4 * 8)
    assert verify_adapter(tmp_path / "stacked", run.base) == []
    model = PeftModel.from_pretrained(tiny_model(family, head_dim=HEAD_DIM), tmp_path / "stacked")
    assert torch.allclose(log_probabilities(model), run.truth, atol=TOLERANCE, rtol=0)
    again, _ = adapted(family, "lora")
    load_adapter(again, tmp_path / "stacked")
    assert torch.equal(log_probabilities(again), run.truth)

    convert_adapter(tmp_path / "stacked", tmp_path / "back")
    back, ours = load_file(tmp_path / "back" / WEIGHTS), load_file(run.directory / WEIGHTS)
    assert set(back) == set(ours) and all(torch.equal(back[key], ours[key]) for key in ours)
    assert verify_adapter(tmp_path / "back", run.base) == []


def test_dora_experts_have_no_stacked_form(trained, tmp_path):
    with pytest.raises(ValueError, match="PEFT has no DoRA on stacked experts"):
        convert_adapter(trained("qwen3_moe", "dora").directory, tmp_path / "out", "stacked")


class ExpertAsModule(torch.nn.Module):
    """One expert as transformers 4 had it: three linear layers, which is what PEFT then adapted and saved."""

    def __init__(self, gate_up, down):
        super().__init__()
        inner, hidden = gate_up.shape[0] // 2, gate_up.shape[1]
        self.gate_proj, self.up_proj = (
            torch.nn.Linear(hidden, inner, bias=False),
            torch.nn.Linear(hidden, inner, bias=False),
        )
        self.down_proj = torch.nn.Linear(inner, hidden, bias=False)
        with torch.no_grad():
            self.gate_proj.weight.copy_(gate_up[:inner])
            self.up_proj.weight.copy_(gate_up[inner:])
            self.down_proj.weight.copy_(down)

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class ExpertsAsModules(torch.nn.ModuleList):
    def __init__(self, experts):
        super().__init__(
            ExpertAsModule(gate_up, down) for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True)
        )

    def forward(self, hidden_states, top_k_index, top_k_weights):
        weights = torch.zeros(len(hidden_states), len(self)).scatter(1, top_k_index, top_k_weights)
        return sum(weights[:, e, None] * expert(hidden_states) for e, expert in enumerate(self))


@pytest.mark.parametrize(("family", "kind"), CASES[2:])
def test_pefts_adapters_on_expert_modules_are_read_and_merged(trained, tmp_path, family, kind):
    from peft import LoraConfig, get_peft_model

    model = tiny_model(family, head_dim=HEAD_DIM)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = ExpertsAsModules(layer.mlp.experts)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, lora_alpha=12, use_dora=kind == "dora", target_modules=projections, task_type="CAUSAL_LM")
    with _targets_as_written():
        model = get_peft_model(model, config)
    train(model, steps=0)
    truth = log_probabilities(model)
    model.save_pretrained(tmp_path / "peft")
    base = trained(family, kind).base
    assert verify_adapter(tmp_path / "peft", base) == []
    merged = merged_model(base, tmp_path / "peft", tmp_path / "merged")
    assert torch.allclose(log_probabilities(merged), truth, atol=TOLERANCE, rtol=0)
    ours = tiny_model(family, head_dim=HEAD_DIM)
    fused_moe_lora.wrap_experts(ours, 4, 12, use_dora=kind == "dora")
    ours = apply_lora(ours, LoraArguments(r=4, lora_alpha=12, use_dora=kind == "dora"))
    load_adapter(ours, tmp_path / "peft")
    assert torch.allclose(log_probabilities(ours), truth, atol=TOLERANCE, rtol=0)
    if kind == "lora":
        convert_adapter(tmp_path / "peft", tmp_path / "stacked", "stacked")
        from peft import PeftModel

        again = PeftModel.from_pretrained(tiny_model(family, head_dim=HEAD_DIM), tmp_path / "stacked")
        assert torch.allclose(log_probabilities(again), truth, atol=TOLERANCE, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Merge
# ----------------------------------------------------------------------------------------------------------------------


def sharded_base(run, directory, dtype=torch.float32):
    """The base in several shards with an index, as large models are published."""
    model = tiny_model(run.family, head_dim=HEAD_DIM).to(dtype)
    model.save_pretrained(directory, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def tensors_of(directory):
    return {
        name: tensor
        for path in sorted(Path(directory).glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_sharded_merge_in_blocks_by_several_processes(trained, tmp_path, monkeypatch, kind):
    run = trained("glm4_moe", kind)
    base, out, lines = sharded_base(run, tmp_path / "base"), tmp_path / "out", []
    ends = {"eos_token_id": [2, 3], "temperature": 0.7}
    (Path(base) / "generation_config.json").write_text(json.dumps(ends))
    (tmp_path / "out.part").mkdir()  # of a merge that was killed
    (tmp_path / "out.part" / "model-00001.safetensors").write_bytes(b"half a shard")
    monkeypatch.setattr("malaysian_sft.merge.CHUNK", 640)  # ten rows of 64 at a time
    merge_adapter(base, run.directory, out, workers=1, log=lines.append)
    whole = tensors_of(run.merged)
    for name, tensor in tensors_of(out).items():
        assert torch.allclose(tensor, whole[name], atol=1e-6, rtol=0), name
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3 and len(lines) == len(shards) and "GB/s" in lines[0] and not (tmp_path / "out.part").exists()
    assert set(tensors_of(out)) == set(whole)
    assert json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].keys() == whole.keys()
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= set(os.listdir(out))
    assert json.loads((out / "generation_config.json").read_text()) == ends, "the base's, with both ends of turn"
    with pytest.raises(ValueError, match="out is there already"):
        merge_adapter(base, run.directory, out)
    if kind == "lora":  # once is enough to see that processes work
        monkeypatch.setattr("malaysian_sft.merge.CHUNK", 1 << 24)
        merge_adapter(base, run.directory, tmp_path / "again", workers=2)
        again = tensors_of(tmp_path / "again")
        assert all(torch.allclose(again[name], tensor, atol=1e-6, rtol=0) for name, tensor in whole.items())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_stacked_bf16_base_is_merged_in_fp32_and_rounded_once(trained, tmp_path, kind):
    run = trained("qwen3_moe", kind)
    stacked = {
        name: tensor.bfloat16() for name, tensor in tiny_model("qwen3_moe", head_dim=HEAD_DIM).state_dict().items()
    }
    assert stacked["model.layers.0.mlp.experts.gate_up_proj"].ndim == 3
    (tmp_path / "base").mkdir()
    save_file(stacked, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(run.base) / name, tmp_path / "base" / name)
    merge_adapter(str(tmp_path / "base"), run.directory, tmp_path / "out", log=lambda line: None)
    merged, ours = tensors_of(tmp_path / "out"), Adapter(run.directory)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}

    def truth(module, weight):
        A, B, magnitude = ours.factors(module)
        expected = weight.double() + 2.0 * B.double() @ A.double()
        return expected if magnitude is None else expected * (magnitude.double() / expected.norm(dim=1))[:, None]

    for module in ours.slots:
        match = EXPERT.match(module)
        if match:
            stack, index, projection = match["stack"], int(match["index"]), match["projection"]
            name = f"{stack}.down_proj" if projection == "down_proj" else f"{stack}.gate_up_proj"
            rows = {"gate_proj": slice(0, 32), "up_proj": slice(32, 64), "down_proj": slice(None)}[projection]
            weight, got = stacked[name][index][rows], merged[name][index][rows]
        else:
            weight, got = stacked[f"{module}.weight"], merged[f"{module}.weight"]
        expected = truth(module, weight)
        # half of it, and fp32's own error, is what one rounding may cost
        step = torch.finfo(torch.bfloat16).eps * expected.abs()
        assert ((got.double() - expected).abs() <= 0.51 * step + 1e-6).all(), module


def test_a_conversion_that_changes_nothing_keeps_everything(trained, tmp_path):
    run = trained("qwen3_moe", "lora")
    convert_adapter(run.directory, tmp_path / "stacked", layout="stacked")
    convert_adapter(tmp_path / "stacked", tmp_path / "again", layout="stacked")
    stacked, again = load_file(tmp_path / "stacked" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert stacked.keys() == again.keys() and all(torch.equal(again[name], stacked[name]) for name in stacked)
    convert_adapter(run.directory, tmp_path / "same", layout="2d")
    assert load_file(tmp_path / "same" / WEIGHTS).keys() == load_file(run.directory / WEIGHTS).keys()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if "lora_B" in name],
            "every lora_B is zero",
        ),
        (lambda tensors: next(iter(tensors.values())).fill_(float("nan")), "values that are not finite"),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts.5." in name],
            r"experts\.5\.gate_proj is missing",
        ),
    ],
)
def test_merge_verifies_as_verify_does(trained, tmp_path, damage, message):
    run = trained("qwen3_moe", "lora")
    directory = run.copy(tmp_path)
    (directory / MANIFEST).unlink()
    rewrite(directory, damage)
    with pytest.raises(ValueError, match=message):
        merge_adapter(run.base, directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merge_refuses_what_would_be_silently_lost(trained, tmp_path):
    run = trained("llama", "lora")
    directory = run.copy(tmp_path)
    (directory / MANIFEST).unlink()
    rewrite(directory, add_a_layer)
    with pytest.raises(ValueError, match=r"\(7 faults\).*model.layers.2.mlp.down_proj is no linear layer of the base"):
        merge_adapter(run.base, directory, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    with pytest.raises(ValueError, match="is there already; delete it or choose another"):
        merge_adapter(run.base, run.directory, run.base)
    quantised = shutil.copytree(run.base, tmp_path / "quantised")
    edit = json.loads((quantised / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (quantised / "config.json").write_text(json.dumps(edit))
    with pytest.raises(ValueError, match="the base is quantised .fp8."):
        merge_adapter(str(quantised), run.directory, tmp_path / "out")
    with pytest.raises(SystemExit, match="error: .*no adapter_config.json: not an adapter directory"):
        adapter.main(["merge", run.base, str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="error: /no/model: neither a directory with a config.json nor on the hub"):
        adapter.main(["merge", "/no/model", str(run.directory), str(tmp_path / "out")])


def test_a_killed_merging_process_is_one_line(monkeypatch):
    monkeypatch.setattr(merge, "_merge_shard", os._exit)
    with pytest.raises(ValueError, match="a merging process was killed .*fewer --workers"):
        list(merge._run(2, [(9,), (9,)]))


def test_dora_does_not_start_on_rows_of_zeros():
    """It divides by a row's norm: neither a linear layer's nor an expert's may be zero. LoRA starts on any."""
    for kind in ("lora", "dora"):
        model, _ = adapted("qwen3_moe", kind)
        layer = model.base_model.model.model.layers[1]
        projection, experts = layer.self_attn.v_proj, layer.mlp.experts
        for weight, module, name in (
            (projection.base_layer.weight.data[3], reset_lora_parameters, r"layers\.1\.self_attn\.v_proj"),
            (
                experts.down_proj.data[5, 2],
                lambda _, experts=experts: experts.reset_lora_parameters(),
                "experts' down_proj",
            ),
        ):
            kept = weight.clone()
            weight.zero_()
            refused = pytest.raises(ValueError, match=f"--use_dora: .*{name} has rows of zeros")
            with refused if kind == "dora" else contextlib.nullcontext():
                module(model)
            weight.copy_(kept)


def test_names_are_grouped_by_what_a_layer_s_experts_lack():
    layer = "model.layers.1.mlp.experts"
    names = [f"{layer}.{e}.up_proj" for e in (0, 3, 7, 9, 10)] + [
        f"{layer}.4.gate_proj",
        "model.layers.0.self_attn.q_proj",
    ]
    assert in_groups(names) == [
        "model.layers.0.self_attn.q_proj",
        f"{layer}.{{0, 3, 7 and 2 more}}.up_proj",
        f"{layer}.4.gate_proj",
    ]


def test_a_conversion_that_changes_nothing_is_told_from_one_that_loses(trained, tmp_path, monkeypatch):
    """The names after a conversion are compared with those before it."""
    run = trained("qwen3_moe", "lora")
    convert_adapter(run.directory, tmp_path / "stacked", layout="stacked")
    monkeypatch.setattr("malaysian_sft.convert._unstack_experts", lambda *_: {"rank_pattern": {}, "alpha_pattern": {}})
    with pytest.raises(ValueError, match=r"back: the conversion lost .*experts\.\{0, 1, 2 and 5 more\}"):
        convert_adapter(tmp_path / "stacked", tmp_path / "back", layout="2d")


def test_an_adapter_has_its_base_s_generation_config(tmp_path):
    """Two ends of turn stay two; what the model object says counts only where the base is not at hand."""
    model, _ = adapted("llama", "lora")
    model.generation_config.eos_token_id = 7
    save_tiny_checkpoint(tmp_path / "base", "llama", head_dim=HEAD_DIM)
    ends = {"eos_token_id": [2, 3], "temperature": 0.7}
    for base in (ends, None):
        file = tmp_path / "base/generation_config.json"
        file.write_text(json.dumps(base)) if base else file.unlink()
        out = tmp_path / f"adapter-{base is None}"
        save_adapter(model, out, str(tmp_path / "base"), allow_zero=True)
        if base is None:
            assert not (out / "generation_config.json").exists()
        else:
            assert json.loads((out / "generation_config.json").read_text()) == ends
    save_adapter(model, tmp_path / "elsewhere", "nobody/not-here", allow_zero=True)
    assert json.loads((tmp_path / "elsewhere/generation_config.json").read_text())["eos_token_id"] == 7


# ----------------------------------------------------------------------------------------------------------------------
# Several processes
# ----------------------------------------------------------------------------------------------------------------------


def sharded_worker(rank, port, moe, dense, out):
    """One of two ranks: load, save and a refused save, on an FSDP2 model and then on a ZeRO-3 model."""
    import torch.distributed as dist

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    start_deepspeed_on_cpus()
    fsdp2(rank, moe, out / "fsdp2")
    zero3(dense, out / "zero3")
    dist.barrier()
    dist.destroy_process_group()


def fsdp2(rank, source, out):
    from torch.distributed.fsdp import fully_shard

    model, args = adapted("glm4_moe", "dora")
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    load_adapter(model, source)
    assert bool(adapter_state_dict(model)) == (rank == 0)
    save_adapter(model, out, "tiny", lora_args=args)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).to_local().fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):  # on both ranks, though one of them looked
        save_adapter(model, f"{out}-broken", "tiny")


def zero3(source, out):
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    config = {"train_batch_size": 2, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    model = tiny_model("llama", head_dim=HEAD_DIM)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    keep = HfDeepSpeedConfig(config)  # as the Trainer's: while it lives, PEFT gathers weights that it needs whole
    model = apply_lora(model, LoraArguments(r=8, use_dora=True))
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    assert layer.base_layer.weight.numel() == 0  # partitioned: nothing here but the shard
    with deepspeed.zero.GatheredParameters([layer.base_layer.weight]):
        assert torch.allclose(layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight.norm(dim=1))
    # partitions what was created since, as deepspeed.initialize does
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    assert layer.lora_A["default"].weight.numel() == 0
    load_adapter(model, source)
    save_adapter(model, out, "tiny")
    assert layer.base_layer.weight.numel() == 0 and keep.is_zero3()


def test_sharded_models_are_saved_whole(trained, tmp_path):
    moe, dense = trained("glm4_moe", "dora").directory, trained("llama", "dora").directory
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(sharded_worker, args=(port, moe, dense, tmp_path), nprocs=2)
    for ours, theirs in ((moe, tmp_path / "fsdp2"), (dense, tmp_path / "zero3")):
        ours, theirs = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
        assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not (tmp_path / "fsdp2-broken").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Card, hub, command
# ----------------------------------------------------------------------------------------------------------------------


def test_model_card_has_base_data_arguments_commit_and_scores(trained, tmp_path):
    directory = tmp_path / "outputs" / "ds3-tiny" / "checkpoint-2"
    shutil.copytree(trained("llama", "lora").directory, directory)
    run = {
        "launcher": "ds3-tiny",
        "model": "x/y",
        "commit": "abc123",
        "arguments": {"dataset": "Scicom-intl/Malaysian-Instructions", "learning_rate": 1e-4},
    }
    (directory.parent / "args.json").write_text(json.dumps(run))
    edit_config(directory, base_model_name_or_path="x/y")
    (tmp_path / "scores.txt").write_text("average 71.2 88.1\n")
    adapter.main(["card", str(directory), "--scores", str(tmp_path / "scores.txt")])
    card = (directory / "README.md").read_text()
    for line in (
        "base_model: x/y",
        "- Scicom-intl/Malaysian-Instructions",
        "# ds3-tiny, checkpoint-2",
    ):
        assert line in card.splitlines()
    assert re.search(r"\| learning_rate +\| `0.0001`", card) and re.search(r"\| commit +\| `abc123`", card)
    assert "average 71.2 88.1" in card
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    assert (data.base_model, data.datasets, data.library_name) == (
        "x/y",
        ["Scicom-intl/Malaysian-Instructions"],
        "peft",
    )


def test_model_card_of_a_run_on_files_of_this_machine(trained, tmp_path, monkeypatch, capsys):
    """What only looks like a hub id is not linked there, and only what makes the adapter is told."""
    directory = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(trained("llama", "lora").directory, directory)
    (tmp_path / "outputs/model").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = {
        "dataset": f"data,{tmp_path}/gone.jsonl,owner/set",
        "seed": 7,
        "max_steps": 3,
        "neftune_noise_alpha": None,
    }
    arguments |= {"hub_strategy": "every_save", "output_dir": str(directory.parent), "gradient_checkpointing": False}
    (directory.parent / "args.json").write_text(json.dumps({"launcher": "ds3-tiny", "arguments": arguments}))
    edit_config(directory, base_model_name_or_path="outputs/model")
    adapter.main(["card", str(directory)])
    assert capsys.readouterr().out == f"wrote {directory}/README.md\n"
    from huggingface_hub import ModelCard

    card = ModelCard((directory / "README.md").read_text())
    assert card.data.base_model is None and card.data.datasets == ["owner/set"]
    assert "adapter of outputs/model.\n" in card.text and "huggingface.co" not in card.text
    names = re.findall(r"(?m)^\| ([a-z_]+) +\| `", card.text)
    assert names == ["rank", "alpha", "dataset", "max_steps", "seed"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_while_the_tokenizer_is_saved_is_said(trained, tmp_path, monkeypatch):
    """The real error: tokenizers raises a plain Exception."""
    run = trained("llama", "lora")
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda _: tokenizer.backend_tokenizer.save("/dev/full"))
    with pytest.raises(ValueError, match=r"a\.tmp: the tokenizer cannot be written \(No space left") as caught:
        save_adapter(run.model, tmp_path / "a", run.base, tokenizer)
    assert disk_is_full(caught.value) and not (tmp_path / "a").exists()


def test_a_card_on_a_full_disk_leaves_the_one_that_is_there(trained, tmp_path, monkeypatch):
    directory = trained("llama", "lora").copy(tmp_path)
    (directory / "README.md").write_text("mine")

    def full(self, text):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit, match=f"^error: {directory}: the disk is full"):
        adapter.main(["card", str(directory)])
    assert (directory / "README.md").read_text() == "mine" and not list(directory.glob("*.tmp"))


def test_push_dry_run_lists_what_would_be_sent(trained, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, *args, **kwargs: calls.append(("create", args, kwargs))
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **kwargs: calls.append(("upload", kwargs)))
    directory = trained("llama", "lora").copy(tmp_path)
    (directory / "optimizer.pt").write_bytes(b"state")
    adapter.main(["push", str(directory), "someone/adapter", "--dry_run"])
    printed = capsys.readouterr().out
    assert (
        "someone/adapter/adapter_model.safetensors" in printed
        and "dry run: nothing was sent" in printed
        and "optimizer.pt" not in printed
    )
    assert calls == []
    adapter.main(["push", str(directory), "someone/adapter", "--private"])
    assert calls[0] == ("create", ("someone/adapter",), {"private": True, "exist_ok": True})
    sent = calls[1][1]["allow_patterns"]
    assert "adapter_model.safetensors" in sent and "README.md" in sent and "optimizer.pt" not in sent
    truncate(directory)
    with pytest.raises(SystemExit, match="error: .*truncated"):
        adapter.main(["push", str(directory), "someone/adapter"])
    assert len(calls) == 2


def test_push_without_a_network_is_one_line(trained, tmp_path, monkeypatch):
    import httpx
    import huggingface_hub

    def unreachable(self, *args, **kwargs):
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    with pytest.raises(SystemExit, match=r"^error: someone/adapter: the hub cannot be reached \([^\n]+$"):
        adapter.main(["push", str(trained("llama", "lora").copy(tmp_path)), "someone/adapter"])


def test_verify_command_prints_norms_per_layer(trained, capsys):
    run = trained("glm4_moe", "dora")
    capsys.readouterr()  # of its training, where this test is the first that asks for it
    adapter.main(["verify", str(run.directory), "--base", run.base])
    lines = capsys.readouterr().out.splitlines()
    header, first, second = re.split(r"\s{2,}", lines[1]), lines[2].split(), lines[3].split()
    columns = [column.strip() for column in header if column.strip()]
    assert (first[0], second[0]) == ("0", "1") and len(first) == len(second) == len(columns)
    B = load_file(run.directory / WEIGHTS)["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    assert float(second[columns.index("q_proj")]) == pytest.approx(1e4 * B.square().mean().sqrt().item(), abs=0.006)
    assert first[columns.index("expert up_proj")] == "-" and second[columns.index("expert up_proj")].count("/") == 2
    assert "sound, 38 weights adapted" in lines[-1]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the following arguments are required: command"),
        (["mend"], "argument command: invalid choice: 'mend'"),
        (["merge", "a", "b", "c", "--worker", "2"], "unknown flag --worker: did you mean --workers?"),
        (["merge", "a", "b", "c", "--workers", "-3"], "--workers -3: expected a positive number"),
        (["merge", "a", "b", "c", "--workers", "x"], "argument --workers: invalid int value: 'x'"),
        (["verify", "a", "--allow", "x"], "unknown flag --allow"),
        (["verify"], "the following arguments are required: directory"),
    ],
)
def test_commands_that_cannot_be_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        adapter.main(words)
    assert str(stopped.value).startswith(f"error: {message}") and "\n" not in str(stopped.value)
    assert capsys.readouterr() == ("", "")
