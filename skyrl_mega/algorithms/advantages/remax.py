"""REINFORCE with the greedy answer's reward as the baseline."""

from __future__ import annotations

from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages


@ADVANTAGES.register("remax", needs=frozenset({"greedy"}))
def remax(inputs: AdvantageInputs) -> Advantages:
    """Each reward less that of the greedy answer to the same prompt, at every token of the sample.

    advantage_i = r_i - r(greedy), the rewards being those of whole episodes. `trainer.samples_per_prompt` may be 1: the baseline
    needs no other samples, but one more answer per prompt, which is begun beside them and as stale as they are. A KL penalty
    inside the reward (`algorithm.kl.place`) is part of r_i, not of the baseline.

    Source: arXiv:2310.10505.
    """
    assert inputs.baseline_rewards_N is not None  # `needs` asked for it
    return Advantages(inputs.spread(inputs.rewards_N - inputs.baseline_rewards_N))
