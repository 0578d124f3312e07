"""The contract of `linear_logprobs`: checks, row compaction, and the choice of a backend (one so far: the torch reference).

Shape letters: T packed tokens, N the rows of them that are computed (loss_mask True), H hidden size, V this rank's columns
of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from skyrl_mega_kernels.linear_logprobs.reference import ReferenceLinearLogprobs, VocabShard

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class LinearLogprobsOutput(NamedTuple):
    """`logprobs` and `entropy` are [T]; float32, or float64 for float64 inputs. `entropy` is None unless it was asked for."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    loss_mask: torch.Tensor | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    return_entropy: bool = False,
    chunk_tokens: int = 1024,
) -> LinearLogprobsOutput:
    """Log-probabilities of `labels` under softmax(hidden @ weight.T / temperature), without materialising the [T, V] logits.

    hidden [T, H] and weight [V, H] share a dtype (bfloat16, float16, float32, float64) and device; labels int64 [T] are
    global token ids; loss_mask bool [T]. Logits are computed in the inputs' dtype, the softmax in float32 (float64 for
    float64 inputs). Rows where loss_mask is False cost nothing: they come out as exactly 0 and send no gradient back, and
    their label may be anything. Entropy is that of the tempered distribution, and is differentiable.

    `weight` is this rank's shard of the vocabulary: global columns vocab_start .. vocab_start + V (None: equal shards in
    rank order). `vocab_size` counts the valid columns over all ranks (None: all of them); padding columns beyond it take no
    part. At most `chunk_tokens` rows of logits exist at once, in the forward and in the backward pass (which recomputes
    them).

    Collective over `tp_group`, when given, in forward and backward: every rank passes the same hidden, labels, loss_mask and
    temperature, and gets the same output. One MAX and one SUM all-reduce forward; backward all-reduces the gradient of
    `hidden`, so the caller must NOT reduce it again (after a sequence-parallel gather: split the gradient, do not
    reduce-scatter it). The gradient of `weight` is summed over chunks in float32 and belongs to this rank's shard.

    Raises ValueError for shapes, dtypes or settings that do not fit, and for a label outside [0, vocab_size) in a row that
    counts. Method: online softmax merged across shards, arXiv:1805.02867; recomputing backward, arXiv:2411.09009.
    """
    _check_tensors(hidden, weight, labels, loss_mask)
    if temperature <= 0:
        raise ValueError(f"temperature ({temperature}) must be positive; greedy decoding has no log-probabilities to train on.")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens ({chunk_tokens}) must be at least 1.")
    shard = _vocab_shard(weight.shape[0], vocab_start, vocab_size, tp_group)

    num_tokens = hidden.shape[0]
    rows = None if loss_mask is None else loss_mask.nonzero().squeeze(1)
    if rows is not None:
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    _check_labels(labels, shard.vocab_size)

    logprobs, entropy = ReferenceLinearLogprobs.apply(hidden, weight, labels, temperature, shard, return_entropy, chunk_tokens)
    if rows is not None:
        logprobs = logprobs.new_zeros(num_tokens).index_copy(0, rows, logprobs)
        entropy = None if entropy is None else entropy.new_zeros(num_tokens).index_copy(0, rows, entropy)
    return LinearLogprobsOutput(logprobs, entropy)


def _check_tensors(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [T, H] and weight [V, H]; got {tuple(hidden.shape)} and {tuple(weight.shape)}.")
    if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
        raise ValueError(
            f"hidden and weight must share a floating dtype; got {hidden.dtype} and {weight.dtype}: cast one of them."
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{hidden.shape[0]}]; got {labels.dtype} {tuple(labels.shape)}.")
    if loss_mask is not None and (loss_mask.shape != hidden.shape[:1] or loss_mask.dtype != torch.bool):
        raise ValueError(f"loss_mask must be bool [{hidden.shape[0]}]; got {loss_mask.dtype} {tuple(loss_mask.shape)}.")


def _check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    outside = (labels < 0) | (labels >= vocab_size)
    if bool(outside.any()):
        raise ValueError(
            f"labels must lie in [0, {vocab_size}) wherever loss_mask is True; {int(outside.sum())} do not, the first is "
            f"{int(labels[outside][0])}. Mask the rows that have no label."
        )


def _vocab_shard(
    num_columns: int, vocab_start: int | None, vocab_size: int | None, tp_group: dist.ProcessGroup | None
) -> VocabShard:
    tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
    if vocab_start is None:
        vocab_start = 0 if tp_size == 1 else dist.get_rank(tp_group) * num_columns
    if tp_size == 1 and vocab_start != 0:
        raise ValueError(
            f"vocab_start ({vocab_start}) must be 0 without a tp_group of several ranks: the other columns are nowhere."
        )
    if vocab_size is None:
        vocab_size = num_columns * tp_size
    if not 0 < vocab_size <= num_columns * tp_size:
        raise ValueError(
            f"vocab_size ({vocab_size}) must be positive and at most the columns of all shards ({num_columns} x {tp_size} ranks)."
        )
    return VocabShard(start=vocab_start, vocab_size=vocab_size, group=tp_group if tp_size > 1 else None)
