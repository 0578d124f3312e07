"""Where the rollout coordinator runs, and how the trainer's rank 0 calls it.

- `InlineHost`: in the trainer's thread, only while that waits for it. For an engine in the trainer's own process: rollouts and
  training take turns, and a run repeats exactly. Ctrl-C there cancels the call and leaves engine and loop whole (`signals`).
- `ThreadHost`: in a thread of the trainer's process, beside the training.
- `RayHost`: in a Ray actor, a process of its own: agents and environments take no time from the trainer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from skyrl_mega.errors import DeadlineError, RolloutError, SkyRLMegaError
from skyrl_mega.orchestration.coordinator import RolloutCoordinator
from skyrl_mega.rollout.abandon import abandon
from skyrl_mega.rollout.engine_process import kill_engine_cores
from skyrl_mega.rollout.signals import run_until_complete

if TYPE_CHECKING:
    from skyrl_mega.rollout.ray_cluster import RayCluster

#: Seconds that the coordinator gets to end what is in flight.
CLOSE_TIMEOUT_S = 60.0
#: Seconds that the rollout thread gets to end, once there is nothing left to close.
STOP_TIMEOUT_S = 5.0
#: Seconds between two looks at the cluster's head while a call waits.
LOOK_AT_HEAD_S = 2.0

#: Makes a coordinator inside the event loop in which it will live.
CoordinatorFactory = Callable[[], Coroutine[Any, Any, RolloutCoordinator]]


class RolloutHost(Protocol):
    """Calls coroutines of the coordinator by name, from the trainer's thread."""

    def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        """What `RolloutCoordinator.<method>` returns or raises; DeadlineError after `timeout_s`."""
        ...

    def close(self) -> None:
        """Ends the coordinator, its engines included. Safe to call twice."""
        ...


class InlineHost:
    """See the module's text."""

    def __init__(self, factory: CoordinatorFactory) -> None:
        self._loop = asyncio.new_event_loop()
        try:
            self._coordinator: RolloutCoordinator | None = run_until_complete(self._loop, factory())
        except BaseException:
            self._loop.close()
            raise

    def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        if self._coordinator is None:
            raise RolloutError("the rollout coordinator is closed.")
        call = _bounded(getattr(self._coordinator, method)(*args, **kwargs), method, timeout_s)
        return run_until_complete(self._loop, call, cancel=method != "close")

    def close(self) -> None:
        if self._coordinator is None:
            return
        try:
            self.call("close", timeout_s=CLOSE_TIMEOUT_S)
        finally:
            self._coordinator = None
            run_until_complete(self._loop, _end_other_tasks(), cancel=False)
            self._loop.close()


