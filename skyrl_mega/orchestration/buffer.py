"""Finished trajectory groups, waiting to be trained: bounded in age, each taken exactly once."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from skyrl_mega.errors import RolloutError
from skyrl_mega.types import TrajectoryGroup


class TrajectoryBuffer:
    """A first-in, first-out buffer that refuses what is too old to train.

    `max_staleness` is the number of weight versions that the oldest token of a group may lag behind the version being
    trained; 0 is synchronous training. Lives on rank 0.
    """

    def __init__(self, max_staleness: int) -> None:
        self.max_staleness = max_staleness
        self._groups: deque[TrajectoryGroup] = deque()

    def __len__(self) -> int:
        return len(self._groups)

    def put(self, groups: Iterable[TrajectoryGroup]) -> None:
        self._groups.extend(groups)

    def take(self, count: int, policy_version: int) -> list[TrajectoryGroup]:
        """The `count` oldest groups. Raises RolloutError if there are fewer, or if one is staler than allowed."""
        if len(self._groups) < count:
            raise RolloutError(f"a step takes {count} groups, but only {len(self._groups)} are finished")
        taken = [self._groups.popleft() for _ in range(count)]
        for group in taken:
            staleness = policy_version - group.min_policy_version
            if not 0 <= staleness <= self.max_staleness:
                raise RolloutError(
                    f"group {group.group_id} was sampled by version {group.min_policy_version}, the policy is at "
                    f"{policy_version}: staleness {staleness} is outside 0..{self.max_staleness} (trainer.max_staleness)"
                )
        return taken
