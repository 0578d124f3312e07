"""One time line of a run: the Chrome traces of its processes, each written on its own, as one file for Perfetto.

Every process stamps its events with wall-clock microseconds, so they need no alignment, on one machine at least; between machines
they are as good as the machines' clocks. What has to change is the process numbers: each file counts its own from 0. Here each
process of each file gets a number and a place: trainer ranks first, then the coordinator, the engines, the transfers, the rest.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyrl_mega.errors import DataError

OUTPUT_NAME = "trace_all.json"
#: A word of the process's name and its place from the top; the first that fits counts.
_ORDER = (("rank", 0), ("trainer", 0), ("coordinator", 1), ("buffer", 1), ("engine", 2), ("transfer", 3), ("sync", 3))
_LAST = 4
#: Metadata that names a process, which the merged file writes anew.
_OWN_METADATA = frozenset({"process_name", "process_sort_index"})


@dataclass
class TracedProcess:
    """One process of the time line. Times are Unix microseconds; None without an event that has one."""

    name: str
    file: str
    num_events: int = 0
    first_us: float | None = None
    last_us: float | None = None

    def add(self, event: dict[str, Any]) -> None:
        self.num_events += 1
        start = event.get("ts")
        if isinstance(start, (int, float)):
            end = start + event.get("dur", 0)
            self.first_us = start if self.first_us is None else min(self.first_us, start)
            self.last_us = end if self.last_us is None else max(self.last_us, end)


@dataclass(frozen=True)
class MergedTrace:
    """What was merged, from the top of the time line down. `torn`: lines by file that were no whole event and are left out."""

    path: Path
    processes: list[TracedProcess]
    torn: dict[str, int] = field(default_factory=dict)


def merge_traces(run_dir: str | Path, output: str | Path | None = None) -> MergedTrace:
    """Merges `run_dir/trace*.json` into `output` (run_dir/trace_all.json), replacing it in one go; also beside a run.

    Traces of killed processes may lack their end. Raises DataError where there is no trace, or a file holds anything but one.
    """
    run_dir = Path(run_dir)
    output = Path(output) if output is not None else run_dir / OUTPUT_NAME
    files = sorted(path for path in run_dir.glob("trace*.json") if path.name != OUTPUT_NAME and path != output)
    if not files:
        raise DataError(f"{run_dir} has no trace; run with `telemetry.trace=true`, which writes {run_dir / 'trace.json'}.")
    events, torn = {}, {}
    for path in files:
        events[path], lost = _read(path)
        if lost:
            torn[path.name] = lost
    processes = {
        (path, pid): TracedProcess(_name(path, pid, events[path]), path.name)
        for path in files
        for pid in dict.fromkeys(event.get("pid", 0) for event in events[path])
    }
    keys = sorted(processes, key=lambda key: _place(processes[key].name))
    numbers = {key: number for number, key in enumerate(keys)}
    temporary = output.with_name(output.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        lines = [json.dumps(event) for key in keys for event in _naming(numbers[key], processes[key].name)]
        for path in files:
            for event in events[path]:
                if event.get("ph") == "M" and event.get("name") in _OWN_METADATA:
                    continue
                key = (path, event.get("pid", 0))
                processes[key].add(event)
                lines.append(json.dumps({**event, "pid": numbers[key]}))
        file.write("[\n" + ",\n".join(lines) + "\n]\n")
    os.replace(temporary, output)
    return MergedTrace(output, [processes[key] for key in keys], torn)


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(events, lines left out). A whole file is JSON, an array or an object with `traceEvents`; else each line is an event."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        found = list(_by_line(text))
        events = [event for event in found if event is not None]
        if not events and text.strip(" \n[,"):
            raise DataError(f"{path} must be a Chrome trace, one event a line; it begins with {text[:40]!r}.") from None
        return events, len(found) - len(events)
    content = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(content, list) or not all(isinstance(event, dict) for event in content):
        raise DataError(f"{path} must be a Chrome trace: a JSON array of events, or an object with `traceEvents`.")
    return content, 0


def _by_line(text: str) -> Iterator[dict[str, Any] | None]:
    """Each line's event, None for a line that is none."""
    for line in text.splitlines():
        line = line.strip().rstrip(",")
        if line in ("", "[", "]"):
            continue
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            event = None
        yield event if isinstance(event, dict) else None


def _name(path: Path, pid: Any, events: list[dict[str, Any]]) -> str:
    """What the trace calls its process, else the file's own name: `trace_engine-1.json` is engine-1."""
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name" and event.get("pid", 0) == pid:
            return str(event.get("args", {}).get("name", ""))
    return path.stem.removeprefix("trace").strip("_") or f"rank {pid}"


def _place(name: str) -> tuple[int, list[tuple[int, int | str]]]:
    """Sorts by kind, then by name, in which numbers count as numbers: rank 2 before rank 10."""
    kind = next((place for word, place in _ORDER if word in name.lower()), _LAST)
    return kind, [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


def _naming(number: int, name: str) -> list[dict[str, Any]]:
    common = {"ph": "M", "pid": number, "tid": 0}
    return [
        {**common, "name": "process_name", "args": {"name": name}},
        {**common, "name": "process_sort_index", "args": {"sort_index": number}},
    ]
