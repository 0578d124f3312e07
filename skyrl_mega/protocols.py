"""The seams: what one room may ask of another. Structural types, so that no room imports another room's classes.

Which ranks call: a method is called by rank 0 only unless its docstring says *all ranks*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from skyrl_mega.types import (
    Completion,
    GenerationRequest,
    Metrics,
    Prompt,
    PromptGroup,
    TrainBatch,
    TrajectoryGroup,
    WeightVersion,
)

if TYPE_CHECKING:
    import torch


@runtime_checkable
class PromptSource(Protocol):
    """An endless, resumable stream of training prompts."""

    def next(self, count: int) -> list[Prompt]:
        """The next `count` prompts. Epochs are reshuffled by seed; a prompt repeats only in a later epoch."""
        ...

    def eval_prompts(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts, the same at every call. None of them is ever returned by `next`."""
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """Where the stream stands, JSON-serialisable."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as if the prompts before `state` had been drawn. Raises DataError if the state is of other data."""
        ...


@runtime_checkable
class CurriculumSource(PromptSource, Protocol):
    """A stream that draws prompts by how their groups fared. What it was told is part of its state."""

    def observe(self, group: TrajectoryGroup) -> None:
        """Takes note of a finished group of one of its training prompts."""
        ...

    def metrics(self) -> Metrics:
        """Numbers since the last call."""
        ...


@runtime_checkable
class TextEnv(Protocol):
    """A gymnasium-style text environment: one episode at a time.

    The observation is text (a prompt to continue as it stands) or a list of chat messages
    (`{"role": ..., "content": ...}`); the action is the text of the policy's turn.
    """

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str | list[dict[str, str]], dict[str, Any]]: ...

    def step(self, action: str) -> tuple[str | list[dict[str, str]], float, bool, bool, dict[str, Any]]:
        """(observation, reward, terminated, truncated, info). `info["metrics"]` holds numbers to average.

        `info["answer"]`, if any: what was graded, as text; equal answers are equal."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that agents use."""

    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Samples token ids from a versioned policy."""

    @property
    def policy_version(self) -> int:
        """The weight version now serving, as the engine itself reports it."""
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """One completion per request, in the order of the requests. Raises RolloutError."""
        ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token given those before it, by the engine; element 0 of each row is 0.0.

        Raw logits (temperature 1). Serves the probe that compares engine and policy after a weight sync.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class AsyncEngine(Protocol):
    """One rollout engine seen from an event loop: in this process, in a Ray actor, or behind a server.

    Every method but `close` raises EngineDiedError if the engine is gone, EngineStaleError if it waits for a whole weight version
    (another engine may answer the same request in both cases), and RolloutError for a request that no engine could answer.
    """

    @property
    def name(self) -> str:
        """Unique in the fleet, the same for the engine that replaces a dead one."""
        ...

    async def generate(self, request: GenerationRequest) -> Completion:
        """The whole turn. Cancelling the call ends the request inside the engine.

        A completion that stops with ABORT holds the tokens sampled so far; the caller decides whether to continue it.
        """
        ...

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """As `RolloutEngine.score`."""
        ...

    async def policy_version(self) -> int:
        """The weight version now serving, as the engine itself reports it: also the sign that it is alive."""
        ...

    async def close(self) -> None:
        """Frees what it holds. Safe to call twice, and for an engine that is dead."""
        ...


class WeightReceiver(Protocol):
    """The weight controls of one engine, as the trainer's rank 0 drives them for one version after another.

    Every call returns at once; its future fails with EngineDiedError if the engine is gone. One version arrives as
    `begin`, `load` per bucket (the next may be sent before the last one is loaded; they are loaded in order), `report`,
    `commit`; or as `begin`, any number of `load`, `abandon`.
    """

    @property
    def name(self) -> str: ...

    def connect(self, endpoint: Mapping[str, Any]) -> Future[None]:
        """Joins the transport whose address is `endpoint` (plain values); {} where there is nothing to join."""
        ...

    def begin(self, version: int) -> Future[None]:
        """Freezes running requests, lets new ones wait, and makes the workers ready to load."""
        ...

    def load(self, bucket: Mapping[str, Any]) -> Future[None]:
        """Loads a bucket that the transport describes in plain values. What does not fit is said by `report`, not raised."""
        ...

    def report(self) -> Future[list[Mapping[str, Any]]]:
        """For each worker what it received: error ("" if none), num_tensors, size_bytes, checksum."""
        ...

    def commit(self, version: int) -> Future[None]:
        """Makes the version visible and lets requests run on (`rollout.kv_cache_on_update` says with which KV cache)."""
        ...

    def abandon(self) -> Future[bool]:
        """Gives the version up. True: the old weights serve on; False: some are overwritten, the engine serves nothing."""
        ...


class WeightSource(Protocol):
    """Streams the policy's weights under Hugging Face names."""

    def fused_groups(self) -> Sequence[tuple[str, ...]]:
        """Names that must travel together (q/k/v, gate/up), in export order; a lone tensor is a group of one."""
        ...

    def iter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """*All ranks.* (name, full tensor) in a fixed order, gathered over tensor and pipeline ranks, one at a time.

        Yields the same tensors on every rank; only rank 0 needs to keep them. A yielded tensor stays as it is until the
        weights change (it may be a view of a parameter).
        """
        ...


