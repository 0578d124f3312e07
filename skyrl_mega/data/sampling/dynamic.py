"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): groups without a learning signal make way for others, within a budget.

A group whose raw rewards are all equal has no spread to learn from. Leaving it out keeps the number of groups that teach
something the same in every step, at the price of more rollouts; the budget bounds that price.
"""

from __future__ import annotations

from skyrl_mega.config.schema import SamplingConfig
from skyrl_mega.errors import RolloutError
from skyrl_mega.types import TrajectoryGroup


def has_signal(group: TrajectoryGroup) -> bool:
    """Whether the group's raw rewards differ, from each other or from the greedy answer's where there is one (ReMax)."""
    baseline = set() if group.baseline_reward is None else {group.baseline_reward}
    return len({trajectory.reward for trajectory in group.trajectories} | baseline) > 1


class ResampleBudget:
    """Which groups are left out until the next step is full: at most `sampling.max_resampled` steps' worth of groups.

    It begins anew with every step, and in a resumed run.
    """

    def __init__(self, config: SamplingConfig, groups_per_step: int) -> None:
        self._config = config
        self._most = config.max_resampled * groups_per_step
        self._left_out = 0

    def leaves_out(self, group: TrajectoryGroup) -> bool:
        """True: the group has no signal and is left out. False: it is trained, with `when_exhausted=train` even without a signal.

        Raises RolloutError where the budget is used up and `when_exhausted` is error.
        """
        if not self._config.dynamic or has_signal(group):
            return False
        if self._left_out + 1 <= self._most:
            self._left_out += 1
            return True
        if self._config.when_exhausted == "train":
            return False
        raise RolloutError(
            f"{self._left_out + 1} groups had equal rewards before one step was full, and sampling.max_resampled "
            f"({self._config.max_resampled:g} steps' worth) allows dynamic sampling to leave {self._left_out} out: the task is "
            "too hard or too easy for this model. Change the task, set sampling.when_exhausted=train, or sampling.dynamic=false."
        )

    def step_taken(self) -> None:
        """Says that a step has its groups."""
        self._left_out = 0
