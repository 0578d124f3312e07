"""How busy and how fast each engine of a fleet is: what the router chooses by, and what it reports."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

#: An engine whose seconds per token are this many times the median of the others' is a straggler.
STRAGGLER_RATIO = 2.5
#: Finished requests before an engine's pace counts.
MIN_SAMPLES = 8
#: Weight of the newest request in the running mean of seconds per token.
NEWEST_WEIGHT = 0.1


@dataclass
class EngineLoad:
    """Counts of one engine since the fleet's start, over all processes that bore its name."""

    name: str
    in_flight: int = 0
    requests: int = 0
    tokens: int = 0
    failures: int = 0
    aborts: int = 0
    #: Seconds in which at least one request was in flight.
    busy_s: float = 0.0
    #: Running mean of a request's seconds in the engine per token, and how many requests it is of (0 again after a restart).
    s_per_token: float = 0.0
    samples: int = 0
    _busy_since: float = 0.0

    def begin(self, now: float) -> None:
        if self.in_flight == 0:
            self._busy_since = now
        self.in_flight += 1

    def end(self, now: float) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self.busy_s += now - self._busy_since

    def busy_until(self, now: float) -> float:
        """`busy_s`, with the stretch that is not over yet."""
        return self.busy_s + (now - self._busy_since if self.in_flight else 0.0)

    def finished(self, num_tokens: int, seconds: float) -> None:
        self.requests += 1
        self.tokens += num_tokens
        if num_tokens == 0:
            return
        pace = seconds / num_tokens
        self.samples += 1
        weight = max(NEWEST_WEIGHT, 1 / self.samples)
        self.s_per_token += weight * (pace - self.s_per_token)

    def forget_pace(self) -> None:
        """Another process bears the name now."""
        self.s_per_token, self.samples = 0.0, 0


def slowness(load: EngineLoad, fleet: Iterable[EngineLoad]) -> float:
    """How many times slower per token than the median of the other engines a straggler is; 1.0 for the others."""
    others = [other.s_per_token for other in fleet if other is not load and other.samples >= MIN_SAMPLES]
    if load.samples < MIN_SAMPLES or not others:
        return 1.0
    ratio = load.s_per_token / max(statistics.median(others), 1e-9)
    return ratio if ratio > STRAGGLER_RATIO else 1.0
