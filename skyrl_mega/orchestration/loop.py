"""The training loop. Everything it uses is handed to it; `assemble.py` decides what that is.

Synchronous, one-step-off and asynchronous training are this one loop: the rollout coordinator gives it a step's groups, which it
began before the step or while earlier ones were trained, as `trainer.max_staleness` allows.

All ranks run the loop. Rank 0 alone calls the coordinator and pushes weights; the others receive its trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from skyrl_mega.agents.stats import rollout_metrics
from skyrl_mega.algorithms.advantages import compute_advantages, needs
from skyrl_mega.algorithms.kl import next_kl_coef
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES, mark_tokens
from skyrl_mega.checkpoint.saver import Checkpointer
from skyrl_mega.checkpoint.store import list_checkpoints, step_of
from skyrl_mega.config.schema import Config
from skyrl_mega.data.packing import balance_and_pack, split_updates, to_samples
from skyrl_mega.data.sampling.selection import select_trained
from skyrl_mega.data.sampling.shaping import shape_rewards
from skyrl_mega.errors import WeightSyncError
from skyrl_mega.orchestration.coordinator import Taken
from skyrl_mega.orchestration.critic_recorder import critic_update
from skyrl_mega.orchestration.nonfinite import SkippedUpdates
from skyrl_mega.orchestration.probe import probe_engine
from skyrl_mega.orchestration.recorder import Recorder
from skyrl_mega.orchestration.rollout_host import RolloutHost
from skyrl_mega.orchestration.scoring import score_samples
from skyrl_mega.orchestration.served_teacher import ServedTeacher
from skyrl_mega.orchestration.step_recorder import record_step
from skyrl_mega.orchestration.teacher import fill_teacher_topk
from skyrl_mega.orchestration.warmup import warm_up
from skyrl_mega.training.policy import Policy
from skyrl_mega.training.reference import BaseModel, ReferenceModel
from skyrl_mega.training.schedule import packing_multiples
from skyrl_mega.types import Metrics, TrainBatch, TrainSample, TrainState, TrajectoryGroup, WeightVersion
from skyrl_mega.weights.fp8 import as_engines_take
from skyrl_mega.weights.publish import publish

if TYPE_CHECKING:
    import torch

    from skyrl_mega.parallel.topology import Topology
    from skyrl_mega.protocols import WeightReceiver
    from skyrl_mega.training.critic import Critic
    from skyrl_mega.weights.fleet_sink import FleetSink

#: Seconds after which rank 0, while it waits for rollouts, looks up to say that it goes on.
PATIENCE_S = 5.0

#: Pushes in a row that fail on every engine that was up before the run ends.
MAX_FAILED_PUSHES = 3


@dataclass
class Parts:
    """What one run is made of. `rollout` (the coordinator) and `sink` (the way weights take) exist on rank 0 only."""

    config: Config
    topology: Topology
    policy: Policy
    reference: ReferenceModel | BaseModel | None
    recorder: Recorder
    state: TrainState
    engine_dtype: torch.dtype
    share_prompts: bool
    checkpointer: Checkpointer
    syncs_adapter: bool = False  #: engines get the adapter that is trained, and nothing else
    teacher: ReferenceModel | ServedTeacher | None = None
    critic: Critic | None = None
    rollout: RolloutHost | None = None
    sink: FleetSink | None = None
    demonstrations: list[TrainSample] = field(default_factory=list)  #: what a warm-up imitates
    receivers: list[WeightReceiver] = field(default_factory=list)  #: the engines that the next push shall reach
    failed_pushes: int = 0
    skipped: SkippedUpdates = field(init=False)  #: updates whose loss or gradient is not finite

    def __post_init__(self) -> None:
        self.skipped = SkippedUpdates(self.config.trainer.max_nonfinite_updates, lambda message: self.recorder.note(message))


def train(parts: Parts) -> TrainState:
    """Runs the remaining steps; returns the state after the last one."""
    config, recorder = parts.config, parts.recorder
    warmed_up = warm_up(parts)
    if parts.state.step == 0:
        if parts.state.warmup_steps > 0 or config.lora.path or config.rollout.quantization != "none":
            push_weights(parts, 0)
        recorder.record(0, warmed_up | evaluate(parts, 0))
    for step in range(parts.state.step + 1, config.trainer.max_steps + 1):
        with recorder.phase("rollout"):
            groups, flight = collect(parts, step)
        samples = to_samples(groups, policy_version=parts.state.policy_version)
        shaped = shape_rewards(samples, groups, config.sampling, max_new_tokens=config.rollout.max_new_tokens)
        with recorder.phase("score"):
            score_samples(parts, samples)
        with recorder.phase("pack"):
            kl_coef = parts.policy.kl_coef = current_kl_coef(parts)
            shares = compute_advantages(samples, config.algorithm, kl_coef=kl_coef)
            divided, selected = select_trained(split_updates(samples, config.trainer.updates_per_step), groups, config.sampling)
            batches = [pack(config, parts.topology, update, share_prompts=parts.share_prompts) for update in divided]
        with recorder.phase("logprobs"):
            fill_logprobs(parts, batches)
        with recorder.phase("train"):
            updates = train_critic(parts, step, divided, batches) + train_policy(parts, step, divided, batches)
        with recorder.phase("sync"):
            version = push_weights(parts, step)
        metrics = rollout_metrics(groups) | flight | shaped | shares | selected | mean_metrics(updates)
        metrics |= parts.skipped.take_metrics()
        if config.rollout.probe_after_sync:
            with recorder.phase("probe"):
                metrics |= probe_engine(parts.policy, parts.rollout, groups, config, parts.topology)
        metrics |= adapt_kl_coef(parts, metrics, len(samples))
        parts.state = advance(parts, step, groups)
        metrics |= evaluate(parts, step) | settle_checkpoint(parts, parts.checkpointer.poll())
        # The line is written before the checkpoint: a run killed in between repeats the step and rewrites the line.
        recorder.record(step, metrics, samples=samples, version=version)
        with recorder.phase("checkpoint"):
            maybe_save(parts, step, metrics)
    settle_checkpoint(parts, parts.checkpointer.finish())
    return parts.state


def collect(parts: Parts, step: int) -> tuple[list[TrajectoryGroup], Metrics]:
    """One step's trajectory groups and the rollout side's numbers, the same on every rank.

    An engine that came up meanwhile, in place of a dead one, gets the current weights first: pushing takes every rank.
    """
    while True:
        taken = wait_for_rollout(parts, step) if parts.rollout is not None else None
        taken = parts.topology.broadcast_object(taken, phase=f"rollout of step {step}")
        if taken.groups is not None:
            return taken.groups, taken.metrics
        push_weights(parts, parts.state.policy_version, stale_only=True)


def wait_for_rollout(parts: Parts, step: int) -> Taken:
    """The step's groups, or the news that an engine wants weights; rank 0 only. Finished groups count as progress."""
    num_finished = -1
    while True:
        taken = parts.rollout.call("take", step, patience_s=PATIENCE_S, timeout_s=parts.config.parallel.timeout_s)
        if taken.groups is not None or taken.needs_weights:
            return taken
        if taken.num_finished != num_finished:
            parts.topology.progress()
            num_finished = taken.num_finished


