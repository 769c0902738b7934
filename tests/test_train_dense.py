"""train_dense.py, run as users run it: against a plain loop without packing, on two ranks under ZeRO-3, killed and
resumed."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import multipack
import train_dense
from conftest import save_tiny_checkpoint, tiny_config, tiny_model, tiny_tokenizer
from malaysian_sft.adapter_state import adapter_state_dict, save_adapter
from malaysian_sft.conversations import DataArguments
from malaysian_sft.lora import LoraArguments, apply_lora
from malaysian_sft.run import claim
from malaysian_sft.verify import verify_adapter

ROOT = Path(__file__).parent.parent
STEPS_AN_EPOCH = 12  # of 4 packs; many and quick, so that a kill lands in the middle
STEPS = 2 * STEPS_AN_EPOCH
# fp32, so that what is compared is arithmetic, not rounding; a short warm-up, so that the learning rate moves
FLAGS = (
    "--max_seq_length 256 --global_batch_size 4 --lora_r 4 --bf16 False --report_to none --warmup_steps 2"
    " --learning_rate 3e-3 --num_train_epochs 2 --activations none --preprocessing_num_workers 1 --seed 3"
).split()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tiny Llama checkpoint, conversations of very different lengths, an odd number of packs."""
    root = tmp_path_factory.mktemp("dense")
    save_tiny_checkpoint(root / "model", "llama")
    tiny_config("qwen3_moe").save_pretrained(root / "moe")
    with open(root / "train.jsonl", "w") as f:
        for i in range(95):
            question = f"Soalan {i}: berapakah {i} tambah {i * 3}?"
            answer = f"Jawapannya ialah {i * 4}. " + "Kira dengan teliti. " * (i % 5)
            f.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return root


def command(workspace, name, *extra, processes=1, torchrun=False, script=ROOT / "train_dense.py"):
    launcher = (
        f"-m torch.distributed.run --nproc_per_node {processes} --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:0".split()
    )
    return [
        sys.executable,
        *(launcher if torchrun or processes > 1 else []),
        str(script),
        *(
            "--model_name_or_path",
            str(workspace / "model"),
            "--dataset",
            str(workspace / "train.jsonl"),
            "--run_name",
            name,
        ),
        *("--data_cache", str(workspace / "cache")),
        *FLAGS,
        *extra,
    ]


def run(workspace, name, *extra, **launch):
    """Run to the end and return (log records by step, adapter tensors by checkpoint step)."""
    done = subprocess.run(
        command(workspace, name, *extra, **launch),
        cwd=workspace,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = workspace / "outputs" / name
    # results are judged, not the exit code alone: two-process runs abort now and then after all work is done
    assert (output / f"checkpoint-{STEPS}").is_dir(), done.stdout[-2000:] + done.stderr[-4000:]
    return read_log(output), read_adapters(output)


def read_log(output):
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert not any("train_loss" in r for r in records), "a resumed run divides its own losses by all steps"
    steps = {r["step"]: r for r in records if "loss" in r}
    assert len(steps) == sum("loss" in r for r in records), "a step is logged twice"
    return steps


def read_adapters(output):
    return {int(d.name.split("-")[1]): load_file(d / "adapter_model.safetensors") for d in output.glob("checkpoint-*")}


@pytest.fixture(scope="module")
def unbroken(workspace):
    return run(workspace, "unbroken")


def assert_same_adapter(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.fixture(scope="module")
def plain_loop(workspace):
    """Two epochs of PyTorch on one document at a time, nothing packed: (loss by step, gradient norm by step, adapter).

    A step's loss is the sum of its documents' token losses over the number of supervised tokens in all of them.
    """
    from transformers import set_seed

    data_args = DataArguments(
        dataset=str(workspace / "train.jsonl"),
        max_seq_length=256,
        data_cache=str(workspace / "cache"),
        preprocessing_num_workers=1,
    )
    packs = multipack.prepare(data_args, tiny_tokenizer(), str(workspace / "model"), seed=3)
    assert math.ceil(len(packs) / 4) == STEPS_AN_EPOCH and len(packs) % 4, "the test wants a short last step"
    model = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32, attn_implementation="eager")
    set_seed(3)
    model = apply_lora(model, LoraArguments(r=4))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 2, (STEPS - s) / (STEPS - 2)))
    losses, norms = {}, {}
    for epoch in range(2):
        packs.set_epoch(epoch)
        order = [packs[i] for i in range(len(packs))]
        for first in range(0, len(order), 4):
            documents = [d for pack in order[first : first + 4] for d in pack]
            count = sum(int((d["labels"][1:] != -100).sum()) for d in documents)
            step = len(losses) + 1
            losses[step] = 0.0
            for d in documents:
                logits = model(input_ids=d["input_ids"][None]).logits[0, :-1]
                loss = torch.nn.functional.cross_entropy(logits, d["labels"][1:], reduction="sum") / count
                loss.backward()
                losses[step] += loss.item()
            norms[step] = torch.nn.utils.clip_grad_norm_(trainable, 1.0).item()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return losses, norms, adapter_state_dict(model)


