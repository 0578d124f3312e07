"""Maximum-likelihood RL: rewards normalised by their group's mean, so that hard prompts count for more."""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.advantages.groups import Groups
from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages
from skyrl_mega.errors import DataError


@ADVANTAGES.register("maxrl", groups=True)
def maxrl(inputs: AdvantageInputs) -> Advantages:
    """Rewards centred on their group's mean and divided by it, at every token of the sample.

    advantage_i = (r_i - mean(group)) / mean(group); 0 where no sample of the group has a reward, and for a group of one. With
    rewards of 0 and 1, the expected gradient is that of the log-likelihood of success with its series cut off: the sum of
    (gradient of pass@k) / k for k below the group's size. Other rewards are taken as they are; the paper covers 0 and 1 only.

    Raises DataError for a negative reward: the mean would be no success rate, and might be 0 or change the sign.
    Source: arXiv:2602.02710, Algorithm 1.
    """
    rewards_N = inputs.rewards_N
    if bool((rewards_N < 0).any()):
        raise DataError(
            f"algorithm.advantage=maxrl divides by a prompt's mean reward, so rewards must be 0 or more; the lowest is "
            f"{float(rewards_N.min()):g}. Let the environment's rewards lie in [0, 1], or choose grpo."
        )
    groups = Groups.of(inputs.group_index_N)
    mean_N = groups.spread(groups.mean(rewards_N))
    return Advantages(inputs.spread(torch.where(mean_N > 0, groups.centred(rewards_N) / mean_N, 0.0)))
