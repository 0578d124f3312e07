"""The C++ backend of the loss terms (`csrc/cpu/loss_terms.cpp`): one pass, threaded over blocks of tokens."""

from __future__ import annotations

import torch

from skyrl_mega_kernels import extension
from skyrl_mega_kernels.policy_loss.cpu import unavailable

__all__ = ["sums_and_gradients", "unavailable"]


def sums_and_gradients(
    trainer_logprobs_T: torch.Tensor,
    rollout_logprobs_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    weights_T: torch.Tensor,
    estimator: str,
    logprobs_T: torch.Tensor | None,
    ref_logprobs_T: torch.Tensor | None,
    entropy_T: torch.Tensor | None,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float64 [7]: SUMS and the largest distance; float32 [T]: gradients by logprobs and entropy, empty where there is none)."""
    extension.load("_C")
    return torch.ops.skyrl_mega_cpu.loss_terms(
        *(trainer_logprobs_T, rollout_logprobs_T, loss_mask_T, weights_T, estimator),
        *(logprobs_T, ref_logprobs_T, entropy_T, kl_coef, entropy_coef),
    )
