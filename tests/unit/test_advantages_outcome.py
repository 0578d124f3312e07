"""Estimators that give a whole sample one advantage, against their papers' formulas in plain Python, and what they all keep."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.episodes import Episode, batches, inputs_of, outcomes, per_sample
from skyrl_mega.algorithms.advantages import ADVANTAGES
from skyrl_mega.errors import ConfigError, DataError

quickly, briefly = settings(max_examples=25, deadline=None), settings(max_examples=12, deadline=None)


def advantages(name, episodes, **options):
    return per_sample(ADVANTAGES.find(name).function(inputs_of(episodes), **options).advantages_T, episodes)


def group_of(episode, episodes):
    return [other for other in episodes if other.group == episode.group]


# ---- oracles: the papers' formulas, sample by sample -----------------------------------------------------------------------


def rloo(episode, episodes):
    others = [other.reward for other in group_of(episode, episodes) if other is not episode]
    return episode.reward - statistics.fmean(others) if others else 0.0


def opo(episode, episodes):
    group = group_of(episode, episodes)
    baseline = sum(other.trained * other.reward for other in group) / sum(other.trained for other in group)
    return episode.reward - baseline


def gpg(episode, episodes):
    groups = [group_of(one, episodes) for one in episodes]
    with_signal = sum(len({one.reward for one in group}) > 1 for group in groups)
    own = [one.reward for one in group_of(episode, episodes)]
    return (episode.reward - statistics.fmean(own)) * len(episodes) / with_signal if len(set(own)) > 1 else 0.0


def maxrl(episode, episodes):
    mean = statistics.fmean(other.reward for other in group_of(episode, episodes))
    return (episode.reward - mean) / mean if mean > 0 else 0.0


def remax(episode, episodes):
    return episode.reward - episode.greedy


def reinforce_plus_plus_baseline(episode, episodes):
    def centred(one):
        return one.reward - statistics.fmean(other.reward for other in group_of(one, episodes))

    tokens = [centred(one) for one in episodes for _ in range(one.trained)]
    deviation = statistics.pstdev(tokens)
    return (centred(episode) - statistics.fmean(tokens)) / (deviation + 1e-8) if deviation > 1e-12 else 0.0


def grpo_passk(episode, episodes):
    rewards = sorted(other.reward for other in group_of(episode, episodes))
    if len(rewards) == 1 or episode.reward < rewards[-1]:
        return 0.0
    return (rewards[-1] - rewards[-2]) / (statistics.stdev(rewards) + 1e-6)


def pass_at_k(episode, episodes, k):
    """Every subset of k as an attempt, one after the other."""
    group = group_of(episode, episodes)
    if len(group) <= k:
        return 0.0
    attempts = list(itertools.combinations(group, k))
    best = [max(one.reward for one in attempt) for attempt in attempts]
    deviation = statistics.pstdev(best)
    with_it = [b for b, attempt in zip(best, attempts, strict=True) if any(one is episode for one in attempt)]
    return (statistics.fmean(with_it) - statistics.fmean(best)) / deviation if deviation > 1e-12 else 0.0


ORACLES = {function.__name__: function for function in (rloo, opo, gpg, maxrl, remax, reinforce_plus_plus_baseline, grpo_passk)}


@pytest.mark.parametrize("name", ORACLES)
@quickly
@given(episodes=batches())
def test_advantages_are_the_formulas(name, episodes):
    expected = [ORACLES[name](episode, episodes) for episode in episodes]
    np.testing.assert_allclose(advantages(name, episodes), expected, rtol=1e-6, atol=1e-9)


@quickly
@given(batches(max_samples=7), st.integers(1, 4))
def test_pass_at_k_is_the_mean_over_all_subsets(episodes, k):
    expected = [pass_at_k(episode, episodes, k) for episode in episodes]
    np.testing.assert_allclose(advantages("pass_at_k", episodes, k=k), expected, rtol=1e-6, atol=1e-8)


@quickly
@given(st.integers(2, 8), st.integers(0, 8), st.integers(1, 7))
def test_pass_at_k_of_right_and_wrong_answers_is_the_papers_closed_form(count, right, k):
    right, k = min(right, count), min(k, count - 1)
    wrong = count - right

    def choose(n, m):
        return float(np.prod([(n - i) / (m - i) for i in range(m)])) if 0 <= m <= n else 0.0

    mean = 1 - choose(wrong, k) / choose(count, k)
    deviation = (mean * (1 - mean)) ** 0.5
    ours = advantages("pass_at_k", outcomes([1.0] * right + [0.0] * wrong), k=k)
    if deviation < 1e-9:
        assert ours == [0.0] * count
        return
    of_right = (1 - mean) / deviation
    of_wrong = (1 - mean - choose(wrong - 1, k - 1) / choose(count - 1, k - 1)) / deviation
    np.testing.assert_allclose(ours, [of_right] * right + [of_wrong] * wrong, atol=1e-9)


def test_pass_at_k_has_the_gradient_of_pass_at_k():
    # A policy that is right with probability p = sigmoid(x): d/dx log p(right) = 1 - p, d/dx log p(wrong) = -p. The mean over all
    # outcomes of 5 samples of (sum of advantage x gradient) / 5, divided by (1 - k/n) / k, is d/dx [1 - (1 - p)^k] exactly.
    n, k, p = 5, 2, 0.3
    total = 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=n):
        probability = np.prod([p if reward else 1 - p for reward in outcome])
        ours = advantages("pass_at_k", outcomes(list(outcome)), k=k, normalize_by_std=False)
        total += probability * np.mean([a * (1 - p if reward else -p) for a, reward in zip(ours, outcome, strict=True)])
    assert total / ((1 - k / n) / k) == pytest.approx(k * (1 - p) ** (k - 1) * p * (1 - p), rel=1e-12)


def test_maxrl_has_the_gradient_of_the_truncated_log_likelihood():
    # The sum of (d/dx pass@k) / k for k below the number of samples: d/dx pass@k = k (1 - p)^(k - 1) p (1 - p).
    n, p = 4, 0.25
    total = 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=n):
        probability = np.prod([p if reward else 1 - p for reward in outcome])
        ours = advantages("maxrl", outcomes(list(outcome)))
        total += probability * np.mean([a * (1 - p if reward else -p) for a, reward in zip(ours, outcome, strict=True)])
    series = sum((1 - p) ** (k - 1) * p * (1 - p) for k in range(1, n))
    assert total == pytest.approx(series, rel=1e-12)


# ---- worked examples -------------------------------------------------------------------------------------------------------


def test_worked_examples():
    four = outcomes([1.0, 0.0, 0.0, 0.0])
    assert advantages("rloo", four) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    assert advantages("maxrl", four) == pytest.approx([3, -1, -1, -1])
    assert advantages("grpo_passk", four, eps=0.0) == pytest.approx([2, 0, 0, 0])
    # Pass@2 is 1/2 with deviation 1/2; each wrong answer is in 3 attempts, of which the right one saves 1.
    assert advantages("pass_at_k", four, k=2) == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])
    lengths = [Episode(0, [(1, 1.0)]), Episode(0, [(3, 0.0)])]
    assert advantages("opo", lengths) == pytest.approx([0.75, -0.25])
    # Centred: +-1/2 and 0; 4 tokens at each: deviation of (1/2, -1/2, 0, 0) x 2 tokens is sqrt(1/8).
    batch = outcomes([1.0, 0.0], [1.0, 1.0], tokens=2)
    assert advantages("reinforce_plus_plus_baseline", batch) == pytest.approx([2**0.5, -(2**0.5), 0, 0])
    greedy = [replace(episode, greedy=0.25) for episode in outcomes([1.0, 0.0])]
    assert advantages("remax", greedy) == [0.75, -0.25]


def test_gdpo_keeps_apart_what_a_sum_would_mix():
    # Both groups have the sums 1, 0: to GRPO they are alike. In the first two components agree, in the second only one is there.
    parts = [(0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 0.0)]
    episodes = [
        Episode(n // 2, [(1, sum(pair))], components={"format": pair[0], "answer": pair[1]}) for n, pair in enumerate(parts)
    ]
    assert advantages("grpo", episodes, eps=0.0) == pytest.approx([0.5**0.5, -(0.5**0.5)] * 2)
    # Normalised and added: +-sqrt(2) and +-sqrt(1/2); divided by the batch's deviation sqrt((2 + 1/2) / 2).
    ours = advantages("gdpo", episodes, eps=0.0)
    assert ours == pytest.approx([x / 1.25**0.5 for x in (2**0.5, -(2**0.5), 0.5**0.5, -(0.5**0.5))])
    only_answer = advantages("gdpo", episodes, weights={"answer": 3.0}, eps=0.0)
    assert only_answer == pytest.approx([2**0.5, -(2**0.5), 0, 0])


@quickly
@given(batches(), st.randoms(use_true_random=False))
def test_gdpo_is_its_formula(episodes, random):
    weights = {"a": 1.0, "b": -0.5}
    episodes = [replace(e, components={"a": e.reward, "b": random.choice([0.0, 2.0])}) for e in episodes]
    sums = []
    for episode in episodes:
        total = 0.0
        for name, weight in weights.items():
            values = [other.components[name] for other in group_of(episode, episodes)]
            if len(set(values)) > 1:
                deviation = statistics.stdev(values) + 1e-6
                total += weight * (episode.components[name] - statistics.fmean(values)) / deviation
        sums.append(total)
    deviation = statistics.pstdev(sums)
    expected = [(s - statistics.fmean(sums)) / deviation if deviation > 1e-12 else 0.0 for s in sums]
    np.testing.assert_allclose(advantages("gdpo", episodes, weights=weights), expected, rtol=1e-5, atol=1e-6)


# ---- what they all keep ----------------------------------------------------------------------------------------------------

GROUPED = ["grpo", "dr_grpo", "gpg", "rloo", "opo", "maxrl", "grpo_passk", "pass_at_k", "reinforce_plus_plus_baseline"]


@pytest.mark.parametrize("name", [*GROUPED, "remax", "reinforce_plus_plus"])
@briefly
@given(episodes=batches(), random=st.randoms(use_true_random=False))
def test_permuting_samples_permutes_advantages(name, episodes, random):
    options = {"k": 2} if name == "pass_at_k" else {}
    order = list(range(len(episodes)))
    random.shuffle(order)
    ours = advantages(name, episodes, **options)
    permuted = advantages(name, [episodes[i] for i in order], **options)
    np.testing.assert_allclose(permuted, [ours[i] for i in order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [*GROUPED, "turn_grpo", "step_grpo", "gigpo", "reinforce_plus_plus"])
@briefly
@given(reward=st.floats(0, 1e6), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_equal_rewards_give_exactly_zero(name, reward, sizes):
    episodes = [Episode(number, [(1 + i % 3, reward)]) for number, size in enumerate(sizes) for i in range(size)]
    assert set(advantages(name, episodes)) == {0.0}


@pytest.mark.parametrize("name", ["dr_grpo", "rloo", "opo", "remax"])
@briefly
@given(episodes=batches(), factor=st.sampled_from([0.25, 3.0]))
def test_advantages_without_a_division_grow_with_rewards(name, episodes, factor):
    scaled = [replace(e, turns=[(n, factor * r) for n, r in e.turns], greedy=factor * e.greedy) for e in episodes]
    expected = [factor * a for a in advantages(name, episodes)]
    np.testing.assert_allclose(advantages(name, scaled), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["maxrl", "pass_at_k", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
@briefly
@given(episodes=batches(rewards=st.sampled_from([0.0, 0.5, 1.0])), factor=st.sampled_from([0.25, 3.0]))
def test_advantages_with_a_division_do_not_see_the_scale_of_rewards(name, episodes, factor):
    scaled = [replace(e, turns=[(n, factor * r) for n, r in e.turns]) for e in episodes]
    options = {"k": 2} if name == "pass_at_k" else {}
    np.testing.assert_allclose(advantages(name, scaled, **options), advantages(name, episodes, **options), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in GROUPED if name not in ("reinforce_plus_plus_baseline", "gpg")])
@briefly
@given(episodes=batches())
def test_a_group_knows_nothing_of_other_groups(name, episodes):
    own = [e for e in episodes if e.group == episodes[0].group]
    ours = [a for a, e in zip(advantages(name, episodes), episodes, strict=True) if e.group == episodes[0].group]
    np.testing.assert_allclose(advantages(name, own), ours, rtol=1e-9, atol=1e-12)


# ---- what they refuse ------------------------------------------------------------------------------------------------------


def test_maxrl_refuses_negative_rewards():
    with pytest.raises(DataError, match=r"rewards must be 0 or more; the lowest is -1.*choose grpo"):
        advantages("maxrl", outcomes([1.0, -1.0]))


def test_gdpo_refuses_what_it_has_no_components_for():
    with pytest.raises(DataError, match="the samples have none"):
        advantages("gdpo", outcomes([1.0, 0.0]))
    parts = [Episode(0, [(1, 1.0)], components={"answer": 1.0})]
    with pytest.raises(ConfigError, match=r"weights` names anwser; the reward's parts are answer"):
        advantages("gdpo", parts, weights={"anwser": 1.0})
    for weights, words in (({"answer": "much"}, "weights.answer` must be a finite number"), ([1.0], "must map components")):
        with pytest.raises(ConfigError, match=words):
            advantages("gdpo", parts, weights=weights)


def test_pass_at_k_refuses_attempts_of_nothing():
    with pytest.raises(ConfigError, match=r"advantage_options.k` must be at least 1; got 0"):
        advantages("pass_at_k", outcomes([1.0, 0.0]), k=0)


def test_large_groups_keep_their_digits():
    # C(512, 64) is beyond float64's integers, its logarithm is not.
    rewards = [1.0] * 3 + [0.0] * 509
    ours = advantages("pass_at_k", outcomes(rewards), k=64)
    assert abs(sum(ours)) < 1e-8
    assert ours[:3] == pytest.approx([ours[0]] * 3, rel=1e-9)
    assert torch.tensor(ours).isfinite().all()
