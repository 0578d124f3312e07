"""Log-ratios of two policies at the sampled tokens, safe to exponentiate and safe under a mask."""

from __future__ import annotations

import torch

#: exp(20) is 4.9e8: a ratio beyond it says only that the two policies have nothing to do with each other.
MAX_ABS_LOG_RATIO = 20.0


def masked_log_ratio(numerator_T: torch.Tensor, denominator_T: torch.Tensor, loss_mask_T: torch.Tensor) -> torch.Tensor:
    """log(numerator / denominator) per token from log-probabilities, within +-20; exactly 0 where loss_mask is False.

    Masked tokens send no gradient, whatever they hold (an infinity times a zero mask would be NaN). Outside +-20 the value
    is clipped and the gradient is 0: in float32 the exponential would soon overflow, and 0 * inf is NaN.
    """
    difference_T = torch.where(loss_mask_T, numerator_T - denominator_T, 0.0)
    return difference_T.clamp(-MAX_ABS_LOG_RATIO, MAX_ABS_LOG_RATIO)
