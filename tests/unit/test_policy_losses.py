"""Every policy loss against its paper's formula in Python floats, finite differences, numbers by hand, and invariants."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.loss_oracle import Response, as_inputs, random_response, token_losses
from helpers.policy_loss_cases import OPTIONS
from skyrl_mega.algorithms.check import check_algorithm
from skyrl_mega.algorithms.loss import Objective
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES, LossInputs
from skyrl_mega.algorithms.policy_losses.covariance import mark_largest, mark_within
from skyrl_mega.algorithms.policy_losses.inputs import MarkInputs
from skyrl_mega.config.schema import AlgorithmConfig, OffPolicyConfig
from skyrl_mega.errors import ConfigError

#: One advantage for a whole response is what their papers speak of.
OF_SEQUENCES = {"gspo", "gmpo"}


def loss_of(name, **options):
    return POLICY_LOSSES.find(name).bind(options, "algorithm.loss_options")


def responses_for(name, seed=0, count=12):
    signs = [1.3, -0.8, 0.4, -1.7]
    whole = name in OF_SEQUENCES
    return [
        random_response(3 + (5 * i) % 7, seed * 100 + i, advantage=signs[i % 4] if whole else None, spread=0.15 if whole else 0.5)
        for i in range(count)
    ]


def defaults(name):
    parameters = inspect.signature(POLICY_LOSSES.find(name).function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def test_every_loss_has_an_oracle():
    assert {name for name in POLICY_LOSSES.built_in if not POLICY_LOSSES.find(name).traits["needs"]} == set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_statistics_match_the_papers_formulas(name):
    responses = responses_for(name)
    loss_T, stats = loss_of(name, **OPTIONS[name])(as_inputs(responses))
    expected = [token for response in responses for token in token_losses(name, response, OPTIONS[name])]
    torch.testing.assert_close(
        loss_T.detach(), torch.tensor([x for x, _ in expected], dtype=torch.float64), rtol=1e-11, atol=1e-13
    )
    names = {key for _, token_stats in expected for key in token_stats}
    for key in names:
        values = torch.tensor([token_stats.get(key, 0.0) for _, token_stats in expected], dtype=torch.float64)
        torch.testing.assert_close(stats[key], values, rtol=1e-6, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
        if key.endswith("fraction"):
            assert 0 < values.mean() < 1, f"the case must exercise {key}"
    assert names <= stats.keys() <= names | {"marked_kl"}


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_match_finite_differences_of_the_formulas(name):
    responses = responses_for(name, seed=1, count=6)
    inputs = as_inputs(responses)
    weights = [0.5 + 0.1 * i for i in range(len(responses))]
    weights_T = torch.tensor([w for w, r in zip(weights, responses, strict=True) for _ in r.logprobs], dtype=torch.float64)
    (loss_of(name, **OPTIONS[name])(inputs)[0] * weights_T).sum().backward()
    slopes = []
    for response, weight in zip(responses, weights, strict=True):
        for token in range(len(response.logprobs)):
            above, below = (
                sum(loss for loss, _ in token_losses(name, response.moved(token, step), OPTIONS[name])) for step in (1e-6, -1e-6)
            )
            slopes.append(weight * (above - below) / 2e-6)
    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-8)
    assert inputs.logprobs.grad.abs().max() > 0.1


# loss, {option: value}, (ratios), (old probabilities), A, marked, losses, gradients of their sum
BY_HAND = {
    "ppo_clip keeps a good token inside": ("ppo_clip", {}, [1.2], [0.5], 1.0, False, [-1.2], [-1.2]),
    "dual_clip bounds a bad token": ("dual_clip", {}, [4.0], [0.1], -1.0, False, [3.0], [0.0]),
    "dual_clip leaves one inside": ("dual_clip", {}, [2.0], [0.1], -1.0, False, [2.0], [2.0]),
    "dual_clip leaves good ones to PPO": ("dual_clip", {}, [4.0], [0.1], 1.0, False, [-1.28], [0.0]),
    "gspo sees ratios that cancel as 1": ("gspo", {}, [2.0, 0.5], [0.2, 0.4], 3.0, False, [-3.0, -3.0], [-3.0, -3.0]),
    "gspo clips a whole response": ("gspo", {}, [1.21, 1.0], [0.2, 0.4], 1.0, False, [-1.0004] * 2, [0.0, 0.0]),
    "gspo does not clip towards 1": ("gspo", {}, [1.21, 1.0], [0.2, 0.4], -1.0, False, [1.1] * 2, [1.1, 1.1]),
    "gspo_token has the same gradient": ("gspo_token", {}, [1.21, 1.0], [0.2, 0.4], -1.0, False, [1.1] * 2, [1.1, 1.1]),
    "gmpo clips a token and keeps the others": (
        "gmpo", {}, [math.e, 1.0], [0.1, 0.1], 1.0, False, [-math.exp(0.2)] * 2, [0.0, -math.exp(0.2)]
    ),
    "gmpo does not clip towards 1": ("gmpo", {}, [4.0, 1.0], [0.1, 0.1], -1.0, False, [2.0] * 2, [2.0, 2.0]),
    "cispo bounds the weight": ("cispo", {}, [8.0], [math.exp(-1) / 8], 1.0, False, [5.0], [-5.0]),
    "cispo has no lower bound": ("cispo", {}, [0.5], [2 * math.exp(-1)], 1.0, False, [0.5], [-0.5]),
    "sapo at ratio 1": ("sapo", {}, [1.0], [0.3], 2.0, False, [-4.0], [-2.0]),
    "sapo where the gate is 3/4": (
        "sapo", {}, [1 + math.log(3)], [0.1], 1.0, False, [-3.0], [-0.75 * (1 + math.log(3))]
    ),
    "dppo_tv stops 0.6 -> 0.9": ("dppo_tv", {}, [1.5], [0.6], 1.0, False, [0.0], [0.0]),
    "dppo_tv lets it come back": ("dppo_tv", {}, [1.5], [0.6], -1.0, False, [1.5], [1.5]),
    "dppo_tv lets rare tokens triple": ("dppo_tv", {}, [3.0], [1e-4], 1.0, False, [-3.0], [-3.0]),
    "dppo_tv truncates": ("dppo_tv", {}, [50.0], [1e-4], 1.0, False, [-20.0], [-20.0]),
    "dppo_kl stops 0.5 -> 0.9": ("dppo_kl", {}, [1.8], [0.5], 1.0, False, [0.0], [0.0]),
    "dppo_kl allows 0.5 -> 0.6": ("dppo_kl", {}, [1.2], [0.5], 1.0, False, [-1.2], [-1.2]),
    "clip_cov drops a marked token": ("clip_cov", {}, [1.1], [0.5], 1.0, True, [0.0], [0.0]),
    "clip_cov is PPO elsewhere": ("clip_cov", {}, [1.5], [0.5], 1.0, False, [-1.28], [0.0]),
    "kl_cov holds a marked token back": ("kl_cov", {}, [2.0], [0.2], 1.0, True, [-2 + math.log(2)], [-1.0]),
    "kl_cov does not clip": ("kl_cov", {}, [2.0], [0.2], 1.0, False, [-2.0], [-2.0]),
    "reinforce": ("reinforce", {}, [1.0], [math.exp(-2)], 3.0, False, [6.0], [-3.0]),
    "importance_sampling": ("importance_sampling", {}, [2.0], [0.1], 3.0, False, [-6.0], [-6.0]),
    "cross_entropy ignores the advantage": ("cross_entropy", {}, [1.0], [math.exp(-2)], -5.0, False, [2.0], [-1.0]),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
def test_worked_examples(case):
    name, options, ratios, old, advantage, marked, losses, gradients = BY_HAND[case]
    old_logprobs = [math.log(p) for p in old]
    logprobs = [math.log(p * ratio) for p, ratio in zip(old, ratios, strict=True)]
    count = len(old)
    response = Response(logprobs, old_logprobs, old_logprobs, [advantage] * count, [True] * count, [marked] * count)
    inputs = as_inputs([response])
    loss_T, _ = loss_of(name, **options)(inputs)
    loss_T.sum().backward()
    torch.testing.assert_close(loss_T.detach(), torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor(gradients, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "cross_entropy"])
def test_at_ratio_one_the_gradient_is_the_policy_gradient(name):
    """Even where a token is marked, in kl_cov: |log ratio| is flat enough at 0. clip_cov drops marked tokens by intent."""
    responses = responses_for(name, seed=2)
    for response in responses:
        response.old = response.rollout = list(response.logprobs)
        if name == "clip_cov":
            response.marked = [False] * len(response.marked)
    inputs = as_inputs(responses)
    loss_T, stats = loss_of(name, **defaults(name))(inputs)
    loss_T.sum().backward()
    torch.testing.assert_close(
        inputs.logprobs.grad, torch.where(inputs.loss_mask, -inputs.advantages, 0.0), rtol=1e-12, atol=1e-15
    )
    assert stats["approx_kl"].abs().max() == 0
    torch.testing.assert_close(stats["ratio"], inputs.loss_mask.double())


@pytest.mark.parametrize("name", OPTIONS)
def test_masked_tokens_get_no_gradient_and_may_hold_anything(name):
    results = []
    for junk in (0.0, float("nan"), float("inf"), -float("inf")):
        clean = as_inputs(responses_for(name, seed=3), requires_grad=False)
        floats = ("logprobs", "old_logprobs", "rollout_logprobs", "advantages")
        values = {field: torch.where(clean.loss_mask, getattr(clean, field), junk) for field in floats}
        logprobs = values.pop("logprobs").requires_grad_()
        inputs = LossInputs(logprobs, loss_mask=clean.loss_mask, sequences=clean.sequences, marked=clean.marked, **values)
        loss_T, stats = loss_of(name, **OPTIONS[name])(inputs)
        loss_T.sum().backward()
        assert (logprobs.grad[~clean.loss_mask] == 0).all()
        results.append([loss_T.detach(), logprobs.grad, *stats.values()])
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert torch.equal(value, expected)
            assert (value[~clean.loss_mask] == 0).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_hopeless_ratios_stay_finite_in_float32(name):
    far = [0.0, -0.5, -500.0, -500.0, -0.5, -500.0, -1000.0, 0.0]
    response = Response(far, far[::-1], far[::-1], [1.0, -1.0, 0.0, 3.0, -3.0, 1.0, -1.0, 0.0], [True] * 8, [True, False] * 4)
    for responses in ([response], [Response(*([values[t]] for values in vars(response).values() if values)) for t in range(8)]):
        inputs = as_inputs(responses, dtype=torch.float32)
        loss_T, stats = loss_of(name)(inputs)
        loss_T.sum().backward()
        for value in (loss_T, inputs.logprobs.grad, *stats.values()):
            assert value.isfinite().all()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 2), min_size=1, max_size=7), st.sampled_from(sorted(OPTIONS)))
def test_any_split_by_whole_sequences_gives_the_same_losses_gradients_and_statistics(seed, bins, name):
    responses = responses_for(name, seed=seed, count=len(bins))
    loss = loss_of(name, **OPTIONS[name])

    def run(members):
        inputs = as_inputs([responses[i] for i in members])
        loss_T, stats = loss(inputs)
        loss_T.sum().backward()
        rows = torch.stack([loss_T.detach(), inputs.logprobs.grad, *stats.values()])
        return rows.split([len(responses[i].logprobs) for i in members], dim=1)

    whole = run(range(len(bins)))
    for number in set(bins):
        members = [i for i, b in enumerate(bins) if b == number]
        for i, rows in zip(members, run(members), strict=True):
            torch.testing.assert_close(rows, whole[i], rtol=1e-12, atol=1e-14)


def test_gspo_and_gspo_token_have_the_same_gradient_where_advantages_are_equal():
    gradients = []
    for name in ("gspo", "gspo_token"):
        inputs = as_inputs(responses_for("gspo", seed=4))
        loss_of(name)(inputs)[0].sum().backward()
        gradients.append(inputs.logprobs.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)


BAD_OPTIONS = [
    ("ppo_clip", {"clip_low": 1.5}, r"clip_low` \(1.5\) must be at least 0 and at most 1"),
    ("ppo_clip", {"clip_high": -0.1}, r"clip_high` \(-0.1\) must be at least 0"),
    ("dual_clip", {"cap": 1.0}, r"cap` \(1\) must be greater than 1"),
    ("gspo", {"clip_low": -1.0}, "clip_low"),
    ("gspo_token", {"clip_high": -1.0}, "clip_high"),
    ("gmpo", {"clip_low": -1.0}, "clip_low"),
    ("cispo", {"clip_high": float("nan")}, "clip_high"),
    ("sapo", {"tau_positive": 0.0}, r"tau_positive` \(0\) must be greater than 0"),
    ("sapo", {"tau_negative": -1.0}, "tau_negative"),
    ("dppo_tv", {"delta_low": 1.5}, "delta_low"),
    ("dppo_kl", {"delta_high": -1.0}, "delta_high"),
    ("dppo_kl", {"cap": 0.5}, "cap"),
    ("clip_cov", {"fraction": 0.0}, r"fraction` \(0\) must be greater than 0 and at most 1"),
    ("clip_cov", {"cov_low": 5.0}, r"cov_low` \(5\) must be below `cov_high` \(5\)"),
    ("kl_cov", {"fraction": 1.5}, "fraction"),
    ("kl_cov", {"coef": -1.0}, "coef"),
    ("gspo", {"clip_lo": 0.1}, "Did you mean 'clip_low'"),
]


@pytest.mark.parametrize(("name", "options", "words"), BAD_OPTIONS)
def test_options_out_of_range_are_refused_before_anything_is_started(name, options, words):
    with pytest.raises(ConfigError, match=words):
        check_algorithm(AlgorithmConfig(policy_loss=name, loss_options=options))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_defaults_pass_the_check(name):
    check_algorithm(AlgorithmConfig(policy_loss=name))


def test_what_the_caller_left_out_is_an_error():
    inputs = as_inputs(responses_for("gspo"))
    for name, words in (("gspo", "LossInputs.sequences"), ("gmpo", "LossInputs.sequences"), ("kl_cov", "LossInputs.marked")):
        given = {**vars(inputs), "sequences": None, "marked": None}
        with pytest.raises(ConfigError, match=words):
            loss_of(name)(LossInputs(**given))
    padding = {**vars(inputs), "marked": None, "loss_mask": torch.zeros_like(inputs.loss_mask)}
    assert (loss_of("kl_cov")(LossInputs(**padding))[0] == 0).all()


def test_a_loss_against_the_sampler_is_not_weighed_again():
    twice = AlgorithmConfig(policy_loss="dppo_tv", off_policy=OffPolicyConfig(stages=({"name": "truncated_is"},)))
    with pytest.raises(ConfigError, match="dppo_tv` weighs tokens by policy / engine itself; the stage truncated_is"):
        Objective(twice)


def test_dppo_measures_the_distance_to_the_engine_whatever_the_old_logprobs_are():
    responses = responses_for("dppo_tv", seed=5)
    expected = loss_of("dppo_tv")(as_inputs(responses))[0]
    for response in responses:
        response.old = [0.0] * len(response.old)
    assert torch.equal(loss_of("dppo_tv")(as_inputs(responses))[0], expected)


# -- marks --------------------------------------------------------------------------------------------------------------


def mark_inputs(count=2000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, count, generator=generator, dtype=torch.float64)
    return MarkInputs(-noise[0].abs(), noise[1])


def covariances_by_hand(inputs):
    logprobs, advantages = inputs.logprobs_N.tolist(), inputs.advantages_N.tolist()
    mean_logprob, mean_advantage = sum(logprobs) / len(logprobs), sum(advantages) / len(advantages)
    return [(x - mean_logprob) * (a - mean_advantage) for x, a in zip(logprobs, advantages, strict=True)]


def test_kl_cov_marks_the_largest_covariances():
    inputs = mark_inputs()
    covariances = covariances_by_hand(inputs)
    largest = sorted(range(2000), key=covariances.__getitem__)[-10:]
    assert mark_largest(inputs, fraction=0.005).nonzero().squeeze(1).tolist() == sorted(largest)
    assert mark_largest(inputs, fraction=1e-9).sum() == 1
    assert mark_largest(inputs, fraction=1.0).all()


def test_clip_cov_marks_a_random_few_within_its_bounds_and_the_same_ones_every_time():
    inputs = mark_inputs()
    covariances = covariances_by_hand(inputs)
    within = {t for t, c in enumerate(covariances) if 0.5 < c < 1.5}
    options = {"cov_low": 0.5, "cov_high": 1.5}
    marked = mark_within(inputs, fraction=0.01, **options)
    chosen = set(marked.nonzero().squeeze(1).tolist())
    assert len(chosen) == 20
    assert chosen < within
    assert torch.equal(mark_within(inputs, fraction=0.01, **options), marked)
    assert set(mark_within(inputs, fraction=0.9, **options).nonzero().squeeze(1).tolist()) == within
    assert not mark_within(inputs, fraction=0.9, cov_low=50.0, cov_high=60.0).any()
    other = mark_within(mark_inputs(seed=1), fraction=0.01, **options)
    assert not torch.equal(other, marked)
