"""Draws docs/images/training_modes.png: what each way of training came to, from the metrics of finished runs.

    python scripts/plot_training_modes.py --sft RUN --dpo RUN --rm RUN [--distill RUN] [--output FILE]

A panel per run that is given: the number that the way of training is about, of training steps and of held-out rows (or prompts).
docs/training_modes.md has the commands of the runs.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from skyrl_mega.telemetry.metrics import read_metrics

#: Title, y label, training metric, held-out metric.
PANELS = {
    "sft": ("skyrl-mega sft: two-digit sums", "cross-entropy per token", "loss/total", "eval/loss"),
    "dpo": ("skyrl-mega dpo: right and wrong sums", "right sum preferred", "rewards/accuracies", "eval/accuracy"),
    "rm": ("skyrl-mega rm: right and wrong sums", "right sum scored higher", "rewards/accuracies", "eval/accuracy"),
    "distill": ("skyrl-mega distill: two-digit sums", "right answers", "reward/mean", "eval/accuracy"),
}
BLUE, ORANGE = "#2563a8", "#d1661b"


def series(run: Path, name: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[name]) for row in read_metrics(run) if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw(runs: dict[str, Path], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(runs) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3.3 * rows), layout="constrained", squeeze=False)
    for axis, (mode, run) in itertools.zip_longest(axes.flat, runs.items(), fillvalue=("", None)):
        if run is None:
            axis.set_visible(False)
            continue
        title, label, trained, held_out = PANELS[mode]
        axis.plot(*series(run, trained), color=BLUE, alpha=0.5, linewidth=1.2, label="training batches")
        steps, values = series(run, held_out)
        axis.plot(steps, values, color=ORANGE, marker="o", markersize=5, linewidth=1.5, label="held out")
        for number, align in ((0, "left"), (-1, "right")):
            axis.annotate(
                f"{values[number]:.3f}",
                (steps[number], values[number]),
                xytext=(0, 7),
                textcoords="offset points",
                ha=align,
                color=ORANGE,
                fontsize=9,
                weight="bold",
            )
        axis.set_title(title, fontsize=10, weight="bold")
        axis.set_xlabel("optimizer updates", fontsize=9)
        axis.set_ylabel(label, fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.margins(y=0.15)
        axis.grid(axis="y", color="#dddddd", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    print(f"wrote {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for mode in PANELS:
        parser.add_argument(f"--{mode}", type=Path, metavar="RUN", help=f"directory of a run of `skyrl-mega {mode}`")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "training_modes.png")
    arguments = parser.parse_args()
    runs = {mode: run for mode in PANELS if (run := getattr(arguments, mode)) is not None}
    if not runs:
        parser.error("give at least one run")
    draw(runs, arguments.output)


if __name__ == "__main__":
    main()
