"""GRPO advantages against formulas written out in numpy, and the properties every estimator must keep."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_mega.algorithms.advantages import compute_advantages
from skyrl_mega.algorithms.advantages.grpo import grpo
from skyrl_mega.algorithms.advantages.inputs import AdvantageInputs
from skyrl_mega.algorithms.registry import lookup
from skyrl_mega.config.schema import AlgorithmConfig
from skyrl_mega.errors import ConfigError, NumericsError
from skyrl_mega.types import TrainSample

rewards_lists = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8)
batches = st.lists(rewards_lists, min_size=1, max_size=5)


def of_rewards(rewards, group_index):
    """The inputs of samples of one token each."""
    count = len(rewards)
    return AdvantageInputs(
        group_index_N=group_index,
        cu_seqlens=torch.arange(count + 1),
        loss_mask=torch.ones(count, dtype=torch.bool),
        token_rewards_T=rewards.double(),
        turn_index_T=torch.zeros(count, dtype=torch.int64),
        truncated_N=torch.zeros(count, dtype=torch.bool),
        rollout_logprobs_T=torch.zeros(count, dtype=torch.float64),
    )


def grpo_advantages(rewards, group_index, **options):
    return grpo(of_rewards(rewards, group_index), **options).advantages_T


def flatten(groups):
    rewards = torch.tensor([r for group in groups for r in group], dtype=torch.float64)
    return rewards, torch.tensor([i for i, group in enumerate(groups) for _ in group])


def oracle(groups, *, normalize_by_std, eps):
    """The formula group by group, in numpy."""
    advantages = []
    for group in groups:
        rewards = np.array(group, dtype=np.float64)
        if len(group) == 1 or (rewards == rewards[0]).all():
            advantages.append(np.zeros(len(group)))
            continue
        advantage = rewards - rewards.mean()
        advantages.append(advantage / (rewards.std(ddof=1) + eps) if normalize_by_std else advantage)
    return np.concatenate(advantages)


def make_sample(index, group, reward, mask=(0, 1, 1)):
    mask = torch.tensor(mask, dtype=torch.bool)
    return TrainSample(index, group, f"g{group}", torch.arange(len(mask)), mask, torch.zeros(len(mask)), reward)


@settings(max_examples=100, deadline=None)
@given(batches, st.booleans())
def test_advantages_match_the_formula(groups, normalize_by_std):
    rewards, index = flatten(groups)
    ours = grpo_advantages(rewards, index, normalize_by_std=normalize_by_std, eps=1e-6)
    np.testing.assert_allclose(ours.numpy(), oracle(groups, normalize_by_std=normalize_by_std, eps=1e-6), rtol=1e-6, atol=1e-9)


def test_advantages_of_a_worked_example():
    # mean 0.5, squared deviations 4 x 0.25, unbiased variance 1/3.
    ours = grpo_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64), eps=0.0)
    torch.testing.assert_close(ours, torch.tensor([1.0, -1.0, -1.0, 1.0]).double() * 0.5 * 3**0.5)


@settings(max_examples=50, deadline=None)
@given(batches, st.randoms(use_true_random=False))
def test_permuting_samples_permutes_advantages(groups, random):
    rewards, index = flatten(groups)
    order = list(range(len(rewards)))
    random.shuffle(order)
    torch.testing.assert_close(
        grpo_advantages(rewards[order], index[order]), grpo_advantages(rewards, index)[order], rtol=1e-6, atol=1e-9
    )


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e6, 1e6), st.integers(1, 9))
def test_equal_rewards_give_exactly_zero(reward, size):
    # The mean of three times 0.1 is not 0.1: without care the advantage would be 1e-17 / 1e-6.
    assert (grpo_advantages(torch.full((size,), reward, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)) == 0).all()


@settings(max_examples=50, deadline=None)
@given(batches)
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(groups):
    rewards, index = flatten(groups)
    advantages = grpo_advantages(rewards, index)
    for number in range(len(groups)):
        own, own_rewards = advantages[index == number], rewards[index == number]
        assert abs(own.sum()) < 1e-6
        assert (own[own_rewards.argsort()].diff() >= 0).all()


def test_group_numbers_may_be_anything_in_any_order():
    rewards = torch.tensor([1.0, 5.0, 0.0, 7.0])
    ours = grpo_advantages(rewards, torch.tensor([90, -3, 90, -3]), eps=0.0)
    torch.testing.assert_close(ours, torch.tensor([0.5, -0.5, -0.5, 0.5]).double() * 2**0.5)


def test_samples_get_their_advantage_on_sampled_tokens_only():
    samples = [make_sample(0, 4, 1.0), make_sample(1, 4, 0.0, mask=(0, 0, 1, 0))]
    compute_advantages(samples, AlgorithmConfig(advantage_options={"normalize_by_std": False}))
    assert samples[0].advantages.tolist() == [0.0, 0.5, 0.5]
    assert samples[1].advantages.tolist() == [0.0, 0.0, -0.5, 0.0]
    assert samples[0].advantages.dtype == torch.float32


def test_no_samples_is_no_error():
    compute_advantages([], AlgorithmConfig())


def test_a_reward_that_is_not_a_number_is_named():
    with pytest.raises(NumericsError, match=r"1 of 2 are not, the first is nan \(group 'g4', sample 7\)"):
        compute_advantages([make_sample(6, 4, 1.0), make_sample(7, 4, float("nan"))], AlgorithmConfig())


def test_an_unknown_name_is_refused_with_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"algorithm.advantage \('grop'\) must be one of .*grpo.*Did you mean 'grpo'\?"):
        compute_advantages([make_sample(0, 0, 1.0)], AlgorithmConfig(advantage="grop"))
    with pytest.raises(ConfigError, match=r"must be one of alpha, beta\.$"):
        lookup({"beta": 1, "alpha": 2}, "zzz", "x")
