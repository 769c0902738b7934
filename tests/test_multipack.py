"""multipack.py: labels, packs, batches and attention, each against something that does not share its code.

templates/ holds chat templates of our own writing that behave like those of Qwen3, Qwen2.5, Llama-3.1 and GLM-4.5.
"""

import functools
import hashlib
import json
import multiprocessing
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing

import multipack
from conftest import FAMILIES, tiny_model, tiny_tokenizer
from malaysian_sft import tokenise as rooms_tokenise
from malaysian_sft.attention import (
    _backend,
    _document_loop,
    _import_varlen,
    _parameters,
    attention_backend,
    packed_attention,
    register_attention,
)
from malaysian_sft.chat_format import ChatFormat
from malaysian_sft.conversations import DataArguments, _hub_sources, commit_of
from malaysian_sft.tokenise import TOKENISATION_VERSION, tokenise
from multipack import pack, prepare

TEMPLATES = Path(__file__).parent / "templates"
CONTROL = [
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
]


@functools.cache
def family_tokenizer(name):
    tokenizer = tiny_tokenizer((TEMPLATES / f"{name}.jinja").read_text())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<think>", "</think>", *CONTROL]})
    if name == "llama3.1":
        tokenizer.bos_token, tokenizer.eos_token = "<|begin_of_text|>", "<|eot_id|>"
        # like Llama's own, it puts BOS before any text it is asked to tokenise with special tokens
        bos = ("<|begin_of_text|>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[bos]
        )
    if name == "glm4.5":
        tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


FAMILY_NAMES = ["qwen3", "qwen2.5", "llama3.1", "glm4.5"]
STOP = {"qwen3": "<|im_end|>", "qwen2.5": "<|im_end|>", "llama3.1": "<|eot_id|>", "glm4.5": "<|endoftext|>"}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def arguments(tmp_path, dataset, **overrides):
    return DataArguments(
        dataset=str(dataset), data_cache=str(tmp_path / "cache"), **{"max_seq_length": 512, **overrides}
    )


def user(text):
    return {"role": "user", "content": text}


def assistant(text, reasoning=None):
    return {"role": "assistant", "content": text, **({"reasoning_content": reasoning} if reasoning else {})}


def documents_of(dataset):
    return [dataset.document(i) for i in range(len(dataset.lengths))]


def supervised_texts(document, tokenizer):
    """The text of each run of supervised tokens, by a plain loop over the labels."""
    runs, previous = [], -100
    for token, label in zip(document["input_ids"].tolist(), document["labels"].tolist(), strict=True):
        assert label in (-100, token)
        if label != -100:
            if previous == -100:
                runs.append([])
            runs[-1].append(token)
        previous = label
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


# --- labels


SINGLE = [user("Apa khabar?"), assistant("Khabar baik.")]
REASONED = [
    {"role": "system", "content": "Fikir dahulu."},
    user("2 + 2?"),
    assistant("4", "dua campur dua\nialah empat"),
]
TURNS = [
    user("satu"),
    assistant("jawapan satu"),
    user("dua"),
    assistant("jawapan dua"),
    user("tiga"),
    assistant("\tjawapan tiga "),
]

# what the model has to write, by hand, turn by turn
EXPECTED = {
    ("qwen3", "SINGLE"): ["<think>\n\n</think>\n\nKhabar baik.<|im_end|>"],
    ("qwen3", "REASONED"): ["<think>\ndua campur dua\nialah empat\n</think>\n\n4<|im_end|>"],
    ("qwen2.5", "SINGLE"): ["Khabar baik.<|im_end|>"],
    ("qwen2.5", "REASONED"): ["<think>\ndua campur dua\nialah empat\n</think>\n\n4<|im_end|>"],
    ("qwen2.5", "TURNS"): ["jawapan satu<|im_end|>", "jawapan dua<|im_end|>", "\tjawapan tiga <|im_end|>"],
    ("llama3.1", "SINGLE"): ["Khabar baik.<|eot_id|>"],
    ("llama3.1", "REASONED"): ["<think>\ndua campur dua\nialah empat\n</think>\n\n4<|eot_id|>"],
    ("llama3.1", "TURNS"): ["jawapan satu<|eot_id|>", "jawapan dua<|eot_id|>", "jawapan tiga<|eot_id|>"],
    ("glm4.5", "SINGLE"): ["\n<think></think>\nKhabar baik.<|endoftext|>"],
    ("glm4.5", "REASONED"): ["\n<think>dua campur dua\nialah empat</think>\n4<|endoftext|>"],
    ("glm4.5", "TURNS"): [
        "\n<think></think>\njawapan satu<|user|>",
        "\n<think></think>\njawapan dua<|user|>",
        "\n<think></think>\njawapan tiga<|endoftext|>",
    ],
}


