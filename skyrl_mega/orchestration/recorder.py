"""What a run shows and keeps of itself: one line per step to a person, one to metrics.jsonl, one to each tracker.

Every rank has a recorder, because every rank times its phases; only rank 0's writes and shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from skyrl_mega.config.schema import Config, as_dict
from skyrl_mega.errors import DataError
from skyrl_mega.orchestration.flight import overlap_metrics
from skyrl_mega.orchestration.nonfinite import BATCHES_FILE
from skyrl_mega.telemetry.metrics import FILE_NAME as METRICS_FILE
from skyrl_mega.telemetry.metrics import MetricsLog
from skyrl_mega.telemetry.phases import PhaseTimer
from skyrl_mega.telemetry.plots import plot_rewards
from skyrl_mega.telemetry.progress import COLUMNS, RANK_COLUMNS, Column, StepDisplay
from skyrl_mega.telemetry.resources import peak_rss_bytes
from skyrl_mega.telemetry.trackers import make_trackers
from skyrl_mega.types import Metrics, TrainSample, WeightVersion

#: Above this mean |engine - policy| logprob difference training drifts away from what was sampled (docs: precision).
MISMATCH_WARNING = {"float32": 0.01, "bfloat16": 0.15}


#: Steps between two drawings of the reward curve (each takes a few tenths of a second); evaluations are drawn at once.
PLOT_EVERY = 10


class Recorder:
    """Times phases on every rank; on rank 0 also shows them, and records each step's numbers. Close it at the end.

    `on_phase` is told the name and the step of every phase that begins, and whether it should show progress (set-up need not).
    `columns` of a step's line, the `plot` (written to the file of that name by a function of metrics and picture) and the
    `settings` that trackers are told: those of reinforcement learning unless given.
    """

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        num_ranks: int = 1,
        start_step: int = 0,
        on_phase: Callable[[str, int, bool], None] = lambda phase, step, has_deadline: None,
        columns: tuple[Column, ...] = COLUMNS,
        plot: tuple[str, Callable[[Path, Path], Any]] = ("reward_curve.png", plot_rewards),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        telemetry, trainer = config.telemetry, config.trainer
        self.run_dir = Path(trainer.run_dir)
        self.leads = rank == 0
        self._config = config
        trace = self.run_dir / ("trace.json" if rank == 0 else f"trace_rank{rank}.json") if telemetry.trace else None
        self._timer = PhaseTimer(trace, rank=rank)
        if start_step > 0:
            self._timer.start_step(start_step + 1)
        self._on_phase = on_phase
        columns = columns if num_ranks == 1 else (*columns, *RANK_COLUMNS)
        self._plot_name, self._draw = plot
        self._display = StepDisplay(
            trainer.max_steps, telemetry.progress, start_step=start_step, enabled=self.leads, columns=columns
        )
        self._log: MetricsLog | None = None
        self._trackers = []
        if self.leads:
            if start_step == 0:
                _set_aside_earlier_records(self.run_dir)
            self._log = MetricsLog(self.run_dir)
            self._log.rewind(start_step)
            self._trackers = make_trackers(
                telemetry.trackers, self.run_dir, telemetry.project, settings or as_dict(config), start_step=start_step
            )
        self._warned = False
        self._began = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of a step: timed, traced, and named beside the progress bar while it lasts."""
        self._on_phase(name, self._timer.step, True)
        with self._timer.phase(name), self._display.phase(name):
            yield

    @contextmanager
    def status(self, message: str) -> Iterator[None]:
        """Around a slow part of the set-up."""
        self._on_phase(message, self._timer.step, False)
        with self._display.status(message):
            yield

    def note(self, message: str) -> None:
        self._display.note(message)

    def step_seconds(self) -> float:
        """Wall seconds since the previous step was recorded."""
        return time.perf_counter() - self._began

    def record(
        self, step: int, metrics: Metrics, *, samples: Sequence[TrainSample] = (), version: WeightVersion | None = None
    ) -> None:
        """Writes the step's line everywhere and starts timing the next."""
        seconds = self.step_seconds()
        row = metrics | self._timer.metrics() | {"time/step_s": seconds, "memory/peak_rss_bytes": float(peak_rss_bytes())}
        if samples:
            row |= self._throughput(samples, row)
        if "flight/interval_s" in row:
            row |= overlap_metrics(row)
        if version is not None:
            row |= {f"sync/{name}_s": value for name, value in version.seconds.items()}
            row |= {"sync/policy_version": float(version.version), "sync/bytes": float(version.size_bytes)}
        if self._log is not None:
            self._log.log(row, step)
            for tracker in self._trackers:
                tracker.log(row, step)
            self._display.step(step, row)
            if any(name.startswith("eval/") for name in row) or step % PLOT_EVERY == 0 or step == self._config.trainer.max_steps:
                self._plot()
            self._warn_of_mismatch(row)
        self._began = time.perf_counter()
        self._timer.start_step(step + 1)

    def _throughput(self, samples: Sequence[TrainSample], row: Metrics) -> Metrics:
        tokens = sum(sample.num_tokens for sample in samples)
        sampled = sum(sample.num_loss_tokens for sample in samples if not sample.is_replayed)
        return {
            "throughput/tokens_per_s": tokens / row["time/step_s"],
            "throughput/rollout_tokens_per_s": sampled / row["time/rollout_s"],
            "throughput/train_tokens_per_s": tokens / row["time/train_s"],
            "data/tokens": float(tokens),
            "data/sampled_tokens": float(sampled),
        }

    def _plot(self) -> None:
        if self._log is not None:
            try:
                self._draw(self._log.path, self.run_dir / self._plot_name)
            except DataError:
                return  # nothing to draw yet: evaluation is off and no step has ended

    def _warn_of_mismatch(self, row: Metrics) -> None:
        difference = row.get("mismatch/abs_logprob_diff_mean", 0.0)
        limit = MISMATCH_WARNING[self._config.rollout.dtype]
        # Asynchronous rollouts and replayed ones come from older policies by design.
        is_by_design = self._config.trainer.max_staleness > 0 or self._config.sampling.replay.share > 0
        if difference > limit and not is_by_design and not self._warned:
            self._warned = True
            self.note(
                f"warning: engine and policy logprobs differ by {difference:.3f} on average (more than {limit}); the engine may "
                "play an older or a coarser policy. Check model.dtype against rollout.dtype, and rollout.probe_after_sync=true."
            )

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._display.close)
            stack.callback(self._timer.close)
            for tracker in [*self._trackers, *([self._log] if self._log is not None else [])]:
                stack.callback(tracker.close)


def _set_aside_earlier_records(run_dir: Path) -> None:
    """Keeps the records of an earlier run that left no checkpoint to continue, under dated names."""
    metrics = run_dir / METRICS_FILE
    if not metrics.is_file():
        return
    date = time.strftime("%Y%m%d-%H%M%S", time.localtime(metrics.stat().st_mtime))
    for path in (metrics, run_dir / "tensorboard", run_dir / BATCHES_FILE):
        if path.exists():
            path.rename(path.with_name(f"{path.stem}-{date}{path.suffix}"))
