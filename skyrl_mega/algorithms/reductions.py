"""Weights that make a plain sum over tokens the average over the *global* batch: scale first, then sum.

Averaging inside a micro-batch, or inside a rank, gives every token of a sparse micro-batch a louder voice, so that packing
would change the result. Here each token's weight depends only on numbers of the whole update (all micro-batches, all
data-parallel ranks), so that any split of the batch sums to the same loss and gradient. Callers add; they never divide
(a wrapper that averages gradients over data-parallel ranks must be undone by multiplying with their number).

Shape letters: T packed tokens, S sequences of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from skyrl_mega.algorithms.registry import lookup

Reduction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor]


def reduction_weights(
    reduction: str,
    loss_mask_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    loss_tokens_per_sequence_S: torch.Tensor,
    num_loss_tokens: int,
    num_sequences: int,
) -> torch.Tensor:
    """float32 [T]: the weight of each token, 0 where loss_mask is False.

    loss_mask_T bool [T]; cu_seqlens int [S+1]; loss_tokens_per_sequence_S [S] counts the whole sequence's loss tokens;
    `num_loss_tokens` and `num_sequences` count the whole update over all micro-batches and data-parallel ranks (sequences
    left out of compute included). The weights of a whole update sum to 1, less the share of what was left out.

    `token_mean`: 1 / num_loss_tokens (DAPO, arXiv:2503.14476). `sequence_mean`: 1 / (tokens of its sequence x
    num_sequences), the mean over sequences of their token means (GRPO, arXiv:2402.03300).
    Raises ConfigError for an unknown reduction.
    """
    function = lookup(REDUCTIONS, reduction, "algorithm.reduction")
    return function(loss_mask_T, cu_seqlens, loss_tokens_per_sequence_S, num_loss_tokens, num_sequences)


def _token_mean(
    loss_mask_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    loss_tokens_per_sequence_S: torch.Tensor,
    num_loss_tokens: int,
    num_sequences: int,
) -> torch.Tensor:
    return loss_mask_T.to(torch.float32) / max(num_loss_tokens, 1)


def _sequence_mean(
    loss_mask_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    loss_tokens_per_sequence_S: torch.Tensor,
    num_loss_tokens: int,
    num_sequences: int,
) -> torch.Tensor:
    # A padding sequence has no loss token: its weight is never used, but must not be infinite.
    weight_S = 1.0 / (loss_tokens_per_sequence_S.to(torch.float32).clamp(min=1) * max(num_sequences, 1))
    weight_T = weight_S.repeat_interleave(cu_seqlens.diff().long(), output_size=loss_mask_T.shape[0])
    return torch.where(loss_mask_T, weight_T, 0.0)


#: `algorithm.reduction` -> weights.
REDUCTIONS: dict[str, Reduction] = {"token_mean": _token_mean, "sequence_mean": _sequence_mean}