@pytest.mark.parametrize("family,name", EXPECTED)
def test_labels_are_the_assistants_text(tmp_path, family, name):
    messages = {"SINGLE": SINGLE, "REASONED": REASONED, "TURNS": TURNS}[name]
    tokenizer = family_tokenizer(family)
    dataset = prepare(
        arguments(tmp_path, write_jsonl(tmp_path / "d.jsonl", [{"messages": messages}])), tokenizer, "tiny"
    )
    (document,) = documents_of(dataset)
    assert document["labels"][0] == -100
    assert supervised_texts(document, tokenizer) == EXPECTED[family, name]

    # the whole document is the template's own rendering, tokenised once, with no second BOS
    ids = document["input_ids"].tolist()
    if family == "qwen2.5" and name == "REASONED":
        messages = [*REASONED[:2], assistant("<think>\ndua campur dua\nialah empat\n</think>\n\n4")]
    if family == "llama3.1" and name == "REASONED":
        messages = [*REASONED[:2], assistant("<think>\ndua campur dua\nialah empat\n</think>\n\n4")]
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == (rendered + [tokenizer.eos_token_id] if family == "glm4.5" else rendered)

    # what comes before the first answer is, token for token, what the model is given at inference
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    prompt = tokenizer.apply_chat_template(
        messages[:first], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert (document["labels"] != -100).nonzero()[0].item() == len(prompt)
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_schema_trains_on_reasoning_answer_and_stop(tmp_path, family):
    """The five configs by file name, plus messages: reasoning and answer are supervised, question and system turn
    never."""
    rows = {
        "ayat_aktif_pasif": {"input": "Ali makan nasi.", "output": "Nasi dimakan Ali."},
        "coding": {"question": "Tulis kod.", "answer": "```python\nprint('hai')\n```"},
        "malaysian_reasoning": {
            "system": "Fikir.",
            "input": "Ibu negara?",
            "answer": "Kuala Lumpur",
            "reasoning": "Ia di Lembah Klang.",
        },
        "meta_prompt": {"input": "Jadikan lebih baik.", "answer": "Baik: çé 漢字 😀"},
        "multiple_choice_qa": {"question": "A. emas\nB. perak", "answer": "Jawapannya B"},
        "perbualan": {"messages": [user("Hai"), assistant("Hai juga")]},
    }
    (tmp_path / "data").mkdir()
    for name, row in rows.items():
        write_jsonl(tmp_path / "data" / f"{name}.jsonl", [row])
    tokenizer = family_tokenizer(family)
    dataset = prepare(arguments(tmp_path, tmp_path / "data"), tokenizer, "tiny")
    assert set(dataset.report["configs"]) == set(rows) and len(dataset.lengths) == 6
    for row, document in zip([rows[name] for name in sorted(rows)], documents_of(dataset), strict=True):
        (text,) = supervised_texts(document, tokenizer)
        answer = row.get("answer") or row.get("output") or row["messages"][1]["content"]
        assert answer in text and row.get("reasoning", "") in text and text.endswith(answer + STOP[family])
        question = row.get("input") or row.get("question") or row["messages"][0]["content"]
        context = tokenizer.decode(document["input_ids"][document["labels"] == -100], skip_special_tokens=False)
        assert question in context and row.get("system", "") in context and answer not in context


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_no_reasoning_is_lost_when_the_template_hides_history(tmp_path, family):
    """Qwen3 and GLM-4.5 strip the reasoning of earlier turns: then each turn is trained in a document of its own."""
    messages = [
        user("satu"),
        assistant("jawapan satu", "fikiran satu"),
        user("dua"),
        assistant("jawapan dua", "fikiran dua"),
    ]
    tokenizer = family_tokenizer(family)
    dataset = prepare(
        arguments(tmp_path, write_jsonl(tmp_path / "d.jsonl", [{"messages": messages}])), tokenizer, "tiny"
    )
    texts = [supervised_texts(document, tokenizer) for document in documents_of(dataset)]
    if family in ("qwen3", "glm4.5"):
        assert [len(runs) for runs in texts] == [1, 1] and dataset.report["extra_documents"] == 1
        whole = tokenizer.decode(dataset.document(1)["input_ids"], skip_special_tokens=False)
        assert "jawapan satu" in whole and "fikiran satu" not in whole  # as the model will see its own history
    else:
        assert [len(runs) for runs in texts] == [2] and dataset.report["extra_documents"] == 0
    for text, name in zip([run for runs in texts for run in runs], ("satu", "dua"), strict=True):
        assert f"fikiran {name}" in text and f"jawapan {name}" in text
        assert ("dua" if name == "satu" else "satu") not in text


def test_loss_on_all_supervises_everything_but_the_first_token(tmp_path):
    tokenizer = family_tokenizer("qwen3")
    dataset = prepare(
        arguments(tmp_path, write_jsonl(tmp_path / "d.jsonl", [{"messages": TURNS}]), loss_on="all"), tokenizer, "tiny"
    )
    document = dataset.document(0)
    assert document["labels"][0] == -100 and torch.equal(document["labels"][1:], document["input_ids"][1:])


@pytest.mark.parametrize(
    "template,message",
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not render"),
        (
            (
                "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{%"
                " endif %}"
            ),
            "generation prompt",
        ),
        (None, "no chat template"),
    ],
)
def test_unusable_templates_are_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        ChatFormat(tiny_tokenizer(template))


def test_a_template_that_drops_the_system_turn_is_noticed(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "for m in messages %}", "for m in messages if m.role != 'system' %}"
    )
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": SINGLE}, {"messages": REASONED}])
    with pytest.raises(ValueError, match=r"row 2: the chat template drops the content of messages\[0\]"):
        prepare(arguments(tmp_path, path), tokenizer, "tiny")


# --- rows


BAD = [
    ({"question": "a"}, "fit no schema"),
    ({"question": "a", "input": "b", "answer": "c"}, r"columns \['input'\] have no place.*--ignore_columns input"),
    ({"question": "a", "answer": "b", "id": 7}, r"columns \['id'\] have no place"),
    ({"question": "a", "answer": ""}, "'answer' is empty"),
    ({"question": "a", "answer": " \n"}, "'answer' is empty"),
    ({"question": None, "answer": "b"}, "fit no schema"),
    ({"question": "a", "answer": 3}, "'answer' is int"),
    ({"question": "a", "answer": "\ud800"}, "not valid Unicode"),
    ({"question": "a", "answer": "b<|im_end|>c"}, "control token '<|im_end|>'"),
    ({"question": "a", "answer": "b", "reasoning": ["c"]}, "'reasoning' is list"),
    (["a"], "row is list"),
    ({"messages": []}, "not a non-empty list"),
    ({"messages": ["a"]}, r"messages\[0\] is str"),
    ({"messages": [user("a")]}, "ends with the assistant"),
    ({"messages": [assistant("a")]}, "follows no user turn"),
    ({"messages": [user("a"), assistant("b"), assistant("c")]}, "follows no user turn"),
    ({"messages": [user("a"), {"role": "tool", "content": "b"}]}, "role 'tool'"),
    ({"messages": [user("a"), {**assistant("b"), "tool_calls": [{"name": "f"}]}]}, "tool_calls"),
    ({"messages": [{**user("a"), "reasoning_content": "x"}, assistant("b")]}, "in a user turn"),
    ({"messages": [user("a"), assistant("b </think> c </think> d")]}, "drops a part of the answer"),
    (b"\xff\xfe", "not valid UTF-8"),
    (b'{"question": "a", ', "not valid JSON"),
]
GOOD = {"question": "soalan", "answer": "jawapan"}


