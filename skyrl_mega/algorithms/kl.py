"""Per-token estimators of KL(policy || reference) from tokens that the policy sampled.

With log r = ref_logprob - logprob at the sampled token (Schulman 2020, http://joschu.net/blog/kl-approx.html):

    k1 = -log r        k2 = (log r)^2 / 2        k3 = r - 1 - log r        abs = |log r|

What is right as a number is not what is right as a loss (arXiv:2506.09477). In expectation over the policy's own samples:

| estimator | value                                         | gradient when used as a loss term                        |
|-----------|-----------------------------------------------|----------------------------------------------------------|
| k1        | unbiased; negative for single tokens          | zero: it pulls nowhere, it only adds noise               |
| k2        | biased, right to second order; never negative | exactly that of KL(policy || reference)                  |
| k3        | unbiased; never negative, low variance        | that of KL(reference || policy), the other direction     |
| abs       | biased: at least KL, of first order           | that of twice the total variation: every token pulls alike |
| k1+, k3+  | that of k1, k3                                | that of k2: exactly that of KL(policy || reference)      |

`k1+` and `k3+` are straight-through: the number that is unbiased, with the gradient that is. All hold per token, given its
prefix, and for tokens of the policy itself; the effect of a token on later prefixes is in no per-token loss. As part of the
reward (`kl.place=reward`) only the value counts.

The coefficient may follow a target (`next_kl_coef`): it grows while the policy is farther from the reference than that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from skyrl_mega.algorithms.log_ratio import masked_log_ratio

#: Of the distance's relative error, more than this counts as this (arXiv:1909.08593 section 2.2).
MAX_RELATIVE_ERROR = 0.2

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


def absolute(logprobs_T: torch.Tensor, ref_logprobs_T: torch.Tensor, loss_mask_T: torch.Tensor) -> torch.Tensor:
    """The size of the log-ratio per token, 0 where loss_mask is False."""
    return masked_log_ratio(ref_logprobs_T, logprobs_T, loss_mask_T).abs()


def with_k2_gradient(estimator: KLEstimator) -> KLEstimator:
    """The values of `estimator`, with the gradient of k2."""

    def straight_through(logprobs_T: torch.Tensor, ref_logprobs_T: torch.Tensor, loss_mask_T: torch.Tensor) -> torch.Tensor:
        slope_T = k2(logprobs_T, ref_logprobs_T, loss_mask_T)
        return estimator(logprobs_T, ref_logprobs_T, loss_mask_T).detach() + (slope_T - slope_T.detach())

    return straight_through


#: `algorithm.kl.estimator` -> estimator.
KL_ESTIMATORS: dict[str, KLEstimator] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": absolute,
    "k1+": with_k2_gradient(k1),
    "k3+": with_k2_gradient(k3),
}


def next_kl_coef(coef: float, kl: float, *, target: float, horizon: float, num_samples: int) -> float:
    """The coefficient after a step of `num_samples` samples whose mean distance per trained token was `kl`.

    coef x (1 + e num_samples / horizon) with e = clip(kl / target - 1, -0.2, 0.2): proportional control of log coef. A distance
    of 1.2 targets or more, kept up for `horizon` samples, multiplies the coefficient by about e^0.2.

    Source: Ziegler et al., arXiv:1909.08593 section 2.2; its K_beta is num_samples / horizon, as in the authors' code. Their
    distance is a sum over the tokens of a sample, not a mean.
    """
    error = min(max(kl / target - 1.0, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
    return coef * (1.0 + error * num_samples / horizon)