def pack(config: Config, topology: Topology, samples: list[TrainSample], *, share_prompts: bool) -> TrainBatch:
    """This rank's share of one update. Zero-advantage samples cost nothing unless another loss term wants them."""
    mark_tokens(samples, config.algorithm)
    return balance_and_pack(
        samples,
        tokens_per_micro_batch=config.trainer.tokens_per_micro_batch,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        skip_zero_advantage=skips_zero_advantage(config),
        share_prompts=share_prompts,
        **packing_multiples(config, topology),
    )


def skips_zero_advantage(config: Config) -> bool:
    """Whether a sample whose advantages are all zero has no part in the loss: no other term, and no critic, wants it."""
    algorithm = config.algorithm
    has_other_terms = algorithm.kl.coef != 0.0 or algorithm.entropy_coef != 0.0 or "values" in needs(algorithm)
    return not has_other_terms and bool(POLICY_LOSSES.find(algorithm.policy_loss).traits["scales_with_advantage"])


def fill_logprobs(parts: Parts, batches: list[TrainBatch]) -> None:
    """Reference logprobs where a KL term needs them; old logprobs where more than one update is made per step; a teacher's top-k.

    What the samples brought along (`score_samples`) is there already.
    """
    wants_old = len(batches) > 1 and parts.config.algorithm.old_logprobs == "policy"
    wants_routing = wants_old and parts.config.model.router_replay == "old"
    for batch in batches:
        if parts.reference is not None and any(micro_batch.ref_logprobs is None for micro_batch in batch.micro_batches):
            for micro_batch, logprobs in zip(batch.micro_batches, parts.reference.compute_logprobs(batch), strict=True):
                micro_batch.ref_logprobs = logprobs
        if wants_routing or (wants_old and any(micro_batch.old_logprobs is None for micro_batch in batch.micro_batches)):
            parts.policy.fill_old_logprobs(batch)
    fill_teacher_topk(parts.teacher, batches, parts.config, vocab_size=parts.policy.vocab_size)


