"""Samples that meet in one loss stay together, and what they share is computed once."""

from __future__ import annotations

import pytest
import torch

from skyrl_mega.data.context_shards import context_part
from skyrl_mega.data.examples import Example, TokenSequence, samples_of
from skyrl_mega.data.packing import balance_and_pack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import DataError


def pack(samples, *, budget=64, rank=0, size=1, share=True):
    return balance_and_pack(
        samples,
        tokens_per_micro_batch=budget,
        dp_rank=rank,
        dp_size=size,
        skip_zero_advantage=False,
        share_prompts=share,
        keep_groups=True,
    )


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_a_pair_is_in_one_micro_batch_one_after_the_other(share, size):
    samples = random_samples(13, 2, seed=4)
    seen = []
    for rank in range(size):
        for micro_batch in pack(samples, rank=rank, size=size, share=share).micro_batches:
            index = [i for i in micro_batch.sample_index.tolist() if i >= 0]
            assert index[0::2] == [i - 1 for i in index[1::2]]
            assert all(i % 2 == 0 for i in index[0::2])
            assert micro_batch.num_tokens <= 64
            seen += index
    assert sorted(seen) == list(range(26))


def test_what_a_pair_shares_is_computed_once_up_to_the_first_trained_token():
    # Three prompt tokens, and answers that begin alike: the first of their tokens is trained, and so each has its own.
    pair = (TokenSequence.of([5, 6, 7, 8, 9], [0, 0, 0, 1, 1]), TokenSequence.of([5, 6, 7, 8, 4], [0, 0, 0, 1, 1]))
    (micro_batch,) = pack(samples_of([Example("x:1", pair)])).micro_batches
    assert micro_batch.input_ids.tolist() == [5, 6, 7, 8, 7, 8]
    assert micro_batch.labels.tolist() == [0, 0, 8, 9, 8, 4]
    assert micro_batch.prefix_segments.tolist() == [-1, 0, 0]
    assert micro_batch.sample_index.tolist() == [-1, 0, 1]
    # Where only the end is read, the answers' common beginning is shared too.
    scored = tuple(TokenSequence.of([*ids, ids[-1]], [0] * len(ids) + [1]) for ids in ([5, 6, 7, 8, 9], [5, 6, 7, 8, 4]))
    (micro_batch,) = pack(samples_of([Example("x:1", scored)])).micro_batches
    assert micro_batch.input_ids.tolist() == [5, 6, 7, 8, 9, 8, 4]
    assert micro_batch.loss_mask.tolist() == [False] * 4 + [True] + [False, True]


def test_a_pair_without_a_common_beginning_stays_together_too():
    pair = (TokenSequence.of([5, 6, 7], [0, 1, 1]), TokenSequence.of([8, 9], [0, 1]))
    (micro_batch,) = pack(samples_of([Example("x:1", pair)])).micro_batches
    assert micro_batch.input_ids.tolist() == [5, 6, 7, 8, 9]
    assert micro_batch.prefix_segments is None


def test_a_pair_that_no_micro_batch_holds_is_an_error():
    pair = (TokenSequence.of([5] * 30, [0] * 29 + [1]), TokenSequence.of([6] * 30, [0] * 29 + [1]))
    with pytest.raises(DataError, match=r"group 'x:1' has 60 tokens, .* trainer\.tokens_per_micro_batch"):
        pack(samples_of([Example("x:1", pair)]), budget=50)


def test_a_context_ranks_part_still_names_every_sequence():
    (micro_batch,) = pack(random_samples(2, 2, seed=1), budget=200).micro_batches
    for rank in range(4):
        part = context_part(micro_batch, rank, 4)
        assert torch.equal(part.context.sample_index, micro_batch.sample_index)
