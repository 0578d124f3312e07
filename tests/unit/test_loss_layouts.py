"""Losses and reductions through the real packing: no way to cut an update up changes its loss or its gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.loss_oracle import Response, token_losses
from helpers.policy import make_policy, tiny_config
from skyrl_mega.algorithms.loss import Objective
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES, LossInputs, mark_tokens
from skyrl_mega.algorithms.reductions import REDUCTIONS, Totals, reduction_weights
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.config.schema import AlgorithmConfig
from skyrl_mega.data.packing import balance_and_pack, pack_rows
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.orchestration.loop import pack

CONSTANT_LENGTH = 9
#: (tokens per micro-batch, data-parallel ranks, shared prompts)
LAYOUTS = [(1000, 1, False), (60, 1, True), (40, 2, False), (50, 3, True), (24, 1, False)]
#: Narrow where tokens must be marked or clipped by chance; float64 rows stay those of the samples.
OPTIONS = {"gspo": {"clip_low": 0.1, "clip_high": 0.1}, "kl_cov": {"fraction": 0.1}, "ppo_clip": {}}


def update(seed=0):
    """Samples, and by sample: logprobs (a leaf) and old logprobs, token-aligned in float64."""
    samples = random_samples(5, 3, seed=seed)
    samples[4].advantages = torch.zeros_like(samples[4].advantages)
    generator = torch.Generator().manual_seed(seed + 1)
    old, now = {}, {}
    for sample in samples:
        old[sample.sample_index] = -torch.rand(sample.num_tokens, generator=generator, dtype=torch.float64)
        noise = torch.randn(sample.num_tokens, generator=generator, dtype=torch.float64)
        now[sample.sample_index] = (old[sample.sample_index] + 0.3 * noise).requires_grad_()
    return samples, old, now


def in_layout(samples, old, now, config, tokens, ranks, share):
    """(loss, gradients by sample) of one update cut up that way: sums over micro-batches and ranks."""
    leaves = {index: row.detach().clone().requires_grad_() for index, row in now.items()}
    skips = bool(POLICY_LOSSES.find(config.policy_loss).traits["scales_with_advantage"])
    objective = Objective(config)
    loss = torch.zeros((), dtype=torch.float64)
    for rank in range(ranks):
        batch = balance_and_pack(
            samples, tokens_per_micro_batch=tokens, dp_rank=rank, dp_size=ranks, skip_zero_advantage=skips, share_prompts=share
        )
        totals = Totals(batch.num_loss_tokens, batch.num_sequences, batch.num_groups, CONSTANT_LENGTH)
        packed = zip(batch.micro_batches, pack_rows(leaves, batch), pack_rows(old, batch), strict=True)
        for micro_batch, logprobs_T, old_T in packed:
            weights_T = reduction_weights(
                config.reduction,
                micro_batch.loss_mask,
                micro_batch.cu_seqlens,
                micro_batch.loss_tokens_per_sequence,
                micro_batch.loss_tokens_per_group,
                totals,
            )
            inputs = LossInputs(
                logprobs=logprobs_T,
                old_logprobs=old_T,
                rollout_logprobs=micro_batch.rollout_logprobs,
                advantages=micro_batch.advantages.double(),
                loss_mask=micro_batch.loss_mask,
                sequences=Sequences.packed(micro_batch.cu_seqlens),
                marked=None if micro_batch.marked is None else micro_batch.marked > 0,
            )
            loss = loss + objective(inputs, weights_T)[0]
    loss.backward()
    return loss.detach(), [row.grad if row.grad is not None else torch.zeros_like(row) for row in leaves.values()]


def by_formula(samples, old, now, config):
    """The loss from the samples, without packing: each reduction as its paper prints it."""
    options = {"clip_low": 0.2, "clip_high": 0.28, "coef": 1.0, **config.loss_options}
    sums, counts, groups = [], [], {}
    for number, sample in enumerate(samples):
        response = Response(
            now[sample.sample_index].tolist(),
            old[sample.sample_index].tolist(),
            sample.rollout_logprobs.tolist(),
            sample.advantages.tolist(),
            sample.loss_mask.tolist(),
            [] if sample.marked is None else [value > 0 for value in sample.marked.tolist()],
        )
        sums.append(sum(loss for loss, _ in token_losses(config.policy_loss, response, options)))
        counts.append(sum(response.mask))
        groups.setdefault(sample.group_index, []).append(number)
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    match config.reduction:
        case "token_mean":
            return sum(sums) / sum(counts)
        case "sequence_mean":
            return sum(means) / len(means)
        case "sequence_sum_norm":
            return sum(sums) / CONSTANT_LENGTH / len(sums)
        case "prompt_mean":
            return sum(sum(sums[i] for i in m) / sum(counts[i] for i in m) for m in groups.values()) / len(groups)


@pytest.mark.parametrize(("name", "reduction"), list(itertools.product(OPTIONS, REDUCTIONS)))
def test_micro_batching_packing_and_data_parallel_size_change_nothing(name, reduction):
    config = AlgorithmConfig(policy_loss=name, loss_options=OPTIONS[name], reduction=reduction)
    samples, old, now = update()
    mark_tokens(samples, config)
    expected = by_formula(samples, old, now, config)
    results = [in_layout(samples, old, now, config, *layout) for layout in LAYOUTS]
    for loss, gradients in results:
        assert float(loss) == pytest.approx(expected, rel=1e-6)  # weights are float32
        for gradient, reference in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-9)
    assert max(float(gradient.abs().max()) for gradient in results[0][1]) > 1e-3


def test_marks_reach_the_tokens_they_were_made_for_in_every_layout():
    config = AlgorithmConfig(policy_loss="kl_cov", loss_options={"fraction": 0.1})
    samples, _, _ = update(seed=3)
    mark_tokens(samples, config)
    marked = {(s.sample_index, t) for s in samples for t in s.marked.nonzero().squeeze(1).tolist()}
    assert len(marked) == int(0.1 * sum(s.num_loss_tokens for s in samples))
    assert all(samples[index].loss_mask[t] for index, t in marked)
    places = {s.sample_index: torch.arange(s.num_tokens) + 1000.0 * (s.sample_index + 1) for s in samples}
    for tokens, ranks, share in LAYOUTS:
        found = set()
        for rank in range(ranks):
            batch = balance_and_pack(
                samples,
                tokens_per_micro_batch=tokens,
                dp_rank=rank,
                dp_size=ranks,
                skip_zero_advantage=False,
                share_prompts=share,
            )
            for micro_batch, place_T in zip(batch.micro_batches, pack_rows(places, batch), strict=True):
                if micro_batch.marked is not None:
                    found |= {(int(p) // 1000 - 1, int(p) % 1000) for p in place_T[micro_batch.marked > 0].tolist()}
        assert found == marked


def test_losses_that_mark_nothing_leave_samples_alone():
    samples, _, _ = update()
    mark_tokens(samples, AlgorithmConfig())
    assert all(sample.marked is None for sample in samples)


@pytest.mark.parametrize(
    ("name", "options", "seen"),
    [
        ("kl_cov", "{fraction: 0.2}", "marked_fraction"),
        ("dppo_tv", "{delta_low: 0.001, delta_high: 0.001}", "clip_low_fraction"),
    ],
)
def test_the_fused_head_computes_the_same_update(name, options, seen, tmp_path):
    """Marks, and the engine's logprobs, reach the loss chunk by chunk as they do in one piece."""
    overrides = [f"algorithm.policy_loss={name}", "algorithm.old_logprobs=rollout", "model.logprob_chunk_tokens=16"]
    overrides += [f"algorithm.loss_options={options}"]
    results = []
    for fused in ("on", "off"):
        config = tiny_config(tmp_path / fused, *overrides, f"model.fused_loss={fused}")
        with make_policy(config) as policy:
            metrics = policy.train_step(pack(config, policy.topology, random_samples(4, 3), share_prompts=True))
        results.append([metrics[key] for key in ("loss/policy", "update/grad_norm", "policy/ratio", "policy/approx_kl")])
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert metrics[f"policy/{seen}"] > 0
