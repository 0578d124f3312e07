"""Advantages side by side with verl's and TRL's own code: equal where both define the same, and where they differ, how.

Skipped where the peers are not installed (conftest.py).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.episodes import Episode, by_token, inputs_of
from helpers.peer_source import definition_of, run_between, source_of
from skyrl_mega.algorithms.advantages import ADVANTAGES
from skyrl_mega.algorithms.kl import next_kl_coef

#: Three prompts of four samples: mixed, of equal rewards, and of one success; lengths differ.
REWARDS = [0.0, 1.0, 0.25, 1.0, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0, 1.0, 0.0]
LENGTHS = [3, 5, 1, 4, 2, 2, 6, 1, 4, 3, 2, 5]
EPISODES = [Episode(n // 4, [(length, r)], greedy=0.3) for n, (length, r) in enumerate(zip(LENGTHS, REWARDS, strict=True))]
TOKENS = sum(LENGTHS)
#: Peers whiten by the unbiased deviation (divisor n - 1), we by the population's (n): then the variance is 1.
BESSEL = ((TOKENS - 1) / TOKENS) ** 0.5


def ours(name, episodes=EPISODES, values=None, **options):
    return by_token(ADVANTAGES.find(name).function(inputs_of(episodes, values=values), **options).advantages_T, episodes)


def assert_rows(mine, theirs, *, factor=1.0, atol=1e-6):
    for row, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(np.array(row) * factor, np.array(other)[: len(row)], rtol=1e-6, atol=atol)


class Padded:
    """Episodes as verl has them: responses in rows, the rewards at their tokens, in float64."""

    def __init__(self, episodes=EPISODES):
        rows = [episode.turn_index()[1:] for episode in episodes]
        rewards = [episode.token_rewards()[1:] for episode in episodes]
        width = max(len(row) for row in rows)
        self.mask = torch.tensor([[float(i >= 0) for i in row] + [0.0] * (width - len(row)) for row in rows]).double()
        self.rewards = torch.tensor([row + [0.0] * (width - len(row)) for row in rewards], dtype=torch.float64)
        self.index = np.array([episode.group for episode in episodes])

    def at_trained(self, values):
        return [row[mask > 0].tolist() for row, mask in zip(values, self.mask, strict=True)]


class Verl:
    """The functions of verl.trainer.ppo.core_algos."""

    def __init__(self):
        self.source = source_of("verl.trainer.ppo.core_algos")
        masked = {"torch": torch}
        for name in ("masked_sum", "masked_mean", "masked_var", "masked_whiten"):
            definition_of(source_of("verl.utils.torch_functional"), name, masked)
        self.names = {"torch": torch, "np": np, "defaultdict": defaultdict, "verl_F": SimpleNamespace(**masked)}

    def __getattr__(self, name):
        if name == "compute_gdpo_outcome_advantage":
            definition_of(self.source, "compute_grpo_outcome_advantage", self.names)  # which that one calls
        return definition_of(self.source, name, self.names)


@pytest.fixture(scope="module")
def verl():
    return Verl()


# ---- verl ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_std", [True, False])
def test_grpo_is_verls(verl, by_std):
    batch = Padded()
    theirs, _ = verl.compute_grpo_outcome_advantage(batch.rewards, batch.mask, batch.index, norm_adv_by_std_in_grpo=by_std)
    assert_rows(ours("grpo", normalize_by_std=by_std), batch.at_trained(theirs))


@pytest.mark.parametrize("by_std", [True, False])
def test_grpo_passk_is_verls(verl, by_std):
    batch = Padded()
    config = {"norm_adv_by_std_in_grpo": by_std}
    theirs, _ = verl.compute_grpo_passk_outcome_advantage(batch.rewards, batch.mask, batch.index, config=config)
    assert_rows(ours("grpo_passk", normalize_by_std=by_std), batch.at_trained(theirs))


@pytest.mark.parametrize("name", ["rloo", "opo"])
def test_rloo_and_opo_are_verls(verl, name):
    batch = Padded()
    theirs, _ = getattr(verl, f"compute_{name}_outcome_advantage")(batch.rewards.clone(), batch.mask, batch.index)
    assert_rows(ours(name), batch.at_trained(theirs))


def test_a_group_of_one_is_left_out_here_and_trained_on_its_raw_reward_by_verl(verl):
    # No other sample, no baseline: verl then takes 0 for one. Here such a sample teaches nothing, as in GRPO of both.
    alone = [Episode(0, [(2, 0.7)])]
    batch = Padded(alone)
    for name in ("rloo", "opo"):
        theirs, _ = getattr(verl, f"compute_{name}_outcome_advantage")(batch.rewards.clone(), batch.mask, batch.index)
        assert batch.at_trained(theirs) == [[0.7, 0.7]]
        assert ours(name, alone) == [[0.0, 0.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus_is_verls_but_for_the_deviations_divisor(verl, gamma):
    turns = [Episode(n % 2, [(2, 0.25 * n), (3, 1.0 - 0.5 * n)]) for n in range(4)]
    for episodes in (EPISODES, turns):
        batch = Padded(episodes)
        config = SimpleNamespace(gamma=gamma)
        theirs, _ = verl.compute_reinforce_plus_plus_outcome_advantage(batch.rewards, batch.mask, config=config)
        count = float(batch.mask.sum())
        mine = ours("reinforce_plus_plus", episodes, gamma=gamma)
        assert_rows(mine, batch.at_trained(theirs), factor=((count - 1) / count) ** 0.5)


def test_reinforce_plus_plus_baseline_is_verls_but_for_the_deviations_divisor(verl):
    batch = Padded()
    theirs, _ = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(batch.rewards.clone(), batch.mask, batch.index)
    assert_rows(ours("reinforce_plus_plus_baseline"), batch.at_trained(theirs), factor=BESSEL)


def test_remax_is_verls_for_rewards_at_the_end(verl):
    batch = Padded()
    greedy = torch.full((len(EPISODES),), 0.3, dtype=torch.float64)
    theirs, _ = verl.compute_remax_outcome_advantage(batch.rewards, greedy, batch.mask)
    assert_rows(ours("remax"), batch.at_trained(theirs))


def test_remax_counts_earlier_turns_rewards_and_verl_does_not(verl):
    # verl compares the rewards still to come with the greedy answer's whole reward, so that later turns look worse than they are;
    # here all tokens have the episode's reward less the greedy one's, as in the paper.
    episodes = [Episode(0, [(1, 1.0), (1, 1.0)], greedy=2.0)]
    batch = Padded(episodes)
    theirs, _ = verl.compute_remax_outcome_advantage(batch.rewards, torch.tensor([2.0]).double(), batch.mask)
    assert batch.at_trained(theirs) == [[0.0, -1.0]]
    assert ours("remax", episodes) == [[0.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5)])
def test_gae_is_verls_with_whitening_apart(verl, gamma, lam):
    generator = np.random.default_rng(0)
    episodes = [*EPISODES, Episode(3, [(2, 0.5), (3, -1.0)]), Episode(3, [(1, 0.0), (1, 1.0), (2, 0.0)])]
    values = [generator.normal(size=len(e.turn_index()) + 1).tolist() for e in episodes]
    batch = Padded(episodes)
    padded = torch.zeros_like(batch.rewards)
    for row, own in zip(padded, values, strict=True):
        row[: len(own) - 2] = torch.tensor(own[1:-1], dtype=torch.float64)
    advantages, returns = verl.compute_gae_advantage_return(batch.rewards, padded, batch.mask, gamma, lam)
    result = ADVANTAGES.find("gae").function(inputs_of(episodes, values=values), gamma=gamma, lam=lam)
    assert_rows(by_token(result.returns_T, episodes), batch.at_trained(returns))
    flat = np.concatenate(by_token(result.advantages_T, episodes))
    whitened = iter((flat - flat.mean()) / flat.std(ddof=1))
    mine = [list(itertools.islice(whitened, episode.trained)) for episode in episodes]
    assert_rows(mine, batch.at_trained(advantages))


def test_gae_goes_on_after_a_cut_and_verl_stops_there(verl):
    # verl takes 0 for the value after the last token, whether the episode ended or a limit cut it off.
    cut, ended = ([Episode(0, [(1, 1.0)], truncated=truncated)] for truncated in (True, False))
    values = [[0.0, 0.25, 0.5]]
    batch = Padded(ended)
    _, returns = verl.compute_gae_advantage_return(
        batch.rewards.repeat(2, 1), torch.full((2, 1), 0.25).double(), batch.mask.repeat(2, 1), 1.0, 1.0
    )
    of = ADVANTAGES.find("gae").function
    assert float(returns[0]) == 1.0 == float(of(inputs_of(ended, values=values), lam=1.0).returns_T[1])
    assert float(of(inputs_of(cut, values=values), lam=1.0).returns_T[1]) == 1.5


def with_parts(tokens=None):
    generator = np.random.default_rng(1)
    episodes = []
    for episode in EPISODES:
        parts = {"answer": episode.reward, "format": float(generator.integers(0, 2))}
        turns = [(tokens or episode.trained, sum(parts.values()))]
        episodes.append(Episode(episode.group, turns, components=parts))
    return episodes


def verl_gdpo(verl, episodes, weights):
    batch = Padded(episodes)
    config = {"gdpo_reward_keys": ["answer", "format"], "gdpo_reward_weights": weights}
    parts = {name: np.array([e.components[name] for e in episodes]) for name in ("answer", "format")}
    attention = torch.cat([torch.ones(len(episodes), 1), batch.mask], -1).long()
    tensors = {"prompts": torch.zeros(len(episodes), 1), "attention_mask": attention}
    theirs, _ = verl.compute_gdpo_outcome_advantage(
        batch.rewards, batch.mask, batch.index, config=config, non_tensor_batch=parts, batch=tensors
    )
    return batch.at_trained(theirs)


def test_gdpo_is_verls_for_samples_of_one_length_but_for_the_deviations_divisor(verl):
    episodes = with_parts(tokens=3)
    mine = ours("gdpo", episodes, weights={"answer": 1.0, "format": 0.5})
    count = 3 * len(episodes)
    assert_rows(mine, verl_gdpo(verl, episodes, [1.0, 0.5]), factor=((count - 1) / count) ** 0.5, atol=2e-5)  # verl: float32


def test_gdpo_whitens_samples_here_and_tokens_in_verl(verl):
    # With different lengths verl's mean and deviation are weighted by length. The paper's are of samples.
    episodes = with_parts()
    mine = np.array([row[0] for row in ours("gdpo", episodes)])
    theirs = np.array([row[0] for row in verl_gdpo(verl, episodes, [1.0, 1.0])])
    assert abs(mine.mean()) < 1e-9
    assert abs(theirs.mean()) > 1e-3
    slope, offset = np.polyfit(mine, theirs, 1)  # the same but for scale and shift
    np.testing.assert_allclose(slope * mine + offset, theirs, atol=1e-5)


def test_the_adaptive_kl_coefficient_is_verls(verl):
    controller, coef = verl.AdaptiveKLController(0.2, 0.1, 1000), 0.2
    for kl in (0.5, 0.11, 0.0, 0.1, 3.0):
        controller.update(kl, 64)
        coef = next_kl_coef(coef, kl, target=0.1, horizon=1000, num_samples=64)
        assert coef == pytest.approx(controller.value, rel=1e-12)


# ---- TRL: lines of its trainers' methods -----------------------------------------------------------------------------------

#: TRL adds this to deviations.
TRL_EPS = 1e-4


def trl_names(**settings):
    nanstd = definition_of(source_of("trl.trainer.utils"), "nanstd", {"torch": torch})
    return {"torch": torch, "nanstd": nanstd, "num_generations": 4, "device": "cpu", **settings}


def trl_grpo(rewards_per_func, weights, *, aggregation="sum_then_normalize", scale="group"):
    trainer = SimpleNamespace(
        multi_objective_aggregation=aggregation,
        scale_rewards=scale,
        reward_weights=torch.tensor(weights, dtype=torch.float64),
        reward_funcs=weights,
    )
    unscorable = torch.zeros(len(rewards_per_func), dtype=torch.bool)
    names = trl_names(self=trainer, rewards_per_func=rewards_per_func, unscorable_mask=unscorable)
    lines = (source_of("trl.trainer.grpo_trainer"), 'if self.multi_objective_aggregation == "sum_then_normalize"', "# Slice")
    return run_between(*lines, names)["advantages"].tolist()


def per_sample(rows):
    return [row[0] for row in rows]


@pytest.mark.parametrize("scale", ["group", "none"])
def test_grpo_is_trls_with_its_eps(scale):
    rewards = torch.tensor(REWARDS, dtype=torch.float64)[:, None]
    mine = ours("grpo", eps=TRL_EPS) if scale == "group" else ours("dr_grpo")
    np.testing.assert_allclose(per_sample(mine), trl_grpo(rewards, [1.0], scale=scale), rtol=1e-6, atol=1e-6)


def test_gdpo_is_trls_but_for_the_last_deviations_divisor_and_eps():
    episodes = with_parts()
    rewards = torch.tensor([[e.components["answer"], e.components["format"]] for e in episodes], dtype=torch.float64)
    theirs = np.array(trl_grpo(rewards, [1.0, 0.5], aggregation="normalize_then_sum"))
    mine = np.array(per_sample(ours("gdpo", episodes, weights={"answer": 1.0, "format": 0.5}, eps=TRL_EPS)))
    unbiased = mine * ((len(episodes) - 1) / len(episodes)) ** 0.5
    np.testing.assert_allclose(unbiased, theirs, rtol=5e-4)  # TRL's 1e-4 beside a deviation of about 1
    assert np.polyfit(unbiased, theirs, 1)[0] == pytest.approx(1 - TRL_EPS, abs=TRL_EPS)


def test_rloo_is_trls():
    names = trl_names(self=SimpleNamespace(normalize_advantages=False), rewards=torch.tensor(REWARDS).double())
    lines = (source_of("trl.trainer.rloo_trainer"), "grouped_rewards = rewards.view(-1, num_generations)", "# Normalize")
    theirs = run_between(*lines, names)["advantages"].tolist()
    np.testing.assert_allclose(per_sample(ours("rloo")), theirs, rtol=1e-6, atol=1e-6)
