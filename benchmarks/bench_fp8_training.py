"""Training in FP8 beside bf16: the losses of train_moe.py on a slice of a model, three times from the same weights.

    python3 benchmarks/bench_fp8_training.py [--model qwen3-30b-a3b --layers 4 --steps 200]     one Hopper GPU
    python3 benchmarks/bench_fp8_training.py --model small --steps 3 --tokens 64                anywhere, no record

The slice is the first layers of a published model with random weights, written as a checkpoint; the data are the
repository's conversations. Its runs differ in --base_dtype and --expert_arithmetic alone: bf16, experts stored in FP8,
experts that compute in FP8. Random weights know no language, so the curves say whether training follows bf16's, not
what a score loses. Prints a table and one JSON line, appends to results/fp8_training.json, and draws the curves to
results/fp8_training.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import bench_train_moe  # noqa: E402 (the repository root must be on the path first)
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from malaysian_sft.run import git_commit  # noqa: E402
from malaysian_sft.tables import text_table  # noqa: E402

SETTINGS = {
    "bf16": [],
    "fp8-storage": ["--base_dtype", "fp8"],
    "fp8-arithmetic": ["--base_dtype", "fp8", "--expert_arithmetic", "fp8"],
}
# the smallest that experts in FP8 compute with
SMALL = bench_train_moe.MODELS["tiny"][1] | dict(hidden_size=128, moe_intermediate_size=128)


def parse():
    parser = argparse.ArgumentParser(description="Losses in FP8 beside bf16's.")
    parser.add_argument("--model", default="qwen3-30b-a3b", help="of bench_train_moe.MODELS, or small")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the slice")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=8192, help="of a pack")
    parser.add_argument("--packs", type=int, default=2, help="of a step")
    parser.add_argument("--r", type=int, default=256)
    parser.add_argument("--learning_rate", default="1e-4")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="comma-separated")
    parser.add_argument("--out", default=str(ROOT / "results" / "fp8_training.json"))
    parser.add_argument("--plot", default=None, help="draw the records of --out to this PNG, and stop")
    return parser.parse_args()


def write_slice(directory, args):
    """A checkpoint of random bf16 weights and a tokenizer of bytes."""
    from conftest import tiny_tokenizer

    bench_train_moe.MODELS["small"] = ("Qwen3MoeConfig", SMALL)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = bench_train_moe.make_config(args.model, args.layers)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)


def write_data(directory, args):
    """The repository's conversations as often as all steps need them: an epoch's end would save a checkpoint."""
    files = sorted((ROOT / "data" / "conversations").glob("*.jsonl"))
    size = sum(file.stat().st_size for file in files)  # a byte is a token at most
    times = 2 * args.steps * args.packs * args.tokens // size + 1
    Path(directory).mkdir()
    for file in files:
        Path(directory, file.name).write_text((file.read_text(encoding="utf-8").rstrip() + "\n") * times)


def train(base, directory, name, args):
    """Run the trainer under one setting; its log's records."""
    command = [
        sys.executable, "train_moe.py", "--run_name", name, "--model_name_or_path", base,
        "--output_dir", Path(directory, name), "--dataset", Path(directory, "data"), "--max_seq_length", args.tokens,
        "--global_batch_size", args.packs, "--r", args.r, "--learning_rate", args.learning_rate, "--warmup_steps", 10,
        "--num_train_epochs", 1, "--max_steps", args.steps, "--save_steps", args.steps, "--report_to", "none",
        "--activations", "none", *SETTINGS[name],
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    with open(Path(directory, name, "log.jsonl")) as log:
        return [record for record in map(json.loads, log) if "loss" in record]


def summary(losses, reference):
    """What a table says of a curve beside bf16's."""
    last = losses[-20:]
    found = {"mean_loss": statistics.fmean(losses), "mean_loss_of_the_last_20_steps": statistics.fmean(last)}
    if reference:
        apart = [abs(a - b) / b for a, b in zip(losses, reference, strict=True)]
        found["median_relative_difference_of_a_step"] = statistics.median(apart)
        found["largest_relative_difference_of_a_step"] = max(apart)
    return {key: round(value, 5) for key, value in found.items()}


def draw(records, path):
    """PNG: the losses of the last run of each setting, and how far they are from bf16's, step by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = {record["setting"]: record for record in records}
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    for number, (name, record) in enumerate(last.items()):
        steps = range(1, record["steps"] + 1)
        above.plot(steps, record["losses"], color=f"C{number}", linewidth=1.2, label=name, alpha=0.8)
        if name != "bf16":
            apart = [100 * (a / b - 1) for a, b in zip(record["losses"], last["bf16"]["losses"], strict=True)]
            below.plot(steps, apart, color=f"C{number}", linewidth=1.0, label=name)
    above.set_ylabel("loss")
    above.set_title(f"{record['model']}, {record['layers']} layers, random weights, LoRA of rank {record['r']}")
    below.set_ylabel("% from bf16's loss")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    figure.savefig(path, dpi=130)


def main():
    args = parse()
    if args.plot:
        return draw(json.loads(Path(args.out).read_text()), args.plot)
    cuda = torch.cuda.is_available()
    records, reference = [], None
    with tempfile.TemporaryDirectory() as work:
        base = str(Path(work, "base"))
        write_slice(base, args)
        write_data(Path(work, "data"), args)
        for name in args.settings.split(","):
            steps = train(base, work, name, args)
            losses = [step["loss"] for step in steps]
            records.append(
                {
                    "setting": name,
                    **{key: getattr(args, key) for key in ("model", "layers", "tokens", "packs", "r", "learning_rate")},
                    "steps": len(losses),
                    **summary(losses, reference),
                    "losses": losses,
                    "grad_norms": [step["grad_norm"] for step in steps],
                    "device": torch.cuda.get_device_name() if cuda else "cpu",
                    "versions": {p: bench_train_moe.version(p) for p in ("torch", "triton", "transformers")},
                    "commit": git_commit(),
                    "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                }
            )
            reference = reference or losses
    columns = [key for key in records[-1] if key.startswith(("mean_loss", "median", "largest"))]
    rows = {record["setting"]: [str(record.get(key, "")) for key in columns] for record in records}
    print(text_table(pd.DataFrame.from_dict(rows, orient="index", columns=columns)))
    if cuda:
        out = Path(args.out)
        before = json.loads(out.read_text()) if out.exists() else []
        out.write_text(json.dumps(before + records, indent=1) + "\n")
    print(json.dumps(records))


if __name__ == "__main__":
    main()
