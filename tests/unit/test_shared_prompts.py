"""Computing a prompt once per group changes nothing: the same logprobs, loss, gradients and updated weights."""

import dataclasses

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from skyrl_mega.data.packing import balance_and_pack, unpack
from skyrl_mega.data.synthetic import random_samples

BUDGET = 160


def packed(samples, *, share, budget=BUDGET, **settings):
    return balance_and_pack(
        samples, tokens_per_micro_batch=budget, dp_rank=0, dp_size=1, skip_zero_advantage=False, share_prompts=share, **settings
    )


def test_a_shared_prompt_is_packed_once_and_every_branch_position_has_a_label():
    samples = random_samples(1, 3, seed=1)
    prompt = int(samples[0].loss_mask.nonzero()[0])
    (micro_batch,) = packed(samples, share=True).micro_batches
    assert micro_batch.prefix_segments.tolist() == [-1, 0, 0, 0]
    assert micro_batch.num_tokens == prompt - 1 + sum(s.num_tokens - prompt for s in samples)
    bounds = micro_batch.cu_seqlens.tolist()
    assert micro_batch.input_ids[: bounds[1]].equal(samples[0].token_ids[: prompt - 1])
    assert not micro_batch.loss_mask[: bounds[1]].any()
    for sample, start, end in zip(samples, bounds[1:-1], bounds[2:], strict=True):
        assert micro_batch.input_ids[start:end].equal(sample.token_ids[prompt - 1 : -1])
        assert micro_batch.labels[start:end].equal(sample.token_ids[prompt:])
        assert micro_batch.position_ids[start:end].equal(torch.arange(prompt - 1, sample.num_tokens - 1))
        assert micro_batch.loss_mask[start:end].all()


def test_no_label_is_lost_or_doubled_by_sharing():
    samples = random_samples(5, 4, seed=2)
    for budget in (40, 80, 1000):
        batch = packed(samples, share=True, budget=budget)
        assert all(micro_batch.num_tokens <= budget for micro_batch in batch.micro_batches)
        assert sum(int(m.loss_mask.sum()) for m in batch.micro_batches) == batch.num_loss_tokens
        rows = unpack([m.advantages for m in batch.micro_batches], batch, samples)
        assert all(row.equal(sample.advantages) for row, sample in zip(rows, samples, strict=True))


def test_samples_of_different_groups_or_prompts_are_never_shared():
    alone = [dataclasses.replace(s, group_index=i) for i, s in enumerate(random_samples(1, 3, seed=3))]
    assert all(m.prefix_segments is None for m in packed(alone, share=True).micro_batches)


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("shared"), family="qwen3", tied=False)
    with make_policy(config) as policy, make_policy(config, topology=policy.topology) as twin:
        yield policy, twin


def test_logprobs_are_the_same_with_and_without_sharing(policies):
    policy, _ = policies
    samples = random_samples(6, 4, seed=4)
    shared, whole = packed(samples, share=True), packed(samples, share=False)
    assert sum(m.num_tokens for m in shared.micro_batches) < sum(m.num_tokens for m in whole.micro_batches)
    for a, b in zip(
        unpack(policy.compute_logprobs(shared), shared, samples),
        unpack(policy.compute_logprobs(whole), whole, samples),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_an_update_is_the_same_with_and_without_sharing(policies):
    policy, twin = policies
    samples = random_samples(6, 4, seed=5)
    a = policy.train_step(packed(samples, share=True))
    b = twin.train_step(packed(samples, share=False))
    assert a["loss/total"] == pytest.approx(b["loss/total"], abs=1e-6)
    assert a["update/grad_norm"] == pytest.approx(b["update/grad_norm"], rel=1e-5)
    for (name, x), (_, y) in zip(policy.iter_weights(torch.float32), twin.iter_weights(torch.float32), strict=True):
        torch.testing.assert_close(x, y, atol=5e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
