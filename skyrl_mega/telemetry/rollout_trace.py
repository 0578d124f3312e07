"""The rollout side on a time line: groups, requests on each engine, weight transfers, and what waits in the buffer.

One file with a process per engine, one for the coordinator and one for transfers; things that happen at once lie in lanes below
each other. `skyrl-mega trace RUN` puts it beside the phases of the trainer's ranks.
"""

from __future__ import annotations

import heapq
import time
from pathlib import Path
from typing import Any

from skyrl_mega.telemetry.phases import TraceWriter

FILE_NAME = "trace_rollout.json"

COORDINATOR, TRANSFERS = "coordinator", "transfers"


class Span:
    """Something that lasts, in a lane of its own until it ends."""

    def __init__(self, trace: RolloutTrace, process: str, lane: int) -> None:
        self._trace, self._process, self._lane = trace, process, lane
        self._began = time.perf_counter()

    def end(self, name: str, **args: Any) -> None:
        """Writes the event, and gives the lane back."""
        self._trace.write(self._process, self._lane, name, time.perf_counter() - self._began, args)
        self._trace.free(self._process, self._lane)


class RolloutTrace:
    """Writes to `run_dir/trace_rollout.json`, continuing an earlier part of the run. One thread."""

    def __init__(self, run_dir: str | Path) -> None:
        self._file = TraceWriter(Path(run_dir) / FILE_NAME, process=COORDINATOR)
        self._free: dict[str, list[int]] = {}
        self._lanes: dict[str, int] = {}

    def begin(self, process: str) -> Span:
        """Something of `process` begins."""
        free = self._free.setdefault(process, [])
        if free:
            return Span(self, process, heapq.heappop(free))
        self._lanes[process] = lane = self._lanes.get(process, -1) + 1
        return Span(self, process, lane)

    def free(self, process: str, lane: int) -> None:
        """The lane is empty again; the lowest empty one is used next."""
        heapq.heappush(self._free[process], lane)

    def write(self, process: str, lane: int, name: str, seconds: float, args: dict[str, Any]) -> None:
        """An event that ends now and began `seconds` ago."""
        self._file.complete(name, seconds=seconds, args=args, process=process, lane=lane)

    def count(self, name: str, **values: float) -> None:
        """A curve of the coordinator, at this moment."""
        self._file.counter(name, values)

    def close(self) -> None:
        self._file.close()
