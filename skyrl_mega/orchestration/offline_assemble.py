"""The composition root of training on fixed data, as `assemble.py` is that of reinforcement learning."""

from __future__ import annotations

import functools
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_mega.checkpoint import store
from skyrl_mega.checkpoint.resume import checkpoint_to_resume
from skyrl_mega.config.load import save_resolved
from skyrl_mega.config.offline import require_updates, training_config
from skyrl_mega.config.offline_schema import OfflineConfig, RMConfig
from skyrl_mega.config.schema import Config, as_dict
from skyrl_mega.orchestration.assemble import changed_settings, join_ranks, make_checkpointer
from skyrl_mega.orchestration.recorder import Recorder
from skyrl_mega.orchestration.summary import FILE_NAME as SUMMARY_FILE
from skyrl_mega.orchestration.summary import save_summary, show_panel
from skyrl_mega.telemetry.metrics import read_metrics
from skyrl_mega.telemetry.plots import Curve, plot_curves
from skyrl_mega.telemetry.progress import Column
from skyrl_mega.telemetry.resources import peak_rss_bytes
from skyrl_mega.telemetry.versions import collect_versions, git_commit, hardware
from skyrl_mega.types import TrainState

if TYPE_CHECKING:
    from skyrl_mega.orchestration.offline_data import OfflineData
    from skyrl_mega.orchestration.offline_loop import OfflineParts
    from skyrl_mega.parallel.topology import Topology

#: Shown of every step, after what a way of training is measured by.
_COLUMNS = (
    Column("loss", ("loss/total",), ".4f", 8),
    Column("held-out", ("eval/loss",), ".4f", 8),
)
_LATER_COLUMNS = (
    Column("grad", ("update/grad_norm",), ".2f", 7),
    Column("lr", ("update/lr",), ".1e", 7),
    Column("epoch", ("data/epoch",), ".2f", 6),
    Column("tokens/s", ("throughput/tokens_per_s",), ",.0f", 8),
)
#: What a command's runs are measured by, besides the loss: (title, training metric or "", held-out metric, format).
_MEASURES = {
    "sft": ("perplexity", "", "eval/perplexity", ".3f"),
    "dpo": ("accuracy", "rewards/accuracies", "eval/accuracy", ".3f"),
    "rm": ("accuracy", "rewards/accuracies", "eval/accuracy", ".3f"),
    "regression": ("correlation", "rewards/correlation", "eval/correlation", ".3f"),
}
PLOT = "curves.png"


def run_on_rows(config: OfflineConfig) -> dict[str, Any]:
    """Trains as `skyrl-mega sft`, `dpo` or `rm`, continuing the newest checkpoint if there is one. All ranks call.

    Returns the summary (rank 0; {} elsewhere), which is run_dir/summary.json too. Raises DataError for rows that can't be
    used, and ConfigError for a learning rate that falls later than the run ends, before any model is loaded.
    """
    from skyrl_mega.orchestration.offline_data import read_data
    from skyrl_mega.orchestration.offline_loop import num_steps, train_on_rows

    began = time.perf_counter()
    run_dir = Path(config.trainer.run_dir)
    with ExitStack() as stack:
        notes: list[str] = []
        data = read_data(config, notes.append)
        max_steps = num_steps(config, data.stream.num_rows)
        derived = training_config(config, max_steps=max_steps)
        require_updates(derived)
        topology = join_ranks(derived, stack)
        checkpoint = checkpoint_to_resume(config.trainer.run_dir, config.checkpoint, topology, warn=notes.append)
        state = TrainState(0, 0, {}, num_trained_groups=0, num_optimizer_steps=0)
        if checkpoint is not None:
            state = store.read_state(checkpoint)[0]
            data.stream.load_state_dict(state.prompt_source)
        recorder = Recorder(
            derived,
            rank=topology.rank,
            num_ranks=topology.world_size,
            start_step=state.step,
            on_phase=topology.enter,
            columns=_columns(config),
            plot=(PLOT, functools.partial(plot_curves, curves=_curves(config))),
            settings=as_dict(config),
        )
        stack.callback(recorder.close)
        if topology.rank == 0:
            changes = changed_settings(config, run_dir)
            save_resolved(config, run_dir / "config.yaml")
            for line in [*notes, *(changes or {}).values()]:
                recorder.note(line)
        if state.step >= max_steps and (run_dir / SUMMARY_FILE).is_file():
            recorder.note(f"{run_dir} has finished its {max_steps} steps; raise trainer.max_steps or trainer.epochs to go on.")
            return {}
        parts = _assemble(config, derived, topology, data, recorder, checkpoint, stack)
        startup_s = time.perf_counter() - began
        state = train_on_rows(parts)
        if config.checkpoint.export_hf:
            with recorder.status(f"writing the model to {run_dir / 'hf'}"):
                parts.task.trained.save_hf(str(run_dir / "hf"))
                if derived.lora.rank > 0:
                    parts.task.trained.save_adapter(str(run_dir / "lora"))
        if topology.rank != 0:
            return {}
        summary = _write_summary(config, state, startup_s=startup_s, parts=parts)
        recorder.close()
        _show_summary(config, summary)
        return summary


