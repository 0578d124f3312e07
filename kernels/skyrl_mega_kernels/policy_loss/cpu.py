"""The C++ backend of the policy losses (`csrc/cpu/policy_loss.cpp`): one pass, threaded over blocks of tokens or sequences."""

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


def sums_and_gradient(
    name: str,
    logprobs_T: torch.Tensor,
    denominators_T: torch.Tensor,
    advantages_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    weights_T: torch.Tensor,
    loss_weights_T: torch.Tensor,
    marked_T: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    options: list[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(float64 [1 + K]: sums of the loss and its K statistics; float32 [T]: the gradient of the loss's sum)."""
    extension.load("_C")
    return torch.ops.skyrl_mega_cpu.policy_loss(
        *(name, logprobs_T, denominators_T, advantages_T, loss_mask_T, weights_T, loss_weights_T, marked_T, cu_seqlens, options)
    )
