"""The objective against a numpy oracle, by hand, and whatever the micro-batching."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_mega.algorithms.loss import Objective, mean_stats
from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.algorithms.policy_losses.ppo import ppo_clip
from skyrl_mega.algorithms.reductions import REDUCTIONS, Totals, reduction_weights
from skyrl_mega.config.schema import AlgorithmConfig, KLConfig
from skyrl_mega.errors import ConfigError

FIELDS = ("logprobs", "old_logprobs", "rollout_logprobs", "advantages", "loss_mask", "entropy", "ref_logprobs")


def make_tokens(num_tokens, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return torch.randn(num_tokens, generator=generator, dtype=torch.float64).mul(scale).to(dtype)

    base = -noise(1.0).abs() - 0.1
    return {
        "logprobs": base + noise(0.3),
        "old_logprobs": base,
        "rollout_logprobs": base + noise(0.01),
        "advantages": noise(1.0),
        "loss_mask": torch.rand(num_tokens, generator=generator) < 0.7,
        "entropy": noise(1.0).abs(),
        "ref_logprobs": base + noise(0.2),
    }


def oracle(tokens, weights, config, clip_low=0.2, clip_high=0.28):
    """The papers' formulas, token by token, in numpy float64: the objective and its parts."""
    parts = dict.fromkeys(("policy", "kl", "entropy", "ratio", "clip_low", "clip_high", "approx_kl", "mismatch"), 0.0)
    t = {name: tensor.numpy() for name, tensor in tokens.items()}
    for i in np.flatnonzero(t["loss_mask"]):
        ratio, advantage, w = np.exp(t["logprobs"][i] - t["old_logprobs"][i]), t["advantages"][i], float(weights[i])
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        parts["policy"] -= w * min(ratio * advantage, clipped * advantage)
        log_r = t["ref_logprobs"][i] - t["logprobs"][i]
        kl = {"k1": -log_r, "k2": log_r**2 / 2, "k3": np.exp(log_r) - 1 - log_r}[config.kl.estimator]
        parts["kl"] += w * config.kl.coef * kl
        parts["entropy"] -= w * config.entropy_coef * t["entropy"][i]
        parts["ratio"] += w * ratio
        parts["clip_low"] += w * (advantage < 0 and ratio < 1 - clip_low)
        parts["clip_high"] += w * (advantage > 0 and ratio > 1 + clip_high)
        parts["approx_kl"] += w * (ratio - 1 - np.log(ratio))
        parts["mismatch"] += w * abs(t["old_logprobs"][i] - t["rollout_logprobs"][i])
    return parts


def run(tokens, weights, config):
    """(loss, stats, gradients of logprobs and entropy)."""
    leaves = {name: tokens[name].clone().requires_grad_() for name in ("logprobs", "entropy")}
    loss, stats = Objective(config)(LossInputs(**{**tokens, **leaves}), weights)
    loss.backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()]
    return loss.detach(), stats, grads


CONFIG = AlgorithmConfig(entropy_coef=0.01, kl=KLConfig(coef=0.05, estimator="k3"))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_objective_and_statistics_match_the_formulas(estimator):
    config = AlgorithmConfig(entropy_coef=0.01, kl=KLConfig(coef=0.05, estimator=estimator))
    tokens = make_tokens(200)
    weights = torch.rand(200, dtype=torch.float64) * tokens["loss_mask"]
    loss, stats, _ = run(tokens, weights, config)
    expected = oracle(tokens, weights, config)
    sums = {name: float(value) for name, value in stats.sums.items()}
    np.testing.assert_allclose(float(loss), expected["policy"] + expected["kl"] + expected["entropy"], rtol=1e-12)
    for ours, theirs in {
        "loss/policy": "policy",
        "loss/kl": "kl",
        "loss/entropy": "entropy",
        "policy/ratio": "ratio",
        "policy/clip_low_fraction": "clip_low",
        "policy/clip_high_fraction": "clip_high",
        "policy/approx_kl": "approx_kl",
        "mismatch/abs_logprob_diff_mean": "mismatch",
    }.items():
        np.testing.assert_allclose(sums[ours], expected[theirs], rtol=1e-10, err_msg=ours)
    assert min(expected["clip_low"], expected["clip_high"]) > 0, "the case must clip on both sides to test it"
    largest = (tokens["old_logprobs"] - tokens["rollout_logprobs"])[tokens["loss_mask"]].abs().max()
    assert stats.maxima["mismatch/abs_logprob_diff_max"] == largest


