"""CISPO: clip the importance weight, not the update."""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES, LossInputs, LossOutput
from skyrl_mega.algorithms.policy_losses.ratio import clip_stats, masked, ratio_stats, require_range, token_ratios


@POLICY_LOSSES.register("cispo", token_separable=True)
def cispo(inputs: LossInputs, *, clip_low: float = 1.0, clip_high: float = 4.0) -> LossOutput:
    """-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) A logprob: REINFORCE with a bounded weight.

    PPO's clipping drops a token whose ratio has moved far, and with it the rare words that turn a chain of thought; here every
    token keeps a gradient, and only its weight is bounded. Good for stale data and many updates per step. Fractions count
    tokens whose weight was bounded. The loss's value has no meaning of its own (watch the reward).

    The paper leaves the lower bound out (clip_low = 1: a bound of 0) and does not print the upper one; a bound of 5 is that of
    ScaleRL (arXiv:2510.13786) and the one TRL's documentation names.

    Source: MiniMax-M1, arXiv:2506.13585.
    """
    require_range("clip_low", clip_low, 0, 1)
    require_range("clip_high", clip_high, 0)
    ratios = token_ratios(inputs)
    ratio_T = ratios.ratio_T.detach()
    weights_T = ratio_T.clamp(1 - clip_low, 1 + clip_high) * ratios.advantages_T
    with torch.no_grad():
        is_low_T, is_high_T = inputs.loss_mask & (ratio_T < 1 - clip_low), inputs.loss_mask & (ratio_T > 1 + clip_high)
        stats = ratio_stats(ratios, inputs.loss_mask) | clip_stats(is_low_T, is_high_T, ratio_T.dtype)
    return -weights_T * masked(inputs.logprobs, inputs.loss_mask), stats
