"""Several rewards, each normalised within its group before they are added."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from skyrl_mega.algorithms.advantages.groups import Groups
from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages
from skyrl_mega.algorithms.advantages.whitening import whitened
from skyrl_mega.errors import ConfigError, DataError


@ADVANTAGES.register("gdpo", needs=frozenset({"components"}), groups=True)
def gdpo(
    inputs: AdvantageInputs,
    *,
    weights: Mapping[str, float] | None = None,
    normalize_by_std: bool = True,
    eps: float = 1e-6,
) -> Advantages:
    """The weighted sum of the reward's components, each normalised within the group, then whitened over the step's samples.

    a_i = sum_k weights[k] (r_ik - mean_k(group)) / (std_k(group) + eps)
    advantage_i = (a_i - mean(a)) / std(a), over all samples of the step

    GRPO normalises the sum instead: components of small spread drown there, and different mixtures of them can give one and the
    same advantage. `weights`: of each component (`env`: the environment's reward), all 1 if left out; a component that is left
    out of them has weight 0. The mixed reward, and its terms' weights, are not looked at.

    Raises DataError where samples have no components, ConfigError for weights of components that there are not.
    Source: GDPO, arXiv:2601.05242.
    """
    require_finite(weights or {})
    components = inputs.reward_components
    if not components and len(inputs.group_index_N):
        raise DataError(
            "algorithm.advantage=gdpo needs the parts that rewards are mixed from, and the samples have none: set "
            "`reward.terms`, or choose grpo."
        )
    unknown = set(weights or {}) - set(components)
    if unknown and components:
        raise ConfigError(
            f"`algorithm.advantage_options.weights` names {', '.join(sorted(unknown))}; the reward's parts are "
            f"{', '.join(components)}."
        )
    groups = Groups.of(inputs.group_index_N)
    total_N = torch.zeros_like(inputs.rewards_N)
    for name, rewards_N in components.items():
        weight = 1.0 if weights is None else weights.get(name, 0.0)
        total_N = total_N + weight * groups.normalized(rewards_N, by_std=normalize_by_std, eps=eps)
    return Advantages(inputs.spread(whitened(total_N)))


def require_finite(weights: Mapping[str, float]) -> None:
    """Raises ConfigError for weights that are no numbers."""
    if not isinstance(weights, Mapping):
        raise ConfigError(f"`algorithm.advantage_options.weights` must map components to numbers; got {weights!r}.")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"`algorithm.advantage_options.weights.{name}` must be a finite number; got {weight!r}.")
