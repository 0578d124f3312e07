"""Router replay: the experts are those that are given, their weights the router's own, in every kind of pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.routing import own_routing, with_random_routing
from helpers.updates import clones, variant
from skyrl_mega.config.load import load_config
from skyrl_mega.data.packing import balance_and_pack, unpack, unpack_routing
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import DataError
from skyrl_mega.models.router import routers
from skyrl_mega.training.critic import critic_config
from skyrl_mega.training.reference import ReferenceModel

REPLAY = "model.router_replay=rollout"


def packed(samples, **settings):
    arguments = dict(tokens_per_micro_batch=64, dp_rank=0, dp_size=1, skip_zero_advantage=False) | settings
    return balance_and_pack(samples, **arguments)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(tmp_path_factory.mktemp("moe"), REPLAY, "optimizer.lr=1e-3", family="qwen3_moe", tied=False, num_experts=6)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"], ids=["renormalised", "as they are"])
def test_replayed_experts_are_weighed_by_the_routers_own_logits(family, tmp_path):
    config = tiny_config(tmp_path, family=family, tied=False, num_experts=6)
    hidden = torch.randn(5, 1, 64, requires_grad=True)
    chosen_TK = torch.tensor([[0, 5], [3, 1], [4, 2], [1, 0]])
    replayed_TE = torch.zeros(5, 6, dtype=torch.bool)
    replayed_TE[:4].scatter_(1, chosen_TK, True)
    with make_policy(config) as policy:
        router = next(routers(policy.chunks))
        free_TE, _ = router(hidden)
        weights_TE, map_TE = router(hidden, replayed_TE)
        upstream_TE = torch.randn(5, 6)
        (gradient,) = torch.autograd.grad((weights_TE * upstream_TE).sum(), hidden)
        weight = router.weight.detach().double()
    assert torch.equal(map_TE[:4], replayed_TE[:4])
    assert torch.equal(weights_TE[4], free_TE[4])  # nothing was given: the router's own
    again = hidden.detach().double().requires_grad_()
    probs_TE = (again[:, 0] @ weight.t()).softmax(-1)
    chosen_TE = probs_TE * map_TE
    expected_TE = chosen_TE / chosen_TE.sum(-1, keepdim=True) if family == "qwen3_moe" else chosen_TE
    (expected_gradient,) = torch.autograd.grad((expected_TE * upstream_TE.double()).sum(), again)
    torch.testing.assert_close(weights_TE.double(), expected_TE, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("deepseek_v3", {"n_routed_experts": 8, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 2}),
        ("glm4_moe", {"n_routed_experts": 8, "num_experts_per_tok": 2}),
    ],
    ids=["groups", "no groups"],
)
def test_replayed_experts_of_a_biased_router_are_weighed_by_their_sigmoids_without_the_bias(family, shape, tmp_path):
    """arXiv:2412.19437, equations 12 to 16: the bias and the groups choose, and here nothing is chosen."""
    config = tiny_config(tmp_path, family=family, tied=False, routed_scaling_factor=2.5, **shape)
    hidden = torch.randn(4, 1, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    # Experts of several groups, also where the router may take those of one only; row 3 is free.
    chosen_TK = torch.tensor([[0, 7], [5, 2], [1, 6]])
    replayed_TE = torch.zeros(4, 8, dtype=torch.bool)
    replayed_TE[:3].scatter_(1, chosen_TK, True)
    with make_policy(config) as policy:
        router = next(routers(policy.chunks))
        router.expert_bias.copy_(torch.tensor([0.9, -0.9, 0.5, -0.5, 0.2, -0.2, 0.7, -0.7]))
        free_TE, _ = router(hidden)
        weights_TE, map_TE = router(hidden, replayed_TE)
        upstream_TE = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad((weights_TE * upstream_TE).sum(), hidden)
        weight, num_disagreed = router.weight.detach().double(), int(router.choice.num_disagreed)
    assert torch.equal(map_TE[:3], replayed_TE[:3])
    assert torch.equal(weights_TE[3], free_TE[3])
    assert num_disagreed > 0
    again = hidden.detach().double().requires_grad_()
    scores_TE = (again[:, 0] @ weight.t()).sigmoid() * map_TE
    expected_TE = 2.5 * scores_TE / scores_TE.sum(-1, keepdim=True)
    (expected_gradient,) = torch.autograd.grad((expected_TE * upstream_TE.double()).sum(), again)
    torch.testing.assert_close(weights_TE.double(), expected_TE, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


def test_a_models_own_routing_replayed_changes_nothing_and_another_one_does(config):
    samples = random_samples(3, 3, seed=1)
    with make_policy(config) as policy:
        free = unpack(policy.compute_logprobs(packed(samples)), packed(samples), samples)
        own = own_routing(policy, packed(samples))
        same = [dataclasses.replace(s, routed_experts=own[s.sample_index]) for s in samples]
        other = with_random_routing(samples, num_layers=2, num_experts=6, seed=2)
        replayed = unpack(policy.compute_logprobs(packed(same)), packed(same), same)
        moved = unpack(policy.compute_logprobs(packed(other)), packed(other), other)
        metrics, moved_metrics = policy.train_step(packed(same)), policy.train_step(packed(other))
    assert all(torch.equal(a, b) for a, b in zip(free, replayed, strict=True))
    assert max(float((a - b).abs().max()) for a, b in zip(free, moved, strict=True)) > 0.1
    assert (metrics["moe/replayed"], metrics["moe/replay_disagreement"]) == (1.0, 0.0)
    # Of 15 pairs of experts a random one is seldom the router's.
    assert moved_metrics["moe/replay_disagreement"] > 0.7
    total = sum(s.num_tokens for s in other)
    known = sum(int((s.routed_experts[:, 0, 0] >= 0).sum()) for s in other)
    assert moved_metrics["moe/replayed"] == pytest.approx(known / total, rel=1e-6)


def test_recomputed_activations_have_the_routing_of_their_own_micro_batch(config):
    """Backward passes come after the forward passes of other micro-batches: with whole layers, or their experts only, again."""
    samples = with_random_routing(random_samples(4, 3, seed=3), num_layers=2, num_experts=6, seed=4)
    results = {}
    for name, settings in {
        "none": [],
        "full": ["model.recompute=full"],
        "experts": ["model.recompute=selective", "model.recompute_modules=[moe]"],
        "feed-forward": ["model.recompute=selective", "model.recompute_modules=[mlp]"],
    }.items():
        with make_policy(variant(config, REPLAY, "optimizer.lr=1e-3", *settings)) as policy:
            batch = packed(samples)
            assert len(batch.micro_batches) > 2
            results[name] = policy.train_step(batch), clones(policy)
    expected, weights = results.pop("none")
    for name, (metrics, updated) in results.items():
        for key in ("update/grad_norm", "moe/replayed", "moe/replay_disagreement", "moe/router_entropy"):
            assert metrics[key] == pytest.approx(expected[key], rel=1e-6), (name, key)
        assert all((updated[key] - value).abs().max() < 1e-6 for key, value in weights.items()), name


def test_samples_on_a_shared_prompt_have_one_routing_of_it(config):
    """The prompt is computed once, by the routing of the first sample; what differs in the others' is not used."""
    samples = with_random_routing(random_samples(2, 3, seed=5, max_len=20), num_layers=2, num_experts=6, seed=6)
    shared = packed(samples, share_prompts=True)
    rows = unpack_routing(shared)
    for sample in samples:
        prompt = int(sample.loss_mask.nonzero()[0])
        first = next(s for s in samples if s.group_index == sample.group_index)
        row = rows[sample.sample_index]
        assert torch.equal(row[: prompt - 1], first.routed_experts[: prompt - 1])
        assert torch.equal(row[prompt - 1 : -1], sample.routed_experts[prompt - 1 : -1])
        assert (row[-1] == -1).all()
    alike = [dataclasses.replace(sample, routed_experts=rows[sample.sample_index]) for sample in samples]
    with make_policy(config) as policy:
        together = unpack(policy.compute_logprobs(shared), shared, samples)
        apart = unpack(policy.compute_logprobs(packed(alike)), packed(alike), alike)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, apart, strict=True))