def test_bad_rows_are_named_counted_and_never_lost(tmp_path, capsys):
    lines = []
    for row, _ in BAD:
        lines += [json.dumps(GOOD).encode(), row if isinstance(row, bytes) else json.dumps(row).encode()]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n\n")  # a byte-order mark and a blank line are no rows
    tokenizer = family_tokenizer("qwen3")
    with pytest.raises(
        ValueError, match=rf"{len(BAD)} bad rows of {2 * len(BAD)}.*\n.*d\.jsonl, row 2: .*fit no schema"
    ):
        prepare(arguments(tmp_path, path), tokenizer, "tiny")
    assert not list((tmp_path / "cache").glob("*/")), "a refused dataset leaves no cache"
    dataset = prepare(arguments(tmp_path, path, bad_rows="skip"), tokenizer, "tiny")
    report = dataset.report
    assert (report["rows"], report["skipped"], report["documents"], report["too_long"]) == (
        2 * len(BAD),
        len(BAD),
        len(BAD),
        0,
    )
    assert "row 2: " in capsys.readouterr().err
    (listed,) = (tmp_path / "cache").glob("*/bad_rows.jsonl")
    reasons = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [reason["row"] for reason in reasons] == list(range(2, 2 * len(BAD) + 1, 2))
    for reason, (_, expected) in zip(reasons, BAD, strict=True):
        assert re.search(expected, reason["reason"]), reason


def test_a_named_config_is_held_to_its_fields(tmp_path):
    for name, row in (
        ("coding", {"input": "a", "answer": "b"}),
        ("malaysian_reasoning", {"input": "a", "answer": "b"}),
    ):
        with pytest.raises(ValueError, match=f"{name}.jsonl, row 1: missing field"):
            prepare(
                arguments(tmp_path, write_jsonl(tmp_path / f"{name}.jsonl", [row])), family_tokenizer("qwen3"), "tiny"
            )