def test_equals_a_plain_loop_without_packing(unbroken, plain_loop):
    (log, adapters), (losses, norms, tensors) = unbroken, plain_loop
    assert log.keys() == losses.keys() == set(range(1, STEPS + 1))
    rates = {step: 3e-3 * min(step / 2, (STEPS - step + 1) / (STEPS - 2)) for step in log}
    assert {step: record["learning_rate"] for step, record in log.items()} == pytest.approx(rates)
    for step in log:
        assert log[step]["loss"] == pytest.approx(losses[step], rel=2e-4), step
        assert log[step]["grad_norm"] == pytest.approx(norms[step], rel=2e-3), step
    assert_same_adapter(adapters[STEPS], tensors, rtol=2e-3, atol=2e-4)


WITH_LIGER = """
import torch, train_dense
linear = torch.nn.Linear.forward

def all_but_the_head(self, hidden):
    assert self.out_features != 320, "logits of all positions"
    return linear(self, hidden)

torch.nn.Linear.forward = all_but_the_head
post_init = train_dense.DenseTrainingArguments.__post_init__

def with_liger(self):  # on a CPU its kernels run only in Triton's interpreter, and of them only this one
    post_init(self)
    self.use_liger_kernel = True
    off = dict.fromkeys(("rope", "rms_norm", "swiglu", "cross_entropy"), False)
    self.liger_kernel_config = {**off, "fused_linear_cross_entropy": True}

train_dense.DenseTrainingArguments.__post_init__ = with_liger
train_dense.main()
"""


def test_ligers_loss_equals_the_plain_loop(workspace, plain_loop):
    losses, norms, _ = plain_loop
    script = workspace / "with_liger.py"
    script.write_text(WITH_LIGER)
    arguments = command(workspace, "liger", "--max_steps", "3", script=script)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=workspace, env=env, capture_output=True, text=True, timeout=900)
    log = read_log(workspace / "outputs/liger")
    assert log.keys() == {1, 2, 3}, done.stderr[-3000:]
    for step in log:
        assert log[step]["loss"] == pytest.approx(losses[step], rel=2e-4), step
        assert log[step]["grad_norm"] == pytest.approx(norms[step], rel=2e-3), step


def test_bf16_does_not_need_an_autocast_around_the_model(workspace):
    """DeepSpeed's engine turns one off on a GPU, and the fp32 adapters would meet bf16 activations in an error."""
    model_args = SimpleNamespace(model_name_or_path=str(workspace / "model"), model_revision=None)
    choices = dict(activations="none", frugal_layers=0, fast_parts=True)
    training_args = SimpleNamespace(bf16=True, seed=0, deepspeed=None, **choices)
    model = train_dense.build_model(model_args, LoraArguments(r=4), training_args)
    ids = torch.arange(3, 12)[None]
    batch = multipack.collate([[{"input_ids": ids[0], "labels": ids[0]}]])
    with torch.autocast("cpu", enabled=False):
        logits = model(**batch).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dora", [False, True])
