"""Files that others wrote, mutated: one clear line or the right values, never a traceback, a hang or other values."""

import argparse
import contextlib
import copy
import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import malaymmlu
import multipack
from conftest import save_tiny_checkpoint, tiny_model, tiny_tokenizer
from malaysian_sft.account import architecture
from malaysian_sft.adapter_files import Adapter
from malaysian_sft.adapter_state import save_adapter
from malaysian_sft.base_model import hub_commit, load_config, load_tokenizer
from malaysian_sft.contamination import overlaps
from malaysian_sft.conversations import DataArguments
from malaysian_sft.convert import convert_adapter
from malaysian_sft.generations import find_directories, read_answers
from malaysian_sft.lora import CONFIG, MANIFEST, WEIGHTS, LoraArguments, apply_lora
from malaysian_sft.merge import merge_adapter
from malaysian_sft.questions import load_questions
from malaysian_sft.run import write_arguments
from malaysian_sft.safetensors_files import checkpoint_shards, read_header, read_sources, writing
from malaysian_sft.verify import verify_adapter

VALUES = [None, True, -1, 0, 1, 3, 2**40, 10**18, 0.5, float("nan"), "", "x", "../x", "/etc/passwd", "a" * 300]
VALUES += [[], {}, [1], ["q_proj"], [[]], {"a": 1}, {"(": 1}, {"a": "b"}, [None] * 3]


def places(value, path=()):
    """Every place in a JSON value: the keys and indices that lead there."""
    yield path
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))


