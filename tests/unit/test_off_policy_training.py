"""Off-policy correction in the real policy: decoupled PPO and the bypass against float64, any packing, truncated samplers."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.oracle import grpo_update, token_logprobs
from helpers.policy import make_policy, tiny_config
from skyrl_mega.algorithms.loss import Objective
from skyrl_mega.data.packing import balance_and_pack, split_updates, to_samples, unpack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.errors import DataError
from skyrl_mega.orchestration.loop import fill_logprobs, skips_zero_advantage
from skyrl_mega.training.policy import fuses_loss
from skyrl_mega.types import StopReason, TrainSample, Trajectory, TrajectoryGroup, Turn


def pack(samples, *, tokens=100, share_prompts=True, skip=False):
    return balance_and_pack(
        samples,
        tokens_per_micro_batch=tokens,
        dp_rank=0,
        dp_size=1,
        skip_zero_advantage=skip,
        share_prompts=share_prompts,
    )


def oracle_model(config):
    return AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)


def logprobs_of(model, sample):
    """float64 [L], token-aligned."""
    with torch.no_grad():
        return torch.cat([torch.zeros(1), token_logprobs(model, sample.token_ids, 1.0)[0]])


def engine_samples(model, *, seed, noise=0.25):
    """Samples whose engine logprobs lie a little off the model's, and whose tokens come from versions 0 to 3 back."""
    samples = random_samples(4, 3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for sample in samples:
        own = logprobs_of(model, sample).float() + noise * torch.randn(sample.num_tokens, generator=generator)
        sample.rollout_logprobs = torch.where(sample.loss_mask, own, 0.0)
        sample.staleness = torch.randint(0, 4, (sample.num_tokens,), generator=generator).float() * sample.loss_mask
    return samples


# ---- decoupled PPO, and the bypass ----------------------------------------------------------------------------------------


def product_weight(policy_row, sample, cap):
    log_w = (policy_row.double() - sample.rollout_logprobs.double())[sample.loss_mask]
    return min(math.exp(math.fsum(log_w.tolist())), cap)


def geometric_keep(policy_row, sample, low, high):
    log_w = (policy_row.double() - sample.rollout_logprobs.double())[sample.loss_mask]
    return float(low <= math.exp(math.fsum(log_w.tolist()) / len(log_w)) <= high)


@pytest.mark.parametrize("mode", ["decoupled", "bypass"])
def test_both_updates_of_a_step_have_the_formulas_loss_gradient_and_weights(tmp_path, mode):
    stage = (
        "{name: truncated_is, level: sequence, cap: 1.3}"
        if mode == "decoupled"
        else "{name: geometric_mask, low: 0.93, high: 1.12}"
    )
    old = "policy" if mode == "decoupled" else "rollout"
    config = tiny_config(
        tmp_path,
        f"algorithm.off_policy.stages=[{stage}]",
        f"algorithm.old_logprobs={old}",
        "trainer.updates_per_step=2",
        "optimizer.lr=1e-2",
        "optimizer.eps=1e-5",
    )
    model = oracle_model(config)
    settings = config.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim == 1]},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=0
    )
    samples = engine_samples(model, seed=3)
    divided = split_updates(samples, 2)
    proximal = {sample.sample_index: logprobs_of(model, sample) for sample in samples}
    with make_policy(config) as policy:
        batches = [pack(update) for update in divided]
        fill_logprobs(SimpleNamespace(config=config, policy=policy, reference=None, teacher=None), batches)
        assert all((mb.old_logprobs is not None) == (mode == "decoupled") for batch in batches for mb in batch.micro_batches)
        for number, (update, batch) in enumerate(zip(divided, batches, strict=True)):
            if mode == "decoupled":
                # Ratio against the policy before the first update, weight of that policy against the engine.
                before = [proximal[sample.sample_index] for sample in update]
                factors = [product_weight(row, sample, 1.3) for row, sample in zip(before, update, strict=True)]
            else:
                # Ratio against the engine, mask of the policy as it is now against the engine.
                before = [sample.rollout_logprobs for sample in update]
                factors = [geometric_keep(logprobs_of(model, sample), sample, 0.93, 1.12) for sample in update]
            assert len(set(factors)) > 1
            moved = max(float((logprobs_of(model, s) - proximal[s.sample_index])[s.loss_mask].abs().max()) for s in update)
            assert (moved > 0.05) == (number == 1), "the second update must see a policy that has moved"
            expected = grpo_update(
                model,
                optimizer,
                update,
                old=before,
                importance=[torch.full((sample.num_tokens,), factor) for sample, factor in zip(update, factors, strict=True)],
            )
            metrics = policy.train_step(batch)
            assert metrics["loss/total"] == pytest.approx(expected.loss, abs=2e-5)
            assert metrics["update/grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-4)


# ---- whatever the packing -------------------------------------------------------------------------------------------------

STAGES = ",".join(
    (
        "{name: truncated_is, level: sequence, cap: 1.2}",
        "{name: geometric_mask, low: 0.9, high: 1.1}",
        "{name: staleness_decay, level: sequence}",
    )
)
PACKINGS = [
    {"tokens": 400, "share_prompts": False},
    {"tokens": 400, "share_prompts": True},
    {"tokens": 30, "share_prompts": False},
    {"tokens": 60, "share_prompts": True},
]


def test_weights_of_whole_sequences_do_not_depend_on_packing_shared_prompts_or_micro_batches(tmp_path):
    config = tiny_config(tmp_path, f"algorithm.off_policy.stages=[{STAGES}]", "algorithm.reduction=sequence_mean")
    assert not fuses_loss(config, Objective(config.algorithm)), "chunks of tokens don't hold whole sequences"
    samples = engine_samples(oracle_model(config), seed=4)
    results = []
    for packing in PACKINGS:
        with make_policy(config) as policy:
            results.append(policy.train_step(pack(samples, **packing)))
    assert results[0]["packing/micro_batches"] < results[2]["packing/micro_batches"]
    assert 0 < results[0]["off_policy/sequence/masked_fraction"] < 1
    assert results[0]["weight/sequences"] == len(samples)
    names = [name for name in results[0] if name.startswith(("loss/", "policy/", "mismatch/", "off_policy/", "weight/"))]
    for result in results[1:]:
        assert result["update/grad_norm"] == pytest.approx(results[0]["update/grad_norm"], rel=1e-5)
        for name in names:
            assert result[name] == pytest.approx(results[0][name], rel=1e-4, abs=1e-6), name


def test_samples_without_an_advantage_change_no_gradient_when_skipped_and_have_no_share_in_statistics(tmp_path):
    config = tiny_config(tmp_path, f"algorithm.off_policy.stages=[{STAGES}]")
    assert skips_zero_advantage(config)
    samples = engine_samples(oracle_model(config), seed=5)
    for sample in samples[:3]:
        sample.advantages = torch.zeros_like(sample.advantages)
    results = []
    for given, skip in ((samples, False), (samples, True), (samples[3:], False)):
        with make_policy(config) as policy:
            results.append(policy.train_step(pack(given, skip=skip)))
    everything, skipped, others = results
    assert skipped["update/samples_skipped"] == 3
    for name in ("loss/policy", "update/grad_norm"):
        assert skipped[name] == pytest.approx(everything[name], rel=1e-5), name
    assert skipped["weight/sequences"] == others["weight/sequences"] == len(samples) - 3
    for name in (name for name in others if name.startswith(("off_policy/", "mismatch/"))):
        assert skipped[name] == pytest.approx(others[name], rel=1e-4, abs=1e-6), name
    assert everything["off_policy/sequence/weight"] != pytest.approx(skipped["off_policy/sequence/weight"], rel=1e-2)


# ---- truncated samplers ---------------------------------------------------------------------------------------------------


def kept_by_sampler(logits_V, temperature, top_k, top_p):
    """(token ids, log-probabilities) that a top-k, top-p sampler draws from, in float64."""
    ordered, ids = (logits_V / temperature).sort(descending=True)
    ordered, ids = ordered[:top_k], ids[:top_k]
    inside = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1) < top_p
    return ids[inside], ordered[inside].log_softmax(-1)


