"""Context parallelism with all that a token can carry. That it changes nothing in other layouts too is in the layout matrix."""

from __future__ import annotations

import pytest
import torch

from helpers.policy import make_policy, tiny_config
from helpers.spawn import run_cases
from skyrl_mega.config.load import load_config
from skyrl_mega.data.packing import balance_and_pack, unpack
from skyrl_mega.data.synthetic import random_samples

# Adam divides by the gradient's size: with its usual epsilon the rounding error of a gradient near zero would be seen in full.
SETTINGS = [
    "algorithm.entropy_coef=0.01",
    "algorithm.kl.coef=0.1",
    "algorithm.reduction=sequence_mean",
    "optimizer.lr=1e-3",
    "optimizer.eps=1e-5",
]
#: A loss over whole sequences: each rank's loss looks at the other's tokens. Bounds that some of the sequences pass.
GSPO = ["algorithm.policy_loss=gspo", "algorithm.loss_options={clip_low: 0.001, clip_high: 0.05}"]
#: Stages whose weights look at whole sequences, which the ranks share.
CORRECTED = (
    "algorithm.off_policy.stages=[{name: truncated_is, level: sequence, cap: 1.5},{name: geometric_mask, low: 0.8, high: 1.2},"
    "{name: outlier_mask, low: 0.672},{name: staleness_decay, level: sequence}]"
)
#: Case -> what it adds to SETTINGS.
CASES = {
    "float32": ["precision=float32"],
    "bfloat16": ["precision=bfloat16"],
    "gspo": ["precision=float32", *GSPO],
    "corrected": ["precision=float32", CORRECTED],
}
REDUCED = ("policy/entropy", "policy/ratio", "policy/kl_ref", "mismatch/abs_logprob_diff_mean", "mismatch/abs_logprob_diff_max")


def two_updates(config, share_prompts: tuple[bool, bool]) -> dict:
    """Per-token logprobs before each of two updates, their numbers, and the weights after them."""
    with make_policy(config) as policy:
        updates, logprobs = [], []
        for seed, shared in enumerate(share_prompts):
            # Responses of 1 to 11 tokens on prompts of 2 to 11: many are shorter than the 4 chunks they are cut into.
            samples = random_samples(5, 3, seed=seed)
            batch = balance_and_pack(
                samples, tokens_per_micro_batch=96, dp_rank=0, dp_size=1, skip_zero_advantage=False, share_prompts=shared
            )
            values = policy.compute_logprobs(batch)
            logprobs.append(unpack(values, batch, samples))
            # Stale on purpose, so that ratio, clipping and KL are part of what is compared.
            for micro_batch, values_T in zip(batch.micro_batches, values, strict=True):
                stale = values_T + 0.6 * micro_batch.rollout_logprobs.sin()
                micro_batch.old_logprobs = torch.where(micro_batch.loss_mask, stale, 0.0)
                micro_batch.ref_logprobs = 0.9 * values_T
                if config.algorithm.off_policy.stages:
                    noise = micro_batch.rollout_logprobs
                    micro_batch.rollout_logprobs = torch.where(micro_batch.loss_mask, stale + 0.4 * (3 * noise).cos(), 0.0)
                    micro_batch.staleness = torch.where(micro_batch.loss_mask, noise.abs().floor(), 0.0)
            updates.append(policy.train_step(batch))
        weights = {name: value.clone() for name, value in policy.iter_weights(torch.float32)}
    return {"updates": updates, "logprobs": logprobs, "weights": weights}


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """Case -> (what one process computes without sharing prompts, what each of two context ranks computes)."""
    config = tiny_config(tmp_path_factory.mktemp("context"), family="qwen3", tied=False)
    fixed = ["recipe=tiny", f"model.path={config.model.path}", f"trainer.run_dir={config.trainer.run_dir}", *SETTINGS]
    single = {name: two_updates(load_config([*fixed, *case]), share_prompts=(False, False)) for name, case in CASES.items()}
    sharded = {name: (load_config([*fixed, *case, "parallel.context=2"]), (True, False)) for name, case in CASES.items()}
    ranks = run_cases(two_updates, 2, sharded)
    return {name: (single[name], [rank[name] for rank in ranks]) for name in CASES}


@pytest.mark.parametrize("case", ["float32", "gspo"])
def test_the_comparison_covers_clipping_on_both_sides(case, computed):
    first = computed[case][0]["updates"][0]
    assert first["policy/clip_low_fraction"] > 0
    assert first["policy/clip_high_fraction"] > 0


@pytest.mark.parametrize("case", ["float32", "gspo"])
def test_context_ranks_compute_the_logprobs_loss_and_gradient_of_one_process(case, computed):
    expected, ranks = computed[case]
    for number, reference in enumerate(expected["updates"]):
        for rank in ranks:
            for row, expected_row in zip(rank["logprobs"][number], expected["logprobs"][number], strict=True):
                torch.testing.assert_close(row, expected_row, atol=2e-5, rtol=0)
            update = rank["updates"][number]
            assert update["loss/total"] == pytest.approx(reference["loss/total"], abs=1e-6)
            assert update["update/grad_norm"] == pytest.approx(reference["update/grad_norm"], rel=1e-5)
            for name in REDUCED:
                assert update[name] == pytest.approx(reference[name], rel=1e-4), name


@pytest.mark.parametrize("case", ["float32", "gspo"])
def test_context_ranks_end_with_the_weights_of_one_process(case, computed):
    expected, ranks = computed[case]
    for rank in ranks:
        assert rank["weights"].keys() == expected["weights"].keys()
        for name, value in rank["weights"].items():
            difference = (value - expected["weights"][name]).abs()
            assert difference.max() < 2e-6, name
            assert difference.mean() < 1e-8, name


def test_in_bfloat16_they_differ_by_its_rounding_only(computed):
    expected, ranks = computed["bfloat16"]
    exact = computed["float32"][0]
    for number, reference in enumerate(expected["updates"]):
        truth = exact["updates"][number]
        for rank in ranks:
            for name in ("loss/total", "update/grad_norm"):
                allowed = 2 * abs(reference[name] - truth[name]) + 5e-3 * abs(truth[name])
                assert abs(rank["updates"][number][name] - truth[name]) <= allowed, name


def test_off_policy_weights_of_whole_sequences_are_those_of_one_process(computed):
    expected, ranks = computed["corrected"]
    for number, reference in enumerate(expected["updates"]):
        names = [name for name in reference if name.startswith(("off_policy/", "mismatch/", "weight/", "policy/"))]
        assert 0 < reference["off_policy/sequence/masked_fraction"] < 1
        for stage in ("truncated_is", "geometric_mask", "outlier_mask"):
            assert 0 < reference[f"off_policy/{stage}_fraction"] < 1
        assert reference["weight/sequences"] == 15
        for rank in ranks:
            update = rank["updates"][number]
            assert update["loss/total"] == pytest.approx(reference["loss/total"], abs=1e-6)
            assert update["update/grad_norm"] == pytest.approx(reference["update/grad_norm"], rel=1e-5)
            for name in names:
                assert update[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-6), name