def mutated(value, draw):
    """A copy of a JSON value with one to three places replaced, removed or added to."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        *path, last = draw.choice([place for place in places(value) if place] or [("new",)])
        parent = value
        for key in path:
            parent = parent[key]
        how = draw.random()
        if how < 0.15 and isinstance(parent, dict):
            del parent[last]
        elif how < 0.25 and isinstance(parent, dict):
            parent[draw.choice(["new", "quantization_config", "auto_map", "rope_scaling", "text_config"])] = (
                draw.choice(VALUES)
            )
        else:
            parent[last] = copy.deepcopy(draw.choice(VALUES))
    return value


def broken(text, draw):
    """Text with a piece cut out, doubled or overwritten."""
    at, size = draw.randrange(len(text)), draw.randrange(1, 40)
    return draw.choice([text[:at], text[:at] + text[at + size :], text[:at] + "[" * draw.choice([1, 9999]) + text[at:]])


def one_line(call):
    """What `call` gives, or None where it raises ValueError with a message of one line."""
    try:
        return call()
    except ValueError as error:
        assert str(error).strip() and "\n" not in str(error), str(error)
        return None


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("doors")
    save_tiny_checkpoint(root / "model", "llama")
    model = apply_lora(tiny_model("llama"), LoraArguments(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(model, root / "adapter", str(root / "model"))
    return root


def test_configs(files, tmp_path):
    original = json.loads((files / "model" / "config.json").read_text())
    draw, read = random.Random(0), 0
    for i in range(1000):
        text = json.dumps(mutated(original, draw)) if i % 5 else broken(json.dumps(original), draw)
        (tmp_path / "config.json").write_text(text)
        config = one_line(lambda: load_config(tmp_path))
        if config is not None:
            read += one_line(lambda config=config: architecture(config)) is not None
    assert read > 100, "most keys may have other values"


def test_a_config_that_brings_code_is_refused_without_a_question(files, tmp_path, monkeypatch):
    shutil.copytree(files / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    with pytest.raises(ValueError, match="code that comes with it, which is not run"):
        load_config(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


def test_indices(files, tmp_path):
    names = list(load_file(files / "model" / "model.safetensors"))
    original = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    shutil.copy(files / "model" / "model.safetensors", tmp_path)
    draw = random.Random(1)
    for i in range(1000):
        text = json.dumps(mutated(original, draw)) if i % 5 else broken(json.dumps(original), draw)
        (tmp_path / "model.safetensors.index.json").write_text(text)
        for shard in one_line(lambda: checkpoint_shards(tmp_path)) or ():
            assert shard.parent == tmp_path, "a file elsewhere"
        one_line(lambda: read_sources(tmp_path))


def test_headers(files, tmp_path):
    """Every header that is read gives each tensor as many bytes as its dtype and shape say, inside the file."""
    content = (files / "adapter" / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    draw, path = random.Random(2), tmp_path / "a.safetensors"
    for i in range(1000):
        text = json.dumps(mutated(header, draw)) if i % 5 else broken(json.dumps(header), draw)
        size = len(text.encode()) if i % 7 else draw.choice([0, 3, 2**40, 2**63])
        path.write_bytes(size.to_bytes(8, "little") + text.encode() + data)
        found = one_line(lambda: read_header(path))
        for info in found[0].values() if found else ():
            begin, end = info["data_offsets"]
            assert 0 <= begin <= end <= len(data)


def test_a_dtype_that_is_not_the_bytes_own_is_refused(tmp_path):
    save_file({"w": torch.ones(4, 6)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content.replace(b'"F32"', b'"F16"'))
    with pytest.raises(ValueError, match=r"its header says of w F16 \[4, 6\], which is 48 bytes, at \[0, 96\]"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", [CONFIG, MANIFEST])
def test_adapters(files, tmp_path, name):
    shutil.copytree(files / "adapter", tmp_path / "adapter")
    original = json.loads((files / "adapter" / name).read_text())
    draw = random.Random(3)
    for i in range(1000):
        text = json.dumps(mutated(original, draw)) if i % 5 else broken(json.dumps(original), draw)
        (tmp_path / "adapter" / name).write_text(text)
        one_line(lambda: Adapter(tmp_path / "adapter").check())
        if i % 20 == 0:
            assert all("\n" not in fault for fault in verify_adapter(tmp_path / "adapter", files / "model"))


def test_what_the_evaluation_reads(tmp_path):
    """Question files, args.json, generations.jsonl, generation_config.json, adapter_config.json and training data."""
    row = {"id": 1, "prompt": "Apa?\nA. x\nB. y", "options": ["A. x", "B. y"], "num_options": 2, "key": "A"}
    row |= {"category": "STEM", "subject": "Sains", "level": "x"}
    (tmp_path / "q.json").write_text(json.dumps([row]))
    questions, run = load_questions(tmp_path / "q.json"), tmp_path / "out/malaymmlu-x"
    run.mkdir(parents=True)
    checkpoint = tmp_path / "runs/x/checkpoint-5"
    checkpoint.mkdir(parents=True)
    asked = argparse.Namespace(protocol="reasoning", max_tokens=9)
    settings = {"names": ["x"], "samples": 1, "protocol": "reasoning", "retries": 0, "adapter": None, "seed": 0}
    record = {"index": 0, "id": 1, "sample": 0, "text": "Jawapan: A", "finish_reason": "stop", "completion_tokens": 1}
    doors = {
        "q.jsonl": (row, lambda: load_questions(tmp_path / "q.jsonl")),
        "data.jsonl": (row, lambda: overlaps(questions, str(tmp_path / "data.jsonl"))),
        "out/malaymmlu-x/args.json": (settings, lambda: find_directories("malaymmlu-*", tmp_path / "out")),
        "out/malaymmlu-x/generations.jsonl": (record, lambda: read_answers(run, questions)),
        "generation_config.json": (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
            lambda: malaymmlu.sampling_settings(asked, tmp_path),
        ),
        "runs/x/checkpoint-5/adapter_config.json": (
            {"peft_type": "LORA", "base_model_name_or_path": "b", "r": 8, "use_dora": False},
            lambda: malaymmlu.find_checkpoints(tmp_path / "runs", ["x-*"]),
        ),
    }
    (run / "generations.jsonl").write_text(json.dumps(record) + "\n")
    draw = random.Random(5)
    for name, (original, door) in doors.items():
        read = 0
        for i in range(300):
            text = json.dumps(mutated(original, draw)) if i % 5 else broken(json.dumps(original), draw)
            (tmp_path / name).write_text(text + "\n")
            read += one_line(door) is not None
        assert 0 < read < 300, name
        (tmp_path / name).write_text(json.dumps(original) + "\n")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("target_modules", "(", r"target_modules has '\(', which is no regular expression"),
        ("exclude_modules", "[", "exclude_modules has"),
        ("layers_to_transform", "x", "layers_to_transform is 'x'; expected numbers of layers"),
        ("layers_to_transform", [0, None], "layers_to_transform is"),
        ("layers_pattern", 3, "layers_pattern is '3'; expected names"),
        ("layers_pattern", "layers", "layers_pattern goes with layers_to_transform"),
    ],
)
def test_layers_that_peft_could_not_match(files, tmp_path, key, value, message):
    directory = shutil.copytree(files / "adapter", tmp_path / "adapter")
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | {key: value}))
    [fault] = verify_adapter(directory, files / "model")
    with pytest.raises(ValueError, match=f"{CONFIG}: {message}"):
        merge_adapter(files / "model", directory, tmp_path / "out")
    assert message[:6] in fault and not (tmp_path / "out").exists()


def test_tensors_that_overlap_are_refused(files, tmp_path):
    """The header's total and each tensor's size are right; two tensors share their bytes."""
    directory = shutil.copytree(files / "adapter", tmp_path / "adapter")
    content = (directory / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    ordered = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    first, other = next(
        (a, b) for a in ordered for b in ordered[1:-1] if a < b and header[a]["shape"] == header[b]["shape"]
    )
    header[other]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    [fault] = verify_adapter(directory, files / "model")
    assert f"{WEIGHTS}: damaged (" in fault
    with pytest.raises(ValueError, match=f"{WEIGHTS}: damaged"):
        merge_adapter(files / "model", directory, tmp_path / "out")


@pytest.mark.parametrize("text", ["[" * 100_000, "\xff", "{"])
def test_a_base_whose_config_is_not_json_is_not_merged(files, tmp_path, text):
    base = shutil.copytree(files / "model", tmp_path / "model")
    (base / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json: not JSON .*; download the base again"):
        merge_adapter(base, files / "adapter", tmp_path / "out")


def test_tokenizers(files, tmp_path):
    shutil.copytree(files / "model", tmp_path / "model")
    draw = random.Random(4)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        original = json.loads((files / "model" / name).read_text())
        for i in range(60):
            text = json.dumps(mutated(original, draw)) if i % 5 else broken(json.dumps(original), draw)
            (tmp_path / "model" / name).write_text(text)
            one_line(lambda: load_tokenizer(tmp_path / "model"))
        shutil.copy(files / "model" / name, tmp_path / "model")


@pytest.mark.parametrize("raised, passes", [(Exception("no\nvocabulary"), False), (MemoryError(), True)])
def test_a_tokenizer_s_file_is_at_fault_or_the_code(raised, passes, monkeypatch):
    """tokenizers raises Exception itself for a file; what else goes wrong is not the file's fault."""

    def broken(*args, **kwargs):
        raise raised

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", broken)
    with pytest.raises(MemoryError if passes else ValueError, match=None if passes else r"x: no tokenizer .*\(no\)$"):
        load_tokenizer("x")


