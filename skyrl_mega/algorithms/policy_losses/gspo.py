"""Group sequence policy optimization: one ratio for a whole response.

The reward is given to a response, so the importance weight is taken of a response: its likelihood ratio to the power 1 / length,

    s_i = (policy(y_i) / old(y_i))^(1/|y_i|) = exp(mean over the response's tokens of logprob - old_logprob)

the geometric mean of the tokens' ratios. It is near 1 and steady where single ratios jump (long responses, mixtures of experts),
and clipping takes or leaves a response as a whole. Its bounds are a thousand times narrower than PPO's.
"""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES, LossInputs, LossOutput
from skyrl_mega.algorithms.policy_losses.ratio import (
    TokenRatios,
    clip_stats,
    ratio_stats,
    require_range,
    token_ratios,
    whole_sequences,
)


@POLICY_LOSSES.register("gspo")
def gspo(inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> LossOutput:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) at every token of a response, s its sequence ratio (see the module).

    `algorithm.reduction=sequence_mean` gives the paper's objective; other reductions weigh long responses more. A response's
    advantages should be equal at all its tokens (else: `gspo_token`); a token's part of the gradient is
    -A s / |y| times that of the sum of the response's logprobs. A response far from the old policy (staleness) is left out as a
    whole. Statistics: `ratio` is s; the clip fractions count tokens of clipped responses.

    Source: arXiv:2507.18071 equation 5 and its experiments' bounds. Sums go over the whole response on all
    context-parallel ranks.
    """
    return _clipped(inputs, is_token_level=False, clip_low=clip_low, clip_high=clip_high)


@POLICY_LOSSES.register("gspo_token")
def gspo_token(inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> LossOutput:
    """`gspo` with s_t = sg(s) policy_t / sg(policy_t) in s's place: equal to s as a number, with token t's own gradient.

    The same loss and gradient as `gspo` where a response's advantages are equal, and right where they are not (rewards of
    turns, critics, token-level penalties).

    Source: arXiv:2507.18071, GSPO-token.
    """
    return _clipped(inputs, is_token_level=True, clip_low=clip_low, clip_high=clip_high)


def _clipped(inputs: LossInputs, *, is_token_level: bool, clip_low: float, clip_high: float) -> LossOutput:
    require_range("clip_low", clip_low, 0, 1)
    require_range("clip_high", clip_high, 0)
    mask_T, sequences = inputs.loss_mask, whole_sequences(inputs)
    ratios = token_ratios(inputs)
    log_s_T = sequences.spread(sequences.mean(ratios.log_ratio_T, mask_T))
    if is_token_level:
        # Straight-through: the value of log s, the gradient of the token's own logprob.
        log_s_T = log_s_T.detach() + ratios.log_ratio_T - ratios.log_ratio_T.detach()
    s_T = log_s_T.exp()
    advantages_T = ratios.advantages_T
    per_token_loss_T = -torch.minimum(s_T * advantages_T, s_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T)
    with torch.no_grad():
        is_low_T = (advantages_T < 0) & (s_T < 1 - clip_low)
        is_high_T = (advantages_T > 0) & (s_T > 1 + clip_high)
        stats = ratio_stats(TokenRatios(ratios.log_ratio_T, s_T, advantages_T), mask_T)
    return per_token_loss_T, stats | clip_stats(is_low_T, is_high_T, s_T.dtype)
