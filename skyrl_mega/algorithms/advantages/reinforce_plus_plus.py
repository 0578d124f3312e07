"""REINFORCE++: returns normalised over the whole batch instead of within each prompt's group, without a critic."""

from __future__ import annotations

from skyrl_mega.algorithms.advantages.groups import Groups
from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages, require_range
from skyrl_mega.algorithms.advantages.whitening import whitened
from skyrl_mega_kernels.segmented_gae import segmented_returns


@ADVANTAGES.register("reinforce_plus_plus")
def reinforce_plus_plus(inputs: AdvantageInputs, *, gamma: float = 1.0) -> Advantages:
    """Each token's rewards-to-go, whitened over all trained tokens of the step.

    return_t = reward_t + gamma return_{t+1} over a sample's trained tokens. With `algorithm.kl.place=reward` the rewards hold
    -kl.coef x KL of each token, as in the paper (its estimator is k1). The baseline is the batch; one sample a prompt is enough.

    Source: arXiv:2501.03262 (global advantage normalisation).
    """
    require_range("gamma", gamma, 0, 1)
    returns_T = segmented_returns(inputs.token_rewards_T, inputs.cu_seqlens, gamma=gamma, loss_mask=inputs.loss_mask)
    return Advantages(whitened(returns_T, inputs.loss_mask))


@ADVANTAGES.register("reinforce_plus_plus_baseline", groups=True)
def reinforce_plus_plus_baseline(inputs: AdvantageInputs) -> Advantages:
    """Rewards centred on their group's mean, then whitened over all trained tokens of the step.

    The standard deviation is that of the batch, which is not biased towards prompts whose rewards hardly differ. A group of one
    has no baseline, and counts as centred (0) in the whitening. The paper pairs it with a KL term in the loss, estimator k2.

    Source: arXiv:2501.03262 (REINFORCE++ w/ baseline).
    """
    groups = Groups.of(inputs.group_index_N)
    return Advantages(whitened(inputs.spread(groups.centred(inputs.rewards_N)), inputs.loss_mask))
