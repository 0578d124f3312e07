"""Packed, balanced micro-batches from samples: the one place that turns token-aligned into label-aligned.

Within a sequence of L tokens, position t predicts token t + 1: `labels[t] = token_ids[t + 1]`, and what was said of token
t + 1 (loss_mask, rollout_logprobs, advantages) moves to position t. Position L - 1 has no label: mask False, label 0.

The batch is arranged in three steps, by every rank for all ranks: pieces go to data-parallel ranks by estimated cost; each
rank's pieces go to micro-batches under the token budget; all ranks then take the largest count of micro-batches any of them
needs, since their collectives must match. A rank with fewer pieces than that runs a tiny padding sequence.

A piece is one sample, or, with shared prompts, the samples of a group that begin with the same prompt (`data.clusters`):

    trunk       p0 p1 ... p(n-2)                      no labels
    branch i    p(n-1) r0 r1 ... r(m-2)               labels r0 r1 ... r(m-1), attends to the trunk and to itself

A group of G samples with prompt length n and responses of length m costs n - 1 + G m tokens instead of G (n + m).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from skyrl_mega.data.balance import ATTENTION_COST, even_bins, even_out, first_fit_decreasing, karmarkar_karp
from skyrl_mega.data.clusters import Cluster, Segment, families, inseparable, padding_segment, split
from skyrl_mega.data.routing import UNKNOWN_EXPERT
from skyrl_mega.data.samples import split_updates, to_samples
from skyrl_mega.errors import DataError
from skyrl_mega.types import MicroBatch, TrainBatch, TrainSample

#: How much of a rank's fair share one piece may cost, tried in this order until the ranks are balanced.
SPLITS = (math.inf, 1 / 2, 1 / 3, 1 / 4, 1 / 6, 1 / 8, 1 / 12, 1 / 16, 1 / 32)
#: The ranks are balanced when the busiest has at most so many fair shares: those of the groups unsplit.
BALANCED = 1.01
#: Single pieces change ranks until the busiest has at most so many means.
EVEN = 1.005

__all__ = ["balance_and_pack", "pack_rows", "split_updates", "to_samples", "unpack", "unpack_states"]


def balance_and_pack(
    samples: Sequence[TrainSample],
    *,
    tokens_per_micro_batch: int,
    dp_rank: int,
    dp_size: int,
    skip_zero_advantage: bool,
    share_prompts: bool = False,
    keep_groups: bool = False,
    pad_to_multiple: int = 1,
    micro_batch_multiple: int = 1,
    attention_cost: float = ATTENTION_COST,
) -> TrainBatch:
    """The TrainBatch of data-parallel rank `dp_rank`: the same arrangement on whichever rank it is computed.

    `samples` are all samples of one update, with advantages. With `skip_zero_advantage`, samples whose advantages are zero
    at every loss token are left out of compute and still counted in the normalisers; if that is all of them, no rank has a
    micro-batch. `share_prompts` computes a prompt once for the samples of its group; it changes no result, and needs an
    attention that knows `MicroBatch.prefix_segments`. `keep_groups` never separates the samples of a group: they are in one
    micro-batch, one after the other, in their order. `pad_to_multiple` lengthens each micro-batch by a padding sequence (for
    sequence parallelism), `micro_batch_multiple` rounds their number up (for the interleaved pipeline). No communication.
    Raises DataError for a sample without advantages or longer than the token budget, or a group that is kept and is longer.
    """
    if not 0 <= dp_rank < dp_size:
        raise DataError(f"dp_rank must lie in 0..dp_size - 1, but is {dp_rank} of {dp_size}.")
    capacity = tokens_per_micro_batch // pad_to_multiple * pad_to_multiple
    for sample in samples:
        _check(sample, capacity, tokens_per_micro_batch, pad_to_multiple)
    computed = [s for s in samples if not (skip_zero_advantage and _is_zero(s))]

    pieces = _pieces(computed, capacity, share_prompts=share_prompts, keep_groups=keep_groups)
    may_split = share_prompts and not keep_groups
    arrangement = _assign(pieces, capacity, dp_size, may_split, attention_cost, micro_batch_multiple)
    mine = arrangement.per_rank[dp_rank]
    group_tokens: dict[int, int] = {}
    for sample in samples:
        group_tokens[sample.group_index] = group_tokens.get(sample.group_index, 0) + sample.num_loss_tokens
    tokens_of_group = {sample.sample_index: group_tokens[sample.group_index] for sample in samples}
    micro_batches = [_pack([mine[i] for i in members], pad_to_multiple, tokens_of_group) for members in arrangement.bins[dp_rank]]

    rank_costs = [sum(costs) for costs in arrangement.costs]
    total = sum(m.num_tokens for m in micro_batches)
    return TrainBatch(
        micro_batches=micro_batches,
        num_loss_tokens=sum(s.num_loss_tokens for s in samples),
        num_sequences=len(samples),
        num_groups=len(group_tokens),
        num_skipped=len(samples) - len(computed),
        padding_fraction=1.0 - sum(piece.num_tokens for piece in mine) / total if total else 0.0,
        imbalance=1.0 - sum(rank_costs) / dp_size / max(rank_costs) if computed else 0.0,
    )


@dataclass(frozen=True)
class _Arrangement:
    """Each rank's pieces, their costs, and its micro-batches as lists of indices of its pieces."""

    per_rank: list[list[Cluster]]
    costs: list[list[float]]
    bins: list[list[list[int]]]