def test_json_parquet_and_hub_give_the_same_documents(tmp_path, monkeypatch):
    """The same rows as JSON Lines, a JSON list, Parquet, and through datasets.load_dataset (a local folder with two
    configs)."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"soalan {i}", "answer": f"jawapan {i}", "reasoning": None} for i in range(5)]
    tokenizer = family_tokenizer("qwen2.5")
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    expected = None
    for name in ("a.jsonl", "b.json", "c.parquet"):
        dataset = prepare(arguments(tmp_path, tmp_path / name), tokenizer, "tiny")
        found = [document["input_ids"].tolist() for document in documents_of(dataset)]
        expected = expected or found
        assert found == expected and len(found) == 5

    hub = tmp_path / "hub"
    hub.mkdir()
    write_jsonl(hub / "one.jsonl", [{"question": row["question"], "answer": row["answer"]} for row in rows])
    write_jsonl(hub / "two.jsonl", [{"input": "x", "output": "y"}])
    configs = [("coding", "one"), ("ayat_aktif_pasif", "two")]
    yaml = "".join(f"- config_name: {config}\n  data_files: {file}.jsonl\n" for config, file in configs)
    (hub / "README.md").write_text(f"---\nconfigs:\n{yaml}---\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    sources = _hub_sources(str(hub), None, None)
    assert {source.label: source.count for source in sources} == {"coding": 5, "ayat_aktif_pasif": 1}
    assert [source.commit for source in sources] == [None, None], "a folder"
    commit = "0123456789" * 4
    assert commit_of([f"/hf/owner___data/default/0.0.0/{commit}/data-train.arrow"] * 2) == commit
    assert commit_of([f"/hf/data/{commit}/a.arrow", f"/hf/data/{commit[::-1]}/a.arrow"]) is None
    sources[0].commit = commit
    monkeypatch.setattr("multipack.find_sources", lambda _: sources)
    dataset = prepare(arguments(tmp_path, "owner/name"), tokenizer, "tiny")
    assert (
        dataset.report["configs"]["coding"]["documents"] == 5
        and dataset.report["configs"]["ayat_aktif_pasif"]["documents"] == 1
    )
    assert dataset.report["commits"] == {sources[0].name: commit}
    found = [document["input_ids"].tolist() for document in documents_of(dataset)]
    assert all(ids in found for ids in expected) and len(found) == 6


@pytest.mark.parametrize(
    "overrides,message",
    [
        (dict(dataset="missing.jsonl"), "no such file"),
        (dict(dataset="a/b/c"), "no such file"),
        (dict(dataset=""), "names no data"),
        (dict(dataset_config="lain"), "dataset_config lain: not found"),
        (dict(loss_on="user"), "--loss_on"),
        (dict(bad_rows="ignore"), "--bad_rows"),
        (dict(max_seq_length=0), "--max_seq_length"),
        (dict(max_seq_length=10), "no document of 1 is left"),
        (dict(validation_share=1.0), "--validation_share"),
        (dict(validation_share=0.1), "holds out none"),
        (dict(preprocessing_num_workers=0), "--preprocessing_num_workers"),
        (dict(max_seq_length=1 << 64), "--max_seq_length 18446744073709551616: expected at least 2 and below"),
    ],
)
def test_wrong_arguments_are_refused_by_name(tmp_path, overrides, message):
    path = write_jsonl(tmp_path / "d.jsonl", [GOOD])
    with pytest.raises(ValueError, match=message):
        prepare(
            DataArguments(**{"dataset": path, "data_cache": str(tmp_path / "cache"), **overrides}),
            tiny_tokenizer(),
            "tiny",
        )


# --- packs


def log_normal_lengths(count, mean=700, sigma=0.9, longest=16384, seed=0):
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(draws.round(), 1, longest).astype(int)


def first_fit_decreasing(lengths, capacity):
    """The textbook algorithm, as plainly as it goes: the number of bins."""
    room = []
    for length in sorted(lengths, reverse=True):
        for i, left in enumerate(room):
            if left >= length:
                room[i] -= length
                break
        else:
            room.append(capacity - length)
    return len(room)


def best_fit_decreasing(lengths, capacity):
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in room if left >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(capacity - length)
    return len(room)


@pytest.mark.parametrize("lengths,capacity", [
    (log_normal_lengths(3000).tolist(), 16384),
    (log_normal_lengths(800, mean=300, longest=512).tolist(), 512),  # many documents, few fit together
    (np.random.default_rng(1).integers(1, 101, 700).tolist(), 100),
    ([16384] * 5 + [1] * 7, 16384),  # full packs leave no room
    ([1] * 50, 7),
    ([3], 3),
    ([51] * 20, 100),  # no two fit
])  # fmt: skip
def test_packs_hold_every_document_once_and_are_as_good_as_the_textbooks(lengths, capacity):
    reference = best_fit_decreasing(lengths, capacity)
    seen = set()
    for seed in range(4):
        packs = pack(lengths, capacity, seed)
        assert sorted(i for documents in packs for i in documents) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in documents) for documents in packs) <= capacity
        assert len(packs) == reference  # by any seed
        assert len(packs) <= first_fit_decreasing(lengths, capacity) * 1.01
        assert packs == pack(lengths, capacity, seed)
        seen.add(json.dumps(packs))
    assert len(seen) == 4 or len(lengths) == 1


def test_packs_are_nearly_full_and_mixed():
    lengths = log_normal_lengths(50_000)
    packs = pack(lengths, 16384)
    assert lengths.sum() / (len(packs) * 16384) >= 0.995
    # neither pack order nor the order inside a pack follows the length or the dataset's order
    means = np.array([lengths[documents].mean() for documents in packs])
    assert abs(np.corrcoef(means, np.arange(len(packs)))[0, 1]) < 0.1
    assert np.mean([documents == sorted(documents) for documents in packs if len(documents) > 3]) < 0.1
    first = np.mean([lengths[documents[0]] == max(lengths[documents]) for documents in packs if len(documents) > 3])
    assert first < 0.5


def test_compiled_and_plain_packing_agree(monkeypatch):
    lengths = log_normal_lengths(2000)
    compiled = pack(lengths, 16384, seed=3)
    monkeypatch.setattr(multipack, "_compiled_best_fit", lambda: multipack._best_fit)
    assert pack(lengths, 16384, seed=3) == compiled


def test_pack_refuses_what_does_not_fit():
    assert pack([], 8) == []
    for lengths, message in (
        ([3, 9], "1 has length 9, above"),
        ([3, 0], "1 has length 0, below"),
        ([-1], "below 1"),
        ([0.5], "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(lengths, 8)


def test_a_pack_larger_than_the_data_costs_nothing():
    lengths = [3, 5, 2, 7]
    assert pack(lengths, 10**15, seed=3) == pack(lengths, 17, seed=3) and len(pack(lengths, 16)) == 2


def many_rows(count=60):
    return [
        {"question": f"soalan {i} " + "a" * (i * 7 % 50), "answer": f"jawapan {i} " + "b" * (i * 13 % 90)}
        for i in range(count)
    ]


def test_dataset_holds_every_document_uncut_in_every_epoch(tmp_path):
    rows = many_rows()
    tokenizer = tiny_tokenizer()
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    expected = sorted(
        tokenizer.apply_chat_template(
            [user(row["question"]), assistant(row["answer"])], tokenize=True, return_dict=False
        )
        for row in rows
    )
    too_long = sum(len(ids) > 150 for ids in expected)
    expected = [ids for ids in expected if len(ids) <= 150]
    assert too_long > 5
    orders, sizes = set(), set()
    for seed in (0, 7):
        dataset = prepare(arguments(tmp_path, path, max_seq_length=150), tokenizer, "tiny", seed=seed)
        assert dataset.report["too_long"] == too_long and dataset.report["documents"] == len(expected)
        for epoch in (0, 1, 5):
            dataset.set_epoch(epoch)
            packs = [dataset[i] for i in range(len(dataset))]
            assert all(sum(len(document["input_ids"]) for document in documents) <= 150 for documents in packs)
            assert sorted(document["input_ids"].tolist() for documents in packs for document in documents) == expected
            orders.add(json.dumps(dataset.packs))
            sizes.add(len(dataset))
        again = prepare(arguments(tmp_path, path, max_seq_length=150), tokenizer, "tiny", seed=seed)
        again.set_epoch(5)
        assert again.packs == dataset.packs and again.fingerprint == dataset.fingerprint
    assert len(orders) == 6 and len(sizes) == 1


def test_the_fingerprint_is_that_of_the_data_and_its_packing(tmp_path, monkeypatch):
    """A run is resumed only on the same one: another version of the code that makes the same of the data must not stand
    in the way."""

    def fingerprint(rows=None, seed=0, **settings):
        path = write_jsonl(tmp_path / "d.jsonl", rows or many_rows(20))
        return prepare(
            arguments(tmp_path, path, max_seq_length=150, **settings), tiny_tokenizer(), "tiny", seed=seed
        ).fingerprint

    first = fingerprint()
    others = [
        fingerprint(seed=1),
        fingerprint(loss_on="all"),
        fingerprint([*many_rows(19), {"question": "a", "answer": "b"}]),
    ]
    assert first not in others and len(set(others)) == 3
    monkeypatch.setattr("multipack.data_fingerprint", lambda *_: "another version of the code")
    assert fingerprint() == first


def test_validation_rows_are_never_trained_on(tmp_path):
    tokenizer = family_tokenizer("qwen3")
    turns = [user("satu"), assistant("a", "r"), user("dua"), assistant("b", "s")]  # two documents from one row
    rows = [{"messages": [user(f"id {i}!"), *([assistant("x"), *turns] if i % 3 else turns[1:])]} for i in range(30)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)

    def identities(dataset):
        texts = [tokenizer.decode(document["input_ids"]) for i in range(len(dataset)) for document in dataset[i]]
        return [text.split("id ")[1].split("!")[0] for text in texts]

    dataset = prepare(arguments(tmp_path, path, validation_share=0.2), tokenizer, "tiny", seed=1)
    train, held = identities(dataset), identities(dataset.validation)
    assert set(train).isdisjoint(held) and len(set(held)) == 6 and len(set(train)) == 24
    assert len(train) + len(held) == dataset.report["documents"] == 30 + dataset.report["extra_documents"]
    other = prepare(arguments(tmp_path, path, validation_share=0.2), tokenizer, "tiny", seed=2)
    assert set(identities(other.validation)) != set(held)
    assert prepare(arguments(tmp_path, path), tokenizer, "tiny").validation is None


def test_collate_keeps_documents_apart():
    def document(*ids):
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor([-100, *ids[1:]])}

    batch = multipack.collate([[document(5, 6, 7), document(8)], [document(9, 10)]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3) and type(batch["max_length_q"]) is int
    assert {batch[key].dtype for key in ("input_ids", "labels", "position_ids")} == {torch.int64}
    assert batch["cu_seq_lens_q"].dtype == torch.int32


# --- the cache


def cached(tmp_path):
    return {path.parent.name for path in (tmp_path / "cache").glob("*/meta.json")}


def test_cache_is_keyed_by_all_that_matters_and_nothing_else(tmp_path, monkeypatch):
    rows = many_rows(8)
    path = Path(write_jsonl(tmp_path / "d.jsonl", rows))
    base = functools.partial(arguments, tmp_path, path)
    prepare(base(), tiny_tokenizer(), "tiny")
    assert len(cached(tmp_path)) == 1

    path.touch()
    hits = [dict(max_seq_length=300), dict(validation_share=0.5), dict(preprocessing_num_workers=2)]
    for overrides in hits:
        prepare(base(**overrides), tiny_tokenizer(), "another name", seed=4)
    assert len(cached(tmp_path)) == 1

    def another_token(tokenizer):
        tokenizer.add_tokens(["soalan"])

    def another_template(tokenizer):
        tokenizer.chat_template = "{% if messages[0].role == 'system' %}!{% endif %}" + tokenizer.chat_template

    def another_eos(tokenizer):
        tokenizer.eos_token = "<|endoftext|>"

    later = path.with_name("e.jsonl")
    write_jsonl(later, [*rows[:-1], {**rows[-1], "answer": "lain"}])
    misses = [
        lambda: prepare(base(loss_on="all"), tiny_tokenizer(), "tiny"),
        lambda: prepare(base(bad_rows="skip"), tiny_tokenizer(), "tiny"),
        lambda: prepare(base(dataset_revision="v2"), tiny_tokenizer(), "tiny"),
        lambda: prepare(arguments(tmp_path, later), tiny_tokenizer(), "tiny"),
        lambda: prepare(arguments(tmp_path, f"{path},{later}"), tiny_tokenizer(), "tiny"),
    ]
    for change in (another_token, another_template, another_eos):
        tokenizer = tiny_tokenizer()
        change(tokenizer)
        misses.append(functools.partial(prepare, base(), tokenizer, "tiny"))

    def new_version():
        monkeypatch.setattr("malaysian_sft.tokenise.TOKENISATION_VERSION", TOKENISATION_VERSION + 1)
        prepare(base(), tiny_tokenizer(), "tiny")

    for number, miss in enumerate([*misses, new_version]):
        miss()
        assert len(cached(tmp_path)) == number + 2, number
    path.write_text(later.read_text())  # the same name with other content
    prepare(base(), tiny_tokenizer(), "tiny")
    assert len(cached(tmp_path)) == len(misses) + 3


# Tokens and labels of the golden sample by TOKENISATION_VERSION; only the newest is kept.
GOLDEN = {3: "d1026f82248e57b53b8a7cc3ccdb2c1815fe907d"}


def test_another_tokenisation_has_another_version():
    """Every family's template over single, reasoned and several turns, and a row of every schema of the dataset."""
    pairs = [("question", "answer"), ("input", "output"), ("input", "answer")]
    rows = [{"messages": messages} for messages in (SINGLE, REASONED, TURNS)]
    rows += [{first: "Apa ibu negara Malaysia?", second: "Kuala Lumpur."} for first, second in pairs]
    rows += [{"system": "Jawab ringkas.", "input": "2 + 2?", "reasoning": "Dua tambah dua.", "answer": "4"}]
    content = hashlib.blake2b(digest_size=20)
    for family in FAMILY_NAMES:
        for loss_on in ("assistant", "all"):
            chunk = [(0, None, number, row) for number, row in enumerate(rows)]
            found = tokenise(ChatFormat(family_tokenizer(family)), chunk, loss_on)
            assert not found.bad and len(found.lengths) >= len(rows)
            content.update(found.tokens.tobytes() + found.supervised.tobytes())
    found = content.hexdigest()
    assert GOLDEN.get(TOKENISATION_VERSION) == found, (
        f"rows become other tokens or labels than before: raise tokenise.TOKENISATION_VERSION, or cached data of the"
        f" old code is trained on, and write down {found} in GOLDEN"
    )


