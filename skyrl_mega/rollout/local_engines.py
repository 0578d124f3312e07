"""Engines of this machine's own process tree as members of a fleet: in the trainer's process, or in a child process of it.

`LocalEngine` adds to an engine what a fleet asks beyond generating: weight controls for the trainer's thread, sleep, and an end
without the engine's cooperation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import EngineDiedError
from skyrl_mega.protocols import AsyncEngine, WeightReceiver
from skyrl_mega.rollout.receivers import LoopReceiver, WeightControls
from skyrl_mega.rollout.signals import run_until_complete
from skyrl_mega.types import Completion, GenerationRequest


class _Engine(AsyncEngine, WeightControls, Protocol):
    async def interrupt(self) -> int: ...

    async def sleep(self, level: int = 1) -> None: ...

    async def wake(self, tags: Sequence[str] | None = None) -> None: ...


class LocalEngine:
    """`fleet.FleetEngine` over an engine of this process's event loop.

    `is_inline`: the loop runs only while the trainer's thread waits in it, so the weight controls run it themselves.
    """

    def __init__(self, engine: _Engine, *, is_inline: bool) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._is_inline = is_inline

    @property
    def name(self) -> str:
        return self._engine.name

    def receiver(self) -> WeightReceiver:
        """See `FleetEngine.receiver`; it stays in this process."""
        return InlineReceiver(self._engine, self._loop) if self._is_inline else LoopReceiver(self._engine, self._loop)

    async def generate(self, request: GenerationRequest) -> Completion:
        """See `protocols.AsyncEngine`."""
        return await self._engine.generate(request)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `protocols.AsyncEngine`."""
        return await self._engine.score(sequences)

    async def policy_version(self) -> int:
        """See `protocols.AsyncEngine`."""
        return await self._engine.policy_version()

    async def interrupt(self) -> int:
        """See `FleetEngine.interrupt`."""
        return await self._engine.interrupt()

    async def sleep(self, level: int = 1) -> None:
        """See `FleetEngine.sleep`."""
        await self._engine.sleep(level)

    async def wake(self, tags: Sequence[str] | None = None) -> None:
        """See `FleetEngine.wake`."""
        await self._engine.wake(tags)

    async def close(self) -> None:
        """See `protocols.AsyncEngine`."""
        await self._engine.close()

    async def kill(self) -> None:
        """See `FleetEngine.kill`. Closing ends a child process whether it answers or not."""
        await self._engine.close()


class InlineReceiver(LoopReceiver):
    """A `protocols.WeightReceiver` whose calls are done when they return. Called by the thread that otherwise runs the loop."""

    def _submit(self, call: Coroutine[Any, Any, Any]) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(run_until_complete(self._loop, call, cancel=False))
        except Exception as error:  # noqa: BLE001 (the future carries it)
            done.set_exception(error)
        return done


@dataclass(frozen=True)
class ChildProcessEngineFactory:
    """Starts vLLM in a child process of this one (`fleet.EngineFactory`)."""

    rollout: RolloutConfig
    model_path: str
    seed: int
    threads: int
    device: str
    routed_experts: bool = False
    lora_rank: int = 0

    async def __call__(self, name: str) -> LocalEngine:
        """Raises RolloutError, DeadlineError or MissingDependencyError if it does not come up."""
        from skyrl_mega.rollout.async_engine import AsyncVLLMEngine

        engine = await AsyncVLLMEngine.start(
            name,
            self.rollout,
            model_path=self.model_path,
            seed=self.seed,
            threads=self.threads,
            device=self.device,
            routed_experts=self.routed_experts,
            lora_rank=self.lora_rank,
        )
        return LocalEngine(engine, is_inline=False)


@dataclass
class InProcessEngineFactory:
    """Starts vLLM in this process (`fleet.EngineFactory`), once: if it fails, the process has to be started again."""

    rollout: RolloutConfig
    model_path: str
    seed: int
    threads: int
    device: str
    routed_experts: bool = False
    lora_rank: int = 0
    was_started: bool = False

    async def __call__(self, name: str) -> LocalEngine:
        """Raises RolloutError or MissingDependencyError if it does not come up, EngineDiedError for a second time."""
        from skyrl_mega.rollout.in_process_async import InProcessAsyncEngine
        from skyrl_mega.rollout.vllm_engine import VLLMEngine

        if self.was_started:
            raise EngineDiedError("an engine inside the trainer's process can't be replaced; the same command resumes the run.")
        self.was_started = True
        engine = VLLMEngine.start(
            self.rollout,
            model_path=self.model_path,
            seed=self.seed,
            threads=self.threads,
            in_process=True,
            device=self.device,
            routed_experts=self.routed_experts,
            lora_rank=self.lora_rank,
        )
        return LocalEngine(InProcessAsyncEngine(engine, self.rollout, name=name), is_inline=True)
