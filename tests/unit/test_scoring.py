"""What models say of samples before their advantages: right by token, whatever the packing, and only what is asked for."""

from types import SimpleNamespace

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from skyrl_mega.algorithms.advantages import ADVANTAGES, Advantages, compute_advantages
from skyrl_mega.data.packing import balance_and_pack, unpack, unpack_states
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import DataError
from skyrl_mega.orchestration.loop import fill_logprobs, skips_zero_advantage
from skyrl_mega.orchestration.loop import pack as pack_update
from skyrl_mega.orchestration.scoring import score_samples


@ADVANTAGES.register("wants_values_in_test_scoring", needs=frozenset({"values"}))
def wants_values(inputs):
    return Advantages(inputs.values_T, returns_T=inputs.values_T + 1)


def pack(samples, *, share_prompts=False):
    return balance_and_pack(
        samples, tokens_per_micro_batch=100, dp_rank=0, dp_size=1, skip_zero_advantage=False, share_prompts=share_prompts
    )


class Positions:
    """A critic, laid out as the policy, for which the value of a state is how many tokens it has seen."""

    def __init__(self, policy):
        self.config, self.topology = policy.config, policy.topology

    def compute_values(self, batch):
        return [micro_batch.position_ids.float() + 1 for micro_batch in batch.micro_batches]


def parts_of(policy, **models):
    return SimpleNamespace(
        **{"config": policy.config, "topology": policy.topology, "policy": policy, "share_prompts": True},
        **{"reference": None, "teacher": None, "critic": None, **models},
    )


def test_a_kl_penalty_in_the_reward_is_computed_before_advantages_and_travels_to_the_loss(tmp_path):
    config = tiny_config(tmp_path, "algorithm.kl.coef=0.5", "algorithm.kl.place=reward", "algorithm.kl.estimator=k1")
    samples = random_samples(3, 2, seed=1)
    reference = SimpleNamespace(compute_logprobs=lambda batch: [-0.5 * mb.loss_mask.float() for mb in batch.micro_batches])
    with make_policy(config) as policy:
        parts = parts_of(policy, reference=reference)
        score_samples(parts, samples)
        batch = pack(samples)
        for sample, expected in zip(samples, unpack(policy.compute_logprobs(batch), batch, samples), strict=True):
            torch.testing.assert_close(sample.old_logprobs, expected)
            assert torch.equal(sample.ref_logprobs, -0.5 * sample.loss_mask.float())
        metrics = compute_advantages(samples, config.algorithm)
        penalties = [0.5 * float((s.old_logprobs - s.ref_logprobs)[s.loss_mask].sum()) for s in samples]
        assert metrics["reward/kl"] == pytest.approx(sum(penalties) / 0.5 / sum(s.num_loss_tokens for s in samples))
        rewards = torch.tensor([s.reward - penalty for s, penalty in zip(samples, penalties, strict=True)])
        groups = rewards.view(3, 2)
        expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
        for sample, value in zip(samples, expected.flatten(), strict=True):
            ours = sample.advantages[sample.loss_mask]
            torch.testing.assert_close(ours, value.expand(sample.num_loss_tokens), atol=1e-5, rtol=1e-4)

        update = pack_update(config, policy.topology, samples, share_prompts=True)
        policy.compute_logprobs = None  # nothing is computed a second time
        fill_logprobs(parts, [update, update])
        assert all(mb.old_logprobs is not None and mb.ref_logprobs is not None for mb in update.micro_batches)


def test_a_critics_values_reach_estimator_and_loss_token_by_token(tmp_path):
    config = tiny_config(tmp_path, "algorithm.advantage=wants_values_in_test_scoring")
    samples = random_samples(2, 2, seed=2)
    with make_policy(config) as policy:
        score_samples(parts_of(policy, critic=Positions(policy)), samples)
        for sample in samples:
            # The state before token t has seen t tokens; the last entry is that of the whole sequence.
            assert sample.values.tolist() == [float(t) for t in range(sample.num_tokens + 1)]
        compute_advantages(samples, config.algorithm)
        batch = pack_update(config, policy.topology, samples, share_prompts=True)
    for micro_batch in batch.micro_batches:
        states = (micro_batch.position_ids + 1) * micro_batch.loss_mask
        assert torch.equal(micro_batch.values, states.float())
        assert torch.equal(micro_batch.returns, (states + micro_batch.loss_mask).float())


def test_nothing_is_computed_where_nothing_is_needed(tmp_path):
    samples = random_samples(2, 2, seed=3)
    config = tiny_config(tmp_path)
    with make_policy(config) as policy:
        policy.compute_logprobs = None
        score_samples(parts_of(policy), samples)
    assert all(s.old_logprobs is None and s.values is None for s in samples)
    assert skips_zero_advantage(config)


def test_states_of_shared_prompts_are_refused():
    samples = random_samples(1, 2, seed=4)
    batch = pack(samples, share_prompts=True)
    with pytest.raises(DataError, match=r"samples \[0, 1\] are not whole in this rank's batch"):
        unpack_states([torch.zeros(mb.num_tokens) for mb in batch.micro_batches], batch, samples)
