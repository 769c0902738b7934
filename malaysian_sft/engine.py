"""One engine process: vLLM with a base model and an adapter merged while loading, answering questions that come through
a pipe."""

import hashlib
import json
import os
import signal
import threading
import time
import zlib
from pathlib import Path

from malaysian_sft.extraction import extract

SYSTEM_PROMPT = r"First, you try to think step-by-step in malay, after that, put your final answer within $\boxed{}$."
FIRST_TOKEN_PROMPT = "Berikut adalah soalan aneka pilihan tentang {subject}. Sila berikan jawapan sahaja.\n\n{prompt}"
FIRST_TOKEN_PREFIX = "\nJawapan:"
# vLLM's options that say which weights an engine has, with their defaults
WEIGHTS = {"load_format": "auto", "model_loader_extra_config": {}}
CPU_CACHE_GIB = 2  # vLLM's cache of keys and values on a CPU


def engine_main(pipe, life, log, gpus, config):
    """An engine process: load the model and answer what comes through `pipe`, with one checkpoint's weights after
    another's, until None comes. Dies with the driver.

    It says ("ready", seconds) when a checkpoint's weights are there; ("other", None) when this engine cannot take them;
    ("refused", why) when no engine could.
    """
    os.setsid()  # a process group of its own, so that the driver can end everything vLLM starts
    threading.Thread(target=die_with_driver, args=(life,), daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
    engine_environment(gpus, config)
    llm = options = None
    while config is not None:
        began = time.monotonic()
        try:
            wanted, lora = llm_options(config)
            if llm is None:
                llm = start_vllm(wanted)
            elif not take_weights(llm, options, wanted):
                pipe.send(("other", None))
                return
            options, tokenizer = wanted, llm.get_tokenizer()
            check_template(tokenizer, config)
        except (ValueError, OSError) as error:  # a wrong flag, a bad checkpoint: starting again would not help
            what = f"vLLM cannot load {config['adapter'] or config['model']}: {str(error).strip()[:1500]}"
            pipe.send(("refused", f"{what}\nthe log is {log}"))
            return
        pipe.send(("ready", time.monotonic() - began))
        config = serve(pipe, llm, lora, tokenizer, config)


def die_with_driver(life):
    """Wait for the driver's end of `life` to close, then end the whole process group."""
    try:
        life.recv()
    except (EOFError, OSError):
        os.killpg(os.getpgrp(), signal.SIGKILL)


def engine_environment(gpus, config):
    """Environment of vLLM, set before it is imported. What the user has set stays."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    else:
        threads = max(1, len(os.sched_getaffinity(0)) // (config["engines"] * config["tensor_parallel"]))
        # one process is enough on a CPU, and starts sooner; binding would put two engines onto the same cores
        defaults |= {
            "VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        }
        defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    # never what a shell left behind: args.json has the flag
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(config["batch_invariant"]))
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def start_vllm(options):
    """vllm.LLM with the options of `llm_options`. Raises ValueError if vLLM refuses them."""
    from vllm import LLM

    return LLM(**options)


class WorkerExtension:
    """What vLLM's workers can do besides what they do (its `worker_extension_cls`)."""

    def kernels_with_own_weights(self):
        """Names of the experts' kernels that arrange weights for themselves after loading. vLLM 0.32 has them do so at
        a start and not again at a reload, so that they would compute with weights in the wrong order."""
        from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

        found = set()
        for module in self.get_model().modules():
            kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            if kernel is not None:
                found.add(type(kernel.fused_experts))
        as_loaded = FusedMoEExperts.process_weights_after_loading
        return sorted(kind.__name__ for kind in found if kind.process_weights_after_loading is not as_loaded)


def take_weights(llm, options, wanted):
    """Put other weights of the same model into a running engine, in place: its memory, its compiled code, its CUDA
    graphs stay. The adapter is merged as at a start.

    llm: a vllm.LLM with no unfinished request. options, wanted: the `llm_options` that it has and is to have. Returns
    False, with nothing changed, where it cannot have them. Raises RuntimeError if keys and values of the weights before
    stay in the cache.
    """
    if wanted == options:
        return True  # an adapter that is served comes with each request
    weights = {name: wanted.get(name, default) for name, default in WEIGHTS.items()}
    if wanted | weights != options | weights or any(llm.collective_rpc("kernels_with_own_weights")):
        return False
    llm.collective_rpc("update_config", args=({"load_config": weights},))
    llm.collective_rpc("reload_weights")
    if not llm.reset_prefix_cache():  # they would answer for prompts that begin alike
        raise RuntimeError("vLLM's prefix cache is not empty after new weights")
    return True


def llm_options(config):
    """What vLLM is started with -> (keyword arguments of vllm.LLM, LoRARequest or None)."""
    from transformers import AutoConfig

    base = AutoConfig.from_pretrained(config["model"])
    most = getattr(base.get_text_config(), "max_position_embeddings", None)
    length = config["max_model_len"] or config["sampling"]["max_tokens"] + 4096
    if not config["max_model_len"] and most:
        length = min(length, most)
    options = {
        "model": config["model"],
        "dtype": config["dtype"],
        "max_model_len": length,
        "max_num_seqs": config["max_num_seqs"],
        "tensor_parallel_size": config["tensor_parallel"],
        "gpu_memory_utilization": config["gpu_memory_utilization"],
        "enforce_eager": config["enforce_eager"],
        "enable_prefix_caching": True,
        "worker_extension_cls": "malaysian_sft.engine.WorkerExtension",
        "seed": config["seed"],
    }
    if config["device"] == "cpu":
        # vLLM steps a seeded request's generator back after a partial prefill, which a CPU generator cannot do ("does
        # not use offset"): whole prompts only
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(length, 4096)}
    if config["tensor_parallel"] > 1:
        options["distributed_executor_backend"] = "mp"
    lora = None
    if config["adapter"] and config["serve_lora"]:
        lora = served_lora(config["adapter"], options)
    elif config["adapter"]:
        from malaysian_sft.merge import WIDE, register_vllm_loader  # here, because the driver does without torch

        register_vllm_loader()
        options |= {"load_format": "merge_adapter", "model_loader_extra_config": {"adapter": config["adapter"]}}
        if getattr(base, "quantization_config", None):
            options |= WIDE
    return options, lora


