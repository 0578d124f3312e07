"""Sums over sequences: values, gradients, and parts of sequences on several ranks as one."""

import torch

from skyrl_mega.algorithms.sequences import Sequences

CU_SEQLENS = torch.tensor([0, 3, 3, 7], dtype=torch.int32)


def test_sums_means_and_their_way_back_to_tokens():
    sequences = Sequences.packed(CU_SEQLENS)
    values, mask = torch.arange(7.0), torch.tensor([1, 0, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert sequences.sum(values).tolist() == [3.0, 0.0, 18.0]
    assert sequences.mean(values, mask).tolist() == [1.0, 0.0, 3.5]
    assert sequences.spread(torch.tensor([5.0, 6.0, 7.0])).tolist() == [5.0] * 3 + [7.0] * 4


def test_padding_has_no_part_whatever_it_holds():
    sequences = Sequences(torch.tensor([0, 0, 1, -1]), 2)
    values = torch.tensor([1.0, 2.0, 3.0, torch.nan], requires_grad=True)
    sums = sequences.sum(values)
    assert sums.tolist() == [3.0, 3.0]
    (sums * torch.tensor([2.0, 5.0])).sum().backward()
    assert values.grad.tolist() == [2.0, 2.0, 5.0, 0.0]
    assert sequences.spread(torch.tensor([1.0, 2.0])).tolist() == [1.0, 1.0, 2.0, 0.0]


def test_ranks_that_share_sequences_add_their_sums():
    halves = [torch.tensor([1.0, 2.0, 4.0]), torch.tensor([8.0, 16.0])]
    other = Sequences(torch.tensor([0, 1]), 3).sum(halves[1])
    mine = Sequences(torch.tensor([0, 0, 2]), 3, all_reduce=lambda sums: sums + other)
    assert mine.sum(halves[0]).tolist() == [11.0, 16.0, 4.0]
    assert mine.mean(halves[0], torch.ones(3, dtype=torch.bool)).shape == (3,)


def test_no_sequence_at_all():
    nothing = Sequences.packed(torch.tensor([0], dtype=torch.int32))
    assert nothing.sum(torch.zeros(0)).shape == (0,)
    assert nothing.spread(torch.zeros(0)).shape == (0,)
