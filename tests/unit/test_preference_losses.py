"""Losses of preferences and reward models against their formulas, written out in float64 with the standard library."""

from __future__ import annotations

import math

import pytest
import torch

from skyrl_mega.algorithms.preference.answers import Answers, answers_of, sums_by_sample
from skyrl_mega.algorithms.preference.losses import preference_loss, preference_metrics
from skyrl_mega.algorithms.preference.reward_losses import reward_loss, reward_metrics
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.config.offline_schema import PreferenceConfig, RewardModelConfig
from skyrl_mega.errors import DataError

#: Two pairs: log-probabilities of policy and reference, and lengths, of better and other answer in turns.
SUMS = [-3.0, -9.0, -20.0, -14.0]
REFS = [-4.5, -8.0, -18.0, -15.5]
TOKENS = [2.0, 5.0, 10.0, 7.0]
LABELS = [1.0, 0.0, 0.0, 1.0]
Z = 0.3


def answers(dtype=torch.float64):
    def make(values):
        return torch.tensor(values, dtype=dtype)

    return Answers(make(SUMS).requires_grad_(), make(TOKENS), make(LABELS), make(REFS))


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(settings: PreferenceConfig) -> list[float]:
    """The loss of each row."""
    mean = settings.length_normalised == "on" or (
        settings.length_normalised == "auto" and settings.loss in ("ipo", "simpo", "orpo")
    )
    length = TOKENS if mean else [1.0] * 4
    policy = [x / n for x, n in zip(SUMS, length, strict=True)]
    ratio = [(x - r) / n for x, r, n in zip(SUMS, REFS, length, strict=True)]
    beta, e = settings.beta, settings.label_smoothing
    if settings.loss == "kto":
        w = settings.desirable_weight, settings.undesirable_weight
        good_or_bad = zip(ratio, LABELS, strict=True)
        rows = [w[0] * (1 - s(beta * (r - Z))) if good else w[1] * (1 - s(beta * (Z - r))) for r, good in good_or_bad]
        nll = [-x / n if good else 0.0 for x, n, good in zip(SUMS, TOKENS, LABELS, strict=True)]
    else:
        rows = []
        for i in (0, 2):
            d = ratio[i] - ratio[i + 1]
            odds = [math.log(math.exp(p) / (1 - math.exp(p))) for p in (policy[i], policy[i + 1])]
            rows.append(
                {
                    "sigmoid": -(1 - e) * math.log(s(beta * d)) - e * math.log(s(-beta * d)),
                    "robust": (-(1 - e) * math.log(s(beta * d)) + e * math.log(s(-beta * d))) / (1 - 2 * e),
                    "ipo": (d - 1 / (2 * beta)) ** 2,
                    "hinge": max(0.0, 1 - beta * d),
                    "simpo": -math.log(s(beta * (policy[i] - policy[i + 1]) - settings.margin)),
                    "orpo": -beta * math.log(s(odds[0] - odds[1])),
                }[settings.loss]
            )
        nll = [-SUMS[0] / TOKENS[0], -SUMS[2] / TOKENS[2]]
    coef = 1.0 if settings.loss == "orpo" else settings.sft_coef
    return [row + coef * n for row, n in zip(rows, nll, strict=True)]


CASES = [
    PreferenceConfig(),
    PreferenceConfig(label_smoothing=0.2, beta=0.5),
    PreferenceConfig(length_normalised="on", beta=2.0),
    PreferenceConfig(loss="robust", label_smoothing=0.1),
    PreferenceConfig(loss="ipo", beta=0.3),
    PreferenceConfig(loss="ipo", beta=0.3, length_normalised="off"),
    PreferenceConfig(loss="hinge", beta=0.2),
    PreferenceConfig(loss="simpo", beta=2.0, margin=0.7),
    PreferenceConfig(loss="orpo", beta=0.4),
    PreferenceConfig(loss="kto", desirable_weight=1.5, undesirable_weight=0.5),
    PreferenceConfig(loss="kto", sft_coef=0.3),
    PreferenceConfig(sft_coef=0.7),
]


@pytest.mark.parametrize("settings", CASES, ids=lambda c: f"{c.loss}-{c.length_normalised}-{c.sft_coef}")
def test_a_loss_is_its_formula_and_so_is_its_gradient(settings):
    given = answers()
    loss_R, sums = preference_loss(settings, given, kl_baseline=Z)
    assert loss_R.tolist() == pytest.approx(by_hand(settings), rel=1e-12)
    assert float(sums["loss/total"]) == pytest.approx(sum(by_hand(settings)))
    assert all(not value.requires_grad for value in sums.values())
    assert torch.autograd.gradcheck(
        lambda sums_A: preference_loss(settings, Answers(sums_A, given.tokens, given.targets, given.ref_sums), kl_baseline=Z)[0],
        (given.sums,),
    )


