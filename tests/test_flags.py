"""Command lines that no program can follow: one line that names the flag, before anything is read or written."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import pytest

CASES = {
    "malaymmlu": {
        "--samplez 3": "unknown flag --samplez: did you mean --samples?",
        "--top-pp=0.5": "unknown flag --top-pp: did you mean --top_p?",
        "--sample 3": "unknown flag --sample: did you mean --samples?",
        "--zzz": "unknown flag --zzz: --help lists those that there are",
        "--samples abc": "argument --samples: invalid int value: 'abc'",
        "--protocol foo": "argument --protocol: invalid choice: 'foo' (choose from 'reasoning', 'first_token')",
        "--top_p 7": "--top_p 7.0: expected a number above 0 and up to 1",
        "--top_p 0": "--top_p 0.0: expected a number above 0 and up to 1",
        "--top_k -5": "--top_k -5: expected a number of at least -1; -1 and 0 take all tokens",
        "--temperature -1": "--temperature -1.0: expected a number of at least 0",
        "--temperature nan": "--temperature nan: expected a number of at least 0",
        "--samples 0": "--samples 0: expected a positive number",
        "--retries -1": "--retries -1: expected a number of at least 0",
        "--gpu_memory_utilization 3": "--gpu_memory_utilization 3.0: expected a number above 0 and up to 1",
        "--hang_timeout inf": "--hang_timeout inf: expected a positive number",
        "--max_model_len 100": "--max_model_len 100: expected more than --max_tokens 4096, for the question",
    },
    "calculate_malaymmlu": {
        "--patern x": "unknown flag --patern: did you mean --pattern?",
        "": "the following arguments are required: --pattern",
        "--pattern x --audit -1": "--audit -1: expected a number of at least 0",
        "--pattern x --seed -1": "--seed -1: expected a number of at least 0 and less than 2^32",
    },
    "plan": {
        "--all --gpus 0": "--gpus 0: expected a positive number",
        "--all --gpus -8": "--gpus -8: expected a positive number",
        "--all --nodes 0": "--nodes 0: expected a positive number",
        "--all --gpu_memory nan": "--gpu_memory nan: expected a positive number",
        "--all --reserve -1": "--reserve -1.0: expected a number of at least 0",
    },
    "multipack": {"--datasett x": "unknown flag --datasett: did you mean --dataset?"},
    "train_moe": {"--learning-rat 3": "unknown flag --learning-rat: did you mean --learning_rate?"},
    "train_dense": {
        "--sav_steps 3": "unknown flag --sav_steps: did you mean --save_steps?",
        "--model_name_or_path x --ddp_timeout 0": "--ddp_timeout 0: expected a positive number",
    },
}


@pytest.mark.parametrize("program", CASES)
def test_one_line_names_the_flag(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(program)
    for words, line in CASES[program].items():
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *words.split()])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == f"error: {line}"
    assert list(tmp_path.iterdir()) == []


def test_what_is_right_is_taken(monkeypatch):
    from malaymmlu import Arguments, check_arguments
    from malaysian_sft.flags import parse_flags

    words = "--base x --top-p 1 --top_k -1 --temperature 0 --retries=0 --max_tokens 10 --max_model_len 11 --serve_lora"
    (args,) = parse_flags(Arguments, words.split())
    check_arguments(args)
    assert (args.top_p, args.top_k, args.temperature, args.serve_lora) == (1.0, -1, 0.0, True)


def fields_of(*groups):
    """{flag: its default} of dataclasses."""
    return {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for group in groups
        for field in dataclasses.fields(group)
    }


def test_the_page_of_flags_is_that_of_the_trainers():
    import train_dense
    import train_moe

    moe = fields_of(train_moe.TrainingArguments, train_moe.DataArguments, train_moe.LoraArguments)
    ours = train_dense.DenseTrainingArguments
    dense = fields_of(train_dense.ModelArguments, train_dense.DataArguments, train_dense.LoraArguments, ours)
    text = (Path(__file__).parents[1] / "docs" / "flags.md").read_text(encoding="utf-8")
    parts = re.split(r"^(?:## |Refused)", text, flags=re.MULTILINE)[1:]
    found = [
        set(re.findall(r"`--(\w+)[^`]*`(?=[^|]*\|)", re.sub(r"^\| ([^|]*\|).*", r"\1", part, flags=re.M)))
        for part in parts
    ]
    only_moe, only_dense, refused, other = found
    assert only_moe == moe.keys() - dense.keys()
    assert only_dense == ours.__annotations__.keys() - moe.keys()
    assert refused == train_dense.NOT_HERE.keys()
    differ = {name for name in moe.keys() & dense.keys() if moe[name] != dense[name]}
    assert other >= differ and other <= moe.keys() & dense.keys()
