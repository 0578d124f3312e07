"""`skyrl-mega trace`: the traces of a run's processes as one time line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TextIO

from skyrl_mega.telemetry.trace_merge import merge_traces


def run_trace(run_dir: Path, *, destination: Path | None = None, output: TextIO | None = None) -> int:
    """Writes the merged trace, prints what it holds, and returns the exit code 0. Raises DataError as `merge_traces`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    merged = merge_traces(run_dir, destination)
    console = Console(file=output or sys.stdout, highlight=False)
    starts = [process.first_us for process in merged.processes if process.first_us is not None]
    begin = min(starts, default=0.0)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("process", "file"):
        table.add_column(name)
    for name in ("events", "from s", "to s"):
        table.add_column(name, justify="right")
    for process in merged.processes:
        times = ["-" if time is None else f"{(time - begin) / 1e6:,.3f}" for time in (process.first_us, process.last_us)]
        table.add_row(Text(process.name), Text(process.file), f"{process.num_events:,}", *times)
    console.print(table)
    for file, count in merged.torn.items():
        console.print(f"{file}: {count} unfinished {'line' if count == 1 else 'lines'} left out", markup=False)
    console.print(f"wrote {merged.path}; open it in ui.perfetto.dev or chrome://tracing", markup=False, soft_wrap=True)
    return 0
