"""The table over all launchers; README's table and the launchers' headers are what it plans."""

import re
from pathlib import Path

import pytest

import plan
from conftest import CONFIGS
from malaysian_sft import plan_table
from malaysian_sft.account import GIB
from malaysian_sft.plan_page import PlanArguments

ROOT = Path(__file__).parents[1]
LAUNCHERS = sorted(ROOT.glob("ds3-*.sh")) + sorted(ROOT.glob("fsdp2-*.sh"))


@pytest.fixture(scope="module")
def plans():
    """What --all plans on the hardware that README takes; it loads the trainers, so once for all tests here."""
    return [
        plan_table.plan_launcher(path, plan_table.HARDWARE, PlanArguments(), CONFIGS["Qwen3-32B"].parent)
        for path in LAUNCHERS
    ]


def test_readme_and_headers_are_what_is_planned(plans):
    """Else: python3 plan.py --all --write --configs tests/configs."""
    written = plan_table.written(plans, ROOT)
    assert {path.name for path in written} == {"README.md", *(path.name for path in LAUNCHERS)}
    for path, text in written.items():
        assert text == path.read_text(), f"{path.name}: run `python3 plan.py --all --write --configs tests/configs`"


def test_a_launcher_is_planned_by_its_own_flags(plans):
    by_name = {rows[0]["launcher"]: rows for rows in plans}
    assert len(by_name) == 7
    (dora,) = [rows for name, rows in by_name.items() if "dora" in name]
    assert dora[0]["plan"]["use_dora"] and dora[0]["epochs"] == 3 and dora[0]["plan"]["r"] == 256
    dense = by_name["ds3-qwen3-32b-lora-256.sh"]
    assert dense[0]["plan"]["kind"] == "dense" and dense[0]["plan"]["zero3"] and dense[0]["plan"]["accumulation"] == 4
    large = by_name["fsdp2-fused-moe-Qwen3-235B-A22B-lora-256.sh"]
    one, roomy, two = large
    assert not one["plan"]["fits"] and one["time"] is None
    assert roomy["plan"]["fits"] and roomy["time"]["device"] == "NVIDIA H200" and not roomy["flags"]
    # its header says so: two nodes of 80 GB hold it together
    assert two["plan"]["fits"] and "--shard_nodes 2" in two["flags"]
    assert plan_table.first_that_fits(large) is roomy


def test_the_table_has_what_was_planned(plans):
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
    compared = plan_table.comparison(plans)
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
    for path in LAUNCHERS:
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "README.md").write_text(f"before\n{plan_table.BEGIN}\nold\n{plan_table.END}\nafter\n")
    mine = tmp_path / LAUNCHERS[0].name
    mine.write_text(re.sub(r"# Planned for .*", "# Measured: 9 hours.", mine.read_text()))
    other = tmp_path / LAUNCHERS[1].name
    other.write_text(re.sub(r"# Planned for .*", "# Planned for a toaster. Measured: not yet.", other.read_text()))
    written = plan_table.written(plans, tmp_path)
    assert written[mine] == mine.read_text() and written[other] == LAUNCHERS[1].read_text()
    text = written[tmp_path / "README.md"]
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    (tmp_path / "README.md").write_text("no table\n")
    with pytest.raises(ValueError, match="README.md: no table between"):
        plan_table.written(plans, tmp_path)


def test_bad_input_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "ds3-mine.sh"
    broken.write_text("echo nothing starts >&2; exit 3\n")
    with pytest.raises(ValueError, match="ds3-mine.sh: nothing starts"):
        plan_table.launched_words(broken)
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
        (["--all", "--r=8"], "unrecognized arguments: --r=8"),
        (["--all", "--r", "8"], "got 8, --all"),
    ],
)
def test_flags_that_do_not_go_together(words, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan.py", *words])
    with pytest.raises(SystemExit):
        plan.parse()
    assert message in capsys.readouterr().err
