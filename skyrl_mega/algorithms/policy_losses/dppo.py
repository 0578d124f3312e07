"""Divergence proximal policy optimization: a trust region in probability, not in the ratio.

PPO's ratio is a poor measure of how far a policy has moved: 1e-4 -> 3e-4 is a ratio of 3 and next to nothing, 0.9 -> 0.6 a
ratio of 0.67 and a great deal. DPPO measures the divergence of the two distributions over {the sampled token, all others}, a
lower bound of that over the vocabulary that needs no more than the token's probability:

    TV = |p - q|            KL = q log(q / p) + (1 - q) log((1 - q) / (1 - p))

p the policy's, q the sampler's probability. A token is left out (its gradient is 0) when it lies outside the region and A would
push it further out: A > 0 and p > q, or A < 0 and p < q. Others have the importance-weighted policy gradient.

q is of the policy that *sampled* (`rollout_logprobs`), whatever `algorithm.old_logprobs` says: the paper finds that a trust
region around recomputed logprobs does not keep training stable (its section 5.2). So staleness and the engine's rounding are
inside the region too, and `algorithm.off_policy.stages` would count them twice.

Source: arXiv:2602.04879 equations 13 (TV) and 14 (KL).
"""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES, LossInputs, LossOutput
from skyrl_mega.algorithms.policy_losses.ratio import TokenRatios, clip_stats, masked, ratio_stats, require_range, token_ratios


@POLICY_LOSSES.register("dppo_tv", token_separable=True, against_sampler=True)
def dppo_tv(inputs: LossInputs, *, delta_low: float = 0.15, delta_high: float = 0.15, cap: float = 20.0) -> LossOutput:
    """-ratio A where |p - q| is at most delta (see the module), 0 where it is more and A pushes outwards.

    delta_high bounds p - q for A > 0, delta_low bounds q - p for A < 0. `cap` truncates the ratio (the gradient stays, as
    that of cap A logprob). Fractions count what was left out; `cap_fraction` what was truncated. delta = 0.15 as in recipes of
    SkyRL and others (`cap` as in the authors' code).
    """
    require_range("delta_low", delta_low, 0, 1)
    require_range("delta_high", delta_high, 0, 1)
    ratios = token_ratios(inputs, inputs.rollout_logprobs)
    with torch.no_grad():
        moved_T = _probability(inputs.logprobs, inputs) - _probability(inputs.rollout_logprobs, inputs)
        is_high_T, is_low_T = moved_T > delta_high, moved_T < -delta_low
    return _masked_surrogate(inputs, ratios, is_low_T, is_high_T, cap)


@POLICY_LOSSES.register("dppo_kl", token_separable=True, against_sampler=True)
def dppo_kl(inputs: LossInputs, *, delta_low: float = 0.05, delta_high: float = 0.05, cap: float = 20.0) -> LossOutput:
    """`dppo_tv` with KL(sampler || policy) of {the token, all others} at most delta (0.05, with `dppo_tv`'s 0.15 usual)."""
    require_range("delta_low", delta_low, 0)
    require_range("delta_high", delta_high, 0)
    ratios = token_ratios(inputs, inputs.rollout_logprobs)
    with torch.no_grad():
        p_T, q_T = _probability(inputs.logprobs, inputs), _probability(inputs.rollout_logprobs, inputs)
        tiny = 1e-8  # keeps log(0) out
        others_T = (1 - q_T) * ((1 - q_T + tiny) / (1 - p_T + tiny)).log()
        kl_T = others_T - q_T * ratios.log_ratio_T
        is_high_T, is_low_T = (kl_T > delta_high) & (p_T > q_T), (kl_T > delta_low) & (p_T < q_T)
    return _masked_surrogate(inputs, ratios, is_low_T, is_high_T, cap)


def _probability(logprobs_T: torch.Tensor, inputs: LossInputs) -> torch.Tensor:
    """[T]; at most 1, where rounding would make a logprob positive."""
    return masked(logprobs_T.detach(), inputs.loss_mask).clamp(max=0.0).exp()


def _masked_surrogate(
    inputs: LossInputs, ratios: TokenRatios, is_low_T: torch.Tensor, is_high_T: torch.Tensor, cap: float
) -> LossOutput:
    """-min(ratio, cap) A as a value, with the gradient min(ratio, cap) A of logprobs; 0 where A pushes out of the region."""
    require_range("cap", cap, 1)
    mask_T, advantages_T = inputs.loss_mask, ratios.advantages_T
    with torch.no_grad():
        is_low_T, is_high_T = is_low_T & (advantages_T < 0) & mask_T, is_high_T & (advantages_T > 0) & mask_T
        weights_T = torch.where(is_low_T | is_high_T, 0.0, ratios.ratio_T.clamp(max=cap) * advantages_T)
        stats = ratio_stats(ratios, mask_T) | clip_stats(is_low_T, is_high_T, weights_T.dtype)
        stats["cap_fraction"] = (mask_T & (ratios.ratio_T > cap)).to(weights_T.dtype)
    logprobs_T = masked(inputs.logprobs, mask_T)
    # Straight-through: truncating the ratio bounds the gradient's weight, and must not stop the gradient.
    return -weights_T * (1 + logprobs_T - logprobs_T.detach()), stats
