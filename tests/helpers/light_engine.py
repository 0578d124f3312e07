"""A rollout engine without vLLM behind the very interfaces of the real one: Ray actor, engine core in a process, weight receiver.

For tests that start and kill engines more often than vLLM's start-up allows. Only `AsyncVLLMEngine` is replaced: the actor,
fleet, router, version gate, receivers and transports around it are the product's. `python -m helpers.light_train` trains with it.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from helpers.light_core import frame, read_frame
from skyrl_mega.errors import EngineDiedError, WeightSyncError
from skyrl_mega.orchestration import rollout_assembly
from skyrl_mega.rollout.ray_engine import EngineActor
from skyrl_mega.rollout.versioned_engine import VersionedEngine
from skyrl_mega.types import Completion, GenerationRequest, StopReason

make_real_coordinator = rollout_assembly.make_coordinator


class LightEngine(VersionedEngine):
    """What `AsyncVLLMEngine` is to vLLM's engine core, for `light_core`."""

    def __init__(self, name: str, core: asyncio.subprocess.Process) -> None:
        super().__init__(name)
        self._core = core
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._death = ""
        self.engine_core_pid = core.pid

    @classmethod
    async def start(cls, name: str, rollout: Any, **unused: Any) -> LightEngine:
        core = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "helpers.light_core"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**30,
        )
        try:
            await read_frame(core.stdout)
        except asyncio.IncompleteReadError as error:
            raise EngineDiedError(f"engine {name}: its engine core ended while it started; start another one.") from error
        engine = cls(name, core)
        engine._reader = asyncio.create_task(engine._read())
        return engine

    async def _read(self) -> None:
        try:
            while True:
                number, result, error = await read_frame(self._core.stdout)
                answer = self._answers.pop(number, None)
                if answer is not None and not answer.done():
                    answer.set_result(result) if error is None else answer.set_exception(WeightSyncError(error))
        except (asyncio.IncompleteReadError, ConnectionError):
            self._die("its engine core ended unexpectedly")

    def _die(self, why: str) -> None:
        self._death = self._death or f"engine {self._name}: {why}; start another one."
        self._gate.release()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineDiedError(self._death))
        self._answers.clear()

    async def _ask(self, method: str, **arguments: Any) -> Any:
        if self._death:
            raise EngineDiedError(self._death)
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._core.stdin.write(frame((number, method, arguments)))
        return await answer

    async def policy_version(self) -> int:
        if self._death:  # before anything else, as vLLM's engine does: a dead one must not be taken for one that wants weights
            raise EngineDiedError(self._death)
        self._gate.check_whole()
        if self._gate.on_its_way is not None:
            return self._gate.version
        return await self._ask("version")

    async def generate(self, request: GenerationRequest) -> Completion:
        await self._gate.serving()
        turn = f"{self._name} {next(self._numbers)}"
        sampling = request.sampling
        try:
            done = await self._ask("generate", turn=turn, seed=sampling.seed or 0, max_new_tokens=sampling.max_new_tokens)
        except asyncio.CancelledError:
            self._core.stdin.write(frame((next(self._numbers), "abort", {"turns": [turn]})))
            raise
        logprobs = [done["logprob"]] * len(done["tokens"])
        reason = StopReason(done["reason"])
        return Completion(request.request_id, done["tokens"], logprobs, done["text"], reason, done["versions"])

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise NotImplementedError("a light engine has no model to score with")

    async def interrupt(self) -> int:
        return await self._ask("abort", turns=None)

    async def _freeze(self) -> None:
        await self._ask("freeze")

    async def _run_on(self) -> None:
        await self._ask("run_on")

    async def _label(self, version: int) -> None:
        await self._ask("label", version=version)

    async def _on_workers(self, method: str, kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        return [await self._ask(method, **(kwargs or {}))]

    async def _doze(self, level: int) -> None:
        await self._freeze()

    async def _rouse(self, tags: Sequence[str] | None) -> bool:
        return True

    async def close(self) -> None:
        self._die("it was closed")
        self._reader.cancel()
        if self._core.returncode is None:
            self._core.kill()
        await self._core.wait()


class LightActor(EngineActor):
    """`EngineActor` around a light engine."""

    async def start(self, rollout: Any, *settings: Any) -> None:
        self._engine = await LightEngine.start(self._name, rollout)


async def make_coordinator(plan: rollout_assembly.RolloutPlan) -> Any:
    """`rollout_assembly.make_coordinator` with light engines, in whichever process it is called."""
    from skyrl_mega.rollout import async_engine, ray_engine

    async_engine.AsyncVLLMEngine.start = LightEngine.start
    ray_engine.EngineActor = LightActor
    return await make_real_coordinator(plan)
