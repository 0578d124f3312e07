"""Whole conversations as token ids, and which of their tokens the assistant wrote.

A template with `{% generation %}` marks says so itself (Hugging Face's `return_assistant_tokens_mask`). With any other, an
assistant's turn is what the rendered conversation has after the rendering of all messages before it with the assistant's header,
up to the end of the rendering that ends with it. That holds only where a template never changes what it has written, which is
checked: templates that drop an earlier turn's reasoning, say, do, and training would see other tokens than generation did.

What follows the end-of-turn token (a line break, mostly) is not trained: no rollout samples it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from skyrl_mega.errors import ConfigError, DataError

Message = Mapping[str, Any]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages: mappings with a `role`, and a text `content` or (an assistant's) `tool_calls`."""
    return isinstance(value, list) and bool(value) and all(_is_message(message) for message in value)


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str) or bool(value.get("tool_calls"))


class ConversationEncoder:
    """Conversations through a Hugging Face tokenizer's template. Raises ConfigError for a tokenizer that has none."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "`data.chat_template` is true, and the model's tokenizer has no chat template. Set `data.chat_template=false` for"
                " raw text, or add chat_template.jinja to model.path."
            )
        self._tokenizer = tokenizer
        self._has_marks = bool(_GENERATION_MARK.search(str(tokenizer.chat_template)))

    def encode(
        self, messages: Sequence[Message], trained: Collection[int], where: str, *, tools: Any = None
    ) -> tuple[list[int], list[bool]]:
        """(token ids, mask of the assistant's messages whose numbers are in `trained`), nothing after the last trained token.

        `where` is for errors: DataError where the template refuses the messages, or does not let a turn be found.
        """
        for number in trained:
            if number == 0:
                raise DataError(f"{where}: an assistant's message that is trained must answer another; the first answers none.")
        encode = self._marked if self._has_marks else self._by_difference
        ids, mask = encode(messages, trained, where, tools)
        end = max((position for position, is_trained in enumerate(mask) if is_trained), default=-1) + 1
        return ids[:end], mask[:end]

    def _marked(
        self, messages: Sequence[Message], trained: Collection[int], where: str, tools: Any
    ) -> tuple[list[int], list[bool]]:
        rendered = self._apply(messages, where, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, marks = list(rendered["input_ids"]), list(rendered["assistant_masks"])
        runs = [list(run) for is_marked, run in itertools.groupby(range(len(ids)), key=lambda i: bool(marks[i])) if is_marked]
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(runs) != len(turns):
            raise DataError(
                f"{where}: the chat template marks {len(runs)} generations for {len(turns)} assistant's messages, which can't be"
                " told apart then. Correct its {% generation %} blocks."
            )
        kept = {position for number, run in zip(turns, runs, strict=True) if number in trained for position in run}
        return ids, [position in kept for position in range(len(ids))]

    def _by_difference(
        self, messages: Sequence[Message], trained: Collection[int], where: str, tools: Any
    ) -> tuple[list[int], list[bool]]:
        whole = self._apply(messages, where, tools, tokenize=False)
        ids: list[int] = []
        mask: list[bool] = []
        at = 0
        for number in sorted(trained):
            before = self._apply(messages[:number], where, tools, tokenize=False, add_generation_prompt=True)
            through = self._apply(messages[: number + 1], where, tools, tokenize=False)
            turn = through[len(before) :].rstrip()
            content = (messages[number].get("content") or "").strip()
            if not (through.startswith(before) and whole.startswith(through) and turn and content in turn):
                raise DataError(
                    f"{where}: the assistant's message {number} can't be found in what the chat template makes of the"
                    " conversation: it writes earlier turns differently once others follow, or its header differs from the one"
                    " for generation. Train the last turn only (`sft.train_on=last`), split the conversation into rows, or add"
                    " {% generation %} marks to the template."
                )
            for text, is_trained in ((whole[at : len(before)], False), (turn, True)):
                piece = self._tokenizer.encode(text, add_special_tokens=False)
                ids += piece
                mask += [is_trained] * len(piece)
            at = len(before) + len(turn)
        if at < len(whole):
            rest = self._tokenizer.encode(whole[at:], add_special_tokens=False)
            ids, mask = ids + rest, mask + [False] * len(rest)
        return ids, mask

    def _apply(self, messages: Sequence[Message], where: str, tools: Any, **how: Any) -> Any:
        from jinja2.exceptions import TemplateError

        try:
            return self._tokenizer.apply_chat_template(list(messages), tools=tools, **how)
        except (TemplateError, TypeError) as error:
            roles = [message["role"] for message in messages]
            raise DataError(f"{where}: the chat template refuses messages with the roles {roles}: {error}") from error
