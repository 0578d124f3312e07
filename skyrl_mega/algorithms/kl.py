"""Per-token estimators of KL(policy || reference) from tokens that the policy sampled.

With log r = ref_logprob - logprob at the sampled token (Schulman 2020, http://joschu.net/blog/kl-approx.html):

    k1 = -log r              k2 = (log r)^2 / 2              k3 = r - 1 - log r

What is right as a number is not what is right as a loss (arXiv:2506.09477). In expectation over the policy's own samples:

| estimator | value                                       | gradient when used as a loss term                       |
|-----------|---------------------------------------------|---------------------------------------------------------|
| k1        | unbiased; negative for single tokens        | zero: it pulls nowhere, it only adds noise              |
| k2        | biased, right to second order; never negative | exactly that of KL(policy || reference)               |
| k3        | unbiased; never negative, low variance      | that of KL(reference || policy), the other direction    |

All hold per token, given its prefix; the effect of a token on later prefixes is in no per-token loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from skyrl_mega.algorithms.log_ratio import masked_log_ratio

KLEstimator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def k1(logprobs_T: torch.Tensor, ref_logprobs_T: torch.Tensor, loss_mask_T: torch.Tensor) -> torch.Tensor:
    """logprob - ref_logprob per token, 0 where loss_mask is False."""
    return -masked_log_ratio(ref_logprobs_T, logprobs_T, loss_mask_T)


def k2(logprobs_T: torch.Tensor, ref_logprobs_T: torch.Tensor, loss_mask_T: torch.Tensor) -> torch.Tensor:
    """Half the squared log-ratio per token, 0 where loss_mask is False."""
    return masked_log_ratio(ref_logprobs_T, logprobs_T, loss_mask_T).square() / 2


def k3(logprobs_T: torch.Tensor, ref_logprobs_T: torch.Tensor, loss_mask_T: torch.Tensor) -> torch.Tensor:
    """ratio - 1 - log ratio per token, 0 where loss_mask is False. Never negative."""
    log_ratio_T = masked_log_ratio(ref_logprobs_T, logprobs_T, loss_mask_T)
    # expm1 keeps the second-order remainder that exp(x) - 1 would cancel away for nearly equal policies.
    return log_ratio_T.expm1() - log_ratio_T


#: `algorithm.kl.estimator` -> estimator.
KL_ESTIMATORS: dict[str, KLEstimator] = {"k1": k1, "k2": k2, "k3": k3}