def test_the_routing_of_the_old_logprobs_pass_stays_through_the_updates(config):
    samples = random_samples(4, 3, seed=7)
    with make_policy(variant(config, "model.router_replay=old", "optimizer.lr=0.05", "trainer.updates_per_step=2")) as policy:
        batches = [packed(samples[:6]), packed(samples[6:])]
        for batch in batches:
            policy.fill_old_logprobs(batch)
        first = policy.train_step(batches[0])
        current = own_routing(policy, packed(samples[6:]))
        second = policy.train_step(batches[1])
    assert first["moe/replayed"] == second["moe/replayed"] == 1
    assert first["moe/replay_disagreement"] == 0
    recorded = unpack_routing(batches[1])
    # The first update has changed what the routers would choose; replayed is what they chose before it.
    differs = [(recorded[i].sort(-1).values != current[i].sort(-1).values).any(-1).flatten() for i in recorded]
    assert 0.02 < second["moe/replay_disagreement"] < 0.9
    assert abs(second["moe/replay_disagreement"] - float(torch.cat(differs).double().mean())) < 0.05


def test_only_the_policy_replays(config):
    samples = with_random_routing(random_samples(2, 2, seed=8), num_layers=2, num_experts=6, seed=9)
    free = [dataclasses.replace(sample, routed_experts=None) for sample in samples]
    with make_policy(config) as policy:
        reference = ReferenceModel(config, policy.topology)
        replayed, own = (policy.compute_logprobs(packed(given)) for given in (samples, free))
        assert not torch.equal(replayed[0], own[0])
        assert torch.equal(reference.compute_logprobs(packed(samples))[0], own[0])
    assert critic_config(config).model.router_replay == "off"


def test_routing_of_another_model_is_refused(config):
    samples = with_random_routing(random_samples(1, 2, seed=1), num_layers=3, num_experts=6, seed=1)
    with make_policy(config) as policy, pytest.raises(DataError, match=r"\[tokens, layers, experts per token\]: \(2, 2\)"):
        policy.compute_logprobs(packed(samples))


def test_replay_is_off_unless_asked_for():
    assert load_config(["model.path=m", "env.name=arithmetic"]).model.router_replay == "off"
