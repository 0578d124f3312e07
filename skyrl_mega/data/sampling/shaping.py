"""Rewards as advantages see them, one per trajectory:

    scale x clip(raw reward, low, high) + shift - penalty x overlength

The *overlength* of a response says how far it has come into the last `penalty_tokens` before its limit. With |y| sampled tokens,
L_max = `rollout.max_new_tokens` and L_cache = `penalty_tokens` it is 0 up to L_max - L_cache, then grows linearly to 1 at L_max:
the soft overlong punishment of DAPO (arXiv:2503.14476, equation 13), whose R_length is minus this. A turn that a limit ended has
an overlength of 1, also where the context was full before L_max; a trajectory of several turns has that of its worst one.

Where rewards are looked at turn by turn, each turn's is scaled; clipping, shift and penalty fall on the last turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from skyrl_mega.config.schema import RewardShapingConfig, SamplingConfig
from skyrl_mega.types import Metrics, StopReason, TrainSample, Trajectory, TrajectoryGroup


def shape_rewards(
    samples: Sequence[TrainSample], groups: Sequence[TrajectoryGroup], config: SamplingConfig, *, max_new_tokens: int
) -> Metrics:
    """Sets `reward`, `turns` and `baseline_reward` of the samples to shaped ones; `groups`, whose samples they are, keep the raw.

    Returns numbers of the step without its replayed groups: `reward/shaped_mean`; with bounds `sampling/clipped_share`, of
    trajectories; with a penalty `sampling/overlong_penalty_mean`, what it took off on average, and
    `sampling/overlong_penalized_share`.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    shaping, overlong = config.reward, config.overlong
    shaped, clipped, penalties = [], [], []
    for sample, trajectory in zip(samples, trajectories, strict=True):
        penalty = overlong.penalty * overlength(trajectory, max_new_tokens, overlong.penalty_tokens)
        sample.reward = _shaped(trajectory.reward, shaping) - penalty
        sample.turns = tuple((start, end, shaping.scale * reward) for start, end, reward in sample.turns)
        if sample.baseline_reward is not None:
            sample.baseline_reward = _shaped(sample.baseline_reward, shaping)
        if not sample.is_replayed:
            shaped.append(sample.reward)
            clipped.append(clip(trajectory.reward, shaping) != trajectory.reward)
            penalties.append(penalty)
    count = max(1, len(shaped))
    metrics = {"reward/shaped_mean": sum(shaped) / count}
    if shaping.clip:
        metrics["sampling/clipped_share"] = sum(clipped) / count
    if overlong.penalty_tokens:
        metrics["sampling/overlong_penalty_mean"] = sum(penalties) / count
        metrics["sampling/overlong_penalized_share"] = sum(penalty > 0 for penalty in penalties) / count
    return metrics


def _shaped(reward: float, config: RewardShapingConfig) -> float:
    return config.scale * clip(reward, config) + config.shift


def clip(reward: float, config: RewardShapingConfig) -> float:
    """The reward within `config.clip`, or as it is where there are no bounds."""
    if not config.clip:
        return reward
    low, high = config.clip
    return min(max(reward, low), high)


def overlength(trajectory: Trajectory, max_new_tokens: int, penalty_tokens: int) -> float:
    """How far the trajectory's worst turn came into its last `penalty_tokens`, from 0 to 1; 0 where there are none."""
    if penalty_tokens == 0:
        return 0.0
    return max(
        1.0
        if turn.stop_reason is StopReason.LENGTH
        else min(max((turn.end - turn.start - (max_new_tokens - penalty_tokens)) / penalty_tokens, 0.0), 1.0)
        for turn in trajectory.turns
    )
