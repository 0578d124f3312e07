"""Draws docs/images/schedules.png: the learning rate of every schedule over a run of 1000 updates."""

from __future__ import annotations

import argparse
from pathlib import Path

from skyrl_mega.config.learning_rate import learning_rate
from skyrl_mega.config.schema import OptimizerConfig

UPDATES, WARMUP = 1000, 50
SCHEDULES = {
    "constant": OptimizerConfig(lr=1.0, warmup_updates=WARMUP),
    "cosine, min_lr_ratio=0.1": OptimizerConfig(lr=1.0, warmup_updates=WARMUP, schedule="cosine", min_lr_ratio=0.1),
    "linear": OptimizerConfig(lr=1.0, warmup_updates=WARMUP, schedule="linear"),
    "wsd, sqrt": OptimizerConfig(lr=1.0, warmup_updates=WARMUP, schedule="wsd", decay_updates=200),
    "wsd, linear": OptimizerConfig(lr=1.0, warmup_updates=WARMUP, schedule="wsd", decay_updates=200, wsd_decay="linear"),
    "wsd, exponential, min_lr_ratio=0.01": OptimizerConfig(
        lr=1.0, warmup_updates=WARMUP, schedule="wsd", decay_updates=200, wsd_decay="exponential", min_lr_ratio=0.01
    ),
}


def main() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/images/schedules.png"), help="default: %(default)s")
    output = parser.parse_args().output
    figure = Figure(figsize=(7.5, 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, config in SCHEDULES.items():
        axis.plot(
            [learning_rate(config, update, planned_updates=UPDATES) for update in range(UPDATES)], label=name, linewidth=1.5
        )
    axis.set_xlabel("optimizer update")
    axis.set_ylabel("learning rate / optimizer.lr")
    axis.set_ylim(0, 1.05)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.06, 0.02))
    figure.savefig(output)


if __name__ == "__main__":
    main()
