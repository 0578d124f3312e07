"""Clip-Cov and KL-Cov: spare the few tokens that cost the most entropy.

A policy-gradient step changes the entropy by minus the covariance, over the policy's tokens, of logprob and advantage
(arXiv:2505.22617). A small share of the tokens makes up most of it: likely ones with a high advantage. Their part of it

    cov_t = (logprob_t - mean logprob) (A_t - mean A)

picks tokens that are left out (Clip-Cov) or held back by a KL penalty (KL-Cov). Both means are over all trained tokens of the
update.

The authors' code, and others' after it, does this in every micro-batch with the current logprobs, so that the choice depends on
how a batch is cut up. Here tokens are marked once for the whole update, before packing, on every rank alike, with the logprobs
that the engine sampled them with: micro-batching, packing and layout don't change the choice, and each token's loss looks at
that token only. Under staleness the covariance is that of the policies that sampled.
"""

from __future__ import annotations

import zlib

import torch

from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES, LossInputs, LossOutput, MarkInputs
from skyrl_mega.algorithms.policy_losses.ppo import ppo_clip
from skyrl_mega.algorithms.policy_losses.ratio import masked, ratio_stats, require_range, token_ratios
from skyrl_mega.errors import ConfigError


def covariances(inputs: MarkInputs) -> torch.Tensor:
    """float64 [N]: each token's part of the covariance of logprob and advantage (arXiv:2505.22617)."""
    logprobs_N, advantages_N = inputs.logprobs_N, inputs.advantages_N
    return (logprobs_N - logprobs_N.mean()) * (advantages_N - advantages_N.mean())


def mark_within(inputs: MarkInputs, *, fraction: float, cov_low: float, cov_high: float) -> torch.Tensor:
    """bool [N]: a random `fraction` of the tokens (of all, at least one), drawn from those with cov_low < cov < cov_high.

    The draw follows from the tokens themselves, so that every rank, and a replayed step, draws the same.
    """
    require_range("fraction", fraction, 0, 1, open_low=True)
    if not cov_low < cov_high:
        raise ConfigError(f"`algorithm.loss_options.cov_low` ({cov_low:g}) must be below `cov_high` ({cov_high:g}).")
    cov_N = covariances(inputs)
    candidates = ((cov_N > cov_low) & (cov_N < cov_high)).nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(zlib.crc32(inputs.logprobs_N.numpy().tobytes()))
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[: _count(fraction, len(cov_N))]]
    return torch.zeros_like(cov_N, dtype=torch.bool).index_fill(0, chosen, True)


def mark_largest(inputs: MarkInputs, *, fraction: float) -> torch.Tensor:
    """bool [N]: the `fraction` of the tokens (at least one) with the largest covariance."""
    require_range("fraction", fraction, 0, 1, open_low=True)
    cov_N = covariances(inputs)
    chosen = cov_N.topk(_count(fraction, len(cov_N))).indices
    return torch.zeros_like(cov_N, dtype=torch.bool).index_fill(0, chosen, True)


def _count(fraction: float, num_tokens: int) -> int:
    return min(num_tokens, max(1, int(fraction * num_tokens)))


@POLICY_LOSSES.register("clip_cov", token_separable=True, marks=mark_within)
def clip_cov(
    inputs: LossInputs,
    *,
    fraction: float = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> LossOutput:
    """`ppo_clip`, and 0 (no gradient) at the marked tokens: a random few with a high covariance (see the module).

    `fraction` counts all trained tokens of the update. `marked_fraction` is what was marked. Tokens that PPO's clipping has
    stopped already may be among them.

    Source: Clip-Cov, arXiv:2505.22617, with its numbers.
    """
    loss_T, stats = ppo_clip(inputs, clip_low=clip_low, clip_high=clip_high)
    marked_T = _marked(inputs)
    return loss_T.masked_fill(marked_T, 0.0), stats | {"marked_fraction": marked_T.to(loss_T.dtype)}


@POLICY_LOSSES.register("kl_cov", token_separable=True, marks=mark_largest, scales_with_advantage=False)
def kl_cov(inputs: LossInputs, *, fraction: float = 2e-3, coef: float = 1.0) -> LossOutput:
    """-ratio A, plus coef |log ratio| at the marked tokens: those with the largest covariance (see the module).

    Without clipping: the penalty alone holds back the tokens that would collapse the entropy. `fraction`: 2e-3 in the paper's
    runs of 7B, 2e-4 of 32B. |log ratio| is the authors' estimate of KL(old || policy).

    Source: KL-Cov, arXiv:2505.22617.
    """
    require_range("coef", coef, 0)
    ratios = token_ratios(inputs)
    marked_T = _marked(inputs)
    penalty_T = torch.where(marked_T, ratios.log_ratio_T.abs(), 0.0)
    with torch.no_grad():
        stats = ratio_stats(ratios, inputs.loss_mask)
        stats |= {"marked_fraction": marked_T.to(penalty_T.dtype), "marked_kl": masked(penalty_T, inputs.loss_mask)}
    return coef * penalty_T - ratios.ratio_T * ratios.advantages_T, stats


def _marked(inputs: LossInputs) -> torch.Tensor:
    if inputs.marked is not None:
        return inputs.marked & inputs.loss_mask
    if inputs.loss_mask.any():  # a micro-batch of padding has no marks
        raise ConfigError(
            "this policy loss needs the update's tokens marked before packing (`mark_tokens`), as LossInputs.marked."
        )
    return torch.zeros_like(inputs.loss_mask)
