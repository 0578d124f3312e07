"""From finished trajectories to the samples of one step, and from those to the samples of each update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from skyrl_mega.errors import DataError, RolloutError
from skyrl_mega.types import TrainSample, Trajectory, TrajectoryGroup


def to_samples(groups: Sequence[TrajectoryGroup], *, policy_version: int | None = None) -> list[TrainSample]:
    """One TrainSample per trajectory, in order, numbered 0..N-1; groups are numbered by their place in `groups`.

    `policy_version`: of the policy that they will train, from which each token's staleness is counted (None: it is not known).
    Raises DataError for a trajectory that breaks the format of `types.Trajectory`, has nothing to train or was sampled by a later
    version, RolloutError for log-probabilities that are not finite or are positive.
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
                    turns=tuple((turn.start, turn.end, turn.reward) for turn in trajectory.turns),
                    truncated=trajectory.truncated,
                    is_replayed=group.is_replayed,
                    reward_components=dict(trajectory.reward_components),
                    baseline_reward=group.baseline_reward,
                    staleness=_staleness(trajectory, policy_version, group.group_id),
                    routed_experts=_routing(trajectory),
                )
            )
    return samples


def _staleness(trajectory: Trajectory, policy_version: int | None, group_id: str) -> torch.Tensor | None:
    """float32 [L]: how many versions ago each token was sampled, 0 where none was."""
    if policy_version is None:
        return None
    versions_L = torch.tensor(trajectory.policy_versions, dtype=torch.int64)
    newest = int(versions_L.max())
    if newest > policy_version:
        raise DataError(
            f"group {group_id!r} has a token of policy version {newest}, and the policy to be trained has version "
            f"{policy_version}; what is trained must have been sampled by it or by an earlier one."
        )
    return torch.where(versions_L >= 0, policy_version - versions_L, 0).float()


def _routing(trajectory: Trajectory) -> torch.Tensor | None:
    return None if trajectory.routed_experts is None else torch.tensor(trajectory.routed_experts, dtype=torch.int16)


def _check(trajectory: Trajectory, name: str) -> None:
    length = len(trajectory.token_ids)
    entries = {
        "loss_mask": len(trajectory.loss_mask),
        "rollout_logprobs": len(trajectory.rollout_logprobs),
        "policy_versions": len(trajectory.policy_versions),
    }
    if trajectory.routed_experts is not None:
        entries["routed_experts"] = len(trajectory.routed_experts)
    for column, count in entries.items():
        if count != length:
            raise DataError(f"{name}: {column} has {count} entries for {length} tokens; they must be equally many.")
    if any(mask not in (0, 1) for mask in trajectory.loss_mask):
        raise DataError(f"{name}: loss_mask must hold 0 and 1 only, but holds {sorted(set(trajectory.loss_mask))}.")
    if not any(trajectory.loss_mask):
        raise DataError(f"{name} has {length} tokens and none to train: at least one loss_mask entry must be 1.")
    if trajectory.loss_mask[0]:
        raise DataError(f"{name}: loss_mask[0] must be 0, since nothing precedes the first token that could predict it.")
    for what, value in {"reward": trajectory.reward, **trajectory.reward_components}.items():
        if not math.isfinite(value):
            raise DataError(f"{name}: the {what} is {value}; it must be finite.")
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
