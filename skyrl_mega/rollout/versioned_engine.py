"""How a weight version enters an engine, whatever the engine is made of: begin, load per bucket, report, commit or abandon.

One engine differs from another in how running requests are frozen, how its workers are reached and how a version is made
visible; the order of things, and what becomes of an engine whose update fails, is the same for all and stands here.

- `begin` freezes the running requests where they are; new ones wait in the version gate. A version that was left on its way,
  because its sender died, is abandoned first.
- `commit` makes the version visible and lets the requests run on.
- `abandon` brings the old version back where no layer was overwritten. Otherwise, and after a commit that failed, the weights
  are a mixture: no frozen request may run on with them, so they are ended with the tokens they have (ABORT), and the engine
  serves nothing (EngineStaleError) until a whole version arrived.

Calls take effect in the order in which they are made.
"""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from skyrl_mega.errors import WeightSyncError
from skyrl_mega.rollout.receivers import LoopReceiver
from skyrl_mega.rollout.version_gate import VersionGate


class VersionedEngine(abc.ABC):
    """The weight controls (`receivers.WeightControls`) over what a kind of engine brings. Made inside its event loop."""

    def __init__(self, name: str, version: int = 0) -> None:
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._gate = VersionGate(name, version)
        self._weight_calls = asyncio.Lock()
        self._asleep = False

    @property
    def name(self) -> str:
        """See `protocols.AsyncEngine`."""
        return self._name

    def receiver(self) -> LoopReceiver:
        """The weight controls for another thread of this process."""
        return LoopReceiver(self, self._loop)

    @abc.abstractmethod
    async def close(self) -> None:
        """See `protocols.AsyncEngine`."""

    async def kill(self) -> None:
        """Ends the engine without its cooperation."""
        await self.close()

    @abc.abstractmethod
    async def _freeze(self) -> None:
        """Running requests stand still, and no token of the old weights is on its way any more."""

    @abc.abstractmethod
    async def _run_on(self) -> None:
        """Undoes `_freeze`."""

    @abc.abstractmethod
    async def _on_workers(self, method: str, kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        """What each worker answers. Raises WeightSyncError if a worker failed, EngineDiedError if the engine is gone."""

    @abc.abstractmethod
    async def _label(self, version: int) -> None:
        """After the workers finished: the cache as `rollout.kv_cache_on_update` says, then the version's label on new tokens."""

    @abc.abstractmethod
    async def _doze(self, level: int) -> None:
        """Freezes running requests and frees GPU memory: see `sleep`."""

    @abc.abstractmethod
    async def _rouse(self, tags: Sequence[str] | None) -> bool:
        """Takes GPU memory back: see `wake`. Whether all of it is there again."""

    @abc.abstractmethod
    async def interrupt(self) -> int:
        """Ends all running requests with ABORT and the tokens they have; returns how many there were."""

    async def connect(self, endpoint: Mapping[str, Any]) -> None:
        """See `protocols.WeightReceiver.connect`."""
        if endpoint:
            async with self._weight_calls:
                await self._on_workers("connect_weight_transport", {"endpoint": dict(endpoint)})

    async def begin(self, version: int) -> None:
        """See `protocols.WeightReceiver.begin`. Raises WeightSyncError if the workers can't begin; the old version serves on."""
        async with self._weight_calls:
            if self._gate.on_its_way is not None:
                await self._abandon()
            self._gate.begin(version)
            try:
                await self._freeze()
                await self._on_workers("start_weight_update")
            except WeightSyncError:
                self._gate.abandon(overwritten=False)
                await self._run_on_if_awake()
                raise

    async def load(self, bucket: Mapping[str, Any]) -> None:
        """See `protocols.WeightReceiver.load`."""
        async with self._weight_calls:
            self._gate.check_begun()
            await self._on_workers("update_weights", {"update_info": {"bucket": dict(bucket)}})

    async def report(self) -> list[Mapping[str, Any]]:
        """See `protocols.WeightReceiver.report`."""
        async with self._weight_calls:
            self._gate.check_begun()
            return await self._on_workers("weight_update_report")

    async def commit(self, version: int) -> None:
        """See `protocols.WeightReceiver.commit`. A commit that fails with WeightSyncError leaves a mixture."""
        async with self._weight_calls:
            if self._gate.check_begun() != version:
                raise WeightSyncError(
                    f"engine {self._name} must commit the version that began ({self._gate.on_its_way}), not {version}."
                )
            try:
                await self._on_workers("finish_weight_update")
                await self._label(version)
            except WeightSyncError:
                await self._hold_a_mixture()
                raise
            self._gate.commit(version)
            await self._run_on_if_awake()

    async def abandon(self) -> bool:
        """See `protocols.WeightReceiver.abandon`. Without a version on its way: whether the weights are whole."""
        async with self._weight_calls:
            return await self._abandon()

    async def _abandon(self) -> bool:
        if self._gate.on_its_way is not None:
            reports = await self._on_workers("abandon_weight_update")
            if any(report["overwritten"] for report in reports):
                await self._hold_a_mixture()
            else:
                self._gate.abandon(overwritten=False)
                await self._run_on_if_awake()
        return self._gate.is_whole

    async def _hold_a_mixture(self) -> None:
        self._gate.abandon(overwritten=True)
        await self.interrupt()

    async def _run_on_if_awake(self) -> None:
        # A sleeping engine has no KV cache to run with.
        if not self._asleep:
            await self._run_on()

    async def sleep(self, level: int = 1) -> None:
        """Gives the GPU's memory up to the trainer: the KV cache, and the weights (1: kept in host memory, 2: dropped).

        Running requests freeze, and compute their keys and values again after `wake`. On CPU nothing is freed.
        """
        async with self._weight_calls:
            await self._doze(level)
            self._asleep = True

    async def wake(self, tags: Sequence[str] | None = None) -> None:
        """Takes memory back: tags "weights" (enough to load a version into), "kv_cache"; None: both. Requests then run on.

        Raises WeightSyncError if that would let requests run while a weight version is on its way.
        """
        async with self._weight_calls:
            if self._gate.on_its_way is not None:
                raise WeightSyncError(f"version {self._gate.on_its_way} must be committed before engine {self._name} wakes.")
            self._asleep = not await self._rouse(tags)
            await self._run_on_if_awake()
