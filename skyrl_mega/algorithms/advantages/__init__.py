"""Advantages: how much better each token did than could be expected; one file per family.

`compute_advantages` is what the loop calls; estimators are found by `algorithm.advantage`.
"""

from skyrl_mega.algorithms.advantages.compute import compute_advantages, estimator, needs
from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages

__all__ = ["ADVANTAGES", "AdvantageInputs", "Advantages", "compute_advantages", "estimator", "needs"]
