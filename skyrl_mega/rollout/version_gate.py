"""Which weight version an engine serves, and who waits while the next one is on its way.

Three states: it serves a version; a version is on its way (running requests are frozen, new ones wait here); or its weights are
untrusted: a mixture, because a version was given up after some layers had been overwritten, or of unknown origin. Untrusted
weights serve nothing, until a whole version arrives. Used from one event loop.
"""

from __future__ import annotations

import asyncio

from skyrl_mega.errors import EngineStaleError, WeightSyncError


class VersionGate:
    """The state of one engine; `name` is for its errors."""

    def __init__(self, name: str, version: int = 0) -> None:
        self.name = name
        self.version = version
        self.on_its_way: int | None = None
        self._distrust = ""
        self._settled = asyncio.Event()
        self._settled.set()

    async def serving(self) -> int:
        """The version that serves, once none is on its way. Raises EngineStaleError while the weights are untrusted."""
        await self._settled.wait()
        self.check_whole()
        return self.version

    @property
    def is_whole(self) -> bool:
        """Whether the weights, apart from a version on its way, are those of `version`."""
        return not self._distrust

    def check_whole(self) -> None:
        """Raises EngineStaleError while the weights are untrusted."""
        if self._distrust:
            raise EngineStaleError(f"{self._distrust}; engine {self.name} serves nothing until a whole version is published.")

    def distrust(self, why: str) -> None:
        """Nothing is served until a whole version arrived."""
        self._distrust = why

    def check_begun(self) -> int:
        """The version on its way. Raises WeightSyncError if none is."""
        if self.on_its_way is None:
            raise WeightSyncError(f"engine {self.name} expects a weight version to begin before its buckets: call begin first.")
        return self.on_its_way

    def begin(self, version: int) -> None:
        """Raises WeightSyncError if another version is on its way."""
        if self.on_its_way is not None:
            raise WeightSyncError(
                f"version {self.on_its_way} must be committed or abandoned on engine {self.name} before version {version} begins."
            )
        self.on_its_way = version
        self._settled.clear()

    def commit(self, version: int) -> None:
        self.version, self.on_its_way, self._distrust = version, None, ""
        self._settled.set()

    def abandon(self, *, overwritten: bool) -> None:
        """Ends the version on its way. `overwritten`: some weights are of that version, so the engine holds a mixture."""
        if overwritten:
            self.distrust(f"weight version {self.on_its_way} arrived only in part, so the weights are a mixture of versions")
        self.on_its_way = None
        self._settled.set()

    def release(self) -> None:
        """Lets those who wait go on, to find the engine closed."""
        self._settled.set()
