"""Arithmetic problems by level, with worked examples before the question. Answers are graded exactly.

A problem is held out for evaluation by a hash of its operator and its *unordered* operands, so that b + a is never trained
where a + b is evaluated. Neither the split nor the evaluation set depends on the seed: every run is measured on the same
problems. The worked examples shown in prompts are in neither split.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from skyrl_mega.envs.base import Observation, Reply, Split, TextEnvBase, nearest, stable_hash
from skyrl_mega.envs.registry import register_env
from skyrl_mega.errors import EnvError

_HASH_RANGE = 1 << 64


@dataclass(frozen=True)
class Level:
    """Operands are drawn from low..high; `held_out` is the share of unordered problems kept for evaluation.

    Small levels hold out a larger share, so that each but the smallest has more than 128 evaluation problems.
    """

    operator: Literal["+", "-", "*"]
    low: int
    high: int
    held_out: float
    examples: tuple[tuple[int, ...], ...]
    num_operands: int = 2


LEVELS: Mapping[str, Level] = {
    "one_digit_addition": Level("+", 0, 9, 1 / 3, ((2, 3), (6, 1), (4, 7))),
    "two_digit_addition": Level("+", 10, 99, 1 / 16, ((31, 4), (52, 29), (67, 18))),
    "three_digit_addition": Level("+", 100, 999, 1 / 256, ((310, 45), (521, 294), (187, 618))),
    "two_digit_subtraction": Level("-", 10, 99, 1 / 16, ((31, 4), (82, 29), (75, 52))),
    "multiplication": Level("*", 2, 30, 2 / 5, ((12, 3), (7, 8), (25, 4))),
    "three_term_addition": Level("+", 1, 20, 1 / 8, ((3, 14, 9), (5, 5, 12), (18, 2, 7)), num_operands=3),
}
#: `mixed` draws from these in turn; one-digit addition is left out, its evaluation set being tiny.
MIXED = tuple(name for name in LEVELS if name != "one_digit_addition")


def solve(operator: str, operands: tuple[int, ...]) -> int:
    """The exact answer."""
    if operator == "+":
        return sum(operands)
    left, right = operands
    return left - right if operator == "-" else left * right


def _key(level_name: str, operands: tuple[int, ...]) -> str:
    """The problem whatever the order of its operands."""
    return f"{level_name}/{LEVELS[level_name].operator.join(str(operand) for operand in sorted(operands))}"


def _is_example(level: Level, operands: tuple[int, ...]) -> bool:
    return any(sorted(example) == sorted(operands) for example in level.examples)


def _is_held_out(level_name: str, operands: tuple[int, ...]) -> bool:
    return stable_hash("held out", _key(level_name, operands)) < LEVELS[level_name].held_out * _HASH_RANGE


def _ordered(level: Level, operands: tuple[int, ...]) -> tuple[int, ...]:
    """Subtraction takes the smaller from the larger: no answer is negative."""
    return tuple(sorted(operands, reverse=True)) if level.operator == "-" else operands


@functools.cache
def _eval_problems(level_name: str) -> tuple[tuple[int, ...], ...]:
    """All held-out problems of a level, each once, in a fixed shuffled order; the operands' order is fixed by hash too."""
    level = LEVELS[level_name]
    unordered = itertools.combinations_with_replacement(range(level.low, level.high + 1), level.num_operands)
    held_out = [o for o in unordered if _is_held_out(level_name, o) and not _is_example(level, o)]
    held_out.sort(key=lambda operands: stable_hash("order", _key(level_name, operands)))
    shuffled = (Random(stable_hash("operands", _key(level_name, o))).sample(o, len(o)) for o in held_out)
    return tuple(_ordered(level, tuple(operands)) for operands in shuffled)


def _train_problem(level_name: str, index: int, seed: int) -> tuple[int, ...]:
    level = LEVELS[level_name]
    random = Random(stable_hash("train", level_name, seed, index))
    while True:  # held-out shares are below one half, so this ends at once
        operands = _ordered(level, tuple(random.randint(level.low, level.high) for _ in range(level.num_operands)))
        if not _is_held_out(level_name, operands) and not _is_example(level, operands):
            return operands