def test_a_crash_leaves_no_cache_and_a_damaged_one_is_refused(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "d.jsonl", many_rows(8))

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("malaysian_sft.tokenise.tokenise", crash)
    with pytest.raises(KeyboardInterrupt):
        prepare(arguments(tmp_path, path), tiny_tokenizer(), "tiny")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    monkeypatch.setattr("malaysian_sft.tokenise.tokenise", tokenise)
    prepare(arguments(tmp_path, path), tiny_tokenizer(), "tiny")
    (tokens,) = (tmp_path / "cache").glob("*/tokens.bin")
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(ValueError, match="damaged"):
        prepare(arguments(tmp_path, path), tiny_tokenizer(), "tiny")


@pytest.mark.parametrize("damage", ["", "{}", "[]", "\xff", "other rows", "other cache"])
def test_a_cache_whose_meta_is_damaged_is_made_again(damage, tmp_path, capsys):
    data_args = arguments(tmp_path, write_jsonl(tmp_path / "d.jsonl", many_rows(8)))
    before = prepare(data_args, tiny_tokenizer(), "tiny")
    (path,) = (tmp_path / "cache").glob("*/meta.json")
    text = path.read_text()
    if damage == "other rows":
        path.write_text(json.dumps(json.loads(text) | {"rows": 9}))
    elif damage == "other cache":
        prepare(arguments(tmp_path, write_jsonl(tmp_path / "e.jsonl", many_rows(9))), tiny_tokenizer(), "tiny")
        (other,) = set((tmp_path / "cache").glob("*/meta.json")) - {path}
        path.write_text(other.read_text())
    else:
        path.write_bytes(damage.encode("latin-1"))
    capsys.readouterr()
    after = prepare(data_args, tiny_tokenizer(), "tiny")
    assert after.report == before.report and path.read_text() == text
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{path.parent}: no cache, its meta.json is damaged or not there" in said


