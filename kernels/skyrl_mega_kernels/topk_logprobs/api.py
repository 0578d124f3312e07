"""The contract of `topk_logprobs` and `logprobs_at`: log-probabilities at K tokens of each position, with gradients.

Shape letters: T packed tokens, H hidden, V this rank's columns, K tokens per position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from skyrl_mega_kernels.linear_logprobs.api import check_head, checked_softcap
from skyrl_mega_kernels.topk_logprobs.ops import topk_logprobs_op


class TopkLogprobsOutput(NamedTuple):
    """`logprobs` [T, K] and `lse` [T] in float32 (float64 for float64 inputs), both differentiable; `ids` int64 [T, K].

    Rows that do not count hold 0, and ids -1. Where the vocabulary is smaller than K, logprobs end in -inf and ids in -1.
    """

    logprobs: torch.Tensor
    ids: torch.Tensor
    lse: torch.Tensor


def topk_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    loss_mask: torch.Tensor | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    backend: str = "auto",
    logit_softcap: float | None = None,
) -> TopkLogprobsOutput:
    """The K likeliest tokens of each position and their log-probabilities over the whole vocabulary, descending.

    Ties: the lower id first. Arguments, collectives and errors as in `linear_logprobs`.
    """
    if k < 1:
        raise ValueError(f"k ({k}) must be at least 1.")
    place = (vocab_start, vocab_size, tp_group)
    return _run(hidden, weight, None, k, temperature, bias, loss_mask, *place, chunk_tokens, backend, logit_softcap)


def logprobs_at(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    loss_mask: torch.Tensor | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    backend: str = "auto",
    logit_softcap: float | None = None,
) -> TopkLogprobsOutput:
    """Log-probabilities at given tokens: a student at its teacher's top-k, say. ids int64 [T, K] are global token ids.

    An id may be -1 for "none": it comes out as -inf and sends no gradient. Arguments, collectives and errors as in
    `linear_logprobs`.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"ids must be int64 [{hidden.shape[0]}, K]; got {ids.dtype} {tuple(ids.shape)}.")
    place = (vocab_start, vocab_size, tp_group)
    return _run(hidden, weight, ids, ids.shape[1], temperature, bias, loss_mask, *place, chunk_tokens, backend, logit_softcap)


def _run(
    hidden, weight, ids, k, temperature, bias, loss_mask, vocab_start, vocab_size, tp_group, chunk_tokens, backend, logit_softcap
) -> TopkLogprobsOutput:
    no_labels = torch.zeros(hidden.shape[:1], dtype=torch.int64, device=hidden.device)
    shard = check_head(
        hidden, weight, no_labels, loss_mask, bias, None, temperature, vocab_start, vocab_size, tp_group, sequence_parallel=False
    )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens ({chunk_tokens}) must be at least 1.")
    return TopkLogprobsOutput(
        *topk_logprobs_op(
            *(hidden, weight, bias, ids, k, loss_mask, float(temperature)),
            *(shard.start, shard.vocab_size, shard.group, chunk_tokens, backend, checked_softcap(logit_softcap)),
        )
    )
