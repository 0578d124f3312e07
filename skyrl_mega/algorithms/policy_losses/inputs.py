"""What a policy loss is given and what it returns, and the registry of policy losses.

Shape letter: T packed tokens of one micro-batch, label-aligned (see `skyrl_mega.types`).

A loss maps LossInputs (and its options) to (per_token_loss_T, stats), both 0 where loss_mask is False. Nothing here averages:
`loss.py` weights and sums. stats are detached [T] tensors, so that they are averaged by the same weights as the loss and add up
over micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from skyrl_mega.algorithms.registry import Registry
from skyrl_mega.algorithms.sequences import Sequences


@dataclass(frozen=True)
class LossInputs:
    """What a loss may look at; every tensor is [T], float32 (or float64), loss_mask bool.

    `logprobs` and `entropy` carry gradients. `old_logprobs`: the policy before this step's first update (the proximal policy);
    for the first update pass `logprobs.detach()`. `rollout_logprobs`: the engine's, as sampled. `ref_logprobs`: the frozen
    reference, when used. `teacher_topk_logprobs` and `topk_logprobs` [T, K]: teacher's and policy's (with gradient) at the
    teacher's K likeliest tokens, when asked for; -inf where there are fewer. `sequences` is there for losses that are not
    token-separable, `marked` (bool) for those with `marks`. `staleness`: weight versions since each token was sampled, where the
    samples carry it.
    """

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    entropy: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    sequences: Sequences | None = None
    staleness: torch.Tensor | None = None
    topk_logprobs: torch.Tensor | None = None
    teacher_topk_logprobs: torch.Tensor | None = None
    marked: torch.Tensor | None = None


@dataclass(frozen=True)
class MarkInputs:
    """What `marks` may look at, float64 [N], of the N trained tokens of a whole update: advantages, and the logprobs that the
    engine sampled them with."""

    logprobs_N: torch.Tensor
    advantages_N: torch.Tensor


LossOutput = tuple[torch.Tensor, dict[str, torch.Tensor]]
PolicyLoss = Callable[..., LossOutput]

_HERE = "skyrl_mega.algorithms.policy_losses"

#: `algorithm.policy_loss` -> loss. Traits: `token_separable`, every token's part looks at that token only, so that the LM head
#: and the loss may run chunk by chunk (others are given `sequences`); `needs`, further inputs ("teacher_topk");
#: `scales_with_advantage`, tokens with advantage 0 have no part in it, so that samples without any advantage need not be
#: computed; `against_sampler`, its ratio is to `rollout_logprobs`, so that no off-policy stage may weigh by that again;
#: `marks`, a function from MarkInputs (and those of the loss's options that it names) to bool [N]: which tokens of the update
#: it marks (`marks.py`).
POLICY_LOSSES: Registry[PolicyLoss] = Registry(
    "algorithm.policy_loss",
    {
        "ppo_clip": f"{_HERE}.ppo",
        "dual_clip": f"{_HERE}.ppo",
        "gspo": f"{_HERE}.gspo",
        "gspo_token": f"{_HERE}.gspo",
        "gmpo": f"{_HERE}.gmpo",
        "cispo": f"{_HERE}.cispo",
        "sapo": f"{_HERE}.sapo",
        "dppo_tv": f"{_HERE}.dppo",
        "dppo_kl": f"{_HERE}.dppo",
        "clip_cov": f"{_HERE}.covariance",
        "kl_cov": f"{_HERE}.covariance",
        "reinforce": f"{_HERE}.policy_gradient",
        "gpg": f"{_HERE}.policy_gradient",
        "importance_sampling": f"{_HERE}.policy_gradient",
        "cross_entropy": f"{_HERE}.policy_gradient",
        "distill_topk": f"{_HERE}.distill",
    },
    {"token_separable": False, "needs": frozenset(), "scales_with_advantage": True, "against_sampler": False, "marks": None},
)
