"""The seams: what one room may ask of another. Structural types, so that no room imports another room's classes.

Which ranks call: a method is called by rank 0 only unless its docstring says *all ranks*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
class TextEnv(Protocol):
    """A gymnasium-style text environment: one episode at a time.

    The observation is text (a prompt to continue as it stands) or a list of chat messages
    (`{"role": ..., "content": ...}`); the action is the text of the policy's turn.
    """

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[str | list[dict[str, str]], dict[str, Any]]: ...

    def step(self, action: str) -> tuple[str | list[dict[str, str]], float, bool, bool, dict[str, Any]]:
        """(observation, reward, terminated, truncated, info). `info["metrics"]` holds numbers to average."""
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


class GroupRunner(Protocol):
    """Turns prompt groups into trajectory groups (agents, environments and the engine behind it)."""

    def __call__(self, groups: Sequence[PromptGroup], *, greedy: bool = False) -> list[TrajectoryGroup]: ...
