"""Which samples of a step are trained, once advantages are known.

Two filters. Both leave a sample out altogether: it costs no compute, has no loss of any kind (policy, KL, entropy, value), and
counts in none of the loss's averages. Both keep it in what was computed before: its group's mean and spread of rewards.

- `sampling.overlong.filter` leaves out what a limit cut off. A truncated answer says little of whether its reasoning was good,
  and punishing it teaches brevity by accident: DAPO (arXiv:2503.14476, section 3.4) masks its loss. An empty loss mask and no
  sample at all are the same thing to a loss that is a sum over tokens, and the second needs no special case further on.
- `sampling.zero_variance=drop` leaves groups out none of whose tokens has an advantage. They cost no policy gradient anyway; what
  changes is that the others' averages are taken without them (and that KL and entropy terms no longer see them).
"""

from __future__ import annotations

from collections.abc import Sequence

from skyrl_mega.config.schema import SamplingConfig
from skyrl_mega.types import Metrics, StopReason, TrainSample, Trajectory, TrajectoryGroup


def is_cut_off(trajectory: Trajectory) -> bool:
    """Whether a limit ended the trajectory: on tokens, on turns, or one of the environment's own."""
    return trajectory.truncated or trajectory.turns[-1].stop_reason is StopReason.LENGTH


def select_trained(
    updates: Sequence[Sequence[TrainSample]], groups: Sequence[TrajectoryGroup], config: SamplingConfig
) -> tuple[list[list[TrainSample]], Metrics]:
    """(the samples of each update that are trained, in order; numbers of the step).

    `updates` hold all samples of `groups`, with advantages. `sampling/overlong_filtered_share` of samples,
    `sampling/zero_variance_dropped_share` of groups; each where its filter is on.
    """
    samples = [sample for update in updates for sample in update]
    left_out, metrics = set[int](), Metrics()
    if config.overlong.filter:
        trajectories = [trajectory for group in groups for trajectory in group.trajectories]
        cut_off = {sample.sample_index for sample in samples if is_cut_off(trajectories[sample.sample_index])}
        left_out |= cut_off
        metrics["sampling/overlong_filtered_share"] = len(cut_off) / max(1, len(samples))
    if config.zero_variance == "drop":
        signal = {s.group_index for s in samples if s.advantages is not None and bool(s.advantages.any())}
        left_out |= {sample.sample_index for sample in samples if sample.group_index not in signal}
        metrics["sampling/zero_variance_dropped_share"] = 1.0 - len(signal) / max(1, len(groups))
    return [[sample for sample in update if sample.sample_index not in left_out] for update in updates], metrics
