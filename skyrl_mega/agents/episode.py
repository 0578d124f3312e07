"""One episode while it grows: tokens, who wrote them, and what the environment said."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any

from skyrl_mega.agents.chat import ObservationEncoder
from skyrl_mega.data.routing import RoutedTokens
from skyrl_mega.errors import DataError, EnvError, RolloutError
from skyrl_mega.protocols import TextEnv
from skyrl_mega.rewards.inputs import RewardInput
from skyrl_mega.types import Completion, PromptGroup, StopReason, Trajectory, Turn

#: Runs a method of an environment beside the event loop.
EnvCall = Callable[..., Awaitable[Any]]


class _Named:
    """Names the group, sample and turn in whatever a call of the environment raises; nothing is swallowed."""

    def __init__(self, description: str) -> None:
        self._description = description

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception):
            raise EnvError(f"the environment failed in {self._description}: {type(error).__name__}: {error}") from error


class Episode:
    """Tokens and bookkeeping of one trajectory; `done` once it has ended. Token-aligned lists, see `types.Trajectory`."""

    def __init__(
        self,
        env: TextEnv,
        call: EnvCall,
        encoder: ObservationEncoder,
        group: PromptGroup,
        sample: int,
        *,
        max_tokens: int,
        greedy: bool = False,
    ) -> None:
        """`call` runs a method of the environment; a TimeoutError of it is an EnvError here. `greedy` is part of its requests'
        names: a group may be sampled and answered greedily at the same time."""
        self._env, self._call, self._encoder, self._max_tokens = env, call, encoder, max_tokens
        self._prompt_id = group.prompt.prompt_id
        self.group_id, self.sample = group.group_id, sample
        self.session = f"{group.group_id}/greedy/{sample}" if greedy else f"{group.group_id}/{sample}"
        self._payload = dict(group.prompt.payload)
        self.token_ids: list[int] = []
        self._loss_mask: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._texts: list[str] = []
        self._routed = RoutedTokens()
        self._messages: list[dict[str, str]] = []
        self._metrics: dict[str, float] = {}
        self._answer: str | None = None
        self.turns: list[Turn] = []
        self.terminated = False
        self.truncated = False

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated

    @property
    def request_id(self) -> str:
        return f"{self.session}/{len(self.turns)}"

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self._max_tokens - len(self.token_ids)

    async def start(self, seed: int) -> None:
        """Poses the prompt. Raises EnvError from the environment, DataError for a prompt with no room for an answer."""
        with _Named(self._where("reset")):
            observation, _ = await self._call(self._env.reset, seed=seed, options={"payload": self._payload})
            prompt = self._encoder.first(observation)
        if len(prompt) > self._max_tokens - 1:
            raise DataError(
                f"the prompt of group {self.group_id!r} has {len(prompt)} tokens, but rollout.max_model_len "
                f"({self._max_tokens}) must hold it and at least one more. Raise rollout.max_model_len above {len(prompt)}, or "
                "leave such prompts out."
            )
        self._append(prompt)
        self._hear(observation)

    async def take(self, completion: Completion, *, max_new_tokens: int, max_turns: int) -> None:
        """Appends a sampled turn as it is, lets the environment answer it, and appends what it says next.

        An aborted turn is kept but not graded: the episode is truncated there.
        """
        self._check(completion, max_new_tokens)
        start = len(self.token_ids)
        self._append(completion.token_ids, completion.logprobs, completion.policy_versions)
        self._texts.append(completion.text)
        self._routed.add(completion.routed_experts)
        self._messages.append({"role": "assistant", "content": completion.text})
        observation, reward = None, 0.0
        if completion.stop_reason is StopReason.ABORT:
            self.truncated = True
        else:
            observation, reward = await self._step(completion.text)
        self.turns.append(Turn(start, len(self.token_ids), completion.stop_reason, reward))
        if not self.done and len(self.turns) >= max_turns:
            self.truncated = True
        if not self.done:
            with _Named(self._where("step")):
                new = self._encoder.later(observation, completion.token_ids)
            if len(new) + 1 > self.room:
                self.truncated = True
            else:
                self._append(new)
                self._hear(observation)

    def trajectory(self) -> Trajectory:
        return Trajectory(
            token_ids=self.token_ids,
            loss_mask=self._loss_mask,
            rollout_logprobs=self._logprobs,
            policy_versions=self._versions,
            turns=tuple(self.turns),
            reward=math.fsum(turn.reward for turn in self.turns),
            terminated=self.terminated,
            truncated=self.truncated,
            routed_experts=self._routed.padded(len(self.token_ids)),
            metrics=self._metrics,
            text="\n".join(self._texts),
            answer=self._answer,
        )

    def reward_input(self, trajectory: Trajectory) -> RewardInput:
        """What the terms of the reward are told of the finished `trajectory`."""
        return RewardInput(
            group_id=self.group_id,
            prompt_id=self._prompt_id,
            sample=self.sample,
            payload=self._payload,
            messages=self._messages,
            token_ids=trajectory.token_ids,
            num_response_tokens=sum(trajectory.loss_mask),
            stop_reason=self.turns[-1].stop_reason,
            truncated=trajectory.truncated,
            env_reward=trajectory.reward,
            metrics=trajectory.metrics,
        )

    def _hear(self, observation: Any) -> None:
        self._messages.extend([{"role": "user", "content": observation}] if isinstance(observation, str) else observation)

    def _where(self, call: str) -> str:
        return f"{call} of group {self.group_id!r}, sample {self.sample}, turn {len(self.turns)}"

    def _append(self, ids: Sequence[int], logprobs: Sequence[float] | None = None, versions: Sequence[int] | None = None) -> None:
        """Sampled tokens come with logprobs and a version; the environment's come without."""
        self.token_ids.extend(ids)
        self._loss_mask.extend([int(logprobs is not None)] * len(ids))
        self._logprobs.extend([0.0] * len(ids) if logprobs is None else logprobs)
        self._versions.extend([-1] * len(ids) if versions is None else versions)

    async def _step(self, action: str) -> tuple[Any, float]:
        with _Named(self._where("step")):
            observation, reward, terminated, truncated, info = await self._call(self._env.step, action)
            reward = float(reward)
            metrics = {name: float(value) for name, value in info.get("metrics", {}).items()}
        bad = {name: value for name, value in {"reward": reward, **metrics}.items() if not math.isfinite(value)}
        if bad:
            raise EnvError(f"rewards and metrics must be finite, but {self._where('step')} gave {bad}.")
        self._metrics.update(metrics)
        answer = info.get("answer")
        self._answer = None if answer is None else str(answer)
        self.terminated, self.truncated = bool(terminated), bool(truncated)
        return observation, reward

    def _check(self, completion: Completion, max_new_tokens: int) -> None:
        count = len(completion.token_ids)
        if completion.request_id != self.request_id:
            raise RolloutError(
                f"the engine answered {completion.request_id!r} where {self.request_id!r} was asked; keep the order."
            )
        logprobs, versions = len(completion.logprobs), completion.policy_versions
        if not 1 <= count <= max_new_tokens or logprobs != count or len(versions) != count:
            raise RolloutError(
                f"completion {completion.request_id!r} has {count} tokens, {logprobs} logprobs and {len(versions)} "
                f"policy_versions; there must be equally many, from 1 to {max_new_tokens}."
            )
        if min(versions) < 0:
            raise RolloutError(f"completion {completion.request_id!r} has policy_version {min(versions)}; it must be >= 0.")
