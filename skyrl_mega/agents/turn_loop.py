"""A prompt group in, a trajectory group out: every episode goes its own pace, one request of the engine a turn.

Tokens in, tokens out: what the engine sampled is appended as it is; only what the environment says is tokenised.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from skyrl_mega.agents.chat import ObservationEncoder
from skyrl_mega.agents.env_calls import EnvCalls
from skyrl_mega.agents.episode import Episode
from skyrl_mega.config.schema import EnvConfig, RolloutConfig
from skyrl_mega.data.hashing import stable_hash
from skyrl_mega.errors import DataError, EnvError
from skyrl_mega.protocols import RequestRouter, TextEnv
from skyrl_mega.rewards.inputs import RewardInput
from skyrl_mega.rewards.pipeline import RewardPipeline
from skyrl_mega.types import GenerationRequest, PromptGroup, SamplingParams, Trajectory, TrajectoryGroup

#: A finished episode, and what the terms of the reward are told of it.
Played = tuple[Trajectory, RewardInput]


class AgentRunner:
    """A GroupRunner over a text environment and the engines. Any number of groups may run at once, in one event loop.

    Every request has its own seed, from (seed, group_id, sample, turn): the same group gives the same requests whatever else is
    in flight, after a resume too. All samples of a group start from the same environment seed. Environments are kept and
    reset between episodes; one that failed is not used again.

    An episode whose environment raises or runs out of time is begun again `env.retries` times; then the run ends with the error
    (`env.on_error: raise`), or the sample is left out of its group and counted (`mask`).

    With `rewards`, a group's trajectories are scored as soon as all are there, beside whatever other groups do.
    """

    def __init__(
        self,
        router: RequestRouter,
        tokenizer: Any,
        make_env: Callable[[], TextEnv],
        *,
        rollout: RolloutConfig,
        env: EnvConfig,
        seed: int,
        sequential_envs: bool = False,
        rewards: RewardPipeline | None = None,
    ) -> None:
        """`sequential_envs`: one environment call at a time, in an order that repeats; see `EnvCalls`."""
        self._router = router
        self._encoder = ObservationEncoder(tokenizer, chat_template=env.chat_template)
        self._make_env = make_env
        self._rollout = rollout
        self._settings = env
        self._seed = seed
        self._call = EnvCalls(env.timeout_s, sequential=sequential_envs)
        self._rewards = rewards
        self._idle_envs: list[TextEnv] = []

    async def __call__(
        self, group: PromptGroup, *, greedy: bool = False, on_sample: Callable[[], None] | None = None
    ) -> TrajectoryGroup:
        """The group's trajectories, in the order of its samples; temperature 0 if `greedy`.

        Raises EnvError from an environment (the group named), RewardError from a term of the reward, RolloutError from the
        engines, DataError for a prompt that is too long. All that the group has in flight is cancelled before an error is raised,
        or when this call is cancelled.
        """
        if group.num_samples < 1:
            raise DataError(f"group {group.group_id!r} asks for {group.num_samples} samples; at least 1 is needed.")
        try:
            async with asyncio.TaskGroup() as tasks:
                samples = [tasks.create_task(self._sample(group, s, greedy)) for s in range(group.num_samples)]
                if on_sample is not None:
                    for task in samples:
                        task.add_done_callback(functools.partial(_tell, on_sample))
        except BaseExceptionGroup as errors:
            error = _first(errors)
            raise error from error.__cause__
        outcomes = [task.result() for task in samples]
        played = [episode for episode, _ in outcomes if episode is not None]
        finished = TrajectoryGroup(
            group.group_id,
            group.prompt.prompt_id,
            tuple(trajectory for trajectory, _ in played),
            num_masked=group.num_samples - len(played),
            num_retries=sum(retries for _, retries in outcomes),
        )
        if self._rewards is None:
            return finished
        return await self._rewards(finished, [reward_input for _, reward_input in played])

    async def close(self) -> None:
        """Closes the connections of the reward's terms."""
        if self._rewards is not None:
            await self._rewards.close()

    async def _sample(self, group: PromptGroup, sample: int, greedy: bool) -> tuple[Played | None, int]:
        """One played episode (None: masked), and how often it was begun again."""
        for attempt in range(self._settings.retries + 1):
            try:
                return await self._episode(group, sample, greedy), attempt
            except EnvError:
                if attempt == self._settings.retries and self._settings.on_error == "raise":
                    raise
        return None, self._settings.retries

    async def _episode(self, group: PromptGroup, sample: int, greedy: bool) -> Played:
        env = self._idle_envs.pop() if self._idle_envs else self._make_env()
        episode = Episode(env, self._call, self._encoder, group, sample, max_tokens=self._rollout.max_model_len, greedy=greedy)
        await episode.start(stable_hash(self._seed, group.group_id, "env", bits=32))
        sampling = self._sampling(greedy)
        while not episode.done:
            request = self._request(episode, sampling)
            completion = await self._router.generate(request, session=episode.session)
            await episode.take(completion, max_new_tokens=request.sampling.max_new_tokens, max_turns=self._settings.max_turns)
        self._idle_envs.append(env)
        trajectory = episode.trajectory()
        return trajectory, episode.reward_input(trajectory)

    def _request(self, episode: Episode, sampling: SamplingParams) -> GenerationRequest:
        greedy = sampling.temperature == 0.0
        seed = None if greedy else stable_hash(self._seed, episode.group_id, episode.sample, len(episode.turns), bits=32)
        limited = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, episode.room), seed=seed)
        return GenerationRequest(episode.request_id, list(episode.token_ids), limited)

    def _sampling(self, greedy: bool) -> SamplingParams:
        rollout = self._rollout
        if greedy:
            return SamplingParams(rollout.max_new_tokens, temperature=0.0, stop=tuple(rollout.stop))
        return SamplingParams(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k, tuple(rollout.stop))


def _tell(on_sample: Callable[[], None], task: asyncio.Task[object]) -> None:
    if not task.cancelled() and task.exception() is None:
        on_sample()


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of the errors that is no group itself."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
