"""The rollout fleet: engines that are started side by side, watched, replaced, and brought to the current weights.

Each engine has a member here, which lives through several engines of its name:

    starting -> serving | stale -> ... -> dead -> starting (after a pause) -> ...

An engine that comes up while the policy has moved on is `stale`: it serves nothing until the trainer has pushed the current
version to it. The trainer asks `needs_weights`, pushes through `receivers(stale_only=True)` and says `weights_arrived`; what an
engine then serves is what it says itself, never what was meant to be sent to it.

A health check asks every engine for its weight version each `rollout.health_interval_s`; one that says it died, that does not
answer three times running, or that the router took out (it failed a request, or missed a deadline), is killed and replaced, up
to `rollout.max_engine_restarts` times. When the last engine is given up, waiting requests fail and name each engine and why.

Pure asyncio, one event loop. How an engine is started is a factory's affair: Ray, a child process, a server, a test's fake.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import EngineDiedError, EngineStaleError, RolloutError, SkyRLMegaError
from skyrl_mega.protocols import AsyncEngine, WeightReceiver
from skyrl_mega.rollout.router import Router
from skyrl_mega.types import Completion, GenerationRequest, Metrics

logger = logging.getLogger(__name__)

#: Health checks in a row that an engine may miss.
MAX_MISSED_CHECKS = 3
#: Pause before the first restart; doubled for each further start that fails, up to the longest.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
#: How long an engine that leaves gets to hand its interrupted requests back, and one that is closed to close.
LAST_WORDS_S = 10.0


class FleetEngine(AsyncEngine, Protocol):
    """What the fleet asks of an engine beyond generating."""

    def receiver(self) -> WeightReceiver:
        """Its weight controls, for the trainer; those of an engine that other processes can reach may travel to them."""
        ...

    async def interrupt(self) -> int:
        """Ends running requests with ABORT and the tokens they have; returns how many there were."""
        ...

    async def sleep(self, level: int = 1) -> None:
        """Gives GPU memory up to the trainer (see `AsyncVLLMEngine.sleep`)."""
        ...

    async def wake(self, tags: Sequence[str] | None = None) -> None:
        """Takes GPU memory back."""
        ...

    async def kill(self) -> None:
        """Ends it at once, without its cooperation. Safe to call twice."""
        ...


#: Starts an engine of the given name and returns it once it is up. Cancelled when it takes too long: it leaves nothing behind.
EngineFactory = Callable[[str], Awaitable[FleetEngine]]


class EngineState(str, enum.Enum):
    """Where a member of the fleet stands."""

    STARTING = "starting"  #: its process is coming up, for the first time or again
    STALE = "stale"  #: up, but without the current weights: it serves nothing
    SERVING = "serving"  #: gets requests
    LEAVING = "leaving"  #: gets no more requests, and ends when those in flight are done
    DEAD = "dead"  #: down; it will be started again, unless it is given up


@dataclass(frozen=True)
class EngineStatus:
    """One member as of now. `why` is empty while nothing is wrong; `given_up`: it will not be started again."""

    state: EngineState
    why: str
    restarts: int
    given_up: bool


@dataclass(eq=False)
class _Member:
    name: str
    factory: EngineFactory
    state: EngineState = EngineState.STARTING
    why: str = ""
    engine: FleetEngine | None = None
    restarts: int = 0
    failed_starts: int = 0
    offered: FleetEngine | None = None  #: the engine whose weight controls the trainer was given last
    has_pushed_weights: bool = False
    given_up: bool = False
    failure: asyncio.Event = field(default_factory=asyncio.Event)
    tried: asyncio.Event = field(default_factory=asyncio.Event)
    life: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        return self.engine is not None and self.state in (EngineState.STALE, EngineState.SERVING)


class Fleet:
    """Engines and the router before them. All methods are called from one event loop."""

    def __init__(
        self,
        rollout: RolloutConfig,
        factories: Mapping[str, EngineFactory],
        *,
        policy_version: int = 0,
        begins_stale: bool = False,
        pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        """`factories` by engine name. `policy_version`: what the trainer's policy is at; engines come up with version 0.

        `begins_stale`: version 0 is not what engines come up with (a warm-up came before it, or an adapter belongs to it), and
        has to be pushed too.
        """
        self._rollout = rollout
        self._version = policy_version
        self._begins_stale = begins_stale
        self._pause_s = pause_s
        self._members = {name: _Member(name, factory) for name, factory in factories.items()}
        self.router = Router(
            limit=rollout.max_concurrent_requests or rollout.max_num_seqs,
            timeout_s=rollout.request_timeout_s,
            attempts=rollout.request_attempts,
            no_engine_timeout_s=rollout.start_timeout_s,
            max_model_len=rollout.max_model_len,
            on_failure=self._router_took_out,
        )

    # Requests.

    async def generate(self, request: GenerationRequest, *, session: Hashable = None) -> Completion:
        """See `Router.generate`."""
        return await self.router.generate(request, session=session)

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Router.score`."""
        return await self.router.score(sequences)

    # Engines.

    async def start(self) -> None:
        """Starts all engines side by side; returns when each is up or failed its first start. The failed are tried again.

        Raises RolloutError, with everything ended, if none came up.
        """
        for member in self._members.values():
            self._begin(member)
        await asyncio.gather(*(member.tried.wait() for member in self._members.values()))
        if not self._members:
            raise RolloutError("the fleet was closed before its engines came up.")
        if not self._up():
            why = "; ".join(f"{member.name}: {member.why}" for member in self._members.values())
            error = RolloutError(f"none of {len(self._members)} rollout engines came up. {why}")
            await self.close()
            raise error

    async def add_engine(self, name: str, factory: EngineFactory) -> None:
        """One more engine; returns when it is up. Raises ValueError if the name is taken, RolloutError if it does not come up."""
        if name in self._members:
            raise ValueError(f"the fleet has an engine named {name}.")
        member = self._members[name] = _Member(name, factory)
        self._begin(member)
        await member.tried.wait()
        if not member.is_up:
            await self._end(member)
            raise RolloutError(f"engine {name} did not come up: {member.why}")

    async def remove_engine(self, name: str, *, drain_timeout_s: float) -> None:
        """Ends an engine. Its requests get `drain_timeout_s` to finish; those that do not, go on elsewhere where they stand.

        Raises KeyError for an unknown name.
        """
        member = self._members[name]
        await self._stop_watching(member)
        was_up, member.state = member.is_up, EngineState.LEAVING
        self.router.take_out(name, "it is leaving the fleet")
        if was_up and not await self.router.drained(name, drain_timeout_s):
            with contextlib.suppress(EngineDiedError, TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await member.engine.interrupt()
            await self.router.drained(name, LAST_WORDS_S)
        await self._end(member)

    async def close(self) -> None:
        """Ends all engines. Safe to call twice."""
        await asyncio.gather(*(self._end(member) for member in list(self._members.values())))

    async def _end(self, member: _Member) -> None:
        await self._stop_watching(member)
        self._members.pop(member.name, None)
        self.router.forget(member.name)
        if member.engine is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await member.engine.close()
            await member.engine.kill()

    async def _stop_watching(self, member: _Member) -> None:
        if member.life is not None:
            member.life.cancel()
            await asyncio.wait([member.life])

    async def sleep(self, level: int = 1) -> None:
        """All engines that are up give their GPU memory to the trainer."""
        await asyncio.gather(*(member.engine.sleep(level) for member in self._up()))

    async def wake(self, tags: Sequence[str] | None = None) -> None:
        """All engines that are up take their GPU memory back."""
        await asyncio.gather(*(member.engine.wake(tags) for member in self._up()))

    # Weights.

    @property
    def policy_version(self) -> int:
        """The version that engines must have to serve."""
        return self._version

    def needs_weights(self) -> tuple[str, ...]:
        """Engines that are up and wait for the current weights."""
        return tuple(member.name for member in self._up() if member.state is EngineState.STALE)

    def receivers(self, *, stale_only: bool = False) -> list[WeightReceiver]:
        """The weight controls of the engines that are up, or of those that `needs_weights` names."""
        chosen = [member for member in self._up() if not stale_only or member.state is EngineState.STALE]
        for member in chosen:
            member.offered = member.engine
        return [member.engine.receiver() for member in chosen]

    async def weights_arrived(self, version: int, names: Iterable[str]) -> tuple[str, ...]:
        """The policy is at `version` now, which the engines `names` received. Returns the names of those that serve it.

        Each engine is asked for its version, since another one may bear the name by now. One that was not among those who
        received a new version stops serving before it is asked.
        """
        taken = set(names)
        left_out = set(self._members) - taken if version != self._version else set()
        self._version = version
        up = self._up()
        for member in up:
            if member.name in taken:
                member.has_pushed_weights |= member.offered is member.engine
            if member.name in left_out:
                self._make_stale(member, f"it did not receive weight version {version}")
        await asyncio.gather(*(self._check(member) for member in up))
        return tuple(member.name for member in self._up() if member.state is EngineState.SERVING)

    # What is going on.

    def status(self) -> dict[str, EngineStatus]:
        """Each member by name."""
        return {m.name: EngineStatus(m.state, m.why, m.restarts, m.given_up) for m in self._members.values()}

    def num_slots(self) -> int:
        """Requests that the serving engines can have in flight at once."""
        return len(self.router.serving) * self.router.limit

    def metrics(self) -> Metrics:
        """The router's metrics, and how many engines are in which state."""
        states = [member.state for member in self._members.values()]
        return (
            self.router.metrics()
            | {f"fleet/{state.value}": states.count(state) for state in EngineState}
            | {"fleet/restarts": sum(member.restarts for member in self._members.values())}
        )

    def _up(self) -> list[_Member]:
        return [member for member in self._members.values() if member.is_up]

    # The life of one member.

    def _begin(self, member: _Member) -> None:
        member.life = asyncio.create_task(self._live(member), name=f"life of engine {member.name}")
        member.life.add_done_callback(lambda life: self._life_ended(member, life))

    def _life_ended(self, member: _Member, life: asyncio.Task[None]) -> None:
        """An error that nothing here foresaw must not leave a member that nobody watches, nor anyone waiting for it."""
        if not life.cancelled() and (error := life.exception()) is not None:
            logger.error("rollout engine %s is no longer watched", member.name, exc_info=error)
            self._mark_dead(member, f"watching it failed: {type(error).__name__}: {error}")
            self._give_up(member)
        member.tried.set()

    async def _live(self, member: _Member) -> None:
        while True:
            if await self._come_up(member):
                await self._watch(member)
                await self._bury(member)
            member.tried.set()
            if member.restarts >= self._rollout.max_engine_restarts:
                self._give_up(member)
                return
            member.restarts += 1
            await asyncio.sleep(min(self._pause_s * 2**member.failed_starts, LONGEST_PAUSE_S))

    async def _come_up(self, member: _Member) -> bool:
        member.state, member.engine, member.has_pushed_weights = EngineState.STARTING, None, False
        member.failure.clear()
        timeout_s = self._rollout.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                member.engine = await member.factory(member.name)
        except TimeoutError:
            self._mark_dead(member, f"it must be up within rollout.start_timeout_s ({timeout_s:g} s) and was not")
        except (SkyRLMegaError, OSError) as error:
            self._mark_dead(member, f"it did not start: {error}")
        if member.engine is None:
            member.failed_starts += 1
            return False
        member.failed_starts = 0
        member.state, member.why = EngineState.STALE, f"it waits for weight version {self._version}"
        await self._check(member)
        member.tried.set()
        return True

    async def _watch(self, member: _Member) -> None:
        """Returns once the engine is taken for dead."""
        missed = 0
        while not member.failure.is_set() and missed < MAX_MISSED_CHECKS:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._rollout.health_interval_s):
                    await member.failure.wait()
            if not member.failure.is_set():
                missed = 0 if await self._check(member) else missed + 1
        if not member.failure.is_set():
            every = self._rollout.health_interval_s
            self._mark_dead(member, f"it did not answer {missed} health checks in a row, {every:g} s apart; it is taken for hung")

    async def _check(self, member: _Member) -> bool:
        """Asks the engine for its weight version, and lets it serve if that is the current one. False: no answer in time."""
        try:
            async with asyncio.timeout(self._rollout.health_interval_s):
                version = await member.engine.policy_version()
        except TimeoutError:
            return False
        except EngineStaleError as error:
            self._make_stale(member, str(error))
        except RolloutError as error:
            self._mark_dead(member, str(error))
        else:
            self._saw_version(member, version)
        return True

    def _saw_version(self, member: _Member, version: int) -> None:
        if self._begins_stale and version == 0 and not member.has_pushed_weights:
            self._make_stale(member, "it has the weights of model.path, which are not yet those of version 0")
        elif member.state is EngineState.STALE and version == self._version:
            member.state, member.why = EngineState.SERVING, ""
            self.router.add(member.engine)
        elif version < self._version:
            self._make_stale(member, f"it has weight version {version} and waits for {self._version}")

    def _make_stale(self, member: _Member, why: str) -> None:
        if member.is_up:
            member.state, member.why = EngineState.STALE, why
            self.router.take_out(member.name, f"stale: {why}")

    def _mark_dead(self, member: _Member, why: str) -> None:
        logger.warning("rollout engine %s is dead: %s", member.name, why)
        member.state, member.why = EngineState.DEAD, why
        self.router.take_out(member.name, f"dead: {why}")
        member.failure.set()

    async def _bury(self, member: _Member) -> None:
        engine, member.engine = member.engine, None
        await engine.kill()

    def _give_up(self, member: _Member) -> None:
        member.given_up = True
        member.why += f"; given up after {member.restarts} restarts (rollout.max_engine_restarts)"
        self.router.take_out(member.name, f"dead: {member.why}")
        if all(other.given_up for other in self._members.values()):
            self.router.give_up("every engine was given up")

    def _router_took_out(self, engine: AsyncEngine, error: RolloutError) -> None:
        member = self._members.get(engine.name)
        if member is None or member.engine is not engine or not member.is_up:
            return
        if isinstance(error, EngineStaleError):
            self._make_stale(member, str(error))
        else:
            self._mark_dead(member, str(error))
