"""The CUDA C++ backend of the segmented operators (`csrc/cuda/segmented_scan.cu`): one thread block per sequence."""

from __future__ import annotations

import torch

from skyrl_mega_kernels import extension
from skyrl_mega_kernels.segmented_gae.reference import LOST_REWARD


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend can't run for tensors of this device and dtype; None where it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it computes on tensors of an NVIDIA GPU"
    if dtype != torch.float32:
        return f"it computes in torch.float32, not {dtype}"
    return extension.why_absent("_C_cuda")


def segmented_scan(decay_T: torch.Tensor, values_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """y_T with y_t = values_t + decay_t y_{t+1} inside each sequence."""
    extension.load("_C_cuda")
    return torch.ops.skyrl_mega_cuda.segmented_scan(decay_T, values_T, cu_seqlens)


def gae(
    rewards_T: torch.Tensor,
    values_T: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    loss_mask_T: torch.Tensor | None,
    bootstrap_S: torch.Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages_T, returns_T). Raises ValueError where a reward on a masked token has no counting token before it."""
    extension.load("_C_cuda")
    advantages_T, returns_T, lost_sequence = torch.ops.skyrl_mega_cuda.segmented_gae(
        rewards_T, values_T, cu_seqlens, loss_mask_T, bootstrap_S, gamma, lam
    )
    if loss_mask_T is not None and int(lost_sequence) >= 0:
        raise ValueError(LOST_REWARD.format(f"a token of sequence {int(lost_sequence)}"))
    return advantages_T, returns_T
