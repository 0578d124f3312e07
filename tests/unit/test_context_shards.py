"""Cutting micro-batches for context parallelism: nothing lost, nothing doubled, evenly divided."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.packs import make_pack, visible
from skyrl_mega.algorithms.reductions import Totals, reduction_weights
from skyrl_mega.data.context_shards import chunk_owners, context_part
from skyrl_mega.errors import DataError

SHARED = ([16, 5, 7, 4, 30, 6, 1], [-1, 0, 0, 0, -1, -1, 4])


def _parts(pack, size, **settings):
    return [context_part(pack, rank, size, **settings) for rank in range(size)]


def _long_tail(seed, count=48, longest=8192):
    """Lengths of which most are short and a few are near the limit, as of sampled answers."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randn(count, generator=generator).mul(1.1).add(5.5).exp().long()
    return lengths.clamp(1, longest).tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("pack", [([7, 33, 5, 20, 1, 90, 2], None), SHARED, ([1], None), ([3, 0, 2], None)])
def test_every_tensor_of_the_whole_is_found_in_the_parts(pack, size):
    pack = make_pack(*pack)
    parts = _parts(pack, size, pad_to_multiple=4)
    assert len({part.num_tokens for part in parts}) == 1
    assert parts[0].num_tokens % 4 == 0
    places = parts[0].context.key_places[: pack.num_tokens]
    for name in ("input_ids", "position_ids", "labels", "loss_mask", "rollout_logprobs", "advantages", "old_logprobs"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts])[places], getattr(pack, name)), name
    assert sum(int(part.loss_mask.sum()) for part in parts) == int(pack.loss_mask.sum()), "padding has no loss token"
    assert all(part.ref_logprobs is None for part in parts), "a pass that did not run has nothing to cut"
    for rank, part in enumerate(parts):
        assert int(part.cu_seqlens[-1]) == part.num_tokens
        assert part.max_seqlen == int(part.cu_seqlens.diff().max())
        assert torch.equal(part.context.key_places[: pack.num_tokens], places), "all ranks agree where rows lie"
        own = part.context.key_places[pack.num_tokens :]
        assert set(own.tolist()).isdisjoint(places.tolist())
        assert all(place // part.num_tokens == rank for place in own.tolist())


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_token_sees_in_its_part_what_it_sees_in_the_whole(size):
    pack = make_pack(*SHARED)
    sees = visible(pack)
    rows_seen = 0
    for rank, part in enumerate(_parts(pack, size)):
        c = part.context
        bounds = part.cu_seqlens.tolist()
        row_of_place = {place: row for row, place in enumerate(c.key_places[: pack.num_tokens].tolist())}
        for piece, (start, end) in enumerate(itertools.pairwise(bounds)):
            first, before = int(c.starts[piece]), int(c.before[piece])
            if first == pack.num_tokens:
                continue
            trunk = range(int(c.trunk_starts[piece]), int(c.trunk_starts[piece] + c.trunk_lengths[piece]))
            for local in range(start, end):
                row = row_of_place[rank * part.num_tokens + local]
                seen = {*trunk, *range(first - before, first + local - start + 1)}
                assert seen == set(sees[row].nonzero().squeeze(1).tolist())
                rows_seen += 1
    assert rows_seen == pack.num_tokens


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("lengths", [[22] * 93, [1] * 7, [5, 3, 2, 1, 1, 1], [1000, 1, 1], _long_tail(1)])
def test_ranks_differ_by_at_most_one_token_and_only_that_is_padded(lengths, size):
    pack = make_pack(lengths)
    tokens = torch.bincount(chunk_owners(pack, size), minlength=size)
    assert int(tokens.max() - tokens.min()) <= 1
    padded = sum(part.num_tokens for part in _parts(pack, size))
    assert padded - sum(lengths) < size


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("lengths", "bound"), [*((_long_tail(seed), 1.005) for seed in range(4)), ([22] * 96, 1.03)])
def test_attention_work_is_even_over_ranks(lengths, bound, shared, size):
    prefixes = [-1 if i % 8 == 0 else i // 8 * 8 for i in range(len(lengths))] if shared else None
    pack = make_pack(lengths, prefixes)
    pairs = pack.position_ids + 1  # the keys that a token sees: its trunk, what is before it, and itself
    work = torch.zeros(size, dtype=torch.int64).index_add_(0, chunk_owners(pack, size), pairs)
    assert float(work.max() / work.double().mean()) <= bound


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_loss_weights_of_the_parts_are_those_of_the_whole(reduction):
    pack = make_pack(*SHARED)

    def weights(batch):
        counts = batch.loss_tokens_per_sequence
        return reduction_weights(reduction, batch.loss_mask, batch.cu_seqlens, counts, None, Totals(61, 7, 7))

    parts = _parts(pack, 3)
    places = parts[0].context.key_places[: pack.num_tokens]
    assert torch.equal(torch.cat([weights(part) for part in parts])[places], weights(pack))


def test_one_rank_computes_the_micro_batch_as_it_is():
    pack = make_pack([4, 5])
    assert context_part(pack, 0, 1, pad_to_multiple=8) is pack


def test_a_rank_that_does_not_exist_is_refused():
    with pytest.raises(DataError, match=r"0..size - 1, but is 2 of 2"):
        context_part(make_pack([4]), 2, 2)
