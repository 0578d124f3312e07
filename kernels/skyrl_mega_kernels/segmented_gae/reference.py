"""The torch reference of the segmented scan, and GAE as elementwise work around any backend's scan.

Shape letters: T packed tokens, N those of them that count, S sequences.

y_t = v_t + a_t y_{t+1} is a composition of affine maps, which is associative: with (a, v) standing for y -> v + a y, a span of 2k
tokens is the span of its first k applied to that of the next k. `segmented_scan` doubles the span in every step, over all packed
tokens at once: log2(longest sequence) steps of a few elementwise operations, instead of one step per token. A sequence's last
token has a = 0, so that no span reaches into the next sequence.

A backend of this operator is a module with `unavailable`, `segmented_scan` and, where it does better than `gae_by_scan`, `gae`
with the arguments of the function here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

Scan = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

LOST_REWARD = (
    "a reward on a masked token goes to the last counting token before it in its sequence; {} has none: move the reward to a "
    "token of the policy, or set it to 0."
)


class Counting(NamedTuple):
    """The tokens that count: their positions [N], credited rewards [N], and the sequences' borders among them [S + 1]."""

    index: torch.Tensor
    rewards: torch.Tensor
    cu_seqlens: torch.Tensor


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: torch runs everywhere."""
    return None


def segmented_scan(decay_T: torch.Tensor, values_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """y_T with y_t = values_t + decay_t y_{t+1} inside each sequence, 0 beyond its end."""
    if values_T.numel() == 0:
        return values_T.clone()
    scan_T, span_decay_T = values_T.clone(), decay_T.clone()
    span_decay_T[_last_tokens(cu_seqlens)] = 0
    longest, span = int(cu_seqlens.diff().max()), 1
    while span < longest:
        scan_T[:-span] += span_decay_T[:-span] * scan_T[span:].clone()
        span_decay_T[:-span] *= span_decay_T[span:].clone()
        span_decay_T[-span:] = 0
        span *= 2
    return scan_T


def gae(
    rewards_T: torch.Tensor,
    values_T: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    loss_mask_T: torch.Tensor | None,
    bootstrap_S: torch.Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages_T, returns_T); see `gae_by_scan`."""
    return gae_by_scan(segmented_scan, rewards_T, values_T, cu_seqlens, loss_mask_T, bootstrap_S, gamma, lam)


def gae_by_scan(
    scan: Scan,
    rewards_T: torch.Tensor,
    values_T: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    loss_mask_T: torch.Tensor | None,
    bootstrap_S: torch.Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages_T, returns_T) by `scan`. With values_T None all values are 0, and with lam = 1 both are rewards-to-go.

    cu_seqlens is int64. Raises ValueError where a reward on a masked token has no counting token before it.
    """
    if loss_mask_T is None:
        values = torch.zeros_like(rewards_T) if values_T is None else values_T
        advantages_T = scan(*_decay_and_deltas(rewards_T, values, cu_seqlens, bootstrap_S, gamma, lam), cu_seqlens)
        return advantages_T, advantages_T + values
    counting = _counting_tokens(scan, rewards_T, cu_seqlens, loss_mask_T)
    values_N = torch.zeros_like(counting.rewards) if values_T is None else values_T[counting.index]
    advantages_N, returns_N = gae_by_scan(scan, counting.rewards, values_N, counting.cu_seqlens, None, bootstrap_S, gamma, lam)
    zeros_T = torch.zeros_like(rewards_T)
    return zeros_T.index_copy(0, counting.index, advantages_N), zeros_T.index_copy(0, counting.index, returns_N)


def _decay_and_deltas(rewards_T, values_T, cu_seqlens, bootstrap_S, gamma, lam):
    """(gamma lam, rewards + gamma next values - values), [T] each."""
    next_values_T = torch.zeros_like(values_T)
    next_values_T[:-1] = values_T[1:]
    is_filled_S = cu_seqlens[1:] > cu_seqlens[:-1]
    next_values_T[_last_tokens(cu_seqlens)] = 0 if bootstrap_S is None else bootstrap_S[is_filled_S]
    return torch.full_like(rewards_T, gamma * lam), rewards_T + gamma * next_values_T - values_T


def _counting_tokens(scan, rewards_T, cu_seqlens, loss_mask_T) -> Counting:
    counted_T = loss_mask_T.cumsum(0)
    counted_before = torch.nn.functional.pad(counted_T, (1, 0))[cu_seqlens]  # also the sequences' borders among those that count
    lengths_S = cu_seqlens.diff()
    at_start_T = counted_before[:-1].repeat_interleave(lengths_S, output_size=rewards_T.shape[0])
    is_lost_T = (counted_T == at_start_T) & (rewards_T != 0)
    if bool(is_lost_T.any()):
        raise ValueError(LOST_REWARD.format(f"token {int(is_lost_T.nonzero()[0])}"))
    # A token's credited reward is its own plus that of the masked tokens that follow: a scan that goes on while they do.
    next_is_masked_T = torch.zeros_like(rewards_T)
    next_is_masked_T[:-1] = (~loss_mask_T[1:]).to(rewards_T.dtype)
    index_N = loss_mask_T.nonzero().squeeze(1)
    return Counting(index_N, scan(next_is_masked_T, rewards_T, cu_seqlens)[index_N], counted_before)


def _last_tokens(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Position of the last token of every sequence that has one."""
    return cu_seqlens[1:][cu_seqlens[1:] > cu_seqlens[:-1]] - 1
