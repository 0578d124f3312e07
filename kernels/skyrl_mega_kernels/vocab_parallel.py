"""Vocabulary shards: which columns a rank holds, and how per-shard softmax statistics become those of the whole vocabulary.

A rank's statistics of one row are, over its own columns and relative to its own maximum m',

    m' = max z      s' = sum exp(z - m')      x' = sum (z - m') exp(z - m')      z[label] (0 where another rank holds it)

and to a common maximum m they move by

    s = s' exp(m' - m)        x = (x' + (m' - m) s') exp(m' - m)

One all-gather brings them together, top-k candidates included. Every rank adds them up in rank order, so that all ranks hold
the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group


@dataclass(frozen=True)
class VocabShard:
    """Which global columns this rank's weight holds: `start` onwards; columns from `vocab_size` on are padding.

    `group` is the name of the process group, "" where one rank holds the whole vocabulary.
    """

    start: int
    vocab_size: int
    group: str

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return _resolve_process_group(self.group) if self.group else None

    def num_valid(self, num_columns: int) -> int:
        """How many of this rank's `num_columns` columns are real vocabulary."""
        return min(max(self.vocab_size - self.start, 0), num_columns)

    def local_columns(self, labels: torch.Tensor, num_valid: int) -> torch.Tensor:
        """Column of each label in this rank's weight, -1 where another rank holds it."""
        local = labels - self.start
        return torch.where((local >= 0) & (local < num_valid), local, -1)


class MergedStatistics(NamedTuple):
    """Statistics over all shards, equal on every rank. [N] each; top-k [N, K], descending, ids int64 of the whole vocabulary."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    lse: torch.Tensor
    topk_logits: torch.Tensor | None
    topk_ids: torch.Tensor | None


class LogprobsOutput(NamedTuple):
    """Per token, [T]; float32, or float64 for float64 inputs. What was not asked for is None.

    `lse` is the log-sum-exp of the tempered logits. `topk_logprobs` [T, K], descending, and `topk_ids` int64 [T, K] carry no
    gradient; where the vocabulary has fewer than K columns they end in -inf and -1.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    lse: torch.Tensor
    topk_logprobs: torch.Tensor | None = None
    topk_ids: torch.Tensor | None = None


def outputs_like(inputs: torch.Tensor, labels: torch.Tensor, return_entropy: bool, top_k: int) -> tuple[torch.Tensor, ...]:
    """Uninitialised outputs of an operator that gives LogprobsOutput, for its fake; empty where nothing was asked for."""
    num_tokens = labels.shape[0]
    per_token = inputs.new_empty(num_tokens, dtype=torch.promote_types(inputs.dtype, torch.float32))
    return (
        per_token,
        torch.empty_like(per_token) if return_entropy else per_token.new_empty(0),
        torch.empty_like(per_token),
        per_token.new_empty(num_tokens, top_k),
        labels.new_empty(num_tokens, top_k),
    )


def asked_for(outputs: tuple[torch.Tensor, ...], return_entropy: bool, top_k: int) -> LogprobsOutput:
    """An operator's five outputs as its caller gets them."""
    logprobs, entropy, lse, topk_logprobs, topk_ids = outputs
    top = (topk_logprobs.detach(), topk_ids) if top_k else (None, None)
    return LogprobsOutput(logprobs, entropy if return_entropy else None, lse, *top)


def shard_of(num_columns: int, vocab_start: int | None, vocab_size: int | None, tp_group: dist.ProcessGroup | None) -> VocabShard:
    """The shard that the arguments of an operator describe. Raises ValueError where they contradict each other."""
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
    return VocabShard(vocab_start, vocab_size, tp_group.group_name if tp_group is not None and tp_size > 1 else "")


