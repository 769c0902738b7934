"""The table over all launchers; README's table and the launchers' headers are what it plans."""

import json
import re
import sys
from pathlib import Path

import pytest

import plan
import train_dense
import train_moe
from conftest import CONFIGS, LAUNCHERS, launcher_flags
from malaysian_sft import plan_table
from malaysian_sft.account import GIB
from malaysian_sft.plan_page import PlanArguments

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{launcher: its run}, as plan_table.launched_run gives it, by the trainers in this process."""
    found, record = {}, tmp_path_factory.mktemp("runs") / "run.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLAN_RECORD", str(record))
        for path in LAUNCHERS:
            patch.setattr(sys, "argv", ["trainer", *launcher_flags(path), "--dry_run", "True"])
            (train_dense if path.name.startswith("ds3") else train_moe).main()
            found[path] = json.loads(record.read_text())
    return found


@pytest.fixture(scope="module")
def plans(runs):
    """What --all plans on README's hardware, of every launcher whose model's config is in tests/configs."""
    return [planned(path, run) for path, run in runs.items() if run["model"].rpartition("/")[2] in CONFIGS]


def planned(path, run):
    return plan_table.plan_launcher(path, run, plan_table.HARDWARE, PlanArguments(), CONFIGS["Qwen3-32B"].parent)


@pytest.fixture(scope="module")
def in_bf16(runs):
    """The plans of the largest launcher, were its experts in bf16."""
    path = ROOT / "fsdp2-fused-moe-Qwen3-235B-A22B-lora-256.sh"
    run = runs[path]
    assert run["arguments"]["base_dtype"] == "fp8"
    return planned(path, {**run, "arguments": run["arguments"] | {"base_dtype": "none"}})


def test_a_launcher_says_its_run(runs):
    launchers = [ROOT / "fsdp2-fused-moe-Qwen3-30B-A3B-dora-256.sh", ROOT / "ds3-qwen3-32b-lora-256.sh"]
    assert plan_table.launched_runs(launchers) == [runs[path] for path in launchers]


def test_readme_and_headers_are_what_is_planned(plans):
    """Rows of launchers without a config in tests/configs are left to the hub's: `python3 plan.py --all --write`."""
    readme = (ROOT / "README.md").read_text().split(plan_table.BEGIN)[1].split(plan_table.END)[0].splitlines()
    assert [line for line in readme if line.startswith("| launcher")] == [f"| {' | '.join(plan_table.COLUMNS)} |"]
    for rows in plans:
        row = plan_table.first_that_fits(rows)
        assert plan_table.readme_row(row) in readme, "run `python3 plan.py --all --write`"
        text = (ROOT / row["launcher"]).read_text()
        assert plan_table.UNMEASURED_LINE.sub(plan_table.header(row), text) == text, "run `plan.py --all --write`"


def test_a_launcher_is_planned_by_its_own_flags(plans, in_bf16):
    by_name = {rows[0]["launcher"]: rows for rows in plans}
    dora = by_name["fsdp2-fused-moe-Qwen3-30B-A3B-dora-256.sh"]
    assert dora[0]["plan"]["use_dora"] and dora[0]["epochs"] == 3 and dora[0]["plan"]["r"] == 256
    dense = by_name["ds3-qwen3-32b-lora-256.sh"]
    assert dense[0]["plan"]["kind"] == "dense" and dense[0]["plan"]["zero3"] and dense[0]["plan"]["accumulation"] == 4
    large = by_name["fsdp2-fused-moe-Qwen3-235B-A22B-lora-256.sh"]
    assert large[0]["plan"]["fits"] and not large[0]["flags"] and plan_table.first_that_fits(large) is large[0]
    one, roomy, two = in_bf16
    assert not one["plan"]["fits"] and one["time"] is None
    assert roomy["plan"]["fits"] and roomy["time"]["device"] == "NVIDIA H200" and not roomy["flags"]
    # the launcher says so beside the flag: two nodes of 80 GB hold it together
    assert two["plan"]["fits"] and "--shard_nodes 2" in two["flags"]
    assert plan_table.first_that_fits(in_bf16) is roomy


def test_the_table_has_what_was_planned(plans, in_bf16):
    text = plan_table.table([rows[0] for rows in plans])
    for rows in plans:
        (line,) = [line for line in text.splitlines() if line.split()[0] == rows[0]["launcher"].removesuffix(".sh")]
        row = rows[0]
        words = line.split()
        assert words[1] == ("yes" if row["plan"]["fits"] else "no")
        assert f"{row['plan']['peak_bytes'] / GIB:.0f}" in words
        if row["time"]:
            (digits,) = [w for w in words[words.index(f"{row['plan']['peak_bytes'] / GIB:.0f}") + 3 :][:1]]
            assert float(digits.replace(",", "")) == pytest.approx(row["time"]["tokens_per_second"], rel=0.05)
    compared = plan_table.comparison([*plans, in_bf16])
    assert "does not fit" in compared and "2 nodes of 8 x 80 GB" in compared