def served_lora(directory, options):
    """Add to `options` what serving a LoRA needs -> LoRARequest. Raises ValueError for DoRA and ranks that vLLM does
    not serve. vLLM takes each module's own alpha / r, and one rank for a projection of a layer's experts."""
    from vllm.lora.request import LoRARequest

    from malaysian_sft.adapter_files import mixed_ranks

    config = json.loads((Path(directory) / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("use_dora"):
        raise ValueError("vLLM does not serve DoRA; leave --serve_lora off and it is merged while loading")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    allowed = next((size for size in (1, 8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), None)
    if allowed is None:
        raise ValueError(f"vLLM serves LoRA up to rank 512, this has {rank}; leave --serve_lora off")
    if config.get("rank_pattern") and (mixed := mixed_ranks(directory)):
        raise ValueError(f"vLLM serves experts of one rank, {mixed}; leave --serve_lora off")
    options |= {"enable_lora": True, "max_lora_rank": allowed, "max_loras": 1}
    path = str(Path(directory).resolve())
    # of one engine's life: vLLM keeps an adapter by its number, and the prefix cache by its name
    return LoRARequest(path, zlib.crc32(path.encode()) + 1, path)


def check_template(tokenizer, config):
    """Raises ValueError if the tokenizer cannot render a conversation."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            "its tokenizer has no chat template; use the instruct model, or put a chat_template.jinja beside it"
        )
    try:
        render(tokenizer, config["questions"][0], config)
    except TemplateError as error:
        raise ValueError(
            f"its chat template refuses the conversation ({error}); a model without a system role needs"
            " --system_prompt ''"
        ) from error


def render(tokenizer, question, config):
    """The prompt of a question as text, by the model's own chat template."""
    suffix = ""
    if config["protocol"] == "first_token":
        text = FIRST_TOKEN_PROMPT.format(subject=question["subject"], prompt=question["prompt"])
        if config["answer_prefix"] == "user":
            text += FIRST_TOKEN_PREFIX
        else:
            suffix = FIRST_TOKEN_PREFIX
        messages = [{"role": "user", "content": text}]
    else:
        messages = [
            {"role": "system", "content": config["system_prompt"]},
            {"role": "user", "content": question["prompt"]},
        ]
        messages = messages if config["system_prompt"] else messages[1:]
    return (
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **config["chat_template_kwargs"]
        )
        + suffix
    )


def sample_seed(seed, index, sample, attempt):
    """A seed for one sample that depends on nothing else, so that a resumed run draws what an unbroken one would have
    drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index} {sample} {attempt}".encode()).digest()[:4], "little") >> 1


def serve(pipe, llm, lora, tokenizer, config):
    """Answer units (question index, sample) continuously: new ones join the running batch while others still write.

    Returns the config of the checkpoint to load next, when the driver sends one, or None when this was the last."""
    from vllm.v1.engine.exceptions import EngineDeadError

    engine, open_units = llm.llm_engine, {}
    told = time.monotonic()
    try:
        while True:
            while pipe.poll(0 if open_units else None):
                kind, content = pipe.recv()
                if kind != "units":
                    return content
                for unit in content:
                    add(engine, open_units, unit, 0, lora, tokenizer, config)
            records = []
            for result in engine.step():
                unit, attempt, thinking, letter_ids = open_units.pop(result.request_id)
                record = make_record(result, unit, attempt, thinking, letter_ids, config)
                if attempt < config["retries"] and not readable(record, config):
                    add(engine, open_units, unit, attempt + 1, lora, tokenizer, config)
                else:
                    records.append(record)
            if records or time.monotonic() - told > 1.0:  # an empty list says that the engine is alive
                told = time.monotonic()
                pipe.send(("records", records))
    except PromptTooLong as error:
        pipe.send(("refused", str(error)))
    except EngineDeadError as error:
        pipe.send(("failed", f"vLLM's engine died: {error}"))
    except EOFError:  # the driver is gone
        pass
    return None


class PromptTooLong(ValueError):
    """A question leaves no room for its answer: a wrong flag, not a failing engine."""


def add(engine, open_units, unit, attempt, lora, tokenizer, config):
    """Hand one sample to vLLM. Raises PromptTooLong naming the question if its prompt leaves no room for the answer."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    index, sample = unit
    question, sampling = config["questions"][index], config["sampling"]
    prompt = render(tokenizer, question, config)
    tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    room = engine.model_config.max_model_len - len(tokens)
    if room < sampling["max_tokens"]:
        raise PromptTooLong(
            f"question {index} (id {question['id']}) has a prompt of {len(tokens)} tokens; with --max_tokens"
            f" {sampling['max_tokens']} that is more than max_model_len {engine.model_config.max_model_len}; lower"
            " --max_tokens or raise --max_model_len"
        )
    extra = {}
    if config["protocol"] == "first_token":
        extra["logprob_token_ids"] = letter_tokens(tokenizer, question["letters"])
    # reasoning ends at a marker that some tokenizers call special: keep it in the text where that is so
    special = {"<think>", "</think>"} & set(tokenizer.all_special_tokens)
    params = SamplingParams(
        **sampling,
        **extra,
        seed=sample_seed(config["seed"], index, sample, attempt),
        skip_special_tokens=not special,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    name = f"{index}-{sample}-{attempt}"
    open_units[name] = unit, attempt, prompt.rstrip().endswith("<think>"), extra.get("logprob_token_ids")
    engine.add_request(name, {"prompt_token_ids": tokens}, params, lora_request=lora)


def letter_tokens(tokenizer, letters):
    """The token a letter ends in when encoded alone, as the official first-token protocol takes it."""
    return [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in letters]


def make_record(result, unit, attempt, thinking, letter_ids, config):
    """vLLM's result -> a line of generations.jsonl."""
    index, sample = unit
    question, output = config["questions"][index], result.outputs[0]
    record = {
        "index": index,
        "id": question["id"],
        "sample": sample,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "prompt_tokens": len(result.prompt_token_ids),
        "completion_tokens": len(output.token_ids),
    }
    if config["protocol"] == "first_token":
        logprobs = {
            letter: output.logprobs[0][token].logprob
            for letter, token in zip(question["letters"], letter_ids, strict=True)
        }
        record |= {"text": max(logprobs, key=logprobs.get), "logprobs": logprobs, "finish_reason": "stop"}
    if attempt:
        record["attempts"] = attempt + 1
    if thinking:
        record["thinking"] = True
    return record


def readable(record, config):
    """Whether an answer can be read out of a record."""
    question = config["questions"][record["index"]]
    return extract(record["text"], question, record["finish_reason"], record.get("thinking", False))[0] == "answered"
