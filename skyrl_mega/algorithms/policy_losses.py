"""Policy losses, per token. `loss.py` weights and sums them; nothing here averages.

Shape letter: T packed tokens of one micro-batch, label-aligned (see `skyrl_mega.types`). A loss of the registry maps
(inputs, config) to (per_token_loss_T, stats), both 0 where loss_mask is False; stats are detached [T] tensors, so that they
are averaged by the same weights as the loss and add up over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from skyrl_mega.algorithms.log_ratio import masked_log_ratio
from skyrl_mega.config.schema import AlgorithmConfig


@dataclass(frozen=True)
class LossInputs:
    """What a loss may look at; every tensor is [T], float32 (or float64), loss_mask bool.

    `logprobs` and `entropy` carry gradients. `old_logprobs`: the policy before this step's first update; for the first
    update pass `logprobs.detach()`. `rollout_logprobs`: the engine's. `ref_logprobs`: the frozen reference, when used.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    entropy: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None


PolicyLoss = Callable[[LossInputs, AlgorithmConfig], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def ppo_clip_loss(inputs: LossInputs, clip_low: float, clip_high: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) per token, and its statistics.

    ratio = exp(logprobs - old_logprobs). The gradient is 0 where clipping bites: A > 0 with ratio > 1 + clip_high (counted
    by `clip_high_fraction`) and A < 0 with ratio < 1 - clip_low (`clip_low_fraction`). `approx_kl` is k3 of KL(old || new).

    Source: PPO, arXiv:1707.06347 equation 7; separate bounds from DAPO, arXiv:2503.14476 equation 10.
    """
    log_ratio_T = masked_log_ratio(inputs.logprobs, inputs.old_logprobs, inputs.loss_mask)
    ratio_T = log_ratio_T.exp()
    advantages_T = torch.where(inputs.loss_mask, inputs.advantages, 0.0)
    per_token_loss_T = -torch.minimum(ratio_T * advantages_T, ratio_T.clamp(1 - clip_low, 1 + clip_high) * advantages_T)

    with torch.no_grad():
        stats = {
            "ratio": torch.where(inputs.loss_mask, ratio_T, 0.0),
            "clip_low_fraction": ((advantages_T < 0) & (ratio_T < 1 - clip_low)).to(ratio_T.dtype),
            "clip_high_fraction": ((advantages_T > 0) & (ratio_T > 1 + clip_high)).to(ratio_T.dtype),
            "approx_kl": log_ratio_T.expm1() - log_ratio_T,
        }
    return per_token_loss_T, stats


def _ppo_clip(inputs: LossInputs, config: AlgorithmConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return ppo_clip_loss(inputs, config.clip_low, config.clip_high)


#: `algorithm.policy_loss` -> loss.
POLICY_LOSSES: dict[str, PolicyLoss] = {"ppo_clip": _ppo_clip}

#: Losses of which every token's part looks at that token only, so that the LM head and the loss may run chunk by chunk.
TOKEN_SEPARABLE = frozenset({"ppo_clip"})
