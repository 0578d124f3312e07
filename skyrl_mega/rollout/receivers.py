"""From an engine's weight controls, coroutines of one event loop, to the futures that the trainer's thread waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, Protocol


class WeightControls(Protocol):
    """`protocols.WeightReceiver` as coroutines. Calls take effect in the order in which they are made."""

    @property
    def name(self) -> str: ...

    async def connect(self, endpoint: Mapping[str, Any]) -> None: ...

    async def begin(self, version: int) -> None: ...

    async def load(self, bucket: Mapping[str, Any]) -> None: ...

    async def report(self) -> list[Mapping[str, Any]]: ...

    async def commit(self, version: int) -> None: ...

    async def abandon(self) -> bool: ...


class LoopReceiver:
    """A `protocols.WeightReceiver` for an engine in this process, called from any thread but the event loop's."""

    def __init__(self, engine: WeightControls, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop

    @property
    def name(self) -> str:
        return self._engine.name

    def connect(self, endpoint: Mapping[str, Any]) -> Future[None]:
        return self._submit(self._engine.connect(endpoint))

    def begin(self, version: int) -> Future[None]:
        return self._submit(self._engine.begin(version))

    def load(self, bucket: Mapping[str, Any]) -> Future[None]:
        return self._submit(self._engine.load(bucket))

    def report(self) -> Future[list[Mapping[str, Any]]]:
        return self._submit(self._engine.report())

    def commit(self, version: int) -> Future[None]:
        return self._submit(self._engine.commit(version))

    def abandon(self) -> Future[bool]:
        return self._submit(self._engine.abandon())

    def _submit(self, call: Coroutine[Any, Any, Any]) -> Future[Any]:
        # The loop starts coroutines in the order in which they were submitted, and the engine's lock is fair.
        return asyncio.run_coroutine_threadsafe(call, self._loop)
