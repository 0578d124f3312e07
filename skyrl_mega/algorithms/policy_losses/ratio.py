"""What the policy losses share: the ratio to the old policy, its statistics, and rules for options.

Shape letters: T packed tokens of one micro-batch, S its sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from skyrl_mega.algorithms.log_ratio import masked_log_ratio
from skyrl_mega.algorithms.policy_losses.inputs import LossInputs
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.errors import ConfigError


class TokenRatios(NamedTuple):
    """All [T]: log(policy / old policy) within +-20, its exponential, and the advantages. Masked tokens: 0, 1 and 0."""

    log_ratio_T: torch.Tensor
    ratio_T: torch.Tensor
    advantages_T: torch.Tensor


def token_ratios(inputs: LossInputs, old_logprobs: torch.Tensor | None = None) -> TokenRatios:
    """The ratios to `old_logprobs` (default: the inputs'), with gradient; nothing of a masked token is looked at."""
    denominator = inputs.old_logprobs if old_logprobs is None else old_logprobs
    log_ratio_T = masked_log_ratio(inputs.logprobs, denominator, inputs.loss_mask)
    return TokenRatios(log_ratio_T, log_ratio_T.exp(), masked(inputs.advantages, inputs.loss_mask))


def masked(values_T: torch.Tensor, loss_mask_T: torch.Tensor) -> torch.Tensor:
    """[T]: the values, 0 where loss_mask is False, whatever stands there; no gradient flows to those."""
    return torch.where(loss_mask_T, values_T, 0.0)


def ratio_stats(ratios: TokenRatios, loss_mask_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """`ratio`, and `approx_kl`: k3 of KL(old || policy). Both [T], detached."""
    log_ratio_T, ratio_T = ratios.log_ratio_T.detach(), ratios.ratio_T.detach()
    return {"ratio": masked(ratio_T, loss_mask_T), "approx_kl": log_ratio_T.expm1() - log_ratio_T}


def clip_stats(is_low_T: torch.Tensor, is_high_T: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`clip_low_fraction` and `clip_high_fraction` from bool [T]."""
    return {"clip_low_fraction": is_low_T.to(dtype), "clip_high_fraction": is_high_T.to(dtype)}


def whole_sequences(inputs: LossInputs) -> Sequences:
    """The micro-batch's sequences. Raises ConfigError where the caller gave none."""
    if inputs.sequences is None:
        raise ConfigError("this policy loss looks at whole sequences: pass LossInputs.sequences (`model.fused_loss=auto`).")
    return inputs.sequences


def require_range(option: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """Raises ConfigError unless low <= value <= high (`open_low`: low < value)."""
    if value > high or value < low or (open_low and value == low) or value != value:
        lower = f"greater than {low:g}" if open_low else f"at least {low:g}"
        upper = "" if high == float("inf") else f" and at most {high:g}"
        raise ConfigError(f"`algorithm.loss_options.{option}` ({value:g}) must be {lower}{upper}.")