def test_bf16_on_a_gpu_follows_the_plain_fp32_loop(workspace, plain_loop, dora):
    """ZeRO-3, Liger's fused cross entropy and variable-length attention in bf16. DoRA starts at the same function as
    LoRA."""
    log, adapters = run(
        workspace,
        f"gpu-{dora}",
        "--bf16",
        "True",
        "--deepspeed",
        str(ROOT / "ds3.json"),
        "--use_dora",
        str(dora),
        torchrun=True,
    )
    losses, _, tensors = plain_loop
    for step in [1, 2] if dora else losses:
        # roundings add up from step to step: on an H100 all within 1 % up to step 19, and 1.1 % at step 20
        assert log[step]["loss"] == pytest.approx(losses[step], rel=1e-2 if step <= STEPS_AN_EPOCH else 3e-2), step
    assert adapters[STEPS].keys() >= tensors.keys()


WAITING = """
import time, train_dense
get_batch_samples = train_dense.DenseTrainer.get_batch_samples

def wait_for_the_kill(self, *args):
    while self.state.global_step == {step}:
        time.sleep(1)
    return get_batch_samples(self, *args)

train_dense.DenseTrainer.get_batch_samples = wait_for_the_kill
train_dense.main()
"""


def kill_with_all_it_started(process):
    """kill -9. Workers of torchrun have sessions of their own: a kill of its process group would leave them
    training."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()  # first, so that it starts nothing in place of what dies
    for each in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    assert not psutil.wait_procs(started, timeout=60)[1]


@pytest.mark.parametrize(("processes", "resumed"), [(1, 2), (2, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_killed_and_resumed_equals_unbroken(workspace, unbroken, processes, resumed):
    """kill -9 after the first epoch's checkpoint; `--resume` must go on with the same batches to the same numbers.

    The unbroken run is one process that accumulates, so this also shows that two ranks under ZeRO-3 equal one.
    """
    name = f"killed-{processes}-{resumed}"
    zero3 = {1: [], 2: ["--deepspeed", str(ROOT / "ds3.json")]}
    output, script = workspace / "outputs" / name, workspace / "waiting.py"
    script.write_text(WAITING.format(step=STEPS - 1))  # so that no kill comes too late, however busy the machine is
    extensions = workspace / name
    process = subprocess.Popen(
        command(workspace, name, *zero3[processes], processes=processes, script=script),
        cwd=workspace,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TORCH_EXTENSIONS_DIR": str(extensions),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 600
    try:
        while not (output / f"checkpoint-{STEPS_AN_EPOCH}").exists():
            assert process.poll() is None and time.time() < deadline, "the run ended before its first checkpoint"
            time.sleep(0.01)
    finally:
        kill_with_all_it_started(process)
    assert not extensions.exists(), "compiled under a lock that a kill leaves behind, and every later run waits for"
    assert not (output / f"checkpoint-{STEPS}").exists()
    # as if the last checkpoint had been cut short: an adapter without a trainer's state is passed over, and written
    # again
    shutil.copytree(output / f"checkpoint-{STEPS_AN_EPOCH}", output / f"checkpoint-{STEPS}")
    (output / f"checkpoint-{STEPS}/trainer_state.json").unlink()
    log, adapters = run(workspace, name, "--resume", *zero3[resumed], processes=resumed)
    tolerance = 1e-4
    for step in range(1, STEPS + 1):
        assert log[step]["loss"] == pytest.approx(unbroken[0][step]["loss"], rel=tolerance), step
        assert log[step]["grad_norm"] == pytest.approx(unbroken[0][step]["grad_norm"], rel=10 * tolerance), step
        assert log[step]["learning_rate"] == pytest.approx(unbroken[0][step]["learning_rate"]), step
    for step, expected in unbroken[1].items():
        assert_same_adapter(adapters[step], expected, rtol=1e-3, atol=1e-4)
        assert verify_adapter(output / f"checkpoint-{step}", workspace / "model") == []


@pytest.fixture
def main(workspace, monkeypatch):
    """train_dense.main in this process, which starts in a second and not in ten: main(run name, *flags)."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(workspace)

    def main(name, *flags):
        monkeypatch.setattr(sys, "argv", command(workspace, name, *flags)[1:])
        train_dense.main()

    yield main
    signal.signal(signal.SIGTERM, handler)


