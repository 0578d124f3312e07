"""From finished trajectories to the samples of one step, and from those to the samples of each update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from skyrl_mega.errors import DataError, RolloutError
from skyrl_mega.types import TrainSample, Trajectory, TrajectoryGroup


def to_samples(groups: Sequence[TrajectoryGroup]) -> list[TrainSample]:
    """One TrainSample per trajectory, in order, numbered 0..N-1; groups are numbered by their place in `groups`.

    Raises DataError for a trajectory that breaks the format of `types.Trajectory` or has nothing to train, RolloutError for
    log-probabilities that are not finite or are positive.
    """
    samples: list[TrainSample] = []
    seen: set[str] = set()
    for group_index, group in enumerate(groups):
        if group.group_id in seen:
            raise DataError(f"group {group.group_id!r} comes twice in one batch; a group is trained exactly once.")
        seen.add(group.group_id)
        if not group.trajectories:
            raise DataError(f"group {group.group_id!r} has no trajectory.")
        for number, trajectory in enumerate(group.trajectories):
            _check(trajectory, f"trajectory {number} of group {group.group_id!r}")
            samples.append(
                TrainSample(
                    sample_index=len(samples),
                    group_index=group_index,
                    group_id=group.group_id,
                    token_ids=torch.tensor(trajectory.token_ids, dtype=torch.int64),
                    loss_mask=torch.tensor(trajectory.loss_mask, dtype=torch.bool),
                    rollout_logprobs=torch.tensor(trajectory.rollout_logprobs, dtype=torch.float32),
                    reward=trajectory.reward,
                )
            )
    return samples


def _check(trajectory: Trajectory, name: str) -> None:
    length = len(trajectory.token_ids)
    entries = {
        "loss_mask": len(trajectory.loss_mask),
        "rollout_logprobs": len(trajectory.rollout_logprobs),
        "policy_versions": len(trajectory.policy_versions),
    }
    for column, count in entries.items():
        if count != length:
            raise DataError(f"{name}: {column} has {count} entries for {length} tokens; they must be equally many.")
    if any(mask not in (0, 1) for mask in trajectory.loss_mask):
        raise DataError(f"{name}: loss_mask must hold 0 and 1 only, but holds {sorted(set(trajectory.loss_mask))}.")
    if not any(trajectory.loss_mask):
        raise DataError(f"{name} has {length} tokens and none to train: at least one loss_mask entry must be 1.")
    if trajectory.loss_mask[0]:
        raise DataError(f"{name}: loss_mask[0] must be 0, since nothing precedes the first token that could predict it.")
    if not math.isfinite(trajectory.reward):
        raise DataError(f"{name}: the reward is {trajectory.reward}; it must be finite.")
    for t, (mask, logprob, version) in enumerate(
        zip(trajectory.loss_mask, trajectory.rollout_logprobs, trajectory.policy_versions, strict=True)
    ):
        if not math.isfinite(logprob) or logprob > 1e-3:
            raise RolloutError(f"{name}: rollout_logprobs[{t}] is {logprob}; a log-probability is finite and at most 0.")
        if (version >= 0) != bool(mask) or (not mask and logprob != 0.0):
            raise DataError(
                f"{name}: token {t} has loss_mask {mask}, policy_version {version} and rollout_logprob {logprob}; a sampled "
                "token has a version >= 0, any other has version -1 and logprob 0.0."
            )


def split_updates(samples: Sequence[TrainSample], updates: int) -> list[list[TrainSample]]:
    """The samples of each of `updates` optimizer updates: equal numbers of whole groups, in order.

    Raises DataError if the number of groups is not divisible by `updates`.
    """
    groups: dict[int, list[TrainSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_index, []).append(sample)
    if updates < 1 or len(groups) % updates:
        raise DataError(
            f"the number of groups ({len(groups)}) must be divisible by trainer.updates_per_step ({updates}); "
            f"set updates_per_step to a divisor of {len(groups)}."
        )
    per_update = len(groups) // updates
    in_order = list(groups.values())
    return [[s for group in in_order[u * per_update : (u + 1) * per_update] for s in group] for u in range(updates)]
