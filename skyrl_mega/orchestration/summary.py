"""The end of a run: summary.json for programs, a short panel for the person who waited."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from skyrl_mega.config.schema import Config
from skyrl_mega.telemetry.metrics import read_metrics
from skyrl_mega.telemetry.resources import load_average, peak_rss_bytes, peak_rss_children_bytes
from skyrl_mega.telemetry.versions import collect_versions, git_commit, hardware
from skyrl_mega.types import TrainState

FILE_NAME = "summary.json"

#: Seconds that scripts/quickstart.sh spent on installing and on preparing the model, handed over by it.
SETUP_SECONDS = "SKYRL_MEGA_SETUP_S"


def write_summary(config: Config, state: TrainState, *, startup_s: float, implementation: dict[str, str]) -> dict[str, Any]:
    """Writes run_dir/summary.json and returns its content. Rank 0 only.

    `setup_s`: installing and preparing the model (0 unless a script handed it over); `startup_s`: models and engine;
    `train_s`: the steps, over all resumed parts of the run; `peak_rss_bytes`: this process at its largest.
    """
    run_dir = Path(config.trainer.run_dir)
    accuracies = [row["eval/accuracy"] for row in read_metrics(run_dir) if row.get("eval/accuracy") is not None]
    summary = {
        "accuracy_before": accuracies[0] if accuracies else None,
        "accuracy_after": accuracies[-1] if accuracies else None,
        "eval_prompts": config.evaluation.num_prompts,
        "steps": state.step,
        "optimizer_steps": state.num_optimizer_steps,
        "trained_groups": state.num_trained_groups,
        "setup_s": float(os.environ.get(SETUP_SECONDS, 0)),
        "startup_s": round(startup_s, 1),
        "train_s": round(state.elapsed_train_s, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_rss_children_bytes": peak_rss_children_bytes(),
        "threads": config.trainer.threads,
        "load_average": load_average(),
        "implementation": implementation,
        "hardware": hardware(),
        "versions": collect_versions(),
        "commit": git_commit(),
    }
    temporary = run_dir / f"{FILE_NAME}.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    temporary.replace(run_dir / FILE_NAME)
    return summary


def show_summary(config: Config, summary: dict[str, Any]) -> None:
    """The panel a person sees when the run has ended."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    run_dir = Path(config.trainer.run_dir)
    rows = Table.grid(padding=(0, 2))
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    if before is not None:
        rows.add_row("held-out accuracy", f"[bold]{before:.3f} -> {after:.3f}[/] ({summary['eval_prompts']} prompts, greedy)")
    times = f"set-up {summary['setup_s']:.0f} s, start-up {summary['startup_s']:.0f} s, training {summary['train_s']:.0f} s"
    rows.add_row("steps", f"{summary['steps']} ({summary['optimizer_steps']} optimizer updates)")
    rows.add_row("time", times)
    rows.add_row("peak memory", f"{summary['peak_rss_bytes'] / 2**30:.1f} GiB")
    rows.add_row("run directory", str(run_dir))
    for name, what in (
        ("reward_curve.png", "the curve"),
        ("metrics.jsonl", "every number"),
        ("hf", "the model, for transformers"),
    ):
        if (run_dir / name).exists():
            rows.add_row("", f"{name:<18} {what}")
    rows.add_row("try next", f"tensorboard --logdir {run_dir}/tensorboard")
    rows.add_row("", "skyrl-mega train recipe=quickstart env.options.level=mixed trainer.run_dir=runs/mixed")
    rows.add_row("", "docs/tutorial.md: your own task, model and settings")
    Console(highlight=False).print(Panel(rows, title="finished", title_align="left", expand=False))
