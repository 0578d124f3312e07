"""Calls that are tried again, each time after a longer pause."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import tenacity

Result = TypeVar("Result")

#: Pauses are random, up to this and doubling: so that a group's requests do not come back all at once.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0

_jitter = tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S)


async def with_retries(
    call: Callable[[], Awaitable[Result]], *, retries: int, is_transient: Callable[[BaseException], bool]
) -> Result:
    """The first success of `retries` + 1 attempts. Raises the last error, and at once one that is not transient.

    An error's attribute `retry_after_s` lengthens the pause (up to `LONGEST_PAUSE_S`).
    """
    attempts = tenacity.AsyncRetrying(
        stop=tenacity.stop_after_attempt(retries + 1),
        wait=_pause,
        retry=tenacity.retry_if_exception(is_transient),
        reraise=True,
    )

    async def attempt() -> Result:  # tenacity awaits coroutine functions only
        return await call()

    return await attempts(attempt)


def _pause(state: Any) -> float:
    asked = getattr(state.outcome.exception(), "retry_after_s", 0.0)
    return min(LONGEST_PAUSE_S, max(_jitter(state), asked))
