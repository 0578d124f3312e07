"""Prompt groups in, trajectory groups out: all episodes advance together, one engine call a turn.

Tokens in, tokens out: what the engine sampled is appended as it is; only what the environment says is tokenised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from skyrl_mega.agents.chat import ObservationEncoder
from skyrl_mega.agents.episode import Episode
from skyrl_mega.config.schema import EnvConfig, RolloutConfig
from skyrl_mega.data.hashing import stable_hash
from skyrl_mega.errors import DataError, RolloutError
from skyrl_mega.protocols import RolloutEngine, TextEnv
from skyrl_mega.types import GenerationRequest, PromptGroup, SamplingParams, TrajectoryGroup


class AgentRunner:
    """A GroupRunner over a text environment and an engine.

    Every request has its own seed, from (seed, group_id, sample, turn): the same groups give the same requests whatever else is
    in flight, after a resume too. All samples of a group start from the same environment seed. Environments are kept and
    reset between calls. Not safe to call from two threads at once.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: Any,
        make_env: Callable[[], TextEnv],
        *,
        rollout: RolloutConfig,
        env: EnvConfig,
        seed: int,
    ) -> None:
        self._engine = engine
        self._encoder = ObservationEncoder(tokenizer, chat_template=env.chat_template)
        self._make_env = make_env
        self._rollout = rollout
        self._max_turns = env.max_turns
        self._seed = seed
        self._idle_envs: list[TextEnv] = []

    def __call__(self, groups: Sequence[PromptGroup], *, greedy: bool = False) -> list[TrajectoryGroup]:
        """One TrajectoryGroup per group, in order; temperature 0 if `greedy`.

        Raises EnvError from an environment (the group named), RolloutError from the engine, DataError for a prompt that
        is too long.
        """
        self._check(groups)
        sampling = self._sampling(greedy)
        envs: list[TextEnv] = []
        episodes: list[Episode] = []
        for group in groups:
            for sample in range(group.num_samples):
                envs.append(self._idle_envs.pop() if self._idle_envs else self._make_env())
                episode = Episode(envs[-1], self._encoder, group, sample, max_tokens=self._rollout.max_model_len)
                episode.start(stable_hash(self._seed, group.group_id, "env", bits=32))
                episodes.append(episode)
        live = episodes
        while live:
            self._advance(live, sampling)
            live = [episode for episode in live if not episode.done]
        self._idle_envs.extend(reversed(envs))  # a failed call keeps none: an environment that broke is not used again
        finished = iter(episodes)
        return [
            TrajectoryGroup(g.group_id, g.prompt.prompt_id, tuple(next(finished).trajectory() for _ in range(g.num_samples)))
            for g in groups
        ]

    def _advance(self, live: Sequence[Episode], sampling: SamplingParams) -> None:
        """One turn of every live episode."""
        requests = [self._request(episode, sampling) for episode in live]
        completions = self._engine.generate(requests)
        if len(completions) != len(requests):
            raise RolloutError(f"the engine gave {len(completions)} completions for {len(requests)} requests.")
        for episode, request, completion in zip(live, requests, completions, strict=True):
            episode.take(completion, max_new_tokens=request.sampling.max_new_tokens, max_turns=self._max_turns)

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

    @staticmethod
    def _check(groups: Sequence[PromptGroup]) -> None:
        seen: set[str] = set()
        for group in groups:
            if group.num_samples < 1:
                raise DataError(f"group {group.group_id!r} asks for {group.num_samples} samples; at least 1 is needed.")
            if group.group_id in seen:
                raise DataError(f"group_id {group.group_id!r} comes twice; it must be unique, since requests are named by it.")
            seen.add(group.group_id)