def train_critic(parts: Parts, step: int, divided: list[list[TrainSample]], batches: list[TrainBatch]) -> list[Metrics]:
    """The critic's updates towards the step's returns; [] without one. A layout of its own has batches of its own."""
    critic = parts.critic
    if critic is None:
        return []
    with parts.recorder.phase("critic"):
        if critic.topology is not parts.topology:
            batches = [pack(critic.config, critic.topology, samples, share_prompts=parts.share_prompts) for samples in divided]
        updates = [partial(critic_update, parts, step, samples, batch) for samples, batch in zip(divided, batches, strict=True)]
        return [parts.skipped.attempt("critic", update) for update in updates]


def train_policy(parts: Parts, step: int, divided: list[list[TrainSample]], batches: list[TrainBatch]) -> list[Metrics]:
    """The policy's updates, of which there are none while `critic.warmup_steps` leave the step to the critic."""
    if parts.critic is not None and step <= parts.config.critic.warmup_steps:
        return [{"update/skipped": 1.0}]
    with record_step(parts, step, divided) as train_step:
        return [parts.skipped.attempt("update", partial(train_step, batch)) for batch in batches]


def current_kl_coef(parts: Parts) -> float:
    """The coefficient of the distance to the reference in this step: `kl.coef`, or where the steps before have steered it."""
    settings, steered = parts.config.algorithm.kl, parts.state.kl_coef
    return settings.coef if settings.target == 0 or steered is None else steered


def adapt_kl_coef(parts: Parts, metrics: Metrics, num_samples: int) -> Metrics:
    """Steers the coefficient of the next step by this step's distance, if `kl.target` says so; reports what this step used.

    Every rank does the same, since the metrics are the same. A step that did not train the policy changes nothing.
    """
    settings = parts.config.algorithm.kl
    if settings.coef == 0:
        return {}
    coef = current_kl_coef(parts)
    distance = metrics.get("reward/kl" if settings.place == "reward" else "policy/kl_ref")
    if settings.target > 0 and distance is not None and metrics.get("update/skipped", 0.0) < 1.0:
        steered = next_kl_coef(coef, distance, target=settings.target, horizon=settings.horizon, num_samples=num_samples)
        parts.state = replace(parts.state, kl_coef=steered)
    return {"policy/kl_coef": coef}


