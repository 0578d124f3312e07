"""Credit turn by turn in episodes of several turns, where each turn may have a reward of its own.

Shape letters: N samples, T tokens, K turns of all samples (a sample's own in order).

An estimator for outcomes gives all tokens of an episode one advantage. Here a turn is the unit: tokens of a turn share one
advantage, and turns of an episode may differ.

- `turn_grpo` compares a turn's rewards-to-go with those of the group's other samples at the same turn: the return-based
  advantage of GTPO (arXiv:2511.14846). `episode_coef` adds the whole episode's GRPO advantage. With `gamma=0` a turn is judged by
  its own reward; with `episode_coef` above 0 that is a turn-level plus an outcome advantage as in MT-GRPO (arXiv:2505.11821),
  except that the outcome is the episode's sum, not its last reward.
- `gigpo` compares turns that answer the same observation, whichever their numbers: GiGPO, arXiv:2505.10978.
- `step_grpo` takes every turn for a sample of its own, with its own reward, and compares it with all turns of the group.
  `to_go=True` then sums the normalised rewards of this and all later turns: GRPO with process supervision, arXiv:2402.03300
  section 4.1.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skyrl_mega.algorithms.advantages.groups import Groups
from skyrl_mega.algorithms.advantages.grpo import grpo
from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages, require_range
from skyrl_mega_kernels.segmented_gae import segmented_scan


@ADVANTAGES.register("turn_grpo", groups=True)
def turn_grpo(
    inputs: AdvantageInputs,
    *,
    gamma: float = 1.0,
    episode_coef: float = 0.0,
    normalize_by_std: bool = True,
    eps: float = 1e-6,
) -> Advantages:
    """Each turn's discounted rewards-to-go, normalised over the group's samples at the same turn.

    return_it = sum_{s >= t} gamma^(s - t) r_is;  advantage_it = (return_it - mean_j return_jt) / (std_j return_jt + eps)
    + episode_coef x the GRPO advantage of the sum of all rewards. The mean goes over the samples that have a turn t: one that
    nobody else reached has nothing to be compared with and gets 0 (plus the episode's share). In episodes of one turn with
    `episode_coef=0` this is GRPO. Sources: the module's text.
    """
    require_range("gamma", gamma, 0, 1)
    turns = Turns.of(inputs)
    returns_K = turns.to_go(turns.rewards_K, gamma)
    same_turn = turns.compared_by(turns.number_K, inputs)
    advantages_T = turns.spread(same_turn.normalized(returns_K, by_std=normalize_by_std, eps=eps))
    if episode_coef != 0:
        advantages_T = advantages_T + episode_coef * grpo(inputs, normalize_by_std=normalize_by_std, eps=eps).advantages_T
    return Advantages(advantages_T)


@ADVANTAGES.register("gigpo", groups=True, needs=frozenset({"states"}))
def gigpo(
    inputs: AdvantageInputs,
    *,
    gamma: float = 0.95,
    step_coef: float = 1.0,
    normalize_by_std: bool = True,
    eps: float = 1e-6,
) -> Advantages:
    """The episode's GRPO advantage plus step_coef x that of the turn among the group's turns from the same state.

    return_it = sum_{s >= t} gamma^(s - t) r_is, compared with the mean (and std) of the returns of all turns of the group, of any
    sample and number, that were sampled in the same state: after the same observation, token by token. (The first one is the
    prompt, which all share; later ones are what the environment wrote since the turn before, not the history.) A state that came
    once has nothing to be compared with and gives 0. `normalize_by_std=False` is the paper's F_norm = 1.

    Source: GiGPO, arXiv:2505.10978, equations 3, 6 to 8.
    """
    require_range("gamma", gamma, 0, 1)
    turns = Turns.of(inputs)
    assert inputs.state_T is not None  # `needs` asked for it
    states_K = turns.first(inputs.state_T)
    same_state = turns.compared_by(states_K, inputs)
    returns_K = turns.to_go(turns.rewards_K, gamma)
    step_T = turns.spread(same_state.normalized(returns_K, by_std=normalize_by_std, eps=eps))
    return Advantages(grpo(inputs, normalize_by_std=normalize_by_std, eps=eps).advantages_T + step_coef * step_T)


@ADVANTAGES.register("step_grpo", groups=True)
def step_grpo(inputs: AdvantageInputs, *, to_go: bool = False, normalize_by_std: bool = True, eps: float = 1e-6) -> Advantages:
    """Each turn's own reward, normalised over all turns of the group; with `to_go` summed over this and all later turns.

    a_it = (r_it - mean(group's turns)) / (std(group's turns) + eps);  advantage_it = a_it, or sum_{s >= t} a_is.
    In episodes of one turn this is GRPO. Sources: the module's text.
    """
    turns = Turns.of(inputs)
    groups = Groups.of(inputs.group_index_N[turns.sample_K])
    advantages_K = groups.normalized(turns.rewards_K, by_std=normalize_by_std, eps=eps)
    return Advantages(turns.spread(turns.to_go(advantages_K, 1.0) if to_go else advantages_K))


@dataclass(frozen=True)
class Turns:
    """All turns of a step: sample_K and number_K int64 [K] say whose turn it is and which; rewards_K its reward, that of its
    tokens. index_T int64 [T]: the turn of each token, -1 for a token of none. cu_turns int64 [N + 1]: where each sample's turns
    begin. `most`: no sample has more. Made by `of`."""

    sample_K: torch.Tensor
    number_K: torch.Tensor
    rewards_K: torch.Tensor
    index_T: torch.Tensor
    cu_turns: torch.Tensor
    most: int

    @classmethod
    def of(cls, inputs: AdvantageInputs) -> Turns:
        is_of_turn_T = inputs.turn_index_T >= 0
        numbers, samples = inputs.turn_index_T[is_of_turn_T], inputs.sample_index_T[is_of_turn_T]
        most = int(numbers.max()) + 1 if len(numbers) else 1
        # Tokens are in order, so that the keys ascend.
        keys, inverse = torch.unique_consecutive(samples * most + numbers, return_inverse=True)
        index_T = torch.full_like(inputs.turn_index_T, -1)
        index_T[is_of_turn_T] = inverse
        rewards_K = inputs.token_rewards_T.new_zeros(len(keys)).index_add(0, inverse, inputs.token_rewards_T[is_of_turn_T])
        sample_K = keys // most
        counts_N = torch.bincount(sample_K, minlength=len(inputs.group_index_N))
        cu_turns = torch.cat([counts_N.new_zeros(1), counts_N.cumsum(0)])
        return cls(sample_K, keys % most, rewards_K, index_T, cu_turns, most)

    def to_go(self, values_K: torch.Tensor, gamma: float) -> torch.Tensor:
        """[K]: each turn's value plus gamma times that of the sample's next turn on."""
        return segmented_scan(torch.full_like(values_K, gamma), values_K, self.cu_turns)

    def compared_by(self, key_K: torch.Tensor, inputs: AdvantageInputs) -> Groups:
        """The turns of each group of samples that have the same key (int64 [K], from 0), as groups of turns."""
        group_K = Groups.of(inputs.group_index_N[self.sample_K]).member_N
        return Groups.of(group_K * (int(key_K.max()) + 1 if len(key_K) else 1) + key_K)

    def first(self, values_T: torch.Tensor) -> torch.Tensor:
        """[K]: the value at each turn's first token."""
        index_T = self.index_T
        starts_T = (index_T >= 0) & (index_T != torch.cat([index_T.new_full((1,), -1), index_T[:-1]]))
        return values_T[starts_T]

    def spread(self, values_K: torch.Tensor) -> torch.Tensor:
        """[T]: each token's turn's value, 0 for a token of none."""
        if len(values_K) == 0:
            return values_K.new_zeros(self.index_T.shape)
        return torch.where(self.index_T >= 0, values_K[self.index_T.clamp(min=0)], 0.0)