def _prepare_and_report(data_args, log, queue):
    def logged(*args):
        with open(log, "a") as file:
            file.write("x")
        return tokenise(*args)

    rooms_tokenise.tokenise = logged
    dataset = prepare(data_args, tiny_tokenizer(), "tiny")
    queue.put((dataset.fingerprint, int(dataset.lengths.sum())))


def test_processes_that_prepare_at_once_tokenise_once(tmp_path):
    data_args = arguments(tmp_path, write_jsonl(tmp_path / "d.jsonl", many_rows(40)))
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    processes = [fork.Process(target=_prepare_and_report, args=(data_args, tmp_path / "log", queue)) for _ in range(3)]
    for process in processes:
        process.start()
    results = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(results) == 1 and (tmp_path / "log").read_text() == "x"
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


def test_workers_give_the_same_data_as_one_process(tmp_path):
    rows = many_rows(1500)
    rows[700] = {"question": "tiada jawapan"}
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    found = []
    for workers in (1, 2):
        data_args = DataArguments(
            path, data_cache=str(tmp_path / f"{workers}"), bad_rows="skip", preprocessing_num_workers=workers
        )
        dataset = prepare(data_args, tiny_tokenizer(), "tiny")
        files = [
            next((tmp_path / f"{workers}").glob(f"*/{name}")).read_bytes()
            for name in ("tokens.bin", "supervised.bin", "rows.npy")
        ]
        found.append((dataset.fingerprint, dataset.report, files))
        assert dataset.report["skipped"] == 1 and dataset.report["documents"] == 1499
    assert found[0] == found[1]


# --- attention: a document in a pack equals the document alone


def made_up_pack(lengths, seed=0, vocab=300):
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        ids = torch.randint(3, vocab, (length,), generator=generator)
        labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.4, -100)
        labels[0] = -100
        documents.append({"input_ids": ids, "labels": labels})
    return documents


def document_losses(logits, labels, boundaries):
    """Sum of the token losses of each document of a packed row, in float64. logits (1, T, vocabulary), labels (1,
    T)."""
    losses = torch.nn.functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:], reduction="none")
    losses = torch.nn.functional.pad(losses, (1, 0))  # the loss of predicting the token at each position
    return torch.stack([losses[start:end].sum() for start, end in zip(boundaries, boundaries[1:], strict=False)])


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def alone(model, documents):
    """Losses and summed gradients of each document in a forward of its own, with transformers' eager attention."""
    model.set_attn_implementation("eager")
    model.zero_grad()
    losses = []
    for document in documents:
        logits = model(input_ids=document["input_ids"][None], use_cache=False).logits
        losses.append(document_losses(logits, document["labels"][None], [0, len(document["input_ids"])])[0])
        losses[-1].backward()
    return torch.stack(losses).detach(), gradients(model)


LENGTHS = [7, 1, 19, 2, 12]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_losses_and_gradients_equal_each_document_alone(family):
    model = tiny_model(family).train()
    documents = made_up_pack(LENGTHS)
    losses, grads = alone(model, documents)
    batch = multipack.collate([documents[:3], documents[3:]])
    labels, boundaries = batch.pop("labels"), batch["cu_seq_lens_q"].tolist()
    plain = {key: batch[key] for key in ("input_ids", "position_ids")}
    for implementation in (register_attention(), "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        logits = model(**(batch if implementation == "packed" else plain), use_cache=False).logits
        found = document_losses(logits, labels, boundaries)
        torch.testing.assert_close(
            found.detach(), losses, rtol=1e-5, atol=1e-5, msg=lambda text, i=implementation: f"{i}: {text}"
        )
        found.sum().backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_packing_that_leaks_would_be_noticed():
    """The comparison above has teeth: without boundaries the losses differ."""
    model = tiny_model("llama")
    documents = made_up_pack(LENGTHS)
    losses, _ = alone(model, documents)
    batch = multipack.collate([documents])
    model.set_attn_implementation("eager")
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    found = document_losses(logits, batch["labels"], batch["cu_seq_lens_q"].tolist())
    assert (found - losses).abs().max() > 0.1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    model = tiny_model("qwen3").train()
    model.set_attn_implementation(register_attention())
    batch = multipack.collate([made_up_pack(LENGTHS)])
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**batch).loss.backward()
        found.append(gradients(model))
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_sliding_window_equals_eager():
    overrides = dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)  # the second layer slides
    model = tiny_model("qwen2", **overrides)
    assert "sliding_attention" in model.config.layer_types
    documents = made_up_pack(LENGTHS)
    losses, _ = alone(model, documents)
    batch = multipack.collate([documents])
    model.set_attn_implementation(register_attention())
    found = document_losses(model(**batch).logits, batch["labels"], batch["cu_seq_lens_q"].tolist())
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
    model.model.layers[1].self_attn.sliding_window = None
    full = document_losses(model(**batch).logits, batch["labels"], batch["cu_seq_lens_q"].tolist())
    assert (full - losses).abs().max() > 1e-2


def test_without_boundaries_each_batch_row_is_a_document():
    model = tiny_model("llama")
    ids = torch.randint(3, 300, (3, 11), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, use_cache=False).logits
    model.set_attn_implementation(register_attention())
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_packed_attention_refuses_what_it_cannot_do():
    model = tiny_model("llama", attention_dropout=0.1).train()
    model.set_attn_implementation(register_attention())
    ids = torch.arange(3, 9)[None]
    with pytest.raises(ValueError, match="dropout"):
        model(input_ids=ids)
    model.eval()
    with pytest.raises(ValueError, match="attention_mask"):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="without max_length_q"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match="ends at 5, but there are 6"):
        model(input_ids=ids, cu_seq_lens_q=torch.tensor([0, 5], dtype=torch.int32), max_length_q=5)
    cache = model(input_ids=ids[:, :4]).past_key_values
    with pytest.raises(ValueError, match="2 queries for 6 keys"):
        model(input_ids=ids[:, 4:], past_key_values=cache)
    query = torch.zeros(1, 2, 3, 4)
    for kwargs in (dict(softcap=1.0), dict(s_aux=torch.zeros(2)), dict(is_causal=False)):
        with pytest.raises(ValueError, match="packed attention cannot do"):
            packed_attention(model, query, query, query, None, **kwargs)