def push_weights(parts: Parts, version: int, *, stale_only: bool = False) -> WeightVersion | None:
    """Publishes the policy's weights to the engines as `version`; the proof on rank 0, None elsewhere. *All ranks.*

    `stale_only`: to the engines that wait for weights. Engines that did not take them are replaced or wait for the next push,
    and so do all engines where none took them; but a run whose pushes go on failing ends.
    """
    config = parts.config
    timeout_s, bucket_bytes = config.parallel.timeout_s, config.rollout.weight_bucket_mib * 2**20
    if parts.rollout is not None:
        parts.receivers[:] = parts.rollout.call("receivers", stale_only=stale_only, timeout_s=timeout_s)
    proof = None
    try:
        source = parts.policy.adapter_source if parts.syncs_adapter else parts.policy
        proof = publish(
            as_engines_take(source, config.rollout), parts.sink, version, parts.engine_dtype, bucket_bytes=bucket_bytes
        )
        parts.failed_pushes = 0
    except WeightSyncError as error:
        parts.failed_pushes += bool(parts.receivers)  # while all engines are being replaced there is nobody to fail
        if parts.failed_pushes == MAX_FAILED_PUSHES:
            raise
        parts.recorder.note(f"warning: no engine took weight version {version}: {error}")
    if parts.rollout is not None:
        served = [r.name for r in parts.receivers if r.name not in proof.failed] if proof is not None else []
        parts.rollout.call("published", version, proof, served, timeout_s=timeout_s)
        for name, reason in proof.failed.items() if proof is not None else ():
            parts.recorder.note(f"warning: engine {name} did not take weight version {version}: {reason}")
    return proof


def evaluate(parts: Parts, step: int) -> Metrics:
    """Held-out accuracy before the first step, after the last, and every `evaluation.interval_steps`; {} otherwise."""
    settings = parts.config.evaluation
    due = step in (0, parts.config.trainer.max_steps) or (settings.interval_steps > 0 and step % settings.interval_steps == 0)
    if settings.num_prompts == 0 or not due:
        return {}
    with parts.recorder.phase("evaluate"):
        metrics = None
        if parts.rollout is not None:
            metrics = parts.rollout.call("evaluate", settings.num_prompts, timeout_s=parts.config.parallel.timeout_s)
        return parts.topology.broadcast_object(metrics, phase=f"evaluation at step {step}")


def advance(parts: Parts, step: int, groups: list[TrajectoryGroup]) -> TrainState:
    """The run's state once `step` is trained and its weights are published."""
    source = parts.state.prompt_source
    if parts.rollout is not None:
        source = parts.rollout.call("source_state", timeout_s=parts.config.parallel.timeout_s)
    return replace(
        parts.state,
        step=step,
        policy_version=step,
        prompt_source=source,
        num_trained_groups=parts.state.num_trained_groups + sum(not group.is_replayed for group in groups),
        num_optimizer_steps=parts.policy.num_updates,
        num_nonfinite_skipped=parts.state.num_nonfinite_skipped + parts.skipped.take_total(),
        num_critic_updates=parts.critic.num_updates if parts.critic is not None else None,
        elapsed_train_s=parts.state.elapsed_train_s + parts.recorder.step_seconds(),
    )


def maybe_save(parts: Parts, step: int, metrics: Metrics) -> None:
    """Begins a checkpoint every `checkpoint.interval_steps` and after the last step."""
    interval = parts.config.checkpoint.interval_steps
    if interval and (step % interval == 0 or step == parts.config.trainer.max_steps):
        parts.checkpointer.save(parts.policy, parts.state, metrics, critic=parts.critic)
        for trained in filter(None, (parts.policy, parts.critic)):
            trained.park_optimizer()


def settle_checkpoint(parts: Parts, metrics: Metrics) -> Metrics:
    """The numbers of a checkpoint that is complete ({} if there is none); the ledger may let go of what no resume needs."""
    if parts.rollout is not None and "checkpoint/step" in metrics:
        steps = [step_of(path) for path in list_checkpoints(parts.config.trainer.run_dir)]
        oldest = min(sorted(steps)[-parts.config.checkpoint.keep_last :])
        parts.rollout.call("checkpointed", max(steps), oldest, timeout_s=parts.config.parallel.timeout_s)
    return metrics


def mean_metrics(updates: list[Metrics]) -> Metrics:
    """The mean of each number over the step's updates that report it."""
    names = {name: None for update in updates for name in update}
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}