def test_stopped_in_the_middle_of_an_epoch_and_resumed_equals_unbroken(workspace, unbroken, main, monkeypatch):
    """SIGTERM in the second epoch saves after the step; `--resume` goes on in the middle of that epoch's order."""
    stop_in, output = STEPS_AN_EPOCH + 5, workspace / "outputs/stopped"
    get_batch_samples = train_dense.DenseTrainer.get_batch_samples

    def told(self, *args):
        if self.state.global_step == stop_in - 1:
            signal.raise_signal(signal.SIGTERM)
        return get_batch_samples(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_dense.DenseTrainer, "get_batch_samples", told)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            main("stopped")
    # told before the step's first micro-batch: it is dropped after that
    assert max(read_log(output)) == stop_in - 1 and sorted(read_adapters(output)) == [STEPS_AN_EPOCH, stop_in - 1]
    main("stopped", "--resume")
    log = read_log(output)
    for step in range(1, STEPS + 1):
        for key in ("loss", "grad_norm", "learning_rate", "tokens"):
            assert log[step][key] == pytest.approx(unbroken[0][step][key], rel=1e-4), (step, key)
    assert_same_adapter(read_adapters(output)[STEPS], unbroken[1][STEPS], rtol=1e-3, atol=1e-4)


def test_existing_run_is_not_overwritten(workspace, unbroken):
    done = subprocess.run(command(workspace, "unbroken"), cwd=workspace, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"checkpoint-{STEPS} exists: pass --resume" in done.stderr.splitlines()[-1]
    assert len(read_log(workspace / "outputs/unbroken")) == STEPS


def test_weights_that_a_checkpoint_lacks_are_not_made_up(workspace, main):
    shutil.copytree(workspace / "model", workspace / "incomplete")
    path = workspace / "incomplete" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="incomplete: the checkpoint has no model.layers.1.mlp.up_proj.weight"):
        main("incomplete", "--model_name_or_path", str(workspace / "incomplete"))


def test_two_runs_do_not_share_a_directory(workspace, main):
    output = workspace / "outputs/shared"
    with claim(output), pytest.raises(SystemExit, match="error: .*shared: another process is training there"):
        main("shared", "--max_steps", "1")
    assert [path.name for path in output.iterdir()] == [".lock"]
    main("shared", "--max_steps", "1")
    with claim(output):
        assert len(read_log(output)) == 1


