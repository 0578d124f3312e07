"""Two or more ways to do the same, measured by turns: A, B, A, B ..., each in a process of its own that lives throughout.

A machine's speed drifts over minutes (clock, other people's memory traffic), and a ratio of numbers taken minutes apart drifts
with it. Here the processes stay alive and take turns: while one repeats, the others wait on a pipe and use no CPU. What is
compared is the median over rounds of the ratio within one round. Memory has a process per side too, so that each high-water
mark is that of one side.

A side's set-up function returns a function without arguments; one call is one repetition and may return numbers (a loss, a
norm), which are kept: two sides that claim to do the same must agree on them.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from skyrl_mega.telemetry.bench import load_set_up
from skyrl_mega.telemetry.resources import peak_rss_bytes, reset_peak_rss, rss_bytes


@dataclass(frozen=True)
class Side:
    """One of the ways. `fn_path` names its set-up function as in `bench.Variant`; `params` are its keyword arguments."""

    name: str
    fn_path: str
    params: Mapping[str, Any]


@dataclass(frozen=True)
class SideResult:
    """What one side took: CPU and wall seconds of each timed round, and bytes of resident memory.

    `peak_bytes` is the high-water mark of the timed rounds; `imported_bytes` what was resident before the set-up function ran,
    torch included. `first` and `last` are the numbers that the first repetition (a warm-up) and the last one returned.
    """

    cpu_s: tuple[float, ...]
    wall_s: tuple[float, ...]
    peak_bytes: int
    imported_bytes: int
    first: Mapping[str, float]
    last: Mapping[str, float]

    @property
    def median_cpu_s(self) -> float:
        return statistics.median(self.cpu_s)


def median_ratio(numerator: SideResult, denominator: SideResult) -> float:
    """The median over rounds of numerator's CPU seconds over denominator's."""
    return statistics.median(a / b for a, b in zip(numerator.cpu_s, denominator.cpu_s, strict=True))


def run_alternating(sides: Sequence[Side], *, rounds: int, warmup: int = 1, timeout_s: float = 900.0) -> dict[str, SideResult]:
    """Measures the sides by turns, `warmup` untimed rounds and `rounds` timed ones; by name.

    Every process has one thread unless OMP_NUM_THREADS says otherwise. `timeout_s` is the deadline of one set-up or one
    repetition. Raises RuntimeError with a process's last words if it fails, TimeoutError past the deadline.
    """
    processes = {side.name: _Process(side, timeout_s) for side in sides}
    try:
        imported = {name: process.answer()["imported_bytes"] for name, process in processes.items()}
        first: dict[str, Mapping[str, float]] = {}
        turns: dict[str, list[Mapping[str, Any]]] = {name: [] for name in processes}
        for number in range(warmup + rounds):
            # Every other round goes backwards, so that no side always follows the same one.
            order = list(processes) if number % 2 == 0 else list(reversed(processes))
            for name in order:
                turn = processes[name].ask("restart_peak" if number == warmup else "repeat")
                first.setdefault(name, turn["numbers"])
                if number >= warmup:
                    turns[name].append(turn)
        return {
            name: SideResult(
                cpu_s=tuple(turn["cpu_s"] for turn in turns[name]),
                wall_s=tuple(turn["wall_s"] for turn in turns[name]),
                peak_bytes=max(turn["peak_bytes"] for turn in turns[name]),
                imported_bytes=imported[name],
                first=first[name],
                last=turns[name][-1]["numbers"],
            )
            for name in processes
        }
    finally:
        for process in processes.values():
            process.end()


class _Process:
    """One side's process, asked over its standard input and answering, one JSON object a line, on its standard output."""

    def __init__(self, side: Side, timeout_s: float) -> None:
        self._side = side
        self._timeout_s = timeout_s
        job = json.dumps({"fn_path": side.fn_path, "params": dict(side.params)})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "skyrl_mega.telemetry.bench_alternate", job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )

    def ask(self, request: str) -> dict[str, Any]:
        _pipe(self._process.stdin).write(request + "\n")
        _pipe(self._process.stdin).flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        out = _pipe(self._process.stdout)
        if not select.select([out], [], [], self._timeout_s)[0]:
            raise TimeoutError(f"bench side {self._side.name!r} gave no answer within {self._timeout_s:.0f} s.")
        line = out.readline()
        if not line:
            code = self._process.wait()
            raise RuntimeError(f"bench side {self._side.name!r} {dict(self._side.params)} ended with {code}; its error is above.")
        return json.loads(line)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            _pipe(pipe).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # Popen was told to make it
    return pipe


def _serve(job: Mapping[str, Any]) -> None:
    """The process of one side: says what it holds, then repeats whenever it is asked to."""
    # What a library prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    set_up = load_set_up(job["fn_path"])
    import torch  # noqa: F401  (every side has it: not part of what a side adds)

    imported = rss_bytes()
    repetition = set_up(**job["params"])
    say(imported_bytes=imported)
    for request in sys.stdin:
        if request.strip() == "restart_peak":
            reset_peak_rss()
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        numbers = repetition()
        cpu, wall = time.process_time() - cpu_start, time.perf_counter() - wall_start
        say(cpu_s=cpu, wall_s=wall, peak_bytes=peak_rss_bytes(), numbers=dict(numbers or {}))


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
