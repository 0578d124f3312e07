"""The loop of training on fixed data: rows, an update, now and then an evaluation and a checkpoint.

All ranks run it and draw the same rows; each computes its part of them. The state of a run is the rows drawn and the weights, so
that a run that was killed goes on with the row that comes next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from skyrl_mega.checkpoint.saver import Checkpointer
from skyrl_mega.config.offline_schema import OfflineConfig
from skyrl_mega.data.examples import Example
from skyrl_mega.errors import NonFiniteUpdateError
from skyrl_mega.orchestration.nonfinite import SkippedUpdates, record_batch
from skyrl_mega.orchestration.offline_data import OfflineData
from skyrl_mega.orchestration.offline_tasks import Task
from skyrl_mega.orchestration.recorder import Recorder
from skyrl_mega.types import Metrics, TrainState


@dataclass
class OfflineParts:
    """What one run is made of. `max_steps`: the updates of the whole run."""

    config: OfflineConfig
    task: Task
    data: OfflineData
    recorder: Recorder
    checkpointer: Checkpointer
    state: TrainState
    max_steps: int
    skipped: SkippedUpdates = field(init=False)  #: updates whose loss or gradient is not finite

    def __post_init__(self) -> None:
        self.skipped = SkippedUpdates(self.config.trainer.max_nonfinite_updates, self.recorder.note)


def train_on_rows(parts: OfflineParts) -> TrainState:
    """Makes the remaining updates; returns the state after the last one. *All ranks.*"""
    config, recorder, stream = parts.config, parts.recorder, parts.data.stream
    if parts.state.step == 0:
        recorder.record(0, evaluate(parts, 0))
    for step in range(parts.state.step + 1, parts.max_steps + 1):
        examples = stream.next(config.trainer.batch_size)
        with recorder.phase("train"):
            metrics = parts.skipped.attempt("update", partial(update, parts, step, examples))
        metrics |= row_metrics(parts, examples) | parts.skipped.take_metrics()
        parts.state = advance(parts, step, len(examples))
        metrics |= evaluate(parts, step) | parts.checkpointer.poll()
        # The line is written before the checkpoint: a run killed in between repeats the step and rewrites the line.
        recorder.record(step, metrics)
        with recorder.phase("checkpoint"):
            maybe_save(parts, step, metrics)
    parts.checkpointer.finish()
    return parts.state


def num_steps(config: OfflineConfig, num_rows: int) -> int:
    """Optimizer updates of the whole run: `trainer.max_steps`, or what `trainer.epochs` make."""
    return config.trainer.max_steps or max(1, math.ceil(config.trainer.epochs * num_rows / config.trainer.batch_size))


def update(parts: OfflineParts, step: int, examples: Sequence[Example]) -> Metrics:
    """One update; where it is not finite, its rows are written down before the error goes on."""
    try:
        return parts.task.update(examples)
    except NonFiniteUpdateError as error:
        if parts.recorder.leads:
            record_batch(parts.recorder.run_dir, step, str(error), [example.place for example in examples])
        raise


def row_metrics(parts: OfflineParts, examples: Sequence[Example]) -> Metrics:
    """What the update was made of, and how much of the data has been seen."""
    stream = parts.data.stream
    tokens = sum(example.num_tokens for example in examples)
    trained = sum(sequence.num_loss_tokens for example in examples for sequence in example.sequences)
    return {
        "data/epoch": stream.epoch,
        "data/tokens": float(tokens),
        "data/loss_tokens": float(trained),
        "throughput/tokens_per_s": tokens / parts.recorder.step_seconds(),
        **{f"data/rows/{name}": float(count) for name, count in stream.drawn.items()},
    }


def evaluate(parts: OfflineParts, step: int) -> Metrics:
    """Held-out numbers before the first step, after the last, and every `evaluation.interval_steps`; {} otherwise."""
    interval = parts.config.evaluation.interval_steps
    due = step in (0, parts.max_steps) or (interval > 0 and step % interval == 0)
    if not due or not parts.data.held_out:
        return {}
    with parts.recorder.phase("evaluate"):
        found = parts.task.evaluate(parts.data.held_out)
    return {f"eval/{name}": value for name, value in found.items()}


def advance(parts: OfflineParts, step: int, num_rows: int) -> TrainState:
    """The run's state once `step` is trained."""
    return replace(
        parts.state,
        step=step,
        policy_version=step,
        prompt_source=parts.data.stream.state_dict(),
        num_trained_groups=parts.state.num_trained_groups + num_rows,
        num_optimizer_steps=parts.task.trained.num_updates,
        num_nonfinite_skipped=parts.state.num_nonfinite_skipped + parts.skipped.take_total(),
        elapsed_train_s=parts.state.elapsed_train_s + parts.recorder.step_seconds(),
    )


def maybe_save(parts: OfflineParts, step: int, metrics: Metrics) -> None:
    """Begins a checkpoint every `checkpoint.interval_steps` and after the last step."""
    interval = parts.config.checkpoint.interval_steps
    if interval and (step % interval == 0 or step == parts.max_steps):
        parts.checkpointer.save(parts.task.trained, parts.state, metrics)
        parts.task.trained.park_optimizer()
