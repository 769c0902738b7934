"""Planned beside measured after a run, and the plot of runs."""

import json

import pytest
from matplotlib import pyplot

from conftest import CONFIGS
from malaysian_sft import run_plots
from malaysian_sft.account import GIB
from malaysian_sft.plan_page import PlanArguments

FLAGS = dict(
    max_seq_length=16384,
    global_batch_size=8,
    r=256,
    use_dora=False,
    activations="none",
    memory_mode="fast",
    reduce_every_micro_batch=False,
    frugal_layers=0,
    gather_base=False,
    shard_nodes=1,
    model_revision=None,
)


def make_run(folder, name="run", steps=6, **flags):
    """A directory as train_moe.py leaves it: two H200, 3.0 s a step after a slow first one."""
    directory = folder / name
    directory.mkdir()
    args = {"model": "Qwen/Qwen3-30B-A3B-Instruct-2507", "world_size": 2, "nodes": 1, "device": "NVIDIA H200"}
    args |= {"planned_gib": 122.8, "facts": {"total_steps": 10}, "arguments": FLAGS | flags}
    (directory / "args.json").write_text(json.dumps(args))
    lines = []
    for step in range(1, steps + 1):
        seconds = 30.0 if step == 1 else 3.0
        record = {"step": step, "loss": 3.0 - step / 10, "learning_rate": 1e-4 * step, "tokens": 130_000}
        record |= {"tokens_per_second": 130_000 / seconds, "mfu": 0.36, "peak_gib": 120.0 + step / 10}
        record |= {"expert_load_max_over_mean": 1.5}
        lines.append(json.dumps(record))
    (directory / "log.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def test_planned_beside_measured(tmp_path, capsys):
    run = make_run(tmp_path)
    run_plots.compare([run], None, PlanArguments(), CONFIGS["Qwen3-32B"].parent)
    printed = capsys.readouterr().out
    rows = {line[:22].strip(): line[22:].split() for line in printed.splitlines()}
    # the plan is that of results/step.json's record: 122.8 GiB planned there; the whole log's peak was 120.6
    (peak,) = [line.split()[-3:] for line in printed.splitlines() if line.startswith("peak, GiB a GPU")]
    assert peak == ["122.8", "120.6", "-2%"], rows
    (step,) = [line.split()[-3:] for line in printed.splitlines() if line.startswith("a step, seconds")]
    assert step[1] == "3.00" and float(step[0]) == pytest.approx(3.0, rel=0.15)
    (speed,) = [line.split()[-3:] for line in printed.splitlines() if line.startswith("tokens/s a GPU")]
    assert speed[1] == "21,667"  # 130,000 tokens in 3 s on two GPUs; the first steps are not counted
    assert "780,000" in printed and "36.0%" in printed and "2.4000" in printed
    assert (run / "plan.png").stat().st_size > 10_000


def test_a_profile_is_put_beside_the_plan(tmp_path, capsys):
    run = make_run(tmp_path)
    profile = {"components_ms": {"dense products": 141.0, "norms, rotary": 30.0, "copies": 17.0}, "gaps_ms": 80.0}
    (run / "profile.json").write_text(json.dumps([profile | {"communication_not_hidden_ms": 15.2}]))
    run_plots.compare([run], tmp_path / "x.png", PlanArguments(), CONFIGS["Qwen3-32B"].parent)
    printed = capsys.readouterr().out
    (dense,) = [line.split() for line in printed.splitlines() if line.startswith("dense products")]
    assert dense[3] == "141.0" and float(dense[2]) == pytest.approx(141.0, rel=0.1)
    (passes,) = [line.split() for line in printed.splitlines() if line.startswith("element-wise passes")]
    assert passes[3] == "47.0"
    (run / "profile.json").write_text("[1]")
    with pytest.raises(ValueError, match="profile.json: no profile; write it with"):
        run_plots.compare([run], tmp_path / "x.png", PlanArguments(), CONFIGS["Qwen3-32B"].parent)


def test_a_run_whose_model_is_not_at_hand_is_measured_all_the_same(tmp_path, capsys):
    run = make_run(tmp_path)
    run_plots.compare([run], None, PlanArguments(), tmp_path)
    printed = capsys.readouterr().out
    assert "run: not planned anew" in printed and "21,667" in printed


def test_a_run_older_than_a_fact_is_compared(tmp_path, capsys):
    run = make_run(tmp_path)
    args = json.loads((run / "args.json").read_text())
    for name in ("facts", "device", "nodes"):
        del args[name]
    (run / "args.json").write_text(json.dumps(args))
    run_plots.compare([run], None, PlanArguments(device="NVIDIA H200"), CONFIGS["Qwen3-32B"].parent)
    (steps,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("steps")]
    assert steps == ["steps", "6"]


def test_a_dense_run_is_planned_as_one(tmp_path):
    run = make_run(tmp_path)
    args = json.loads((run / "args.json").read_text())
    flags = dict(per_device_train_batch_size=1, deepspeed="ds3.json", activations="full")
    flags |= {name: FLAGS[name] for name in ("max_seq_length", "global_batch_size", "r", "use_dora", "model_revision")}
    args |= {"model": "Qwen/Qwen3-32B", "arguments": flags | {"expert_r": None}}
    (run / "args.json").write_text(json.dumps(args))
    _, plan, time = run_plots.planned_run(run_plots.read_run(run), PlanArguments(), CONFIGS["Qwen3-32B"].parent)
    assert plan["kind"] == "dense" and plan["zero3"] and plan["accumulation"] == 4
    assert plan["peak_bytes"] / GIB == pytest.approx(68.7, rel=0.06)  # results/multi_gpu.json
    assert time["device"] == "NVIDIA H200"


def test_any_number_of_runs_in_one_plot(tmp_path, monkeypatch):
    runs = [make_run(tmp_path, "lora"), make_run(tmp_path, "dora", use_dora=True)]
    record = {"step": 6, "loss": 2.0, "tokens": 1, "tokens_per_second": 1.0, "validation_loss": 2.5}
    (runs[1] / "log.jsonl").open("a").write(json.dumps(record) + '\n{"step": 7, "lo')  # killed while it wrote
    read = [run_plots.read_run(run) for run in runs]
    assert [r["step"] for r in read[1]["steps"]] == [1, 2, 3, 4, 5, 6] and read[1]["steps"][-1]["tokens"] == 1
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    run_plots.draw(read, tmp_path / "both.png")
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert [title.split(",")[0] for title in titles] == [
        "loss (points: validation)",
        "learning rate",
        "tokens/s",
        "peak memory",
        "router load",
    ]
    lines = drawn[0].axes[0].get_lines()
    assert [line.get_linestyle() for line in lines] == ["-", "--", "None"]  # LoRA, DoRA, DoRA's validation
    assert list(lines[0].get_ydata()) == pytest.approx([2.9, 2.8, 2.7, 2.6, 2.5, 2.4])


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("args.json", None, r"args.json: no such file; --compare expects directories of runs"),
        ("args.json", "[]", r"args.json: not what a trainer writes there"),
        ("log.jsonl", None, r"log.jsonl: no such file; the run has not made a step yet"),
        ("log.jsonl", "", r"log.jsonl: no record of a step"),
        ("log.jsonl", '{"step": 1}\n[]\n', r"log.jsonl, line 2: no record of a step; remove the line"),
    ],
)
def test_what_is_no_run_is_named(file, text, message, tmp_path):
    run = make_run(tmp_path)
    (run / file).unlink()
    if text is not None:
        (run / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        run_plots.compare([run])


@pytest.mark.parametrize(
    "file, key, value, message",
    [
        (
            "log.jsonl",
            "tokens_per_second",
            0,
            "log.jsonl, line 1: tokens_per_second is '0', expected a positive number",
        ),
        ("log.jsonl", "tokens_per_second", "fast", "line 1: tokens_per_second is 'fast'"),
        ("log.jsonl", "step", "one", "line 1: step is 'one', expected a positive whole number"),
        ("log.jsonl", "peak_gib", "much", "line 1: peak_gib is 'much', expected a number; put it right or remove"),
        ("log.jsonl", "validation_loss", [], r"line 1: validation_loss is '\[\]'"),
        ("args.json", "world_size", 0, "args.json: world_size is '0', expected a positive whole number; put back"),
        ("args.json", "nodes", "two", "args.json: nodes is 'two'"),
        ("args.json", "facts", 5, "args.json: facts is '5', expected an object"),
        ("args.json", "facts", {"total_steps": "x"}, "args.json, facts: total_steps is 'x'"),
        ("args.json", "model", None, "args.json: model is 'None', expected a name"),
    ],
)
def test_values_that_cannot_be_are_named(file, key, value, message, tmp_path):
    run = make_run(tmp_path, steps=1)
    record = json.loads((run / file).read_text())
    (run / file).write_text(json.dumps(record | {key: value}) + "\n")
    with pytest.raises(ValueError, match=message):
        run_plots.compare([run])


def test_a_run_without_a_flag_is_not_planned_but_measured(tmp_path, capsys):
    run = make_run(tmp_path)
    args = json.loads((run / "args.json").read_text())
    del args["arguments"]["activations"]
    (run / "args.json").write_text(json.dumps(args))
    run_plots.compare([run], None, PlanArguments(), CONFIGS["Qwen3-32B"].parent)
    printed = capsys.readouterr().out
    assert "not planned anew" in printed and "no activations in arguments" in printed and "21,667" in printed


@pytest.mark.parametrize("error", [NotADirectoryError, PermissionError])
def test_a_plot_that_cannot_be_written_is_named(error, tmp_path, monkeypatch, capsys):
    run, path = make_run(tmp_path), "/dev/null/x.png"
    if error is PermissionError:  # the run's own directory is read-only

        def closed(figure, path, **options):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", closed)
        path = None
    with pytest.raises(ValueError, match=r"(x|plan).png: cannot be written \(.+\); name another file with --plot"):
        run_plots.compare([run], path, None, tmp_path)
    assert "21,667" in capsys.readouterr().out
