"""How many prompt groups may be begun, and which a step must take, so that none is too stale when it is trained.

The trainer's next step trains version t; the engines serve version v (t, or t - 1 while a step is being trained). A group that
is begun now has no token older than v, so it may be trained by the steps that train versions t .. v + k, where k is
`max_staleness`: v + k - t + 1 steps, of B groups each. Its *deadline* is v + k.

Two rules keep every group within the bound, whatever the lengths of its responses:

- A group is begun only while fewer than (v + k - t + 1) B are outstanding (begun, and not yet trained or dropped).
- A step takes groups of the earliest deadlines, and waits until so many of them have finished that the rest can make it: for each
  d, at most (d - t) B groups with a deadline of d or before may remain after the step that trains t.

Nothing finished is thrown away for its age. k = 0 is synchronous: B groups before a step, none while it is trained. With k > 0
groups are begun no earlier than engines have room for them: waiting in a queue would only age them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Admission:
    """The rules above. `oversampling` adds a share of a step's groups; the slowest are ended early when a step is full."""

    groups_per_step: int
    max_staleness: int
    max_steps: int
    oversampling: float = 0.0

    def deadline(self, policy_version: int) -> int:
        """The last version whose training may use a group that is begun while `policy_version` is served."""
        return policy_version + self.max_staleness

    @property
    def extra(self) -> int:
        """Groups that oversampling begins in vain."""
        return math.ceil(self.oversampling * self.groups_per_step)

    def room(self, policy_version: int, next_version: int, outstanding: int) -> int:
        """How many groups may be begun now, at least 0. `next_version`: what the next step trains, which is its number - 1."""
        steps = min(self.deadline(policy_version), self.max_steps - 1) - next_version + 1
        if steps <= 0:
            return 0
        return max(0, steps * self.groups_per_step + self.extra - outstanding)

    def leaves_enough_time(self, version: int, taken: Sequence[int], outstanding: Sequence[int]) -> bool:
        """Whether a step that trains `version` may take groups with the deadlines `taken`, out of all that are `outstanding`."""
        taken, outstanding = sorted(taken), sorted(outstanding)
        for deadline in sorted(set(outstanding)):
            remaining = bisect_right(outstanding, deadline) - bisect_right(taken, deadline)
            if remaining > max(0, deadline - version) * self.groups_per_step + self.extra:
                return False
        return True