def test_others_may_read_what_is_saved(files):
    assert (files / "adapter" / WEIGHTS).stat().st_mode & 0o777 == (files / "adapter" / CONFIG).stat().st_mode & 0o777


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_by_whatever_writes(tmp_path):
    """Real errors: of Python's file and of NumPy's tofile."""

    def python():
        with open("/dev/full", "wb") as file:
            file.write(bytes(1 << 20))

    def numpy():
        with open("/dev/full", "wb", 0) as file:
            np.zeros(1 << 20, np.int64).tofile(file)

    for write in (python, numpy):
        with pytest.raises(ValueError, match=f"{tmp_path}: the disk is full"), writing(tmp_path):
            write()
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        open(tmp_path / "not there")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB, empty."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a disk needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_said_and_nothing_half_is_left(files, small_disk, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"input": "Ali makan nasi. " * 20, "output": "Ya."}) + "\n")
    rows = (tmp_path / "train.jsonl").read_text() * 200
    (tmp_path / "train.jsonl").write_text(rows)
    data_args = DataArguments(dataset=str(tmp_path / "train.jsonl"), data_cache=str(small_disk / "cache"))
    (small_disk / "others").write_bytes(bytes(48 << 10))
    for write in (
        lambda: merge_adapter(files / "model", files / "adapter", small_disk / "merged", log=lambda _: None),
        lambda: convert_adapter(files / "adapter", small_disk / "stacked", layout="stacked"),
        lambda: multipack.prepare(data_args, tiny_tokenizer(), "model"),
    ):
        with pytest.raises(ValueError, match=f"{small_disk}.*: the disk is full; nothing was changed"):
            write()
        left = [path.name for path in small_disk.rglob("*") if path.is_file() and path.stat().st_size > 100]
        assert left == ["others"]


def test_a_disk_without_a_byte_for_the_cache_s_lock_is_named(small_disk, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"input": "Ali makan nasi.", "output": "Ya."}\n')
    with contextlib.suppress(OSError), open(small_disk / "others", "wb", 0) as file:
        while file.write(bytes(4096)):
            pass
    data_args = DataArguments(dataset=str(tmp_path / "train.jsonl"), data_cache=str(small_disk))
    with pytest.raises(ValueError, match=f"^{small_disk}: the disk is full"):
        multipack.prepare(data_args, tiny_tokenizer(), "model")


def test_the_hub_s_commit_of_a_base_is_recorded(tmp_path, monkeypatch):
    """As the hub's client lays out its cache: refs/<revision> names a directory under snapshots/."""
    import huggingface_hub.constants

    repository, commit = tmp_path / "models--owner--name", "0123456789abcdef" * 2 + "01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub_commit("owner/name") == commit == hub_commit("owner/name", commit)
    assert hub_commit("owner/other") is None and hub_commit("owner/name", "v2") is None
    assert hub_commit(str(repository / "snapshots" / commit)) is None, "a directory"
    arguments = {"run_name": "x", "model_name_or_path": "owner/name", "output_dir": str(tmp_path / "run")}
    write_arguments(arguments, {"data": "abc"}, None, 1, {"owner/data/default": commit})
    record = json.loads((tmp_path / "run/args.json").read_text())
    assert record["model_commit"] == commit and record["dataset_commits"] == {"owner/data/default": commit}
