"""Losses of preference learning: which of two answers is better, or whether one is good. Pure functions of numbers per answer.

With log-ratios r_w, r_l of the better and the other answer's log-probability under policy and reference, d = r_w - r_l, and s the
logistic function:

| loss | of a row | source |
|---|---|---|
| `sigmoid` | -(1 - e) log s(beta d) - e log s(-beta d), e = label_smoothing | DPO, arXiv:2305.18290 eq. 7 |
| `robust` | (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e) | arXiv:2403.00409 |
| `ipo` | (d - 1 / (2 beta))^2 | arXiv:2310.12036 eq. 17 |
| `hinge` | max(0, 1 - beta d) | SLiC as in RSO, arXiv:2309.06657 |
| `simpo` | -log s(beta (l_w - l_l) - margin), l: mean log-probability per token, no reference | arXiv:2405.14734 eq. 6 |
| `orpo` | -l_w - beta log s(log odds_w - log odds_l), odds = p / (1 - p), p = exp(l) | arXiv:2403.07691 eq. 6 |
| `kto` | good: w (1 - s(beta (r - z))), bad: w (1 - s(beta (z - r))), z: batch's KL estimate | arXiv:2402.01306 eq. 8 |

Shape letters: A answers, R rows (pairs, or single answers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn.functional import logsigmoid

from skyrl_mega.algorithms.preference.answers import Answers
from skyrl_mega.config.offline_schema import PreferenceConfig
from skyrl_mega.errors import DataError
from skyrl_mega.types import Metrics

#: Losses of log-probabilities alone.
WITHOUT_REFERENCE = frozenset({"simpo", "orpo"})
#: Losses of the mean over tokens, unless `length_normalised` says otherwise (for the first two it can't).
NORMALISED = frozenset({"simpo", "orpo", "ipo"})
#: Losses of single answers.
UNPAIRED = frozenset({"kto"})

Sums = dict[str, torch.Tensor]


def needs_reference(settings: PreferenceConfig) -> bool:
    return settings.loss not in WITHOUT_REFERENCE


def is_normalised(settings: PreferenceConfig) -> bool:
    """Whether an answer's log-probability is the mean over its tokens."""
    if settings.length_normalised == "auto" or settings.loss in WITHOUT_REFERENCE:
        return settings.loss in NORMALISED
    return settings.length_normalised == "on"


def preference_loss(settings: PreferenceConfig, answers: Answers, *, kl_baseline: float = 0.0) -> tuple[torch.Tensor, Sums]:
    """(loss [R] with gradient, detached sums of statistics) of a micro-batch's rows.

    The sums add up over micro-batches and ranks; `preference_metrics` makes what is reported of them. `kl_baseline` is z of kto.
    Raises DataError where the reference's log-probabilities are missing.
    """
    if needs_reference(settings) and answers.ref_sums is None:
        raise DataError(f"`preference.loss={settings.loss}` needs the reference's log-probabilities of the batch.")
    length_A = answers.tokens.clamp(min=1) if is_normalised(settings) else torch.ones_like(answers.tokens)
    logprobs_A = answers.sums / length_A
    ref_A = torch.zeros_like(logprobs_A) if answers.ref_sums is None else answers.ref_sums / length_A
    ratios_A = logprobs_A - ref_A if needs_reference(settings) else logprobs_A
    nll_A = -answers.sums / answers.tokens.clamp(min=1)
    if settings.loss in UNPAIRED:
        loss_R, sums = _kto(settings, ratios_A, answers.targets, kl_baseline)
        is_good_R = answers.targets > 0.5
        nll_R = torch.where(is_good_R, nll_A, 0.0)
        logps = {"chosen": logprobs_A[is_good_R], "rejected": logprobs_A[~is_good_R]}
    else:
        if settings.loss == "orpo":
            odds_A = logprobs_A - _log1mexp(logprobs_A)
            loss_R = -settings.beta * logsigmoid(odds_A[0::2] - odds_A[1::2])
        else:
            loss_R = _PAIRED[settings.loss](settings, ratios_A[0::2] - ratios_A[1::2])
        sums = _pair_sums(settings.beta * ratios_A.detach())
        nll_R = nll_A[0::2]
        logps = {"chosen": logprobs_A[0::2], "rejected": logprobs_A[1::2]}
    sums |= {f"logps/{name}": values.detach().sum() for name, values in logps.items()}
    sums["loss/preference"] = loss_R.detach().sum()
    sft_coef = 1.0 if settings.loss == "orpo" else settings.sft_coef
    if sft_coef > 0:
        sums["loss/sft"] = sft_coef * nll_R.detach().sum()
        loss_R = loss_R + sft_coef * nll_R
    sums["loss/total"] = loss_R.detach().sum()
    sums["count/rows"] = loss_R.new_tensor(float(len(loss_R)))
    return loss_R, sums


