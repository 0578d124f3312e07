"""The end of a run: summary.json for programs, a short panel for the person who waited."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
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
        "nonfinite_skipped": state.num_nonfinite_skipped,
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
    save_summary(run_dir, summary)
    return summary


def save_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Writes run_dir/summary.json, which appears whole."""
    temporary = run_dir / f"{FILE_NAME}.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    temporary.replace(run_dir / FILE_NAME)


def show_summary(config: Config, summary: dict[str, Any]) -> None:
    """The panel a person sees when the run has ended."""
    run_dir, results = Path(config.trainer.run_dir), []
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    if before is not None:
        samples = config.evaluation.samples_per_prompt
        how = "greedy" if config.evaluation.temperature == 0 else f"{samples} sample{'s' if samples > 1 else ''} each"
        shown = f"[bold]{before:.3f} -> {after:.3f}[/] ({summary['eval_prompts']} prompts, {how})"
        results.append(("held-out accuracy", shown))
    show_panel(
        run_dir,
        summary,
        results=results,
        steps=f"{summary['optimizer_steps']} optimizer updates",
        plot=("reward_curve.png", "the curve"),
        next_commands=(
            f"tensorboard --logdir {run_dir}/tensorboard",
            "skyrl-mega train recipe=quickstart env.options.level=mixed trainer.run_dir=runs/mixed",
            "docs/tutorial.md: your own task, model and settings",
        ),
    )


def show_panel(
    run_dir: Path,
    summary: dict[str, Any],
    *,
    results: Sequence[tuple[str, str]],
    steps: str,
    plot: tuple[str, str],
    next_commands: Sequence[str] = (),
) -> None:
    """What every run ends with: `results` (name, text), its steps and times, and what it has left in `run_dir`.

    `steps`: what they were made of; `plot`: its file and what that shows.
    """
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table

    rows = Table.grid(padding=(0, 2))
    for name, text in results:
        rows.add_row(name, text)
    left_out = f", {summary['nonfinite_skipped']} left out as not finite" if summary["nonfinite_skipped"] else ""
    rows.add_row("steps", f"{summary['steps']} ({steps}{left_out})")
    set_up = f"set-up {summary['setup_s']:.0f} s, " if summary.get("setup_s") else ""
    rows.add_row("time", f"{set_up}start-up {summary['startup_s']:.0f} s, training {summary['train_s']:.0f} s")
    rows.add_row("peak memory", f"{summary['peak_rss_bytes'] / 2**30:.1f} GiB")
    rows.add_row("run directory", str(run_dir))
    files = (plot, ("metrics.jsonl", "every number"), ("hf", "the model, for transformers"), ("lora", "the adapter, for PEFT"))
    for name, what in files:
        if (run_dir / name).exists():
            rows.add_row("", f"{name:<18} {what}")
    for number, command in enumerate(next_commands):
        rows.add_row("" if number else "try next", command)
    Console(highlight=False).print(Panel(rows, title="finished", title_align="left", expand=False))
