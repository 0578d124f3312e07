"""Grade-school word problems in the GSM8K format (arXiv:2110.14168): rows {question, answer}, gold number after `####`.

Numbers are compared as exact decimals. Symbolic checkers were left out: every gold answer of the data set is a plain number,
and theirs cost milliseconds per answer and refuse to run in threads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

from skyrl_mega.envs.base import Observation, Reply, TextEnvBase, stable_hash
from skyrl_mega.envs.registry import register_env
from skyrl_mega.errors import EnvError

INSTRUCTION = "Think step by step, then end with the final answer on a line of its own: #### <number>"
MARKER = "####"

# 1,234.50   -7   $12   -$3   $-3   .5   50%   (the sign counts only where no digit or letter stands before it: "8-3" is 8 and 3)
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])-)?\$?\s?(?P<sign2>(?<=\$)-)?(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)%?"
)


def last_number(text: str) -> Decimal | None:
    """The last number in the text, or None. Thousands commas, a dollar sign and a percent sign are read over."""
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 (the last match is what is wanted)
        pass
    if found is None:
        return None
    value = Decimal(found["digits"].replace(",", ""))
    return -value if found["sign"] or found["sign2"] else value


def marked_number(text: str) -> Decimal | None:
    """The last number on the line that follows the last `####`, or None if there is no marker or no number."""
    _, marker, tail = text.rpartition(MARKER)
    if not marker or not tail.strip():
        return None
    return last_number(tail.strip().splitlines()[0])


@register_env("gsm8k")
class GSM8KEnv(TextEnvBase):
    """One question as a chat message, reward 1.0 for the right number, else 0.0.

    `grading` "strict" takes the number after `####` alone; "flexible" takes, where there is none, the last number of the text.
    Metrics: accuracy (the reward), format (a number stood after `####`).
    """

    def __init__(self, *, grading: Literal["strict", "flexible"] = "strict", instruction: str = INSTRUCTION) -> None:
        if grading not in ("strict", "flexible"):
            raise EnvError(f"gsm8k option grading must be 'strict' or 'flexible', but is {grading!r}.")
        super().__init__(chat=True)
        self.grading = grading
        self.instruction = instruction
        self._gold = Decimal(0)

    @classmethod
    def check_payload(cls, payload: Mapping[str, Any]) -> None:
        for name in ("question", "answer"):
            if not isinstance(payload.get(name), str) or not payload[name].strip():
                raise EnvError(
                    f"a gsm8k row must have the text {name!r}, but has {payload.get(name)!r} (keys {sorted(payload)})."
                )
        if marked_number(payload["answer"]) is None:
            raise EnvError(
                f"the answer of a gsm8k row must hold a number after {MARKER!r}, but ends {payload['answer'][-40:]!r}."
            )

    @classmethod
    def payload_key(cls, payload: Mapping[str, Any]) -> str:
        """By the question alone: the same question with another solution is the same task."""
        return f"{stable_hash(' '.join(payload['question'].split())):016x}"

    def pose(self, payload: Mapping[str, Any]) -> Observation:
        gold = marked_number(payload["answer"])
        assert gold is not None  # check_payload has seen it
        self._gold = gold
        content = f"{payload['question'].strip()}\n\n{self.instruction}" if self.instruction else payload["question"].strip()
        return [{"role": "user", "content": content}]

    def respond(self, action: str) -> Reply:
        marked = marked_number(action)
        number = last_number(action) if marked is None and self.grading == "flexible" else marked
        correct = number is not None and number == self._gold
        metrics = {"accuracy": float(correct), "format": float(marked is not None)}
        # 1.50 and 1.5 are one answer.
        return Reply(reward=float(correct), metrics=metrics, answer=None if number is None else f"{number.normalize():f}")