def test_hours_are_tokens_over_speed(plans):
    for row in (row for rows in plans for row in rows if row["time"]):
        time, gpus = row["time"], row["plan"]["gpus"] * row["plan"]["nodes"]
        assert time["hours"] == pytest.approx(3 * 144e6 / (time["tokens_per_second"] * gpus) / 3600)
        assert time["hours_low"] < time["hours"] < time["hours_high"]
        assert time["mfu"] == pytest.approx(
            row["plan"]["flops_per_token"] * time["tokens_per_second"] / 989.4e12, rel=1e-6
        )


def test_measured_headers_stay(plans, tmp_path):
    planned = [ROOT / rows[0]["launcher"] for rows in plans]
    for path in planned:
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "README.md").write_text(f"before\n{plan_table.BEGIN}\nold\n{plan_table.END}\nafter\n")
    mine = tmp_path / planned[0].name
    mine.write_text(re.sub(r"# Planned for .*", "# Measured: 9 hours.", mine.read_text()))
    other = tmp_path / planned[1].name
    other.write_text(re.sub(r"# Planned for .*", "# Planned for a toaster. Measured: not yet.", other.read_text()))
    written = plan_table.written(plans, tmp_path)
    assert written[mine] == mine.read_text() and written[other] == planned[1].read_text()
    text = written[tmp_path / "README.md"]
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    (tmp_path / "README.md").write_text("no table\n")
    with pytest.raises(ValueError, match="README.md: no table between"):
        plan_table.written(plans, tmp_path)


def test_rates_are_the_repositorys_from_any_directory(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = ROOT / "ds3-qwen3-32b-lora-256.sh"
    rows = planned(path, runs[path])
    assert all(row["time"] for row in rows)
    before = (ROOT / "README.md").read_bytes(), path.read_bytes()
    monkeypatch.setattr(plan_table, "launched_runs", lambda launchers: [runs[path]])
    monkeypatch.setattr(plan_table, "run_time", lambda *args: None)
    with pytest.raises(ValueError, match="ds3-qwen3-32b-lora-256.sh: no hours can be planned.*--write wrote nothing"):
        plan_table.print_all([path], PlanArguments(), CONFIGS["Qwen3-32B"].parent, write=True)
    assert before == ((ROOT / "README.md").read_bytes(), path.read_bytes())


def test_progress_is_on_stderr_alone(runs, monkeypatch, capsys):
    path = ROOT / "ds3-qwen3-32b-lora-256.sh"
    came = []

    def run_of(launcher):
        came.append(capsys.readouterr().err)
        return runs[path]

    monkeypatch.setattr(plan_table, "launched_run", run_of)
    plan_table.print_all([path], PlanArguments(), CONFIGS["Qwen3-32B"].parent)
    out, err = capsys.readouterr()
    assert err.splitlines() == [f"read 1 of 1: {path.name}", f"planned 1 of 1: {path.name}"]
    assert out.startswith("On 8 x 80 GB") and " of 1: " not in out and came == [""]


def test_progress_comes_with_each_result(capsys):
    shown = []

    def results():
        for n in (1, 2):
            shown.append(capsys.readouterr().err)
            yield n

    assert plan_table.told("read", ["x/a.sh", "x/b.sh"], results()) == [1, 2]
    assert shown == ["", "read 1 of 2: a.sh\n"] and capsys.readouterr().err == "read 2 of 2: b.sh\n"


def test_bad_input_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "ds3-mine.sh"
    broken.write_text("echo nothing starts >&2; exit 3\n")
    with pytest.raises(ValueError, match="ds3-mine.sh: nothing starts"):
        plan_table.launched_run(broken)
    broken.write_text("true\n")
    with pytest.raises(ValueError, match="ds3-mine.sh: it plans nothing with --dry_run"):
        plan_table.launched_run(broken)
    with pytest.raises(ValueError, match="ds3-mine.sh: starts neither"):
        plan_table.launched_runs([LAUNCHERS[0], broken])
    with pytest.raises(ValueError, match="Qwen3-32B.json: no such file; --configs DIRECTORY"):
        plan_table.read_config("Qwen/Qwen3-32B", None, tmp_path)
    with pytest.raises(ValueError, match="--write writes what the defaults plan"):
        plan_table.print_all(LAUNCHERS, PlanArguments(gpus=4), write=True)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "expected one of LAUNCHER, --all, --measure and --compare; got none"),
        (["a.sh", "--all"], "expected one of LAUNCHER"),
        (["--all", "--plot", "x.png"], "--plot goes with --compare"),
        (["a.sh", "--write"], "--write goes with --all"),
        (["a.sh", "--configs", "x"], "--configs goes with --all or --compare"),
        (["--all", "--r=8"], "unknown flag --r: did you mean --write?"),
        (["--all", "--r", "8"], "unknown flag --r"),
        (["--all", "--bogus"], "unknown flag --bogus"),
        (["--all", "--gpu", "8"], "unknown flag --gpu: did you mean --gpus"),
        (["--all", "--gpus", "x"], "argument --gpus: invalid int value: 'x'"),
        (["--compare"], "argument --compare: expected at least one argument"),
    ],
)
def test_flags_that_do_not_go_together(words, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan.py", *words])
    with pytest.raises(SystemExit) as stopped:
        plan.main()
    assert str(stopped.value).startswith(f"error: {message}") and "\n" not in str(stopped.value)
    assert capsys.readouterr() == ("", "")