def test_rewards_are_reported_as_trl_names_them():
    settings = PreferenceConfig(beta=0.5)
    _, sums = preference_loss(settings, answers())
    found = preference_metrics({name: float(value) for name, value in sums.items()})
    rewards = [0.5 * (x - r) for x, r in zip(SUMS, REFS, strict=True)]
    assert found["rewards/chosen"] == pytest.approx((rewards[0] + rewards[2]) / 2)
    assert found["rewards/rejected"] == pytest.approx((rewards[1] + rewards[3]) / 2)
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])
    assert found["rewards/accuracies"] == 0.5
    assert found["logps/chosen"] == pytest.approx((SUMS[0] + SUMS[2]) / 2)


def test_of_single_answers_good_and_bad_ones_are_averaged_apart():
    _, sums = preference_loss(PreferenceConfig(loss="kto"), answers(), kl_baseline=Z)
    # One more good answer elsewhere: what is averaged are sums of the whole batch.
    totals = {name: float(value) for name, value in sums.items()}
    totals = {
        name: value + 1.0 if name in ("count/rows", "count/chosen", "rewards/chosen") else value for name, value in totals.items()
    }
    found = preference_metrics(totals)
    ratios = [x - r for x, r in zip(SUMS, REFS, strict=True)]
    assert found["rewards/chosen"] == pytest.approx((0.1 * (ratios[0] + ratios[3]) + 1.0) / 3)
    assert found["rewards/rejected"] == pytest.approx(0.1 * (ratios[1] + ratios[2]) / 2)


def test_a_reference_that_is_needed_and_absent_is_an_error():
    given = answers()
    without = Answers(given.sums, given.tokens, given.targets)
    with pytest.raises(DataError, match="needs the reference"):
        preference_loss(PreferenceConfig(), without)
    assert preference_loss(PreferenceConfig(loss="simpo"), without)[0].shape == (2,)


def test_odds_of_likely_and_unlikely_answers_lose_no_digits():
    given = torch.tensor([-1e-7, -30.0], dtype=torch.float64, requires_grad=True)
    one = torch.ones(2, dtype=torch.float64)
    loss_R, _ = preference_loss(PreferenceConfig(loss="orpo", beta=1.0), Answers(given, one, one))
    expected = -1e-7 - math.log(-math.expm1(-1e-7)) - (-30.0 - math.log1p(-math.exp(-30.0)))
    assert float(loss_R.detach()) == pytest.approx(1e-7 + math.log1p(math.exp(-expected)), rel=1e-9)
    loss_R.sum().backward()
    assert given.grad.isfinite().all()


@pytest.mark.parametrize("centering", [0.0, 0.05])
def test_bradley_terry_is_its_formula(centering):
    given = answers()
    scores, margins = [0.5, -0.2, 1.0, 1.7], [0.0, 9.0, 0.4, 9.0]
    given = Answers(
        torch.tensor(scores, dtype=torch.float64).requires_grad_(), given.tokens, torch.tensor(margins, dtype=torch.float64)
    )
    loss_R, sums = reward_loss(RewardModelConfig(centering_coef=centering), given)
    expected = [
        -math.log(s(scores[i] - scores[i + 1] - margins[i])) + centering * (scores[i] + scores[i + 1]) ** 2 for i in (0, 2)
    ]
    assert loss_R.tolist() == pytest.approx(expected, rel=1e-12)
    found = reward_metrics({name: float(value) for name, value in sums.items()})
    assert found["rewards/accuracies"] == 0.5
    assert found["rewards/margins"] == pytest.approx((0.7 - 0.7) / 2)


def test_regression_is_the_squared_error_and_tells_the_correlation():
    scores, labels = [0.5, -0.2, 1.0, 1.7], [0.0, 1.0, 2.0, 3.0]
    given = Answers(torch.tensor(scores, dtype=torch.float64), torch.ones(4).double(), torch.tensor(labels, dtype=torch.float64))
    loss_R, sums = reward_loss(RewardModelConfig(loss="regression"), given)
    assert loss_R.tolist() == pytest.approx([(x - y) ** 2 for x, y in zip(scores, labels, strict=True)])
    found = reward_metrics({name: float(value) for name, value in sums.items()})
    assert found["rewards/correlation"] == pytest.approx(float(torch.corrcoef(torch.tensor([scores, labels]).double())[0, 1]))


def test_answers_are_summed_where_they_are_trained_whatever_lies_around_them():
    # A trunk, a pair on it, a padding sequence; sample 3 comes before sample 2 nowhere: pairs stay together.
    lengths, index = [2, 3, 2, 1], torch.tensor([-1, 2, 3, -1])
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.arange(8.0)
    mask = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0], dtype=torch.bool)
    targets = torch.tensor([7.0, 7.0, 0.5, 0.25])
    found = answers_of(values, mask, Sequences.packed(bounds), index, targets_N=targets, ref_sums_N=10 * targets)
    assert found.sums.tolist() == [3.0 + 4.0, 5.0 + 6.0]
    assert found.tokens.tolist() == [2.0, 2.0]
    assert found.targets.tolist() == [0.5, 0.25]
    assert found.ref_sums.tolist() == [5.0, 2.5]
    assert sums_by_sample([values], [mask], [index], [bounds], 5).tolist() == [0.0, 0.0, 7.0, 11.0, 0.0]