class WeightSink(Protocol):
    """The engine's end of a weight transport. A version becomes visible in `finish`, or not at all."""

    def start(self, version: int, groups: Sequence[tuple[str, ...]]) -> None: ...

    def put(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """A bucket of whole fused groups. Raises WeightSyncError if it splits a group."""
        ...

    def finish(self) -> WeightVersion:
        """Makes the version visible: repacks tied heads, resets the prefix cache, compares checksums."""
        ...

    def abort(self) -> None:
        """Gives up the version in progress; the sink is left able to start again."""
        ...


class PolicyLike(WeightSource, Protocol):
    """What the loop asks of the trainable policy. Every method: *all ranks*."""

    def compute_logprobs(self, batch: TrainBatch) -> list[torch.Tensor]:
        """Log-probabilities of `labels` under the current weights, no gradient.

        One float32 [T] per micro-batch, 0 where loss_mask is False, at the rollout temperature of the algorithm config.
        """
        ...

    def train_step(self, batch: TrainBatch) -> Metrics:
        """Forward, backward and one optimizer update over all micro-batches; returns globally reduced numbers."""
        ...


class Tracker(Protocol):
    """One destination of metrics. A tracker never raises out of `log`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class RequestRouter(Protocol):
    """The fleet of engines as agents see it."""

    async def generate(self, request: GenerationRequest, *, session: str | None = None) -> Completion:
        """The whole turn, by whichever engine. Requests of one session share a prefix, and are best served by one engine."""
        ...


class EngineFleet(Protocol):
    """The engines behind a router, as the coordinator sees them. One event loop."""

    def needs_weights(self) -> Sequence[str]:
        """Engines that came up while a later version than the model's own was served: they wait for a push."""
        ...

    def receivers(self, *, stale_only: bool = False) -> list[WeightReceiver]:
        """The weight controls of all engines that serve or wait, or only of those that wait."""
        ...

    async def weights_arrived(self, version: int, names: Sequence[str]) -> Sequence[str]:
        """Says that a push was committed by the engines `names`; the names of those that serve now. Others serve no longer."""
        ...

    async def sleep(self, level: int) -> None:
        """Engines give their GPU memory up (vLLM's levels; nothing happens on CPU)."""
        ...

    async def wake(self, tags: Sequence[str]) -> None:
        """Engines take memory back: "weights", "kv_cache"."""
        ...

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]: ...

    def num_slots(self) -> int:
        """Requests that the serving engines can work on at once (0 while none serves)."""
        ...

    def metrics(self) -> Metrics:
        """Numbers since the last call."""
        ...

    async def close(self) -> None: ...


class GroupRunner(Protocol):
    """Turns a prompt group into a trajectory group (agents, environments and the engines behind it)."""

    async def __call__(
        self, group: PromptGroup, *, greedy: bool = False, on_sample: Callable[[], None] | None = None
    ) -> TrajectoryGroup:
        """`on_sample` is called as each sample of the group ends."""
        ...

    async def close(self) -> None:
        """Frees what it holds besides the engines."""
        ...
