"""Packing speed and fill: multipack.pack on documents whose lengths are log-normal, mean 700 tokens, in packs of
16,384.

    python3 benchmarks/bench_multipack.py [--documents 1000000] [--repeats 7]

Checks the packs first (every document once, none over-full, no more packs than a plain first-fit decreasing finds on a
part), then times pack() on one core. The first call, which compiles or loads the compiled loop, is timed apart. Prints
a table and one JSON line, and appends the record to results/multipack.json.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from malaysian_sft.run import git_commit  # noqa: E402
from multipack import pack  # noqa: E402 (the repository root must be on the path first)


def log_normal_lengths(count: int, mean: float, sigma: float, longest: int, seed: int = 0) -> np.ndarray:
    """`count` document lengths in tokens, int64, log-normal with the given mean before clipping to 1..longest."""
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(draws.round(), 1, longest).astype(np.int64)


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> int:
    """The number of packs by the textbook's loop: O(documents * packs), so for a part of the documents only."""
    room = np.zeros(0, dtype=np.int64)
    for length in np.sort(lengths)[::-1]:
        fitting = np.flatnonzero(room >= length)
        if len(fitting):
            room[fitting[0]] -= length
        else:
            room = np.append(room, capacity - length)
    return len(room)


def next_fit(lengths: np.ndarray, capacity: int) -> int:
    """The number of packs when documents are taken in order and a pack is closed at the first that does not fit."""
    packs, room = 0, 0
    for length in lengths.tolist():
        if length > room:
            packs, room = packs + 1, capacity
        room -= length
    return packs


def check(lengths: np.ndarray, capacity: int) -> None:
    """Raise SystemExit when packs are wrong or worse than first-fit decreasing."""
    packs = pack(lengths, capacity, seed=1)
    members = np.concatenate([np.array(documents) for documents in packs])
    if not np.array_equal(np.sort(members), np.arange(len(lengths))):
        sys.exit("error: a document is missing from the packs, or in two of them")
    if max(int(lengths[documents].sum()) for documents in packs) > capacity:
        sys.exit("error: a pack is over-full")
    part = lengths[:20_000]
    found, reference = len(pack(part, capacity)), first_fit_decreasing(part, capacity)
    if found > reference:
        sys.exit(f"error: {found} packs, where first-fit decreasing needs {reference}")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def versions() -> str:
    numba = importlib.metadata.version("numba") if importlib.util.find_spec("numba") else "not installed"
    return f"python {platform.python_version()}, numpy {np.__version__}, numba {numba}"


def one_core() -> None:
    """Keep to one core where the system allows it, so that no library's threads help."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--mean", type=float, default=700)
    parser.add_argument("--sigma", type=float, default=0.9, help="spread of the logarithm of the length")
    parser.add_argument("--max_seq_length", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    one_core()
    lengths = log_normal_lengths(args.documents, args.mean, args.sigma, args.max_seq_length)
    start = time.perf_counter()
    pack(lengths[:10], args.max_seq_length)
    first_call = time.perf_counter() - start
    check(lengths, args.max_seq_length)

    seconds = []
    for seed in range(args.repeats):
        start = time.perf_counter()
        packs = pack(lengths, args.max_seq_length, seed=seed)
        seconds.append(time.perf_counter() - start)
    fill = float(lengths.sum() / (len(packs) * args.max_seq_length))
    in_order = float(lengths.sum() / (next_fit(lengths, args.max_seq_length) * args.max_seq_length))

    record = {
        "benchmark": "multipack",
        "device": cpu_name(),
        "cores": 1,
        "versions": versions(),
        "commit": git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "documents": args.documents,
        "mean_length": float(lengths.mean()),
        "sigma": args.sigma,
        "max_seq_length": args.max_seq_length,
        "packs": len(packs),
        "fill": fill,
        "fill_next_fit": in_order,
        "repeats": args.repeats,
        "seconds_median": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "seconds_first_call": first_call,
    }
    print(" documents  mean tokens    packs    fill %  next fit %  median s   min s   max s")
    print(
        f"{args.documents:>10,}  {record['mean_length']:>11.1f}  {len(packs):>7,}  {100 * fill:>8.3f} "
        f" {100 * in_order:>10.3f}  {record['seconds_median']:>8.3f}  {min(seconds):>6.3f}  {max(seconds):>6.3f}"
    )
    path = ROOT / "results" / "multipack.json"
    records = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([*records, record], indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
