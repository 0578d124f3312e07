"""The segmented operators as torch custom ops: opaque to `torch.compile`, fake tensors registered, no gradient.

What depends on the data's values (is `cu_seqlens` ascending? would a reward be lost?) is checked inside the ops, so that a
compiled graph goes through them without a break.
"""

from __future__ import annotations

import torch

from skyrl_mega_kernels.backends import Operator
from skyrl_mega_kernels.segmented_gae.reference import gae_by_scan

OPERATOR = Operator("segmented_gae", ("cpu", "cuda", "triton", "reference"))


@torch.library.custom_op("skyrl_mega::segmented_gae", mutates_args=())
def segmented_gae_op(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    loss_mask: torch.Tensor | None,
    bootstrap_values: torch.Tensor | None,
    gamma: float,
    lam: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages [T], returns [T])."""
    return _gae(rewards, values, cu_seqlens, loss_mask, bootstrap_values, gamma, lam, backend)


@segmented_gae_op.register_fake
def _(rewards, values, cu_seqlens, loss_mask, bootstrap_values, gamma, lam, backend):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


@torch.library.custom_op("skyrl_mega::segmented_returns", mutates_args=())
def segmented_returns_op(
    rewards: torch.Tensor,
    cu_seqlens: torch.Tensor,
    loss_mask: torch.Tensor | None,
    bootstrap_values: torch.Tensor | None,
    gamma: float,
    backend: str,
) -> torch.Tensor:
    """Discounted rewards-to-go [T]: the advantages of a critic that says 0 everywhere, with lambda 1."""
    return _gae(rewards, None, cu_seqlens, loss_mask, bootstrap_values, gamma, 1.0, backend)[0]


@segmented_returns_op.register_fake
def _(rewards, cu_seqlens, loss_mask, bootstrap_values, gamma, backend):
    return rewards.new_empty(rewards.shape)


@torch.library.custom_op("skyrl_mega::segmented_scan", mutates_args=())
def segmented_scan_op(decay: torch.Tensor, values: torch.Tensor, cu_seqlens: torch.Tensor, backend: str) -> torch.Tensor:
    """y [T] with y_t = values_t + decay_t y_{t+1} inside each sequence."""
    borders = checked_borders(cu_seqlens, values.shape[0])
    module = OPERATOR.select(values.device, values.dtype, backend)
    return module.segmented_scan(decay.contiguous(), values.contiguous(), borders)


@segmented_scan_op.register_fake
def _(decay, values, cu_seqlens, backend):
    return values.new_empty(values.shape)


def _gae(rewards, values, cu_seqlens, loss_mask, bootstrap_values, gamma, lam, backend):
    borders = checked_borders(cu_seqlens, rewards.shape[0])
    module = OPERATOR.select(rewards.device, rewards.dtype, backend)
    tensors = (rewards, values, borders, loss_mask, bootstrap_values)
    contiguous = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    if hasattr(module, "gae"):  # a backend may have it in one pass
        return module.gae(*contiguous, gamma, lam)
    return gae_by_scan(module.segmented_scan, *contiguous, gamma, lam)


def checked_borders(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`cu_seqlens` as contiguous int64. Raises ValueError unless it ascends (equal neighbours: an empty sequence) from 0 to T."""
    borders = cu_seqlens.to(torch.int64).contiguous()
    on_host = borders.cpu()
    first, last = int(on_host[0]), int(on_host[-1])
    if first != 0 or last != num_tokens:
        raise ValueError(f"cu_seqlens must begin with 0 and end with the number of tokens ({num_tokens}); got {first} .. {last}.")
    falling = (on_host.diff() < 0).nonzero()
    if falling.numel():
        at = int(falling[0])
        raise ValueError(
            f"cu_seqlens must ascend: entry {at} is {int(on_host[at])} and entry {at + 1} is {int(on_host[at + 1])}."
        )
    return borders
