"""What the rollout side does between two steps, in numbers: who waited for whom, and how stale the step's groups are."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from skyrl_mega.types import Metrics, TrajectoryGroup


class FlightStats:
    """Counted from one `take` to the next. One thread."""

    def __init__(self) -> None:
        self._in_flight = 0
        self._since = time.perf_counter()
        self._busy_s = 0.0
        self._began = self._since
        self._counts: Counter[str] = Counter()

    def begin(self) -> None:
        """A group is on its way."""
        if self._in_flight == 0:
            self._since = time.perf_counter()
        self._in_flight += 1

    def end(self) -> None:
        """A group has ended, however it did."""
        self._in_flight -= 1
        if self._in_flight == 0:
            self._busy_s += time.perf_counter() - self._since

    def count(self, name: str, number: int = 1) -> None:
        """Adds to `flight/<name>` of the step."""
        self._counts[name] += number

    def step(self, groups: Sequence[TrajectoryGroup], policy_version: int, *, wait_s: float, ready: int) -> Metrics:
        """The numbers of the step that takes `groups` to train `policy_version`; counting starts anew.

        `flight/wait_s`: how long the trainer waited; `flight/busy_s`: with at least one group in flight, of `flight/interval_s`
        between this `take` and the last; `flight/ready`: finished groups that stay; `flight/in_flight`: begun and not finished.
        `staleness/mean` and `max` are of groups (their oldest token), `staleness/tokens_mean` of tokens, `staleness/share_<n>` a
        histogram of groups; `staleness/mixed_share`: groups that more than one version sampled.
        """
        now = time.perf_counter()
        if self._in_flight:
            self._busy_s += now - self._since
            self._since = now
        staleness = [policy_version - group.min_policy_version for group in groups]
        tokens = [policy_version - v for g in groups for t in g.trajectories for v in t.policy_versions if v >= 0]
        mixed = sum(g.min_policy_version != g.max_policy_version for g in groups)
        metrics = {
            "flight/wait_s": wait_s,
            "flight/busy_s": self._busy_s,
            "flight/interval_s": now - self._began,
            "flight/ready": float(ready),
            "flight/in_flight": float(self._in_flight),
            "staleness/mean": sum(staleness) / len(staleness),
            "staleness/max": float(max(staleness)),
            "staleness/tokens_mean": sum(tokens) / len(tokens),
            "staleness/mixed_share": mixed / len(groups),
            **{f"staleness/share_{n}": count / len(groups) for n, count in sorted(Counter(staleness).items())},
            **{f"flight/{name}": float(count) for name, count in sorted(self._counts.items())},
        }
        self._busy_s, self._began = 0.0, now
        self._counts.clear()
        return metrics


#: Phases in which the trainer works on a step's groups.
TRAINING_PHASES = ("pack", "logprobs", "train")


def overlap_metrics(row: Metrics) -> Metrics:
    """Where a step's time went, from the seconds in its row.

    `overlap/efficiency` is max(generation, training) / step time, 1 where the shorter of the two is hidden wholly. The shares are
    of the step's time: `train_share`, `wait_share` (the trainer waits for groups), `sync_share` (weights are published) and
    `other_share` (evaluation, checkpoints, the rest) add up to 1; `generation_share` runs beside them.
    """
    step_s = row["time/step_s"]
    training_s = sum(row.get(f"time/{phase}_s", 0.0) for phase in TRAINING_PHASES)
    generation_s = step_s * min(1.0, row["flight/busy_s"] / max(row["flight/interval_s"], 1e-9))
    parts = {
        "train": training_s,
        "wait": row.get("time/rollout_s", 0.0),
        "sync": row.get("time/sync_s", 0.0),
    }
    shares = {f"overlap/{name}_share": seconds / step_s for name, seconds in parts.items()}
    return {
        "overlap/efficiency": max(generation_s, training_s) / step_s,
        "overlap/generation_share": generation_s / step_s,
        **shares,
        "overlap/other_share": 1.0 - sum(shares.values()),
    }