def test_gradients_match_finite_differences_of_the_formulas():
    tokens = make_tokens(12, seed=4)
    weights = torch.rand(12, dtype=torch.float64) * tokens["loss_mask"]
    _, _, grads = run(tokens, weights, CONFIG)

    def total(**change):
        parts = oracle({**tokens, **change}, weights, CONFIG)
        return parts["policy"] + parts["kl"] + parts["entropy"]

    for name, grad in zip(("logprobs", "entropy"), grads, strict=True):
        for i in range(12):
            step = torch.zeros(12, dtype=torch.float64)
            step[i] = 1e-6
            slope = (total(**{name: tokens[name] + step}) - total(**{name: tokens[name] - step})) / 2e-6
            np.testing.assert_allclose(float(grad[i]), slope, rtol=1e-6, atol=1e-9)


def test_clipping_by_hand():
    # ratios 0.5 and 1.5 against bounds 0.8 and 1.28, each with a good and a bad advantage.
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    logprobs = ratio.log().requires_grad_()
    inputs = LossInputs(logprobs, torch.zeros(4), torch.zeros(4), advantages, torch.ones(4, dtype=torch.bool))
    loss, stats = ppo_clip(inputs, clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(loss, torch.tensor([-0.5, 0.8, -1.28, 1.5]))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.5, 0.0, 0.0, 1.5]))
    assert stats["clip_low_fraction"].tolist() == [0, 1, 0, 0]
    assert stats["clip_high_fraction"].tolist() == [0, 0, 1, 0]


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    tokens = make_tokens(50)
    tokens["old_logprobs"] = tokens["logprobs"]
    weights = reduction_weights(
        "token_mean", tokens["loss_mask"], torch.tensor([0, 50]), torch.tensor([35.0]), None, Totals(35, 1, 1)
    )
    _, stats, grads = run(tokens, weights, AlgorithmConfig())
    torch.testing.assert_close(grads[0], -tokens["advantages"] * weights, rtol=1e-12, atol=0)
    assert stats.sums["policy/approx_kl"] == 0


def test_masked_tokens_get_no_gradient_and_may_hold_anything():
    tokens = make_tokens(50)
    weights = tokens["loss_mask"].double() / 30
    clean = run(tokens, weights, CONFIG)
    for name in FIELDS:
        if name != "loss_mask":
            tokens[name] = torch.where(tokens["loss_mask"], tokens[name], torch.nan)
    loss, stats, grads = run(tokens, weights, CONFIG)
    assert loss == clean[0]
    assert {k: float(v) for k, v in stats.sums.items()} == {k: float(v) for k, v in clean[1].sums.items()}
    for grad, expected in zip(grads, clean[2], strict=True):
        assert torch.equal(grad, expected)
        assert (grad[~tokens["loss_mask"]] == 0).all()


def test_a_ratio_beyond_float32_gives_a_finite_loss_and_gradient():
    inputs = LossInputs(
        torch.tensor([0.0, 0.0], requires_grad=True), torch.tensor([-500.0, -500.0]), torch.zeros(2), torch.tensor([0.0, -1.0]),
        torch.ones(2, dtype=torch.bool),
    )  # fmt: skip
    loss, _ = Objective(AlgorithmConfig())(inputs, torch.full((2,), 0.5))
    loss.backward()
    assert loss.isfinite()
    assert inputs.logprobs.grad.isfinite().all()


