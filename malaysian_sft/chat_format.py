"""A tokenizer's chat template, and where assistant turns begin and end in what it renders."""

import re

from jinja2 import TemplateError

from malaysian_sft.conversations import BadRow

SENTINEL = "q7Zassistantq7Z"
MANY_TURNS = 8  # from here on a conversation is not rendered once for each turn
THINK_TAGS = ("<think>", "</think>")
# What a template raises by itself, and what the expressions in it may raise.
TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class ChatFormat:
    """A tokenizer's chat template, and where assistant turns begin and end in what it renders.

    Nothing is known about any template: everything is found by rendering.

    - A turn begins where the generation prompt ends, `render(messages[:i], add_generation_prompt=True)`: the model is
      trained from exactly the text that it is given when it is asked to answer. What the template puts after that by
      itself (Qwen3's empty think block) is something the model has to write, and is supervised.
    - A turn's text ends where the text that the template puts after it begins. That text is found by rendering the
      conversation with the turn's content replaced by a sentinel, because a template may rewrite earlier turns (Qwen3
      and GLM-4.5 strip their reasoning): the rendering of `messages[:i + 1]` need not be a prefix of the whole.
    - The end-of-turn text (`<|im_end|>`, `<|eot_id|>`) belongs to the turn; white space after it does not. A template
      without one (GLM-4.5) ends a turn with the token that the user's turn begins with, which is then supervised, and
      the last turn gets the tokenizer's end-of-sequence token.
    - One situation has one target: what the model would see if it were asked for this turn. A template that writes an
      earlier turn otherwise than the same turn at the end (Qwen3's empty think block, reasoning that is stripped)
      gives one document a turn.
    """

    def __init__(self, tokenizer):
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; a fast one (tokenizer.json) is needed")
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; use an instruction-tuned model's tokenizer")
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        # Text that would become a control token inside a message: it would end the turn, or fake one. Think tags are
        # legitimate content, and so are switches that users type (GLM-4.5's "/nothink").
        special = {t.content for t in added if t.special and t.content[:1] in "<[" and t.content not in THINK_TAGS}
        self.control = sorted(special, key=len, reverse=True)
        user = {"role": "user", "content": "q7Zuserq7Z"}
        self.probe = self.render([user, {"role": "assistant", "content": SENTINEL}])
        if SENTINEL not in self.probe:
            raise ValueError("the chat template does not render an assistant turn's content")
        self.tail = self.probe[self.probe.rindex(SENTINEL) + len(SENTINEL) :]  # "<|im_end|>\n", "<|eot_id|>" or ""
        self.stop = self.tail.rstrip()
        if not self.stop and not tokenizer.eos_token:
            raise ValueError(
                "the chat template ends a turn with nothing and the tokenizer has no eos_token: nothing teaches it to"
                " stop"
            )
        thinking = self.render(
            [user, {"role": "assistant", "content": SENTINEL, "reasoning_content": "q7Zreasoningq7Z"}]
        )
        self.keeps_reasoning = "q7Zreasoningq7Z" in thinking
        # what a generation prompt adds, if it and what ends a turn have control tokens: see _segments_by_tokens
        alone, asked = self.render([user]), self.render([user], add_generation_prompt=True)
        prompt = asked.removeprefix(alone) if asked.startswith(alone) else ""
        marked = all(any(token in text for token in self.control) for text in (prompt, self.stop or prompt))
        self.prompt = prompt if marked else ""
        self.rewrites_history = self._rewrites_history()
        pieces = self.segments([user, {"role": "assistant", "content": SENTINEL}])
        apart = [token for ids in self.encode([text for text, _ in pieces]) for token in ids]
        if apart != self.encode(["".join(text for text, _ in pieces)])[0]:
            raise ValueError(
                "the tokenizer changes text that is tokenised in pieces (a prefix space?): prompt and answer cannot be"
                " told apart"
            )

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The template's text. Raises BadRow if the template refuses the conversation, or fails on it."""
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TEMPLATE_ERRORS as error:
            what = str(error) or type(error).__name__
            raise BadRow(f"the chat template refuses this conversation: {what}") from None

    def _rewrites_history(self) -> bool:
        """Whether an earlier turn without reasoning is written otherwise than the same turn at the end."""
        user = {"role": "user", "content": "q7Zuserq7Z"}
        turns = [user, {"role": "assistant", "content": SENTINEL}]
        alone = [text for text, supervised in self.segments(turns) if supervised]
        try:
            both = [text for text, supervised in self.segments([*turns, user, turns[1]]) if supervised]
        except BadRow:
            return True
        return not both[0].startswith(alone[0]) if self.stop else not alone[0].startswith(self._text_of(both[0]))

    def _text_of(self, answer):
        """A supervised piece without the token that ends it."""
        end = next((token for token in self.control if answer.endswith(token)), "")
        return answer.removesuffix(end)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, with no special token added: the template has already written them (no second
        BOS)."""
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]

    def documents(self, messages: list[dict]) -> list[list[tuple[str, bool]]]:
        """The documents of one conversation, each a list of (text, supervised) pieces that make up its rendering.

        One document, unless the template writes earlier turns in another way: then one document a turn, each ending
        with the turn that it supervises, which is how the model will see that turn, and no reasoning is lost. Raises
        BadRow when the template drops text.
        """
        if self.keeps_reasoning:
            messages = [_reasoning_apart(message) for message in messages]
        for i, message in enumerate(messages):
            for token in self.control:
                if token in message["content"] or token in message.get("reasoning_content", ""):
                    raise BadRow(f"messages[{i}] contains the control token {token!r} as text")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(turns) == 1 or not (self.rewrites_history or self._hidden(messages)):
            pieces = self.segments(messages)
            if len(turns) == 1 or self._lost(messages, pieces) is None:
                self._check(messages, pieces)
                return [pieces]
        found = []
        for i in turns:
            pieces = self.last_turn(messages[: i + 1])
            self._check(messages[: i + 1], pieces, only_last=True)
            found.append(pieces)
        return found

    def _check(self, messages, pieces, only_last=False):
        """Raise BadRow if the rendering lacks a part of the conversation."""
        hidden = self._hidden(messages)
        if hidden and (not only_last or hidden[-1] == len(messages) - 1):
            raise BadRow(f"the chat template drops the reasoning in messages[{hidden[-1]}]")
        if (lost := self._lost(messages, pieces, only_last)) is not None:
            raise BadRow(f"the chat template drops {lost}")

    def _hidden(self, messages) -> list[int]:
        """The assistant turns whose reasoning the template leaves out, found by where it puts a mark in its place: the
        reasoning's own words may well stand in an answer."""
        marks = {i: f"q7Zreason{i}q7Z" for i, message in enumerate(messages) if message.get("reasoning_content")}
        if not marks:
            return []
        marked = [m | {"reasoning_content": marks[i]} if i in marks else m for i, m in enumerate(messages)]
        if not self.keeps_reasoning:
            marked = [_reasoning_in_content(message) for message in marked]
        text = self.render(marked)
        return [i for i, mark in marks.items() if mark not in text]

    def _lost(self, messages: list[dict], pieces: list[tuple[str, bool]], only_last: bool = False) -> str | None:
        """The first part of the conversation that is missing from the rendering, in words, or None. `only_last`: of the
        assistant turns check the last one."""
        answers = [_words(text) for text, supervised in pieces if supervised]
        whole = _words("".join(text for text, _ in pieces))
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                if _words(message["content"]) not in whole:
                    return f"the content of messages[{i}]"
            elif not only_last or i == turns[-1]:
                text = answers[-1 if only_last else turns.index(i)]
                if _words(message["content"]) not in text:
                    return f"a part of the answer in messages[{i}]"
                if _words(message.get("reasoning_content", "")) not in text:
                    return f"the reasoning in messages[{i}]"
        return None

    def _segments_by_tokens(self, messages, full) -> list[tuple[str, bool]] | None:
        """`segments` of a long conversation in one pass: a turn lies between the generation prompt and the end-of-turn
        text, or the token that the next turn begins with, and no message can contain these. None where that finds
        another number of turns."""
        pieces, at = [], 0
        starts = [match.end() for match in re.finditer(re.escape(self.prompt), full)]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(starts) != len(turns):
            return None
        ends = re.compile(re.escape(self.stop) if self.stop else "|".join(map(re.escape, self.control)))
        for i, start in zip(turns, starts, strict=True):
            end = ends.search(full, start)
            if end is not None and (self.stop or messages[i + 1]["role"] == "user"):
                stop = end.end()
            elif end is not None:
                stop = end.start()
            elif self.stop:
                return None
            else:  # nothing ends the last turn
                full = full[: len(full) - len(self.tail)] + self.tokenizer.eos_token
                stop = len(full)
            pieces += [(full[at:start], False), (full[start:stop], True)]
            at = stop
        return [*pieces, (full[at:], False)] if at < len(full) else pieces

    def last_turn(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """(context, last answer, and what follows it) of a conversation as (text, supervised) pieces."""
        if not self.keeps_reasoning:
            messages = [_reasoning_in_content(message) for message in messages]
        full, prompt = self.render(messages), self.render(messages[:-1], add_generation_prompt=True)
        end = len(full) - len(self.tail)
        if not full.startswith(prompt) or not full.endswith(self.tail) or end <= len(prompt):
            raise BadRow(
                f"the chat template's generation prompt {prompt[-40:]!r} is not how it begins an assistant turn "
                f"{full[len(prompt) - 40 : len(prompt)]!r}; train with a template whose prompt and turns agree"
            )
        answer = full[len(prompt) : end] + (self.stop or self.tokenizer.eos_token)
        rest = full[end + len(self.stop) :] if self.stop else ""
        return [(prompt, False), (answer, True), *([(rest, False)] if rest else [])]

    def segments(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """Split the rendering of a conversation into (text, supervised) pieces, at least one a turn and one before
        it. Raises BadRow if the template's prompt and turns do not agree."""
        if not self.keeps_reasoning:
            messages = [_reasoning_in_content(message) for message in messages]
        full = self.render(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(turns) > MANY_TURNS and self.prompt and (pieces := self._segments_by_tokens(messages, full)):
            return pieces
        prompts = [self.render(messages[:i], add_generation_prompt=True) for i in turns]
        pieces, at = [], 0
        for n, (i, prompt) in enumerate(zip(turns, prompts, strict=True)):
            if not full.startswith(prompt):
                raise BadRow(
                    f"the chat template's generation prompt {prompt[-40:]!r} is not how it begins an assistant turn "
                    f"{full[len(prompt) - 40 : len(prompt)]!r}; train with a template whose prompt and turns agree"
                )
            pieces.append((full[at : len(prompt)], False))
            if n + 1 < len(turns):
                context = self.render(
                    [*messages[:i], {"role": "assistant", "content": SENTINEL}, *messages[i + 1 : turns[n + 1]]], True
                )
                after = context[context.index(SENTINEL) + len(SENTINEL) :]
                end = len(prompts[n + 1]) - len(after)
            else:
                after, end = self.tail, len(full) - len(self.tail)
            if not full[end:].startswith(after) or end <= len(prompt):
                raise BadRow(f"the chat template changes what follows a turn ({after[:40]!r}) with the turn's content")
            if self.stop and after.startswith(self.stop):
                end += len(self.stop)
            elif n + 1 < len(turns) and messages[i + 1]["role"] == "user":
                end += max((len(token) for token in self.control if after.startswith(token)), default=0)
            elif n + 1 == len(turns):
                # nothing ends the last turn: the end-of-sequence token does, in place of trailing white space
                full = full[:end] + self.tokenizer.eos_token
                end = len(full)
            pieces.append((full[len(prompt) : end], True))
            at = end
        if at < len(full):
            pieces.append((full[at:], False))
        return pieces


def _words(text: str) -> str:
    """The text with its white space made even: templates strip and add lines."""
    return " ".join(text.split())


INLINE = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


def _reasoning_apart(message: dict) -> dict:
    """For a template with a reasoning field: reasoning that was written into the content, as models print it."""
    match = INLINE.fullmatch(message["content"]) if message["role"] == "assistant" else None
    if match is None or message.get("reasoning_content") or not match[2].strip():
        return message
    apart = {"role": "assistant", "content": match[2]}
    return apart | {"reasoning_content": match[1].strip()} if match[1].strip() else apart


def _reasoning_in_content(message: dict) -> dict:
    """For a template without a reasoning field: write the reasoning where a reasoning model would."""
    reasoning = message.get("reasoning_content")
    if not reasoning:
        return message
    return {"role": message["role"], "content": f"<think>\n{reasoning.strip()}\n</think>\n\n{message['content']}"}
