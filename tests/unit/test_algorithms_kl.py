"""KL estimators: their exact expectation over a small vocabulary, as a value and as a gradient."""

import pytest
import torch

from skyrl_mega.algorithms.kl import KL_ESTIMATORS


def distributions():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 7, generator=generator, dtype=torch.float64) * 0.4


def expectation(name, logits, reference):
    """sum_y p(y) estimator(y) over the whole vocabulary; p is the sampler and carries no gradient."""
    logprobs, ref_logprobs = logits.log_softmax(-1), reference.log_softmax(-1)
    estimates = KL_ESTIMATORS[name](logprobs, ref_logprobs, torch.ones(7, dtype=torch.bool))
    return (logprobs.detach().exp() * estimates).sum()


def exact_kl(first, second):
    return (first.softmax(-1) * (first.log_softmax(-1) - second.log_softmax(-1))).sum()


def gradient(function, logits):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


@pytest.mark.parametrize("name", ["k1", "k3", "k1+", "k3+"])
def test_k1_and_k3_are_unbiased_as_values(name):
    logits, reference = distributions()
    torch.testing.assert_close(expectation(name, logits, reference), exact_kl(logits, reference), rtol=1e-12, atol=1e-12)


def test_k2_is_right_to_second_order_as_a_value():
    logits, reference = distributions()
    errors = [
        abs(expectation("k2", reference + d, reference) / exact_kl(reference + d, reference) - 1)
        for d in (0.1 * logits, 0.01 * logits)
    ]
    assert errors[0] < 0.1
    assert errors[1] < 0.02


def test_gradients_as_a_loss_are_those_the_documentation_claims():
    logits, reference = distributions()
    expected = {
        "k1": torch.zeros(7, dtype=torch.float64),
        "k2": gradient(lambda x: exact_kl(x, reference), logits),
        "k3": gradient(lambda x: exact_kl(reference, x), logits),
        "abs": gradient(lambda x: (x.softmax(-1) - reference.softmax(-1)).abs().sum(), logits),  # twice the total variation
    }
    expected |= {"k1+": expected["k2"], "k3+": expected["k2"]}
    assert expected.keys() == KL_ESTIMATORS.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            gradient(lambda x, n=name: expectation(n, x, reference), logits), value, rtol=1e-10, atol=1e-14
        )
    assert expected["k2"].abs().max() > 1e-2


def test_abs_is_at_least_kl_and_of_first_order_as_a_value():
    logits, reference = distributions()
    values = [expectation("abs", reference + d, reference) for d in (logits, 0.1 * logits, 0.01 * logits)]
    assert values[0] > exact_kl(reference + logits, reference)
    assert float(values[1] / values[2]) == pytest.approx(10, rel=0.1)


def test_a_plus_changes_the_gradient_alone():
    logprobs = torch.tensor([-1.0, -5.0, -0.3], requires_grad=True)
    reference, mask = torch.tensor([-2.0, -7.0, -2.3]), torch.tensor([True, False, True])
    for name in ("k1", "k3"):
        value = KL_ESTIMATORS[f"{name}+"](logprobs, reference, mask)
        torch.testing.assert_close(value, KL_ESTIMATORS[name](logprobs, reference, mask))
        torch.testing.assert_close(torch.autograd.grad(value.sum(), logprobs)[0], torch.tensor([1.0, 0.0, 2.0]))


def test_worked_example():
    logprobs, reference, mask = torch.tensor([-1.0, -5.0]), torch.tensor([-2.0, -7.0]), torch.tensor([True, False])
    assert KL_ESTIMATORS["k1"](logprobs, reference, mask).tolist() == [1.0, 0.0]
    assert KL_ESTIMATORS["k2"](logprobs, reference, mask).tolist() == [0.5, 0.0]
    assert KL_ESTIMATORS["abs"](reference, logprobs, mask).tolist() == [1.0, 0.0]
    torch.testing.assert_close(KL_ESTIMATORS["k3"](logprobs, reference, mask), torch.tensor([0.36787944, 0.0]))


@pytest.mark.parametrize("name", sorted(KL_ESTIMATORS))
def test_masked_tokens_and_hopeless_ratios_stay_finite(name):
    logprobs = torch.tensor([-1.0, float("nan"), -float("inf"), -400.0], requires_grad=True)
    reference = torch.tensor([-1.0, -1.0, -float("inf"), -1.0])
    kl = KL_ESTIMATORS[name](logprobs, reference, torch.tensor([True, False, False, True]))
    kl.sum().backward()
    assert kl.isfinite().all()
    assert (kl[:3] == 0).all()
    assert (logprobs.grad[1:] == 0).all()


def test_k3_of_nearly_equal_policies_is_not_lost_to_cancellation():
    difference = torch.tensor([1e-4])
    ours = KL_ESTIMATORS["k3"](difference, torch.zeros(1), torch.ones(1, dtype=torch.bool))
    torch.testing.assert_close(ours, difference.square() / 2, rtol=2e-2, atol=0)
