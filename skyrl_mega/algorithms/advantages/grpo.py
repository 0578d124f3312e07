"""Group-relative advantages: GRPO, Dr. GRPO without its division, and GPG, which makes up for groups without a signal."""

from __future__ import annotations

from skyrl_mega.algorithms.advantages.groups import Groups
from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages


@ADVANTAGES.register("grpo", groups=True)
def grpo(inputs: AdvantageInputs, *, normalize_by_std: bool = True, eps: float = 1e-6) -> Advantages:
    """Rewards centred on their group's mean and divided by its standard deviation, at every token of the sample.

    advantage_i = (r_i - mean(group)) / (std(group) + eps), with the unbiased standard deviation (divisor n - 1).
    `normalize_by_std=False` leaves the division out. Groups of one, and groups whose rewards are all equal, give exactly 0.

    Source: GRPO, arXiv:2402.03300 section 4.1.2; without the division Dr. GRPO, arXiv:2503.20783.
    """
    groups = Groups.of(inputs.group_index_N)
    return Advantages(inputs.spread(groups.normalized(inputs.rewards_N, by_std=normalize_by_std, eps=eps)))


@ADVANTAGES.register("dr_grpo", groups=True)
def dr_grpo(inputs: AdvantageInputs) -> Advantages:
    """GRPO without the division: advantage_i = r_i - mean(group). Pair it with `algorithm.reduction=sequence_sum_norm`.

    Source: arXiv:2503.20783 section 3.2.
    """
    return grpo(inputs, normalize_by_std=False)


@ADVANTAGES.register("gpg", groups=True)
def gpg(inputs: AdvantageInputs, *, normalize_by_std: bool = False, eps: float = 1e-6) -> Advantages:
    """Dr. GRPO's advantages times N / (N - M): M of the step's N samples are in groups whose rewards are all equal.

    Such samples have no gradient and still count in the average; the factor takes them out of it again. With
    `sampling.zero_variance=drop` or dynamic sampling they are not there, and it is 1. `normalize_by_std` is the paper's F_norm.

    Source: GPG, arXiv:2504.02546, equations 6 and 7.
    """
    groups = Groups.of(inputs.group_index_N)
    advantages_N = groups.normalized(inputs.rewards_N, by_std=normalize_by_std, eps=eps)
    has_signal_N = groups.spread(groups.std(inputs.rewards_N)) > 0
    factor = len(has_signal_N) / has_signal_N.sum().clamp(min=1)
    return Advantages(inputs.spread(factor * advantages_N))
