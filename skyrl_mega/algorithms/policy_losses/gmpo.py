"""Geometric-mean policy optimization."""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES, LossInputs, LossOutput
from skyrl_mega.algorithms.policy_losses.ratio import (
    clip_stats,
    masked,
    ratio_stats,
    require_range,
    token_ratios,
    whole_sequences,
)


@POLICY_LOSSES.register("gmpo")
def gmpo(inputs: LossInputs, *, clip_low: float = 0.4, clip_high: float = 0.4) -> LossOutput:
    """-A g at every token of a response, g the geometric mean of its clipped token ratios.

    g = exp(mean over the response's tokens of min(log ratio, clip_high) where A > 0, max(log ratio, -clip_low) where A < 0):
    each token is clipped for itself, in log space, and only towards what A asks for; then the mean is taken. The bounds are
    e^0.4 and e^-0.4, wider than PPO's, because a geometric mean hardly feels a single large ratio. A clipped token has no
    gradient, the others of its response keep theirs (unlike `gspo`, which drops the response).

    `algorithm.reduction=sequence_mean` gives the paper's objective. Advantages are meant to be one per response; tokens with
    A = 0 count as ratio 1. Statistics: `ratio` is the token's own; clip fractions count tokens.

    Source: arXiv:2507.20673.
    """
    require_range("clip_low", clip_low, 0)
    require_range("clip_high", clip_high, 0)
    mask_T, sequences = inputs.loss_mask, whole_sequences(inputs)
    ratios = token_ratios(inputs)
    log_ratio_T, _, advantages_T = ratios
    is_positive_T, is_negative_T = advantages_T > 0, advantages_T < 0
    towards_T = torch.where(is_positive_T, log_ratio_T.clamp(max=clip_high), log_ratio_T.clamp(min=-clip_low))
    clipped_T = torch.where(is_positive_T | is_negative_T, towards_T, 0.0)
    g_T = sequences.spread(sequences.mean(clipped_T, mask_T)).exp()
    with torch.no_grad():
        is_low_T = is_negative_T & (log_ratio_T < -clip_low)
        is_high_T = is_positive_T & (log_ratio_T > clip_high)
        stats = ratio_stats(ratios, mask_T) | clip_stats(is_low_T, is_high_T, g_T.dtype)
        stats["geometric_mean_ratio"] = masked(g_T, mask_T)
    return -g_T * advantages_T, stats
