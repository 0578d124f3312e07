"""The trainer's loss, gradients and updated weights against GRPO written out in float64 on a Hugging Face model."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.hf_oracle import by_file_name
from helpers.oracle import grpo_update, importance_weights, token_logprobs
from helpers.policy import make_policy, tiny_config
from skyrl_mega.data.packing import balance_and_pack, unpack
from skyrl_mega.data.synthetic import random_samples


def pack(samples, **settings):
    return balance_and_pack(
        samples, tokens_per_micro_batch=100, dp_rank=0, dp_size=1, skip_zero_advantage=False, share_prompts=True, **settings
    )


def oracle_model(config):
    return AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64, experts_implementation="eager")


def oracle_optimizer(config, model):
    settings = config.optimizer
    decayed = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def attach(batch, samples, old, ref):
    """Puts token-aligned logprobs where the loss looks for them."""
    where = {s.sample_index: i for i, s in enumerate(samples)}
    for micro_batch in batch.micro_batches:
        for name, rows in (("old_logprobs", old), ("ref_logprobs", ref)):
            values = torch.zeros(micro_batch.num_tokens)
            bounds = micro_batch.cu_seqlens.tolist()
            for index, start, end in zip(micro_batch.sample_index.tolist(), bounds[:-1], bounds[1:], strict=True):
                if index < 0:
                    continue
                row = rows[where[index]].float()
                spoken = row[1:] if end - start == len(row) else row[len(row) - (end - start) :]
                values[start : start + len(spoken)] = spoken
            setattr(micro_batch, name, torch.where(micro_batch.loss_mask, values, 0.0))
    return batch


CASES = {
    "token_mean": [],
    "sequence_mean": ["algorithm.reduction=sequence_mean"],
    "kl_and_entropy": ["algorithm.kl.coef=0.1", "algorithm.entropy_coef=0.02", "algorithm.reduction=sequence_mean"],
    "temperature": ["rollout.temperature=0.7"],
    "truncated_is": ["algorithm.off_policy.stages=[{name: truncated_is}]", "algorithm.kl.coef=0.1"],
    # A larger eps: gradients that the mask leaves almost empty would show their rounding error in full (see below).
    "masked_is": ["algorithm.off_policy.stages=[{name: masked_is}]", "algorithm.reduction=sequence_mean", "optimizer.eps=1e-6"],
    "icepop": ["algorithm.off_policy.stages=[{name: icepop, cap: 1.5}]"],
    "gspo": [
        "algorithm.policy_loss=gspo",
        "algorithm.loss_options={clip_low: 0.1, clip_high: 0.12}",
        "algorithm.reduction=sequence_mean",
    ],
    "every_optimizer_setting": [
        "optimizer.beta1=0.8",
        "optimizer.beta2=0.95",
        "optimizer.eps=1e-5",
        "optimizer.weight_decay=0.1",
        "optimizer.clip_grad_norm=0.05",
        "optimizer.lr=3e-3",
    ],
}


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for family in ("llama", "qwen2") for case in CASES if (family, case) != ("qwen2", "gspo")]
    + [("qwen2_moe", "every_optimizer_setting")],
)
def test_two_updates_match_the_float64_oracle(tmp_path, case, family):
    config = tiny_config(tmp_path, *CASES[case], family=family, tied=family == "llama")
    algorithm, temperature = config.algorithm, config.rollout.temperature
    model = oracle_model(config)
    optimizer = oracle_optimizer(config, model)
    generator = torch.Generator().manual_seed(9)
    with make_policy(config) as policy:
        for seed in (1, 2):
            samples = random_samples(4, 3, seed=seed)
            with torch.no_grad():
                now = [torch.cat([torch.zeros(1), token_logprobs(model, s.token_ids, temperature)[0]]) for s in samples]
            # Old and reference policies a little off the current one, on both sides of the clipping bounds.
            old, ref = ([x + 0.3 * torch.randn(x.shape, generator=generator) for x in now] for _ in range(2))
            importance = None
            if algorithm.off_policy.stages:
                # An engine further off, so that weights lie on both sides of both bounds.
                for sample, row in zip(samples, old, strict=True):
                    engine = row.float() + 0.7 * torch.randn(row.shape, generator=generator)
                    sample.rollout_logprobs = torch.where(sample.loss_mask, engine, 0.0)
                [stage] = algorithm.off_policy.stages
                bounds = (stage["name"], stage.get("low", 0.5), stage.get("cap", 2.0))
                importance = [importance_weights(row, s.rollout_logprobs, *bounds) for row, s in zip(old, samples, strict=True)]
            expected = grpo_update(
                model,
                optimizer,
                samples,
                temperature=temperature,
                reduction=algorithm.reduction,
                kl_coef=algorithm.kl.coef,
                entropy_coef=algorithm.entropy_coef,
                old=old,
                ref=ref,
                importance=importance,
                max_norm=config.optimizer.clip_grad_norm,
                sequence_ratio=algorithm.policy_loss == "gspo",
                **{name: algorithm.loss_options[name] for name in ("clip_low", "clip_high") if name in algorithm.loss_options},
            )
            metrics = policy.train_step(attach(pack(samples), samples, old, ref))
            assert metrics["loss/total"] == pytest.approx(expected.loss, abs=2e-6)
            assert metrics["update/grad_norm"] == pytest.approx(expected.grad_norm, rel=2e-5)
            weights = by_file_name(expected.parameters, family)
            for name, value in policy.iter_weights(torch.float32):
                # Adam divides by the gradient's size, so where a gradient is nearly zero its rounding error is seen in full.
                difference = (value.double() - weights[name]).abs()
                assert difference.max() < 0.05 * config.optimizer.lr, f"{name} after update {seed}"
                assert difference.mean() < 1e-3 * config.optimizer.lr, f"{name} after update {seed}"


def test_logprobs_match_hugging_face_to_float32_noise(tmp_path):
    config = tiny_config(tmp_path, family="qwen3", tied=False)
    samples = random_samples(5, 2, seed=3)
    model = oracle_model(config)
    with make_policy(config) as policy, torch.no_grad():
        batch = pack(samples)
        for computed, sample in zip(unpack(policy.compute_logprobs(batch), batch, samples), samples, strict=True):
            expected = token_logprobs(model, sample.token_ids, 1.0)[0] * sample.loss_mask[1:]
            torch.testing.assert_close(computed[1:].double(), expected, atol=1e-4, rtol=0)


def test_a_batch_without_a_learning_signal_changes_nothing(tmp_path):
    config = tiny_config(tmp_path)
    samples = [dataclasses.replace(s, advantages=torch.zeros_like(s.advantages)) for s in random_samples(2, 2)]
    batch = balance_and_pack(samples, tokens_per_micro_batch=100, dp_rank=0, dp_size=1, skip_zero_advantage=True)
    with make_policy(config) as policy:
        before = {name: value.clone() for name, value in policy.iter_weights(torch.float32)}
        assert policy.train_step(batch)["update/skipped"] == 1.0
        assert policy.num_updates == 0
        assert all(torch.equal(value, before[name]) for name, value in policy.iter_weights(torch.float32))


def test_a_gradient_that_is_not_finite_is_an_error_and_leaves_the_weights_alone(tmp_path):
    from skyrl_mega.errors import NumericsError

    config = tiny_config(tmp_path)
    samples = random_samples(2, 2)
    samples[1].advantages[-1] = float("inf")
    with make_policy(config) as policy:
        before = {name: value.clone() for name, value in policy.iter_weights(torch.float32)}
        with pytest.raises(NumericsError, match="not applied"):
            policy.train_step(pack(samples))
        assert all(torch.equal(value, before[name]) for name, value in policy.iter_weights(torch.float32))