def test_another_base_is_not_resumed(workspace, unbroken, main):
    shutil.copytree(workspace / "model", workspace / "other")
    for path in (workspace / "other").glob("*.safetensors"):
        save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(
        SystemExit, match="error: --resume: base .*other.* is not that of .*another base model's adapter"
    ):
        main("unbroken", "--resume", "--model_name_or_path", str(workspace / "other"))


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("--seed 4", "seed is 4,"),
        ("--global_batch_size 8", "global_batch_size is 8,"),
        ("--r 8", "r is 8,"),
        ("--lora_alpha 3", "lora_alpha is 3,"),
        ("--use_dora True", "use_dora is True,"),
        # would not be used: the scheduler comes back with the one that it was saved with
        ("--learning_rate 0.5", "learning_rate is 0.5,"),
        ("--weight_decay 0.5", "weight_decay is 0.5,"),
        ("--warmup_steps 7", "warmup_steps is 7,"),
        ("--max_grad_norm 2.0", "max_grad_norm is 2.0,"),
        (f"--max_steps {STEPS + 1}", f"total_steps is {STEPS + 1},"),
        ("--num_train_epochs 3", f"total_steps is {3 * STEPS_AN_EPOCH},"),
    ],
)
def test_another_run_is_not_resumed(main, unbroken, monkeypatch, flags, fault):
    def no_further(*_):
        raise ValueError("taken for the same run")

    monkeypatch.setattr("train_dense.refuse_another_base", no_further)  # what is looked at next
    with pytest.raises(SystemExit, match=f"error: --resume: {fault} but .*position.json says"):
        main("unbroken", "--resume", *flags.split())
    with pytest.raises(SystemExit, match="taken for the same run"):
        main(
            "unbroken",
            "--resume",
            "--lora_alpha",
            "8",
            "--num_train_epochs",
            "1",
            "--max_steps",
            str(STEPS),
            "--save_steps",
            "7",
        )


@pytest.mark.parametrize(
    ("processes", "liger"), [(1, False), (1, True), pytest.param(2, False, marks=pytest.mark.slow)]
)
def test_validation_loss_is_that_of_the_held_out_documents(workspace, processes, liger):
    """After a step that hardly moves: the base model's loss. Two ranks are under ZeRO-3."""
    name, zero3 = f"validation-{processes}-{liger}", ["--deepspeed", str(ROOT / "ds3.json")] if processes == 2 else []
    script = workspace / "with_liger.py" if liger else ROOT / "train_dense.py"
    (workspace / "with_liger.py").write_text(WITH_LIGER)
    arguments = command(
        workspace,
        name,
        "--validation_share",
        "0.2",
        "--max_steps",
        "1",
        "--learning_rate",
        "1e-12",
        *zero3,
        processes=processes,
        script=script,
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | ({"TRITON_INTERPRET": "1"} if liger else {})
    done = subprocess.run(arguments, cwd=workspace, env=env, capture_output=True, text=True, timeout=900)
    log = (workspace / "outputs" / name / "log.jsonl").read_text().splitlines()
    [found] = [record["validation_loss"] for record in map(json.loads, log) if "validation_loss" in record]
    data_args = DataArguments(
        str(workspace / "train.jsonl"), max_seq_length=256, data_cache=str(workspace / "cache"), validation_share=0.2
    )
    packs = multipack.prepare(data_args, tiny_tokenizer(), str(workspace / "model"), seed=3)
    assert len(packs.validation) % 2, "the test wants a rank without a pack"
    model = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32, attn_implementation="eager")
    total = count = 0
    for document in (document for pack in packs.validation for document in pack):
        logits, labels = model(input_ids=document["input_ids"][None]).logits[0, :-1], document["labels"][1:]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    assert found == pytest.approx(total / count, rel=1e-5), done.stderr[-3000:]


def test_every_so_many_steps_are_saved_and_every_epoch(workspace, main):
    main("often", "--save_steps", "5", "--max_steps", str(STEPS_AN_EPOCH + 1))
    saved = {int(path.name.split("-")[1]) for path in (workspace / "outputs" / "often").glob("checkpoint-*")}
    wanted = {step for step in range(1, STEPS_AN_EPOCH + 2) if step % 5 == 0}
    assert saved == wanted | {STEPS_AN_EPOCH, STEPS_AN_EPOCH + 1}


