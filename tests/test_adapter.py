"""adapter.py against PEFT, transformers, vLLM and hand-computed merges; and against the ways adapters get damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapter
import fused_moe_lora
from conftest import save_tiny_checkpoint, tiny_config, tiny_model, tiny_tokenizer

HEAD_DIM = 32  # the least that vLLM's CPU attention takes
CASES = [(family, kind) for family in ("llama", "qwen3_moe", "glm4_moe") for kind in ("lora", "dora")]
PROMPT = list(range(5, 45))
TOLERANCE = 1e-5


def adapted(family, kind, r=8, seed=0, **overrides):
    """A tiny model with LoRA or DoRA everywhere, as the trainers build it."""
    model = tiny_model(family, seed, head_dim=HEAD_DIM, **overrides)
    args = adapter.LoraArguments(r=r, use_dora=kind == "dora")
    if family.endswith("moe"):
        fused_moe_lora.wrap_experts(model, args.expert_rank(model.config), args.expert_alpha(model.config), use_dora=args.use_dora)
    return adapter.apply_lora(model, args), args


def train(model, seed=1, steps=2):
    """Random B and magnitudes far from their start, then a few steps, so that every tensor matters and none is special."""
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
        adapter.save_adapter(self.model, self.directory, self.base, tiny_tokenizer(), self.args)
        self.merged = directory / "merged"
        adapter.merge_adapter(self.base, self.directory, self.merged, log=lambda line: None)

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
    tensors = load_file(directory / adapter.WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / adapter.WEIGHTS)


def edit_config(directory, **changes):
    path = directory / adapter.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ------------------------------------------------------------------------------------------------------------------------------
# Arguments and targets
# ------------------------------------------------------------------------------------------------------------------------------


def test_default_shape_of_the_adapter():
    config = tiny_config("qwen3_moe", num_experts_per_tok=8)
    args = adapter.LoraArguments()
    assert (args.r, args.alpha, args.expert_rank(config), args.expert_alpha(config)) == (256, 512, 32, 64)
    args = adapter.LoraArguments(r=16, lora_alpha=8, expert_r=4)
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
        assert set(adapter.lora_targets(model)) == names
        if family.endswith("moe"):
            fused_moe_lora.wrap_experts(model, 4, 8)
            assert set(adapter.lora_targets(model)) == names


@pytest.mark.parametrize("family", ["glm4_moe", "qwen2_moe"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_apply_lora_trains_the_adapter_in_fp32_and_nothing_else(family, kind):
    model, args = adapted(family, kind, dtype=torch.bfloat16)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "lora_" in name}
    parameters = dict(model.named_parameters())
    assert {parameters[name].dtype for name in trainable} == {torch.float32}
    layers = {name.removeprefix(adapter.PREFIX).split(".lora_A")[0] for name in trainable if ".lora_A." in name}
    assert layers == set(adapter.lora_targets(tiny_model(family, head_dim=HEAD_DIM)))
    assert sum("experts.down_proj_lora_B" in name for name in trainable) == (1 if family == "glm4_moe" else 2)
    name = f"{adapter.PREFIX}model.layers.1.self_attn.q_proj"
    assert parameters[f"{name}.base_layer.weight"].dtype == torch.bfloat16
    assert parameters[f"{name}.lora_A.default.weight"].abs().max() <= 64**-0.5  # Kaiming-uniform with a = sqrt 5 over a fan-in of 64
    assert parameters[f"{name}.lora_A.default.weight"].std().item() == pytest.approx((1 / 3 / 64) ** 0.5, rel=0.1)
    assert not parameters[f"{name}.lora_B.default.weight"].any()
    if kind == "dora":
        norm = parameters[f"{name}.base_layer.weight"].double().norm(dim=1)
        assert torch.allclose(parameters[f"{name}.lora_magnitude_vector.default.weight"].double(), norm, rtol=1e-6)


def test_reset_after_a_meta_device_build():
    with torch.device("meta"):
        model = tiny_model("llama")
    model = adapter.apply_lora(model, adapter.LoraArguments(r=8, use_dora=True))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    adapter.reset_lora_parameters(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, layer.base_layer.weight.norm(dim=1))
    assert not layer.lora_B["default"].weight.any()
    assert layer.lora_A["default"].weight.abs().max() <= 64**-0.5


def test_target_modules_selects_and_refuses_unknown_names():
    model = adapter.apply_lora(tiny_model("llama"), adapter.LoraArguments(r=4, target_modules="q_proj, layers.1.mlp.up_proj"))
    names = {name.split(".lora_A")[0].removeprefix(adapter.PREFIX) for name, _ in model.named_parameters() if ".lora_A." in name}
    assert names == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    with pytest.raises(ValueError, match="--target_modules wq: .*choose from down_proj, gate_proj"):
        adapter.apply_lora(tiny_model("llama"), adapter.LoraArguments(target_modules="wq"))


# ------------------------------------------------------------------------------------------------------------------------------
# Save and load
# ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_saved_names_and_values_are_the_base_checkpoints(trained, family, kind):
    run = trained(family, kind)
    tensors = load_file(run.directory / adapter.WEIGHTS)
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
    assert adapter.verify_adapter(run.directory, run.base) == []
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"} <= set(os.listdir(run.directory))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_load_adapter_restores_the_trained_model(trained, family, kind):
    run = trained(family, kind)
    model, _ = adapted(family, kind)
    assert not torch.allclose(log_probabilities(model), run.truth, atol=0.1)
    adapter.load_adapter(model, run.directory)
    assert torch.equal(log_probabilities(model), run.truth)


def test_load_adapter_refuses_what_does_not_fit(trained, tmp_path):
    directory = trained("llama", "lora").directory
    with pytest.raises(ValueError, match="q_proj.lora_A.weight is .8, 64., the model's is .4, 64."):
        adapter.load_adapter(adapted("llama", "lora", r=4)[0], directory)
    with pytest.raises(ValueError, match="nothing in the model takes 7 modules, first model.layers.1.mlp.down_proj"):
        adapter.load_adapter(adapted("llama", "lora", num_hidden_layers=1)[0], directory)
    with pytest.raises(ValueError, match="no base_model.model.model.layers.2.self_attn.q_proj"):
        adapter.load_adapter(adapted("llama", "lora", num_hidden_layers=3)[0], directory)
    with pytest.raises(ValueError, match="the adapter is LoRA, the model DoRA"):
        adapter.load_adapter(adapted("llama", "dora")[0], directory)
    with pytest.raises(ValueError, match="the adapter is DoRA, the model has no lora_magnitude_vector"):
        adapter.load_adapter(adapted("llama", "lora")[0], trained("llama", "dora").directory)
    copy = trained("llama", "lora").copy(tmp_path)
    edit_config(copy, lora_alpha=8)
    with pytest.raises(ValueError, match="scaling 1, the model has 2"):
        adapter.load_adapter(adapted("llama", "lora")[0], copy)


def test_shared_lora_A_is_saved_under_both_names_and_loads(tmp_path):
    def build():
        model = tiny_model("qwen3_moe")
        fused_moe_lora.wrap_experts(model, 4, 8, shared_A=True)
        return adapter.apply_lora(model, adapter.LoraArguments(r=8))

    model = train(build(), steps=0)
    adapter.save_adapter(model, tmp_path / "a", "tiny")
    tensors = load_file(tmp_path / "a" / adapter.WEIGHTS)
    name = "base_model.model.model.layers.0.mlp.experts.2.{}_proj.lora_A.weight"
    assert torch.equal(tensors[name.format("gate")], tensors[name.format("up")])
    again = build()
    adapter.load_adapter(again, tmp_path / "a")
    assert torch.equal(log_probabilities(again), log_probabilities(model))
    rewrite(tmp_path / "a", lambda tensors: tensors[name.format("up")].mul_(2))
    with pytest.raises(ValueError, match="experts.0.up_proj.lora_A.weight differs from the projection that the model shares it with"):
        adapter.load_adapter(build(), tmp_path / "a")


def test_a_save_that_is_not_sound_raises_and_leaves_no_adapter(tmp_path):
    model, _ = adapted("llama", "lora")
    with pytest.raises(ValueError, match="every lora_B is zero: nothing was trained"):
        adapter.save_adapter(model, tmp_path / "a", "tiny")
    assert not (tmp_path / "a").exists()
    adapter.save_adapter(model, tmp_path / "a", "tiny", allow_zero=True)
    assert adapter.verify_adapter(tmp_path / "a", allow_zero=True) == []
    train(model)
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.lora_B.weight has 1 values that are not finite"):
        adapter.save_adapter(model, tmp_path / "b", "tiny")
    with pytest.raises(ValueError, match="r is 8 in the model but 16 in the arguments"):
        adapter.save_adapter(model, tmp_path / "c", "tiny", lora_args=adapter.LoraArguments(r=16))


def test_a_lost_shard_is_refused_when_saving(tmp_path):
    model, args = adapted("qwen3_moe", "lora")
    tensors = adapter.adapter_state_dict(train(model))
    whole = dict(tensors)
    name = "base_model.model.model.layers.0.mlp.experts.7.down_proj.lora_A.weight"
    tensors[name] = torch.zeros_like(tensors[name])
    with pytest.raises(ValueError, match="experts.7.down_proj.lora_A.weight has rows of zeros"):
        adapter.save_adapter(model, tmp_path / "a", "tiny", tensors=tensors)
    del tensors[name]
    with pytest.raises(ValueError, match="experts.7.down_proj.lora_A.weight is missing"):
        adapter.save_adapter(model, tmp_path / "a", "tiny", tensors=tensors)
    half = {key: value[: len(value) // 2] if "q_proj.lora_B" in key else value for key, value in whole.items()}
    with pytest.raises(ValueError, match="q_proj is for a weight of shape .64, 64., the base has .128, 64."):
        adapter.save_adapter(model, tmp_path / "a", "tiny", tensors=half)
    untrained = {key: torch.zeros_like(value) if "experts" in key and "gate_proj.lora_B" in key else value for key, value in whole.items()}
    with pytest.raises(ValueError, match=r"experts.\*.gate_proj: lora_B is all zeros: it was not trained"):
        adapter.save_adapter(model, tmp_path / "a", "tiny", tensors=untrained)
    one = {key: torch.zeros_like(value) if "experts.3." in key and "lora_B" in key else value for key, value in whole.items()}
    adapter.save_adapter(model, tmp_path / "a", "tiny", tensors=one)  # an expert that the router never chose
    adapter.save_adapter(model, tmp_path / "other", "tiny", tensors={})  # what ranks other than 0 do
    assert not (tmp_path / "other").exists()


def test_saving_over_an_adapter_keeps_what_else_the_directory_holds(trained, tmp_path):
    directory = trained("llama", "lora").copy(tmp_path)
    (directory / "trainer_state.json").write_text("{}")
    model, _ = adapted("llama", "lora")
    adapter.save_adapter(train(model, seed=5), directory, "tiny")
    assert (directory / "trainer_state.json").exists() and not directory.with_name("adapter.tmp").exists()
    assert adapter.verify_adapter(directory) == []
    again, _ = adapted("llama", "lora")
    adapter.load_adapter(again, directory)
    assert torch.equal(log_probabilities(again), log_probabilities(model))


def test_bf16_on_disk_when_asked_for(tmp_path):
    model, _ = adapted("llama", "lora")
    adapter.save_adapter(train(model), tmp_path / "a", "tiny", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a" / adapter.WEIGHTS).values()} == {torch.bfloat16}
    assert adapter.verify_adapter(tmp_path / "a") == []


# ------------------------------------------------------------------------------------------------------------------------------
# PEFT, transformers, vLLM: the same log-probabilities as the trained model
# ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if case[1] == "lora"] + [("llama", "dora"), ("qwen2_moe", "lora")])
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
    tensors = {name: tensor.double() for name, tensor in load_file(run.directory / adapter.WEIGHTS).items()}
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
            llm = LLM(
                job["base"],
                load_format="merge_adapter",
                model_loader_extra_config={"adapter": job["adapter"]},
                tensor_parallel_size=job["tp"],
                **common,
            )
        result = {"log_probabilities": log_probabilities(llm, job["prompt"], **extra)}
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
    done = subprocess.run([sys.executable, script, output, json.dumps(jobs)], env=environment, capture_output=True, text=True, cwd=tmp_path)
    return (json.loads(output.read_text()) if output.exists() else None), done.stdout + done.stderr


def vllm_job(run, name, how="merged", tp=1, check=False):
    return dict(name=name, how=how, base=run.base, adapter=str(run.directory), prompt=PROMPT, tp=tp, check=check)


@pytest.fixture(scope="session")
def vllm_results(trained, tmp_path_factory):
    """All single-process engines in one process, one after another: importing vLLM is most of the time."""
    jobs = [vllm_job(trained(*case), " ".join(case), check=case[0].endswith("moe") and case[1] == "lora") for case in CASES]
    jobs.append(vllm_job(trained("llama", "lora"), "unmerged", how="unmerged"))
    results, log = run_vllm(tmp_path_factory.mktemp("vllm"), jobs, multiprocessing=False)
    assert results is not None, log[-5000:]
    return results


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_merged_while_vllm_loads(trained, vllm_results, family, kind):
    found = torch.tensor(vllm_results[f"{family} {kind}"]["log_probabilities"])
    assert torch.allclose(found, trained(family, kind).truth, atol=TOLERANCE, rtol=0)


def test_vllm_serves_the_unmerged_adapter(trained, vllm_results):
    found = torch.tensor(vllm_results["unmerged"]["log_probabilities"])
    assert torch.allclose(found, trained("llama", "lora").truth, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_vllm_accepts_unmerged_experts(trained, vllm_results, family):
    loras = vllm_results[f"{family} lora"]["check"]
    slots = adapter.Adapter(trained(family, "lora").directory).slots
    assert set(loras) == set(slots)
    assert loras["model.layers.1.mlp.experts.7.gate_proj"] == [[4, 64], [32, 4], 2.0]
    assert loras["model.layers.1.self_attn.q_proj"] == [[8, 64], [128, 8], 2.0]


def test_merged_while_vllm_loads_with_tensor_parallelism(trained, tmp_path):
    jobs = [vllm_job(trained("qwen3_moe", "dora"), "two", tp=2)]
    results, log = run_vllm(tmp_path, jobs, multiprocessing=True)
    assert results is not None, log[-5000:]
    found = torch.tensor(results["two"]["log_probabilities"])
    assert torch.allclose(found, trained("qwen3_moe", "dora").truth, atol=TOLERANCE, rtol=0)