def _check_level(level: str) -> None:
    if level not in LEVELS and level != "mixed":
        raise EnvError(f"arithmetic has no level {level!r}{nearest(str(level), [*LEVELS, 'mixed'])}")


@register_env("arithmetic")
class ArithmeticEnv(TextEnvBase):
    """One question, one answer, reward 1.0 or 0.0.

    Style "raw" shows worked examples and leaves the last one open (`31 + 4 = 35\\n47 + 35 =`); the stripped action must be
    the number. Style "chat" asks in one user message; the last integer of the action must be the number.
    """

    def __init__(self, *, level: str = "two_digit_addition", shots: int = 1, style: Literal["raw", "chat"] = "raw") -> None:
        _check_level(level)
        most = min(len(entry.examples) for entry in LEVELS.values())
        if not isinstance(shots, int) or not 0 <= shots <= most:
            raise EnvError(f"arithmetic option shots must be an integer from 0 to {most}, but is {shots!r}.")
        if style not in ("raw", "chat"):
            raise EnvError(f"arithmetic option style must be 'raw' or 'chat', but is {style!r}.")
        super().__init__(chat=style == "chat", level=level)
        self.shots = shots
        self.style = style
        self._answer = 0

    @classmethod
    def generate_payload(cls, index: int, seed: int, split: Split, **options: Any) -> dict[str, Any]:
        """{"level": ..., "operands": [...]}. Training problems are drawn at random, so one may come again."""
        level = options.get("level", "two_digit_addition")
        _check_level(level)
        name, position = (MIXED[index % len(MIXED)], index // len(MIXED)) if level == "mixed" else (level, index)
        if split == "train":
            return {"level": name, "operands": list(_train_problem(name, position, seed))}
        problems = _eval_problems(name)
        if position >= len(problems):
            raise EnvError(
                f"arithmetic level {name!r} has {len(problems)} held-out problems, but number {position + 1} was asked for. "
                "Lower evaluation.num_prompts, or choose a larger level."
            )
        return {"level": name, "operands": list(problems[position])}

    @classmethod
    def check_payload(cls, payload: Mapping[str, Any]) -> None:
        name, operands = payload.get("level"), payload.get("operands")
        if not isinstance(name, str) or name not in LEVELS:
            raise EnvError(f"an arithmetic payload's level must be one of {', '.join(LEVELS)}, but is {name!r}.")
        count = LEVELS[name].num_operands
        if not isinstance(operands, list) or len(operands) != count or any(type(operand) is not int for operand in operands):
            raise EnvError(
                f"the operands of an arithmetic payload of level {name!r} must be {count} integers, but are {operands!r}."
            )

    @classmethod
    def payload_key(cls, payload: Mapping[str, Any]) -> str:
        return _key(payload["level"], tuple(payload["operands"]))

    def pose(self, payload: Mapping[str, Any]) -> Observation:
        level = LEVELS[payload["level"]]
        operands = tuple(payload["operands"])
        self._answer = solve(level.operator, operands)
        question = _expression(level, operands)
        if self.style == "chat":
            return [{"role": "user", "content": f"Calculate {question}. Reply with only the number."}]
        lines = [f"{_expression(level, example)} = {solve(level.operator, example)}" for example in level.examples[: self.shots]]
        return "\n".join([*lines, f"{question} ="])

    def respond(self, action: str) -> Reply:
        if self.style == "chat":
            integers = re.findall(r"-?\d+", action)
            answer = integers[-1] if integers else None
        else:
            answer = action.strip() or None
        correct = answer == str(self._answer)
        return Reply(reward=float(correct), metrics={"accuracy": float(correct)}, answer=answer)


def _expression(level: Level, operands: tuple[int, ...]) -> str:
    return f" {level.operator} ".join(str(operand) for operand in operands)
