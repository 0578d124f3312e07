"""Scores mixed into rewards: the sum, what is kept of it, and what becomes of samples without a score."""

from __future__ import annotations

import asyncio
import math

import pytest

from helpers.ledger import finished, issue, open_ledger
from helpers.rewards import group_of, reward_input, trajectory
from skyrl_mega.config.schema import Config, FunctionTerm, RewardConfig
from skyrl_mega.data.samples import to_samples
from skyrl_mega.errors import DataError, RewardError
from skyrl_mega.rewards.build import make_pipeline
from skyrl_mega.rewards.pipeline import RewardPipeline
from skyrl_mega.types import Trajectory, TrajectoryGroup


class Scripted:
    """A scorer with fixed outcomes; None is an error."""

    def __init__(self, *outcomes: float | None) -> None:
        self._outcomes = outcomes
        self.closed = self.cancelled = False

    async def score(self, inputs):
        assert len(inputs) == len(self._outcomes)
        await asyncio.sleep(0)
        return [RewardError(f"no score for sample {i}") if o is None else o for i, o in enumerate(self._outcomes)]

    async def close(self):
        self.closed = True


class Forever(Scripted):
    async def score(self, inputs):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


def term(name, **settings) -> FunctionTerm:
    return FunctionTerm(name=name, path="x:y", **settings)


def mix(group: TrajectoryGroup, *terms, env_weight=1.0) -> TrajectoryGroup:
    inputs = [reward_input(sample=n) for n in range(len(group.trajectories))]
    return asyncio.run(RewardPipeline(terms, env_weight=env_weight)(group, inputs))


def test_a_reward_is_the_weighted_sum_and_keeps_every_raw_score():
    mixed = mix(
        group_of(1.0, 0.0, 0.5),
        (term("brevity", weight=-0.25), Scripted(0.5, 1.0, 3.0)),
        (term("quality", weight=2.0), Scripted(0.1, 0.2, 0.3)),
        (term("watched", weight=0.0), Scripted(9.0, 8.0, 7.0)),
        env_weight=0.5,
    )
    env, brevity, quality, watched = (1.0, 0.0, 0.5), (0.5, 1.0, 3.0), (0.1, 0.2, 0.3), (9.0, 8.0, 7.0)
    for index, t in enumerate(mixed.trajectories):
        assert t.reward == pytest.approx(0.5 * env[index] - 0.25 * brevity[index] + 2.0 * quality[index], abs=1e-15)
        scores = (env[index], brevity[index], quality[index], watched[index])
        assert t.reward_components == dict(zip(("env", "brevity", "quality", "watched"), scores, strict=True))
    assert (mixed.num_masked, mixed.reward_errors) == (0, {})


def test_turns_keep_the_environments_rewards_and_the_last_has_the_rest():
    group = TrajectoryGroup("g", "p", (trajectory(0.25, 0.5, -1.0),))
    [t] = mix(group, (term("a", weight=3.0), Scripted(0.7)), env_weight=2.0).trajectories
    assert [turn.reward for turn in t.turns] == [0.5, 1.0, -2.0 + 3.0 * 0.7]
    assert t.reward == math.fsum(turn.reward for turn in t.turns)
    assert t.reward_components["env"] == -0.25


def test_without_terms_only_the_environments_weight_counts():
    [t] = mix(group_of(3.0), env_weight=0.5).trajectories
    assert (t.reward, t.turns[0].reward, t.reward_components) == (1.5, 1.5, {"env": 3.0})
    assert make_pipeline(Config(), None) is None, "the environment's reward alone needs no pipeline"
    assert make_pipeline(Config(reward=RewardConfig(env_weight=0.5)), None) is not None


def test_an_error_ends_the_run_unless_the_term_says_otherwise_and_what_else_runs_is_cancelled():
    other = Forever()
    with pytest.raises(RewardError, match="no score for sample 1"):
        mix(group_of(1.0, 1.0), (term("slow"), other), (term("judge"), Scripted(0.5, None)))
    assert other.cancelled


def test_a_masked_sample_is_left_out_and_counted():
    group = TrajectoryGroup("g", "p", group_of(0.0, 1.0, 2.0, 3.0).trajectories, num_masked=2)
    mixed = mix(
        group,
        (term("judge", on_error="mask"), Scripted(None, 0.5, 0.5, None)),
        (term("other", on_error="mask"), Scripted(0.1, 0.2, 0.3, None)),
    )
    assert [t.reward_components for t in mixed.trajectories] == [
        {"env": 1.0, "judge": 0.5, "other": 0.2},
        {"env": 2.0, "judge": 0.5, "other": 0.3},
    ]
    assert (mixed.num_masked, mixed.reward_errors) == (4, {"judge": 2, "other": 1})


def test_a_default_stands_in_and_is_counted():
    mixed = mix(group_of(0.0, 1.0), (term("judge", on_error="default", default=0.25, weight=2.0), Scripted(None, 1.0)))
    assert [t.reward for t in mixed.trajectories] == [0.5, 3.0]
    assert mixed.trajectories[0].reward_components == {"env": 0.0, "judge": 0.25}
    assert (mixed.num_masked, mixed.reward_errors) == (0, {"judge": 1})


def test_a_group_whose_samples_all_failed_is_not_scored():
    group = TrajectoryGroup("g", "p", (), num_masked=4)
    assert mix(group, (term("judge"), Scripted(1.0))) == group


def test_cancelling_a_group_cancels_its_scoring_and_closing_closes_every_term():
    scorers = [Forever(), Forever()]

    async def run():
        pipeline = RewardPipeline([(term("a"), scorers[0]), (term("b"), scorers[1])], env_weight=1.0)
        task = asyncio.create_task(pipeline(group_of(1.0), [reward_input()]))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await pipeline.close()

    asyncio.run(run())
    assert [(scorer.cancelled, scorer.closed) for scorer in scorers] == [(True, True)] * 2


def test_scores_come_back_from_the_ledger_and_go_on_into_samples(tmp_path):
    [group_id] = issue(ledger := open_ledger(tmp_path), 1)
    mixed = mix(finished(group_id), (term("judge", weight=0.1), Scripted(0.125, 1 / 3)))
    ledger.finish(mixed)
    [loaded] = ledger.load([group_id])
    assert loaded == mixed
    samples = to_samples([loaded])
    assert [s.reward_components for s in samples] == [{"env": 0.0, "judge": 0.125}, {"env": 1.0, "judge": 1 / 3}]
    assert [s.reward for s in samples] == [0.1 * 0.125, 1.0 + 0.1 * (1 / 3)]
    ledger.close()


def test_a_sample_with_a_score_that_is_not_finite_is_refused():
    bad = Trajectory(**{**vars(trajectory(1.0)), "reward_components": {"env": 1.0, "judge": math.nan}})
    with pytest.raises(DataError, match="the judge is nan; it must be finite"):
        to_samples([TrajectoryGroup("g", "p", (bad,))])
