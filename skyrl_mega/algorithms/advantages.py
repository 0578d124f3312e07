"""Advantages: how much better a trajectory did than could be expected, one number per trajectory, copied to its tokens.

Shape letters: N samples, L tokens of one sample. An estimator of the registry maps (rewards_N, group_index_N, config) to
advantages_N; `compute_advantages` spreads them over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from skyrl_mega.algorithms.registry import lookup
from skyrl_mega.config.schema import AlgorithmConfig
from skyrl_mega.errors import NumericsError
from skyrl_mega.types import TrainSample

AdvantageEstimator = Callable[[torch.Tensor, torch.Tensor, AlgorithmConfig], torch.Tensor]


def grpo_advantages(
    rewards_N: torch.Tensor, group_index_N: torch.Tensor, *, normalize_by_std: bool = True, eps: float = 1e-6
) -> torch.Tensor:
    """Rewards centred on their group's mean and divided by its standard deviation; same shape and dtype as `rewards_N`.

    advantage_i = (r_i - mean(group)) / (std(group) + eps), with the unbiased standard deviation (divisor n - 1).
    `normalize_by_std=False` leaves the division out. Groups of one, and groups whose rewards are all equal, give exactly 0.
    group_index_N int64 [N] may hold any integers in any order. Computed in float64.

    Source: GRPO, arXiv:2402.03300 section 4.1.2; without the division Dr. GRPO, arXiv:2503.20783.
    """
    rewards = rewards_N.double()
    groups, member_N = torch.unique(group_index_N, return_inverse=True)
    zeros_G = rewards.new_zeros(len(groups))
    count_G = zeros_G.index_add(0, member_N, torch.ones_like(rewards))
    mean_G = zeros_G.index_add(0, member_N, rewards) / count_G
    centred_N = rewards - mean_G[member_N]
    # The mean of equal numbers may differ from them in the last bit, and dividing by (almost only) eps would magnify that.
    highest_G = zeros_G.scatter_reduce(0, member_N, rewards, "amax", include_self=False)
    lowest_G = zeros_G.scatter_reduce(0, member_N, rewards, "amin", include_self=False)
    centred_N = torch.where((highest_G > lowest_G)[member_N], centred_N, 0.0)
    if normalize_by_std:
        variance_G = zeros_G.index_add(0, member_N, centred_N.square()) / (count_G - 1).clamp(min=1)
        centred_N = centred_N / (variance_G.sqrt() + eps)[member_N]
    return centred_N.to(rewards_N.dtype)


def _grpo(rewards_N: torch.Tensor, group_index_N: torch.Tensor, config: AlgorithmConfig) -> torch.Tensor:
    return grpo_advantages(rewards_N, group_index_N, normalize_by_std=config.normalize_by_std, eps=config.advantage_eps)


#: `algorithm.advantage` -> estimator.
ADVANTAGES: dict[str, AdvantageEstimator] = {"grpo": _grpo}


def compute_advantages(samples: Sequence[TrainSample], config: AlgorithmConfig) -> None:
    """Fills `sample.advantages`: float32 [L], the sample's advantage where loss_mask is True, 0 elsewhere.

    `samples` must hold whole groups: a group's statistics come from the members that are passed. Raises NumericsError for a
    reward that is not finite, ConfigError for an unknown `config.advantage`.
    """
    estimator = lookup(ADVANTAGES, config.advantage, "algorithm.advantage")
    rewards_N = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    group_index_N = torch.tensor([sample.group_index for sample in samples], dtype=torch.int64)
    bad = (~rewards_N.isfinite()).nonzero().flatten().tolist()
    if bad:
        first = samples[bad[0]]
        raise NumericsError(
            f"rewards must be finite; {len(bad)} of {len(samples)} are not, the first is {first.reward} "
            f"(group {first.group_id!r}, sample {first.sample_index}). Check the environment's reward."
        )
    for sample, advantage in zip(samples, estimator(rewards_N, group_index_N, config).tolist(), strict=True):
        sample.advantages = sample.loss_mask.to(torch.float32) * advantage