def check_labels(labels_N: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError for a label outside the vocabulary."""
    outside_N = (labels_N < 0) | (labels_N >= vocab_size)
    if bool(outside_N.any()):
        raise ValueError(
            f"labels must lie in [0, {vocab_size}) wherever loss_mask is True; {int(outside_N.sum())} do not, the first is "
            f"{int(labels_N[outside_N][0])}. Mask the rows that have no label."
        )


def empty_statistics(like: torch.Tensor, num_rows: int) -> torch.Tensor:
    """[4, N] of a shard without any column, in the softmax's dtype."""
    packed_4N = like.new_zeros((4, num_rows), dtype=torch.promote_types(like.dtype, torch.float32))
    packed_4N[0] = -torch.inf
    return packed_4N


def merge(
    packed_4N: torch.Tensor,
    topk_logits_NK: torch.Tensor | None,
    topk_columns_NK: torch.Tensor | None,
    shard: VocabShard,
    *,
    with_entropy: bool,
) -> MergedStatistics:
    """Per-shard statistics (m', s', x', z[label]) and top-k candidates as those of the whole vocabulary; one all-gather."""
    topk_ids_NK = None if topk_columns_NK is None else torch.where(topk_columns_NK >= 0, topk_columns_NK + shard.start, -1)
    group = shard.process_group
    if group is not None and packed_4N.numel():
        packed_4N, topk_logits_NK, topk_ids_NK = _merge_ranks(packed_4N, topk_logits_NK, topk_ids_NK, group)
    max_N, sum_N, shifted_N, label_logit_N = packed_4N.unbind(0)
    log_sum_N = sum_N.log()
    # Subtracting the maximum first keeps the difference exact where logits are large and close together.
    logprobs_N = (label_logit_N - max_N) - log_sum_N
    entropy_N = log_sum_N - shifted_N / sum_N if with_entropy else None
    return MergedStatistics(logprobs_N, entropy_N, max_N + log_sum_N, topk_logits_NK, topk_ids_NK)


def _merge_ranks(packed_4N, topk_logits_NK, topk_ids_NK, group):
    rows, dtype = [packed_4N], packed_4N.dtype
    if topk_logits_NK is not None:
        # Ids travel as the bits of integers of the same width: a gather only copies.
        integers = torch.int64 if dtype == torch.float64 else torch.int32
        rows += [topk_logits_NK.t().to(dtype), topk_ids_NK.t().to(integers).contiguous().view(dtype)]
    mine_EN = torch.cat(rows).contiguous()
    gathered_REN = mine_EN.new_empty((dist.get_world_size(group), *mine_EN.shape))
    dist.all_gather(list(gathered_REN.unbind(0)), mine_EN, group=group)

    max_RN, sum_RN, shifted_RN, label_logit_RN = gathered_REN[:, :4].unbind(1)
    max_N = max_RN.amax(dim=0)
    # A shard without columns has m' = -inf and s' = 0: it contributes 0, not the NaN of -inf * 0.
    shift_RN = torch.where(max_RN.isneginf(), 0.0, max_RN - max_N)
    scale_RN = shift_RN.exp()
    merged_4N = torch.stack(
        [
            max_N,
            (sum_RN * scale_RN).sum(0),
            ((shifted_RN + shift_RN * sum_RN) * scale_RN).sum(0),
            label_logit_RN.sum(0),
        ]
    )
    if topk_logits_NK is None:
        return merged_4N, None, None
    k = topk_logits_NK.shape[1]
    logits_NC = gathered_REN[:, 4 : 4 + k].permute(2, 0, 1).flatten(1)
    ids_NC = gathered_REN[:, 4 + k :].contiguous().view(integers).permute(2, 0, 1).flatten(1)
    # Candidates stand in rank order, each rank's own descending: a stable sort breaks ties by the lower id.
    best_NC = logits_NC.argsort(dim=1, descending=True, stable=True)[:, :k]
    return merged_4N, logits_NC.gather(1, best_NC), ids_NC.gather(1, best_NC).long()


def sum_over_ranks(tensor: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """The tensor summed over the shards, in place."""
    if shard.group and tensor.numel():
        dist.all_reduce(tensor, group=shard.process_group)
    return tensor
