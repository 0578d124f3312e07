"""One call for equal questions: those in flight are shared, and answers are kept for a while."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass


@dataclass
class _Running:
    task: asyncio.Task[str]
    num_waiting: int = 0


class SharedCalls:
    """Answers by question, least recently used dropped first. One event loop.

    A call goes on while anybody waits for it: one of several groups that ask the same may be cancelled, and the others still get
    their answer; when the last is cancelled, so is the call. Errors are not kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._answers: OrderedDict[str, str] = OrderedDict()
        self._running: dict[str, _Running] = {}

    async def get(self, question: str, ask: Callable[[], Awaitable[str]]) -> str:
        """The answer kept for `question`, or what `ask` returns or raises."""
        if question in self._answers:
            self._answers.move_to_end(question)
            return self._answers[question]
        if question not in self._running:
            self._running[question] = _Running(asyncio.get_running_loop().create_task(self._ask(question, ask)))
        running = self._running[question]
        running.num_waiting += 1
        try:
            return await asyncio.shield(running.task)
        finally:
            running.num_waiting -= 1
            if running.num_waiting == 0 and not running.task.done():
                running.task.cancel()
                self._running.pop(question, None)

    async def _ask(self, question: str, ask: Callable[[], Awaitable[str]]) -> str:
        try:
            answer = await ask()
        finally:
            running = self._running.get(question)
            if running is not None and running.task is asyncio.current_task():  # not one that began after this was cancelled
                del self._running[question]
        if self._size:
            self._answers[question] = answer
            while len(self._answers) > self._size:
                self._answers.popitem(last=False)
        return answer
