"""What a person sees while a run goes on: set-up phases, a line per step, and on a terminal a bar with the time left.

Two modes. `bar` draws with rich on a terminal: finished steps scroll by above a bar that stays at the bottom. `lines` prints
plain aligned lines, for pipes, logs and CI. `auto` picks by whether the output is a terminal.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

HEADER_EVERY = 20


@dataclass(frozen=True)
class Column:
    """One number of a step's line: its title, the metrics it may come from (the first that is present), and its format."""

    title: str
    metrics: tuple[str, ...]
    spec: str
    width: int
    unit: str = ""


COLUMNS = (
    Column("reward", ("reward/mean",), ".3f", 6),
    Column("held-out", ("eval/accuracy",), ".3f", 8),
    Column("loss", ("loss/total", "loss/policy"), "+.4f", 8),
    # To the reference model where there is one, else between the engine that sampled and the policy.
    Column("kl", ("policy/kl_ref", "mismatch/kl"), ".1e", 7),
    Column("entropy", ("policy/entropy",), ".3f", 7),
    Column("tokens/s", ("throughput/tokens_per_s", "throughput/train_tokens_per_s"), ",.0f", 8),
    Column("rollout", ("time/rollout_s",), ".1f", 7, "s"),
    Column("train", ("time/train_s",), ".1f", 6, "s"),
)
#: What several ranks make of a batch: tokens that are padding, and how far the mean rank's work is below the busiest one's.
RANK_COLUMNS = (
    Column("padding", ("packing/padding_fraction",), ".1%", 7),
    Column("uneven", ("packing/imbalance",), ".1%", 6),
)
TIME_LEFT = Column("left", (), "", 7)


class StepDisplay:
    """Shows a run of `max_steps` steps; `start_step` are already finished. Only rank 0 shows anything (`enabled`).

    Use as a context manager, or call `close`: until then the terminal's last line belongs to the bar.
    """

    def __init__(
        self,
        max_steps: int,
        mode: Literal["auto", "bar", "lines"] = "auto",
        *,
        start_step: int = 0,
        enabled: bool = True,
        columns: tuple[Column, ...] = COLUMNS,
        file: IO[str] | None = None,
    ):
        stream = file if file is not None else sys.stdout
        bar = mode == "bar" or (mode == "auto" and stream.isatty())
        # In `lines` mode rich must neither wrap nor colour: the lines are for other programs' eyes too.
        self._console = Console(
            file=stream, highlight=False, quiet=not enabled, **({} if bar else {"width": 1000, "color_system": None})
        )
        self._columns, self._max_steps = columns, max_steps
        self._eta = StepRate(start_step, max_steps)
        self._lines = 0
        self._bar = self._make_bar(start_step) if bar and enabled else None
        self._task = self._bar.task_ids[0] if self._bar is not None else None

    def __enter__(self) -> StepDisplay:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextmanager
    def status(self, message: str) -> Iterator[None]:
        """Around a slow phase: says that it is going on, then how long it took.

        With a bar a spinner turns meanwhile (or the bar's text changes, once steps are running); else the message is a line
        of its own at once, so that a log shows what a stuck run is stuck in.
        """
        started = time.monotonic()
        if self._bar is not None and self._bar.live.is_started:
            with self.phase(message):
                yield
            return
        if self._bar is not None:
            with self._console.status(Text(message)):
                yield
            self._console.print(Text.assemble(("✓ ", "green"), message, (f"  {_seconds(time.monotonic() - started)}", "dim")))
        else:
            self._print(f"{message} ...")
            yield
            self._print(f"{message}: {_seconds(time.monotonic() - started)}")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of a step: named beside the bar while it lasts; shows nothing where there is no bar."""
        if self._bar is None:
            yield
            return
        self._bar.start()
        self._bar.update(self._task, phase=name)
        try:
            yield
        finally:
            self._bar.update(self._task, phase="")

    def note(self, message: str) -> None:
        """A line of text above the bar."""
        self._print(message)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A finished step's line, and the bar moved to it. A number that is missing shows as a dash."""
        self._eta.update(step)
        if self._bar is not None:
            self._bar.start()
        if self._lines % HEADER_EVERY == 0:
            self._print(self._header(), style="bold" if self._bar is not None else None)
        self._lines += 1
        self._print(self._row(step, metrics))
        if self._bar is not None:
            self._bar.update(self._task, completed=step, eta=self._eta.remaining_s())

    def close(self) -> None:
        if self._bar is not None and self._bar.live.is_started:
            self._bar.stop()

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(Text(text, style=style or ""), soft_wrap=True)
        self._console.file.flush()

    def _make_bar(self, start_step: int) -> Progress:
        progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TimesColumn(),
            TextColumn("[dim]{task.fields[phase]}"),
            console=self._console,
            refresh_per_second=4,
            expand=True,
        )
        progress.add_task("", total=self._max_steps, completed=start_step, phase="", eta=None)
        return progress

    def _header(self) -> str:
        return self._join(f"{column.title:>{column.width}}" for column in (Column("step", (), "", 4), *self._columns, TIME_LEFT))

    def _row(self, step: int, metrics: Mapping[str, float]) -> str:
        remaining = self._eta.remaining_s()
        left = "-" if remaining is None else _seconds(remaining)
        cells = (_cell(column, metrics) for column in self._columns)
        return self._join([f"{step:>4}", *cells, f"{left:>{TIME_LEFT.width}}"])

    def _join(self, cells: Iterable[str]) -> str:
        """The cells in a row, closer together where the terminal is narrow."""
        columns = list(cells)
        wide = "  ".join(columns)
        return wide if len(wide) <= self._console.width else " ".join(columns)


class StepRate:
    """Seconds a run still needs, from its own steps: the mean over the last few, so that start-up and evaluations fade."""

    def __init__(self, start_step: int, max_steps: int, *, window: int = 20):
        self._max_steps, self._window = max_steps, window
        self._marks = [(start_step, time.monotonic())]

    def update(self, step: int) -> None:
        if step > self._marks[-1][0]:
            self._marks = [*self._marks, (step, time.monotonic())][-self._window - 1 :]
        else:  # an evaluation before the first step: time starts counting afterwards
            self._marks = [(step, time.monotonic())]

    def remaining_s(self) -> float | None:
        """None before the first step has finished."""
        (first_step, first_time), (last_step, last_time) = self._marks[0], self._marks[-1]
        if last_step == first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * (self._max_steps - last_step)


class TimesColumn(ProgressColumn):
    """Time since the first step began, and time left."""

    def render(self, task: Task) -> Text:
        eta = task.fields["eta"]
        left = "" if eta is None else f", {_seconds(eta)} left"
        return Text(f"{_seconds(task.elapsed or 0.0)}{left}", style="cyan")


def _cell(column: Column, metrics: Mapping[str, float]) -> str:
    name = next((name for name in column.metrics if name in metrics), None)
    if name is None:
        return f"{'-':>{column.width}}"
    value = metrics[name]
    text = format(value, column.spec) + column.unit if math.isfinite(value) else str(value)
    return f"{text:>{column.width}}"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