def test_over_all_that_a_truncated_engine_can_draw_the_mean_weight_is_one(tmp_path):
    sampler = ("rollout.top_k=12", "rollout.top_p=0.9", "rollout.temperature=0.8")
    stages = "algorithm.off_policy.stages=[{name: truncated_is, cap: 1e9}]"
    truncating, blind = (tiny_config(tmp_path, stages, *settings) for settings in (sampler, ("rollout.temperature=0.8",)))
    model = oracle_model(truncating)
    prompts = [torch.tensor([5, 17, 40, 8, 33]), torch.tensor([200, 11, 90])]
    samples, probabilities = [], []
    for group, prompt in enumerate(prompts):
        with torch.no_grad():
            ids, logprobs = kept_by_sampler(model(prompt[None]).logits[0, -1], 0.8, 12, 0.9)
        for token, logprob in zip(ids.tolist(), logprobs.tolist(), strict=True):
            token_ids = torch.cat([prompt, torch.tensor([token])])
            mask = torch.arange(len(token_ids)) == len(prompt)
            place = {"sample_index": len(samples), "group_index": group, "group_id": f"g{group}"}
            given = {"rollout_logprobs": logprob * mask.float(), "reward": 1.0, "advantages": mask.float()}
            samples.append(TrainSample(token_ids=token_ids, loss_mask=mask, **place, **given))
            probabilities.append(math.exp(logprob))
    assert sum(probabilities) == pytest.approx(len(prompts))

    def mean_weights(config):
        with make_policy(config) as policy:
            batch = pack(samples)
            rows = unpack(policy.compute_logprobs(batch), batch, samples)
        weights = [
            p * math.exp(float(row[-1] - s.rollout_logprobs[-1])) for p, row, s in zip(probabilities, rows, samples, strict=True)
        ]
        return [sum(w for w, s in zip(weights, samples, strict=True) if s.group_index == group) for group in range(len(prompts))]

    assert mean_weights(truncating) == pytest.approx([1.0] * len(prompts), abs=1e-5)
    # Logprobs over the whole vocabulary would make every weight too small, by the mass that the sampler left out.
    assert max(mean_weights(blind)) < 0.6


