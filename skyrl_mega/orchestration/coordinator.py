"""The rollout side of a run: begins prompt groups, keeps them in flight, and gives finished ones to the trainer.

One object for every mode; only `trainer.max_staleness` and the engines differ. It lives in one event loop: that of the trainer's
own thread while it waits, of a thread beside it, or of a process of its own (see `rollout_host`).

Each group that it begins is in the ledger first, and each transition of it too: what is in flight is lost with the process, and
begun again by the one that resumes; what was finished is not.

A step gets the groups of the earliest deadlines among those that have finished, once the others can still make it (`admission`).
So a long response delays a step only where it would become too stale otherwise, and is never left out for its length.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from skyrl_mega.agents.greedy_baseline import run_with_baseline
from skyrl_mega.config.schema import Config
from skyrl_mega.data.ledger import Ledger
from skyrl_mega.data.sampling.dynamic import ResampleBudget, has_signal
from skyrl_mega.data.sampling.replay import choose_replayed, interleave, replays_per_step
from skyrl_mega.orchestration.admission import Admission
from skyrl_mega.orchestration.evaluation import EvalSuite, Evaluation, SuiteResult
from skyrl_mega.orchestration.flight import FlightStats
from skyrl_mega.protocols import CurriculumSource, EngineFleet, GroupRunner, PromptSource, WeightReceiver
from skyrl_mega.telemetry.rollout_trace import COORDINATOR, TRANSFERS, RolloutTrace
from skyrl_mega.types import Metrics, PromptGroup, TrajectoryGroup, WeightVersion

#: Seconds after which a `take` that waits looks whether an engine wants weights.
LOOK_AGAIN_S = 0.5

#: vLLM's level of sleep that keeps neither weights nor KV cache.
DISCARD_WEIGHTS = 2

NO_SIGNAL, ENV_FAILED, REWARD_FAILED, TOO_STALE = "no learning signal", "environment failed", "reward failed", "too stale"


@dataclass(frozen=True)
class Taken:
    """What `take` came back with: a step's groups and numbers; or none yet, and whether engines wait for weights.

    `num_finished` grows with every group that finishes: a sign that rollouts go on.
    """

    groups: list[TrajectoryGroup] | None = None
    metrics: Metrics = field(default_factory=dict)
    needs_weights: bool = False
    num_finished: int = 0


@dataclass(frozen=True)
class EvaluationState:
    """Samples of an evaluation that have finished, of how many; the results once all have."""

    num_finished: int
    num_total: int
    results: list[SuiteResult] | None = None


@dataclass
class Outstanding:
    """A group that was begun, or waits to be begun again, and is not yet taken. `deadline`: the last version it may train."""

    seq: int
    group_id: str
    deadline: int
    prompt: PromptGroup | None = None  #: None for a group that an earlier process finished
    was_ended_early: bool = False
    open_samples: int = 0  #: of those that an engine or an environment still works on
    task: asyncio.Task[None] | None = None
    finished: TrajectoryGroup | None = None


class RolloutCoordinator:
    """See the module's text. All coroutines run in one event loop; the trainer's rank 0 makes one call at a time."""

    def __init__(
        self,
        config: Config,
        source: PromptSource,
        runner: GroupRunner,
        fleet: EngineFleet,
        ledger: Ledger,
        trace: RolloutTrace | None = None,
        *,
        greedy_baseline: bool = False,
        eval_runner: GroupRunner | None = None,
        eval_tasks: Sequence[EvalSuite] = (),
    ) -> None:
        """`greedy_baseline`: one greedy answer to each prompt beside its samples, for advantages that need it.

        `eval_runner` plays the run's own task as evaluations sample (None: as `runner` does), `eval_tasks` are further ones.
        """
        trainer = config.trainer
        self._config = config
        self._source, self._runner, self._fleet, self._ledger = source, runner, fleet, ledger
        self._curriculum = source if isinstance(source, CurriculumSource) else None
        self._budget = ResampleBudget(config.sampling, trainer.prompts_per_step)
        self._admission = Admission(
            trainer.prompts_per_step, trainer.max_staleness, trainer.max_steps, config.rollout.oversampling
        )
        self._greedy_baseline = greedy_baseline
        self._episodes_per_group = trainer.samples_per_prompt + greedy_baseline
        # Synchronous engines on the trainer's GPUs give it their memory while it trains; it pushes all weights anyway.
        self._takes_turns = trainer.max_staleness == 0 and config.rollout.colocated
        self._version = self._next_version = 0
        self._next_seq = 0
        self._outstanding: dict[str, Outstanding] = {}
        self._to_begin: deque[Outstanding] = deque()
        self._replay: dict[int, list[str]] = {}
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._wait_began: float | None = None
        self._num_finished = 0
        self._stats = FlightStats()
        self._trace = trace
        self._eval_runner, self._eval_tasks = eval_runner, list(eval_tasks)
        self._evaluation: Evaluation | None = None

    # -- what the trainer calls -----------------------------------------------------------------------------------------

    async def resume(self, step: int, source_state: Mapping[str, Any]) -> str:
        """Goes on after `step` trained steps (0: a new run); returns a line on what was found, "" if nothing.

        `source_state`: the prompt source's state in the checkpoint, for a run that has no ledger. Raises LedgerError, DataError.
        """
        found = self._ledger.rollback(step)
        if state := found.prompt_source or source_state:
            self._source.load_state_dict(state)
        self._version = self._next_version = step
        self._next_seq = max(found.next_seq, step * self._admission.groups_per_step if found.prompt_source is None else 0)
        replayed = [finished for groups in found.replay.values() for finished in groups]
        for finished in [*replayed, *found.waiting]:
            [group] = self._ledger.load([finished.group_id])
            deadline = finished.min_policy_version + self._admission.max_staleness
            self._outstanding[finished.group_id] = Outstanding(finished.seq, finished.group_id, deadline, finished=group)
        self._replay = {number: [finished.group_id for finished in groups] for number, groups in found.replay.items()}
        self._to_begin.extend(Outstanding(-1, group.group_id, 0, prompt=group) for group in found.unfinished)
        if not (replayed or found.waiting or found.unfinished):
            return ""
        return (
            f"from the ledger: {len(replayed)} groups to train again as they were, {len(found.waiting)} finished, "
            f"{len(found.unfinished)} to begin again"
        )

    async def take(self, step: int, *, patience_s: float) -> Taken:
        """The groups of `step`, which trains version step - 1; without `groups` if they are not there after `patience_s`.

        Raises what an engine or an environment raised, DataError for a prompt that is too long.
        """
        self._wait_began = self._wait_began or time.perf_counter()
        give_up_at = time.perf_counter() + patience_s
        while True:
            self._admit()
            if self._failure is not None:
                raise self._failure
            if chosen := self._choose(step):
                taken = self._hand_over(step, chosen)
                if self._takes_turns:
                    await self._fleet.sleep(DISCARD_WEIGHTS)
                return taken
            if self._fleet.needs_weights():
                return Taken(needs_weights=True, num_finished=self._num_finished)
            left_s = give_up_at - time.perf_counter()
            if left_s <= 0:
                return Taken(num_finished=self._num_finished)
            self._changed.clear()
            await _wait(self._changed, min(left_s, LOOK_AGAIN_S))

    async def rest(self) -> None:
        """Engines that take turns with the trainer give it their memory; they want its weights before they serve again."""
        if self._takes_turns:
            await self._fleet.sleep(DISCARD_WEIGHTS)

    async def published(self, version: int, proof: WeightVersion | None, names: Sequence[str]) -> None:
        """Says that step `version` is trained, and that the engines `names` serve its weights.

        `proof` is None where no engine took them: those that come up are then given weights before they serve. For the version
        that was published last, again: engines that waited for it have it now.
        """
        await self.serve(version, names)
        if self._trace is not None and proof is not None:
            self._trace.write(
                TRANSFERS, 0, f"weights {version}", proof.seconds["total"], {"engines": len(names), **proof.seconds}
            )
        if version > self._version:
            self._version = version
            self._ledger.trained(version, proof)
            self._admit_ahead()
        elif proof is not None:
            self._ledger.weight_version(proof, version)

    async def serve(self, version: int, names: Sequence[str]) -> None:
        """Says that the engines `names` have the weights of `version`, without any training (an evaluation)."""
        await self._fleet.weights_arrived(version, names)
        if self._takes_turns:
            await self._fleet.wake(["kv_cache"])

    async def checkpointed(self, step: int, oldest_kept_step: int) -> None:
        """Says that no resume will go back beyond `oldest_kept_step`."""
        self._ledger.checkpointed(step, oldest_kept_step)

    async def evaluate(self, num_prompts: int) -> Metrics:
        """Numbers on the first `num_prompts` held-out prompts, and on those of `evaluation.tasks`: `eval/accuracy`, ...

        With several terms of the reward, `eval/reward_<name>` is the mean of each, and `eval/reward_env` the environment's.
        """
        await self.begin_evaluation(num_prompts)
        try:
            results = (await self.evaluated(patience_s=None)).results or []
        finally:
            await self._end_evaluation()
        return {name: value for result in results for name, value in result.metrics.items()}

    async def begin_evaluation(self, num_prompts: int) -> None:
        """Begins what `evaluate` does, for `evaluated` to wait for."""
        await self._end_evaluation()
        settings = self._config.evaluation
        own = EvalSuite("", self._source, self._eval_runner or self._runner, num_prompts, settings.samples_per_prompt)
        self._evaluation = Evaluation([own, *self._eval_tasks], settings)

    async def evaluated(self, *, patience_s: float | None) -> EvaluationState:
        """How far the evaluation is, after `patience_s` seconds at the most; with its results once it has ended."""
        assert self._evaluation is not None, "begin_evaluation comes first"
        results = await self._evaluation.wait(patience_s)
        return EvaluationState(self._evaluation.num_finished, self._evaluation.num_total, results)

    async def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            await self._evaluation.cancel()
            self._evaluation = None

    async def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities by one of the engines, as `AsyncEngine.score`."""
        return await self._fleet.score(sequences)

    async def receivers(self, *, stale_only: bool = False) -> list[WeightReceiver]:
        """The weight controls of the engines that serve or wait for weights; `stale_only`: of those that wait."""
        if self._takes_turns:
            await self._fleet.wake(["weights"])
        return self._fleet.receivers(stale_only=stale_only)

    async def source_state(self) -> Mapping[str, Any]:
        """The prompt source's state, for a checkpoint."""
        return self._source.state_dict()

    async def close(self) -> None:
        """Ends what is in flight (a resumed run begins it again), the engines, and the ledger."""
        tasks = [o.task for o in self._outstanding.values() if o.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._end_evaluation()
        await self._runner.close()
        await self._fleet.close()
        self._ledger.close()
        if self._trace is not None:
            self._trace.close()

    # -- admission ------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Begins as many groups as may be, those that were begun before first."""
        room = self._admission.room(self._version, self._next_version, len(self._outstanding))
        if self._admission.max_staleness > 0:
            free_slots = self._fleet.num_slots() - sum(o.open_samples for o in self._outstanding.values())
            room = min(room, math.ceil(free_slots / self._episodes_per_group))
        if room <= 0 or self._failure is not None:
            return
        self._draw(room - len(self._to_begin))
        for _ in range(room):
            outstanding = self._to_begin.popleft()
            outstanding.deadline = self._admission.deadline(self._version)
            outstanding.open_samples = self._episodes_per_group
            self._outstanding[outstanding.group_id] = outstanding
            outstanding.task = asyncio.get_running_loop().create_task(self._run(outstanding))

    def _admit_ahead(self) -> None:
        """What may begin while the trainer is busy: nothing in synchronous training. What fails is raised by the next `take`."""
        if self._admission.max_staleness == 0:
            return
        try:
            self._admit()
        except Exception as error:  # noqa: BLE001 (raised by `take`; prompts that were drawn must not be passed over)
            self._failure = self._failure or error
            self._changed.set()

    def _draw(self, count: int) -> None:
        if count <= 0:
            return
        per_step, samples = self._admission.groups_per_step, self._config.trainer.samples_per_prompt
        groups = []
        for seq, prompt in enumerate(self._source.next(count), start=self._next_seq):
            # Its step and place if all groups are trained in order. Names, and with them seeds, repeat in a resumed run.
            group_id = f"{seq // per_step + 1}/{seq % per_step}/{prompt.prompt_id}"
            groups.append(PromptGroup(group_id, prompt, samples))
        self._ledger.issue(groups, policy_version=self._version, source_state=self._source.state_dict())
        self._to_begin.extend(
            Outstanding(seq, group.group_id, 0, prompt=group) for seq, group in enumerate(groups, start=self._next_seq)
        )
        self._next_seq += count

    async def _run(self, outstanding: Outstanding) -> None:
        """One group from beginning to end. What fails here is raised by the next `take`."""
        assert outstanding.prompt is not None
        self._stats.begin()
        span = self._trace.begin(COORDINATOR) if self._trace is not None else None

        def sample_ended() -> None:
            outstanding.open_samples -= 1
            self._admit_ahead()

        try:
            if self._greedy_baseline:
                group = await run_with_baseline(self._runner, outstanding.prompt, on_sample=sample_ended)
            else:
                group = await self._runner(outstanding.prompt, on_sample=sample_ended)
            self._finish(outstanding, group)
        except Exception as error:  # noqa: BLE001 (raised by `take`)
            self._failure = self._failure or error
        finally:
            outstanding.open_samples = 0
            self._stats.end()
            if span is not None:
                span.end(outstanding.group_id, deadline=outstanding.deadline)
                self._trace_buffer()
            self._changed.set()
        self._admit_ahead()

    def _trace_buffer(self) -> None:
        if self._trace is not None:
            ready = sum(o.finished is not None for o in self._outstanding.values())
            self._trace.count("groups", ready=ready, in_flight=len(self._outstanding) - ready)

    def _finish(self, outstanding: Outstanding, group: TrajectoryGroup) -> None:
        self._num_finished += 1
        self._stats.count("env_masked", group.num_masked)
        self._stats.count("env_retries", group.num_retries)
        for name, number in group.reward_errors.items():
            self._stats.count(f"reward_errors_{name}", number)
        lacks_baseline = self._greedy_baseline and group.baseline_reward is None
        if lacks_baseline or len(group.trajectories) < min(2, self._config.trainer.samples_per_prompt):
            return self._drop(outstanding, REWARD_FAILED if group.reward_errors else ENV_FAILED)
        if self._curriculum is not None:
            # What the source learns of a group is in the ledger exactly if the group is.
            self._curriculum.observe(group)
            self._ledger.finish(group, source_state=self._curriculum.state_dict())
        else:
            self._ledger.finish(group)
        if self._budget.leaves_out(group):
            return self._drop(outstanding, NO_SIGNAL)
        outstanding.finished = group

    def _drop(self, outstanding: Outstanding, reason: str) -> None:
        self._ledger.drop([outstanding.group_id], reason)
        self._stats.count(f"dropped_{reason.replace(' ', '_')}")
        del self._outstanding[outstanding.group_id]

    # -- a step's groups ------------------------------------------------------------------------------------------------

    def _choose(self, step: int) -> list[Outstanding]:
        """The step's groups in order of admission; [] while they are not there."""
        if step in self._replay:
            return [self._outstanding[group_id] for group_id in self._replay[step]]
        version = step - 1
        self._end_early([o for o in self._not_reserved() if o.deadline < version])
        open_groups = self._not_reserved()
        finished = [o for o in open_groups if o.finished is not None]
        if len(finished) < self._admission.groups_per_step:
            return []
        finished.sort(key=lambda o: (o.deadline, not o.was_ended_early, o.seq))
        chosen = finished[: self._admission.groups_per_step]
        if not self._admission.leaves_enough_time(version, [o.deadline for o in chosen], [o.deadline for o in open_groups]):
            return []
        if any(o.was_ended_early and o.deadline <= version and o not in chosen for o in open_groups):
            return []
        return sorted(chosen, key=lambda o: o.seq)

    def _not_reserved(self) -> list[Outstanding]:
        """The groups that no step of an earlier process has."""
        reserved = {group_id for group_ids in self._replay.values() for group_id in group_ids}
        return [o for o in self._outstanding.values() if o.group_id not in reserved]

    def _hand_over(self, step: int, chosen: list[Outstanding]) -> Taken:
        version = step - 1
        replayed = self._choose_replayed(step)
        self._ledger.take(step, [o.group_id for o in chosen], version, replayed=[group.group_id for group in replayed])
        self._budget.step_taken()
        self._replay.pop(step, None)
        for outstanding in chosen:
            del self._outstanding[outstanding.group_id]
        self._next_version = step
        self._end_early([o for o in self._not_reserved() if o.deadline <= version])
        groups = [o.finished for o in chosen if o.finished is not None]
        wait_s = time.perf_counter() - (self._wait_began or time.perf_counter())
        self._wait_began = None
        ready = sum(o.finished is not None for o in self._outstanding.values())
        metrics = self._stats.step(groups, version, wait_s=wait_s, ready=ready) | self._fleet.metrics()
        metrics |= self._sampling_metrics(groups, replayed, version)
        self._trace_buffer()
        self._admit_ahead()
        groups = interleave(groups, replayed, self._config.trainer.updates_per_step)
        return Taken(groups, metrics, num_finished=self._num_finished)

    def _choose_replayed(self, step: int) -> list[TrajectoryGroup]:
        """The groups that `step` trains again, marked as such."""
        trainer, wanted = self._config.trainer, replays_per_step(self._config)
        if wanted == 0:
            return []
        candidates = self._ledger.replayable(step)
        chosen = choose_replayed(candidates, wanted, updates=trainer.updates_per_step, seed=trainer.seed, step=step)
        return [replace(group, is_replayed=True) for group in self._ledger.load(chosen)]

    def _sampling_metrics(self, groups: Sequence[TrajectoryGroup], replayed: Sequence[TrajectoryGroup], version: int) -> Metrics:
        """`sampling/...`: groups without a signal that fill the step, groups replayed and how stale they are, the curriculum."""
        sampling, metrics = self._config.sampling, Metrics()
        if sampling.dynamic:
            metrics["sampling/filled_without_signal"] = float(sum(not has_signal(group) for group in groups))
        if sampling.replay.share > 0:
            metrics["sampling/replayed"] = float(len(replayed))
        if replayed:
            stale = [version - group.min_policy_version for group in replayed]
            metrics["sampling/replay_staleness_mean"] = sum(stale) / len(stale)
        if self._curriculum is not None:
            metrics |= self._curriculum.metrics()
        return metrics

    def _end_early(self, late: list[Outstanding]) -> None:
        """Ends the groups that oversampling began in vain; they are begun again, and then waited for.

        Where a resumed run lowered `trainer.max_staleness`, groups that were finished before may be too stale for it.
        """
        for outstanding in late:
            if outstanding.prompt is None:
                self._drop(outstanding, TOO_STALE)
                continue
            self._ledger.early_stop([outstanding.group_id])
            self._stats.count("ended_early")
            if outstanding.task is not None:
                outstanding.task.cancel()
            del self._outstanding[outstanding.group_id]
            self._to_begin.append(
                Outstanding(outstanding.seq, outstanding.group_id, 0, prompt=outstanding.prompt, was_ended_early=True)
            )


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