def _reference_varlen(query, key, value, boundaries, scale, window):
    """Attention by the formula, document by document, in float64. (T, heads, D) in and out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.zeros_like(query, dtype=torch.float64)
    for start, end in zip(boundaries, boundaries[1:], strict=False):
        for i in range(start, end):
            first = start if window is None else max(start, i - window + 1)
            scores = torch.einsum("hd,jhd->hj", query[i].double(), key[first : i + 1].double()) * scale
            out[i] = torch.einsum("hj,jhd->hd", scores.softmax(-1), value[first : i + 1].double())
    return out


def _left(window_size):
    left, right = window_size
    assert right == 0
    return None if left == -1 else left + 1


# the signatures of the kernels that packed attention may find, computed by the formula
def _torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert query.shape[1] != key.shape[1] and window_size[1] == 0, "grouped heads, without a flag"
    return _reference_varlen(query, key, value, cu_seq_q.tolist(), scale, _left(window_size))


def _torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa and query.shape[1] != key.shape[1]
    return _reference_varlen(query, key, value, cu_seq_q.tolist(), scale, _left(window_size))


def _flash_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
):
    assert causal and (max_seqlen_q, max_seqlen_k) == (6, 6)
    return _reference_varlen(
        q, k, v, cu_seqlens_q.tolist(), softmax_scale, None if window_size == (-1, -1) else _left(window_size)
    )


def _flash_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
):
    """By the source of flash-attn-4 4.0.0b36."""
    assert causal and qv is None and q.is_contiguous() and (max_seqlen_q, max_seqlen_k) == (6, 6)
    assert cu_seqlens_k.dtype == torch.int32 and k.stride(-1) == v.stride(-1) == 1
    window = None if window_size == (None, None) else _left(window_size)
    return _reference_varlen(q, k, v, cu_seqlens_q.tolist(), softmax_scale, window), None


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kernel", [_torch_2_11, _torch_2_13, _flash_2, _flash_4, None])
def test_every_kernel_signature_computes_the_same_attention(monkeypatch, kernel, window):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 11, 8, generator=generator) for heads in (4, 2, 2))
    boundaries = torch.tensor([0, 4, 10, 11], dtype=torch.int32)
    expected = _reference_varlen(*(x[0].transpose(0, 1) for x in (query, key, value)), boundaries.tolist(), 0.3, window)
    call = functools.partial(
        packed_attention, torch.nn.Module(), scaling=0.3, sliding_window=window, attention_mask=None
    )
    kwargs = dict(cu_seq_lens_q=boundaries, max_length_q=6)
    if kernel is None:  # the loop, in float32
        out, _ = call(query, key, value, **kwargs)
        torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-5)
        return
    monkeypatch.setattr("malaysian_sft.attention._backend", lambda device: ("test", kernel))
    half = [x.bfloat16() for x in (query, key, value)]
    out, weights = call(*half, **kwargs)
    assert out.shape == (1, 11, 4, 8) and weights is None
    torch.testing.assert_close(out[0].double(), expected, rtol=0.05, atol=0.05)  # bfloat16 inputs


@pytest.mark.parametrize("head_by_head", [False, True], ids=["token by token", "head by head"])
def test_the_output_is_kept_once(head_by_head, monkeypatch):
    """What PyTorch's kernel keeps for the backward is what the caller gets, not something that it is copied from.

    Partial rotary joins two parts of every head, and so leaves queries head by head. On the meta device: layouts
    without numbers.
    """
    varlen_attn = _import_varlen("torch.nn.attention.varlen")
    monkeypatch.setattr("malaysian_sft.attention._backend", lambda device: ("varlen_attn", varlen_attn))
    query, key, value = (
        torch.zeros(1, 11, heads, 8, dtype=torch.bfloat16, device="meta").transpose(1, 2) for heads in (4, 2, 2)
    )
    query = query.contiguous() if head_by_head else query
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out, _ = packed_attention(torch.nn.Module(), query.requires_grad_(), key, value, None)
    assert out.shape == (1, 11, 4, 8) and out.is_contiguous()
    assert out.untyped_storage()._cdata in {tensor.untyped_storage()._cdata for tensor in kept}
    queries = [tensor for tensor in kept if tensor.shape == (11, 4, 8)]
    assert len(queries) == 2, "the query and the output"
    assert (query.untyped_storage()._cdata in {tensor.untyped_storage()._cdata for tensor in kept}) != head_by_head, (
        "copied where it must"
    )


def test_attention_backend_by_device_and_package(monkeypatch):
    assert attention_backend("cpu") == "sdpa"

    def backend(capability, installed):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(
            "malaysian_sft.attention._import_varlen", lambda module: _flash_2 if module in installed else None
        )
        _backend.cache_clear()
        return attention_backend("cuda")

    torch_only = {"torch.nn.attention.varlen"}
    everything = {"flash_attn.cute", "flash_attn_interface", "flash_attn", *torch_only}
    assert backend((9, 0), everything) == "flash-attn-4"
    assert backend((9, 0), everything - {"flash_attn.cute"}) == "flash-attn-3"
    assert backend((8, 0), everything) == "flash-attn-2"
    assert backend((8, 0), torch_only) == backend((9, 0), torch_only) == "varlen_attn"
    assert backend((7, 5), everything) == "sdpa"
    assert backend((9, 0), everything) == "flash-attn-4"
    function = _backend(torch.device("cuda"))[1]
    assert function._torchdynamo_disable, "not to be traced by torch.compile"
    assert _parameters(function) == _parameters(_flash_2), "its signature shows through"
    _backend.cache_clear()
    monkeypatch.undo()
    assert _import_varlen("torch.nn.attention.varlen") is not None


def test_a_broken_kernel_package_is_not_passed_over_in_silence(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_attn" / "cute").mkdir(parents=True)
    (tmp_path / "broken_attn" / "cute" / "__init__.py").write_text("import no_such_compiler\n")
    assert _import_varlen("broken_attn.cute") is None
    assert (
        "warning: broken_attn.cute is installed, but cannot be imported (No module named 'no_such_compiler')"
        in capsys.readouterr().err
    )
    for absent in ("broken_attn.interface", "absent_attn.cute", "absent_attn"):
        assert _import_varlen(absent) is None
    assert capsys.readouterr().err == "", "nobody has to install them"


# --- the command


def test_command_prints_a_report_and_marked_examples(tmp_path, monkeypatch, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [*many_rows(20), {"question": "panjang", "answer": "x" * 400}, {"question": "tiada"}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    argv = [
        "multipack.py",
        "--dataset",
        path,
        "--model",
        str(tmp_path / "model"),
        "--data_cache",
        str(tmp_path / "cache"),
    ]
    monkeypatch.setattr(sys, "argv", [*argv, "--max_seq_length", "300", "--bad_rows", "skip", "--show", "2"])
    multipack.main()
    out = capsys.readouterr().out
    tokens = sum(len(row["question"]) + len(row["answer"]) + len("user\nassistant\n\n\n") + 4 for row in rows[:20])
    assert f"{tokens:,}" in out  # a byte a token, so tokens can be counted by hand
    (report,) = (tmp_path / "cache").glob("*/report.json")
    report = json.loads(report.read_text())
    assert (report["rows"], report["skipped"], report["too_long"], report["documents"]) == (22, 1, 1, 20)
    assert report["tokens"] == tokens and sum(count for _, _, count in report["histogram"]) == 20
    supervised = sum(len(row["answer"]) + 1 for row in rows[:20])
    assert report["supervised_tokens"] == supervised and f"{supervised / tokens:.1%}" in out
    assert (
        report["fill"] == pytest.approx(tokens / (report["packs"] * 300)) and f"{report['packs']} packs of 300" in out
    )
    assert f"<|im_start|>assistant\n[[{rows[0]['answer']}<|im_end|>]]\n" in out
    assert f"<|im_start|>assistant\n[[{rows[19]['answer']}<|im_end|>]]\n" in out and out.count("[[") == 2

    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=r"error: 1 bad rows of 22 .*\n.*d.jsonl, row 22: "):
        multipack.main()
    monkeypatch.setattr(sys, "argv", [*argv, "--los_on", "all"])
    with pytest.raises(SystemExit, match="los_on"):
        multipack.main()
    for flag in ("--show", "--seed"):
        monkeypatch.setattr(sys, "argv", [*argv, flag, "-1"])
        with pytest.raises(SystemExit, match=f"error: {flag} -1: expected a number of at least 0"):
            multipack.main()
    monkeypatch.setattr(sys, "argv", [*argv[:4], str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="error: .*nowhere: no tokenizer that transformers can read"):
        multipack.main()


def test_examples_are_coloured_on_a_terminal():
    document = {"input_ids": torch.tensor([1, 90, 91, 2]), "labels": torch.tensor([-100, -100, 91, 2])}
    tokenizer = tiny_tokenizer()
    inside = tokenizer.decode([91, 2])
    assert f"\033[32m{inside}\033[0m" in multipack.format_document(document, tokenizer, color=True)
    assert f"[[{inside}]]" in multipack.format_document(document, tokenizer, color=False)


def assert_as_near_as_pytorch(
    heads, kv_heads, head_dim, window=None, query_head_by_head=True, wrap=lambda attention: attention
):
    """packed_attention in bf16 is as near to fp32 attention, document by document, as bf16 SDPA is: output and every
    gradient."""
    lengths = [1, 700, 3, 129, 64, 1151]
    boundaries = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, heads, sum(lengths), head_dim), *[(1, kv_heads, sum(lengths), head_dim)] * 2]
    tensors = [torch.randn(shape, device="cuda", generator=generator) for shape in shapes]
    if not query_head_by_head:
        tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    upstream = torch.randn(1, sum(lengths), heads, head_dim, device="cuda", generator=generator).to(torch.bfloat16)
    borders = dict(cu_seq_lens_q=boundaries, max_length_q=max(lengths), sliding_window=window)

    @wrap
    def attention(*inputs):
        return packed_attention(torch.nn.Module(), *inputs, None, **borders)[0]

    def results(dtype, loop):
        inputs = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in tensors]
        if loop:
            out = _document_loop(*inputs, boundaries.tolist(), None, window).transpose(1, 2)
        else:
            out = attention(*inputs)
        return [out, *torch.autograd.grad(out, inputs, upstream.to(dtype))]

    truth, plain, packed = results(torch.float32, True), results(torch.bfloat16, True), results(torch.bfloat16, False)
    for name, t, p, k in zip(("out", "dq", "dk", "dv"), truth, plain, packed, strict=True):
        error, bound = ((x.float() - t).norm() / t.norm() for x in (k, p))
        assert error <= 1.2 * bound + 1e-3, f"{name}: {error:.1e}, PyTorch {bound:.1e}"
        # the document of a single token: its output is its value, and it says nothing about queries and keys
        one = slice(0, 1)
        where = (slice(None), one) if name == "out" else (slice(None), slice(None), one)
        torch.testing.assert_close(
            k.float()[where], t[where], rtol=2e-2, atol=2e-2, msg=lambda m, n=name: f"{n} of one token: {m}"
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(8, 8, 64), (8, 2, 128)])
def test_packed_attention_on_a_gpu(heads, kv_heads, head_dim):
    """With whichever kernel is found first."""
    assert attention_backend("cuda") != "sdpa"
    assert_as_near_as_pytorch(heads, kv_heads, head_dim)


def checkpointed(attention):
    return functools.partial(torch.utils.checkpoint.checkpoint, attention, use_reentrant=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "more",
    [{}, dict(query_head_by_head=False), dict(heads=96, kv_heads=8), dict(window=100), dict(wrap=checkpointed)],
    ids=["query head by head", "query token by token", "GLM-4.5-Air's heads", "sliding window", "checkpointed"],
)
def test_flash_attn_4(more):
    """flash-attn-4, where it is installed, by its own name: Qwen3-30B-A3B's heads, and a document of a single token."""
    pytest.importorskip("flash_attn.cute")
    assert attention_backend("cuda") == "flash-attn-4"
    assert_as_near_as_pytorch(**dict(heads=32, kv_heads=4, head_dim=128) | more)
