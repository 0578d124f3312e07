"""Losses of reward models: a score per answer, from pairs or from labels. Pure functions of numbers per answer.

| loss | of a row | source |
|---|---|---|
| `bradley_terry` | -log s(r_w - r_l - margin) + centering_coef (r_w + r_l)^2 | arXiv:2307.09288 eq. 2, 2312.09244 |
| `regression` | (r - score)^2 | HelpSteer, arXiv:2311.09528 |

Shape letters: A answers, R rows (pairs, or single answers).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn.functional import logsigmoid

from skyrl_mega.algorithms.preference.answers import Answers
from skyrl_mega.config.offline_schema import RewardModelConfig
from skyrl_mega.types import Metrics


def reward_loss(settings: RewardModelConfig, answers: Answers) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss [R] with gradient, detached sums of statistics) of a micro-batch's rows; `answers.sums` are the scores.

    The margin of a pair stands at its first answer. The sums add up over micro-batches and ranks (`reward_metrics`).
    """
    if settings.loss == "regression":
        loss_R, sums = _regression(answers)
    else:
        loss_R, sums = _bradley_terry(settings, answers)
    sums["loss/total"] = loss_R.detach().sum()
    sums["count/rows"] = loss_R.new_tensor(float(len(loss_R)))
    return loss_R, sums


def reward_metrics(sums: Mapping[str, float]) -> Metrics:
    """Means per row from the sums of a whole batch; of scores also their correlation with the labels (Pearson)."""
    rows = max(sums["count/rows"], 1.0)
    means = {name: value / rows for name, value in sums.items() if not name.startswith("count/")}
    moments = {name: means.pop(f"moment/{name}") for name in ("x", "y", "xx", "yy", "xy") if f"moment/{name}" in means}
    if moments:
        spread = (moments["xx"] - moments["x"] ** 2) * (moments["yy"] - moments["y"] ** 2)
        covariance = moments["xy"] - moments["x"] * moments["y"]
        means["rewards/correlation"] = covariance / math.sqrt(spread) if spread > 1e-12 else 0.0
        means["rewards/mean"] = moments["x"]
    return means


def _bradley_terry(settings: RewardModelConfig, answers: Answers) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    better_R, worse_R = answers.sums[0::2], answers.sums[1::2]
    loss_R = -logsigmoid(better_R - worse_R - answers.targets[0::2])
    if settings.centering_coef > 0:
        loss_R = loss_R + settings.centering_coef * (better_R + worse_R) ** 2
    better_R, worse_R = better_R.detach(), worse_R.detach()
    return loss_R, {
        "rewards/chosen": better_R.sum(),
        "rewards/rejected": worse_R.sum(),
        "rewards/margins": (better_R - worse_R).sum(),
        "rewards/accuracies": (better_R > worse_R).to(better_R.dtype).sum(),
    }


def _regression(answers: Answers) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss_R = (answers.sums - answers.targets) ** 2
    x, y = answers.sums.detach().double(), answers.targets.double()
    sums = {"rewards/abs_error": (x - y).abs().sum()}
    sums |= {f"moment/{n}": v.sum() for n, v in {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}.items()}
    return loss_R, sums
