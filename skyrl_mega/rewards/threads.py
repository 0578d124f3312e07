"""Blocking calls beside an event loop: each in a daemon thread of its own, each with a deadline.

A call that runs out of time, or that nobody waits for any more, can't be stopped: Python has no way to end a thread. It is left
behind, until too many hang. Daemon threads never keep the process alive.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from skyrl_mega.errors import DeadlineError, RewardError

#: Calls that may hang beyond their deadline before the run ends: memory and file descriptors hang with them.
MAX_LOST_THREADS = 64


class DaemonThreads:
    """`await threads(function, argument ...)` from one event loop; at most `max_threads` at once, the others wait."""

    def __init__(self, name: str, timeout_s: float, *, max_threads: int, sequential: bool = False) -> None:
        """`sequential`: the event loop stands still during each call, so that whatever else goes on repeats exactly."""
        self._name, self._timeout_s, self._sequential = name, timeout_s, sequential
        self._slots = asyncio.Semaphore(max_threads)
        self._lost: list[_Call] = []

    async def __call__(self, function: Callable[..., Any], /, *args: Any) -> Any:
        """What the function returns, or raises.

        Raises TimeoutError if it has not returned `timeout_s` after it began, DeadlineError if too many calls hang already.
        """
        async with self._slots:
            call = _Call(lambda: function(*args), asyncio.get_running_loop())
            threading.Thread(target=call.run, name=self._name, daemon=True).start()
            try:
                await self._wait(call)
            except TimeoutError:
                if not call.ended.is_set():
                    self._leave(call)
                    self._check_lost()
                    raise TimeoutError(f"no answer within {self._timeout_s:g} s") from None
            except asyncio.CancelledError:
                self._leave(call)
                raise
        if call.error is None:
            return call.value
        if isinstance(call.error, Exception):
            raise call.error
        raise RewardError(f"{self._name} ended with {call.error!r}") from call.error

    async def _wait(self, call: _Call) -> None:
        if self._sequential:
            if not call.ended.wait(self._timeout_s):
                raise TimeoutError
            return
        async with asyncio.timeout(self._timeout_s):
            await call.told.wait()

    def _leave(self, call: _Call) -> None:
        self._lost = [lost for lost in [*self._lost, call] if not lost.ended.is_set()]

    def _check_lost(self) -> None:
        if len(self._lost) > MAX_LOST_THREADS:
            raise DeadlineError(
                f"{len(self._lost)} calls of {self._name} hang beyond timeout_s ({self._timeout_s:g} s) and can't be ended; mend "
                "it, or raise its timeout_s."
            )


class _Call:
    def __init__(self, function: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._function, self._loop = function, loop
        self.value: Any = None
        self.error: BaseException | None = None
        self.ended = threading.Event()
        self.told = asyncio.Event()

    def run(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:  # noqa: BLE001 (handed to the caller, whatever it is)
            self.error = error
        self.ended.set()
        try:
            self._loop.call_soon_threadsafe(self.told.set)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more
