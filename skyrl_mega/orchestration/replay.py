"""A recorded step computed again, in this layout, precision and device: where does it differ, and where is the first NaN?

Per update: the recorded weights are loaded, the recorded samples are packed for this layout, and the policy's own passes give
per-token logprobs, loss statistics and the gradient norm. The optimizer step that ends an update is made on a throw-away policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from skyrl_mega.checkpoint import steps
from skyrl_mega.config.load import load_saved
from skyrl_mega.config.validate import validate
from skyrl_mega.data.packing import pack_rows
from skyrl_mega.errors import CheckpointError, ConfigError, DataError, NumericsError
from skyrl_mega.orchestration.assemble import join_ranks, shares_prompts
from skyrl_mega.orchestration.comparison import (
    TOLERANCES,
    Comparison,
    NonFinite,
    Tolerance,
    WorstToken,
    compare_logprobs,
    compare_metrics,
    first_non_finite,
    worst_token,
)
from skyrl_mega.orchestration.loop import pack
from skyrl_mega.orchestration.step_recorder import gather_objects, gather_rows
from skyrl_mega.orchestration.teacher import fill_teacher_topk, wants_topk
from skyrl_mega.types import Metrics, TrainBatch

if TYPE_CHECKING:
    from skyrl_mega.checkpoint.steps import RecordedStep, UpdateInputs
    from skyrl_mega.config.schema import Config
    from skyrl_mega.parallel.topology import Topology
    from skyrl_mega.training.policy import Policy


@dataclass(frozen=True)
class UpdateReplay:
    """One update, compared. `recorded_error` and `replayed_error` are empty where it went well; `bad_tensors` names weights (or,
    where they are all finite, gradients) that are not finite."""

    number: int
    comparisons: list[Comparison]
    worst: WorstToken | None
    recorded_error: str = ""
    replayed_error: str = ""
    non_finite: NonFinite | None = None
    bad_tensors: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        both_or_none_failed = bool(self.recorded_error) == bool(self.replayed_error)
        return both_or_none_failed and all(comparison.agrees for comparison in self.comparisons)


@dataclass(frozen=True)
class Replay:
    """A whole step, replayed; the same on every rank."""

    record: RecordedStep
    path: Path
    layout: str
    updates: list[UpdateReplay]

    @property
    def agrees(self) -> bool:
        return all(update.agrees for update in self.updates)


def replay_step(
    run_dir: str | Path, step: int, overrides: Sequence[str] = (), *, tolerance: float | None = None, world_size: int = 1
) -> Replay:
    """Recomputes the record of `step` under its own settings changed by `overrides`. All ranks call; nothing is written.

    `tolerance` replaces every one of TOLERANCES. Raises CheckpointError where the step is not recorded or its record is damaged,
    ConfigError for settings that can't be, or that the recorded inputs don't suffice for.
    """
    path = steps.find_step(run_dir, step)
    record = steps.read_record(path)
    recorded_config = load_saved(path / steps.CONFIG_FILE)
    numbers = [number for number in range(len(record.metrics)) if steps.update_dir(path, number).is_dir()]
    config = _replay_config(path, numbers, recorded_config, overrides, world_size)
    coarser = "bfloat16" if "bfloat16" in (config.model.dtype, recorded_config.model.dtype) else "float32"
    allowed = TOLERANCES[coarser] if tolerance is None else Tolerance(tolerance, tolerance, tolerance)
    with ExitStack() as stack:
        topology = join_ranks(config, stack)
        updates = [_replay_update(path, record, number, config, topology, allowed) for number in numbers]
    layout = (
        f"{world_size} x {topology.device.type}, tensor {topology.tp_size}, pipeline {topology.pp_size}, context "
        f"{topology.cp_size}, {config.model.dtype}"
    )
    return Replay(record, path, layout, updates)


def _replay_config(path: Path, numbers: Sequence[int], recorded: Config, overrides: Sequence[str], world_size: int) -> Config:
    """The settings to replay with, on the recorded weights; checked as for training, but for what only training needs."""
    config = load_saved(path / steps.CONFIG_FILE, overrides)
    if config.model.path != recorded.model.path:
        raise ConfigError(
            f"A replay computes with the weights that were recorded ({path}); `model.path` was {recorded.model.path}, got "
            f"{config.model.path}. Leave it out."
        )
    if config.algorithm.kl.coef > 0.0 and recorded.algorithm.kl.coef == 0.0:
        raise ConfigError(
            f"The record holds reference logprobs only if the run used them; `algorithm.kl.coef` was 0, got "
            f"{config.algorithm.kl.coef}. Leave it out."
        )
    absent = [str(steps.weights_dir(path, n)) for n in numbers if not (steps.weights_dir(path, n) / "config.json").is_file()]
    if absent or not numbers:
        raise CheckpointError(f"{path} is incomplete ({', '.join(absent) or 'no update'}); remove it and record the step again.")
    config = _with_weights(config, path, numbers[0])
    # No engine is started, so where it would be placed breaks no rule.
    config = replace(config, rollout=replace(config.rollout, placement="auto"))
    validate(config, world_size=world_size, check_surroundings=False)
    return config


def _with_weights(config: Config, path: Path, number: int) -> Config:
    weights = steps.weights_dir(path, number)
    adapter = weights / "lora"
    return replace(
        config,
        model=replace(config.model, path=str(weights)),
        lora=replace(config.lora, path=str(adapter) if adapter.is_dir() else ""),
    )


def _replay_update(
    path: Path, record: RecordedStep, number: int, config: Config, topology: Topology, allowed: Tolerance
) -> UpdateReplay:
    from skyrl_mega.training.policy import Policy
    from skyrl_mega.training.reference import ReferenceModel

    inputs = steps.read_inputs(path, number)
    policy = Policy.from_hf(_with_weights(config, path, number), topology)
    if config.algorithm.kl.target > 0:
        policy.kl_coef = record.surroundings.get("kl_coef")
    batch = _pack(config, topology, inputs, share_prompts=shares_prompts(config, policy))
    # A teacher never changes: what it said then, it says now.
    teacher = ReferenceModel(config, topology, config.teacher.path) if wants_topk(config.algorithm) else None
    fill_teacher_topk(teacher, [batch], config, vocab_size=policy.vocab_size)
    logprobs = gather_rows(policy.compute_logprobs(batch), batch, inputs.samples, topology)
    metrics: Metrics = {}
    error = ""
    try:
        metrics = policy.train_step(batch)
    except NumericsError as failure:
        error = str(failure)
    recorded = record.metrics[number]
    failed = record.error and number == len(record.metrics) - 1
    non_finite = first_non_finite(config, inputs, logprobs, _places(batch, topology))
    return UpdateReplay(
        number,
        [*compare_logprobs(inputs.logprobs, logprobs, allowed), *compare_metrics(recorded, metrics, allowed)],
        worst_token(inputs, logprobs),
        recorded_error=record.error if failed else "",
        replayed_error=error,
        non_finite=non_finite,
        bad_tensors=bad_tensors(policy, topology) if error or non_finite else [],
    )


def _pack(config: Config, topology: Topology, inputs: UpdateInputs, *, share_prompts: bool) -> TrainBatch:
    batch = pack(config, topology, inputs.samples, share_prompts=share_prompts)
    try:
        for name, rows in (("old_logprobs", inputs.old_logprobs), ("ref_logprobs", inputs.ref_logprobs)):
            if rows is not None:
                for micro_batch, values in zip(batch.micro_batches, pack_rows(rows, batch), strict=True):
                    setattr(micro_batch, name, values)
    except DataError as error:
        raise ConfigError(
            f"These settings compute samples that the recorded update left out ({error}). Leave `algorithm.*` as it was."
        ) from error
    return batch


def _places(batch: TrainBatch, topology: Topology) -> dict[int, tuple[int, int]]:
    """Sample -> (micro-batch, data-parallel rank), of all ranks."""
    mine = {
        index: (number, topology.dp_rank)
        for number, micro_batch in enumerate(batch.micro_batches)
        for index in micro_batch.sample_index.tolist()
        if index >= 0
    }
    return {index: place for part in gather_objects(mine, topology) for index, place in part.items()}


def bad_tensors(policy: Policy, topology: Topology) -> list[str]:
    """Weights that hold a NaN or infinity; where none does, gradients that do. All ranks."""
    weights = [name for name, value in policy.iter_weights(torch.float32) if not bool(value.isfinite().all())]
    gradients = [
        f"gradient of {name}"
        for chunk in policy.chunks
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad and not bool(parameter.main_grad.isfinite().all())
    ]
    everyone = [name for part in gather_objects(gradients, topology) for name in part]
    return weights or list(dict.fromkeys(everyone))
