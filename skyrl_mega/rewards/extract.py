"""The score in a judge's answer, as a number from 0 to 1."""

from __future__ import annotations

import json
import re
from typing import Any

from skyrl_mega.config.schema import JudgeTerm
from skyrl_mega.errors import RewardError

_MOST_OF_AN_ANSWER = 200


def find_score(answer: str, term: JudgeTerm) -> float:
    """The answer's score: `min_score` is 0, `max_score` is 1. Judges reason first, so the last score counts.

    Raises RewardError where the answer has none, or one outside of the range.
    """
    found = _last_match(answer, term.pattern) if term.extract == "regex" else _last_value(answer, term.key)
    if found is None:
        wanted = f"nothing that `{term.pattern}` matches" if term.extract == "regex" else f"no JSON object with `{term.key}`"
        raise RewardError(f"the answer has {wanted}: {_tail(answer)}")
    try:
        score = float("nan") if isinstance(found, bool) else float(found)
    except (TypeError, ValueError):
        score = float("nan")
    if not term.min_score <= score <= term.max_score:
        raise RewardError(
            f"the score must be a number from {term.min_score:g} to {term.max_score:g}, but is {found!r}: {_tail(answer)}"
        )
    return (score - term.min_score) / (term.max_score - term.min_score)


def _last_match(answer: str, pattern: str) -> str | None:
    found = None
    for found in re.finditer(pattern, answer):  # noqa: B007 (the last match is what is wanted)
        pass
    return None if found is None else found.group(1)


def _last_value(answer: str, key: str) -> Any:
    """The value of `key` in the last JSON object of the text that has it, in fences or among words; None without one."""
    decoder = json.JSONDecoder()
    value, start = None, answer.find("{")
    while start >= 0:
        try:
            found, end = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            value = found.get(key, value)
        start = answer.find("{", end)
    return value


def _tail(answer: str) -> str:
    return repr(answer if len(answer) <= _MOST_OF_AN_ANSWER else f"...{answer[-_MOST_OF_AN_ANSWER:]}")
