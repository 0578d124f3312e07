"""The picture of an evaluation: pass@k over k, with its 95% intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from skyrl_mega.telemetry.eval_stats import Estimate

_COLOURS = ("#2563a8", "#d1661b", "#2f8f5b", "#8a4fa8", "#a83232", "#5f6b76")
_INK, _GRID = "#333333", "#dddddd"
PASS_AT = "pass@"


def plot_pass_at_k(curves: Mapping[str, Mapping[str, Estimate]], out_png: Path, *, title: str) -> Path:
    """Writes a PNG of each task's `pass@k` estimates over k, a majority vote as a dashed line; returns its path."""
    # A figure of its own instead of pyplot: leaves the caller's backend and figures alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    all_ks: set[int] = set()
    for number, (task, estimates) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = {int(name.removeprefix(PASS_AT)): value for name, value in estimates.items() if name.startswith(PASS_AT)}
        all_ks |= points.keys()
        axis.plot(list(points), [point.value for point in points.values()], marker="o", color=colour, label=task)
        lows, highs = [p.low for p in points.values()], [p.high for p in points.values()]
        axis.fill_between(list(points), lows, highs, color=colour, alpha=0.15, linewidth=0)
        for name, value in estimates.items():
            if name.startswith("maj@"):
                axis.axhline(value.value, color=colour, linestyle="--", linewidth=1, label=f"{task}, {name}")
    ks = sorted(all_ks)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.set_xlabel("k (samples of a prompt)", color=_INK)
    axis.set_ylabel("pass@k", color=_INK)
    axis.set_ylim(0.0, 1.02)
    axis.set_title(title, fontsize=11, color=_INK)
    axis.grid(axis="y", color=_GRID, linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(out_png)
    return out_png
