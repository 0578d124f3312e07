"""From samples to advantages by configuration: every estimator by its name, KL in the reward, whitening, and early refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from helpers.episodes import Episode, inputs_of
from skyrl_mega.algorithms.advantages import ADVANTAGES, compute_advantages, needs
from skyrl_mega.algorithms.check import check_algorithm
from skyrl_mega.config.algorithm_rules import COMPARE_SAMPLES
from skyrl_mega.config.schema import AlgorithmConfig, KLConfig
from skyrl_mega.errors import ConfigError, DataError

EPISODES = [
    Episode(0, [(2, 0.0), (3, 1.0)], greedy=0.5, components={"answer": 1.0, "format": 0.0}),
    Episode(0, [(4, 0.25)], greedy=0.5, components={"answer": 0.0, "format": 0.25}, truncated=True),
    Episode(0, [(1, 0.0), (1, 0.0)], greedy=0.5, components={"answer": 0.0, "format": 0.0}),
    Episode(1, [(2, 1.0)], greedy=0.0, components={"answer": 1.0, "format": 1.0}),
    Episode(1, [(3, 0.0)], greedy=0.0, components={"answer": 0.0, "format": 0.0}),
    Episode(1, [(1, 0.5)], greedy=0.0, components={"answer": 0.5, "format": 0.0}),
]
#: Estimators of `skyrl_mega`, and those that other tests registered for themselves.
NAMES = list(ADVANTAGES.built_in)


def make_samples(episodes=EPISODES):
    samples = [episode.sample(number) for number, episode in enumerate(episodes)]
    generator = torch.Generator().manual_seed(0)
    for sample in samples:
        for name in ("old_logprobs", "ref_logprobs", "teacher_logprobs"):
            drawn = -torch.rand(sample.num_tokens, generator=generator)
            setattr(sample, name, torch.where(sample.loss_mask, drawn, 0.0))
        sample.values = torch.randn(sample.num_tokens + 1, generator=generator)
    return samples


def options_of(name):
    return {"k": 2} if name == "pass_at_k" else {}


@pytest.mark.parametrize("name", NAMES)
def test_every_estimator_fills_samples_from_what_it_says_it_needs(name):
    config = AlgorithmConfig(advantage=name, advantage_options=options_of(name))
    samples = make_samples()
    wanted = {"greedy": "baseline_reward", "components": "reward_components"}
    kept = {wanted.get(need, need) for need in needs(config)}
    for sample in samples:
        for field in {"values", "old_logprobs", "ref_logprobs", "teacher_logprobs", "baseline_reward"} - kept:
            setattr(sample, field, None)
        if "reward_components" not in kept:
            sample.reward_components = {}
    metrics = compute_advantages(samples, config)
    for sample in samples:
        assert sample.advantages.dtype == torch.float32
        assert sample.advantages.shape == (sample.num_tokens,)
        assert (sample.advantages[~sample.loss_mask] == 0).all()
        assert sample.advantages.isfinite().all()
        assert (sample.returns is not None) == ("values" in kept)
    tokens = torch.cat([s.advantages[s.loss_mask] for s in samples]).double()
    assert tokens.abs().max() > 0
    assert metrics["advantages/mean"] == pytest.approx(float(tokens.mean()), abs=1e-6)
    assert metrics["advantages/std"] == pytest.approx(float(tokens.std(correction=0)), rel=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if not needs(AlgorithmConfig(advantage=n)) - {"greedy", "components"}])
def test_the_estimator_of_a_configuration_gives_what_the_function_gives(name):
    samples = make_samples()
    compute_advantages(samples, AlgorithmConfig(advantage=name, advantage_options=options_of(name)))
    ours = torch.cat([sample.advantages for sample in samples])
    direct = ADVANTAGES.find(name).function(inputs_of(EPISODES), **options_of(name)).advantages_T
    torch.testing.assert_close(ours, direct.float())


def test_the_rule_about_single_samples_knows_every_estimator_that_compares_them():
    assert {name for name in NAMES if ADVANTAGES.find(name).traits["groups"]} == COMPARE_SAMPLES & set(NAMES)


@pytest.mark.parametrize(
    ("name", "lacking", "words"),
    [("remax", "baseline_reward", "has no baseline_reward"), ("gae", "values", "has no values")],
)
def test_what_is_needed_and_missing_is_named(name, lacking, words):
    samples = make_samples()
    setattr(samples[4], lacking, None)
    with pytest.raises(DataError, match=f"sample 4 of group 'g1' {words}, which its advantages need"):
        compute_advantages(samples, AlgorithmConfig(advantage=name))


def test_samples_whose_rewards_are_mixed_from_different_parts_are_refused():
    samples = make_samples()
    samples[3].reward_components = {"answer": 1.0}
    with pytest.raises(DataError, match=r"sample 3 of group 'g1' has the reward components \['answer'\].*\['answer', 'format'\]"):
        compute_advantages(samples, AlgorithmConfig(advantage="gdpo"))


# ---- KL in the reward ------------------------------------------------------------------------------------------------------


def penalty(estimator, old, ref):
    log_ratio = ref - old
    return {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": math.exp(log_ratio) - 1 - log_ratio}[estimator]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_reward_is_taken_from_each_tokens_reward(estimator):
    gamma, coef = 0.9, 0.3
    config = AlgorithmConfig(
        advantage="reinforce_plus_plus",
        advantage_options={"gamma": gamma},
        kl=KLConfig(coef=99.0, estimator=estimator, place="reward"),
    )
    samples = make_samples()
    metrics = compute_advantages(samples, config, kl_coef=coef)  # an adaptive coefficient replaces the configured one
    returns, penalties = [], []
    for sample, episode in zip(samples, EPISODES, strict=True):
        going, row = 0.0, []
        numbers = zip(
            *(episode.token_rewards(), sample.old_logprobs.tolist(), sample.ref_logprobs.tolist(), episode.turn_index()),
            strict=True,
        )
        for reward, old, ref, turn in reversed(list(numbers)):
            if turn >= 0:
                penalties.append(penalty(estimator, old, ref))
                going = reward - coef * penalties[-1] + gamma * going
                row.append(going)
        returns += row[::-1]
    flat = torch.tensor(returns, dtype=torch.float64)
    expected = (flat - flat.mean()) / flat.std(correction=0)
    ours = torch.cat([sample.advantages[sample.loss_mask] for sample in samples])
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    assert metrics["reward/kl"] == pytest.approx(sum(penalties) / len(penalties))


def test_kl_in_the_reward_lowers_an_outcome_by_its_sum_and_asks_for_both_policies():
    config = AlgorithmConfig(advantage="dr_grpo", kl=KLConfig(coef=0.5, estimator="k1", place="reward"))
    assert needs(config) == {"old_logprobs", "ref_logprobs"}
    assert needs(replace(config, kl=KLConfig(coef=0.5))) == set()
    samples = make_samples()
    compute_advantages(samples, config)
    rewards = [s.reward - 0.5 * float((s.old_logprobs - s.ref_logprobs)[s.loss_mask].double().sum()) for s in samples]
    means = [sum(rewards[:3]) / 3] * 3 + [sum(rewards[3:]) / 3] * 3
    for sample, reward, mean in zip(samples, rewards, means, strict=True):
        assert sample.advantages[sample.loss_mask].tolist() == pytest.approx([reward - mean] * sample.num_loss_tokens, abs=1e-6)


def test_a_penalty_that_is_needed_and_cannot_be_computed_is_an_error():
    samples = make_samples()
    samples[0].ref_logprobs = None
    with pytest.raises(DataError, match="has no ref_logprobs"):
        compute_advantages(samples, AlgorithmConfig(kl=KLConfig(coef=0.5, place="reward")))


# ---- whitening -------------------------------------------------------------------------------------------------------------


def test_whitening_is_over_all_trained_tokens_and_leaves_returns_alone():
    plain, white = make_samples(), make_samples()
    compute_advantages(plain, AlgorithmConfig(advantage="gae"))
    metrics = compute_advantages(white, AlgorithmConfig(advantage="gae", normalize_advantages=True))
    assert metrics["advantages/mean"] == pytest.approx(0, abs=1e-9)
    assert metrics["advantages/std"] == pytest.approx(1)
    tokens = torch.cat([s.advantages[s.loss_mask] for s in plain]).double()
    for before, after in zip(plain, white, strict=True):
        assert torch.equal(before.returns, after.returns)
        expected = torch.where(before.loss_mask, (before.advantages.double() - tokens.mean()) / tokens.std(correction=0), 0.0)
        torch.testing.assert_close(after.advantages.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_step_without_any_signal_stays_without_one():
    samples = make_samples([Episode(0, [(2, 1.0)]), Episode(0, [(3, 1.0)])])
    compute_advantages(samples, AlgorithmConfig(normalize_advantages=True))
    assert all((sample.advantages == 0).all() for sample in samples)


# ---- before a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gae", {"lam": 1.5}, r"`algorithm.advantage_options.lam` must be in \[0, 1\]; got 1.5"),
        ("gae", {"lambda": 1.0}, "`algorithm.advantage_options.lambda` is not an option"),
        ("reinforce_plus_plus", {"gamma": -1}, "gamma` must be in"),
        ("turn_grpo", {"gamma": 2.0}, "gamma` must be in"),
        ("pass_at_k", {"k": 0}, "k` must be at least 1"),
        ("pass_at_k", {"k": 2.5}, "k` must be int"),
        ("gdpo", {"weights": {"answer": "much"}}, "weights.answer` must be a finite number"),
    ],
)
def test_options_out_of_range_are_found_before_a_run(name, options, words):
    with pytest.raises(ConfigError, match=words):
        check_algorithm(AlgorithmConfig(advantage=name, advantage_options=options))


@pytest.mark.parametrize("name", NAMES)
def test_every_estimator_passes_the_check_with_its_defaults(name):
    check_algorithm(AlgorithmConfig(advantage=name))


def test_a_function_of_ones_own_is_not_called_by_the_check(tmp_path):
    file = tmp_path / "own_estimator.py"
    file.write_text("def own(inputs):\n    return inputs.rewards_N.max()\n")
    check_algorithm(AlgorithmConfig(advantage=f"{file}:own"))


def test_what_an_estimator_gives_to_masked_tokens_is_dropped(tmp_path):
    file = tmp_path / "generous_estimator.py"
    file.write_text(
        "from skyrl_mega.algorithms.advantages import Advantages\n"
        "def everything(inputs):\n"
        "    return Advantages(1.0 + 0.0 * inputs.token_rewards_T)\n"
    )
    samples = make_samples()
    compute_advantages(samples, AlgorithmConfig(advantage=f"{file}:everything"))
    assert all(torch.equal(sample.advantages, sample.loss_mask.float()) for sample in samples)
