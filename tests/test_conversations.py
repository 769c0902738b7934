"""conversations.py: what each schema becomes, and that no column, split or file is dropped without a word."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from malaysian_sft.conversations import (
    SCHEMAS,
    BadRow,
    DataArguments,
    find_sources,
    parse_json,
    to_conversation,
)

SYSTEM = {"role": "system", "content": "Jawab ringkas."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, reasoning=None):
    return {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})


# row -> the conversation by hand
BECOMES = {
    "input and output": ({"input": "a", "output": "b"}, [user("a"), assistant("b")]),
    "Alpaca": (
        {"instruction": "Terjemah.", "input": "Selamat pagi", "output": "Good morning"},
        [user("Terjemah.\n\nSelamat pagi"), assistant("Good morning")],
    ),
    "Alpaca without input": ({"instruction": "a", "input": "", "output": "b"}, [user("a"), assistant("b")]),
    "context": (
        {"context": "Ali ke pasar.", "question": "Siapa?", "answer": "Ali."},
        [user("Ali ke pasar.\n\nSiapa?"), assistant("Ali.")],
    ),
    "options": (
        {"question": "Ibu negara?", "options": ["A. Ipoh", "B. Kuala Lumpur"], "answer": "B"},
        [user("Ibu negara?\n\nA. Ipoh\nB. Kuala Lumpur"), assistant("B")],
    ),
    "ShareGPT": (
        {"system": "Jawab ringkas.", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [SYSTEM, user("a"), assistant("b")],
    ),
    "messages with a system column": (
        {"system": "Jawab ringkas.", "messages": [user("a"), assistant("b", "c")]},
        [SYSTEM, user("a"), assistant("b", "c")],
    ),
    "an empty system turn": (
        {"messages": [{"role": "system", "content": ""}, user("a"), assistant("b")]},
        [user("a"), assistant("b")],
    ),
    "null columns of a file of several schemas": (
        {"question": None, "answer": None, "instruction": None, "input": "a", "output": "b", "messages": None},
        [user("a"), assistant("b")],
    ),
    "reasoning": (
        {"question": "a", "answer": "b", "reasoning": "c", "system": "Jawab ringkas."},
        [SYSTEM, user("a"), assistant("b", "c")],
    ),
}


@pytest.mark.parametrize("name", BECOMES)
def test_what_a_row_becomes(name):
    row, conversation = BECOMES[name]
    assert to_conversation(row) == conversation


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user("a"), assistant("b")], "tools": ["f"]}, r"columns \['tools'\] have no place"),
        ({"messages": [user("a"), assistant("b")], "reasoning": "c"}, r"columns \['reasoning'\] have no place"),
        ({"question": "a", "answer": "b", "id": 3, "source": "x"}, "leave them out with --ignore_columns id,source"),
        ({"question": "a", "options": "A. x\nB. y", "answer": "b", "key": "A"}, r"columns \['key'\]"),
        ({"question": "a", "options": ["x", ""], "answer": "b"}, "'options' is not a list of non-empty strings"),
        ({"system": "a", "messages": [SYSTEM, user("a"), assistant("b")]}, "which of them is meant"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "is from 'tool'"),
        ({"conversations": [{"from": "human", "value": "a", "weight": 0.5}]}, r"has \['weight'\]"),
        ({"conversations": "a"}, "is str, expected a list"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, r"is from \['human'\], expected one of human"),
    ],
)
def test_nothing_is_dropped_in_silence(row, message):
    with pytest.raises(BadRow, match=message):
        to_conversation(row)


def test_columns_are_left_out_when_asked_for():
    row = {"question": "a", "answer": "b", "id": 3, "weight": 0.5}
    assert to_conversation(row, ignored=frozenset({"id", "weight"})) == [user("a"), assistant("b")]
    assert DataArguments(ignore_columns=" id, weight,").ignored() == {"id", "weight"}


names = sorted({name for schema, others in SCHEMAS.items() for name in (*schema, *others)} | {"id", "tools"})
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=1500, deadline=None)
@given(st.dictionaries(st.sampled_from(names), values, max_size=5) | values)
def test_any_row_is_a_conversation_or_a_bad_row(row):
    """Whatever a row holds: a conversation in which every filled column's text stands, or BadRow."""
    try:
        messages = to_conversation(row)
    except BadRow:
        return
    assert messages[-1]["role"] == "assistant"
    whole = "\n".join(m["content"] + m.get("reasoning_content", "") for m in messages)
    for name, value in row.items():
        if isinstance(value, str) and value.strip() and name != "messages":
            assert value in whole, name


