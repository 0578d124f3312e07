"""Keeps what a step's updates were computed from, where `trainer.record_steps` asks for it or an update fails on a number.

The inputs are written before each update, together with the weights, which the update will change. An update that raises
NumericsError leaves the weights untouched, so a step that nobody asked for is recorded after the fact: its first failing update
only, in the first few such steps of a run (each record holds the whole model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from skyrl_mega.checkpoint import state, steps, store
from skyrl_mega.config.load import save_resolved
from skyrl_mega.data.packing import unpack, unpack_routing
from skyrl_mega.errors import CheckpointError, NumericsError
from skyrl_mega.orchestration.nonfinite import MAX_RECORDED
from skyrl_mega.telemetry.versions import collect_versions, git_commit
from skyrl_mega.types import Metrics, TrainBatch, TrainSample

if TYPE_CHECKING:
    from pathlib import Path

    from skyrl_mega.orchestration.loop import Parts
    from skyrl_mega.parallel.topology import Topology


@contextmanager
def record_step(parts: Parts, step: int, divided: Sequence[list[TrainSample]]) -> Iterator[Callable[[TrainBatch], Metrics]]:
    """Gives `policy.train_step`, which also records its updates where the step is to be recorded. All ranks.

    `divided`: the samples of each update. The record counts once the block has ended, or an update raised NumericsError, which
    is its end: what the step does afterwards is not recorded.
    """
    record = _StepRecord(parts, step, divided)
    yield record.train_step
    record.finish()


class _StepRecord:
    """One step on its way to disk."""

    def __init__(self, parts: Parts, step: int, divided: Sequence[list[TrainSample]]) -> None:
        self._parts, self._step, self._divided = parts, step, divided
        self._asked = step in parts.config.trainer.record_steps
        self._path = steps.temporary_path(parts.config.trainer.run_dir, step)
        self._metrics: list[Metrics] = []
        self._num_updates_before = parts.policy.num_updates
        self._begun = self._closed = False

    def train_step(self, batch: TrainBatch) -> Metrics:
        number = len(self._metrics)
        if self._asked and not self._closed:
            self._write_before(number, batch)
        try:
            self._metrics.append(self._parts.policy.train_step(batch))
        except NumericsError as error:
            if not self._closed:
                self._record_failure(number, batch, str(error))
            raise
        return self._metrics[-1]

    def finish(self) -> None:
        if self._asked and not self._closed:
            self._commit(error="")

    def _record_failure(self, number: int, batch: TrainBatch, error: str) -> None:
        """Records the failed update, and ends the record with it."""
        parts, self._closed = self._parts, True
        try:
            if not self._asked:
                if self._num_recorded_failures() >= MAX_RECORDED:
                    parts.recorder.note(f"the failed step is not recorded: {MAX_RECORDED} failed ones are there to look at")
                    return
                # The weights are as they were before this update. Those of the updates before it are gone.
                self._write_before(number, batch)
            self._commit(error=error)
        except CheckpointError as second:
            parts.recorder.note(f"the failed step could not be recorded: {second}")

    def _num_recorded_failures(self) -> int:
        """Records of other steps of this run that failed; the same on every rank."""
        run_dir, topology = self._parts.config.trainer.run_dir, self._parts.topology
        count = steps.count_failed(run_dir, besides=self._step) if topology.is_main else None
        return topology.broadcast_object(count, phase="recording a step", step=self._step)

    def _write_before(self, number: int, batch: TrainBatch) -> None:
        parts, samples = self._parts, self._divided[number]
        if parts.config.model.router_replay != "off":
            routing = {i: row for part in gather_objects(unpack_routing(batch), parts.topology) for i, row in part.items()}
            samples = [replace(sample, routed_experts=routing.get(sample.sample_index)) for sample in samples]

        def gathered(values: list[Any]) -> dict[int, torch.Tensor] | None:
            # On every rank the passes before filled all micro-batches, or none.
            return None if any(value is None for value in values) else gather_rows(values, batch, samples, parts.topology)

        with parts.recorder.phase("record"):
            inputs = steps.UpdateInputs(
                samples,
                gather_rows(parts.policy.compute_logprobs(batch), batch, samples, parts.topology),
                gathered([micro_batch.old_logprobs for micro_batch in batch.micro_batches]),
                gathered([micro_batch.ref_logprobs for micro_batch in batch.micro_batches]),
            )
            self._on_main(lambda: self._write_inputs(number, inputs))
            parts.policy.save_apart(str(steps.weights_dir(self._path, number)))

    def _write_inputs(self, number: int, inputs: steps.UpdateInputs) -> None:
        if not self._begun:
            steps.begin(self._parts.config.trainer.run_dir, self._step)
            self._begun = True
        steps.write_inputs(self._path, number, inputs)

    def _commit(self, *, error: str) -> None:
        self._on_main(lambda: self._write_rest(error))

    def _write_rest(self, error: str) -> None:
        parts = self._parts
        checkpoint = store.checkpoint_path(parts.config.trainer.run_dir, parts.state.policy_version)
        save_resolved(parts.config, self._path / steps.CONFIG_FILE)
        record = steps.RecordedStep(
            step=self._step,
            weight_version=parts.state.policy_version,
            num_updates=self._num_updates_before,
            metrics=[*self._metrics, {}] if error else self._metrics,
            error=error,
            checkpoint=checkpoint.name if checkpoint.is_dir() else "",
            surroundings=surroundings(parts),
        )
        final = steps.commit(self._path, record)
        parts.recorder.note(f"recorded step {self._step}: {final} ({steps.size_bytes(final) / 2**20:,.1f} MiB)")

    def _on_main(self, write: Callable[[], None]) -> None:
        on_main(write, self._path, self._step, self._parts.topology)


def on_main(write: Callable[[], None], path: Path, step: int, topology: Topology) -> None:
    """Rank 0 writes what `path` records of `step`; where it can't, every rank raises CheckpointError. *All ranks.*"""
    failure = ""
    if topology.is_main:
        try:
            write()
        except (OSError, SafetensorError) as error:
            failure = f"step {step} can't be recorded in {path}: {error}. Free space, or take it out of trainer.record_steps."
    failure = topology.broadcast_object(failure, phase="recording a step", step=step)
    if failure:
        raise CheckpointError(failure)


