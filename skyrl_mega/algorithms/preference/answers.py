"""A micro-batch's answers: one number per answer from numbers per token.

Shape letters: T packed tokens of this rank, S sequences of the whole micro-batch (trunks and padding among them), A answers, N
samples of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skyrl_mega.algorithms.sequences import Sequences


@dataclass(frozen=True)
class Answers:
    """What losses look at; every tensor is [A], in the order of the micro-batch (a pair: the better one, then the other).

    `sums`: of the values over the answer's tokens, with gradient; `tokens` counts those; `targets`: what the rows say.
    `ref_sums`: of the reference's log-probabilities.
    """

    sums: torch.Tensor
    tokens: torch.Tensor
    targets: torch.Tensor
    ref_sums: torch.Tensor | None = None


def answers_of(
    values_T: torch.Tensor,
    mask_T: torch.Tensor,
    sequences: Sequences,
    sample_index_S: torch.Tensor,
    *,
    targets_N: torch.Tensor,
    ref_sums_N: torch.Tensor | None = None,
) -> Answers:
    """The answers of a micro-batch from values of its tokens (log-probabilities, scores), where mask_T is True.

    The same on all context-parallel ranks, whose parts are added up. sample_index_S int64, -1 for what is no answer.
    """
    sums_S = sequences.sum(torch.where(mask_T, values_T, 0.0))
    tokens_S = sequences.sum(mask_T.to(values_T.dtype)).detach()
    sample_index_S = sample_index_S.to(values_T.device)
    is_answer_S = sample_index_S >= 0
    index_A = sample_index_S[is_answer_S]

    def of_answers(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.to(values_T.device, values_T.dtype)[index_A]

    return Answers(
        sums=sums_S[is_answer_S],
        tokens=tokens_S[is_answer_S],
        targets=of_answers(targets_N),
        ref_sums=None if ref_sums_N is None else of_answers(ref_sums_N),
    )


def sums_by_sample(
    values: list[torch.Tensor], masks: list[torch.Tensor], index_S: list[torch.Tensor], bounds: list[torch.Tensor], num: int
) -> torch.Tensor:
    """float32 [num], by sample_index: each sample's sum over its tokens in whole micro-batches; 0 where it is in none."""
    sums_N = torch.zeros(num)
    for values_T, mask_T, sample_index_S, cu_seqlens in zip(values, masks, index_S, bounds, strict=True):
        sums_S = Sequences.packed(cu_seqlens).sum(torch.where(mask_T, values_T, 0.0))
        is_answer_S = sample_index_S >= 0
        sums_N[sample_index_S[is_answer_S]] = sums_S[is_answer_S].float()
    return sums_N
