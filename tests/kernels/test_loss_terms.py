"""The fused KL, entropy and mismatch against their torch definitions in float64, whose oracles are in test_algorithms_loss.py."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.loss_terms_cases import KINDS, assert_terms_as_good_as_torch, run_terms, terms_case
from helpers.policy_loss_cases import Case
from skyrl_mega.algorithms.kl import KL_ESTIMATORS
from skyrl_mega.algorithms.terms import REPORTED
from skyrl_mega.errors import BackendUnavailableError, ConfigError
from skyrl_mega_kernels import extension
from skyrl_mega_kernels.backends import backends_that_ran
from skyrl_mega_kernels.loss_terms import ESTIMATORS, SUMS, LossTermTokens, loss_terms

if (_reason := extension.why_absent("_C")) is not None:
    pytest.skip(_reason, allow_module_level=True)

EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=str)
LARGEST = "mismatch/abs_logprob_diff_max"


def test_every_estimator_has_a_kernel_and_every_sum_is_reported():
    assert set(ESTIMATORS) == set(KL_ESTIMATORS)
    assert set(SUMS) == set(REPORTED)


@EVERY_KIND
def test_sums_and_gradients_match_float64(kind):
    for lengths in ([1], [15, 1], [16], [17, 0, 0, 31, 4096], [4097, 40, 0, 8200, 5000, 7]):
        assert_terms_as_good_as_torch(kind, terms_case(lengths, seed=len(lengths)), "cpu")


@EVERY_KIND
def test_policies_almost_alike_lose_no_digits(kind):
    assert_terms_as_good_as_torch(kind, terms_case([64, 200], spread=1e-4), "cpu")


@EVERY_KIND
def test_hopeless_ratios_are_clipped_as_the_definition_clips_them(kind):
    case = terms_case([81])
    far_T = torch.linspace(-30, 30, 81)
    inputs = replace(case.inputs, ref_logprobs=case.inputs.logprobs + far_T, rollout_logprobs=case.inputs.old_logprobs - far_T)
    assert_terms_as_good_as_torch(kind, Case(inputs, case.weights_T, case.loss_weights_T), "cpu")


def test_the_largest_distance_is_that_of_a_token_that_counts_wherever_it_stands():
    for place in (0, 15, 16, 4095, 4096, 16383, 16384, 20000):
        case = terms_case([20001])
        case.inputs.loss_mask[place] = True
        case.inputs.old_logprobs[place], case.inputs.rollout_logprobs[place] = -0.5, -40.5
        assert float(run_terms((None, None), case, "cpu").sums[LARGEST]) == 40.0


@pytest.mark.parametrize("place", [3, 17, 5000])
def test_a_nan_that_counts_shows_and_a_masked_one_does_not(place):
    case = terms_case([5001])
    assert not run_terms(("k3", 0.3), case, "cpu").loss.isnan()
    for name in ("logprobs", "old_logprobs", "entropy"):
        getattr(case.inputs, name)[place] = 0.5
    case.inputs.loss_mask[place] = True
    case.inputs.rollout_logprobs[place] = case.inputs.ref_logprobs[place] = torch.nan
    result = run_terms(("k3", 0.3), case, "cpu")
    assert result.loss.isnan()
    assert {name for name, value in result.sums.items() if value.isnan()} == {
        *("policy/kl_ref", "loss/kl", "mismatch/abs_logprob_diff_mean", LARGEST, "mismatch/kl", "mismatch/kl_k1")
    }


@EVERY_KIND
def test_no_token_and_no_counting_token_give_zero(kind):
    for case in (terms_case([]), terms_case([20])):
        case.inputs.loss_mask.fill_(False)
        case = Case(case.inputs, torch.zeros_like(case.weights_T), case.loss_weights_T)
        result = run_terms(kind, case, "cpu")
        assert not any(float(value) for value in (result.loss, *result.sums.values()))
        assert not any(gradient_T.any() for gradient_T in result.gradients.values())


def test_gradients_are_scaled_and_the_bits_do_not_depend_on_threads():
    case, kind = terms_case([9000, 100, 20000, 3000]), ("k3", 0.3)
    one, scaled = run_terms(kind, case, "cpu"), run_terms(kind, case, "cpu", scale=-3.0)
    for name, gradient_T in one.gradients.items():
        torch.testing.assert_close(scaled.gradients[name], -3.0 * gradient_T, rtol=1e-6, atol=0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        more = run_terms(kind, case, "cpu")
    finally:
        torch.set_num_threads(threads)
    assert more.sums == one.sums
    assert all(torch.equal(more.gradients[name], gradient_T) for name, gradient_T in one.gradients.items())


def test_it_is_what_runs_by_default_and_what_is_missing_is_an_error():
    case = terms_case([20])
    run_terms(("k1", None), case, "auto")
    assert "cpu" in backends_that_ran()["loss_terms"]
    with pytest.raises(BackendUnavailableError, match="loss_terms: backend cuda"):
        run_terms(("k1", None), case, "cuda")
    with pytest.raises(ConfigError, match="needs ref_logprobs"):
        run_terms(("k1", None), Case(replace(case.inputs, ref_logprobs=None), case.weights_T, case.loss_weights_T), "cpu")
    with pytest.raises(ValueError, match="weights must be contiguous float32"):
        run_terms((None, None), Case(case.inputs, case.weights_T[:3], case.loss_weights_T), "cpu")
    tokens = LossTermTokens(torch.zeros(2), torch.zeros(2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="'mine' has no kernel"):
        loss_terms(dict, tokens, torch.ones(2), kl="mine")
    with pytest.raises(ValueError, match="'k1' needs logprobs and ref_logprobs"):
        loss_terms(dict, tokens, torch.ones(2), kl="k1")


@pytest.mark.skipif("SKYRL_MEGA_CPU_ISA" in os.environ, reason="this is already the run with another instruction set")
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_the_same_holds_for_cpus_without_avx512(isa):
    environment = {**os.environ, "SKYRL_MEGA_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not threads", str(Path(__file__))]
    tests = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if "this CPU runs at most" in tests.stdout:
        pytest.skip(f"this CPU has no {isa}")
    assert tests.returncode == 0, tests.stdout[-3000:]
