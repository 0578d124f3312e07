"""All terms of the reward, over one group at a time: scored side by side, then mixed with the environment's reward.

A trajectory's reward becomes env_weight x its environment's reward + the sum of weight x score. Its turns keep the environment's
rewards, times env_weight; the rest is added to the last turn, since a score is of the whole trajectory. So the reward is still
the sum of the turns' rewards.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from skyrl_mega.config.reward_rules import ENV_SCORE
from skyrl_mega.config.schema import AnyRewardTerm
from skyrl_mega.errors import RewardError
from skyrl_mega.rewards.inputs import RewardInput
from skyrl_mega.rewards.scorer import Scorer
from skyrl_mega.types import Trajectory, TrajectoryGroup


@dataclass(frozen=True)
class _Scored:
    """One term over a group: a score for each sample (None: leave the sample out), and how many had an error."""

    scores: list[float | None]
    num_errors: int


class RewardPipeline:
    """Any number of groups are scored at once, in one event loop. Cancelling a call cancels what it has in flight."""

    def __init__(self, terms: Sequence[tuple[AnyRewardTerm, Scorer]], *, env_weight: float) -> None:
        self._terms = list(terms)
        self._env_weight = env_weight

    async def __call__(self, group: TrajectoryGroup, inputs: Sequence[RewardInput]) -> TrajectoryGroup:
        """The group with mixed rewards; `inputs` are of its trajectories, in their order.

        Samples that a term with `on_error: mask` could not score are left out and counted. Raises RewardError for a term with
        `on_error: raise`, DeadlineError if too many calls hang.
        """
        if not inputs:
            return group
        try:
            async with asyncio.TaskGroup() as tasks:
                running = {term.name: tasks.create_task(_score(term, scorer, inputs)) for term, scorer in self._terms}
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
        scored = {name: task.result() for name, task in running.items()}
        trajectories = []
        for index, trajectory in enumerate(group.trajectories):
            scores = {name: term.scores[index] for name, term in scored.items()}
            whole = {name: score for name, score in scores.items() if score is not None}
            if len(whole) == len(scores):
                trajectories.append(self._mixed(trajectory, whole))
        return replace(
            group,
            trajectories=tuple(trajectories),
            num_masked=group.num_masked + len(group.trajectories) - len(trajectories),
            reward_errors={name: term.num_errors for name, term in scored.items() if term.num_errors},
        )

    def _mixed(self, trajectory: Trajectory, scores: dict[str, float]) -> Trajectory:
        extra = math.fsum(term.weight * scores[term.name] for term, _ in self._terms)
        turns = [replace(turn, reward=self._env_weight * turn.reward) for turn in trajectory.turns]
        turns[-1] = replace(turns[-1], reward=turns[-1].reward + extra)
        return replace(
            trajectory,
            turns=tuple(turns),
            reward=math.fsum(turn.reward for turn in turns),
            reward_components={ENV_SCORE: trajectory.reward, **scores},
        )

    async def close(self) -> None:
        for _, scorer in self._terms:
            await scorer.close()


async def _score(term: AnyRewardTerm, scorer: Scorer, inputs: Sequence[RewardInput]) -> _Scored:
    outcomes = await scorer.score(inputs)
    errors = [outcome for outcome in outcomes if isinstance(outcome, RewardError)]
    if errors and term.on_error == "raise":
        raise errors[0] from errors[0].__cause__
    instead = term.default if term.on_error == "default" else None
    scores = [instead if isinstance(outcome, RewardError) else outcome for outcome in outcomes]
    return _Scored(scores, len(errors))
