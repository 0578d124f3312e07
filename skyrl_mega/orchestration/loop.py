"""The training loop. Everything it uses is handed to it; `assemble.py` decides what that is.

Synchronous, one-step-off and asynchronous training are this one loop. Here the loop calls `producer.fill` itself; an
asynchronous producer fills on its own, and `take` enforces the staleness bound either way.

All ranks run the loop. Rank 0 alone has a producer, a weight sink and a recorder; the others receive its trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from skyrl_mega.agents.stats import rollout_metrics
from skyrl_mega.algorithms.advantages import compute_advantages
from skyrl_mega.checkpoint.saver import Checkpointer
from skyrl_mega.config.schema import Config
from skyrl_mega.data.packing import balance_and_pack, split_updates, to_samples
from skyrl_mega.orchestration.probe import probe_engine
from skyrl_mega.orchestration.producer import Producer
from skyrl_mega.orchestration.recorder import Recorder
from skyrl_mega.orchestration.step_recorder import record_step
from skyrl_mega.training.policy import Policy, packing_multiples
from skyrl_mega.training.reference import ReferenceModel
from skyrl_mega.types import Metrics, TrainBatch, TrainSample, TrainState, TrajectoryGroup, WeightVersion
from skyrl_mega.weights.publish import publish

if TYPE_CHECKING:
    import torch

    from skyrl_mega.parallel.topology import Topology
    from skyrl_mega.protocols import RolloutEngine, WeightSink


@dataclass
class Parts:
    """What one run is made of. `producer`, `engine` and `sink` exist on rank 0 only."""

    config: Config
    topology: Topology
    policy: Policy
    reference: ReferenceModel | None
    recorder: Recorder
    state: TrainState
    engine_dtype: torch.dtype
    share_prompts: bool
    checkpointer: Checkpointer
    producer: Producer | None = None
    engine: RolloutEngine | None = None
    sink: WeightSink | None = None


def train(parts: Parts) -> TrainState:
    """Runs the remaining steps; returns the state after the last one."""
    config, recorder = parts.config, parts.recorder
    if parts.state.step == 0:
        recorder.record(0, evaluate(parts, 0))
    for step in range(parts.state.step + 1, config.trainer.max_steps + 1):
        with recorder.phase("rollout"):
            groups = collect(parts, step)
        with recorder.phase("pack"):
            samples = to_samples(groups)
            compute_advantages(samples, config.algorithm)
            divided = split_updates(samples, config.trainer.updates_per_step)
            batches = [pack(config, parts.topology, update, share_prompts=parts.share_prompts) for update in divided]
        with recorder.phase("logprobs"):
            fill_logprobs(parts, batches)
        with recorder.phase("train"), record_step(parts, step, divided) as train_step:
            updates = [train_step(batch) for batch in batches]
        with recorder.phase("sync"):
            version = push_weights(parts, step)
        metrics = rollout_metrics(groups) | mean_metrics(updates)
        if config.rollout.probe_after_sync:
            with recorder.phase("probe"):
                metrics |= probe_engine(parts.policy, parts.engine, groups, config, parts.topology)
        parts.state = advance(parts, step, groups)
        metrics |= evaluate(parts, step) | parts.checkpointer.poll()
        # The line is written before the checkpoint: a run killed in between repeats the step and rewrites the line.
        recorder.record(step, metrics, samples=samples, version=version)
        with recorder.phase("checkpoint"):
            maybe_save(parts, step, metrics)
    parts.checkpointer.finish()
    return parts.state


def collect(parts: Parts, step: int) -> list[TrajectoryGroup]:
    """One step's trajectory groups, the same on every rank."""
    groups = None
    if parts.producer is not None:
        parts.producer.fill(step)
        groups = parts.producer.take(parts.state.policy_version)
    return parts.topology.broadcast_object(groups, phase=f"rollout of step {step}")


def pack(config: Config, topology: Topology, samples: list[TrainSample], *, share_prompts: bool) -> TrainBatch:
    """This rank's share of one update. Zero-advantage samples cost nothing unless another loss term wants them."""
    algorithm = config.algorithm
    return balance_and_pack(
        samples,
        tokens_per_micro_batch=config.trainer.tokens_per_micro_batch,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        skip_zero_advantage=algorithm.kl.coef == 0.0 and algorithm.entropy_coef == 0.0,
        share_prompts=share_prompts,
        **packing_multiples(config, topology),
    )


def fill_logprobs(parts: Parts, batches: list[TrainBatch]) -> None:
    """Reference logprobs where a KL term needs them; old logprobs where more than one update is made per step."""
    for batch in batches:
        if parts.reference is not None:
            for micro_batch, logprobs in zip(batch.micro_batches, parts.reference.compute_logprobs(batch), strict=True):
                micro_batch.ref_logprobs = logprobs
        if len(batches) > 1:
            for micro_batch, logprobs in zip(batch.micro_batches, parts.policy.compute_logprobs(batch), strict=True):
                micro_batch.old_logprobs = logprobs


def push_weights(parts: Parts, version: int) -> WeightVersion | None:
    """Publishes the policy's weights to the engine as `version`; the proof on rank 0, None elsewhere."""
    bucket_bytes = parts.config.rollout.weight_bucket_mib * 2**20
    return publish(parts.policy, parts.sink, version, parts.engine_dtype, bucket_bytes=bucket_bytes)


def evaluate(parts: Parts, step: int) -> Metrics:
    """Held-out accuracy before the first step, after the last, and every `evaluation.interval_steps`; {} otherwise."""
    settings = parts.config.evaluation
    due = step in (0, parts.config.trainer.max_steps) or (settings.interval_steps > 0 and step % settings.interval_steps == 0)
    if settings.num_prompts == 0 or not due:
        return {}
    with parts.recorder.phase("evaluate"):
        metrics = parts.producer.evaluate(settings.num_prompts) if parts.producer is not None else None
        return parts.topology.broadcast_object(metrics, phase=f"evaluation at step {step}")


def advance(parts: Parts, step: int, groups: list[TrajectoryGroup]) -> TrainState:
    """The run's state once `step` is trained and its weights are published."""
    source = parts.producer.source.state_dict() if parts.producer is not None else parts.state.prompt_source
    return replace(
        parts.state,
        step=step,
        policy_version=step,
        prompt_source=source,
        num_trained_groups=parts.state.num_trained_groups + len(groups),
        num_optimizer_steps=parts.policy.num_updates,
        elapsed_train_s=parts.state.elapsed_train_s + parts.recorder.step_seconds(),
    )


def maybe_save(parts: Parts, step: int, metrics: Metrics) -> None:
    """Begins a checkpoint every `checkpoint.interval_steps` and after the last step."""
    interval = parts.config.checkpoint.interval_steps
    if interval and (step % interval == 0 or step == parts.config.trainer.max_steps):
        parts.checkpointer.save(parts.policy, parts.state, metrics)
        parts.policy.park_optimizer()


def mean_metrics(updates: list[Metrics]) -> Metrics:
    """The mean of each number over the step's updates that report it."""
    names = {name: None for update in updates for name in update}
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
