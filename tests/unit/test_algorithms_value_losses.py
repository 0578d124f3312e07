"""Value losses and their statistics, token by token in numpy float64, by finite differences, and whatever the micro-batching."""

import numpy as np
import pytest
import torch

from skyrl_mega.algorithms.value_losses import VALUE_LOSSES, ValueLossInputs, critic_metrics, value_objective
from skyrl_mega.config.schema import CriticConfig
from skyrl_mega.errors import ConfigError, DataError

LOSSES = sorted(VALUE_LOSSES)


def make_tokens(num_tokens=200, seed=0):
    """Values around old ones, some further than the clip, errors on both sides of the Huber delta; float64."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return torch.randn(num_tokens, generator=generator, dtype=torch.float64) * scale

    old_values = noise(1.0)
    tokens = {
        "values": old_values + noise(0.3),
        "old_values": old_values,
        "returns": old_values + noise(0.8) + 0.5,
        "loss_mask": torch.rand(num_tokens, generator=generator) < 0.7,
    }
    return tokens, torch.rand(num_tokens, generator=generator, dtype=torch.float64) / num_tokens * tokens["loss_mask"]


def oracle(tokens, weights, config):
    """The loss and every metric, each from its definition."""
    t = {name: tensor.numpy() for name, tensor in tokens.items()}
    w = weights.numpy()
    loss = clipped = 0.0
    for i in np.flatnonzero(t["loss_mask"]):
        value, old, target = t["values"][i], t["old_values"][i], t["returns"][i]
        if config.loss == "clipped":
            near = min(max(value, old - config.value_clip), old + config.value_clip)
            free, bound = (value - target) ** 2, (near - target) ** 2
            loss += w[i] * 0.5 * max(free, bound)
            clipped += w[i] * (bound > free)
        elif config.loss == "mse":
            loss += w[i] * 0.5 * (value - target) ** 2
        else:
            size, delta = abs(value - target), config.huber_delta
            loss += w[i] * (0.5 * size**2 if size <= delta else delta * (size - delta / 2))
            clipped += w[i] * (size > delta)
    kept = t["loss_mask"]
    values, returns, w = t["values"][kept], t["returns"][kept], w[kept]

    def variance(x):
        return np.cov(x, aweights=w, bias=True)

    return {
        "critic/loss": loss,
        "critic/clip_fraction": clipped / w.sum(),
        "critic/value_mean": np.average(values, weights=w),
        "critic/return_mean": np.average(returns, weights=w),
        "critic/error_rms": np.average((values - returns) ** 2, weights=w) ** 0.5,
        "critic/explained_variance": 1 - variance(returns - values) / variance(returns),
    }


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_statistics_equal_the_oracle(loss):
    tokens, weights = make_tokens()
    config = CriticConfig(loss=loss, value_clip=0.2, huber_delta=0.6)
    total, sums = value_objective(config, ValueLossInputs(**tokens), weights)
    metrics = critic_metrics({name: float(value) for name, value in sums.items()})
    expected = oracle(tokens, weights, config)
    assert metrics == pytest.approx(expected, rel=1e-12)
    assert float(total) == pytest.approx(expected["critic/loss"], rel=1e-12)
    assert loss == "mse" or 0.05 < metrics["critic/clip_fraction"] < 0.95


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_finite_differences_and_are_zero_under_the_mask(loss):
    tokens, weights = make_tokens(60, seed=1)
    config = CriticConfig(loss=loss, value_clip=0.2, huber_delta=0.6)
    values = tokens.pop("values").requires_grad_()

    def total(values):
        return value_objective(config, ValueLossInputs(values=values, **tokens), weights)[0]

    assert torch.autograd.gradcheck(total, values, eps=1e-7, atol=1e-8)
    gradient = torch.autograd.grad(total(values), values)[0]
    assert (gradient[~tokens["loss_mask"]] == 0).all()


def test_a_value_that_moved_far_enough_towards_its_return_is_pulled_no_further():
    old = torch.zeros(4, dtype=torch.float64)
    returns = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    values = torch.tensor([0.1, 0.3, -0.3, 0.3], dtype=torch.float64, requires_grad=True)
    inputs = ValueLossInputs(values, returns, torch.ones(4, dtype=torch.bool), old)
    loss, _ = value_objective(CriticConfig(value_clip=0.2), inputs, torch.ones(4, dtype=torch.float64))
    loss.backward()
    # Within the clip; beyond it towards the return; beyond it away from the return, twice.
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, -1.3, 1.3])


def test_values_within_the_bounds_never_count_as_clipped():
    """old + (value - old) is not the value in float32: the difference in the last bit is no clipping."""
    tokens, weights = make_tokens(2000)
    tokens = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tokens.items()}
    _, sums = value_objective(CriticConfig(value_clip=10.0), ValueLossInputs(**tokens), weights.float())
    assert float(sums["clipped"]) == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_whole(loss):
    tokens, weights = make_tokens()
    config = CriticConfig(loss=loss)
    whole_loss, whole = value_objective(config, ValueLossInputs(**tokens), weights)
    parts = [
        value_objective(config, ValueLossInputs(**{name: tensor[piece] for name, tensor in tokens.items()}), weights[piece])
        for piece in (slice(0, 33), slice(33, 34), slice(34, 200))
    ]
    added = {name: float(sum(part[1][name] for part in parts)) for name in whole}
    assert float(sum(part[0] for part in parts)) == pytest.approx(float(whole_loss), rel=1e-12)
    assert critic_metrics(added) == pytest.approx(critic_metrics({n: float(v) for n, v in whole.items()}), rel=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_stands_under_the_mask_has_no_say_even_if_it_is_not_finite(loss):
    tokens, weights = make_tokens()
    config = CriticConfig(loss=loss)
    expected, expected_sums = value_objective(config, ValueLossInputs(**tokens), weights)
    masked = ~tokens["loss_mask"]
    for name, poison in (("values", torch.nan), ("old_values", torch.inf), ("returns", torch.nan)):
        tokens[name] = torch.where(masked, poison, tokens[name])
    values = tokens.pop("values").requires_grad_()
    loss_sum, sums = value_objective(config, ValueLossInputs(values=values, **tokens), weights)
    loss_sum.backward()
    assert float(loss_sum.detach()) == float(expected)
    assert {n: float(v) for n, v in sums.items()} == {n: float(v) for n, v in expected_sums.items()}
    assert values.grad.isfinite().all()


def test_equal_returns_have_no_variance_to_explain():
    tokens, weights = make_tokens()
    tokens["returns"] = torch.full_like(tokens["returns"], 0.1)
    _, sums = value_objective(CriticConfig(), ValueLossInputs(**tokens), weights)
    assert "critic/explained_variance" not in critic_metrics({name: float(value) for name, value in sums.items()})


def test_a_batch_without_a_loss_token_reports_its_loss_only():
    tokens, _ = make_tokens()
    _, sums = value_objective(CriticConfig(), ValueLossInputs(**tokens), torch.zeros(200, dtype=torch.float64))
    assert critic_metrics({name: float(value) for name, value in sums.items()}) == {"critic/loss": 0.0}


def test_clipping_without_old_values_and_unknown_losses_are_errors():
    tokens, weights = make_tokens()
    without = ValueLossInputs(**{**tokens, "old_values": None})
    with pytest.raises(DataError, match=r"compute_values.*critic\.loss=mse"):
        value_objective(CriticConfig(), without, weights)
    value_objective(CriticConfig(loss="mse"), without, weights)
    with pytest.raises(ConfigError, match=r"critic\.loss \('hubert'\).*Did you mean 'huber'"):
        value_objective(CriticConfig(loss="hubert"), without, weights)