class ThreadHost:
    """See the module's text."""

    def __init__(self, factory: CoordinatorFactory, *, start_timeout_s: float) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout", daemon=True)
        self._thread.start()
        self._coordinator: RolloutCoordinator | None = None
        try:
            self._coordinator = self._run(factory(), "start-up", start_timeout_s)
        except BaseException:
            self._stop()
            raise

    def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        if self._coordinator is None:
            raise RolloutError("the rollout coordinator is closed.")
        return self._run(getattr(self._coordinator, method)(*args, **kwargs), method, timeout_s)

    def _run(self, awaitable: Awaitable[Any], what: str, timeout_s: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(_bounded(awaitable, what, timeout_s), self._loop)
        try:
            return future.result(timeout_s + CLOSE_TIMEOUT_S)
        except concurrent.futures.TimeoutError as error:
            if future.done():
                raise
            raise DeadlineError(f"the rollout thread has not answered {what} for {timeout_s + CLOSE_TIMEOUT_S:g} s.") from error
        except BaseException:
            future.cancel()  # Ctrl-C in the trainer's thread must not leave the call behind
            raise

    def close(self) -> None:
        if self._coordinator is None:
            return
        try:
            self.call("close", timeout_s=CLOSE_TIMEOUT_S)
        finally:
            self._coordinator = None
            self._stop()

    def _stop(self) -> None:
        kill_engine_cores()  # after Ctrl-C one may be coming up still, and keep the loop busy
        ended = asyncio.run_coroutine_threadsafe(_end_other_tasks(), self._loop)
        concurrent.futures.wait([ended], STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)


class RayHost:
    """See the module's text. Its death, and that of the cluster around it, end the run: the same command resumes it."""

    def __init__(
        self, factory: CoordinatorFactory, cluster: RayCluster, *, actor_options: dict[str, Any], start_timeout_s: float
    ) -> None:
        import ray

        self._cluster = cluster
        self._is_hung = False
        self._actor = ray.remote(_CoordinatorActor).options(**actor_options).remote()
        try:
            self._get(self._actor.start.remote(factory), "start-up", start_timeout_s)
        except BaseException:
            self._kill()
            raise

    def call(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        if self._actor is None:
            raise RolloutError("the rollout coordinator is closed.")
        return self._get(self._actor.call.remote(method, args, kwargs, timeout_s), method, timeout_s + CLOSE_TIMEOUT_S)

    def _get(self, reference: Any, what: str, timeout_s: float) -> Any:
        import ray

        from skyrl_mega.rollout.ray_cluster import cause_of_death

        deadline = time.monotonic() + timeout_s
        while True:
            self._cluster.require_head()
            try:
                outcome = ray.get(reference, timeout=max(0.0, min(LOOK_AT_HEAD_S, deadline - time.monotonic())))
                break
            except ray.exceptions.GetTimeoutError as error:
                if time.monotonic() >= deadline:
                    self._is_hung = True
                    raise DeadlineError(
                        f"the rollout coordinator, a Ray actor, has not answered {what} within {timeout_s:g} s."
                    ) from error
            except ray.exceptions.RayActorError as error:
                self._actor = None  # nothing is left to close: its engines went with it
                raise RolloutError(
                    f"the rollout coordinator (a Ray actor) died during {what}: {cause_of_death(error)} The same command resumes "
                    "the run."
                ) from error
            except ray.exceptions.RayError as error:
                raise RolloutError(f"the rollout coordinator (a Ray actor) failed during {what}: {error}") from error
        if isinstance(outcome, SkyRLMegaError):
            raise outcome
        return outcome

    def close(self) -> None:
        if self._actor is None:
            return
        try:
            if not self._is_hung and self._cluster.head_answers():
                self.call("close", timeout_s=CLOSE_TIMEOUT_S)
        except RolloutError:
            if self._actor is not None:
                raise
            # A SIGTERM to all processes of the run has ended it before its trainer could. Nothing is left to close.
        finally:
            self._kill()

    def _kill(self) -> None:
        import ray

        actor, self._actor = self._actor, None
        if actor is not None and self._cluster.head_answers():  # without a head Ray would wait for one
            ray.kill(actor)


class _CoordinatorActor:
    """The process of `RayHost`. Errors of ours travel as values: Ray would wrap them into a class of its own."""

    def __init__(self) -> None:
        self._coordinator: RolloutCoordinator | None = None

    async def start(self, factory: CoordinatorFactory) -> SkyRLMegaError | None:
        # Blocked in all of the run's Ray (`ray_cluster`), and inherited by what environments start: that must hear it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        try:
            self._coordinator = await factory()
        except SkyRLMegaError as error:
            return error
        return None

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float) -> Any:
        try:
            return await _bounded(getattr(self._coordinator, method)(*args, **kwargs), method, timeout_s)
        except SkyRLMegaError as error:
            return error


async def _bounded(awaitable: Awaitable[Any], what: str, timeout_s: float) -> Any:
    """The awaitable's result. Raises DeadlineError naming `what` after `timeout_s`. Nothing runs on for a caller that is gone."""
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait([task], timeout=timeout_s)
    except asyncio.CancelledError:
        abandon(task)
        raise
    if not done:
        abandon(task)
        raise DeadlineError(f"the rollout coordinator has not ended {what} within {timeout_s:g} s.")
    return task.result()


async def _end_other_tasks() -> None:
    """A call that Ctrl-C broke off has left its tasks behind in the loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
