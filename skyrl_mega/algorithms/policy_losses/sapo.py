"""Soft adaptive policy optimization: a gate that closes smoothly in place of clipping."""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES, LossInputs, LossOutput
from skyrl_mega.algorithms.policy_losses.ratio import masked, ratio_stats, require_range, token_ratios


@POLICY_LOSSES.register("sapo", token_separable=True)
def sapo(inputs: LossInputs, *, tau_positive: float = 1.0, tau_negative: float = 1.05) -> LossOutput:
    """-A gate(ratio) with gate(r) = 4 / tau sigmoid(tau (r - 1)); tau by the sign of A.

    The gradient is -A r w, where w = 4 p (1 - p), p = sigmoid(tau (r - 1)), is 1 at r = 1 and falls towards 0 on both sides:
    a trust region without an edge. `tau_negative` > `tau_positive` closes sooner for tokens that are pushed down, whose
    gradient spreads over the whole vocabulary. Unlike PPO it weakens tokens on their way back to ratio 1, too. `gate_weight`
    is w. `algorithm.reduction=sequence_mean` gives the paper's objective.

    Source: arXiv:2511.20347, with its temperatures.
    """
    require_range("tau_positive", tau_positive, 0, open_low=True)
    require_range("tau_negative", tau_negative, 0, open_low=True)
    ratios = token_ratios(inputs)
    _, ratio_T, advantages_T = ratios
    tau_T = torch.where(advantages_T > 0, tau_positive, tau_negative).to(ratio_T.dtype)
    open_T = torch.sigmoid(tau_T * (ratio_T - 1))
    with torch.no_grad():
        stats = ratio_stats(ratios, inputs.loss_mask)
        stats["gate_weight"] = masked(4 * open_T * (1 - open_T), inputs.loss_mask)
    return -advantages_T * open_T * (4 / tau_T), stats
