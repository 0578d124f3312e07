"""Packing and balancing: labels aligned, nothing lost, the same on every rank, and inverted exactly."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch

from skyrl_mega.data.balance import even_bins, even_out, first_fit_decreasing, karmarkar_karp, sequence_cost
from skyrl_mega.data.packing import _arrange, balance_and_pack, pack_rows, split_updates, to_samples, unpack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import DataError, RolloutError
from skyrl_mega.types import StopReason, TrainSample, Trajectory, TrajectoryGroup, Turn


def sample(index, token_ids, mask, advantages, logprobs=None) -> TrainSample:
    return TrainSample(
        sample_index=index,
        group_index=index,
        group_id=f"g{index}",
        token_ids=torch.tensor(token_ids),
        loss_mask=torch.tensor(mask, dtype=torch.bool),
        rollout_logprobs=torch.tensor(logprobs or [-0.5 * m for m in mask]),
        reward=1.0,
        advantages=torch.tensor(advantages, dtype=torch.float32),
    )


def pack(samples, budget=64, rank=0, size=1, skip=False, **options):
    return balance_and_pack(
        samples, tokens_per_micro_batch=budget, dp_rank=rank, dp_size=size, skip_zero_advantage=skip, **options
    )


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_are_the_next_tokens_and_everything_else_moves_with_them():
    first = sample(0, [11, 12, 13, 14], [0, 0, 1, 1], [9.0, 9.0, 2.0, 3.0], [0.0, 0.0, -0.1, -0.2])
    second = sample(1, [21, 22, 23], [0, 1, 0], [0.0, -1.0, 0.0], [0.0, -0.3, 0.0])
    [micro] = pack([first, second]).micro_batches
    assert micro.input_ids.tolist() == [11, 12, 13, 14, 21, 22, 23]
    assert micro.labels.tolist() == [12, 13, 14, 0, 22, 23, 0]
    assert micro.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert micro.cu_seqlens.tolist() == [0, 4, 7]
    assert micro.max_seqlen == 4
    assert micro.loss_mask.tolist() == [False, True, True, False, True, False, False]
    assert micro.advantages.tolist() == [0.0, 2.0, 3.0, 0.0, -1.0, 0.0, 0.0]  # 9.0 of unsampled tokens is not carried
    assert torch.allclose(micro.rollout_logprobs, torch.tensor([0.0, -0.1, -0.2, 0.0, -0.3, 0.0, 0.0]))
    assert micro.sample_index.tolist() == [0, 1]
    assert micro.loss_tokens_per_sequence.tolist() == [2.0, 1.0]


def test_dtypes_are_as_the_types_document():
    [micro] = pack([sample(0, [1, 2], [0, 1], [0.0, 1.0])], pad_to_multiple=4).micro_batches
    for name, dtype in {
        "input_ids": torch.int64,
        "position_ids": torch.int64,
        "labels": torch.int64,
        "cu_seqlens": torch.int32,
        "loss_mask": torch.bool,
        "rollout_logprobs": torch.float32,
        "advantages": torch.float32,
        "sample_index": torch.int64,
        "loss_tokens_per_sequence": torch.float32,
    }.items():
        assert vars(micro)[name].dtype == dtype, name


@pytest.mark.parametrize(("size", "multiple", "budget"), [(1, 1, 64), (2, 1, 40), (3, 4, 40), (4, 8, 200)])
def test_unpacking_inverts_packing_for_every_layout(size, multiple, budget):
    samples = random_samples(7, 5, seed=size)
    returned: dict[int, torch.Tensor] = {}
    for rank in range(size):
        batch = pack(samples, budget, rank, size, pad_to_multiple=multiple)
        mine = [samples[i] for m in batch.micro_batches for i in m.sample_index.tolist() if i >= 0]
        rows = unpack([m.rollout_logprobs for m in batch.micro_batches], batch, mine)
        masks = unpack([m.loss_mask for m in batch.micro_batches], batch, mine)
        labels = unpack([m.labels for m in batch.micro_batches], batch, mine)
        for s, row, mask, label in zip(mine, rows, masks, labels, strict=True):
            assert torch.equal(row, s.rollout_logprobs)
            assert torch.equal(mask, s.loss_mask)
            assert torch.equal(label[1:], s.token_ids[1:])
            assert s.sample_index not in returned, "a sample is on two ranks"
            returned[s.sample_index] = row
    assert sorted(returned) == list(range(len(samples)))


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_rows_are_packed_as_the_packer_packs_them(share_prompts, size):
    samples = random_samples(4, 3)
    rows = {s.sample_index: s.rollout_logprobs for s in samples}
    for rank in range(size):
        batch = pack(samples, rank=rank, size=size, share_prompts=share_prompts, pad_to_multiple=4)
        for packed, micro in zip(pack_rows(rows, batch), batch.micro_batches, strict=True):
            assert torch.equal(packed, micro.rollout_logprobs)
    with pytest.raises(DataError, match=r"sample \d+ is in the batch and has no row"):
        pack_rows({}, batch)


def test_unpack_refuses_samples_of_another_rank_and_wrong_shapes():
    samples = random_samples(2, 2)
    batch = pack(samples, rank=0, size=2)
    values = [m.advantages for m in batch.micro_batches]
    with pytest.raises(DataError, match="are not in this rank's batch"):
        unpack(values, batch, samples)
    with pytest.raises(DataError, match="values have shape"):
        unpack([v[:-1] for v in values], batch, [])
    with pytest.raises(DataError, match="0 tensors of values were given for 1 micro-batches"):
        unpack([], batch, [])


# -- balance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_rank_has_the_same_number_of_micro_batches_within_the_budget(size):
    samples = random_samples(5, 6, seed=3)
    batches = [pack(samples, 48, rank, size) for rank in range(size)]
    assert len({len(b.micro_batches) for b in batches}) == 1
    assert all(m.num_tokens <= 48 for b in batches for m in b.micro_batches)
    assert len({b.imbalance for b in batches}) == 1
    assert {b.num_loss_tokens for b in batches} == {sum(s.num_loss_tokens for s in samples)}
    assert {b.num_sequences for b in batches} == {30}


def test_arrangement_is_a_function_of_the_samples_alone():
    one, other = (pack(random_samples(5, 6, seed=3), 48, 1, 2) for _ in range(2))
    for left, right in zip(one.micro_batches, other.micro_batches, strict=True):
        assert torch.equal(left.input_ids, right.input_ids)
        assert torch.equal(left.sample_index, right.sample_index)


def test_ranks_get_nearly_equal_cost():
    samples = random_samples(32, 8, seed=1, max_len=200)
    batch = pack(samples, 4096, 0, 4)
    assert 0.0 <= batch.imbalance < 0.01
    costs = [
        sum(
            sequence_cost(samples[i].num_tokens) for m in pack(samples, 4096, r, 4).micro_batches for i in m.sample_index.tolist()
        )
        for r in range(4)
    ]
    assert batch.imbalance == pytest.approx(1 - sum(costs) / 4 / max(costs), abs=1e-12)


def test_a_rank_without_samples_runs_a_padding_sequence_that_trains_nothing():
    batch = pack([sample(0, [5, 6, 7], [0, 1, 1], [0.0, 1.0, 1.0])], rank=1, size=2)
    idle = (
        batch
        if batch.micro_batches[0].sample_index.tolist() == [-1]
        else pack([sample(0, [5, 6, 7], [0, 1, 1], [0.0, 1.0, 1.0])], rank=0, size=2)
    )
    [micro] = idle.micro_batches
    assert micro.sample_index.tolist() == [-1]
    assert micro.cu_seqlens.tolist() == [0, 2]
    assert not micro.loss_mask.any()
    assert micro.loss_tokens_per_sequence.tolist() == [0.0]
    assert idle.padding_fraction == 1.0
    assert (idle.num_loss_tokens, idle.num_sequences) == (2, 1)
    assert idle.imbalance == 0.5


@pytest.mark.parametrize("multiple", [2, 3, 8])
def test_micro_batches_are_lengthened_to_the_multiple_by_a_padding_sequence(multiple):
    samples = random_samples(4, 3, seed=5)
    batch = pack(samples, 50, 0, 2, pad_to_multiple=multiple)
    for micro in batch.micro_batches:
        assert micro.num_tokens % multiple == 0
        assert micro.num_tokens <= 50
        assert micro.cu_seqlens[-1] == micro.num_tokens == len(micro.labels) == len(micro.position_ids)
        assert len(micro.cu_seqlens) == len(micro.sample_index) + 1 == len(micro.loss_tokens_per_sequence) + 1
    real = sum(samples[i].num_tokens for m in batch.micro_batches for i in m.sample_index.tolist() if i >= 0)
    total = sum(m.num_tokens for m in batch.micro_batches)
    assert batch.padding_fraction == pytest.approx(1 - real / total)


def grouped_samples(num_groups: int, group_size: int, prompt: int, responses: random.Random) -> list[TrainSample]:
    """Groups with a common prompt and lognormal response lengths."""
    samples = []
    for group in range(num_groups):
        for _ in range(group_size):
            response = max(1, min(400, round(30 * responses.lognormvariate(0, 1))))
            mask = [0] * prompt + [1] * response
            one = sample(len(samples), [group + 1] * prompt + [5] * response, mask, [float(m) for m in mask])
            samples.append(dataclasses.replace(one, group_index=group))
    return samples


def micro_batch_cost(micro) -> float:
    lengths, prefixes = micro.cu_seqlens.diff().tolist(), [-1] * len(micro.sample_index)
    if micro.prefix_segments is not None:
        prefixes = micro.prefix_segments.tolist()
    trunks = [lengths[prefix] if prefix >= 0 else 0 for prefix in prefixes]
    return sum(sequence_cost(t + n) - sequence_cost(t) for t, n in zip(trunks, lengths, strict=True))


@pytest.mark.parametrize(("num_groups", "size"), [(16, 2), (16, 4), (16, 8), (16, 16)])
def test_groups_too_coarse_for_the_ranks_are_split_until_those_are_balanced(num_groups, size):
    samples = grouped_samples(num_groups, 8, 20, random.Random(0))
    batches = [pack(samples, 4096, rank, size, share_prompts=True) for rank in range(size)]
    costs = [sum(micro_batch_cost(m) for m in batch.micro_batches) for batch in batches]
    assert max(costs) <= 1.02 * sum(costs) / size
    assert batches[0].imbalance == pytest.approx(1 - sum(costs) / size / max(costs), abs=1e-9)
    # Every sample once, and no more prompts computed than balance takes: far fewer than one per sample.
    held = sorted(i for b in batches for m in b.micro_batches for i in m.sample_index.tolist() if i >= 0)
    assert held == list(range(len(samples)))
    prompts = sum(int((m.position_ids == 0).sum()) for b in batches for m in b.micro_batches)
    assert num_groups <= prompts <= 3 * num_groups


def test_a_group_that_fits_stays_whole():
    samples = grouped_samples(8, 8, 20, random.Random(1))
    batch = pack(samples, 4096, 0, 1, share_prompts=True)
    assert sum(int((m.sample_index == -1).sum()) for m in batch.micro_batches) == 8  # one trunk per group


def test_micro_batches_of_all_ranks_are_alike_index_by_index():
    samples = grouped_samples(64, 4, 10, random.Random(2))
    costs = [[micro_batch_cost(m) for m in pack(samples, 512, rank, 4).micro_batches] for rank in range(4)]
    assert len(costs[0]) >= 4
    lockstep = sum(max(column) for column in zip(*costs, strict=True))
    assert lockstep <= 1.03 * sum(map(sum, costs)) / 4
    assert all(row == sorted(row, reverse=True) for row in costs)


# -- skipping ----------------------------------------------------------------------------------------------------------


def test_zero_advantage_samples_leave_compute_but_not_the_normalisers():
    samples = [
        sample(0, [1, 2, 3], [0, 1, 1], [0.0, 0.0, 0.0]),
        sample(1, [4, 5, 6], [0, 1, 1], [0.0, 0.5, 0.5]),
        sample(2, [7, 8], [0, 1], [3.0, 0.0]),  # its only advantage is not on a loss token
    ]
    batch = pack(samples, skip=True)
    assert [m.sample_index.tolist() for m in batch.micro_batches] == [[1]]
    assert (batch.num_loss_tokens, batch.num_sequences, batch.num_skipped) == (5, 3, 2)
    kept = pack(samples, skip=False)
    assert [m.sample_index.tolist() for m in kept.micro_batches] == [[0, 1, 2]]
    assert (kept.num_loss_tokens, kept.num_sequences, kept.num_skipped) == (5, 3, 0)


def test_a_batch_of_zero_advantages_has_no_micro_batch_on_any_rank():
    samples = [sample(i, [1, 2], [0, 1], [0.0, 0.0]) for i in range(3)]
    for rank in range(2):
        batch = pack(samples, rank=rank, size=2, skip=True)
        assert batch.micro_batches == []
        assert (batch.num_loss_tokens, batch.num_sequences, batch.num_skipped) == (3, 3, 3)
        assert (batch.padding_fraction, batch.imbalance) == (0.0, 0.0)


def test_what_can_not_be_packed_says_why():
    with pytest.raises(DataError, match=r"has 5 tokens, more than trainer.tokens_per_micro_batch \(4\).*at least 5"):
        pack([sample(0, [1] * 5, [0, 1, 1, 1, 1], [1.0] * 5)], budget=4)
    with pytest.raises(DataError, match=r"\(6, rounded down to a multiple of 4: 4\). Raise it to at least 8"):
        pack([sample(0, [1] * 5, [0, 1, 1, 1, 1], [1.0] * 5)], budget=6, pad_to_multiple=4)
    without = sample(0, [1, 2], [0, 1], [0.0, 0.0])
    without.advantages = None
    with pytest.raises(DataError, match="needs advantages of shape"):
        pack([without])
    with pytest.raises(DataError, match="dp_rank must lie in"):
        pack([], rank=2, size=2)


# -- the partition algorithms against brute force ------------------------------------------------------------------------


def smallest_maximum(costs, k):
    """The best possible largest sum of k parts, by trying every assignment."""
    assignments = itertools.product(range(k), repeat=len(costs))
    return min(max(sum(c for c, p in zip(costs, parts, strict=True) if p == j) for j in range(k)) for parts in assignments)


@pytest.mark.parametrize(("k", "bound"), [(1, 1), (2, 7 / 6), (3, 11 / 9)])
def test_karmarkar_karp_is_within_its_proven_bound_of_the_best_partition(k, bound):
    generator = random.Random(k)
    for _ in range(12):
        costs = [generator.randint(1, 60) for _ in range(generator.randint(1, 8))]
        parts = karmarkar_karp(costs, k)
        assert sorted(i for part in parts for i in part) == list(range(len(costs)))
        assert len(parts) == k
        assert max(sum(costs[i] for i in part) for part in parts) <= bound * smallest_maximum(costs, k) + 1e-9


def test_karmarkar_karp_finds_known_partitions():
    assert sorted(sum([8, 7, 6, 5, 4][i] for i in p) for p in karmarkar_karp([8, 7, 6, 5, 4], 2)) == [
        14,
        16,
    ]  # Karmarkar-Karp's own
    assert karmarkar_karp([5.0] * 6, 3) == karmarkar_karp([5.0] * 6, 3)
    assert sorted(len(p) for p in karmarkar_karp([5.0] * 6, 3)) == [2, 2, 2]
    assert karmarkar_karp([], 2) == [[], []]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_even_out_keeps_every_item_and_never_raises_the_maximum(k):
    generator = random.Random(k)
    improved = 0
    for _ in range(30):
        costs = [generator.lognormvariate(3, 1) for _ in range(4 * k)]
        order = generator.sample(range(len(costs)), len(costs))
        parts = [order[j::k] for j in range(k)]
        evened = even_out(parts, costs, until=1.0)
        assert sorted(i for part in evened for i in part) == list(range(len(costs)))
        before, after = (max(sum(costs[i] for i in part) for part in split) for split in (parts, evened))
        assert after <= before * (1 + 1e-12)
        improved += after < 0.9 * before
        assert evened == even_out(parts, costs, until=1.0)
    assert improved > 15


def test_even_out_moves_and_swaps_where_one_exchange_is_enough():
    assert even_out([[0, 1], []], [3.0, 3.0], until=1.0) == [[1], [0]]  # a move
    assert even_out([[0, 1], [2, 3]], [9.0, 1.0, 5.0, 3.0], until=1.0) == [[0], [1, 2, 3]]
    assert even_out([[0, 1], [2]], [4.0, 4.0, 2.0], until=2.0) == [[0, 1], [2]]  # good enough
    assert even_out([[], []], [], until=1.0) == [[], []]


def test_first_fit_decreasing_is_within_its_proven_bound_of_the_fewest_bins():
    generator = random.Random(0)
    for _ in range(12):
        lengths = [generator.randint(5, 50) for _ in range(generator.randint(1, 7))]
        bins = first_fit_decreasing(lengths, 50)
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in b) <= 50 for b in bins)
        fewest = next(k for k in range(1, 8) if smallest_maximum(lengths, k) <= 50)
        assert len(bins) <= 11 / 9 * fewest + 6 / 9
    assert len(first_fit_decreasing([6, 5, 5, 4], 10)) == 2
    with pytest.raises(ValueError, match="exceeds the capacity 4"):
        first_fit_decreasing([5], 4)


def test_even_bins_are_even_or_refused():
    assert sorted(sum([4, 3, 2, 1][i] for i in b) for b in even_bins([4, 3, 2, 1], 2, 5)) == [5, 5]
    assert even_bins([3, 3, 2, 2, 2], 2, 6) is None  # greedy gives 7; first-fit decreasing packs 6 + 6
    assert len(first_fit_decreasing([3, 3, 2, 2, 2], 6)) == 2


def test_every_rank_has_as_many_bins_as_the_fullest_even_where_spreading_them_overflows():
    tight = [6] * 5 + [4] * 19 + [3] * 8 + [2]  # first-fit decreasing needs 11 bins of 12; spreading overflows even 12
    assert len(first_fit_decreasing(tight, 12)) == 11
    assert even_bins(tight, 12, 12) is None
    assert max(sum(tight[i] for i in part) for part in karmarkar_karp(tight, 12)) > 12
    ranks = [tight, [12] * 12, [5], []]
    arranged = _arrange(ranks, ranks, 12)
    assert [len(bins) for bins in arranged] == [12, 12, 12, 12]
    for lengths, bins in zip(ranks, arranged, strict=True):
        assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in members) <= 12 for members in bins)


# -- samples and updates -------------------------------------------------------------------------------------------------


def trajectory(**changes) -> Trajectory:
    fields = dict(
        token_ids=[1, 2, 3],
        loss_mask=[0, 1, 1],
        rollout_logprobs=[0.0, -0.5, -1.0],
        policy_versions=[-1, 4, 4],
        turns=(Turn(1, 3, StopReason.STOP, 1.0),),
        reward=1.0,
        terminated=True,
        truncated=False,
    )
    return Trajectory(**{**fields, **changes})


def test_samples_are_numbered_in_order_and_carry_the_tokens():
    groups = [TrajectoryGroup("a", "p", (trajectory(), trajectory(reward=0.0))), TrajectoryGroup("b", "q", (trajectory(),))]
    samples = to_samples(groups)
    assert [(s.sample_index, s.group_index, s.group_id, s.reward) for s in samples] == [
        (0, 0, "a", 1.0),
        (1, 0, "a", 0.0),
        (2, 1, "b", 1.0),
    ]
    assert samples[0].token_ids.tolist() == [1, 2, 3]
    assert samples[0].loss_mask.tolist() == [False, True, True]
    assert samples[0].rollout_logprobs.tolist() == [0.0, -0.5, -1.0]
    assert (samples[0].token_ids.dtype, samples[0].rollout_logprobs.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss_mask": [0, 1]}, DataError, "loss_mask has 2 entries for 3 tokens"),
        ({"policy_versions": [-1]}, DataError, "policy_versions has 1 entries"),
        ({"loss_mask": [0, 0, 0]}, DataError, "none to train"),
        ({"loss_mask": [1, 1, 1]}, DataError, r"loss_mask\[0\] must be 0"),
        ({"loss_mask": [0, 2, 1]}, DataError, "0 and 1 only"),
        ({"rollout_logprobs": [0.0, float("nan"), -1.0]}, RolloutError, r"rollout_logprobs\[1\] is nan"),
        ({"rollout_logprobs": [0.0, -0.5, float("-inf")]}, RolloutError, r"rollout_logprobs\[2\] is -inf"),
        ({"rollout_logprobs": [0.0, 0.5, -1.0]}, RolloutError, "at most 0"),
        ({"rollout_logprobs": [-0.2, -0.5, -1.0]}, DataError, "any other has version -1 and logprob 0.0"),
        ({"policy_versions": [-1, -1, 4]}, DataError, "a sampled token has a version >= 0"),
        ({"reward": float("inf")}, DataError, "reward is inf"),
    ],
)
def test_a_broken_trajectory_is_refused(changes, error, message):
    with pytest.raises(error, match=f"trajectory 1 of group 'a'.*{message}"):
        to_samples([TrajectoryGroup("a", "p", (trajectory(), trajectory(**changes)))])


def test_a_group_twice_or_empty_is_refused():
    with pytest.raises(DataError, match="comes twice"):
        to_samples([TrajectoryGroup("a", "p", (trajectory(),))] * 2)
    with pytest.raises(DataError, match="has no trajectory"):
        to_samples([TrajectoryGroup("a", "p", ())])


def test_updates_are_whole_groups_in_order():
    samples = random_samples(6, 3)
    parts = split_updates(samples, 3)
    assert [[s.group_index for s in part] for part in parts] == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3], [4, 4, 4, 5, 5, 5]]
    assert [s for part in parts for s in part] == samples
    with pytest.raises(DataError, match=r"number of groups \(6\) must be divisible by trainer.updates_per_step \(4\)"):
        split_updates(samples, 4)
