"""A tokenizer's chat template, and where assistant turns begin and end in what it renders."""

from malaysian_sft.conversations import BadRow

SENTINEL = "q7Zassistantq7Z"


class ChatFormat:
    """A tokenizer's chat template, and where assistant turns begin and end in what it renders.

    Nothing is known about any template: everything is found by rendering.

    - A turn begins where the generation prompt ends, `render(messages[:i], add_generation_prompt=True)`, so the model
    is trained from
      exactly the text that it is given when it is asked to answer. What the template puts after that by itself
      (Qwen3's empty think block) is something the model has to write, and is supervised.
    - A turn's text ends where the text that the template puts after it begins. That text is found by rendering the same
    conversation with
      the turn's content replaced by a sentinel, because a template may rewrite earlier turns (Qwen3 and GLM-4.5
      strip their reasoning), so that the rendering of `messages[:i + 1]` need not be a prefix of the whole.
    - The end-of-turn text (`<|im_end|>`, `<|eot_id|>`) belongs to the turn; white space after it does not. A template
    without one (GLM-4.5)
      ends a turn with the next role's token, which is then supervised, and the last turn gets the tokenizer's
      end-of-sequence token.
    """

    def __init__(self, tokenizer):
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; a fast one (tokenizer.json) is needed")
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; use an instruction-tuned model's tokenizer")
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        # Text that would become a control token inside a message: it would end the turn, or fake one. Think tags are
        # legitimate content.
        self.control = sorted(
            {t.content for t in added if t.special and t.content not in ("<think>", "</think>")}, key=len, reverse=True
        )
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
        pieces = self.segments([user, {"role": "assistant", "content": SENTINEL}])
        apart = [token for ids in self.encode([text for text, _ in pieces]) for token in ids]
        if apart != self.encode(["".join(text for text, _ in pieces)])[0]:
            raise ValueError(
                "the tokenizer changes text that is tokenised in pieces (a prefix space?): prompt and answer cannot be"
                " told apart"
            )

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, with no special token added: the template has already written them (no second
        BOS)."""
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]

    def documents(self, messages: list[dict]) -> list[list[tuple[str, bool]]]:
        """The documents of one conversation, each a list of (text, supervised) pieces that make up its rendering.

        One document, unless the template strips the reasoning of earlier turns: then one document a turn, each ending
        with the turn that it supervises, which is how the model will see that turn, and no reasoning is lost. Raises
        BadRow when the template drops text.
        """
        from jinja2 import TemplateError

        for i, message in enumerate(messages):
            for token in self.control:
                if token in message["content"] or token in message.get("reasoning_content", ""):
                    raise BadRow(f"messages[{i}] contains the control token {token!r} as text")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            pieces = self.segments(messages)
            if len(turns) == 1 or self._lost(messages, pieces) is None:
                documents = [(messages, pieces)]
            else:
                documents = []
                for i in turns:
                    pieces = self.segments(messages[: i + 1])
                    # all but the last answer, and the white space that may follow it, is context here
                    last = max(n for n, (_, supervised) in enumerate(pieces) if supervised)
                    context = "".join(text for text, _ in pieces[:last])
                    documents.append((messages[: i + 1], [(context, False), *pieces[last:]]))
        except TemplateError as error:
            raise BadRow(f"the chat template refuses this conversation: {error}") from None
        for conversation, pieces in documents:
            only_last = len(documents) > 1
            if (lost := self._lost(conversation, pieces, only_last)) is not None:
                raise BadRow(f"the chat template drops {lost}")
        return [pieces for _, pieces in documents]

    def _lost(self, messages: list[dict], pieces: list[tuple[str, bool]], only_last: bool = False) -> str | None:
        """The first part of the conversation that is missing from the rendering, in words, or None. `only_last`: of the
        assistant turns check the last one."""
        answers = [text for text, supervised in pieces if supervised]
        whole = "".join(text for text, _ in pieces)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                if message["content"].strip() not in whole:
                    return f"the content of messages[{i}]"
            elif not only_last or i == turns[-1]:
                text = answers[-1 if only_last else turns.index(i)]
                if message["content"].strip() not in text:
                    return f"a part of the answer in messages[{i}]"
                if message.get("reasoning_content", "").strip() not in text:
                    return f"the reasoning in messages[{i}]"
        return None

    def segments(self, messages: list[dict]) -> list[tuple[str, bool]]:
        """Split the rendering of a conversation into (text, supervised) pieces, at least one a turn and one before
        it."""
        if not self.keeps_reasoning:
            messages = [_reasoning_in_content(message) for message in messages]
        full = self.render(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [self.render(messages[:i], add_generation_prompt=True) for i in turns]
        pieces, at = [], 0
        for n, (i, prompt) in enumerate(zip(turns, prompts, strict=True)):
            if not full.startswith(prompt):
                raise ValueError(
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
                raise ValueError(
                    f"the chat template changes what follows a turn ({after[:40]!r}) with the turn's content"
                )
            if self.stop and after.startswith(self.stop):
                end += len(self.stop)
            elif n + 1 < len(turns):
                end += max((len(token) for token in self.control if after.startswith(token)), default=0)
            else:  # nothing ends the last turn: the end-of-sequence token does, in place of trailing white space
                full = full[:end] + self.tokenizer.eos_token
                end = len(full)
            pieces.append((full[len(prompt) : end], True))
            at = end
        if at < len(full):
            pieces.append((full[at:], False))
        return pieces


def _reasoning_in_content(message: dict) -> dict:
    """For a template without a reasoning field: write the reasoning where a reasoning model would."""
    reasoning = message.get("reasoning_content")
    if not reasoning:
        return message
    return {"role": message["role"], "content": f"<think>\n{reasoning.strip()}\n</think>\n\n{message['content']}"}