def _assemble(
    config: OfflineConfig,
    derived: Config,
    topology: Topology,
    data: OfflineData,
    recorder: Recorder,
    checkpoint: Path | None,
    stack: ExitStack,
) -> OfflineParts:
    from skyrl_mega.checkpoint import state as checkpoint_state
    from skyrl_mega.orchestration.offline_loop import OfflineParts
    from skyrl_mega.orchestration.offline_tasks import make_task

    with recorder.status(f"loading {config.model.path} into Megatron-Core"):
        task = make_task(config, derived, topology)
    state = TrainState(0, 0, {}, num_trained_groups=0, num_optimizer_steps=0)
    if checkpoint is not None:
        with recorder.status(f"resuming from {checkpoint}"):
            state = checkpoint_state.load(checkpoint, task.trained, topology)
    with recorder.phase("prepare"):
        task.prepare([*data.stream.examples, *data.held_out])
    return OfflineParts(
        config=config,
        task=task,
        data=data,
        recorder=recorder,
        checkpointer=make_checkpointer(derived, topology, recorder, stack),
        state=state,
        max_steps=derived.trainer.max_steps,
    )


# ---- what a run shows and leaves ------------------------------------------------------------------------------------------


def _measure(config: OfflineConfig) -> tuple[str, str, str, str]:
    is_regression = isinstance(config, RMConfig) and config.reward_model.loss == "regression"
    return _MEASURES["regression" if is_regression else config.command]


def _columns(config: OfflineConfig) -> tuple[Column, ...]:
    title, trained, held_out, spec = _measure(config)
    own = [Column(title, (trained,), spec, 11)] if trained else []
    return (*_COLUMNS, *own, Column(f"held-out {title}", (held_out,), spec, 9 + len(title)), *_LATER_COLUMNS)


def _curves(config: OfflineConfig) -> tuple[Curve, ...]:
    title, trained, held_out, _ = _measure(config)
    return (Curve("loss", "loss/total", "eval/loss"), Curve(title, trained, held_out))


def _write_summary(config: OfflineConfig, state: TrainState, *, startup_s: float, parts: OfflineParts) -> dict[str, Any]:
    """Writes run_dir/summary.json and returns its content: held-out numbers before and after, rows, times, machine."""
    run_dir = Path(config.trainer.run_dir)
    evaluated = [row for row in read_metrics(run_dir) if any(name.startswith("eval/") for name in row)]
    held_out = [{name: value for name, value in row.items() if name.startswith("eval/")} for row in evaluated]
    summary = {
        "command": config.command,
        "before": held_out[0] if held_out else None,
        "after": held_out[-1] if held_out else None,
        "held_out_rows": len(parts.data.held_out),
        "rows": parts.data.stream.num_rows,
        "rows_drawn": parts.data.stream.drawn,
        "epochs": round(parts.data.stream.epoch, 4),
        "steps": state.step,
        "optimizer_steps": state.num_optimizer_steps,
        "nonfinite_skipped": state.num_nonfinite_skipped,
        "startup_s": round(startup_s, 1),
        "train_s": round(state.elapsed_train_s, 1),
        "peak_rss_bytes": peak_rss_bytes(),
        "implementation": parts.task.trained.implementation,
        "hardware": hardware(),
        "versions": collect_versions(),
        "commit": git_commit(),
    }
    save_summary(run_dir, summary)
    return summary


def _show_summary(config: OfflineConfig, summary: dict[str, Any]) -> None:
    """The panel a person sees when the run has ended."""
    results: list[tuple[str, str]] = []
    if summary["before"] is not None:
        title, _, measure, spec = _measure(config)
        for name, metric, how in (("loss", "eval/loss", ".4f"), (title, measure, spec)):
            before, after = (summary[when].get(metric) for when in ("before", "after"))
            if before is not None and after is not None:
                shown = f"[bold]{format(before, how)} -> {format(after, how)}[/] ({summary['held_out_rows']} rows)"
                results.append((f"held-out {name}", shown))
    steps = f"{summary['epochs']:g} epochs of {summary['rows']} rows"
    show_panel(Path(config.trainer.run_dir), summary, results=results, steps=steps, plot=(PLOT, "the curves"))