def _pieces(samples: Sequence[TrainSample], capacity: int, *, share_prompts: bool, keep_groups: bool) -> list[Cluster]:
    """What is arranged, as large as it may be."""
    if not keep_groups:
        return families(samples) if share_prompts else [Cluster((sample,)) for sample in samples]
    groups = inseparable(samples, share_prompts=share_prompts)
    for group in groups:
        if group.num_tokens > capacity:
            raise DataError(
                f"group {group.samples[0].group_id!r} has {group.num_tokens} tokens, which must be in one micro-batch, more than"
                f" trainer.tokens_per_micro_batch holds ({capacity}). Raise it."
            )
    return groups


def _assign(
    whole: Sequence[Cluster],
    capacity: int,
    dp_size: int,
    may_split: bool,
    attention_cost: float,
    micro_batch_multiple: int,
) -> _Arrangement:
    """Which rank computes what, for all ranks.

    A group that shares its prompt is one piece as long as that is balanced; where it is not, groups are split further and
    further, each part computing the prompt again, and the arrangement with the least loaded busiest rank is taken.
    """
    fair_share = sum(piece.cost(attention_cost) for piece in whole) / dp_size
    best: tuple[float, list[Cluster], list[float], list[list[int]]] | None = None
    for share in SPLITS if may_split and dp_size > 1 else SPLITS[:1]:
        pieces = [part for piece in whole for part in split(piece, capacity, share * fair_share, attention_cost)]
        if best is not None and len(pieces) == len(best[1]):
            continue
        costs = [piece.cost(attention_cost) for piece in pieces]
        parts = even_out(karmarkar_karp(costs, dp_size), costs, until=EVEN)
        busiest = max(sum(costs[i] for i in part) for part in parts)
        if best is None or busiest < best[0]:
            best = busiest, pieces, costs, parts
        if busiest <= BALANCED * fair_share:
            break
    assert best is not None  # the first split was tried
    _, pieces, costs, parts = best
    costs_of = [[costs[i] for i in part] for part in parts]
    lengths_of = [[pieces[i].num_tokens for i in part] for part in parts]
    bins = _arrange(lengths_of, costs_of, capacity, micro_batch_multiple)
    return _Arrangement([[pieces[i] for i in part] for part in parts], costs_of, bins)


