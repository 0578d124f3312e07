"""What a step's trajectories say about themselves: rewards, lengths, how they ended, and the environment's own numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from skyrl_mega.errors import DataError
from skyrl_mega.types import Metrics, StopReason, TrajectoryGroup


def rollout_metrics(groups: Sequence[TrajectoryGroup]) -> Metrics:
    """Means over trajectories (over groups and turns where the name says so), without those of replayed groups.

    `reward/std` is over all trajectories (population). `group/zero_variance_fraction`: groups whose rewards are all equal,
    which teach GRPO nothing. `response/tokens_*`: sampled tokens of a trajectory; `response/length_stop_fraction`: turns that
    hit a length limit. `response/truncated_fraction`: episodes that a limit ended. `env/<name>`: the environment's metrics; a
    trajectory that never reported a name counts as 0. `reward/<name>_mean`: the scores that a mixed reward is made of,
    unweighted (`env`: the environment's); `reward/baseline_mean`: of the greedy answers, where there are any. Raises DataError if
    there is no trajectory.
    """
    groups = [group for group in groups if not group.is_replayed]
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    if not trajectories:
        raise DataError("there is no trajectory to take metrics of.")
    rewards = np.array([t.reward for t in trajectories], dtype=np.float64)
    tokens = np.array([sum(t.loss_mask) for t in trajectories], dtype=np.float64)
    turns = [turn for t in trajectories for turn in t.turns]
    constant = [len({t.reward for t in group.trajectories}) == 1 for group in groups]
    metrics: Metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/max": float(rewards.max()),
        "group/zero_variance_fraction": float(np.mean(constant)),
        "response/tokens_mean": float(tokens.mean()),
        "response/tokens_p95": float(np.percentile(tokens, 95)),
        "response/tokens_max": float(tokens.max()),
        "response/turns_mean": len(turns) / len(trajectories),
        "response/length_stop_fraction": sum(turn.stop_reason is StopReason.LENGTH for turn in turns) / max(1, len(turns)),
        "response/truncated_fraction": sum(t.truncated for t in trajectories) / len(trajectories),
    }
    for name in sorted({name for t in trajectories for name in t.reward_components}):
        scores = [t.reward_components[name] for t in trajectories if name in t.reward_components]
        metrics[f"reward/{name}_mean"] = sum(scores) / len(scores)
    baselines = [group.baseline_reward for group in groups if group.baseline_reward is not None]
    if baselines:
        metrics["reward/baseline_mean"] = float(np.mean(baselines))
    for name in sorted({name for t in trajectories for name in t.metrics}):
        metrics[f"env/{name}"] = sum(t.metrics.get(name, 0.0) for t in trajectories) / len(trajectories)
    return metrics
