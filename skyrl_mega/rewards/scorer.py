"""What the pipeline asks of a term, and what counts as a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from skyrl_mega.errors import RewardError
from skyrl_mega.rewards.inputs import RewardInput

#: A score, or why there is none.
Outcome = float | RewardError


class Scorer(Protocol):
    """One term of the reward. Any number of groups are scored at once, in one event loop."""

    async def score(self, inputs: Sequence[RewardInput]) -> list[Outcome]:
        """A score, or the error that came in its place, for each input. Raises only what must end the run."""
        ...

    async def close(self) -> None:
        """Frees what it holds."""
        ...


def to_outcome(value: Any, term: str, place: str) -> Outcome:
    """`value` as a score: a finite number (bool and numpy's numbers are numbers, text is none)."""
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if math.isfinite(number):
        return number
    return RewardError(f"reward `{term}` must give a finite number, but for {place} it gave {str(value)[:200]!r}.")


def failure(error: BaseException, term: str, place: str) -> RewardError:
    """The error that names the term and the trajectory, caused by `error`."""
    what = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
    named = RewardError(f"reward `{term}` failed for {place}: {what}")
    named.__cause__ = error
    return named
