"""The C++ backend of the segmented operators (`csrc/cpu/segmented_scan.cpp`): one pass, threaded over sequences."""

from __future__ import annotations

import torch

from skyrl_mega_kernels import extension


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend can't run for tensors of this device and dtype; None where it can."""
    if device.type != "cpu":
        return "it computes on CPU tensors"
    if dtype != torch.float32:
        return f"it computes in torch.float32, not {dtype}"
    return extension.why_absent("_C")


def segmented_scan(decay_T: torch.Tensor, values_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """y_T with y_t = values_t + decay_t y_{t+1} inside each sequence."""
    extension.load("_C")
    return torch.ops.skyrl_mega_cpu.segmented_scan(decay_T, values_T, cu_seqlens)


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
    extension.load("_C")
    return torch.ops.skyrl_mega_cpu.segmented_gae(rewards_T, values_T, cu_seqlens, loss_mask_T, bootstrap_S, gamma, lam)
