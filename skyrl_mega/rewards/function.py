"""Reward functions: any Python callable, by the name of its module or file."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from skyrl_mega.config.schema import FunctionTerm
from skyrl_mega.config.settings import nearest
from skyrl_mega.config.user_functions import load_function
from skyrl_mega.errors import ConfigError, DeadlineError
from skyrl_mega.rewards.attempts import with_retries
from skyrl_mega.rewards.inputs import RewardInput
from skyrl_mega.rewards.scorer import Outcome, failure, to_outcome
from skyrl_mega.rewards.threads import DaemonThreads

#: Functions compute little, or wait (for a sandbox, a server).
MAX_THREADS = 32


class FunctionReward:
    """A `Scorer`. A plain function runs in daemon threads, an async one in the event loop, which it must not block."""

    def __init__(self, term: FunctionTerm, *, sequential: bool = False) -> None:
        """Raises ConfigError if the function can't be had, or can't be called with the term's options."""
        self._term = term
        function = function_of(term)
        self._function = functools.partial(function, **term.options)
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
        threads = 1 if sequential else MAX_THREADS
        self._threads = DaemonThreads(f"reward `{term.name}`", term.timeout_s, max_threads=threads, sequential=sequential)

    async def score(self, inputs: Sequence[RewardInput]) -> list[Outcome]:
        if not self._term.batched:
            return list(await asyncio.gather(*(self._score_one(one) for one in inputs)))
        place = f"group {inputs[0].group_id!r}"
        try:
            scores = list(await self._call(list(inputs)))
            if len(scores) != len(inputs):
                raise ValueError(f"it gave {len(scores)} scores for {len(inputs)} inputs")
        except DeadlineError:
            raise
        except Exception as error:  # noqa: BLE001 (users' code raises anything)
            return [failure(error, self._term.name, place)] * len(inputs)
        return [to_outcome(score, self._term.name, one.place) for score, one in zip(scores, inputs, strict=True)]

    async def _score_one(self, one: RewardInput) -> Outcome:
        try:
            return to_outcome(await self._call(one), self._term.name, one.place)
        except DeadlineError:
            raise
        except Exception as error:  # noqa: BLE001 (users' code raises anything)
            return failure(error, self._term.name, one.place)

    async def _call(self, argument: Any) -> Any:
        return await with_retries(lambda: self._attempt(argument), retries=self._term.retries, is_transient=_may_pass)

    async def _attempt(self, argument: Any) -> Any:
        if not self._is_async:
            return await self._threads(self._function, argument)
        try:
            async with asyncio.timeout(self._term.timeout_s) as deadline:
                return await self._function(argument)
        except TimeoutError as error:
            message = f"no answer within {self._term.timeout_s:g} s" if deadline.expired() else str(error)
            raise TimeoutError(message) from error

    async def close(self) -> None:
        return None


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, DeadlineError)


def function_of(term: FunctionTerm) -> Callable[..., Any]:
    """The function that `term` names, checked to take one input and the term's options.

    Raises ConfigError; what an import of the user's own module raises is its cause.
    """
    try:
        function = load_function(term.path, f"path of reward `{term.name}`")
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"The function of reward `{term.name}` must be importable; `{term.path}` raised {type(error).__name__}: {error}. "
            "Mend it."
        ) from error
    _check_signature(function, term)
    return function


def _check_signature(function: Callable[..., Any], term: FunctionTerm) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # some built-in functions have none
    try:
        signature.bind(None, **term.options)
    except TypeError as error:
        options = [n for n, p in list(signature.parameters.items())[1:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        wrong = next((option for option in term.options if option not in options), None)
        guess = nearest(wrong, options) if wrong is not None else None
        what = "the list of a group's inputs" if term.batched else "one RewardInput"
        raise ConfigError(
            f"The function of reward `{term.name}` must take {what} and the term's options; `{term.path}` has the signature "
            f"{signature}, and the options are {term.options}: {error}."
            + (f" Did you mean `{guess}`?" if guess else f" Its options: {', '.join(options) or 'none'}.")
        ) from error
