"""Which engine answers which request, and what becomes of a request when its engine dies.

- **Choice.** The least loaded engine, unless the request's session (or another request with the same prompt) has a home whose
  prefix cache can be used and which is not much busier. An engine takes at most `limit` requests; the others wait here in the
  order in which they came, which is the fleet's back-pressure.
- **Death.** An engine that fails a request with EngineDiedError, or does not finish it by the deadline (it hangs), is taken out
  at once and reported; its requests are begun again on others, with the same seed, up to `attempts` times. A completion exists
  only once `generate` returned it, so a request that is begun again is neither lost nor doubled.
- **Staleness.** An engine that waits for weights (EngineStaleError) is taken out as well; that counts as no attempt.
- **Continuation.** A completion that an engine ended early (ABORT) is continued where it stands (`continuation`).
- **Stragglers.** An engine much slower per token than the others is reported, and gets fewer requests in proportion.

Pure asyncio, one event loop, and nothing of vLLM or Ray: `fleet.py` adds and takes out engines.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from skyrl_mega.errors import DeadlineError, EngineDiedError, EngineStaleError, RolloutError
from skyrl_mega.protocols import AsyncEngine
from skyrl_mega.rollout.continuation import PartialTurn
from skyrl_mega.rollout.engine_load import EngineLoad, slowness
from skyrl_mega.types import Completion, GenerationRequest, Metrics, StopReason

logger = logging.getLogger(__name__)

#: Sessions and prompts whose engine is remembered.
MAX_HOMES = 65536
#: A home may be busier than the least loaded engine by this share of the limit.
HOME_SLACK = 0.25

#: Told of an engine that was taken out: the engine and why (EngineDiedError or EngineStaleError).
FailureListener = Callable[[AsyncEngine, RolloutError], None]


@dataclass(eq=False)
class _Slot:
    """An engine that serves, or served until now and still has requests in flight."""

    engine: AsyncEngine
    load: EngineLoad
    in_flight: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()


@dataclass(eq=False)
class _Waiter:
    home: Hashable
    slot: asyncio.Future[_Slot]


class Router:
    """Spreads requests over engines. All methods are called from one event loop."""

    def __init__(
        self,
        *,
        limit: int,
        timeout_s: float,
        attempts: int,
        no_engine_timeout_s: float,
        max_model_len: int,
        on_failure: FailureListener | None = None,
    ) -> None:
        """`limit`: requests in flight per engine. `timeout_s`: deadline of one request on one engine. `no_engine_timeout_s`: how
        long requests wait while no engine serves at all. `max_model_len`: most tokens of prompt and turn together."""
        self.limit = limit
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._no_engine_timeout_s = no_engine_timeout_s
        self._max_model_len = max_model_len
        self._on_failure = on_failure
        self._slots: dict[str, _Slot] = {}
        self._leaving: dict[str, _Slot] = {}
        self._loads: dict[str, EngineLoad] = {}
        self._absent: dict[str, str] = {}
        self._queue: deque[_Waiter] = deque()
        self._homes: OrderedDict[Hashable, str] = OrderedDict()
        self._starvation: asyncio.TimerHandle | None = None
        self._hopeless = ""
        self._stragglers: set[str] = set()
        self._retries = 0
        self._continued = 0

    # Engines.

    @property
    def serving(self) -> tuple[str, ...]:
        """Names of the engines that get requests."""
        return tuple(self._slots)

    @property
    def queue_depth(self) -> int:
        """Requests that wait for an engine."""
        return len(self._queue)

    def add(self, engine: AsyncEngine) -> None:
        """`engine` gets requests from now on. Raises ValueError if one of its name serves already."""
        if engine.name in self._slots:
            raise ValueError(f"an engine named {engine.name} serves already; take it out first.")
        load = self._loads.setdefault(engine.name, EngineLoad(engine.name))
        load.forget_pace()
        self._slots[engine.name] = _Slot(engine, load)
        self._absent.pop(engine.name, None)
        self._hopeless = ""
        if self._starvation is not None:
            self._starvation.cancel()
            self._starvation = None
        self._dispatch()

    def take_out(self, name: str, why: str) -> None:
        """The engine gets no more requests; those in flight go on. `why` is told to whoever waits in vain."""
        self._absent[name] = why
        slot = self._slots.pop(name, None)
        if slot is not None and slot.in_flight:
            self._leaving[name] = slot
        self._watch_for_starvation()

    def forget(self, name: str) -> None:
        """The engine left for good: it is not among those that are waited for."""
        self.take_out(name, "")
        self._absent.pop(name)

    async def drained(self, name: str, timeout_s: float) -> bool:
        """Whether the requests of an engine that was taken out ended within `timeout_s`."""
        slot = self._leaving.get(name)
        if slot is None:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await slot.idle.wait()
        except TimeoutError:
            return False
        return True

    def give_up(self, why: str) -> None:
        """No engine will come back: requests that wait, now or later, fail with RolloutError while none serves."""
        self._hopeless = why
        if not self._slots:
            self._fail_waiters(RolloutError(self._nobody_serves(why)))

    # Requests.

    async def generate(self, request: GenerationRequest, *, session: Hashable = None) -> Completion:
        """The whole turn, by whichever engine. Requests of one `session` (a conversation) go to the same engine if they can;
        without one, requests with the same prompt do. Cancelling the call ends the request.

        Raises RolloutError for a request that no engine could answer, or that `attempts` engines died on; DeadlineError if no
        engine served for `no_engine_timeout_s`.
        """
        home = session if session is not None else hash(tuple(request.prompt_token_ids))
        turn = PartialTurn(request, self._max_model_len)
        empty_handed = 0
        while True:
            piece = await self._on_some_engine(
                f"request {request.request_id}", home, lambda engine: engine.generate(turn.next_request()), counts_tokens=True
            )
            empty_handed = empty_handed + 1 if not piece.token_ids else 0
            if empty_handed > self._attempts:
                raise RolloutError(f"request {request.request_id} was ended {empty_handed} times in a row without a new token.")
            whole = turn.add(piece)
            if whole is not None:
                return whole
            self._continued += 1

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """As `RolloutEngine.score`, by one engine. Raises as `generate` does."""
        return await self._on_some_engine(f"scoring {len(sequences)} sequences", None, lambda engine: engine.score(sequences))

    async def _on_some_engine(
        self, what: str, home: Hashable, call: Callable[[AsyncEngine], Awaitable[Any]], *, counts_tokens: bool = False
    ) -> Any:
        failures: list[str] = []
        while True:
            slot = await self._acquire(home)
            started = time.monotonic()
            try:
                async with asyncio.timeout(self._timeout_s) as deadline:
                    result = await call(slot.engine)
                if counts_tokens:
                    slot.load.finished(len(result.token_ids), time.monotonic() - started)
                    slot.load.aborts += result.stop_reason is StopReason.ABORT
                else:
                    slot.load.finished(0, 0.0)
                return result
            except TimeoutError as error:
                if not deadline.expired():
                    raise
                hung = f"engine {slot.engine.name} did not finish {what} within rollout.request_timeout_s ({self._timeout_s:g} s)"
                failure = EngineDiedError(f"{hung}; it is taken for hung.")
                failure.__cause__ = error
                self._failed(slot, failure)
            except (EngineDiedError, EngineStaleError) as error:
                failure = error
                self._failed(slot, failure)
            finally:
                self._release(slot)
            if isinstance(failure, EngineStaleError):
                continue
            failures.append(str(failure))
            if len(failures) >= self._attempts:
                raise RolloutError(
                    f"{what} was tried on {len(failures)} engines (rollout.request_attempts), and each failed: "
                    f"{' | '.join(failures)}"
                ) from failure
            self._retries += 1

    def _failed(self, slot: _Slot, failure: RolloutError) -> None:
        """Takes the engine out and reports it, unless an earlier request did."""
        slot.load.failures += isinstance(failure, EngineDiedError)
        if self._slots.get(slot.engine.name) is slot:
            self.take_out(slot.engine.name, str(failure))
            if self._on_failure is not None:
                self._on_failure(slot.engine, failure)

    # Choosing.

    async def _acquire(self, home: Hashable) -> _Slot:
        slot = self._choose(home) if not self._queue else None
        if slot is None:
            if not self._slots and self._hopeless:
                raise RolloutError(self._nobody_serves(self._hopeless))
            waiter = _Waiter(home, asyncio.get_running_loop().create_future())
            self._queue.append(waiter)
            self._watch_for_starvation()
            try:
                slot = await waiter.slot
            except asyncio.CancelledError:
                if waiter.slot.done() and not waiter.slot.cancelled() and waiter.slot.exception() is None:
                    self._release(waiter.slot.result())  # it was handed out just before
                elif waiter in self._queue:
                    self._queue.remove(waiter)
                raise
        else:
            self._occupy(slot)
        return slot

    def _occupy(self, slot: _Slot) -> None:
        slot.in_flight += 1
        slot.idle.clear()
        slot.load.begin(time.monotonic())

    def _release(self, slot: _Slot) -> None:
        slot.in_flight -= 1
        slot.load.end(time.monotonic())
        if slot.in_flight == 0:
            slot.idle.set()
            if self._leaving.get(slot.engine.name) is slot:
                del self._leaving[slot.engine.name]
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue:
            slot = self._choose(self._queue[0].home)
            if slot is None:
                break
            waiter = self._queue.popleft()
            if waiter.slot.done():
                continue  # cancelled
            self._occupy(slot)
            waiter.slot.set_result(slot)

    def _choose(self, home: Hashable) -> _Slot | None:
        pressure = {}
        for slot in self._slots.values():
            slow = self._slowness(slot)
            if slot.in_flight < max(1, int(self.limit / slow)):
                pressure[slot] = slot.in_flight * slow
        if not pressure:
            return None
        chosen = min(pressure, key=lambda slot: (pressure[slot], slot.load.requests + slot.load.in_flight))
        if home is not None:
            before = self._slots.get(self._homes.get(home, ""))
            if before in pressure and pressure[before] <= pressure[chosen] + max(1.0, HOME_SLACK * self.limit):
                chosen = before
            self._homes[home] = chosen.engine.name
            self._homes.move_to_end(home)
            if len(self._homes) > MAX_HOMES:
                self._homes.popitem(last=False)
        return chosen

    def _slowness(self, slot: _Slot) -> float:
        name = slot.engine.name
        slow = slowness(slot.load, [other.load for other in self._slots.values()])
        if slow > 1.0 and name not in self._stragglers:
            self._stragglers.add(name)
            logger.warning("engine %s is a straggler: %.1f times the seconds per token of the others; it gets fewer.", name, slow)
        elif slow == 1.0:
            self._stragglers.discard(name)
        return slow

    # Nobody serves.

    def _watch_for_starvation(self) -> None:
        if self._slots or not self._queue or self._starvation is not None:
            return
        self._starvation = asyncio.get_running_loop().call_later(self._no_engine_timeout_s, self._starved)

    def _starved(self) -> None:
        self._starvation = None
        self._fail_waiters(DeadlineError(self._nobody_serves(f"none came within {self._no_engine_timeout_s:g} s")))

    def _fail_waiters(self, error: Exception) -> None:
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.slot.done():
                waiter.slot.set_exception(error)

    def _nobody_serves(self, why: str) -> str:
        engines = "; ".join(f"{name}: {reason}" for name, reason in sorted(self._absent.items())) or "the fleet has no engine"
        return f"no rollout engine serves, and {why}. {engines}"

    # Numbers.

    def loads(self) -> dict[str, EngineLoad]:
        """Counts per engine name, living objects."""
        return dict(self._loads)

    def metrics(self) -> Metrics:
        """Totals since the start: `fleet/...`, and `engine/<name>/...` per engine."""
        now = time.monotonic()
        metrics: Metrics = {
            "fleet/serving": len(self._slots),
            "fleet/queue_depth": len(self._queue),
            "fleet/retries": self._retries,
            "fleet/continued": self._continued,
            "fleet/stragglers": len(self._stragglers & self._slots.keys()),
        }
        for name, load in self._loads.items():
            metrics |= {
                f"engine/{name}/requests": load.requests,
                f"engine/{name}/tokens": load.tokens,
                f"engine/{name}/busy_s": load.busy_until(now),
                f"engine/{name}/in_flight": load.in_flight,
                f"engine/{name}/failures": load.failures,
                f"engine/{name}/s_per_token": load.s_per_token,
            }
        return metrics
