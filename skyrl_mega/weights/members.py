"""The engines that still take part in a version, and why the others do not.

An engine that dies, refuses or misses a deadline is dropped with the reason; the version goes on with the rest. Only when
none is left is that an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from skyrl_mega.errors import EngineDiedError, WeightSyncError
from skyrl_mega.protocols import WeightReceiver

Result = TypeVar("Result")


class Members:
    """One version's engines. `failed` is the reason for each that was dropped, in order. For one thread."""

    def __init__(self, receivers: Sequence[WeightReceiver], version: int, timeout_s: float) -> None:
        """Raises WeightSyncError if there is no receiver, or two have one name."""
        self._receivers = {receiver.name: receiver for receiver in receivers}
        self._version, self._timeout_s = version, timeout_s
        self.failed: dict[str, str] = {}
        self._causes: dict[str, BaseException] = {}
        self._refusing: list[WeightReceiver] = []
        if len(self._receivers) != len(receivers):
            names = ", ".join(receiver.name for receiver in receivers)
            raise WeightSyncError(f"every engine of a fleet must have a name of its own; they are {names}.")
        self.require_some()

    def names(self) -> list[str]:
        """Those who take part, in the order given."""
        return list(self._receivers)

    def receivers(self) -> list[WeightReceiver]:
        """Those who take part, in the order given."""
        return list(self._receivers.values())

    def each(self, what: str, call: Callable[[WeightReceiver], Future[Result]]) -> dict[str, Result]:
        """Calls every receiver, then waits for all of them: the results of those who did it; the others are dropped.

        `what` completes "it did not ... in time".
        """
        return self.settle(what, {receiver.name: call(receiver) for receiver in self.receivers()})

    def settle(self, what: str, futures: Mapping[str, Future[Result]], *, deadline: float | None = None) -> dict[str, Result]:
        """The results of `futures`, by name, of those who still take part.

        Drops whose future fails, or is not done at `deadline` (`time.monotonic()`).
        """
        futures = {name: future for name, future in futures.items() if name in self._receivers}
        remaining = self._timeout_s if deadline is None else max(0.0, deadline - time.monotonic())
        wait(futures.values(), timeout=remaining)
        results = {}
        for name, future in futures.items():
            if not future.done():
                future.cancel()
                self.drop(name, f"it did not {what} within {self._timeout_s:g} s", answers=False)
            elif future.cancelled():
                self.drop(name, f"it did not {what}: the call was cancelled", answers=False)
            elif (error := future.exception()) is not None:
                self._causes.setdefault(name, error)
                answers = not isinstance(error, EngineDiedError)
                self.drop(name, f"it did not {what}: {type(error).__name__}: {error}", answers=answers)
            else:
                results[name] = future.result()
        return results

    def drop(self, name: str, reason: str, *, answers: bool = True) -> None:
        """`name` takes no further part, for the first `reason` given. `answers`: it is alive and can be told so."""
        receiver = self._receivers.pop(name, None)
        if receiver is not None:
            self.failed[name] = reason
            if answers:
                self._refusing.append(receiver)

    def dismiss(self, *, all_of_them: bool) -> None:
        """Tells the dropped who still answer to abandon the version, or `all_of_them` who answer; waits for that."""
        leaving = [*self._refusing, *(self.receivers() if all_of_them else ())]
        self._refusing = []
        wait([receiver.abandon() for receiver in leaving], timeout=self._timeout_s)

    def reasons(self) -> str:
        """One line: who was dropped and why."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.failed.items())

    def require_some(self) -> None:
        """Raises WeightSyncError, with every reason, if no engine is left."""
        if not self._receivers:
            causes: list[Any] = list(self._causes.values())
            raise WeightSyncError(
                f"no engine received weight version {self._version}: {self.reasons() or 'there is none to receive it'}."
            ) from (causes[-1] if causes else None)
