"""The picture of a run: training reward per step and held-out accuracy, from `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from skyrl_mega.errors import DataError
from skyrl_mega.telemetry.metrics import read_metrics

REWARD, ACCURACY = "reward/mean", "eval/accuracy"
_BLUE, _ORANGE, _INK, _GRID = "#2563a8", "#d1661b", "#333333", "#dddddd"


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
    if title is None:
        title = (metrics_path if metrics_path.is_dir() else metrics_path.resolve().parent).name

    # A figure of its own instead of pyplot: leaves the caller's backend and figures alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [draw for series, draw in ((rewards, _draw_rewards), (accuracies, _draw_accuracies)) if series]
    figure = Figure(figsize=(7.5, 2.7 * len(panels) + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold", color=_INK)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, draw in zip(axes, panels, strict=True):
        draw(axis, rewards if draw is _draw_rewards else accuracies)
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
