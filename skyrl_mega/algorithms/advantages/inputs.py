"""What an advantage estimator is given and what it returns, and the registry of estimators.

Shape letters: N samples of one step, T their tokens end to end (token-aligned, see `skyrl_mega.types`). Everything is float64 on
CPU: this is little work, and group statistics of nearly equal rewards cancel in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from skyrl_mega.algorithms.registry import Registry
from skyrl_mega.errors import ConfigError


@dataclass(frozen=True)
class AdvantageInputs:
    """All samples of one step, on every rank the same.

    group_index_N int64 [N]: which prompt a sample answers; any integers in any order. cu_seqlens int64 [N + 1]; loss_mask bool
    [T]. token_rewards_T [T]: each turn's reward at the turn's last sampled token, less the KL penalty of each token where that
    is part of the reward; 0 elsewhere. turn_index_T int64 [T]: the turn that sampled a token, 0, 1, ...; -1 for tokens that no
    turn did. truncated_N bool [N]: cut off by a limit, not ended.

    Where the estimator needs them: values_T [T] (of the state before each token) and last_values_N [N] (after the last one);
    old_logprobs_T, rollout_logprobs_T, ref_logprobs_T, teacher_logprobs_T [T], 0 where loss_mask is False; baseline_rewards_N
    [N], the reward of the greedy answer to the sample's prompt; state_T int64 [T], the number of the observation that a token's
    turn answers, the same for the same tokens, -1 for tokens of no turn. reward_components: name -> [N], the parts that the
    reward was mixed from.
    """

    group_index_N: torch.Tensor
    cu_seqlens: torch.Tensor
    loss_mask: torch.Tensor
    token_rewards_T: torch.Tensor
    turn_index_T: torch.Tensor
    truncated_N: torch.Tensor
    rollout_logprobs_T: torch.Tensor
    values_T: torch.Tensor | None = None
    last_values_N: torch.Tensor | None = None
    old_logprobs_T: torch.Tensor | None = None
    ref_logprobs_T: torch.Tensor | None = None
    teacher_logprobs_T: torch.Tensor | None = None
    baseline_rewards_N: torch.Tensor | None = None
    state_T: torch.Tensor | None = None
    reward_components: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def sample_index_T(self) -> torch.Tensor:
        """int64 [T]: the sample of each token."""
        return torch.repeat_interleave(self.cu_seqlens.diff())

    @property
    def rewards_N(self) -> torch.Tensor:
        """[N]: the sum of each sample's token rewards."""
        return self.sum(self.token_rewards_T)

    @property
    def loss_tokens_N(self) -> torch.Tensor:
        """[N]: how many tokens of each sample are trained, in the rewards' dtype."""
        return self.sum(self.loss_mask.to(self.token_rewards_T.dtype))

    def sum(self, values_T: torch.Tensor) -> torch.Tensor:
        """[N]: the sum over each sample's tokens."""
        return values_T.new_zeros(len(self.group_index_N)).index_add(0, self.sample_index_T, values_T)

    def spread(self, values_N: torch.Tensor) -> torch.Tensor:
        """[T]: each sample's value at its loss tokens, 0 elsewhere."""
        return torch.where(self.loss_mask, values_N[self.sample_index_T], 0.0)


@dataclass(frozen=True)
class Advantages:
    """advantages_T [T], 0 where loss_mask is False; returns_T [T], what a critic is trained on, from estimators that have one."""

    advantages_T: torch.Tensor
    returns_T: torch.Tensor | None = None


def require_range(option: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises ConfigError unless the option's value lies in [low, high]."""
    if not low <= value <= high:
        allowed = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ConfigError(f"`algorithm.advantage_options.{option}` must be {allowed}; got {value}.")


AdvantageEstimator = Callable[..., Advantages]

_HERE = "skyrl_mega.algorithms.advantages"

#: `algorithm.advantage` -> estimator. Traits: `needs`, a frozenset of "values" (a critic), "old_logprobs", "ref_logprobs",
#: "teacher_logprobs", "greedy" (one greedy answer per prompt), "components", "states"; `groups`, whether it compares samples of a
#: prompt.
ADVANTAGES: Registry[AdvantageEstimator] = Registry(
    "algorithm.advantage",
    {
        "grpo": f"{_HERE}.grpo",
        "dr_grpo": f"{_HERE}.grpo",
        "rloo": f"{_HERE}.rloo",
        "opo": f"{_HERE}.opo",
        "gpg": f"{_HERE}.grpo",
        "maxrl": f"{_HERE}.maxrl",
        "gdpo": f"{_HERE}.gdpo",
        "grpo_passk": f"{_HERE}.pass_at_k",
        "pass_at_k": f"{_HERE}.pass_at_k",
        "reinforce_plus_plus": f"{_HERE}.reinforce_plus_plus",
        "reinforce_plus_plus_baseline": f"{_HERE}.reinforce_plus_plus",
        "remax": f"{_HERE}.remax",
        "gae": f"{_HERE}.gae",
        "turn_grpo": f"{_HERE}.turns",
        "step_grpo": f"{_HERE}.turns",
        "gigpo": f"{_HERE}.turns",
        "distill": f"{_HERE}.distill",
    },
    {"needs": frozenset(), "groups": False},
)