def _check(sample: TrainSample, capacity: int, tokens_per_micro_batch: int, pad_to_multiple: int) -> None:
    name = f"sample {sample.sample_index} of group {sample.group_id!r}"
    if sample.advantages is None or sample.advantages.shape != sample.token_ids.shape:
        shape = None if sample.advantages is None else tuple(sample.advantages.shape)
        raise DataError(f"{name} needs advantages of shape [{sample.num_tokens}] before packing, but has {shape}.")
    if sample.num_tokens > capacity:
        rounded = f", rounded down to a multiple of {pad_to_multiple}: {capacity}" if pad_to_multiple > 1 else ""
        enough = -(-sample.num_tokens // pad_to_multiple) * pad_to_multiple
        raise DataError(
            f"{name} has {sample.num_tokens} tokens, more than trainer.tokens_per_micro_batch "
            f"({tokens_per_micro_batch}{rounded}). Raise it to at least {enough}, or lower rollout.max_model_len."
        )


def _is_zero(sample: TrainSample) -> bool:
    assert sample.advantages is not None  # _check has seen it
    return not bool(sample.advantages[sample.loss_mask].any())


def _arrange(
    lengths_per_rank: Sequence[Sequence[int]], costs_per_rank: Sequence[Sequence[float]], capacity: int, multiple: int = 1
) -> list[list[list[int]]]:
    """For each rank, its items in bins: the same number on every rank, a multiple of `multiple`, as even as capacity allows.

    Costliest first, so that ranks that wait for each other in every micro-batch have alike ones at the same time.
    """
    fewest = [first_fit_decreasing(lengths, capacity) for lengths in lengths_per_rank]
    count = -(-max(len(bins) for bins in fewest) // multiple) * multiple
    arranged: list[list[list[int]]] = []
    for lengths, costs, bins in zip(lengths_per_rank, costs_per_rank, fewest, strict=True):
        even: list[list[int]] | None = karmarkar_karp(costs, count) if count else []
        if even and any(sum(lengths[i] for i in members) > capacity for members in even):
            even = even_bins(lengths, count, capacity)
        chosen = bins + [[] for _ in range(count - len(bins))] if even is None else even
        arranged.append(sorted((sorted(members) for members in chosen), key=lambda m: (-sum(costs[i] for i in m), m)))
    return arranged


def _pack(members: Sequence[Cluster], pad_to_multiple: int, tokens_of_group: Mapping[int, int]) -> MicroBatch:
    """One micro-batch of the pieces; without any, or where T must be lengthened, a padding sequence at the end.

    tokens_of_group: sample_index -> loss tokens of all samples of its group.
    """
    num_tokens = sum(piece.num_tokens for piece in members)
    padding = (-num_tokens) % pad_to_multiple if members else -(-2 // pad_to_multiple) * pad_to_multiple
    segments: list[Segment] = []
    for piece in members:
        first = len(segments)
        segments += [replace(s, prefix=first if s.prefix is not None else None) for s in piece.segments()]
    if padding:
        segments.append(padding_segment(padding))
    shares = any(segment.prefix is not None for segment in segments)

    def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(tensors)

    def optional(name: str) -> torch.Tensor | None:
        if not any(name in segment.optional for segment in segments):
            return None
        return joined([s.optional.get(name, torch.zeros(s.num_tokens)) for s in segments])

    def routing() -> torch.Tensor | None:
        known = next((s.routed_experts for s in segments if s.routed_experts is not None), None)
        if known is None:
            return None
        absent = known.new_full((1, *known.shape[1:]), UNKNOWN_EXPERT)
        return joined([absent.expand(s.num_tokens, -1, -1) if s.routed_experts is None else s.routed_experts for s in segments])

    lengths = [segment.num_tokens for segment in segments]
    return MicroBatch(
        input_ids=joined([s.input_ids for s in segments]),
        position_ids=joined([torch.arange(s.num_tokens) + s.position for s in segments]),
        labels=joined([s.labels for s in segments]),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        max_seqlen=max(lengths),
        loss_mask=joined([s.loss_mask for s in segments]),
        rollout_logprobs=joined([s.rollout_logprobs for s in segments]),
        advantages=joined([s.advantages for s in segments]),
        sample_index=torch.tensor([s.sample_index for s in segments], dtype=torch.int64),
        loss_tokens_per_sequence=torch.tensor([float(s.loss_mask.sum()) for s in segments], dtype=torch.float32),
        loss_tokens_per_group=torch.tensor([tokens_of_group.get(s.sample_index, 0) for s in segments], dtype=torch.float32),
        staleness=optional("staleness"),
        old_logprobs=optional("old_logprobs"),
        ref_logprobs=optional("ref_logprobs"),
        values=optional("values"),
        returns=optional("returns"),
        marked=optional("marked"),
        routed_experts=routing(),
        prefix_segments=torch.tensor([-1 if s.prefix is None else s.prefix for s in segments]) if shares else None,
    )


def unpack(values: Sequence[torch.Tensor], batch: TrainBatch, samples: Sequence[TrainSample]) -> list[torch.Tensor]:
    """Label-aligned [T] values of each micro-batch as one token-aligned [L] tensor per sample, in the order of `samples`.

    Entry t of a row speaks of token t; entry 0 is 0. The inverse of packing. `samples` are samples of this rank's batch.
    Raises DataError if shapes do not match, or a sample is not in the batch (it is another rank's, or was skipped).
    """
    if len(values) != len(batch.micro_batches):
        raise DataError(f"{len(values)} tensors of values were given for {len(batch.micro_batches)} micro-batches.")
    lengths = {s.sample_index: s.num_tokens for s in samples}
    rows: dict[int, torch.Tensor] = {}
    for values_T, micro_batch in zip(values, batch.micro_batches, strict=True):
        if values_T.shape != micro_batch.input_ids.shape:
            raise DataError(f"values have shape {tuple(values_T.shape)}, their micro-batch {tuple(micro_batch.input_ids.shape)}.")
        bounds = micro_batch.cu_seqlens.tolist()
        for index, start, end in zip(micro_batch.sample_index.tolist(), bounds[:-1], bounds[1:], strict=True):
            if index in lengths:
                # A whole sample fills its sequence and its last position has no label; a branch speaks of its last tokens.
                spoken = values_T[start : end - 1] if end - start == lengths[index] else values_T[start:end]
                rows[index] = torch.cat([values_T.new_zeros(lengths[index] - spoken.numel()), spoken])
    missing = [s.sample_index for s in samples if s.sample_index not in rows]
    if missing:
        raise DataError(f"samples {missing[:8]} are not in this rank's batch, which holds {len(rows)} samples.")
    return [rows[s.sample_index] for s in samples]


def unpack_states(values: Sequence[torch.Tensor], batch: TrainBatch, samples: Sequence[TrainSample]) -> list[torch.Tensor]:
    """Values [T] of every position of each micro-batch as one [L + 1] tensor per sample: those of the states between its tokens.

    Entry t is that of the state before token t, entry L of the state after the last token; entry 0, before any token, is 0. The
    batch must hold whole samples (packed without shared prompts). Raises DataError if it does not.
    """
    lengths = {s.sample_index: s.num_tokens for s in samples}
    rows: dict[int, torch.Tensor] = {}
    for values_T, micro_batch in zip(values, batch.micro_batches, strict=True):
        bounds = micro_batch.cu_seqlens.tolist()
        for index, start, end in zip(micro_batch.sample_index.tolist(), bounds[:-1], bounds[1:], strict=True):
            if index in lengths and end - start == lengths[index]:
                rows[index] = torch.cat([values_T.new_zeros(1), values_T[start:end]])
    missing = [s.sample_index for s in samples if s.sample_index not in rows]
    if missing:
        raise DataError(f"samples {missing[:8]} are not whole in this rank's batch, which holds {len(rows)} whole samples.")
    return [rows[s.sample_index] for s in samples]


def unpack_routing(batch: TrainBatch) -> dict[int, torch.Tensor]:
    """routed_experts of each sample of the batch, int16 [L, layers, K] by sample_index; {} where the batch has none.

    -1 for the last token of a sample on a shared prompt, which is not computed.
    """
    rows: dict[int, torch.Tensor] = {}
    for micro_batch in batch.micro_batches:
        if micro_batch.routed_experts is None:
            continue
        bounds = micro_batch.cu_seqlens.tolist()
        segments = [micro_batch.routed_experts[start:end] for start, end in itertools.pairwise(bounds)]
        trunks = [-1] * len(segments) if micro_batch.prefix_segments is None else micro_batch.prefix_segments.tolist()
        for index, trunk, own in zip(micro_batch.sample_index.tolist(), trunks, segments, strict=True):
            if index >= 0:
                last = own.new_full((1, *own.shape[1:]), UNKNOWN_EXPERT)
                rows[index] = own if trunk < 0 else torch.cat([segments[trunk], own, last])
    return rows


def pack_rows(rows: Mapping[int, torch.Tensor], batch: TrainBatch) -> list[torch.Tensor]:
    """Token-aligned values ([L] or [L, K] by sample_index, of any dtype) as one label-aligned [T] or [T, K] per micro-batch.

    The undoing of `unpack`. Entries where loss_mask is False are 0. Raises DataError if a sample of the batch has no row.
    """
    packed = []
    example = next(iter(rows.values()), torch.zeros(0))
    for micro_batch in batch.micro_batches:
        values_T = example.new_zeros(micro_batch.num_tokens, *example.shape[1:])
        bounds = micro_batch.cu_seqlens.tolist()
        for index, start, end in zip(micro_batch.sample_index.tolist(), bounds[:-1], bounds[1:], strict=True):
            if index < 0:
                continue
            if index not in rows:
                raise DataError(f"sample {index} is in the batch and has no row of values; {len(rows)} samples have one.")
            # A whole sample fills its sequence and its last position has no label; a branch speaks of its last tokens.
            spoken = rows[index][1:] if end - start == len(rows[index]) else rows[index][start - end :]
            values_T[start : start + len(spoken)] = spoken
        values_T[~micro_batch.loss_mask] = 0
        packed.append(values_T)
    return packed
