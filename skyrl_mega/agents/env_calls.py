"""Calls of environments beside an event loop: each in a thread, each with a deadline.

A call that runs out of time can't be stopped: Python has no way to end a thread. So its thread is given up (it is a daemon and
never keeps the process alive), and another takes its place, until too many are lost.

Calls that run side by side end in any order, and so the engine is asked in any order, batches differ, and logprobs with them in
their last bits. Where a run shall repeat exactly, calls are `sequential`: the event loop stands still during each.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from skyrl_mega.errors import EnvError

Result = TypeVar("Result")

#: Environments compute little and wait a lot (for a sandbox, a server).
MAX_THREADS = 32

#: Threads that may hang in calls that ran out of time before the run ends: memory and file descriptors hang with them.
MAX_LOST_THREADS = 64


class EnvCalls:
    """A pool of daemon threads. `await calls(method, argument ...)` from one event loop."""

    def __init__(self, timeout_s: float, *, sequential: bool = False, max_threads: int = MAX_THREADS) -> None:
        self._timeout_s = timeout_s
        self._sequential = sequential
        self._max_threads = max_threads
        self._waiting: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_threads = 0
        self._num_open = 0
        self._num_lost = 0

    async def __call__(self, method: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
        """What the method returns, or raises.

        Raises TimeoutError if it has not returned `timeout_s` after it began, EnvError if too many calls hang already.
        """
        call = _Call(lambda: method(*args, **kwargs), asyncio.get_running_loop())
        with self._lock:
            self._num_open += 1
            self._add_thread_if_wanted()
        self._waiting.put(call)
        if self._sequential:
            call.ended.wait(self._timeout_s)
        else:
            await call.begun.wait()
            await asyncio.wait([call.result], timeout=self._timeout_s)
        # A result may be here before its thread has said that it ended.
        if not call.result.done() and not call.ended.is_set() and self._give_up(call):
            raise TimeoutError(f"no answer within env.timeout_s ({self._timeout_s:g} s)")
        return await call.result

    def _add_thread_if_wanted(self) -> None:
        if self._num_threads < min(self._num_open, self._max_threads):
            self._num_threads += 1
            threading.Thread(target=self._work, name="environment", daemon=True).start()

    def _give_up(self, call: _Call) -> bool:
        """Whether the call's thread is lost; False if it has ended meanwhile."""
        with self._lock:
            if call.ended.is_set():
                return False
            call.abandoned = True
            self._num_open -= 1
            self._num_threads -= 1
            self._num_lost += 1
            self._add_thread_if_wanted()
            if self._num_lost > MAX_LOST_THREADS:
                raise EnvError(
                    f"{self._num_lost} calls of environments hang beyond env.timeout_s ({self._timeout_s:g} s) and can't be "
                    "ended; mend the environment, or raise env.timeout_s."
                )
        return True

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            call.run()
            with self._lock:
                call.ended.set()
                if call.abandoned:
                    self._num_lost -= 1
                    return
                self._num_open -= 1

    def close(self) -> None:
        """Ends the threads that are idle."""
        for _ in range(self._num_threads):
            self._waiting.put(None)


class _Call:
    def __init__(self, function: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._function, self._loop = function, loop
        self.begun = asyncio.Event()
        self.result: asyncio.Future[Any] = loop.create_future()
        self.ended = threading.Event()
        self.abandoned = False

    def run(self) -> None:
        self._tell(self.begun.set)
        try:
            value = self._function()
        except BaseException as error:  # noqa: BLE001 (handed to the caller, whatever it is)
            self._tell(self._settle, self.result.set_exception, error)
        else:
            self._tell(self._settle, self.result.set_result, value)

    def _settle(self, settle: Callable[[Any], None], value: Any) -> None:
        if not self.result.done():
            settle(value)

    def _tell(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more
