"""The contract of `segmented_gae`, `segmented_returns` and the `segmented_scan` both rest on, and the checks of their arguments.

Shape letters: T packed tokens of all sequences, S sequences. Sequence s holds the tokens cu_seqlens[s] .. cu_seqlens[s + 1]; it
may be empty. Nothing here is differentiable: advantages and returns are targets, and come out detached.
"""

from __future__ import annotations

import math

import torch

from skyrl_mega_kernels.segmented_gae.ops import segmented_gae_op, segmented_returns_op, segmented_scan_op

DTYPES = (torch.float32, torch.float64)


def segmented_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    loss_mask: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns) of packed sequences, [T] each, detached: generalised advantage estimation.

    Within a sequence, over the tokens that count,

        delta_t = reward_t + gamma value_{t+1} - value_t
        advantage_t = delta_t + gamma lam advantage_{t+1}        return_t = advantage_t + value_t

    rewards and values share a dtype, float32 or (reference only) float64, [T]; cu_seqlens int32 or int64 [S + 1], ascending
    from 0 to T, all on one device. The value after a sequence's last token is bootstrap_values[s] ([S], same dtype): 0 where the
    episode ended, the critic's estimate where it was cut off. None: all ended.

    loss_mask bool [T] leaves tokens out that are not the policy's (prompt, tool output): the recursion jumps over them, so "next"
    is the next token that counts, and they get 0 in both outputs. Their values are not read. A reward that arrives on one of
    them is credited to the last counting token before it, undiscounted: what the environment pays while it answers belongs to
    the action it answers. With no such token in the sequence the reward would be lost, and that is an error.

    Raises ValueError for shapes, dtypes, cu_seqlens or settings that do not fit and for a reward that would be lost;
    BackendUnavailableError for a backend (auto, reference, cpu, triton, cuda) that can't run here.
    Source: arXiv:1506.02438, equation 16.
    """
    _check_packed(rewards, cu_seqlens, loss_mask, bootstrap_values, "rewards")
    _check_like(values, rewards, "values")
    _check_unit("gamma", gamma)
    _check_unit("lam", lam)
    rewards, values = rewards.detach(), values.detach()
    bootstrap = None if bootstrap_values is None else bootstrap_values.detach()
    return segmented_gae_op(rewards, values, cu_seqlens, loss_mask, bootstrap, float(gamma), float(lam), backend)


def segmented_returns(
    rewards: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float,
    loss_mask: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Discounted rewards-to-go of packed sequences, [T], detached: return_t = reward_t + gamma return_{t+1}.

    Arguments, masking and errors as in `segmented_gae`; the return after a sequence's last token is bootstrap_values[s] or 0.
    """
    _check_packed(rewards, cu_seqlens, loss_mask, bootstrap_values, "rewards")
    _check_unit("gamma", gamma)
    bootstrap = None if bootstrap_values is None else bootstrap_values.detach()
    return segmented_returns_op(rewards.detach(), cu_seqlens, loss_mask, bootstrap, float(gamma), backend)


def segmented_scan(decay: torch.Tensor, values: torch.Tensor, cu_seqlens: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """y [T] with y_t = values_t + decay_t y_{t+1} inside each sequence, y beyond its end being 0; detached.

    decay and values share a dtype (float32; reference also float64) and shape [T]. Errors as in `segmented_gae`.
    """
    _check_packed(values, cu_seqlens, None, None, "values")
    _check_like(decay, values, "decay")
    return segmented_scan_op(decay.detach(), values.detach(), cu_seqlens, backend)


def _check_packed(
    tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    loss_mask: torch.Tensor | None,
    bootstrap_values: torch.Tensor | None,
    name: str,
) -> None:
    if tokens.dim() != 1 or tokens.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32 or float64 [T]; got {tokens.dtype} {tuple(tokens.shape)}: pack and cast it.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64 [S + 1]; got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}.")
    if loss_mask is not None and (loss_mask.shape != tokens.shape or loss_mask.dtype != torch.bool):
        raise ValueError(f"loss_mask must be bool {tuple(tokens.shape)}; got {loss_mask.dtype} {tuple(loss_mask.shape)}.")
    num_sequences = cu_seqlens.shape[0] - 1
    if bootstrap_values is not None and (bootstrap_values.shape != (num_sequences,) or bootstrap_values.dtype != tokens.dtype):
        raise ValueError(
            f"bootstrap_values must be {tokens.dtype} [{num_sequences}], one per sequence; got {bootstrap_values.dtype} "
            f"{tuple(bootstrap_values.shape)}."
        )
    for other_name, other in (("cu_seqlens", cu_seqlens), ("loss_mask", loss_mask), ("bootstrap_values", bootstrap_values)):
        if other is not None and other.device != tokens.device:
            raise ValueError(f"{other_name} must be on the device of {name} ({tokens.device}); it is on {other.device}.")


def _check_like(tensor: torch.Tensor, rewards: torch.Tensor, name: str) -> None:
    if tensor.shape != rewards.shape or tensor.dtype != rewards.dtype or tensor.device != rewards.device:
        raise ValueError(
            f"{name} must be {rewards.dtype} {tuple(rewards.shape)} on {rewards.device}; got {tensor.dtype} "
            f"{tuple(tensor.shape)} on {tensor.device}."
        )


def _check_unit(name: str, setting: float) -> None:
    if not (math.isfinite(setting) and 0 <= setting <= 1):
        raise ValueError(f"{name} ({setting}) must lie in [0, 1]: beyond 1 the sum over a long sequence has no bound.")
