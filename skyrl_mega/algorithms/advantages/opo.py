"""The baseline of least variance, if a sample's gradient has a square that grows with its length."""

from __future__ import annotations

from skyrl_mega.algorithms.advantages.groups import Groups
from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages


@ADVANTAGES.register("opo", groups=True)
def opo(inputs: AdvantageInputs) -> Advantages:
    """Each reward less the group's length-weighted mean reward, at every token of the sample.

    advantage_i = r_i - sum_j l_j r_j / sum_j l_j, l being the number of trained tokens. It weighs the samples as their gradients'
    squares would, where tokens' gradients are nearly orthogonal and of equal size. A group of one gives 0.

    Source: arXiv:2505.23585 (the optimal baseline, in its form for sequences).
    """
    groups = Groups.of(inputs.group_index_N)
    lengths_N = inputs.loss_tokens_N
    # From centred rewards, so that equal ones give exactly 0.
    centred_N = groups.centred(inputs.rewards_N)
    baseline_G = groups.sum(lengths_N * centred_N) / groups.sum(lengths_N).clamp(min=1)
    return Advantages(inputs.spread(centred_N - groups.spread(baseline_G)))
