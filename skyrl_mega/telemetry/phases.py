"""Where a step's time goes: wall and CPU seconds per phase, and a trace to look at in chrome://tracing or Perfetto."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skyrl_mega.types import Metrics


class PhaseTimer:
    """`with timer.phase("rollout"): ...` adds that block's seconds to the step in progress; any rank, one thread.

    Phases may nest (the outer one includes the inner) and repeat (their seconds add up). CPU seconds are those of all
    threads of this process. With a `trace_path` every phase is also an event of a Chrome trace.
    """

    def __init__(self, trace_path: str | Path | None = None, *, rank: int = 0):
        self._wall: dict[str, float] = {}
        self._cpu: dict[str, float] = {}
        self._trace = TraceWriter(trace_path, rank=rank) if trace_path is not None else None
        self.step = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start_wall, start_cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - start_wall, time.process_time() - start_cpu
            self._wall[name] = self._wall.get(name, 0.0) + wall
            self._cpu[name] = self._cpu.get(name, 0.0) + cpu
            if self._trace is not None:
                self._trace.complete(name, seconds=wall, args={"step": self.step, "cpu_s": round(cpu, 6)})

    def start_step(self, step: int) -> None:
        """Forgets the seconds so far and stamps following trace events with `step`."""
        self.step = step
        self._wall.clear()
        self._cpu.clear()

    def metrics(self) -> Metrics:
        """`time/<phase>_s` and `cpu_time/<phase>_s` of the step in progress, in the order in which the phases first ended."""
        wall = {f"time/{name}_s": seconds for name, seconds in self._wall.items()}
        return wall | {f"cpu_time/{name}_s": seconds for name, seconds in self._cpu.items()}

    def close(self) -> None:
        if self._trace is not None:
            self._trace.close()


class TraceWriter:
    """Chrome trace events, one per line, flushed as they come. An existing trace is continued.

    The file is the format's JSON array form, whose closing bracket is optional: a trace of a killed process opens in
    chrome://tracing and Perfetto as it is, and `close` makes it standard JSON.
    """

    def __init__(self, path: str | Path, *, rank: int = 0, process: str = ""):
        """`process`: the writer's name where it is no trainer rank; it may write events of other processes too."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _whole_events(path)
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[\n" + ",\n".join(kept))
        self._separator = ",\n" if kept else ""
        # Wall-clock microseconds, so that the runs before and after a resume follow each other.
        self._epoch_us = time.time() * 1e6 - time.perf_counter() * 1e6
        introduced = [json.loads(event) for event in kept if '"process_name"' in event]
        self._processes: dict[str, int] = {event["args"]["name"]: event["pid"] for event in introduced}
        self._own = process or f"rank {rank}"
        self._pid(self._own, rank)
        self._file.flush()

    def _pid(self, process: str, pid: int | None = None) -> int:
        """The number of a process; a new one is introduced to the reader."""
        if process not in self._processes:
            self._processes[process] = len(self._processes) if pid is None else pid
            metadata = {"ph": "M", "pid": self._processes[process], "tid": 0, "args": {"name": process}}
            self._write({"name": "process_name", **metadata})
        return self._processes[process]

    def counter(self, name: str, values: dict[str, float]) -> None:
        """A point of a curve, now."""
        now_us = self._epoch_us + time.perf_counter() * 1e6
        self._write({"name": name, "ph": "C", "ts": round(now_us, 1), "pid": self._pid(self._own), "args": values})

    def complete(
        self,
        name: str,
        *,
        seconds: float,
        args: dict[str, Any] | None = None,
        process: str = "",
        lane: int | None = None,
    ) -> None:
        """An event that ends now and began `seconds` ago, of the writer or of `process`, in the thread's lane or in `lane`."""
        duration_us = seconds * 1e6
        start_us = self._epoch_us + time.perf_counter() * 1e6 - duration_us
        self._write(
            {
                "name": name,
                "cat": "phase",
                "ph": "X",
                "ts": round(start_us, 1),
                "dur": round(duration_us, 1),
                "pid": self._pid(process or self._own),
                "tid": threading.get_native_id() % 2**31 if lane is None else lane,
                "args": args or {},
            }
        )

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(self._separator + json.dumps(event))
        self._file.flush()
        self._separator = ",\n"

    def close(self) -> None:
        if not self._file.closed:
            self._file.write("\n]\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _whole_events(path: Path) -> list[str]:
    """The events of an existing trace as JSON texts; a torn last one is left out."""
    if not path.exists():
        return []
    lines = [line.strip().rstrip(",") for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.startswith("{") and line.endswith("}") and _is_json(line)]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True
