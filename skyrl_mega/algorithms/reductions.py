"""Weights that make a plain sum over tokens the average over the *global* batch: scale first, then sum.

Averaging inside a micro-batch, or inside a rank, gives every token of a sparse micro-batch a louder voice, so that packing
would change the result. Here each token's weight depends only on numbers of the whole update (all micro-batches, all
data-parallel ranks), so that any split of the batch sums to the same loss and gradient. Callers add; they never divide
(a wrapper that averages gradients over data-parallel ranks must be undone by multiplying with their number).

Shape letters: T packed tokens, S sequences of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from skyrl_mega.algorithms.registry import lookup
from skyrl_mega.errors import ConfigError


@dataclass(frozen=True)
class Totals:
    """Numbers of the whole update, over all micro-batches and data-parallel ranks, sequences left out of compute included.

    `constant_length`: what `sequence_sum_norm` divides by.
    """

    num_loss_tokens: int
    num_sequences: int
    num_groups: int
    constant_length: int = 0


def reduction_weights(
    reduction: str,
    loss_mask_T: torch.Tensor,
    cu_seqlens: torch.Tensor,
    loss_tokens_per_sequence_S: torch.Tensor,
    loss_tokens_per_group_S: torch.Tensor | None,
    totals: Totals,
) -> torch.Tensor:
    """float32 [T]: the weight of each token, 0 where loss_mask is False.

    loss_mask_T bool [T]; cu_seqlens int [S+1]; loss_tokens_per_sequence_S [S] counts the whole sequence's loss tokens,
    loss_tokens_per_group_S [S] those of all samples of its prompt in the update (only `prompt_mean` looks at it).

    | reduction | weight of a token | source |
    |---|---|---|
    | `token_mean` | 1 / num_loss_tokens | DAPO, arXiv:2503.14476 |
    | `sequence_mean` | 1 / (tokens of its sequence x num_sequences) | GRPO, arXiv:2402.03300 |
    | `sequence_sum_norm` | 1 / (constant_length x num_sequences) | Dr. GRPO, arXiv:2503.20783 |
    | `prompt_mean` | 1 / (tokens of its prompt's samples x num_groups) | mean over prompts of their token means |

    The weights of a whole update sum to 1, less the share of what was left out (`sequence_sum_norm`: to mean length / constant).
    Raises ConfigError for an unknown reduction.
    """
    weight_of = lookup(REDUCTIONS, reduction, "algorithm.reduction")
    group_S = loss_tokens_per_sequence_S if loss_tokens_per_group_S is None else loss_tokens_per_group_S
    # A padding sequence has no loss token: its weight is never used, but must not be infinite.
    weight_S = weight_of(loss_tokens_per_sequence_S.float().clamp(min=1), group_S.float().clamp(min=1), totals)
    weight_T = weight_S.repeat_interleave(cu_seqlens.diff().long(), output_size=loss_mask_T.shape[0])
    return torch.where(loss_mask_T, weight_T, 0.0)


Reduction = Callable[[torch.Tensor, torch.Tensor, Totals], torch.Tensor]


def _token_mean(tokens_S: torch.Tensor, group_tokens_S: torch.Tensor, totals: Totals) -> torch.Tensor:
    return torch.full_like(tokens_S, 1.0 / max(totals.num_loss_tokens, 1))


def _sequence_mean(tokens_S: torch.Tensor, group_tokens_S: torch.Tensor, totals: Totals) -> torch.Tensor:
    return 1.0 / (tokens_S * max(totals.num_sequences, 1))


def _sequence_sum_norm(tokens_S: torch.Tensor, group_tokens_S: torch.Tensor, totals: Totals) -> torch.Tensor:
    if totals.constant_length < 1:
        raise ConfigError(f"algorithm.reduction_length ({totals.constant_length}) must be at least 1 for sequence_sum_norm.")
    return torch.full_like(tokens_S, 1.0 / (totals.constant_length * max(totals.num_sequences, 1)))


def _prompt_mean(tokens_S: torch.Tensor, group_tokens_S: torch.Tensor, totals: Totals) -> torch.Tensor:
    return 1.0 / (group_tokens_S * max(totals.num_groups, 1))


#: `algorithm.reduction` -> weight of each token of a sequence, [S].
REDUCTIONS: dict[str, Reduction] = {
    "token_mean": _token_mean,
    "sequence_mean": _sequence_mean,
    "sequence_sum_norm": _sequence_sum_norm,
    "prompt_mean": _prompt_mean,
}