# -- reductions ---------------------------------------------------------------------------------------------------------


@st.composite
def packed_batches(draw):
    """Sequence lengths, and a random assignment of the sequences to micro-batches (as on several ranks)."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    bins = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    return lengths, bins, draw(st.integers(0, 10_000))


def micro_batch(sequences, members, reduction, totals, groups):
    tokens = {name: torch.cat([sequences[i][name] for i in members]) for name in FIELDS}
    cu_seqlens = torch.tensor([0, *np.cumsum([len(sequences[i]["logprobs"]) for i in members])], dtype=torch.int32)
    loss_tokens = torch.tensor([float(sequences[i]["loss_mask"].sum()) for i in members])
    counts = [float(s["loss_mask"].sum()) for s in sequences]
    group_tokens = torch.tensor([sum(counts[j] for j in range(len(counts)) if groups[j] == groups[i]) for i in members])
    return tokens, reduction_weights(reduction, tokens["loss_mask"], cu_seqlens, loss_tokens, group_tokens, totals)


@settings(max_examples=60, deadline=None)
@given(packed_batches(), st.sampled_from(list(REDUCTIONS)))
def test_any_split_into_micro_batches_gives_the_same_loss_gradients_and_statistics(batch, reduction):
    lengths, bins, seed = batch
    sequences = [make_tokens(length, seed + i) for i, length in enumerate(lengths)]
    groups = [i // 2 for i in range(len(sequences))]
    totals = Totals(sum(int(s["loss_mask"].sum()) for s in sequences), len(sequences), len(set(groups)), constant_length=7)
    everything = list(range(len(lengths)))
    whole_loss, whole_stats, whole_grads = run(*micro_batch(sequences, everything, reduction, totals, groups), CONFIG)

    loss, sums, grads = torch.zeros(()), {}, {}
    for number in set(bins):
        members = [i for i in everything if bins[i] == number]
        part_loss, stats, part_grads = run(*micro_batch(sequences, members, reduction, totals, groups), CONFIG)
        loss = loss + part_loss
        sums = {name: sums.get(name, 0.0) + float(value) for name, value in stats.sums.items()}
        pieces = [torch.split(grad, [lengths[i] for i in members]) for grad in part_grads]
        grads.update({i: [piece[k] for piece in pieces] for k, i in enumerate(members)})
    # Weights are float32; everything else here is float64.
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=1e-9, check_dtype=False)
    for name, value in whole_stats.sums.items():
        assert abs(sums[name] - float(value)) <= 1e-6 * max(1.0, abs(float(value))), name
    for k in range(2):
        torch.testing.assert_close(torch.cat([grads[i][k] for i in everything]), whole_grads[k], rtol=1e-6, atol=1e-12)


def test_token_mean_is_the_mean_over_tokens_and_sequence_mean_over_sequences():
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1], dtype=torch.bool)
    cu_seqlens, loss_tokens = torch.tensor([0, 3, 3, 5, 8], dtype=torch.int32), torch.tensor([2.0, 0.0, 1.0, 3.0])
    value = torch.arange(8.0)
    totals = Totals(6, 3, 3)
    token = (reduction_weights("token_mean", mask, cu_seqlens, loss_tokens, loss_tokens, totals) * value).sum()
    sequence = (reduction_weights("sequence_mean", mask, cu_seqlens, loss_tokens, loss_tokens, totals) * value).sum()
    torch.testing.assert_close(token, value[mask].mean())
    torch.testing.assert_close(sequence, torch.tensor((0.5 + 3.0 + 6.0) / 3))


def test_sequence_sum_norm_divides_by_a_constant_and_prompt_mean_averages_prompts():
    mask, cu_seqlens = torch.ones(6, dtype=torch.bool), torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    tokens, group_tokens = (
        torch.tensor([3.0, 1.0, 2.0]),
        torch.tensor([4.0, 4.0, 2.0]),
    )  # two samples of one prompt, one of another
    value, totals = torch.arange(6.0), Totals(6, 3, 2, constant_length=10)
    summed = (reduction_weights("sequence_sum_norm", mask, cu_seqlens, tokens, group_tokens, totals) * value).sum()
    torch.testing.assert_close(summed, torch.tensor((3.0 + 3.0 + 9.0) / 10 / 3))
    prompts = (reduction_weights("prompt_mean", mask, cu_seqlens, tokens, group_tokens, totals) * value).sum()
    torch.testing.assert_close(prompts, torch.tensor((6.0 / 4 + 9.0 / 2) / 2))
    with pytest.raises(ConfigError, match=r"algorithm.reduction_length \(0\) must be at least 1"):
        reduction_weights("sequence_sum_norm", mask, cu_seqlens, tokens, group_tokens, Totals(6, 3, 2))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_micro_batch_of_padding_weighs_nothing(reduction):
    mask = torch.zeros(4, dtype=torch.bool)
    weights = reduction_weights(reduction, mask, torch.tensor([0, 4]), torch.zeros(1), torch.zeros(1), Totals(0, 0, 0, 5))
    assert (weights == 0).all()
    tokens = {**make_tokens(4), "loss_mask": mask}
    loss, stats, _ = run(tokens, weights, CONFIG)
    assert loss == 0
    assert mean_stats({k: float(v) for k, v in stats.sums.items()})["policy/entropy"] == 0.0


def test_averages_are_not_diluted_by_samples_left_out_of_compute():
    tokens = {**make_tokens(10), "loss_mask": torch.ones(10, dtype=torch.bool)}
    tokens["old_logprobs"] = tokens["logprobs"]
    # 40 loss tokens in the update; 30 of them belong to samples whose advantages are all zero.
    weights = reduction_weights(
        "token_mean", tokens["loss_mask"], torch.tensor([0, 10]), torch.tensor([10.0]), None, Totals(40, 4, 4)
    )
    _, stats, _ = run(tokens, weights, AlgorithmConfig())
    metrics = mean_stats({name: float(value) for name, value in stats.sums.items()})
    assert metrics["weight/sum"] == pytest.approx(0.25)
    assert metrics["policy/ratio"] == pytest.approx(1.0)
    assert metrics["policy/entropy"] == pytest.approx(float(tokens["entropy"].mean()))
    assert metrics["loss/policy"] == pytest.approx(float(-tokens["advantages"].sum() / 40))


def test_terms_switched_on_without_their_input_are_errors():
    tokens = make_tokens(3)
    weights = torch.ones(3)
    del tokens["ref_logprobs"]
    with pytest.raises(ConfigError, match=r"algorithm.kl.coef \(0.1\) needs ref_logprobs"):
        Objective(AlgorithmConfig(kl=KLConfig(coef=0.1)))(LossInputs(**tokens), weights)
    del tokens["entropy"]
    with pytest.raises(ConfigError, match=r"algorithm.entropy_coef \(0.5\) needs the entropy"):
        Objective(AlgorithmConfig(entropy_coef=0.5))(LossInputs(**tokens), weights)
    assert "policy/entropy" not in Objective(AlgorithmConfig())(LossInputs(**tokens), weights)[1].sums


@pytest.mark.parametrize("change", [{"policy_loss": "ppo_clipp"}, {"kl": KLConfig(coef=0.1, estimator="k33")}])
def test_unknown_names_are_refused(change):
    with pytest.raises(ConfigError, match="Did you mean"):
        Objective(AlgorithmConfig(**change))
    with pytest.raises(ConfigError, match=r"algorithm.reduction \('token_men'\).*Did you mean 'token_mean'"):
        reduction_weights(
            "token_men", torch.ones(1, dtype=torch.bool), torch.tensor([0, 1]), torch.ones(1), None, Totals(1, 1, 1)
        )
