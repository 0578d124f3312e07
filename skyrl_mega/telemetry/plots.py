"""The picture of a run, from `metrics.jsonl`: reward and held-out accuracy, or training curves and held-out ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from skyrl_mega.errors import DataError
from skyrl_mega.telemetry.metrics import read_metrics

REWARD, ACCURACY = "reward/mean", "eval/accuracy"
_BLUE, _ORANGE, _INK, _GRID = "#2563a8", "#d1661b", "#333333", "#dddddd"


@dataclass(frozen=True)
class Curve:
    """A panel: a metric of training steps and one of held-out rows (either may be empty), under a label."""

    label: str
    trained: str = ""
    held_out: str = ""


def plot_rewards(metrics_path: str | Path, out_png: str | Path, *, title: str | None = None) -> Path:
    """Writes a PNG of reward per step (raw and smoothed) over held-out accuracy points; returns its path.

    `metrics_path` is a metrics.jsonl or the run directory that holds it; the title is the run directory's name unless given.
    The accuracy panel is left out of a run that was never evaluated. Raises DataError when there is nothing to draw.
    """
    metrics_path, out_png = Path(metrics_path), Path(out_png)
    rows = read_metrics(metrics_path)
    rewards, accuracies = _series(rows, REWARD), _series(rows, ACCURACY)
    if not rewards and not accuracies:
        raise DataError(f"{metrics_path} must hold {REWARD} or {ACCURACY} to be plotted; it has {len(rows)} steps with neither.")
    panels = [
        (_draw_rewards, rewards),
        (_draw_accuracies, accuracies),
    ]
    return _draw_panels(metrics_path, out_png, [(draw, series) for draw, series in panels if series], title=title)


def plot_curves(metrics_path: str | Path, out_png: str | Path, *, curves: Sequence[Curve], title: str | None = None) -> Path:
    """Writes a PNG with one panel per curve that the metrics hold; returns its path. Raises DataError where they hold none."""
    rows = read_metrics(metrics_path)
    panels = []
    for curve in curves:
        trained, held_out = (_series(rows, name) if name else [] for name in (curve.trained, curve.held_out))
        if trained or held_out:
            panels.append((functools.partial(_draw_curve, curve=curve, held_out=held_out), trained))
    if not panels:
        raise DataError(
            f"{metrics_path} must hold {', '.join(curve.trained or curve.held_out for curve in curves)}; it has none."
        )
    return _draw_panels(Path(metrics_path), Path(out_png), panels, title=title)


def _draw_panels(metrics_path: Path, out_png: Path, panels: Sequence[tuple[Callable, list]], *, title: str | None) -> Path:
    """One panel under the other, each drawn by a function of its axis and its points."""
    if title is None:
        title = (metrics_path if metrics_path.is_dir() else metrics_path.resolve().parent).name

    # A figure of its own instead of pyplot: leaves the caller's backend and figures alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 2.7 * len(panels) + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=_INK)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (draw, points) in zip(axes, panels, strict=True):
        draw(axis, points)
        axis.grid(axis="y", color=_GRID, linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=_INK, labelsize=9)
    axes[-1].set_xlabel("training step", fontsize=10, color=_INK)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out_png)
    return out_png


def smooth(values: Sequence[float], width: float | None = None) -> list[float]:
    """Each value averaged with its neighbours on both sides, by a Gaussian of `width` steps (None: a 25th of the run).

    Two-sided, so that the curve does not lag behind the points; near the ends the weights of what is there are renormalised.
    """
    width = max(1.0, len(values) / 25) if width is None else width
    reach = math.ceil(3 * width)
    kernel = {offset: math.exp(-0.5 * (offset / width) ** 2) for offset in range(-reach, reach + 1)}
    smoothed = []
    for i in range(len(values)):
        near = [(w, values[i + offset]) for offset, w in kernel.items() if 0 <= i + offset < len(values)]
        smoothed.append(sum(w * v for w, v in near) / sum(w for w, _ in near))
    return smoothed


def _series(rows: Sequence[dict], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _draw_rewards(axis, points: list[tuple[int, float]]) -> None:
    steps, values = zip(*points, strict=True)
    axis.plot(steps, values, color=_BLUE, alpha=0.3, linewidth=1.0, marker="o", markersize=2.5, label="each step")
    axis.plot(steps, smooth(values), color=_BLUE, linewidth=2.2, label="smoothed")
    axis.set_ylabel("mean reward", fontsize=10, color=_INK)
    axis.legend(loc="best", fontsize=8, frameon=False)


def _draw_curve(axis, points: list[tuple[int, float]], *, curve: Curve, held_out: list[tuple[int, float]]) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, color=_BLUE, alpha=0.3, linewidth=1.0)
        axis.plot(steps, smooth(values), color=_BLUE, linewidth=2.0, label="training, smoothed")
    if held_out:
        steps, values = zip(*held_out, strict=True)
        axis.plot(steps, values, color=_ORANGE, linewidth=1.4, marker="o", markersize=5, label="held-out rows")
        for number, align in ((0, "left"), (-1, "right")):
            axis.annotate(
                f"{values[number]:.3f}",
                (steps[number], values[number]),
                xytext=(0, 8),
                textcoords="offset points",
                ha=align,
                fontsize=9,
                color=_ORANGE,
                weight="bold",
            )
    axis.set_ylabel(curve.label, fontsize=10, color=_INK)
    axis.margins(y=0.2)
    axis.legend(loc="best", fontsize=8, frameon=False)


def _draw_accuracies(axis, points: list[tuple[int, float]]) -> None:
    steps, values = zip(*points, strict=True)
    axis.plot(steps, values, color=_ORANGE, linewidth=1.4, marker="o", markersize=6)
    axis.set_ylabel("held-out accuracy", fontsize=10, color=_INK)
    axis.set_ylim(0.0, 1.06)
    # The first and the last value are what a reader looks for: labelled on the side of the point where the line is not.
    _label(axis, steps[0], values[0], "left", below=len(values) > 1 and values[1] > values[0])
    if len(values) > 1:
        _label(axis, steps[-1], values[-1], "right", below=values[-2] > values[-1])


def _label(axis, step: int, value: float, align: str, *, below: bool) -> None:
    offset = -16 if below and value > 0.12 else 8
    axis.annotate(
        f"{value:.3f}",
        (step, value),
        xytext=(0, offset),
        textcoords="offset points",
        ha=align,
        fontsize=9,
        color=_ORANGE,
        weight="bold",
    )
