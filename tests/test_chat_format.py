"""chat_format.py: one situation, one target; what a template hides, rewrites or refuses is noticed."""

import functools
import json
import random

import make_template_facts
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conversations import assistant, user
from test_multipack import FAMILY_NAMES, family_tokenizer

from conftest import tiny_tokenizer
from malaysian_sft import chat_format
from malaysian_sft.chat_format import ChatFormat
from malaysian_sft.conversations import BadRow


def answers(family, messages):
    """The supervised texts of every document of a conversation."""
    documents = ChatFormat(family_tokenizer(family)).documents(messages)
    return [[text for text, supervised in pieces if supervised] for pieces in documents]


def test_qwen3_writes_the_same_turn_one_way():
    """An earlier turn and the same turn alone: both with the empty think block that the template gives at inference."""
    empty = "<think>\n\n</think>\n\n"
    assert answers("qwen3", [user("a"), assistant("satu")]) == [[f"{empty}satu<|im_end|>"]]
    both = answers("qwen3", [user("a"), assistant("satu"), user("b"), assistant("dua")])
    assert both == [[f"{empty}satu<|im_end|>"], [f"{empty}dua<|im_end|>"]]


FACTS = json.loads(make_template_facts.FACTS.read_text())


@pytest.mark.parametrize("publisher", FACTS["templates"])
def test_templates_give_what_the_publishers_give(publisher):
    """What these tests train on is written as by the publishers' own templates, which are not part of this project."""
    entry = FACTS["templates"][publisher]
    found = make_template_facts.renderings(family_tokenizer(entry["ours"]), FACTS["conversations"])
    assert len(found) == len(entry["renderings"]) >= 19
    for name, texts in entry["renderings"].items():
        assert found[name] == texts, name


@pytest.mark.parametrize("publisher", FACTS["templates"])
def test_a_target_follows_the_publisher_s_own_prompt(publisher):
    """What comes before the last turn's target is what the publisher's template gives to answer that turn with. A
    template without a field for reasoning drops that of earlier turns, which is kept here as text: those are left out.
    """
    entry, compared = FACTS["templates"][publisher], 0
    chat = ChatFormat(family_tokenizer(entry["ours"]))
    for name, messages in FACTS["conversations"].items():
        if not chat.keeps_reasoning and any("reasoning_content" in message for message in messages[:-1]):
            continue
        pieces = chat.documents(messages)[-1]
        last = max(i for i, (_, supervised) in enumerate(pieces) if supervised)
        assert "".join(text for text, _ in pieces[:last]) == entry["renderings"][name]["prompt"], name
        assert messages[-1]["content"].split("</think>")[-1].strip() in pieces[last][0], name
        compared += 1
    assert compared >= 16


def test_instruct_2507_has_no_reasoning_of_its_own():
    """Qwen3-*-Instruct-2507 never thinks: an answer has no think block, given reasoning is text before the answer."""
    assert answers("qwen3-2507", [user("a"), assistant("satu")]) == [["satu<|im_end|>"]]
    [both] = answers("qwen3-2507", [user("a"), assistant("satu"), user("b"), assistant("dua")])
    assert both == ["satu<|im_end|>", "dua<|im_end|>"], "one document: history is kept as it was written"
    [[reasoned]] = answers("qwen3-2507", [user("2 + 2?"), assistant("4", "dua campur dua")])
    assert reasoned == "<think>\ndua campur dua\n</think>\n\n4<|im_end|>"


@pytest.mark.parametrize("family", ["qwen2.5", "llama3.1", "glm4.5"])
def test_a_template_that_keeps_history_gives_one_document(family):
    assert len(answers(family, [user("a"), assistant("satu"), user("b"), assistant("dua")])) == 1


@pytest.mark.parametrize("family", ["qwen3", "glm4.5"])
def test_reasoning_that_stands_in_the_answer_is_not_lost(family):
    text = "The capital is Paris."
    found = answers(family, [user("Capital of France?"), assistant(text, text), user("Sure?"), assistant("Yes.")])
    assert found[0][0].count(text) == 2, "reasoning and answer"


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("inline", ["<think>\nr\n</think>\n\na", "<think>r</think>a", "<think>\n\nr</think>\na"])
def test_inline_reasoning_is_read_whatever_its_white_space(family, inline):
    [[answer]] = answers(family, [user("q"), assistant(inline)])
    assert answer.split() == answers(family, [user("q"), assistant("a", "r")])[0][0].split() or "r" in answer


