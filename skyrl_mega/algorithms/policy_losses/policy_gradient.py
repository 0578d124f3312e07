"""Losses without a trust region: the plain policy gradient, with and without importance weights, and supervised learning."""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES, LossInputs, LossOutput
from skyrl_mega.algorithms.policy_losses.ratio import masked, ratio_stats, token_ratios


@POLICY_LOSSES.register("reinforce", token_separable=True)
def reinforce(inputs: LossInputs) -> LossOutput:
    """-A logprob: the policy gradient of tokens that the current policy sampled.

    Nothing accounts for a policy that has moved on: use it with one update per step and fresh samples, or with
    `algorithm.off_policy.stages` for what the engine sampled. The loss's value has no meaning of its own.

    Source: Williams 1992; for language models arXiv:2402.14740.
    """
    with torch.no_grad():
        stats = ratio_stats(token_ratios(inputs), inputs.loss_mask)
    return -masked(inputs.advantages, inputs.loss_mask) * masked(inputs.logprobs, inputs.loss_mask), stats


@POLICY_LOSSES.register("gpg", token_separable=True)
def gpg(inputs: LossInputs) -> LossOutput:
    """-A logprob, as group policy gradient has it: `reinforce` by another name.

    The paper's own part is its advantages: `algorithm.advantage=gpg`.

    Source: GPG, arXiv:2504.02546.
    """
    return reinforce(inputs)


@POLICY_LOSSES.register("importance_sampling", token_separable=True)
def importance_sampling(inputs: LossInputs) -> LossOutput:
    """-ratio A: REINFORCE with importance weights, without any bound. Its gradient is -sg(ratio) A d logprob.

    Unbiased for tokens of the old policy, and as noisy as the ratios: for nearly on-policy data, or
    `algorithm.old_logprobs=rollout` with few steps of staleness. `cispo` bounds the weights. Ratios end at e^20.

    Source: arXiv:1707.06347 equation 6 (L^CPI); the loss that Tinker calls importance_sampling.
    """
    ratios = token_ratios(inputs)
    with torch.no_grad():
        stats = ratio_stats(ratios, inputs.loss_mask)
    return -ratios.ratio_T * ratios.advantages_T, stats


@POLICY_LOSSES.register("cross_entropy", token_separable=True, scales_with_advantage=False)
def cross_entropy(inputs: LossInputs) -> LossOutput:
    """-logprob: supervised learning of every trained token; rewards and advantages have no part in it."""
    return -masked(inputs.logprobs, inputs.loss_mask), {}
