"""The fused policy losses against their torch definitions in float64, which have oracles of their own (test_policy_losses.py)."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.policy_loss_cases import OPTIONS, Case, assert_as_good_as_torch, random_case, run
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.errors import BackendUnavailableError, ConfigError
from skyrl_mega_kernels import extension
from skyrl_mega_kernels.backends import backends_that_ran
from skyrl_mega_kernels.policy_loss import LOSSES, PolicyLossTokens, policy_loss_sums

if (_reason := extension.why_absent("_C")) is not None:
    pytest.skip(_reason, allow_module_level=True)

NAMES = pytest.mark.parametrize("name", LOSSES)


def test_every_loss_that_needs_no_more_than_the_tokens_numbers_has_a_kernel():
    assert (
        set(LOSSES) == {name for name in POLICY_LOSSES.built_in if not POLICY_LOSSES.find(name).traits["needs"]} == set(OPTIONS)
    )


@NAMES
def test_sums_and_gradients_match_float64(name):
    # Sequences around the vectors' and blocks' sizes, of 16 lanes and of 4096 and 16384 tokens; empty ones too.
    for lengths in ([1], [15, 1], [16], [17, 0, 0, 31, 4096], [4097, 40, 0, 8200, 5000, 7]):
        assert_as_good_as_torch(name, random_case(lengths, seed=len(lengths)), "cpu")


@NAMES
def test_the_defaults_of_the_definitions_are_those_of_the_kernels(name):
    assert_as_good_as_torch(name, random_case([300, 211]), "cpu", options={})


@NAMES
def test_policies_almost_alike_lose_no_digits(name):
    assert_as_good_as_torch(name, random_case([64, 200], spread=1e-4), "cpu")


@NAMES
def test_hopeless_ratios_are_clipped_as_the_definition_clips_them(name):
    case = random_case([40, 40])
    log_ratio_T = torch.linspace(-30, 30, 80)
    far = replace(case.inputs, logprobs=case.inputs.old_logprobs.clamp(max=-0.05) + log_ratio_T)
    far.logprobs[1], far.loss_mask[1] = -torch.inf, True
    far.old_logprobs[1] = far.rollout_logprobs[1] = -1.0
    far.advantages[1] = 0.5
    if name in ("cispo", "dppo_tv", "dppo_kl", "reinforce", "gpg", "cross_entropy"):  # these hold logprob itself in the loss
        far.logprobs[1] = -50.0
    assert_as_good_as_torch(name, Case(far, case.weights_T, case.loss_weights_T), "cpu")


@NAMES
def test_no_token_and_no_counting_token_give_zero(name):
    for case in (random_case([]), random_case([20])):
        case.inputs.loss_mask.fill_(False)
        result = run(name, case, "cpu")
        assert [float(value) for value in (result.loss, *result.stats.values())] == [0.0] * (1 + len(result.stats))
        assert not result.gradient_T.any()


@pytest.mark.parametrize("name", ["ppo_clip", "gspo"])
def test_a_nan_that_counts_shows_in_the_loss(name):
    case = random_case([30])
    case.inputs.logprobs[3], case.inputs.loss_mask[3] = torch.nan, True
    case.loss_weights_T[3] = case.weights_T[3] = 0.1
    assert run(name, case, "cpu").loss.isnan()


@pytest.mark.parametrize("name", ["ppo_clip", "gspo", "gspo_token"])
def test_the_gradient_is_scaled_and_the_bits_do_not_depend_on_threads(name):
    case = random_case([9000, 100, 20000, 3000])
    one = run(name, case, "cpu")
    torch.testing.assert_close(run(name, case, "cpu", scale=-3.0).gradient_T, -3.0 * one.gradient_T, rtol=1e-6, atol=0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        more = run(name, case, "cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(more.gradient_T, one.gradient_T)
    assert torch.equal(more.loss, one.loss)
    assert more.stats == one.stats


def test_it_is_what_runs_by_default_and_torch_runs_what_it_has_not():
    case = random_case([20])
    run("ppo_clip", case, "auto")
    assert "cpu" in backends_that_ran()["policy_loss"]
    # Sequences that other ranks have parts of: the ranks' sums come in between, and the definition knows how.
    shared = replace(case.inputs.sequences, cu_seqlens=None)
    whole = run("gspo", case, "cpu")
    spread = run("gspo", Case(replace(case.inputs, sequences=shared), *weights(case)), "cpu")
    torch.testing.assert_close(whole.gradient_T, spread.gradient_T)
    with pytest.raises(BackendUnavailableError, match="policy_loss: backend cuda"):
        run("ppo_clip", case, "cuda")


def weights(case):
    return case.weights_T, case.loss_weights_T


def test_what_is_missing_or_does_not_fit_is_an_error():
    case = random_case([20])
    with pytest.raises(ConfigError, match="marked before packing"):
        run("clip_cov", Case(replace(case.inputs, marked=None), *weights(case)), "cpu")
    with pytest.raises(ConfigError, match="looks at whole sequences"):
        run("gspo", Case(replace(case.inputs, sequences=None), *weights(case)), "cpu")
    with pytest.raises(ConfigError, match=r"clip_low` \(2\) must be at least 0 and at most 1"):
        run("ppo_clip", case, "cpu", options={"clip_low": 2.0})
    with pytest.raises(ValueError, match="weights must be contiguous float32"):
        run("ppo_clip", Case(case.inputs, case.weights_T[:3], case.loss_weights_T), "cpu")
    short = Sequences.packed(torch.tensor([0, 19]))
    with pytest.raises(ValueError, match=r"ascend from 0 to the number of tokens \(20\)"):
        run("gspo", Case(replace(case.inputs, sequences=short), *weights(case)), "cpu")
    tokens = PolicyLossTokens(*[torch.zeros(2)] * 3, torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="'mine' has no kernel"):
        policy_loss_sums("mine", lambda: (torch.zeros(2), {}), tokens, *[torch.ones(2)] * 2, {})


@pytest.mark.skipif("SKYRL_MEGA_CPU_ISA" in os.environ, reason="this is already the run with another instruction set")
@pytest.mark.parametrize("isa", [pytest.param("portable", marks=pytest.mark.nightly), "avx2"])
def test_the_same_holds_for_cpus_without_avx512(isa):
    environment = {**os.environ, "SKYRL_MEGA_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not threads", str(Path(__file__))]
    tests = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if "this CPU runs at most" in tests.stdout:
        pytest.skip(f"this CPU has no {isa}")
    assert tests.returncode == 0, tests.stdout[-3000:]
