"""Generalised advantage estimation: what a critic expects against what came."""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages, require_range
from skyrl_mega_kernels.segmented_gae import segmented_gae


@ADVANTAGES.register("gae", needs=frozenset({"values"}))
def gae(inputs: AdvantageInputs, *, gamma: float = 1.0, lam: float = 0.95) -> Advantages:
    """Each trained token's advantage over the critic's values, and the returns that the critic is trained on.

    delta_t = reward_t + gamma value_{t+1} - value_t;  advantage_t = delta_t + gamma lam advantage_{t+1};
    return_t = advantage_t + value_t, where t + 1 is the next trained token: what the environment says in between is jumped over.
    A sample that a limit cut off (truncated) is continued by the critic's value of its last state; one that ended is worth
    nothing after its end. lam = 1: reward-to-go less value, no bias and most variance; lam = 0: one step ahead. Whitening, as
    PPO has it, is `algorithm.normalize_advantages`; it leaves the returns alone.

    Source: arXiv:1506.02438 equation 16.
    """
    require_range("gamma", gamma, 0, 1)
    require_range("lam", lam, 0, 1)
    assert inputs.values_T is not None  # `needs` asked for both
    assert inputs.last_values_N is not None
    advantages_T, returns_T = segmented_gae(
        inputs.token_rewards_T,
        inputs.values_T,
        inputs.cu_seqlens,
        gamma=gamma,
        lam=lam,
        loss_mask=inputs.loss_mask,
        bootstrap_values=torch.where(inputs.truncated_N, inputs.last_values_N, 0.0),
    )
    return Advantages(advantages_T, returns_T)
