"""Estimators whose tokens differ: rewards-to-go, a critic's values, and turns; against recursions written out in Python."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.episodes import Episode, batches, by_token, few_rewards, inputs_of, outcomes
from skyrl_mega.algorithms.advantages import ADVANTAGES, compute_advantages
from skyrl_mega.algorithms.advantages.whitening import whitened
from skyrl_mega.config.schema import AlgorithmConfig
from skyrl_mega.errors import ConfigError

quickly = settings(max_examples=25, deadline=None)
unit = st.sampled_from([0.0, 0.5, 0.9, 1.0])


def advantages(name, episodes, **options):
    return by_token(ADVANTAGES.find(name).function(inputs_of(episodes), **options).advantages_T, episodes)


def flat(rows):
    return [value for row in rows for value in row]


def assert_rows(ours, expected, atol=1e-9):
    assert [len(row) for row in ours] == [len(row) for row in expected]
    np.testing.assert_allclose(flat(ours), flat(expected), rtol=1e-6, atol=atol)


def whiten(rows):
    tokens = flat(rows)
    mean, deviation = statistics.fmean(tokens), statistics.pstdev(tokens)
    return [[(x - mean) / (deviation + 1e-8) if max(tokens) > min(tokens) else 0.0 for x in row] for row in rows]


# ---- REINFORCE++ -----------------------------------------------------------------------------------------------------------


def rewards_to_go(episode, gamma):
    rewards = [r for tokens, reward in episode.turns for r in [0.0] * (tokens - 1) + [reward]]
    returns = [0.0]
    for reward in reversed(rewards):
        returns.append(reward + gamma * returns[-1])
    return returns[:0:-1]


@quickly
@given(batches(max_turns=3), unit)
def test_reinforce_plus_plus_whitens_rewards_to_go_over_the_batch(episodes, gamma):
    expected = whiten([rewards_to_go(episode, gamma) for episode in episodes])
    assert_rows(advantages("reinforce_plus_plus", episodes, gamma=gamma), expected, atol=1e-6)


def test_reinforce_plus_plus_of_a_worked_example():
    # Returns 1/2, 1 and 0, 0: mean 3/8, deviation sqrt(11) / 8.
    episodes = [Episode(0, [(2, 1.0)]), Episode(1, [(2, 0.0)])]
    ours = advantages("reinforce_plus_plus", episodes, gamma=0.5)
    assert_rows(ours, [[1 / 11**0.5, 5 / 11**0.5], [-3 / 11**0.5, -3 / 11**0.5]], atol=1e-6)


def test_whitening_has_mean_0_and_variance_1_and_leaves_masked_values_out():
    values = torch.tensor([1.0, 2.0, 99.0, 6.0], dtype=torch.float64)
    mask = torch.tensor([True, True, False, True])
    ours = whitened(values, mask)
    assert ours[2] == 0
    assert float(ours[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(ours[mask].var(correction=0)) == pytest.approx(1)
    # The mean of three times 0.1 is not 0.1: what is left over must not be divided by almost nothing.
    assert (whitened(torch.full((3,), 0.1, dtype=torch.float64)) == 0).all()
    assert whitened(values, torch.zeros(4, dtype=torch.bool)).tolist() == [0, 0, 0, 0]


# ---- GAE -------------------------------------------------------------------------------------------------------------------


def gae(episode, values, gamma, lam):
    """(advantages, returns) of the trained tokens; values of all tokens, and of the end."""
    index = episode.turn_index()
    rewards = [r for r, turn in zip(episode.token_rewards(), index, strict=True) if turn >= 0]
    own = [v for v, turn in zip(values, index, strict=False) if turn >= 0]
    advantage, after, results = 0.0, values[-1] if episode.truncated else 0.0, []
    for reward, value in zip(reversed(rewards), reversed(own), strict=True):
        advantage = reward + gamma * after - value + gamma * lam * advantage
        after = value
        results.append((advantage, advantage + value))
    return [a for a, _ in results[::-1]], [r for _, r in results[::-1]]


@st.composite
def with_values(draw):
    episodes = draw(batches(max_turns=3, max_samples=3))
    for episode in episodes:
        episode.truncated = draw(st.booleans())
    number = st.floats(-3, 3, width=32)
    values = [[draw(number) for _ in range(len(e.turn_index()) + 1)] for e in episodes]
    return episodes, values


@quickly
@given(with_values(), unit, unit)
def test_gae_is_its_recursion_over_trained_tokens(case, gamma, lam):
    episodes, values = case
    result = ADVANTAGES.find("gae").function(inputs_of(episodes, values=values), gamma=gamma, lam=lam)
    expected = [gae(e, v, gamma, lam) for e, v in zip(episodes, values, strict=True)]
    assert_rows(by_token(result.advantages_T, episodes), [a for a, _ in expected])
    assert_rows(by_token(result.returns_T, episodes), [r for _, r in expected])


@quickly
@given(with_values())
def test_with_gamma_and_lambda_1_advantages_are_returns_less_values(case):
    episodes, values = case
    result = ADVANTAGES.find("gae").function(inputs_of(episodes, values=values), gamma=1.0, lam=1.0)
    for episode, row, own in zip(episodes, by_token(result.advantages_T, episodes), values, strict=True):
        left = [v for v, turn in zip(own, episode.turn_index(), strict=False) if turn >= 0]
        to_go = rewards_to_go(episode, 1.0)
        end = own[-1] if episode.truncated else 0.0
        np.testing.assert_allclose(row, [g + end - v for g, v in zip(to_go, left, strict=True)], atol=1e-9)


def test_a_sample_that_was_cut_off_goes_on_with_the_critics_value_and_one_that_ended_does_not():
    episodes = [Episode(0, [(1, 1.0)], truncated=cut) for cut in (True, False)]
    result = ADVANTAGES.find("gae").function(inputs_of(episodes, values=[[9.0, 0.25, 0.5]] * 2), gamma=0.5, lam=1.0)
    assert by_token(result.advantages_T, episodes) == [[1.0 + 0.25 - 0.25], [1.0 - 0.25]]
    assert by_token(result.returns_T, episodes) == [[1.25], [1.0]]


@pytest.mark.parametrize("option", ["gamma", "lam"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_discounts_lie_between_0_and_1(option, value):
    with pytest.raises(ConfigError, match=rf"advantage_options.{option}` must be in \[0, 1\]; got"):
        ADVANTAGES.find("gae").function(inputs_of(outcomes([1.0]), values=[[0.0, 0.0, 0.0]]), **{option: value})


# ---- turns -----------------------------------------------------------------------------------------------------------------


def normalized(value, others):
    if max(others) == min(others):
        return 0.0
    return (value - statistics.fmean(others)) / (statistics.stdev(others) + 1e-6)


def turn_returns(episode, gamma):
    return [
        sum(gamma ** (s - t) * reward for s, (_, reward) in enumerate(episode.turns) if s >= t) for t in range(len(episode.turns))
    ]


def over_tokens(episode, of_turns):
    return [value for (tokens, _), value in zip(episode.turns, of_turns, strict=True) for _ in range(tokens)]


@quickly
@given(batches(max_turns=4), unit, st.sampled_from([0.0, 0.5]))
def test_turn_grpo_compares_rewards_to_go_at_the_same_turn(episodes, gamma, episode_coef):
    expected = []
    for episode in episodes:
        group = [other for other in episodes if other.group == episode.group]
        of_turns = []
        for turn, value in enumerate(turn_returns(episode, gamma)):
            others = [turn_returns(other, gamma)[turn] for other in group if len(other.turns) > turn]
            whole = normalized(episode.reward, [other.reward for other in group])
            of_turns.append(normalized(value, others) + episode_coef * whole)
        expected.append(over_tokens(episode, of_turns))
    assert_rows(advantages("turn_grpo", episodes, gamma=gamma, episode_coef=episode_coef), expected, atol=1e-6)


@quickly
@given(batches(max_turns=4), st.booleans())
def test_step_grpo_compares_each_turns_reward_with_all_turns_of_the_group(episodes, to_go):
    expected = []
    for episode in episodes:
        pool = [reward for other in episodes if other.group == episode.group for _, reward in other.turns]
        own = [normalized(reward, pool) for _, reward in episode.turns]
        expected.append(over_tokens(episode, [sum(own[t:]) for t in range(len(own))] if to_go else own))
    assert_rows(advantages("step_grpo", episodes, to_go=to_go), expected, atol=1e-6)


@quickly
@given(batches(max_turns=4), unit, st.sampled_from([0.0, 0.5, 1.0]))
def test_gigpo_compares_turns_that_answer_the_same_observation(episodes, gamma, step_coef):
    def observed(episode):
        of_turn = dict(zip(episode.turn_index(), episode.states(), strict=True))
        return [of_turn[number] for number in range(len(episode.turns))]

    expected = []
    for episode in episodes:
        group = [other for other in episodes if other.group == episode.group]
        pools = {}
        for other in group:
            for state, value in zip(observed(other), turn_returns(other, gamma), strict=True):
                pools.setdefault(state, []).append(value)
        whole = normalized(episode.reward, [other.reward for other in group])
        own = [
            whole + step_coef * normalized(value, pools[state])
            for state, value in zip(observed(episode), turn_returns(episode, gamma), strict=True)
        ]
        expected.append(over_tokens(episode, own))
    assert_rows(advantages("gigpo", episodes, gamma=gamma, step_coef=step_coef), expected, atol=1e-6)


def test_the_states_of_gigpo_are_the_observations_in_the_samples_tokens():
    """Two episodes that meet the same observation in different turns are compared there."""
    episodes = [Episode(1, [(1, 0.0), (2, 1.0)]), Episode(1, [(1, 0.0), (1, 0.0), (2, 0.0)])]
    samples = [episode.sample(number) for number, episode in enumerate(episodes)]
    samples[0].token_ids = torch.tensor([7, 1, 9, 2, 3])
    samples[1].token_ids = torch.tensor([7, 1, 8, 5, 9, 6, 4])
    compute_advantages(samples, AlgorithmConfig(advantage="gigpo", advantage_options={"gamma": 1.0, "normalize_by_std": False}))
    assert samples[0].advantages.tolist() == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert samples[1].advantages.tolist() == [0.0, -1.0, 0.0, -0.5, 0.0, -1.0, -1.0]


@pytest.mark.parametrize("name", ["turn_grpo", "step_grpo"])
@quickly
@given(episodes=batches())
def test_in_episodes_of_one_turn_both_are_grpo(name, episodes):
    assert_rows(advantages(name, episodes), advantages("grpo", episodes))


@quickly
@given(batches(max_turns=3, rewards=few_rewards), st.randoms(use_true_random=False))
def test_permuting_episodes_permutes_the_advantages_of_turns(episodes, random):
    order = list(range(len(episodes)))
    random.shuffle(order)
    for name in ("turn_grpo", "step_grpo", "gigpo"):
        ours = advantages(name, episodes)
        assert_rows(advantages(name, [episodes[i] for i in order]), [ours[i] for i in order], atol=1e-7)


def test_turns_of_a_worked_example():
    # The first fails at once; the second's first turn helps, its second is the better of two.
    episodes = [Episode(3, [(1, 0.0)]), Episode(3, [(2, 0.0), (1, 1.0)]), Episode(3, [(1, 0.0), (1, 0.0)])]
    ours = advantages("turn_grpo", episodes, normalize_by_std=False)
    assert_rows(ours, [[-1 / 3], [2 / 3, 2 / 3, 1 / 2], [-1 / 3, -1 / 2]])
    ours = advantages("turn_grpo", episodes, gamma=0.0, normalize_by_std=False)
    assert_rows(ours, [[0.0], [0.0, 0.0, 1 / 2], [0.0, -1 / 2]])
    ours = advantages("step_grpo", episodes, normalize_by_std=False)
    assert_rows(ours, [[-0.2], [-0.2, -0.2, 0.8], [-0.2, -0.2]])
    ours = advantages("step_grpo", episodes, normalize_by_std=False, to_go=True)
    assert_rows(ours, [[-0.2], [0.6, 0.6, 0.8], [-0.4, -0.2]])
