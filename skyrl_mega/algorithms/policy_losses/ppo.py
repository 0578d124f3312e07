"""PPO's clipped surrogate, and its dual clip."""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES, LossInputs, LossOutput
from skyrl_mega.algorithms.policy_losses.ratio import clip_stats, ratio_stats, require_range, token_ratios


@POLICY_LOSSES.register("ppo_clip", token_separable=True)
def ppo_clip(inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.28) -> LossOutput:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) per token, and its statistics.

    ratio = exp(logprobs - old_logprobs). The gradient is 0 where clipping bites: A > 0 with ratio > 1 + clip_high (counted
    by `clip_high_fraction`) and A < 0 with ratio < 1 - clip_low (`clip_low_fraction`). `approx_kl` is k3 of KL(old || new).
    Stale tokens with A < 0 and a large ratio keep an unbounded gradient: `dual_clip` bounds it.

    Source: PPO, arXiv:1707.06347 equation 7; separate bounds from DAPO, arXiv:2503.14476 equation 10.
    """
    require_range("clip_low", clip_low, 0, 1)
    require_range("clip_high", clip_high, 0)
    ratios = token_ratios(inputs)
    _, ratio_T, advantages_T = ratios
    per_token_loss_T = -torch.minimum(ratio_T * advantages_T, ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T)
    with torch.no_grad():
        is_low_T = (advantages_T < 0) & (ratio_T < 1 - clip_low)
        is_high_T = (advantages_T > 0) & (ratio_T > 1 + clip_high)
        stats = ratio_stats(ratios, inputs.loss_mask) | clip_stats(is_low_T, is_high_T, ratio_T.dtype)
    return per_token_loss_T, stats


@POLICY_LOSSES.register("dual_clip", token_separable=True)
def dual_clip(inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.28, cap: float = 3.0) -> LossOutput:
    """`ppo_clip`, and where A < 0 at most -cap A: max(min(ratio A, clip(ratio) A), cap A), negated.

    PPO leaves a token with A < 0 without an upper bound: a ratio of 50 gives 50 times the gradient. Here the gradient is 0 from
    ratio > cap on (`dual_clip_fraction`). For stale data, where such ratios happen.

    Source: dual-clip PPO, arXiv:1912.09729 (c = 3).
    """
    require_range("cap", cap, 1, open_low=True)
    clipped_T, stats = ppo_clip(inputs, clip_low=clip_low, clip_high=clip_high)
    advantages_T = torch.where(inputs.loss_mask, inputs.advantages, 0.0)
    is_negative_T = advantages_T < 0
    bound_T = -cap * advantages_T
    per_token_loss_T = torch.where(is_negative_T, torch.minimum(clipped_T, bound_T), clipped_T)
    with torch.no_grad():
        stats["dual_clip_fraction"] = (is_negative_T & (clipped_T > bound_T)).to(clipped_T.dtype)
    return per_token_loss_T, stats
