"""Importance weights: values, gradients and statistics against the formulas, and nothing at all where there is nothing to do."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_mega.algorithms.loss import Objective, mean_stats
from skyrl_mega.algorithms.off_policy import bind_stages, off_policy_correction
from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.config.algorithm_rules import ALGORITHM_COMBINATIONS
from skyrl_mega.config.rule import Facts
from skyrl_mega.config.schema import AlgorithmConfig, Config, OffPolicyConfig, TrainerConfig
from skyrl_mega.errors import ConfigError

CORRECTIONS = ["truncated_is", "masked_is", "icepop"]


def corrected(name, **options):
    return OffPolicyConfig(stages=({"name": name, **options},))


def make_tokens(num_tokens, seed=0, *, engine_noise=0.7):
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return torch.randn(num_tokens, generator=generator, dtype=torch.float64) * scale

    base = -noise(1.0).abs() - 0.1
    return {
        "logprobs": base + noise(0.3),
        "old_logprobs": base,
        "rollout_logprobs": base + noise(engine_noise),
        "advantages": noise(1.0),
        "loss_mask": torch.rand(num_tokens, generator=generator) < 0.7,
    }


def run(tokens, weights, off_policy):
    """(loss, statistics as numbers, gradient of logprobs)."""
    leaf = tokens["logprobs"].clone().requires_grad_()
    loss, stats = Objective(AlgorithmConfig(off_policy=off_policy))(LossInputs(**{**tokens, "logprobs": leaf}), weights)
    loss.backward()
    return loss.detach(), {name: float(value) for name, value in stats.sums.items()}, leaf.grad


def formula(correction, ratio, low, cap):
    """(weight, whether the bound bites) as the papers write it."""
    if correction == "truncated_is":
        return min(ratio, cap), ratio > cap
    outside = ratio > cap or (correction == "icepop" and ratio < low)
    return (0.0 if outside else ratio), outside


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_loss_gradient_and_statistics_match_the_formulas(correction):
    off_policy = corrected(correction, cap=1.8, **({"low": 0.6} if correction == "icepop" else {}))
    tokens = make_tokens(300)
    weights = torch.rand(300, dtype=torch.float64) * tokens["loss_mask"]
    loss, stats, grad = run(tokens, weights, off_policy)
    _, plain_stats, plain_grad = run(tokens, weights, OffPolicyConfig())

    t = {name: tensor.numpy() for name, tensor in tokens.items()}
    expected = dict.fromkeys(("loss", "weight", "square", "bounded", "bounded_square", "bites"), 0.0)
    for i in np.flatnonzero(t["loss_mask"]):
        ratio = math.exp(t["old_logprobs"][i] - t["rollout_logprobs"][i])
        bounded, bites = formula(correction, ratio, 0.6, 1.8)
        current, advantage, w = math.exp(t["logprobs"][i] - t["old_logprobs"][i]), t["advantages"][i], float(weights[i])
        expected["loss"] -= w * bounded * min(current * advantage, min(max(current, 0.8), 1.28) * advantage)
        expected["weight"] += w * ratio
        expected["square"] += w * ratio**2
        expected["bounded"] += w * bounded
        expected["bounded_square"] += w * bounded**2
        expected["bites"] += w * bites
        assert float(grad[i]) == pytest.approx(bounded * float(plain_grad[i]), rel=1e-12), "the weight is a constant factor"
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-12)
    assert 0.1 < expected["bites"] / float(weights.sum()) < 0.9
    metrics, total = mean_stats(stats), float(weights.sum())
    assert {name: value for name, value in metrics.items() if name.startswith("off_policy/")} == pytest.approx(
        {
            "off_policy/weight": expected["weight"] / total,
            "off_policy/bounded_weight": expected["bounded"] / total,
            f"off_policy/{correction}_fraction": expected["bites"] / total,
            "off_policy/effective_sample_share": expected["weight"] ** 2 / expected["square"] / total,
            "off_policy/bounded_effective_sample_share": expected["bounded"] ** 2 / expected["bounded_square"] / total,
        },
        rel=1e-12,
    )
    assert not any(name.startswith("off_policy") for name in plain_stats)
    assert {name: stats[name] for name in plain_stats if name.startswith(("policy/", "mismatch/"))} == {
        name: value for name, value in plain_stats.items() if name.startswith(("policy/", "mismatch/"))
    }


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_an_engine_that_agrees_changes_no_bit(correction):
    tokens = {name: value.float() if value.is_floating_point() else value for name, value in make_tokens(100).items()}
    tokens["rollout_logprobs"] = tokens["old_logprobs"]
    weights = tokens["loss_mask"].float() / 70
    loss, stats, grad = run(tokens, weights, corrected(correction))
    plain_loss, plain_stats, plain_grad = run(tokens, weights, OffPolicyConfig())
    assert torch.equal(loss, plain_loss)
    assert torch.equal(grad, plain_grad)
    assert {name: stats[name] for name in plain_stats} == plain_stats
    metrics = mean_stats(stats)
    assert metrics["off_policy/weight"] == metrics["off_policy/effective_sample_share"] == pytest.approx(1.0, rel=1e-6)


def test_unbounded_weights_give_the_gradient_of_the_proximal_policys_own_samples():
    # One position, five tokens: expectations are sums over the vocabulary, so there is no sampling noise.
    generator = torch.Generator().manual_seed(3)
    logits, engine_logits, advantages = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
    behaviour = engine_logits.log_softmax(-1)

    def gradient(sampler, correction):
        leaf = logits.clone().requires_grad_()
        logprobs = leaf.log_softmax(-1)
        old, everywhere = logprobs.detach(), torch.ones(5, dtype=torch.bool)
        inputs = LossInputs(logprobs, old, behaviour if correction != "none" else old, advantages, everywhere)
        config = AlgorithmConfig(off_policy=corrected(correction, cap=1e6) if correction != "none" else OffPolicyConfig())
        Objective(config)(inputs, sampler)[0].backward()
        return leaf.grad

    on_policy = gradient(logits.softmax(-1), "none")
    torch.testing.assert_close(gradient(behaviour.exp(), "truncated_is"), on_policy, rtol=1e-12, atol=1e-14)
    assert (gradient(behaviour.exp(), "none") - on_policy).abs().max() > 0.05, "without weights it is another gradient"


def test_no_gradient_flows_through_the_weights():
    tokens = make_tokens(40)
    old = tokens["old_logprobs"].requires_grad_()
    done = off_policy_correction(old, tokens["rollout_logprobs"], tokens["loss_mask"], bind_stages([{"name": "icepop"}]))
    assert not any(value.requires_grad for value in (done.weights_T, *done.token_stats.values()))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_masked_tokens_may_hold_anything_and_extremes_stay_finite(correction):
    tokens = make_tokens(50)
    weights = tokens["loss_mask"].double() / 30
    clean = run(tokens, weights, corrected(correction))
    for name in ("old_logprobs", "rollout_logprobs", "logprobs", "advantages"):
        tokens[name] = torch.where(tokens["loss_mask"], tokens[name], torch.nan)
    loss, stats, grad = run(tokens, weights, corrected(correction))
    assert loss == clean[0]
    assert stats == clean[1]
    assert torch.equal(grad, clean[2])
    tokens = {name: value[:2].float() if value.is_floating_point() else value[:2] for name, value in make_tokens(2).items()}
    tokens |= {"loss_mask": torch.ones(2, dtype=torch.bool), "rollout_logprobs": torch.tensor([-500.0, 0.0])}
    loss, stats, grad = run(tokens, torch.full((2,), 0.5), corrected(correction))
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert all(math.isfinite(value) for value in mean_stats(stats).values())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=3), st.sampled_from(CORRECTIONS), st.integers(0, 1000))
def test_any_split_into_chunks_gives_the_same_sums(cuts, correction, seed):
    tokens = make_tokens(30, seed)
    weights = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * tokens["loss_mask"]
    whole_loss, whole_stats, whole_grad = run(tokens, weights, corrected(correction))
    bounds = [0, *sorted(cuts), 30]
    loss, grads, sums = 0.0, [], {}
    for start, end in itertools.pairwise(bounds):
        part = {name: value[start:end] for name, value in tokens.items()}
        part_loss, stats, grad = run(part, weights[start:end], corrected(correction))
        loss += float(part_loss)
        grads.append(grad)
        sums = {name: sums.get(name, 0.0) + value for name, value in stats.items()}
    assert loss == pytest.approx(float(whole_loss), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(torch.cat(grads), whole_grad)
    assert sums == pytest.approx(whole_stats, rel=1e-9, abs=1e-12)


def test_an_unknown_correction_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm.off_policy.stages \('truncated'\).*Did you mean 'truncated_is'"):
        run(make_tokens(3), torch.ones(3), corrected("truncated"))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"cap": 2.0}], r"`algorithm.off_policy.stages\[0\]` needs a `name`"),
        (
            [{"name": "truncated_is", "capp": 2.0}],
            r"stages\[0\].capp` is not an option: truncated_is has cap, level. Did you mean 'cap'",
        ),
        ([{"name": "truncated_is", "cap": "two"}], r"stages\[0\].cap` must be float; got 'two'"),
        ([{"name": "truncated_is"}, {"name": "icepop"}], r"weighs by the ratio more than once \(truncated_is, icepop\)"),
    ],
)
def test_stages_that_make_no_sense_are_refused(stages, message):
    with pytest.raises(ConfigError, match=message):
        bind_stages(stages)


@pytest.mark.parametrize(
    ("max_staleness", "stages", "warns"), [(0, (), False), (2, (), True), (2, ({"name": "truncated_is"},), False)]
)
def test_stale_samples_without_a_correction_are_warned_of(max_staleness, stages, warns):
    [rule] = [rule for rule in ALGORITHM_COMBINATIONS if "max_staleness` > 0 trains on" in rule.statement]
    config = Config(
        trainer=TrainerConfig(max_staleness=max_staleness), algorithm=AlgorithmConfig(off_policy=OffPolicyConfig(stages))
    )
    messages = list(rule.messages(config, Facts(1, None)))
    assert bool(messages) == warns
    if warns:
        [(message, is_warning)] = messages
        assert is_warning
        assert "algorithm.off_policy.stages=[{name: truncated_is}]" in message