def surroundings(parts: Parts) -> dict[str, Any]:
    """What a result may depend on besides settings and inputs."""
    return {
        "layout": state.layout(parts.topology),
        "world_size": parts.topology.world_size,
        "device": parts.topology.device.type,
        "share_prompts": parts.share_prompts,
        "kl_coef": parts.policy.kl_coef,
        "implementation": parts.policy.implementation,
        "versions": collect_versions(),
        "git_commit": git_commit(),
    }


def gather_rows(
    values: Sequence[torch.Tensor],
    batch: TrainBatch,
    samples: Sequence[TrainSample],
    topology: Topology,
    unpacked: Callable[..., list[torch.Tensor]] = unpack,
) -> dict[int, torch.Tensor]:
    """Label-aligned values of every rank's micro-batches as rows by sample_index (`unpacked` makes them). All ranks; all get
    them.
    """
    held = {index for micro_batch in batch.micro_batches for index in micro_batch.sample_index.tolist()}
    mine = [sample for sample in samples if sample.sample_index in held]
    rows = dict(zip((sample.sample_index for sample in mine), unpacked(values, batch, mine), strict=True))
    merged = {index: row for part in gather_objects(rows, topology) for index, row in part.items()}
    return dict(sorted(merged.items()))


def gather_objects(obj: Any, topology: Topology) -> list[Any]:
    """Every rank's object, by rank, on every rank."""
    gathered: list[Any] = [None] * topology.world_size
    with topology.deadline("gathering a step"):
        dist.all_gather_object(gathered, obj, group=topology.control_group)
    return gathered
