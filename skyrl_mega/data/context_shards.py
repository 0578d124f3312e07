"""One context-parallel rank's part of a micro-batch: which tokens it computes, and what their attention needs to know.

Every sequence is cut into 2 C chunks for C ranks, and one rank takes chunks i and 2C - 1 - i: under a causal mask the work of a
chunk grows with its place, and so every such pair costs the same (as in Llama 3's training, arXiv:2407.21783 section 3.3.2).

    a sequence, C = 2     | 0 | 1 | 2 | 3 |     one rank: chunks 0 and 3     the other: chunks 1 and 2, which are one piece

Chunks need not be equal, because every rank gets all keys and values: those of one sequence differ by at most one token, and no
sequence is padded to a multiple of 2 C (ring attention asks for that; it costs up to 2 C - 1 tokens of every sequence, a lot
where answers are short). The larger pairs of a sequence go to the ranks with fewer tokens so far, and among equal ones the pair
with more attention work to the rank with less, so that the ranks' totals differ by at most one token. Only that is padded, and
what tensor parallelism asks for.

A micro-batch with shared prompts is cut the same way: each trunk and each branch is a sequence.

Shape letters: T tokens, S sequences, P pieces of one rank, N tokens of each rank, C context-parallel ranks.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from skyrl_mega.data.clusters import OPTIONAL, PADDING_TOKEN
from skyrl_mega.data.routing import UNKNOWN_EXPERT
from skyrl_mega.errors import DataError
from skyrl_mega.types import ContextPart, MicroBatch

#: What a micro-batch may hold for each token besides what every one has.
PER_TOKEN = (*OPTIONAL, "teacher_topk_ids", "teacher_topk_logprobs")


def context_part(micro_batch: MicroBatch, rank: int, size: int, *, pad_to_multiple: int = 1) -> MicroBatch:
    """What context-parallel rank `rank` of `size` computes of a micro-batch on CPU; with one rank the micro-batch itself.

    Every rank's part has the same number of tokens, a multiple of `pad_to_multiple`; a padding sequence at the end makes up for
    what is missing. `reduction_weights` of the parts are those of the whole. No communication.
    Raises DataError for a rank outside 0..size - 1.
    """
    if not 0 <= rank < size:
        raise DataError(f"rank must lie in 0..size - 1, but is {rank} of {size}.")
    if size == 1:
        return micro_batch
    owner_T = chunk_owners(micro_batch, size)
    tokens_C = torch.bincount(owner_T, minlength=size)
    num_tokens = -(-int(tokens_C.max()) // pad_to_multiple) * pad_to_multiple
    rows_N = (owner_T == rank).nonzero().squeeze(1)
    padding = num_tokens - rows_N.numel()
    lengths_P, sequence_P, context = _pieces(micro_batch, rows_N, padding, _key_places(owner_T, tokens_C, num_tokens, rank))

    def take(values_T: torch.Tensor, fill: float = 0) -> torch.Tensor:
        return torch.cat([values_T[rows_N], torch.full((padding, *values_T.shape[1:]), fill, dtype=values_T.dtype)])

    def take_optional(values_T: torch.Tensor | None) -> torch.Tensor | None:
        return None if values_T is None else take(values_T)

    def of_sequence(values_S: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.where(sequence_P < 0, torch.tensor(fill, dtype=values_S.dtype), values_S[sequence_P])

    return replace(
        micro_batch,
        input_ids=take(micro_batch.input_ids, PADDING_TOKEN),
        position_ids=torch.cat([micro_batch.position_ids[rows_N], torch.arange(padding)]),
        labels=take(micro_batch.labels),
        cu_seqlens=torch.cat([lengths_P.new_zeros(1), lengths_P.cumsum(0)]).int(),
        max_seqlen=int(lengths_P.max()),
        loss_mask=take(micro_batch.loss_mask),
        rollout_logprobs=take(micro_batch.rollout_logprobs),
        advantages=take(micro_batch.advantages),
        sample_index=of_sequence(micro_batch.sample_index, -1),
        loss_tokens_per_sequence=of_sequence(micro_batch.loss_tokens_per_sequence, 0),
        loss_tokens_per_group=(
            None if micro_batch.loss_tokens_per_group is None else of_sequence(micro_batch.loss_tokens_per_group, 0)
        ),
        prefix_segments=None,
        routed_experts=None if micro_batch.routed_experts is None else take(micro_batch.routed_experts, UNKNOWN_EXPERT),
        **{name: take_optional(getattr(micro_batch, name)) for name in PER_TOKEN},
        context=context,
    )


def chunk_owners(micro_batch: MicroBatch, size: int) -> torch.Tensor:
    """int64 [T]: the rank that computes each token; ranks differ by at most one token (see the module's docstring)."""
    lengths = micro_batch.cu_seqlens.diff().tolist()
    trunks = [-1] * len(lengths) if micro_batch.prefix_segments is None else micro_batch.prefix_segments.tolist()
    tokens, work = [0] * size, [0] * size
    owners, chunk_lengths = [], []
    for length, trunk in zip(lengths, trunks, strict=True):
        chunks = [length // (2 * size) + (i < length % (2 * size)) for i in range(2 * size)]
        before = itertools.accumulate(chunks, initial=lengths[trunk] if trunk >= 0 else 0)
        seen = [n * n_before + n * (n + 1) // 2 for n, n_before in zip(chunks, before, strict=False)]
        pair_tokens, pair_work = ([x[i] + x[-1 - i] for i in range(size)] for x in (chunks, seen))
        # Pairs differ by at most one token: the larger ones to the ranks with fewer tokens, and so no rank gets ahead by two.
        pairs = sorted(range(size), key=lambda i: (-pair_tokens[i], -pair_work[i]))
        ranks = sorted(range(size), key=lambda rank: (tokens[rank], work[rank]))
        owner = [0] * size
        for pair, rank in zip(pairs, ranks, strict=True):
            owner[pair] = rank
            tokens[rank] += pair_tokens[pair]
            work[rank] += pair_work[pair]
        owners += owner + owner[::-1]
        chunk_lengths += chunks
    return torch.tensor(owners).repeat_interleave(torch.tensor(chunk_lengths))


def _key_places(owner_T: torch.Tensor, tokens_C: torch.Tensor, num_tokens: int, rank: int) -> torch.Tensor:
    """int64: where each key row (the whole micro-batch's, then this rank's padding) lies among all ranks' rows end to end."""
    by_rank = owner_T.argsort(stable=True)
    within_rank = torch.arange(owner_T.numel()) - (tokens_C.cumsum(0) - tokens_C).repeat_interleave(tokens_C)
    places = torch.empty_like(owner_T)
    places[by_rank] = owner_T[by_rank] * num_tokens + within_rank
    return torch.cat([places, torch.arange(rank * num_tokens + int(tokens_C[rank]), (rank + 1) * num_tokens)])


def _pieces(
    micro_batch: MicroBatch, rows_N: torch.Tensor, padding: int, key_places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, ContextPart]:
    """(lengths [P], sequence [P] or -1 for padding, what attention needs) of the runs of adjacent tokens in `rows_N`."""
    cu_seqlens = micro_batch.cu_seqlens.long()
    lengths_S = cu_seqlens.diff()
    sequence_N = torch.repeat_interleave(lengths_S)[rows_N]
    is_first = torch.ones_like(rows_N, dtype=torch.bool)
    is_first[1:] = (rows_N.diff() != 1) | (sequence_N.diff() != 0)
    starts, sequence = rows_N[is_first], sequence_N[is_first]
    before = starts - cu_seqlens[sequence]
    trunk = torch.full_like(sequence, -1) if micro_batch.prefix_segments is None else micro_batch.prefix_segments[sequence]
    trunk_starts = torch.where(trunk < 0, 0, cu_seqlens[trunk])
    trunk_lengths = torch.where(trunk < 0, 0, lengths_S[trunk])
    lengths = torch.cat([is_first.nonzero().squeeze(1), torch.tensor([rows_N.numel()])]).diff()
    num_tokens = int(cu_seqlens[-1])

    def with_padding(values_P: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat([values_P, values_P.new_tensor([value])]) if padding else values_P

    context = ContextPart(
        num_tokens=num_tokens,
        key_places=key_places,
        starts=with_padding(starts, num_tokens),
        before=with_padding(before, 0),
        trunk_starts=with_padding(trunk_starts, 0),
        trunk_lengths=with_padding(trunk_lengths, 0),
        sequence=with_padding(sequence, -1),
        num_sequences=lengths_S.numel(),
        sample_index=micro_batch.sample_index,
    )
    return with_padding(lengths, padding), with_padding(sequence, -1), context
