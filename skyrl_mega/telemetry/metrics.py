"""`metrics.jsonl`: one line of numbers per step, always written, readable after any crash."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skyrl_mega.errors import DataError

FILE_NAME = "metrics.jsonl"
_RESERVED = ("step", "time", "nonfinite")


class MetricsLog:
    """Appends a JSON object per step to `run_dir/metrics.jsonl`: step, time (Unix seconds), and every number by name.

    NaN and infinities are written as null and their names listed under `nonfinite`, so that every line is standard JSON.
    A line reaches the kernel in one write: killing the process can tear the last line at worst, and opening the log again
    drops a torn one. Rank 0 only. It is a `protocols.Tracker`, except that a full disk does raise here.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / FILE_NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Appends one line. Raises ValueError for the names step, time and nonfinite, TypeError for what is not a number."""
        self._file.write(_to_line(metrics, step))

    def rewind(self, step: int) -> None:
        """Drops the lines of later steps, so that a run resumed after `step` writes each step once. Atomic."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        self._file.close()
        replacement = self.path.with_suffix(".jsonl.tmp")
        with replacement.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        replacement.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file (or of the run directory that holds it), oldest first; a torn last line is left out.

    Non-finite numbers come back as None. Raises DataError naming the line for anything else that is not a JSON object.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    # Whatever follows the last newline is empty, or was torn by a kill.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number} must be a JSON object; {error}. Delete the line to read the rest.") from error
        if not isinstance(row, dict) or "step" not in row:
            raise DataError(f"{path}:{number} must be a JSON object with a step; got {line[:80]!r}.")
        rows.append(row)
    return rows


def _to_line(metrics: Mapping[str, float], step: int) -> str:
    row: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
    nonfinite = []
    for name, value in metrics.items():
        if name in _RESERVED:
            raise ValueError(f"metric names must differ from {', '.join(_RESERVED)}; got {name!r}: prefix it (env/{name}).")
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"metric {name!r} must be a number; got {value!r}.") from error
        row[name] = int(number) if isinstance(value, int) else number
        if not math.isfinite(number):
            row[name] = None
            nonfinite.append(name)
    if nonfinite:
        row["nonfinite"] = nonfinite
    return json.dumps(row) + "\n"


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("rb+") as file:
            file.truncate(whole)
