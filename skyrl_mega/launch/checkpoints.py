"""`skyrl-mega checkpoints`: what a run has kept, whether it is whole, and why it is kept."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from skyrl_mega.checkpoint import manifest, store
from skyrl_mega.config.schema import CheckpointConfig
from skyrl_mega.errors import ConfigError


@dataclass(frozen=True)
class Listed:
    """One line of the table. `state`: complete, damaged, or being written; `problems` says what is damaged."""

    name: str
    step: int
    size_bytes: int
    saved_at: float
    metric: float | None
    state: str
    kept: str
    problems: list[str]


def run_checkpoints(
    run_dir: Path, *, verify: manifest.Verification = "sizes", as_json: bool = False, output: TextIO | None = None
) -> int:
    """Prints the table and returns the exit code: 1 if a checkpoint is damaged. Reads only; changes nothing."""
    settings = _settings(run_dir)
    listed = list_all(run_dir, settings, verify=verify)
    output = output or sys.stdout
    if as_json:
        print(json.dumps([asdict(one) for one in listed], indent=1), file=output)
    else:
        _show(run_dir, settings, listed, verify, output)
    return int(any(one.state == "damaged" for one in listed))


def list_all(run_dir: Path, settings: CheckpointConfig, *, verify: manifest.Verification) -> list[Listed]:
    """Everything in the run's directory of checkpoints, by step."""
    complete = store.list_checkpoints(run_dir)
    retention = store.Retention(settings.keep_last, settings.keep_best, settings.best_metric, settings.best_is)
    kept = retention.kept(complete)
    listed = []
    for path in complete:
        problems = store.damage(path, verify)
        listed.append(_one(path, settings, "damaged" if problems else "complete", kept.get(path, ""), problems))
    for suffix, state, why in ((store.DAMAGED, "damaged", "set aside"), (store.TEMPORARY, "being written, or left over", "")):
        listed += [_one(path, settings, state, why, []) for path in store.checkpoints_dir(run_dir).glob(f"step_*{suffix}")]
    return sorted(listed, key=lambda one: (one.step, one.name))


def _one(path: Path, settings: CheckpointConfig, state: str, kept: str, problems: list[str]) -> Listed:
    metric = store.read_metrics(path).get(settings.best_metric)
    step = store.step_of(Path(path.name.partition(".")[0]))
    return Listed(path.name, step, store.size_bytes(path), path.stat().st_mtime, metric, state, kept, problems)


def _settings(run_dir: Path) -> CheckpointConfig:
    """How the run keeps its checkpoints; the defaults where it left no config.yaml."""
    from skyrl_mega.config.load import load_saved

    saved = run_dir / "config.yaml"
    if not saved.is_file() and not store.checkpoints_dir(run_dir).is_dir():
        raise ConfigError(f"RUN must be the directory of a run; `{run_dir}` has neither config.yaml nor checkpoints.")
    return load_saved(saved).checkpoint if saved.is_file() else CheckpointConfig()


def _show(run_dir: Path, settings: CheckpointConfig, listed: list[Listed], verify: manifest.Verification, output: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=output, highlight=False)
    if not listed:
        console.print(f"{run_dir} has no checkpoint yet.")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "size", "age", settings.best_metric):
        table.add_column(name, justify="right")
    table.add_column("state")
    table.add_column("kept as")
    now = time.time()
    for one in listed:
        has_metric = one.metric is not None and math.isfinite(one.metric)
        table.add_row(
            str(one.step),
            f"{one.size_bytes / 2**20:,.1f} MiB",
            _age(now - one.saved_at),
            f"{one.metric:.4g}" if has_metric else "-",
            one.state if one.state == "complete" else f"[bold red]{one.state}[/]",
            one.kept or "-",
        )
    console.print(table)
    for one in listed:
        for problem in one.problems:
            console.print(f"{one.name}: {problem}")
    depth = "sizes and checksums" if verify == "checksums" else "sizes (checksums: --verify checksums)"
    console.print(f"checked: {depth}; total {sum(one.size_bytes for one in listed) / 2**20:,.1f} MiB", style="dim")


def _age(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"