def sources(path, **arguments):
    return [source.name for source in find_sources(DataArguments(dataset=str(path), **arguments))]


def test_a_directory_gives_its_training_split_and_says_what_was_left(tmp_path, capsys):
    for name in ("train.jsonl", "test.jsonl", "validation-00000-of-00001.jsonl", "my_dev.jsonl", "testimoni.jsonl"):
        (tmp_path / name).write_text('{"input": "a", "output": "b"}\n')
    assert sources(tmp_path) == [f"{tmp_path}/testimoni.jsonl", f"{tmp_path}/train.jsonl"]
    said = capsys.readouterr().err
    assert "3 files of other splits than train are not read" in said and "my_dev.jsonl" in said
    assert sources(tmp_path / "test.jsonl") == [f"{tmp_path}/test.jsonl"], "a file that is named is read"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '[{"input": "a"}]', "a JSON list, not one object a line; rename it to a.json"),
        ("a.json", '{\n  "input": "a"\n}\n', "pretty-printed JSON; write one object a line"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.parquet", "PAR1 no more", "not a Parquet file"),
        ("dataset_info.json", "{}", "written by datasets' save_to_disk"),
    ],
)
def test_other_files_are_named_in_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        sources(tmp_path)
    assert "\n" not in str(error.value)


def test_a_parquet_file_damaged_in_the_middle_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    rows = [{"input": f"soalan {i} " * 20, "output": f"jawapan {i * 7919}"} for i in range(4000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="snappy", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[100:4000] = bytes(3900)
    path.write_bytes(content)
    [source] = find_sources(DataArguments(dataset=str(path)))
    with pytest.raises(ValueError, match="d.parquet: damaged after row"):
        list(source.rows())


def test_rows_of_json_are_read_by_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input": "a", "output": "b"}\n\n{"input": "c", "output": "d"}\n')
    [source] = find_sources(DataArguments(dataset=str(tmp_path / "a.jsonl")))
    assert [(number, json.loads(row)["input"]) for number, row in source.rows()] == [(1, "a"), (3, "c")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"input": "a", "output": "b", "input": "c"}', "the row has key 'input' more than once"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', r"messages\[0\] has key 'content' more"),
        ('{"conversations": [{"from": "human", "value": "a", "value": "b"}]}', r"conversations\[0\] has key 'value'"),
    ],
)
def test_a_key_that_is_there_twice_is_a_bad_row(text, message, tmp_path):
    with pytest.raises(BadRow, match=message):
        to_conversation(parse_json(text))
    (tmp_path / "a.json").write_text(f"[{text}]")  # a list's row is one too, not the end of its file
    [source] = find_sources(DataArguments(dataset=str(tmp_path / "a.json")))
    with pytest.raises(BadRow, match=message):
        to_conversation(*[row for _, row in source.rows()])


def test_a_repeated_column_may_be_left_out():
    row = parse_json('{"id": 1, "id": 2, "input": "a", "output": "b"}')
    assert to_conversation(row, ignored=frozenset({"id"})) == [user("a"), assistant("b")]


ROW = '{"input": "a", "output": "b"}\n'


def test_no_file_of_a_directory_is_left_out_without_a_word(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    (data / "a.jsonl").write_text(ROW)
    (data / "more" / "b.jsonl").write_text(ROW)
    (tmp_path / "other").mkdir()
    (data / "linked").symlink_to(tmp_path / "other")
    assert sources(data) == [f"{data}/a.jsonl", f"{data}/more/b.jsonl"]
    assert "1 links to directories are not followed" in capsys.readouterr().err
    (data / "c.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match=r"c.jsonl: a link to nothing \(.*gone.jsonl\)"):
        sources(data)
    (data / "c.jsonl").unlink()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"--dataset .*data: .*more cannot be read \(Permission denied\)"):
        sources(data)


def test_a_pipe_is_no_data(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", tmp_path):
        with pytest.raises(ValueError, match="a.jsonl: no regular file"):
            sources(path)


def test_a_file_is_named_once(tmp_path):
    (tmp_path / "a.jsonl").write_text(ROW)
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    for twice in (f"{tmp_path}/a.jsonl,{tmp_path}/a.jsonl", f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", tmp_path):
        with pytest.raises(ValueError, match=r"[ab].jsonl is named twice.*name it once"):
            sources(twice)
