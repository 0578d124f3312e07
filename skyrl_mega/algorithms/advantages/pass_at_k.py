"""Advantages for the best of k answers instead of the mean answer: pass@k where rewards are 0 and 1.

Shape letters: N samples, G groups; S samples sorted by group, then by reward.

**All subsets at once** (`pass_at_k`). Of a group's n samples let every subset of k be one attempt whose reward is its best
sample's. Sorted ascending, r_1 <= ... <= r_n, the best of a subset is r_j in C(j - 1, k - 1) of the C(n, k) subsets, which gives
the mean m and the standard deviation s of attempts without drawing any. Of the C(n - 1, k - 1) subsets that hold sample i, it is
the best in C(i - 1, k - 1), and a greater r_j is in C(j - 2, k - 2). With a_i the mean over these,

    advantage_i = (a_i - m) / s

For rewards of 0 and 1 this is the analytical derivation of arXiv:2508.10751, whose m is the unbiased estimate of pass@k,
1 - C(wrong, k) / C(n, k). Since m is the mean over subsets with and without i, a_i - m = (1 - k / n) (a_i - mean of those without
i): the latter does not depend on sample i, so the subtraction biases nothing. k = 1 is GRPO with the population's deviation.
"""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.advantages.groups import Groups
from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages, require_range
from skyrl_mega_kernels.segmented_gae import segmented_scan


@ADVANTAGES.register("pass_at_k", groups=True)
def pass_at_k(inputs: AdvantageInputs, *, k: int = 4, normalize_by_std: bool = True) -> Advantages:
    """How much better the best of k is if the sample is one of them, at every token of the sample; see the module's text.

    A prompt that every k of its samples solve gives 0, and so does a group of at most k samples: there is one subset at most, and
    nothing to compare (`trainer.samples_per_prompt` must exceed k). `normalize_by_std=False` leaves the division out: then the
    expected gradient is that of E[best of k], times (1 - k / n) / k.

    Source: arXiv:2508.10751 (analytical derivation), here for any rewards; the same subsets as in arXiv:2505.15201.
    """
    require_range("k", k, 1)
    groups = Groups.of(inputs.group_index_N)
    rewards_N = groups.centred(inputs.rewards_N)  # equal rewards are exactly 0, and the advantage does not see the shift
    sizes_G = groups.sizes(rewards_N)
    order_S, rank_S, starts_G = _by_reward(rewards_N, groups)
    sorted_S, group_S = rewards_N[order_S], groups.member_N[order_S]
    size_S = sizes_G[group_S]
    best_share_S = _ratio(rank_S - 1, k - 1, size_S, k)

    def of_group(values_S: torch.Tensor) -> torch.Tensor:
        return rewards_N.new_zeros(groups.count).index_add(0, group_S, values_S)

    mean_S = of_group(sorted_S * best_share_S)[group_S]
    std_S = of_group((sorted_S - mean_S).square() * best_share_S)[group_S].sqrt()
    # The best of those above, in subsets that hold this sample and them: sums over the rest of the group, from the end.
    above_S = sorted_S * _ratio(rank_S - 2, k - 2, size_S - 1, k - 1)
    sums_S = segmented_scan(torch.ones_like(above_S), above_S, torch.cat([starts_G, starts_G.new_tensor([len(order_S)])]))
    with_sample_S = sorted_S * _ratio(rank_S - 1, k - 1, size_S - 1, k - 1) + sums_S - above_S

    # Attempts differ where the worst possible one, whose best is the k-th from below, is worse than the group's best.
    kth_G = sorted_S[(starts_G + k - 1).clamp(max=len(order_S) - 1)]
    differs_S = ((sizes_G > k) & (kth_G < groups.extremum(rewards_N, "amax")))[group_S]
    advantages_S = with_sample_S - mean_S
    if normalize_by_std:
        advantages_S = advantages_S / torch.where(differs_S, std_S, 1.0)
    advantages_N = torch.zeros_like(rewards_N).index_copy(0, order_S, torch.where(differs_S, advantages_S, 0.0))
    return Advantages(inputs.spread(advantages_N))


@ADVANTAGES.register("grpo_passk", groups=True)
def grpo_passk(inputs: AdvantageInputs, *, normalize_by_std: bool = True, eps: float = 1e-6) -> Advantages:
    """The best sample's lead over the second best of its group, at every token of the best; 0 for all others.

    The whole group is one attempt: what it would lose without a sample is that sample's advantage. `normalize_by_std` divides by
    the group's standard deviation + eps. A shared first place and a group of one give 0, so with rewards of 0 and 1 only prompts
    with a single success teach anything.

    Source: arXiv:2503.19595 (leave-one-out for the best of k); the division is the peers'.
    """
    groups = Groups.of(inputs.group_index_N)
    rewards_N = groups.centred(inputs.rewards_N)
    order_S, rank_S, _ = _by_reward(rewards_N, groups)
    sorted_S = rewards_N[order_S]
    lead_S = torch.zeros_like(sorted_S)
    lead_S[1:] = torch.where(rank_S[1:] > 1, sorted_S.diff(), 0.0)
    is_best_S = rank_S == groups.sizes(rewards_N)[groups.member_N[order_S]]
    advantages_N = torch.zeros_like(rewards_N).index_copy(0, order_S, torch.where(is_best_S, lead_S, 0.0))
    if normalize_by_std:
        std_N = groups.spread(groups.std(inputs.rewards_N))
        advantages_N = torch.where(advantages_N != 0, advantages_N / (std_N + eps), 0.0)
    return Advantages(inputs.spread(advantages_N))


def _by_reward(rewards_N: torch.Tensor, groups: Groups) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(order_S, rank_S, starts_G): sample numbers by group, then by reward; each one's place in its group from 1, in float64;
    where each group begins."""
    by_reward_N = rewards_N.argsort(stable=True)
    order_S = by_reward_N[groups.member_N[by_reward_N].argsort(stable=True)]
    sizes_G = groups.sizes(rewards_N)
    starts_G = (sizes_G.cumsum(0) - sizes_G).long()
    rank_S = torch.arange(len(order_S)) - starts_G[groups.member_N[order_S]] + 1
    return order_S, rank_S.to(rewards_N.dtype), starts_G


def _ratio(top_S: torch.Tensor, top_k: int, bottom_S: torch.Tensor, bottom_k: int) -> torch.Tensor:
    """C(top, top_k) / C(bottom, bottom_k), 0 where either counts nothing."""
    counts_S = (top_S >= top_k) & (bottom_S >= bottom_k) & (top_k >= 0)
    top_S, bottom_S = torch.where(counts_S, top_S, max(top_k, 0)), torch.where(counts_S, bottom_S, bottom_k)
    return torch.where(counts_S, (_log_choose(top_S, max(top_k, 0)) - _log_choose(bottom_S, bottom_k)).exp(), 0.0)


def _log_choose(n_S: torch.Tensor, k: int) -> torch.Tensor:
    of_k = torch.lgamma(n_S.new_tensor(k + 1.0))
    return torch.lgamma(n_S + 1) - of_k - torch.lgamma(n_S - k + 1)
