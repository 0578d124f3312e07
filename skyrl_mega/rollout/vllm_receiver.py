"""The weight controls of a `VLLMEngine`, as the fleet's sink drives them: a `protocols.WeightReceiver`.

With the engine in this process every call does its work at once and returns a finished Future. With the engine in child
processes the calls wait in a thread, one after another, so that the trainer gathers and packs the next bucket meanwhile;
nothing else uses the engine while a version is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from skyrl_mega.errors import SkyRLMegaError

if TYPE_CHECKING:
    from skyrl_mega.rollout.vllm_engine import VLLMEngine

Result = TypeVar("Result")


class InlineExecutor(Executor):
    """Runs each call at once; errors of ours are kept in its Future, others are bugs and go straight up."""

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except SkyRLMegaError as error:
            future.set_exception(error)
        return future


class VLLMReceiver:
    """Made by `VLLMEngine.weight_receiver`."""

    def __init__(self, engine: VLLMEngine, *, in_process: bool, name: str = "engine") -> None:
        self._engine = engine
        self._name = name
        self._calls: Executor = InlineExecutor() if in_process else ThreadPoolExecutor(1, thread_name_prefix="weights")

    @property
    def name(self) -> str:
        return self._name

    def connect(self, endpoint: Mapping[str, Any]) -> Future[None]:
        return self._calls.submit(self._engine._connect_weight_transport, dict(endpoint))

    def begin(self, version: int) -> Future[None]:
        return self._calls.submit(self._engine._begin_weight_update, version)

    def load(self, bucket: Mapping[str, Any]) -> Future[None]:
        return self._calls.submit(self._engine._load_bucket, dict(bucket))

    def report(self) -> Future[list[Mapping[str, Any]]]:
        return self._calls.submit(self._engine._report_weight_update)

    def commit(self, version: int) -> Future[None]:
        return self._calls.submit(self._engine._commit_weight_update, version)

    def abandon(self) -> Future[bool]:
        return self._calls.submit(self._engine._abandon_weight_update)

    def close(self) -> None:
        """Ends the thread, if there is one."""
        self._calls.shutdown(wait=False, cancel_futures=True)