def test_a_switch_that_users_type_is_no_control_token():
    tokenizer = family_tokenizer("glm4.5")
    tokenizer.add_special_tokens({"additional_special_tokens": ["/nothink"]})
    documents = ChatFormat(tokenizer).documents([user("Apa khabar? /nothink"), assistant("Baik.")])
    assert "/nothink" in documents[0][0][0]


def test_a_system_turn_in_mid_conversation_ends_no_answer():
    middle = [user("a"), assistant("satu"), {"role": "system", "content": "s"}, user("b"), assistant("dua")]
    [found] = answers("glm4.5", middle)
    assert not any("<|system|>" in answer for answer in found)


THINKS_IN_ITS_PROMPT = """{%- for m in messages -%}
    {{- '<|im_start|>' ~ m.role ~ '\n' -}}
    {%- if m.role == 'assistant' and loop.last -%}
        {{- '<think>\n' ~ (m.reasoning_content or '') ~ '\n</think>\n\n' -}}
    {%- endif -%}
    {{- m.content ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"""


def test_a_prompt_that_begins_to_think_gives_a_document_a_turn():
    """As Qwen3.5: earlier turns do not begin as the generation prompt does."""
    chat = ChatFormat(tiny_tokenizer(THINKS_IN_ITS_PROMPT))
    documents = chat.documents([user("a"), assistant("satu"), user("b"), assistant("dua", "r")])
    supervised = [[text for text, is_answer in pieces if is_answer] for pieces in documents]
    assert [len(found) for found in supervised] == [1, 1]
    assert supervised[0][0].endswith("satu<|im_end|>") and "r" in supervised[1][0]


@pytest.mark.parametrize(
    "fault",
    [
        "{{ raise_exception('only two turns') }}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.nothing.more }}",
        "{{ 'a' + 1 }}",
    ],
)
def test_a_template_that_fails_on_a_row_is_a_bad_row(fault):
    template = tiny_tokenizer().chat_template + "{% if messages | length > 4 %}" + fault + "{% endif %}"
    chat = ChatFormat(tiny_tokenizer(template))
    with pytest.raises(BadRow, match="the chat template refuses this conversation"):
        chat.documents([user("a"), assistant("b")] * 3)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_long_conversation_in_one_pass_is_the_same(family, monkeypatch):
    chat = ChatFormat(family_tokenizer(family))
    assert chat.prompt, "every launcher's family has control tokens"
    draw = random.Random(0)
    words = ["satu", " dua ", "\ntiga\n", "çé", "<think>", "{{", "jawapan"]
    for turns in (1, 2, 5, 12):
        messages = []
        for _ in range(turns):
            messages += [
                user("".join(draw.choices(words, k=3)) + "?"),
                assistant("a" + "".join(draw.choices(words, k=4))),
            ]
        monkeypatch.setattr(chat_format, "MANY_TURNS", 10**9)
        slow = chat.segments(messages)
        monkeypatch.setattr(chat_format, "MANY_TURNS", 0)
        assert chat.segments(messages) == slow
        # the one pass itself, not what it falls back to
        rendered = messages if chat.keeps_reasoning else [chat_format._reasoning_in_content(m) for m in messages]
        assert chat._segments_by_tokens(rendered, chat.render(rendered)) == slow


@pytest.mark.parametrize("family", ["qwen2.5", "llama3.1", "glm4.5"])
def test_a_conversation_of_thousands_of_turns_is_rendered_a_few_times(family, monkeypatch):
    chat = ChatFormat(family_tokenizer(family))
    rendered, render = [], chat.render
    monkeypatch.setattr(
        chat, "render", lambda messages, *a, **k: rendered.append(len(messages)) or render(messages, *a, **k)
    )
    messages = [user("a"), assistant("b")] * 2000
    [pieces] = chat.documents(messages)
    assert sum(supervised for _, supervised in pieces) == 2000
    assert sum(rendered) <= 3 * len(messages), "work that grows with the number of turns, not with its square"


@functools.cache
def chat_of(family):
    return ChatFormat(family_tokenizer(family))


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(FAMILY_NAMES), st.lists(st.tuples(texts, texts, st.none() | texts), min_size=1, max_size=3))
def test_any_conversation_keeps_its_answers_or_is_a_bad_row(family, turns):
    messages = []
    for question, answer, reasoning in turns:
        messages += [user(question), assistant(answer, reasoning)]
    try:
        documents = chat_of(family).documents(messages)
    except BadRow:
        return
    supervised = " ".join(" ".join(t for t, is_answer in pieces if is_answer) for pieces in documents).split()
    for _, answer, reasoning in turns:
        for text in filter(None, (answer, reasoning)):
            assert set(text.split()) <= {*supervised} or " ".join(text.split()) in " ".join(supervised)
