"""REINFORCE with the mean of a prompt's other samples as the baseline."""

from __future__ import annotations

from skyrl_mega.algorithms.advantages.groups import Groups
from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages


@ADVANTAGES.register("rloo", groups=True)
def rloo(inputs: AdvantageInputs) -> Advantages:
    """Each reward less the mean of the group's other rewards, at every token of the sample.

    advantage_i = r_i - mean_{j != i} r_j = n / (n - 1) (r_i - mean(group)). The baseline knows nothing of the sample itself, so
    the gradient is unbiased, and the reward's scale is kept. A group of one has no baseline and gives 0.

    Source: arXiv:2402.14740 (REINFORCE Leave-One-Out).
    """
    groups = Groups.of(inputs.group_index_N)
    sizes_G = groups.sizes(inputs.rewards_N)
    factor_N = groups.spread(sizes_G / (sizes_G - 1).clamp(min=1))
    return Advantages(inputs.spread(factor_N * groups.centred(inputs.rewards_N)))
