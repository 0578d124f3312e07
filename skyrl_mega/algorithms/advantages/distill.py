"""On-policy distillation: a teacher's judgement of every sampled token as its advantage."""

from __future__ import annotations

import math

import torch

from skyrl_mega.algorithms.advantages.grpo import grpo
from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages
from skyrl_mega.errors import ConfigError
from skyrl_mega_kernels.segmented_gae import segmented_returns


@ADVANTAGES.register("distill", needs=frozenset({"teacher_logprobs", "old_logprobs"}))
def distill(inputs: AdvantageInputs, *, coef: float = 1.0, discount: float = 0.0, reward_weight: float = 0.0) -> Advantages:
    """The student's reverse KL to its teacher, sampled at each token and negated; optionally with the task's reward.

        k_t = log teacher(token t) - log student(token t)
        advantage_t = coef x sum_{u >= t} discount^(u - t) k_u + reward_weight x GRPO's advantage of the sample

    over a sample's trained tokens: those that a tool wrote are jumped over. The student is the policy before the step's first
    update (`old_logprobs`). The mean of -k_t over tokens that the student sampled is KL(student || teacher) per token.

    - `discount=0`: each token answers for itself, which is the recipe of Thinking Machines and of GKD's on-policy data, and the
      gradient of the KL of the next token at states taken as given.
    - `discount=1`: each token answers for all that follows, MiniLLM's sequence-level reverse KL (its R_t): unbiased, and noisy in
      long responses.
    - `reward_weight`: what the group-relative advantage of the environment's reward (`grpo`) weighs beside the teacher. At 0 the
      reward is not looked at, and one sample per prompt will do.

    Stale samples: k_t is of the current student at tokens that an older one drew, so that what the older student liked better is
    over-represented; correct it with `algorithm.off_policy.stages`. Pair it with `policy_loss=ppo_clip`, or a plain policy
    gradient.

    Raises ConfigError for a discount outside [0, 1], or options that are not finite.
    Source: Thinking Machines, "On-Policy Distillation" (2025); MiniLLM, arXiv:2306.08543 section 2.2; GKD, arXiv:2306.13649.
    """
    if not 0.0 <= discount <= 1.0:
        raise ConfigError(f"`algorithm.advantage_options.discount` must lie in [0, 1]; got {discount}. 0 looks at single tokens.")
    for name, value in (("coef", coef), ("reward_weight", reward_weight)):
        if not math.isfinite(value):
            raise ConfigError(f"`algorithm.advantage_options.{name}` must be a finite number; got {value}.")
    assert inputs.teacher_logprobs_T is not None  # `needs` asked for both
    assert inputs.old_logprobs_T is not None
    gain_T = torch.where(inputs.loss_mask, inputs.teacher_logprobs_T - inputs.old_logprobs_T, 0.0)
    advantages_T = coef * segmented_returns(gain_T, inputs.cu_seqlens, gamma=discount, loss_mask=inputs.loss_mask)
    if reward_weight != 0.0:
        advantages_T = advantages_T + reward_weight * grpo(inputs).advantages_T
    return Advantages(advantages_T)
