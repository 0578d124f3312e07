"""Gymnasium spaces for what language models read and write: text of any alphabet, and chat messages."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
from gymnasium import spaces

#: Longest observation or action, in characters, that the spaces contain. Tokens are limited elsewhere (rollout.max_model_len).
MAX_CHARS = 1_000_000


class AnyText(spaces.Text):
    """Text of any Unicode alphabet, up to `max_length` characters; samples are short printable ASCII.

    gymnasium's `Text` contains only strings over a listed charset, but models may write anything.
    """

    def __init__(self, max_length: int = MAX_CHARS, *, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_length, min_length=0, charset=string.printable, seed=seed)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        if mask is None and probability is None:
            mask = (int(self.np_random.integers(min(self.max_length, 32) + 1)), None)
        return super().sample(mask=mask, probability=probability)


def is_chat(value: Any) -> bool:
    """Whether `value` is a list of chat messages: dicts with at least the strings `role` and `content`."""
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )


class ChatMessages(spaces.Space[list[dict[str, str]]]):
    """Lists of chat messages, `{"role": ..., "content": ...}`; the empty list is one (the observation after the end)."""

    def __init__(self, *, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(shape=None, dtype=None, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def contains(self, x: Any) -> bool:
        return is_chat(x)

    def sample(self, mask: Any = None, probability: Any = None) -> list[dict[str, str]]:
        letters = self.np_random.choice(list(string.ascii_letters), size=8)
        return [{"role": "user", "content": "".join(letters)}]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatMessages)

    def __hash__(self) -> int:
        return hash(ChatMessages)
