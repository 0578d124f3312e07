"""`skyrl-mega ledger`: what became of every group of a run, and whether it all adds up."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from skyrl_mega.data.ledger_audit import Audit
from skyrl_mega.data.ledger_file import FILE_NAME, writer_of
from skyrl_mega.data.ledger_reader import LedgerReader
from skyrl_mega.data.ledger_summary import Event, Step, Summary, life, summarize
from skyrl_mega.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from skyrl_mega.types import TrainState


def run_ledger(run_dir: Path, *, group: str | None = None, as_json: bool = False, output: TextIO | None = None) -> int:
    """Prints the ledger of a run, or the life of one `group`; returns the exit code: 1 if the audit finds anything.

    Reads only, also while the run goes on. Raises ConfigError for a directory without a ledger, LedgerError for one that can't be
    read.
    """
    path, output = run_dir / FILE_NAME, output or sys.stdout
    if not path.is_file():
        raise ConfigError(
            f"RUN must be the directory of a run with a ledger; `{run_dir}` has no {FILE_NAME}. Give trainer.run_dir."
        )
    # What stands beside the ledger is read first: the run writes it last, and may be running.
    metrics_steps, checkpoint = _metrics_steps(run_dir), _newest_checkpoint(run_dir)
    with LedgerReader.open_read_only(path) as ledger:
        if group is not None:
            row, events = life(ledger.file, group)
            _print_json({**row, "events": [asdict(event) for event in events]}, output) if as_json else _show_life(
                row, events, output
            )
            return 0
        summary = summarize(ledger.file)
        audit = ledger.audit(metrics_steps=metrics_steps, checkpoint=checkpoint)
    if as_json:
        _print_json({**asdict(summary), "audit": {"passed": audit.passed, **asdict(audit)}}, output)
    else:
        _show(path, summary, audit, output)
    return int(not audit.passed)


def _metrics_steps(run_dir: Path) -> list[int] | None:
    from skyrl_mega.telemetry.metrics import FILE_NAME as METRICS_FILE
    from skyrl_mega.telemetry.metrics import read_metrics

    return [row["step"] for row in read_metrics(run_dir)] if (run_dir / METRICS_FILE).is_file() else None


def _newest_checkpoint(run_dir: Path) -> TrainState | None:
    from skyrl_mega.checkpoint import store

    complete = store.list_checkpoints(run_dir)
    return store.read_state(complete[-1])[0] if complete else None


def _print_json(content: Any, output: TextIO) -> None:
    print(json.dumps(content, indent=1), file=output)


# ---- tables ---------------------------------------------------------------------------------------------------------------


def _show(path: Path, summary: Summary, audit: Audit, output: TextIO) -> None:
    from rich.console import Console

    console = Console(file=output, highlight=False)
    counts = summary.counts
    writer = writer_of(path)
    state = f"written by process {writer['pid']} on {writer['host']}" if writer else "no process writes it"
    console.print(f"{path}: {state}; opened {summary.sessions} times", style="dim", soft_wrap=True)
    fates = [
        ("issued", counts.issued, "all groups drawn from the prompt source"),
        ("in flight", counts.in_flight, "being sampled, or to be begun again"),
        ("finished", counts.finished, "trajectories wait for a step"),
        ("taken", counts.taken, "in the batch of a step that is not finished"),
        ("trained", counts.trained, f"steps up to {summary.last_trained_step}; {summary.steps_repeated} of them repeated"),
        ("replayed", counts.replayed, "times that a later step trained one of them again"),
        ("dropped", counts.dropped, "; ".join(f"{reason}: {n:,}" for reason, n in counts.dropped_by_reason.items())),
        ("early stops", counts.early_stops, "begun again each time"),
    ]
    _table(console, ("groups", ">", ""), [(name, f"{count:,}", note) for name, count, note in fates])
    _show_staleness(console, summary)
    _table(
        console,
        ("length by fate", ">groups", ">mean response", ">longest", ">discarded tokens"),
        [
            (
                fate,
                f"{lengths.groups:,}",
                "-" if lengths.mean_response is None else f"{lengths.mean_response:,.1f}",
                "-" if lengths.longest_response is None else f"{lengths.longest_response:,}",
                f"{lengths.discarded_tokens:,}",
            )
            for fate, lengths in summary.lengths.items()
            if lengths.groups
        ],
    )
    _table(
        console,
        (">step", "state", ">groups", ">version", ">staleness", ">tokens", ">attempts", "trained at"),
        [
            (
                *(str(step.step), step.state, _groups(step), str(step.policy_version), f"{step.mean_staleness:.2f}"),
                *(f"{step.response_tokens:,}", str(step.attempts), _clock(step.trained_at)),
            )
            for step in summary.steps
        ],
    )
    _table(
        console,
        (">weight version", ">step", ">tensors", ">MiB", "checksum", "published at", ""),
        [
            (
                *(str(v.version), str(v.step), str(v.num_tensors), f"{v.size_bytes / 2**20:,.1f}", v.checksum[:16], _clock(v.at)),
                "rolled back" if v.rolled_back else "",
            )
            for v in summary.versions
        ],
    )
    _show_verdict(console, audit)


def _show_staleness(console: Console, summary: Summary) -> None:
    most = max(summary.staleness.values(), default=0)
    bars = [
        (str(staleness), f"{groups:,}", "█" * max(1, round(40 * groups / most)))
        for staleness, groups in sorted(summary.staleness.items())
    ]
    _table(console, (">staleness", ">trained", f"at most {summary.max_staleness} (trainer.max_staleness)"), bars)


def _show_verdict(console: Console, audit: Audit) -> None:
    if audit.passed:
        console.print(f"audit: all {len(audit.checks)} checks hold", style="bold green")
        return
    wrong = list(dict.fromkeys(finding.check for finding in audit.findings))
    console.print(f"audit: {len(wrong)} of {len(audit.checks)} checks do not hold", style="bold red")
    for check in wrong:
        console.print(f"{check}:", markup=False, soft_wrap=True)
        for finding in audit.findings:
            if finding.check == check:
                console.print(f"  {finding.problem}", markup=False, soft_wrap=True)


def _show_life(row: dict[str, Any], events: Sequence[Event], output: TextIO) -> None:
    from rich.console import Console

    console = Console(file=output, highlight=False)
    facts = [(name, "-" if value is None else str(value)) for name, value in row.items() if not name.endswith("_at")]
    _table(console, ("group", ""), facts)
    lines = [(_clock(event.at), event.kind, "-" if event.step is None else str(event.step), event.note) for event in events]
    _table(console, ("at", "event", ">step", ""), lines)


def _table(console: Console, columns: Iterable[str], rows: Sequence[Sequence[str]]) -> None:
    """A table under a line's space, nothing where there are no rows; `>` marks a column of numbers."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    console.print()


def _groups(step: Step) -> str:
    return f"{step.groups} + {step.replayed}" if step.replayed else str(step.groups)


def _clock(at: float | None) -> str:
    return "-" if at is None else time.strftime("%m-%d %H:%M:%S", time.localtime(at))
