"""Rollout engines as Ray actors: the actor around `AsyncVLLMEngine`, and the two handles others hold on it.

`RayEngine` is the engine seen from an event loop; `RayReceiver` its weight controls as futures for the trainer's thread. Both are
an actor handle and a name, so they travel to other processes of the cluster: coordinator and trainer talk to the same actor.

- Ray starts the calls of an async actor in any order. Weight calls must not overtake each other, so a receiver numbers its
  calls and the actor lets them in by number (`CallOrder`).
- Cancelling a call here does not end it in the actor; the actor is told to.
- An actor that is gone gives RayActorError, an engine core that is gone gives EngineDiedError from the actor, which lives on.
  Both arrive as EngineDiedError. An engine core can't outlive its actor (`engine_process`), nor an actor its cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.data.hashing import stable_hash
from skyrl_mega.errors import EngineDiedError, RolloutError, SkyRLMegaError
from skyrl_mega.rollout.async_engine import AsyncVLLMEngine
from skyrl_mega.rollout.ray_cluster import actor_environment, cause_of_death
from skyrl_mega.rollout.vllm_env import engine_environment
from skyrl_mega.types import Completion, GenerationRequest

#: Calls that an actor may have open besides its requests: health checks, weight controls, cancellations.
CONTROL_CALLS = 64
#: How long an actor gets to close before it is killed.
CLOSE_TIMEOUT_S = 10.0


class CallOrder:
    """Lets the calls of each sender in one after the other, by their number (0, 1, 2 ...)."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}
        self._moved = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def turn(self, sender: str, number: int) -> AsyncIterator[None]:
        """Waits until all calls of `sender` with smaller numbers are done."""
        async with self._moved:
            await self._moved.wait_for(lambda: self._next.get(sender, 0) == number)
        try:
            yield
        finally:
            async with self._moved:
                self._next[sender] = number + 1
                self._moved.notify_all()