# ---- staleness ------------------------------------------------------------------------------------------------------------


def group_of(versions):
    length = len(versions)
    sampled = [int(version >= 0) for version in versions]
    return TrajectoryGroup(
        "a",
        "p",
        (
            Trajectory(
                token_ids=list(range(5, 5 + length)),
                loss_mask=sampled,
                rollout_logprobs=[-0.5 * mask for mask in sampled],
                policy_versions=versions,
                turns=(Turn(1, length, StopReason.STOP, 1.0),),
                reward=1.0,
                terminated=True,
                truncated=False,
            ),
        ),
    )


def test_every_token_knows_how_many_versions_ago_it_was_sampled():
    [sample] = to_samples([group_of([-1, 4, 4, -1, 6])], policy_version=7)
    assert sample.staleness.tolist() == [0, 3, 3, 0, 1]
    assert sample.staleness.dtype == torch.float32
    [micro_batch] = pack([dataclasses.replace(sample, advantages=torch.ones(5))]).micro_batches
    assert micro_batch.staleness.tolist() == [3, 3, 0, 1, 0], "aligned with labels"
    assert to_samples([group_of([-1, 4])])[0].staleness is None
    with pytest.raises(DataError, match="a token of policy version 6, and the policy to be trained has version 5"):
        to_samples([group_of([-1, 4, 4, -1, 6])], policy_version=5)


@pytest.mark.parametrize("old", ["policy", "rollout"])
def test_a_loss_that_runs_chunk_by_chunk_reports_the_numbers_of_whole_sequences_too(tmp_path, old):
    stage = "{name: token_mask, low: 0.8, high: 1.2}"
    numbers = {}
    for fused in ("on", "off"):
        config = tiny_config(
            tmp_path / fused,
            f"algorithm.off_policy.stages=[{stage}]",
            f"algorithm.old_logprobs={old}",
            f"model.fused_loss={fused}",
            "model.logprob_chunk_tokens=16",
        )
        with make_policy(config) as policy:
            numbers[fused] = policy.train_step(pack(engine_samples(oracle_model(config), seed=3)))
    of_sequences = {name for name in numbers["off"] if name.startswith("off_policy/sequence/")}
    assert len(of_sequences) == 5
    assert numbers["on"]["off_policy/sequence/weight"] != pytest.approx(1.0, abs=0.01)
    same = {name for name in numbers["off"] if not name.startswith("kernels/")}
    assert {name: numbers["on"][name] for name in same} == pytest.approx(
        {name: numbers["off"][name] for name in same}, rel=1e-4, abs=1e-6
    )
