"""Keeps what a critic's update was computed from that was not finite: samples, returns, values, and the critic's weights.

The policy's record (`step_recorder.py`) can be replayed; this one is for reading, with safetensors and transformers. The failed
update left the weights as they were before it. As the policy's, the first few such steps of a run are recorded: each record
holds the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from skyrl_mega.checkpoint import steps
from skyrl_mega.config.load import save_resolved
from skyrl_mega.errors import CheckpointError, NonFiniteUpdateError
from skyrl_mega.orchestration.nonfinite import MAX_RECORDED
from skyrl_mega.orchestration.step_recorder import gather_rows, on_main, surroundings
from skyrl_mega.types import Metrics, TrainBatch, TrainSample

if TYPE_CHECKING:
    from skyrl_mega.orchestration.loop import Parts

#: Before the names of the critic's records.
OF_CRITIC = "critic_"


def critic_update(parts: Parts, step: int, samples: Sequence[TrainSample], batch: TrainBatch) -> Metrics:
    """The critic's update on `batch`, whose samples are `samples`; recorded where it is not finite. *All ranks.*

    Raises NonFiniteUpdateError. Of a step with several such updates the first is recorded.
    """
    assert parts.critic is not None
    try:
        return parts.critic.train_step(batch)
    except NonFiniteUpdateError as error:
        try:
            _record(parts, step, samples, batch, str(error))
        except CheckpointError as second:
            parts.recorder.note(f"the critic's failed update could not be recorded: {second}")
        raise


def _record(parts: Parts, step: int, samples: Sequence[TrainSample], batch: TrainBatch, reason: str) -> None:
    topology, run_dir, critic = parts.topology, parts.config.trainer.run_dir, parts.critic
    assert critic is not None
    num_updates = critic.num_updates
    path = steps.temporary_path(run_dir, step, of=OF_CRITIC)
    if not topology.broadcast_object(_is_wanted(parts, step), phase="recording a step", step=step):
        return

    def gathered(name: str) -> steps.Rows | None:
        values = [getattr(micro_batch, name) for micro_batch in batch.micro_batches]
        # On every rank the critic filled all micro-batches, or none.
        return None if any(value is None for value in values) else gather_rows(values, batch, samples, critic.topology)

    def write_inputs() -> None:
        steps.begin(run_dir, step, of=OF_CRITIC)
        steps.write_inputs(path, 0, inputs)

    def write_rest() -> None:
        save_resolved(parts.config, path / steps.CONFIG_FILE)
        record = steps.RecordedStep(
            step=step,
            weight_version=parts.state.policy_version,
            num_updates=num_updates,
            metrics=[{}],
            error=reason,
            checkpoint="",
            surroundings=surroundings(parts),
        )
        parts.recorder.note(f"recorded the critic's failed update: {steps.commit(path, record)}")

    with parts.recorder.phase("record"):
        inputs = steps.UpdateInputs(list(samples), returns=gathered("returns"), values=gathered("values"))
        on_main(write_inputs, path, step, topology)
        critic.save_hf(str(steps.weights_dir(path, 0)))
        on_main(write_rest, path, step, topology)


def _is_wanted(parts: Parts, step: int) -> bool:
    """Whether this step's failure is to be recorded: the first of its step, and of few steps. As rank 0 sees the disk.

    The record of a step that is repeated after a crash is replaced, once.
    """
    names = steps.steps_dir(parts.config.trainer.run_dir).glob(f"{OF_CRITIC}step_??????")
    others = [path for path in names if path.name != f"{OF_CRITIC}step_{step:06d}"]
    is_first = parts.skipped.left_out("critic") == 0
    return is_first and len(others) < MAX_RECORDED