def test_validation_and_saving_are_no_part_of_a_step_s_speed(workspace, main, monkeypatch):
    late = [0.0]

    def slow(function):
        def call(*args, **options):
            late[0] += 1000
            return function(*args, **options)

        return call

    monkeypatch.setattr("train_dense.save_adapter", slow(save_adapter))
    monkeypatch.setattr(torch.nn.Module, "eval", slow(torch.nn.Module.eval))  # called where validation begins
    monkeypatch.setattr(train_dense, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0]))
    main("slow", "--validation_share", "0.2", "--save_strategy", "steps", "--save_steps", "1")
    log = read_log(workspace / "outputs/slow")
    assert late[0] > 1000 * len(log) and all(
        record["tokens"] / record["tokens_per_second"] < 1000 for record in log.values()
    )


def test_magnitudes_of_dora_are_not_decayed():
    model = apply_lora(tiny_model("llama"), LoraArguments(r=4, use_dora=True))
    trainer = train_dense.DenseTrainer.__new__(train_dense.DenseTrainer)
    decayed = set(trainer.get_decay_parameter_names(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    magnitudes = {name for name in trained if "magnitude" in name}
    assert magnitudes and trained - decayed == magnitudes


def used(*_, **__):
    raise ValueError("got as far as the data")


@pytest.fixture
def call(workspace, monkeypatch):
    """train_dense.main in this process, up to the data: call(*flags)."""
    monkeypatch.setattr(multipack, "prepare", used)

    def call(*flags):
        monkeypatch.setattr(
            sys, "argv", command(workspace, "planned", "--output_dir", str(workspace / "planned"), *flags)[1:]
        )
        train_dense.main()

    return call


def test_dry_run_prints_the_plan_and_loads_nothing(call, workspace, capsys):
    call("--dry_run", "True")
    printed = capsys.readouterr().out
    assert "No GPU here: planned for 1 of 80 GiB" in printed and "llama, LoRA r 4" in printed
    assert "--activations none --per_device_train_batch_size 1" in printed
    call("--dry_run", "True", "--prepare_only", "True")  # what a launcher starts first
    assert capsys.readouterr().out == printed and not (workspace / "planned").exists()


def test_a_run_that_cannot_fit_is_refused_before_loading(call, monkeypatch, capsys):
    memory = [4.0001]  # 4 are reserved
    monkeypatch.setattr("train_dense.this_machine", lambda: {"gpus": 1, "nodes": 1, "gpu_memory_gib": memory[0]})
    with pytest.raises(SystemExit, match=r"error: .* GiB a GPU are needed.*Largest: \w.*--ignore_plan True"):
        call("--bf16", "True")
    with pytest.raises(SystemExit, match="got as far as the data"):
        call("--bf16", "True", "--ignore_plan", "True")
    assert "are needed" in capsys.readouterr().err
    memory[0] = 80.0
    with pytest.raises(SystemExit, match="got as far as the data"):
        call("--bf16", "True")
    captured = capsys.readouterr()
    assert "GiB of 80.0 a GPU planned" in captured.out and captured.err == ""


def test_measured_is_printed_beside_planned_once(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 22 * 2**30)
    trainer = SimpleNamespace(planned={"peak_bytes": 20 * 2**30}, gemm_flops=791.52e12)
    for _ in range(2):
        train_dense.DenseTrainer.compare_with_plan(trainer)
    first, second = capsys.readouterr().out.splitlines()
    assert "792 TFLOP/s" in first and "measured 22.00 GiB, planned 20.00 GiB" in second


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--global_batch_size", "0"], "--global_batch_size"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model_name_or_path", "./no-such-model"], "no-such-model"),
        (["--resume", "--run_name", "never-started"], "--resume: no run under"),
        (
            ["--model_name_or_path", "moe", "--prepare_only", "True"],
            "qwen3_moe has routed experts: train it with train_moe.py",
        ),
        (["--no_such_flag", "1"], "no_such_flag"),
    ],
)
def test_mistakes_are_one_line(main, flags, message):
    with pytest.raises(SystemExit) as ended:
        main("mistake", *flags)
    assert isinstance(ended.value.code, str) and ended.value.code.startswith("error: ")
    assert message in ended.value.code and "\n" not in ended.value.code