class EngineActor:
    """What runs in the actor's process. Its methods are called through `RayEngine` and `RayReceiver`."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)  # Ray has its own mind about OMP_NUM_THREADS and CUDA_VISIBLE_DEVICES
        self._name = name
        self._engine: AsyncVLLMEngine | None = None
        self._calls: dict[str, asyncio.Task[Completion]] = {}
        self._cancelled_early: set[str] = set()
        self._order = CallOrder()

    async def start(
        self,
        rollout: RolloutConfig,
        model_path: str,
        seed: int,
        threads: int,
        device: str,
        routed_experts: bool = False,
        lora_rank: int = 0,
    ) -> None:
        # Blocks this actor's event loop until the engine is up, on the thread that the engine core's life is bound to.
        self._engine = await AsyncVLLMEngine.start(
            self._name,
            rollout,
            model_path=model_path,
            seed=seed,
            threads=threads,
            device=device,
            routed_experts=routed_experts,
            lora_rank=lora_rank,
        )

    async def generate(self, call_id: str, request: GenerationRequest) -> Completion:
        if call_id in self._cancelled_early:
            self._cancelled_early.discard(call_id)
            raise RolloutError(f"request {request.request_id} was cancelled before it began.")
        call = self._calls[call_id] = asyncio.create_task(self._started().generate(request))
        try:
            return await call
        except asyncio.CancelledError:
            raise RolloutError(f"request {request.request_id} was cancelled.") from None
        finally:
            del self._calls[call_id]

    async def cancel(self, call_id: str) -> None:
        call = self._calls.get(call_id)
        if call is not None:
            call.cancel()
        else:
            self._cancelled_early.add(call_id)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return await self._started().score(sequences)

    async def policy_version(self) -> int:
        return await self._started().policy_version()

    async def interrupt(self) -> int:
        return await self._started().interrupt()

    async def sleep(self, level: int) -> None:
        await self._started().sleep(level)

    async def wake(self, tags: Sequence[str] | None) -> None:
        await self._started().wake(tags)

    async def weight_call(self, sender: str, number: int, method: str, *arguments: Any) -> Any:
        async with self._order.turn(sender, number):
            return await getattr(self._started(), method)(*arguments)

    async def process_ids(self) -> dict[str, int]:
        """The actor's process, and the engine core's."""
        return {"actor": os.getpid(), "engine_core": self._started().engine_core_pid}

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close()

    def _started(self) -> AsyncVLLMEngine:
        if self._engine is None:
            raise EngineDiedError(f"engine {self._name} has not been started.")
        return self._engine


class RayReceiver:
    """`protocols.WeightReceiver` of an engine in a Ray actor. A copy in another process is a sender of its own."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor = actor
        self._name = name
        self._sender = uuid.uuid4().hex
        self._numbers = itertools.count()

    def __reduce__(self) -> tuple[Any, ...]:
        return RayReceiver, (self._actor, self._name)

    @property
    def name(self) -> str:
        return self._name

    def connect(self, endpoint: Mapping[str, Any]) -> Future[None]:
        return self._call("connect", dict(endpoint))

    def begin(self, version: int) -> Future[None]:
        return self._call("begin", version)

    def load(self, bucket: Mapping[str, Any]) -> Future[None]:
        return self._call("load", dict(bucket))

    def report(self) -> Future[list[Mapping[str, Any]]]:
        return self._call("report")

    def commit(self, version: int) -> Future[None]:
        return self._call("commit", version)

    def abandon(self) -> Future[bool]:
        return self._call("abandon")

    def _call(self, method: str, *arguments: Any) -> Future[Any]:
        ref = self._actor.weight_call.remote(self._sender, next(self._numbers), method, *arguments)
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()

        def pass_on(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                answer.set_result(done.result())
            else:
                answer.set_exception(translated(error, self._name))

        ref.future().add_done_callback(pass_on)
        return answer


class RayEngine:
    """`fleet.FleetEngine` (and so `protocols.AsyncEngine`) over an actor. Made by `RayEngineFactory`; may be pickled."""

    def __init__(self, actor: Any, name: str) -> None:
        self._actor = actor
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    def receiver(self) -> RayReceiver:
        """See `FleetEngine.receiver`."""
        return RayReceiver(self._actor, self._name)

    async def generate(self, request: GenerationRequest) -> Completion:
        """See `protocols.AsyncEngine`."""
        call_id = uuid.uuid4().hex
        try:
            return await self._answer(self._actor.generate.remote(call_id, request))
        except asyncio.CancelledError:
            self._actor.cancel.remote(call_id)
            raise

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `protocols.AsyncEngine`."""
        return await self._answer(self._actor.score.remote(sequences))

    async def policy_version(self) -> int:
        """See `protocols.AsyncEngine`."""
        return await self._answer(self._actor.policy_version.remote())

    async def interrupt(self) -> int:
        """See `FleetEngine.interrupt`."""
        return await self._answer(self._actor.interrupt.remote())

    async def sleep(self, level: int = 1) -> None:
        """See `FleetEngine.sleep`."""
        await self._answer(self._actor.sleep.remote(level))

    async def wake(self, tags: Sequence[str] | None = None) -> None:
        """See `FleetEngine.wake`."""
        await self._answer(self._actor.wake.remote(tags))

    async def process_ids(self) -> dict[str, int]:
        """Process ids of "actor" and "engine_core", on the machine where they run."""
        return await self._answer(self._actor.process_ids.remote())

    async def close(self) -> None:
        """See `protocols.AsyncEngine`."""
        with contextlib.suppress(EngineDiedError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._answer(self._actor.close.remote())
        await self.kill()

    async def kill(self) -> None:
        """See `FleetEngine.kill`. The engine core goes with its actor."""
        ray.kill(self._actor)

    async def _answer(self, ref: Any) -> Any:
        try:
            return await ref
        except (RayError, SkyRLMegaError) as error:
            raise translated(error, self._name) from None


def translated(error: BaseException, name: str) -> BaseException:
    """Ray's error in our words: EngineDiedError for an actor that is gone, what the actor raised otherwise."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, SkyRLMegaError):
        return error.cause
    if isinstance(error, RayTaskError):
        return RolloutError(f"engine {name} failed: {error}")
    if isinstance(error, RayActorError):
        return EngineDiedError(f"the Ray actor of engine {name} is gone: {cause_of_death(error)}")
    if isinstance(error, RayError):
        return EngineDiedError(f"the Ray actor of engine {name} can't be reached: {type(error).__name__}: {error}")
    return error


@dataclass(frozen=True)
class RayEngineFactory:
    """Starts engines as actors of the cluster that this process is connected to (`fleet.EngineFactory`).

    Placement: on CPU an engine claims no resource, so that a small machine can host several; on CUDA it claims
    `engine_tensor x engine_pipeline x engine_data` GPUs of one machine. A colocated engine claims none: it sees the trainer's
    `visible_devices` on the machine `node_id` (None: the machine of the caller).
    """

    rollout: RolloutConfig
    model_path: str
    seed: int
    threads: int
    device: str
    routed_experts: bool = False
    visible_devices: tuple[str, ...] = ()
    node_id: str | None = None
    lora_rank: int = 0

    async def __call__(self, name: str) -> RayEngine:
        """Raises RolloutError or DeadlineError if the engine does not come up; its actor is gone then."""
        environment = actor_environment(
            engine_environment(device=self.device, in_process=False, threads=self.threads, kv_cache_gib=self.rollout.kv_cache_gib)
        )
        if self.visible_devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.visible_devices)
        actor = ray.remote(EngineActor).options(**self.options(environment)).remote(name, environment)
        engine = RayEngine(actor, name)
        try:
            seed = stable_hash(self.seed, name, bits=24)  # unseeded requests must not repeat from engine to engine
            settings = (self.rollout, self.model_path, seed, self.threads, self.device, self.routed_experts, self.lora_rank)
            await engine._answer(actor.start.remote(*settings))
        except BaseException:
            await engine.kill()
            raise
        return engine

    def options(self, environment: dict[str, str]) -> dict[str, Any]:
        """Ray's options of the actor."""
        rollout = self.rollout
        options: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": 0,
            "max_restarts": 0,
            "max_concurrency": (rollout.max_concurrent_requests or rollout.max_num_seqs) + CONTROL_CALLS,
            "runtime_env": {"env_vars": environment},
            "scheduling_strategy": "SPREAD",
        }
        if self.device == "cuda" and rollout.colocated:
            node_id = self.node_id or ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
        elif self.device == "cuda":
            options["num_gpus"] = rollout.engine_tensor * rollout.engine_pipeline * rollout.engine_data
        return options