def preference_metrics(sums: Mapping[str, float]) -> Metrics:
    """Means per row, and per good and bad answer, from the sums of a whole batch; names as TRL has them."""
    rows = max(sums["count/rows"], 1.0)
    counts = {"chosen": sums.get("count/chosen", rows), "rejected": sums.get("count/rejected", rows)}
    metrics = {}
    for name, value in sums.items():
        if not name.startswith("count/"):
            metrics[name] = value / max(counts.get(name.rpartition("/")[2], rows), 1.0)
    if "rewards/margins" not in metrics:
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


def _sigmoid(settings: PreferenceConfig, difference_R: torch.Tensor) -> torch.Tensor:
    e, logits_R = settings.label_smoothing, settings.beta * difference_R
    return -(1 - e) * logsigmoid(logits_R) - e * logsigmoid(-logits_R)


def _robust(settings: PreferenceConfig, difference_R: torch.Tensor) -> torch.Tensor:
    e, logits_R = settings.label_smoothing, settings.beta * difference_R
    return (-(1 - e) * logsigmoid(logits_R) + e * logsigmoid(-logits_R)) / (1 - 2 * e)


def _ipo(settings: PreferenceConfig, difference_R: torch.Tensor) -> torch.Tensor:
    return (difference_R - 1 / (2 * settings.beta)) ** 2


def _hinge(settings: PreferenceConfig, difference_R: torch.Tensor) -> torch.Tensor:
    return torch.relu(1 - settings.beta * difference_R)


def _simpo(settings: PreferenceConfig, difference_R: torch.Tensor) -> torch.Tensor:
    return -logsigmoid(settings.beta * difference_R - settings.margin)


_PAIRED = {"sigmoid": _sigmoid, "robust": _robust, "ipo": _ipo, "hinge": _hinge, "simpo": _simpo}


def _kto(
    settings: PreferenceConfig, ratios_A: torch.Tensor, targets_A: torch.Tensor, kl_baseline: float
) -> tuple[torch.Tensor, Sums]:
    is_good_A = targets_A > 0.5
    sign_A = torch.where(is_good_A, 1.0, -1.0).to(ratios_A.dtype)
    weight_A = torch.where(is_good_A, settings.desirable_weight, settings.undesirable_weight).to(ratios_A.dtype)
    loss_A = weight_A * (1 - torch.sigmoid(settings.beta * sign_A * (ratios_A - kl_baseline)))
    rewards_A = settings.beta * ratios_A.detach()
    is_right_A = ((rewards_A > settings.beta * kl_baseline) == is_good_A).to(rewards_A.dtype)
    sums = {
        "rewards/chosen": rewards_A[is_good_A].sum(),
        "rewards/rejected": rewards_A[~is_good_A].sum(),
        "rewards/accuracies": is_right_A.sum(),
        "count/chosen": is_good_A.to(rewards_A.dtype).sum(),
        "count/rejected": (~is_good_A).to(rewards_A.dtype).sum(),
    }
    return loss_A, sums


def _pair_sums(rewards_A: torch.Tensor) -> Sums:
    better_R, worse_R = rewards_A[0::2], rewards_A[1::2]
    return {
        "rewards/chosen": better_R.sum(),
        "rewards/rejected": worse_R.sum(),
        "rewards/margins": (better_R - worse_R).sum(),
        "rewards/accuracies": (better_R > worse_R).to(rewards_A.dtype).sum(),
    }


def _log1mexp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(values)) for values < 0, without cancellation on either side of -log 2 (Maechler 2012)."""
    values = values.clamp(max=-torch.finfo(values.dtype).eps)
    is_near_0 = values > -math.log(2)
    near = torch.log(-torch.expm1(torch.where(is_near_0, values, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(is_near_0, -1.0, values)))
    return torch.where(is_near_0, near, far)
