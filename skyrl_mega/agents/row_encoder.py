"""Rows of files as examples: which keys each way of training reads, and what of a row is trained.

| way | rows |
|---|---|
| sft | `messages` (and `tools`); `prompt`, `response`; `text`; `input_ids` with `loss_mask` or `labels` |
| pairs | `prompt`, `chosen`, `rejected` (and `margin`); or `chosen`, `rejected` as whole conversations |
| labelled (kto) | `prompt`, `response`, `label` |
| scored | `prompt`, `response`, `score` |

Prompts are texts or messages; `completion` may be written for `response`. Without the chat template all is raw text, prompt and
response encoded one after the other, and a response ends with the tokenizer's end of text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from skyrl_mega.agents.conversations import ConversationEncoder, Message, is_conversation
from skyrl_mega.data.examples import Example, TokenSequence
from skyrl_mega.errors import DataError

Row = Mapping[str, Any]
Tokens = tuple[list[int], list[bool]]
#: What a row may be; see the module.
Kind = Literal["sft", "pairs", "labelled", "scored"]
#: How a sequence is trained: its responses' tokens, or a number read at its end.
Aim = Literal["tokens", "score"]

_EXPECTED = {
    "sft": '{"messages": [...]}, {"prompt", "response"}, {"text"}, or {"input_ids", "loss_mask" or "labels"}',
    "pairs": '{"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} as whole conversations',
    "labelled": '{"prompt", "response", "label": true or false}',
    "scored": '{"prompt", "response", "score": number}',
}


class RowEncoder:
    """Turns rows of one kind into examples. `counts`: rows truncated and dropped so far.

    aim=score adds a token to every sequence and trains nothing else: the position before it, the sequence's last, is where its
    number is read. `too_long`, `max_length`, `chat_template` as in `data`; `train_on` as in `sft`.
    """

    def __init__(
        self,
        tokenizer: Any,
        kind: Kind,
        *,
        vocab_size: int,
        max_length: int,
        too_long: Literal["error", "drop", "truncate"] = "error",
        chat_template: bool = True,
        train_on: Literal["assistant", "last", "all"] = "assistant",
        aim: Aim = "tokens",
    ) -> None:
        """Raises ConfigError for a chat template that is asked for and absent."""
        self._tokenizer = tokenizer
        self._conversations = ConversationEncoder(tokenizer) if chat_template else None
        self._kind, self._vocab_size, self._train_on, self._aim = kind, vocab_size, train_on, aim
        self._max_length, self._too_long = max_length, too_long
        self.counts: Counter[str] = Counter()

    def example(self, row: Row, where: str) -> Example | None:
        """The row's example; None where it is too long and such rows are dropped. Raises DataError, which names `where`."""
        readers: dict[str, Callable[[Row, str], tuple[list[Tokens], float]]] = {
            "sft": self._supervised,
            "pairs": self._pair,
            "labelled": self._labelled,
            "scored": self._scored,
        }
        sequences, target = readers[self._kind](row, where)
        fitted = [self._fit(*tokens, where) for tokens in sequences]
        kept = [sequence for sequence in fitted if sequence is not None]
        is_pair_alike = len(kept) == 2 and kept[0].token_ids.tolist() == kept[1].token_ids.tolist()
        if is_pair_alike and self._too_long != "truncate":
            raise DataError(f"{where}: chosen and rejected are the same tokens; leave the row out.")
        if len(kept) < len(fitted) or is_pair_alike:
            self.counts["dropped"] += 1
            return None
        return Example(where, tuple(kept), target)

    # ---- kinds of rows ----------------------------------------------------------------------------------------------------

    def _supervised(self, row: Row, where: str) -> tuple[list[Tokens], float]:
        if row.get("input_ids") is not None:
            return [self._pretokenised(row, where)], 0.0
        if row.get("messages") is not None:
            return [self._conversation(row["messages"], where, tools=row.get("tools"))], 0.0
        if isinstance(row.get("text"), str):
            ids = self._ended(list(self._tokenizer.encode(row["text"])))
            return [(ids, [True] * len(ids))], 0.0
        return [self._answer(row, self._response(row), where)], 0.0

    def _pair(self, row: Row, where: str) -> tuple[list[Tokens], float]:
        margin = self._number(row, "margin", where) if row.get("margin") is not None else 0.0
        chosen, rejected = row.get("chosen"), row.get("rejected")
        if row.get("prompt") is None and is_conversation(chosen) and is_conversation(rejected):
            assert chosen is not None  # is_conversation
            assert rejected is not None
            same = (one == other for one, other in zip(chosen, rejected, strict=False))
            shared = next((number for number, is_same in enumerate(same) if not is_same), min(len(chosen), len(rejected)))
            sides = [self._conversation(messages, where, first=shared) for messages in (chosen, rejected)]
            return sides, margin
        return [self._answer(row, side, where) for side in (chosen, rejected)], margin

    def _labelled(self, row: Row, where: str) -> tuple[list[Tokens], float]:
        label = row.get("label")
        if not isinstance(label, bool) and label not in (0, 1):
            raise self._unfit(row, where)
        return [self._answer(row, self._response(row), where)], float(label)

    def _scored(self, row: Row, where: str) -> tuple[list[Tokens], float]:
        return [self._answer(row, self._response(row), where)], self._number(row, "score", where)

    @staticmethod
    def _response(row: Row) -> Any:
        return row.get("response") if row.get("response") is not None else row.get("completion")

    def _number(self, row: Row, key: str, where: str) -> float:
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise DataError(
                f"{where}: `{key}` must be a finite number, but is {value!r}. It is read from {_EXPECTED[self._kind]}."
            )
        return float(value)

    def _unfit(self, row: Row, where: str) -> DataError:
        keys = ", ".join(sorted(row)) or "(none)"
        return DataError(f"{where} must be {_EXPECTED[self._kind]}; it has the keys {keys}.")

    # ---- tokens -----------------------------------------------------------------------------------------------------------

    def _answer(self, row: Row, answer: Any, where: str) -> Tokens:
        """A prompt (text or messages) and an answer to it (text, or the messages that follow)."""
        prompt = row.get("prompt")
        if not (isinstance(prompt, str) or is_conversation(prompt)) or not (isinstance(answer, str) or is_conversation(answer)):
            raise self._unfit(row, where)
        if self._conversations is not None:
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
            answered = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
            return self._conversation([*asked, *answered], where, first=len(asked), tools=row.get("tools"))
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise self._needs_template(where)
        before = list(self._tokenizer.encode(prompt, add_special_tokens=False))
        after = self._ended(list(self._tokenizer.encode(answer, add_special_tokens=False)))
        return before + after, [self._train_on == "all"] * len(before) + [True] * len(after)

    def _conversation(self, messages: Any, where: str, *, first: int = 0, tools: Any = None) -> Tokens:
        """A conversation of which the assistant's messages from number `first` on are trained."""
        if self._conversations is None:
            raise self._needs_template(where)
        if not is_conversation(messages):
            raise DataError(
                f'{where}: messages must be a list of {{"role": text, "content": text}}, but are {str(messages)[:120]}.'
            )
        # Parquet gives every message every key that any of them has; templates ask whether a key is there.
        messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant" and number >= first]
        if not turns or messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: the last message must be the assistant's, which is trained.")
        trained: Collection[int] = turns[-1:] if self._train_on == "last" else turns
        ids, mask = self._encoded(messages, trained, where, tools)
        return ids, [True] * len(ids) if self._train_on == "all" else mask

    def _encoded(self, messages: Sequence[Message], trained: Collection[int], where: str, tools: Any) -> Tokens:
        assert self._conversations is not None
        return self._conversations.encode(messages, trained, where, tools=tools)

    def _pretokenised(self, row: Row, where: str) -> Tokens:
        ids, mask, labels = row["input_ids"], row.get("loss_mask"), row.get("labels")
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < self._vocab_size for i in ids):
            raise DataError(
                f"{where}: input_ids must be a list of integers from 0 to {self._vocab_size - 1}, the model's tokens."
            )
        if mask is None and labels is not None:
            if not isinstance(labels, list) or len(labels) != len(ids):
                raise DataError(f"{where}: labels must be as many as input_ids ({len(ids)}), -100 where nothing is trained.")
            wrong = next(
                (n for n, (token, label) in enumerate(zip(ids, labels, strict=True)) if label not in (-100, token)), None
            )
            if wrong is not None:
                raise DataError(
                    f"{where}: labels must repeat input_ids or be -100; label {wrong} is {labels[wrong]}, its token {ids[wrong]}."
                    " (They are not shifted: label t is token t.)"
                )
            mask = [label != -100 for label in labels]
        mask = [True] * len(ids) if mask is None else mask
        if not isinstance(mask, list) or len(mask) != len(ids) or any(m not in (0, 1) for m in mask):
            raise DataError(f"{where}: loss_mask must be as many zeros and ones as there are input_ids ({len(ids)}).")
        return ids, [bool(m) for m in mask]

    def _needs_template(self, where: str) -> DataError:
        return DataError(f"{where} has messages, and `data.chat_template` is false. Set it to true, or write texts.")

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _fit(self, ids: list[int], mask: list[bool], where: str) -> TokenSequence | None:
        """Within `max_length`; None where it is dropped: too long, or nothing that is trained is left of it."""
        if len(ids) > self._max_length:
            if self._too_long == "error":
                raise DataError(
                    f"{where} has {len(ids)} tokens, more than data.max_length ({self._max_length}). Raise it, or set"
                    " data.too_long to truncate or drop."
                )
            if self._too_long == "drop":
                return None
            self.counts["truncated"] += 1
            ids, mask = ids[: self._max_length], mask[: self._max_length]
        if self._aim == "score":
            return TokenSequence.of([*ids, ids[-1]], [False] * len(ids) + [True]) if ids else None
        sequence = TokenSequence.of(ids, mask)
        if sequence.num_loss_tokens == 0 and self._too_long == "error":
            raise DataError(f"{where} has no token to train; leave the row out.")
        return sequence if sequence.num_loss_tokens else None
