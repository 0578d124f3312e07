"""The in-process vLLM engine for one event loop: requests are added while it steps, and finish one by one.

`VLLMEngine.generate` takes a list and returns when all of it is done. Here a task (the pump) steps the same engine for as long
as requests run and gives the event loop a turn between two steps, so that a request that arrives joins the batch at the next
step and one that ends is answered at once. Seeded requests get the tokens that `VLLMEngine.generate` gives them.

Weight updates work as in `AsyncVLLMEngine`: while a version is on its way the pump stands still, which freezes the running
requests, and new ones wait. Once wrapped, the engine is used through this class only, from the loop's thread: steps draw from
the engine's own random stream, which is swapped in for the time of a step.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import EngineDiedError, RolloutError, WeightSyncError
from skyrl_mega.rollout.vllm_async import AsyncRequests
from skyrl_mega.rollout.vllm_requests import prefix_cache_salt

if TYPE_CHECKING:
    import vllm
    from vllm.v1.engine.llm_engine import LLMEngine

    from skyrl_mega.rollout.vllm_engine import VLLMEngine


class InProcessAsyncEngine(AsyncRequests):
    """Implements `protocols.AsyncEngine`, and the weight controls as coroutines, over a `VLLMEngine` of this process."""

    def __init__(self, engine: VLLMEngine, rollout: RolloutConfig, *, name: str = "in-process") -> None:
        """Takes the engine over: `close` closes it. Called inside the event loop that will use it."""
        super().__init__(name, rollout, engine.policy_version, routed_experts=engine.routed_experts)
        self._engine = engine
        self._ids = itertools.count()
        self._waiting: dict[str, asyncio.Future[vllm.RequestOutput]] = {}
        self._pump: asyncio.Task[None] | None = None
        self._death: str = ""

    @property
    def num_running(self) -> int:
        """Requests inside vLLM now."""
        return len(self._waiting)

    async def policy_version(self) -> int:
        """As `AsyncVLLMEngine.policy_version`."""
        self._living()
        self._gate.check_whole()
        return self._gate.version

    async def _run(self, prompt: list[int], sampling: vllm.SamplingParams) -> vllm.RequestOutput:
        from vllm.inputs.engine import tokens_input

        version = await self._gate.serving()
        request_id = f"{self._name} {next(self._ids)}"
        inputs = tokens_input(prompt, cache_salt=prefix_cache_salt(self._rollout, version))
        self._living().add_request(request_id, inputs, sampling, lora_request=self._engine.adapter)
        output = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        self._start_pump()
        try:
            return await output
        except asyncio.CancelledError:
            if not self._death:
                self._living().abort_request([request_id])
            raise
        finally:
            self._waiting.pop(request_id, None)

    async def interrupt(self) -> int:
        """Ends all running requests with ABORT and the tokens they have; returns how many there were."""
        from vllm.v1.engine import FinishReason

        engine = self._living()
        states = list(engine.output_processor.request_states.values())
        self._deliver(state.make_request_output([], None, FinishReason.ABORT, None) for state in states)
        engine.abort_request([state.request_id for state in states], internal=True)
        return len(states)

    # The pump.

    def _start_pump(self) -> None:
        # One that has ended is still there until its callback runs: a request may come just between.
        is_pumped = self._pump is not None and not self._pump.done()
        if not is_pumped and self._gate.on_its_way is None and not self._asleep:
            self._pump = asyncio.create_task(self._step_while_requests_run(), name=f"pump of {self._name}")
            self._pump.add_done_callback(self._pump_ended)

    async def _step_while_requests_run(self) -> None:
        engine = self._living()
        while engine.has_unfinished_requests() and self._gate.on_its_way is None and not self._asleep:
            self._step(engine)
            await asyncio.sleep(0)

    def _step(self, engine: LLMEngine) -> None:
        with self._engine._random_stream.current():
            outputs = engine.step()
        self._deliver(outputs)

    def _deliver(self, outputs: Any) -> None:
        for output in outputs:
            waiting = self._waiting.get(output.request_id)
            if output.finished and waiting is not None and not waiting.done():
                waiting.set_result(output)

    def _pump_ended(self, pump: asyncio.Task[None]) -> None:
        if self._pump is pump:
            self._pump = None
        if pump.cancelled() or pump.exception() is None:
            return
        error = pump.exception()
        self._death = f"engine {self._name} failed ({type(error).__name__}: {error}); start another one"
        for waiting in self._waiting.values():
            if not waiting.done():
                died = EngineDiedError(f"{self._death}.")
                died.__cause__ = error
                waiting.set_exception(died)

    # What a weight update needs (`VersionedEngine`).

    async def _freeze(self) -> None:
        engine = self._living()
        core = engine.engine_core.engine_core
        core.pause_scheduler("keep", clear_cache=False)
        while core.batch_queue:  # with asynchronous scheduling a step of the old weights may be computed already
            self._step(engine)

    async def _run_on(self) -> None:
        self._living().engine_core.engine_core.resume_scheduler()
        self._start_pump()

    async def _doze(self, level: int) -> None:
        self._asleep = True  # the pump stops
        self._living().sleep(level, mode="keep")

    async def _rouse(self, tags: Sequence[str] | None) -> bool:
        engine = self._living()
        engine.wake_up(list(tags) if tags is not None else None)
        return not engine.engine_core.engine_core.model_executor.is_sleeping

    async def _label(self, version: int) -> None:
        engine = self._living()
        if self._rollout.kv_cache_on_update == "recompute":
            engine.reset_prefix_cache(reset_running_requests=True)
        engine.set_weight_version(str(version))

    async def _on_workers(self, method: str, kwargs: Mapping[str, Any] | None = None) -> list[Any]:
        try:
            return self._living().collective_rpc(method, kwargs=dict(kwargs or {}))
        except RolloutError:
            raise
        except Exception as error:  # whatever a worker raised
            raise WeightSyncError(f"engine {self._name}: {method} failed: {error}") from error

    async def close(self) -> None:
        """Closes the engine. Safe to call twice. Requests that still run end with EngineDiedError."""
        if self._pump is not None:
            self._pump.cancel()
        self._death = self._death or f"engine {self._name} was closed"
        self._gate.release()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(EngineDiedError(f"{self._death}."))
        self._engine.close()

    def _living(self) -> LLMEngine:
        if self._death:
            raise EngineDiedError(f"{self._death}.")
        return self._engine._living_llm().llm_engine
