"""Stages that weigh by the ratio itself: bounded importance weights.

Shape letter: T packed tokens of one micro-batch. `level` chooses the ratio w that a token is weighed by: its own (`token`), the
product over its sequence (`sequence`), or the geometric mean (`geometric`). Per token the gradient is biased, since prefixes stay
those of the engine, and its variance is small; the product is unbiased until it is bounded, and its variance grows with the
length; the geometric mean is a compromise without an expectation of 1.
"""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.off_policy.stages import STAGES, StageInputs, check_bounds


@STAGES.register("truncated_is", weighs=True)
def truncated_is(inputs: StageInputs, *, cap: float = 2.0, level: str = "token") -> tuple[torch.Tensor, torch.Tensor]:
    """min(w, cap): every token keeps a voice, and none shouts.

    Source: IMPALA, arXiv:1802.01561 section 4.1; engine against trainer: Yao et al. 2025, "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training" (cap 2). Stale tokens: weights below 1 pass, so that what the policy has left behind fades.
    """
    check_bounds("truncated_is", high=cap, high_name="cap")
    weights_T = inputs.log_ratio_at(level).exp()
    return weights_T.clamp(max=cap), weights_T > cap


@STAGES.register("masked_is", weighs=True)
def masked_is(inputs: StageInputs, *, cap: float = 2.0, level: str = "token") -> tuple[torch.Tensor, torch.Tensor]:
    """w, but 0 above cap: what the trainer finds much likelier than the engine did is not believed at all.

    Source: Liu et al. 2025, "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch" (there at
    the level of sequences). Stale tokens: those that the policy has moved towards are lost first.
    """
    check_bounds("masked_is", high=cap, high_name="cap")
    weights_T = inputs.log_ratio_at(level).exp()
    return weights_T.masked_fill(weights_T > cap, 0.0), weights_T > cap


@STAGES.register("icepop", weighs=True)
def icepop(inputs: StageInputs, *, low: float = 0.5, cap: float = 5.0, level: str = "token") -> tuple[torch.Tensor, torch.Tensor]:
    """w, but 0 outside [low, cap]: neither side is believed.

    Source: IcePop, arXiv:2510.18855 (low 0.5, cap 5, per token), made for mixtures of experts, where single tokens are far off
    because another expert was chosen. Stale tokens: whatever the policy has moved away from is lost as well.
    """
    check_bounds("icepop", low=low, high=cap, high_name="cap")
    weights_T = inputs.log_ratio_at(level).exp()
    is_out_T = (weights_T > cap) | (weights_T < low)
    return weights_T.masked_fill(is_out_T, 0.0), is_out_T
