"""The rollout coordinator with a scripted runner: which groups a step gets, and that none is lost or trained twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from skyrl_mega.algorithms.advantages import compute_advantages
from skyrl_mega.config.schema import (
    AlgorithmConfig,
    Config,
    EnvConfig,
    ModelConfig,
    ReplayConfig,
    RolloutConfig,
    SamplingConfig,
    TrainerConfig,
)
from skyrl_mega.data.ledger import Ledger
from skyrl_mega.data.ledger_audit import audit
from skyrl_mega.data.prompts import RowPromptSource
from skyrl_mega.data.samples import to_samples
from skyrl_mega.data.sampling.curriculum import CurriculumPromptSource
from skyrl_mega.errors import EnvError, LedgerError, RolloutError
from skyrl_mega.orchestration.coordinator import RolloutCoordinator
from skyrl_mega.types import Prompt, PromptGroup, StopReason, Trajectory, TrajectoryGroup, Turn, WeightVersion

B, SAMPLES = 4, 2


def make_config(*, staleness=0, oversampling=0.0, max_steps=100, updates=1, **sampling) -> Config:
    return Config(
        model=ModelConfig(path="x"),
        env=EnvConfig("x"),
        rollout=RolloutConfig(oversampling=oversampling),
        sampling=SamplingConfig(**sampling),
        trainer=TrainerConfig(
            prompts_per_step=B, samples_per_prompt=SAMPLES, max_staleness=staleness, max_steps=max_steps, updates_per_step=updates
        ),
    )


class CountingSource:
    def __init__(self) -> None:
        self.index = 0

    def next(self, count):
        self.index += count
        return [Prompt(f"p{n}", {"n": n}) for n in range(self.index - count, self.index)]

    def eval_prompts(self, count):
        return [Prompt(f"e{n}", {"n": n}) for n in range(count)]

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]


@dataclass
class ScriptedRunner:
    """Finishes a group when told to, or at once; the fleet's version samples it."""

    fleet: ScriptedFleet
    held: set[int] = field(default_factory=set)
    rewards: dict[int, tuple[float, ...]] = field(default_factory=dict)
    begun: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    error: Exception | None = None
    open: int = 0
    most_open: int = 0
    gates: dict[int, asyncio.Event] = field(default_factory=dict)
    greedy: dict[int, float | Exception | None] | None = None  #: rewards of greedy answers by prompt; None: masked

    async def answer_greedily(self, group, on_sample):
        reward = self.greedy.get(group.prompt.payload["n"], 0.5)
        await asyncio.sleep(0)
        if isinstance(reward, Exception):
            raise reward
        on_sample()
        answers = () if reward is None else (episode(self.fleet.version, reward),)
        return TrajectoryGroup(group.group_id, group.prompt.prompt_id, answers, num_masked=1 - len(answers))

    async def __call__(self, group: PromptGroup, *, greedy=False, on_sample=lambda: None) -> TrajectoryGroup:
        if greedy and self.greedy is not None:
            assert group.num_samples == 1
            return await self.answer_greedily(group, on_sample)
        self.begun.append(group.group_id)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        number = group.prompt.payload["n"]
        version = self.fleet.version
        if self.error is not None:
            raise self.error
        try:
            await asyncio.sleep(0)
            if number in self.held:
                await self.gates.setdefault(number, asyncio.Event()).wait()
        except asyncio.CancelledError:
            self.cancelled.append(group.group_id)
            raise
        rewards = self.rewards.get(number, (0.0, 1.0))
        rewards = rewards[: group.num_samples]
        self.open -= 1
        for _ in range(group.num_samples):
            on_sample()
        return TrajectoryGroup(group.group_id, group.prompt.prompt_id, tuple(episode(version, r) for r in rewards))

    async def close(self) -> None:
        return None

    def release(self, number: int) -> None:
        self.held.discard(number)
        self.gates.setdefault(number, asyncio.Event()).set()


class ScriptedFleet:
    def __init__(self, version: int = 0) -> None:
        self.version = version
        self.waiting: list[str] = []
        self.slots = 1000
        self.calls: list[str] = []

    def needs_weights(self):
        return self.waiting

    def receivers(self, *, stale_only=False):
        return []

    async def weights_arrived(self, version, names):
        self.version = version
        self.waiting = [name for name in self.waiting if name not in names]
        self.calls.append("arrived")
        return names

    async def sleep(self, level):
        self.calls.append(f"sleep {level}")

    async def wake(self, tags):
        self.calls.append(f"wake {tags[0]}")

    async def score(self, sequences):
        return [[0.0] * len(sequence) for sequence in sequences]

    def num_slots(self):
        return self.slots

    def metrics(self):
        return {"fleet/engines": 1.0}

    async def close(self):
        return None


def episode(version: int, reward: float) -> Trajectory:
    turns = (Turn(1, 3, StopReason.STOP, reward),)
    return Trajectory([1, 2, 3], [0, 1, 1], [0.0, -1.0, -1.0], [-1, version, version], turns, reward, True, False)


class Rig:
    """A coordinator over a ledger on disk; `again` is the process that resumes after a kill."""

    def __init__(self, run_dir, step=0, source=None, greedy=None, **settings) -> None:
        self.run_dir, self.config = run_dir, make_config(**settings)
        self.ledger = Ledger.open(
            run_dir / "ledger.sqlite",
            identity={"seed": 0},
            prompts_per_step=B,
            max_staleness=self.config.trainer.max_staleness,
            replay_max_age=self.config.sampling.replay.max_age if self.config.sampling.replay.share else 0,
        )
        self.fleet = ScriptedFleet(step)
        self.runner = ScriptedRunner(self.fleet, greedy=greedy)
        self.source = source or CountingSource()
        self.coordinator = RolloutCoordinator(
            self.config, self.source, self.runner, self.fleet, self.ledger, greedy_baseline=greedy is not None
        )

    async def take(self, step, patience_s=5.0):
        return await self.coordinator.take(step, patience_s=patience_s)

    async def train(self, step):
        taken = await self.take(step)
        await self.publish(step)
        return taken

    async def publish(self, version):
        await self.coordinator.published(version, WeightVersion(version, 1, 1, "c"), ["engine"])

    def audit(self):
        found = audit(self.ledger.file)
        assert found.passed, found.findings

    def kill(self):
        self.ledger.close()


def numbers(taken) -> list[int]:
    return [int(group.prompt_id[1:]) for group in taken.groups]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def test_synchronous_steps_take_their_own_prompts_in_order(tmp_path):
    async def scenario():
        rig = Rig(tmp_path)
        await rig.coordinator.resume(0, {})
        for step in (1, 2, 3):
            taken = await rig.train(step)
            assert numbers(taken) == list(range((step - 1) * B, step * B))
            assert taken.metrics["staleness/max"] == 0
            assert rig.source.index == step * B, "nothing is begun while a step is trained"
        assert [group.group_id for group in taken.groups] == [f"3/{i}/p{8 + i}" for i in range(B)]
        rig.audit()

    run(scenario())


@pytest.mark.parametrize("staleness", [0, 1])
def test_engines_on_the_trainers_gpus_sleep_while_it_trains_in_turns(tmp_path, staleness):
    async def scenario():
        rig = Rig(tmp_path, staleness=staleness)
        await rig.coordinator.resume(0, {})
        await rig.take(1)
        await rig.coordinator.receivers()
        await rig.publish(1)
        turns = ["sleep 2", "wake weights", "arrived", "wake kv_cache"]
        assert rig.fleet.calls == (["arrived"] if staleness else turns)

    run(scenario())


def test_a_slow_group_delays_only_the_step_for_which_it_is_due(tmp_path):
    async def scenario():
        rig = Rig(tmp_path, staleness=2)
        await rig.coordinator.resume(0, {})
        rig.runner.held = {1}
        seen = []
        for step in (1, 2):
            seen += numbers(await rig.train(step))
        assert 1 not in seen
        assert (await rig.take(3, patience_s=0.2)).groups is None, "version 0 sampled it: it is due when version 2 is trained"
        rig.runner.release(1)
        taken = await rig.take(3)
        assert 1 in numbers(taken)
        assert taken.metrics["staleness/max"] == 2
        await rig.publish(3)
        rig.audit()

    run(scenario())


def test_samples_without_a_score_are_counted_and_a_group_of_too_few_is_dropped(tmp_path):
    async def scenario():
        rig = Rig(tmp_path)
        play, masked = rig.runner.__call__, {1: (0.0,), 2: ()}

        async def run_group(group, **options):
            number = group.prompt.payload["n"]
            rig.runner.rewards = masked
            finished = await play(group, **options)
            left_out = SAMPLES - len(finished.trajectories)
            return replace(finished, num_masked=left_out, reward_errors={"judge": max(left_out, number == 3)})

        rig.coordinator._runner = run_group
        await rig.coordinator.resume(0, {})
        taken = await rig.take(1)
        assert numbers(taken) == [0, 3, 4, 5]
        assert (taken.metrics["flight/reward_errors_judge"], taken.metrics["flight/env_masked"]) == (4, 3)
        assert taken.metrics["flight/dropped_reward_failed"] == 2

    run(scenario())


def test_an_evaluation_reports_every_score(tmp_path):
    async def scenario():
        rig = Rig(tmp_path)

        async def run_group(group, **options):
            finished = await rig.runner(group, **options)
            scored = (replace(t, reward=1.5, reward_components={"env": 1.0, "judge": 0.5}) for t in finished.trajectories)
            return replace(finished, trajectories=tuple(scored))

        plain = await rig.coordinator.evaluate(3)
        rig.coordinator._runner = run_group
        metrics = await rig.coordinator.evaluate(3)
        assert {"eval/reward": 1.5, "eval/reward_env": 1.0, "eval/reward_judge": 0.5}.items() <= metrics.items()
        assert metrics["eval/accuracy"] == 1.0, "the environment's, which reports no accuracy of its own"
        assert metrics.keys() - plain.keys() == {"eval/reward_env", "eval/reward_judge"}

    run(scenario())


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_every_group_is_trained_once_within_the_bound(tmp_path, staleness):
    async def scenario():
        rig = Rig(tmp_path, staleness=staleness, max_steps=12)
        await rig.coordinator.resume(0, {})
        seen = []
        for step in range(1, 13):
            rig.runner.held = {n for n in range(60) if n % 7 == 3} if step < 12 else set()
            if step > staleness:
                for number in list(rig.runner.gates):
                    rig.runner.release(number)
            taken = None
            while taken is None or taken.groups is None:
                taken = await rig.take(step, patience_s=0.05)
                for number in list(rig.runner.gates) if taken.groups is None else []:
                    rig.runner.release(number)
            seen += numbers(taken)
            assert taken.metrics["staleness/max"] <= staleness
            await rig.publish(step)
        assert sorted(seen) == list(range(12 * B)), "each prompt once, and none begun in vain"
        rig.audit()

    run(scenario())


def test_no_group_is_begun_before_an_engine_has_room_for_it(tmp_path):
    async def scenario():
        rig = Rig(tmp_path, staleness=3)
        rig.fleet.slots = 3 * SAMPLES
        await rig.coordinator.resume(0, {})
        rig.runner.held = {0, 1, 2, 3}
        assert (await rig.take(1, patience_s=0.1)).groups is None
        assert len(rig.runner.begun) == 3
        for number in range(4):
            rig.runner.release(number)
        assert numbers(await rig.train(1)) == [0, 1, 2, 3]
        assert rig.runner.most_open == 3, "groups that end together make room for as many, not for more"
        rig.audit()

    run(scenario())


def test_groups_without_a_signal_are_replaced(tmp_path):
    async def scenario():
        rig = Rig(tmp_path, dynamic=True)
        await rig.coordinator.resume(0, {})
        rig.runner.rewards = {1: (1.0, 1.0), 4: (0.0, 0.0)}
        taken = await rig.train(1)
        assert numbers(taken) == [0, 2, 3, 5]
        assert taken.metrics["flight/dropped_no_learning_signal"] == 2
        rig.audit()
        rig.runner.rewards = dict.fromkeys(range(1000), (0.0, 0.0))
        with pytest.raises(RolloutError, match=r"81 groups had equal rewards before one step was full.*sampling.dynamic=false"):
            await rig.take(2)

    run(scenario())


@pytest.mark.parametrize("exhausted", ["train", "error"])
def test_each_step_may_leave_out_its_budget_of_groups(tmp_path, exhausted):
    async def scenario():
        rig = Rig(tmp_path, dynamic=True, max_resampled=0.5, when_exhausted=exhausted)
        await rig.coordinator.resume(0, {})
        rig.runner.rewards = dict.fromkeys((0, 1, 6, 9, 10, 11, 12), (1.0, 1.0))
        taken = await rig.train(1)
        assert numbers(taken) == [2, 3, 4, 5]
        assert taken.metrics["sampling/filled_without_signal"] == 0
        if exhausted == "error":
            with pytest.raises(RolloutError, match=r"3 groups had equal rewards .*sampling.max_resampled \(0.5 steps' worth\)"):
                await rig.take(2)
            return
        taken = await rig.train(2)
        assert numbers(taken) == [7, 8, 10, 11], "6 and 9 used the budget up"
        assert taken.metrics["sampling/filled_without_signal"] == 2
        assert numbers(await rig.train(3)) == [13, 14, 15, 16], "the budget of each step is its own"
        assert rig.ledger.counts().dropped_by_reason == {"no learning signal": 5}
        rig.audit()

    run(scenario())


# ---- groups trained again -------------------------------------------------------------------------------------------------

REPLAY = {"staleness": 1, "updates": 2, "replay": ReplayConfig(share=0.5, max_age=2)}


def test_a_step_replays_groups_of_the_steps_before_beside_its_own(tmp_path):
    async def scenario():
        rig = Rig(tmp_path, **REPLAY)
        await rig.coordinator.resume(0, {})
        trained: list[list[int]] = []
        for step in range(1, 9):
            taken = await rig.train(step)
            own = [int(g.prompt_id[1:]) for g in taken.groups if not g.is_replayed]
            replayed = [int(g.prompt_id[1:]) for g in taken.groups if g.is_replayed]
            assert own == list(range((step - 1) * B, step * B))
            assert len(set(replayed)) == len(replayed) == (2 if step > 1 else 0) == taken.metrics["sampling/replayed"]
            assert set(replayed) <= {number for groups in trained[-2:] for number in groups}
            if step > 1:
                assert [g.is_replayed for g in taken.groups] == [False, False, True] * 2, "each update has its share"
                assert taken.metrics["sampling/replay_staleness_mean"] >= 1
            assert taken.metrics["staleness/max"] <= 1, "of the step's own groups"
            trained.append(own)
            rig.ledger.checkpointed(step, step)
        counts = rig.ledger.counts()
        assert (counts.trained, counts.replayed) == (8 * B, 7 * 2)
        rig.audit()

    run(scenario())


def test_a_resumed_run_replays_in_each_step_what_the_killed_one_did(tmp_path):
    async def first():
        rig = Rig(tmp_path, **REPLAY)
        await rig.coordinator.resume(0, {})
        steps = [numbers(await rig.train(step)) for step in range(1, 4)]
        rig.ledger.checkpointed(3, 3)
        steps += [numbers(await rig.train(step)) for step in range(4, 7)]
        await rig.take(7)
        rig.kill()
        return steps

    async def second(steps):
        rig = Rig(tmp_path, step=3, **REPLAY)
        await rig.coordinator.resume(3, {})
        assert rig.ledger.counts().replayed == 4, "those of steps 2 and 3"
        assert [numbers(await rig.train(step)) for step in range(4, 7)] == steps[3:]
        await rig.train(7)
        assert (rig.ledger.counts().trained, rig.ledger.counts().replayed) == (7 * B, 6 * 2)
        rig.audit()

    run(second(run(first())))


# ---- a curriculum ---------------------------------------------------------------------------------------------------------


def make_curriculum() -> CurriculumPromptSource:
    return CurriculumPromptSource(RowPromptSource([{"n": n} for n in range(B)], [], 0, "rows"), 0)


def test_a_curriculum_learns_of_each_finished_group_once_also_across_a_kill(tmp_path):
    async def first():
        rig = Rig(tmp_path, source=make_curriculum())
        await rig.coordinator.resume(0, {})
        rig.runner.rewards = {0: (0.0, 1.0), 1: (1.0, 1.0), 2: (0.0, 0.0)}
        rig.runner.held = {3}
        assert (await rig.take(1, patience_s=0.1)).groups is None
        rig.kill()
        return rig.source

    async def second(source):
        rig = Rig(tmp_path, source=make_curriculum())
        await rig.coordinator.resume(0, {})
        assert rig.source.state_dict() == source.state_dict()
        assert [rig.source.success(f"rows:{n}") for n in range(B)] == [0.5, 1.0, 0.0, None]
        rig.runner.rewards = {1: (1.0, 1.0), 2: (0.0, 0.0)}
        taken = await rig.train(1)
        assert [rig.source.success(f"rows:{n}") for n in range(B)] == [0.5, 1.0, 0.0, 0.5]
        assert taken.metrics["sampling/curriculum_tried"] == 1.0
        drawn = Counter()
        for step in range(2, 12):
            drawn.update(group.prompt_id for group in (await rig.train(step)).groups)
        assert min(drawn["rows:0"], drawn["rows:3"]) > 3 * max(drawn["rows:1"], drawn["rows:2"]), drawn
        rig.audit()

    run(second(run(first())))


def test_a_group_whose_environment_failed_is_replaced(tmp_path):
    async def scenario():
        rig = Rig(tmp_path)
        await rig.coordinator.resume(0, {})
        rig.runner.rewards = {2: (1.0,), 3: ()}
        taken = await rig.train(1)
        assert numbers(taken) == [0, 1, 4, 5]
        assert taken.metrics["flight/dropped_environment_failed"] == 2
        rig.audit()

    run(scenario())


def test_oversampling_ends_the_slowest_and_waits_for_them_the_next_time(tmp_path):
    async def scenario():
        rig = Rig(tmp_path, oversampling=0.5)
        await rig.coordinator.resume(0, {})
        rig.runner.held = {1, 2}
        taken = await rig.train(1)
        assert numbers(taken) == [0, 3, 4, 5]
        assert taken.metrics["flight/in_flight"] == 0 or taken.metrics["flight/ready"] == 0
        assert (await rig.take(2, patience_s=0.2)).groups is None, "they were ended early once: now they are waited for"
        assert [name.split("/")[2] for name in rig.runner.cancelled] == ["p1", "p2"]
        rig.runner.release(1)
        rig.runner.release(2)
        taken = await rig.train(2)
        assert {1, 2} < set(numbers(taken))
        rig.audit()

    run(scenario())


def test_what_an_environment_raises_reaches_the_trainer(tmp_path):
    async def scenario():
        rig = Rig(tmp_path)
        await rig.coordinator.resume(0, {})
        rig.runner.error = EnvError("it broke")
        with pytest.raises(EnvError, match="it broke"):
            await rig.take(1)

    run(scenario())


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(tmp_path, staleness):
    """SQLite answers growth beyond a number of pages as it answers a full disk."""

    async def first():
        rig = Rig(tmp_path, staleness=staleness)
        await rig.coordinator.resume(0, {})
        trained = [numbers(await rig.train(1))]
        with rig.ledger.file.transaction() as db:
            [pages] = db.execute("PRAGMA page_count").fetchone()
            db.execute(f"PRAGMA max_page_count={pages + 1}")

        async def train_on():
            for step in range(2, 100):
                trained.append(numbers(await rig.take(step)))
                await rig.publish(step)

        with pytest.raises(LedgerError, match=r"the disk is full: .* goes on from its newest checkpoint"):
            await train_on()
        with pytest.raises(LedgerError, match="the disk is full"):
            await rig.take(len(trained) + 1)
        rig.audit()
        await rig.coordinator.close()
        return trained, rig.source.index

    async def second(trained, drawn):
        rig = Rig(tmp_path, step=1, staleness=staleness)
        await rig.coordinator.resume(1, {})
        seen = trained[0]
        for step in range(2, len(trained) + 4):
            seen = seen + numbers(await rig.train(step))
        assert len(set(seen)) == len(seen)
        outstanding = {int(o.group_id.rsplit("/p", 1)[1]) for o in rig.coordinator._outstanding.values()}
        assert set(range(drawn)) <= set(seen) | outstanding, "a prompt was drawn and never issued"
        rig.audit()

    trained, drawn = run(first())
    run(second(trained, drawn))


def test_prompts_whose_entry_into_the_ledger_fails_are_not_passed_over(tmp_path, monkeypatch):
    async def scenario():
        rig = Rig(tmp_path, staleness=1, dynamic=True)
        await rig.coordinator.resume(0, {})
        rig.runner.rewards = {0: (1.0, 1.0)}  # dropped: the end of this group makes room for another
        issue, calls = rig.ledger.issue, []

        def issue_but_once(*arguments, **options):
            calls.append(arguments)
            if len(calls) == 2:
                raise LedgerError("the disk is full")
            return issue(*arguments, **options)

        monkeypatch.setattr(rig.ledger, "issue", issue_but_once)

        async def train_on():
            for step in range(1, 20):
                await rig.train(step)

        with pytest.raises(LedgerError, match="the disk is full"):
            await train_on()
        assert len(calls) == 2, "after prompts were lost on the way others were issued"

    run(scenario())


def test_an_engine_that_wants_weights_is_reported_while_the_trainer_waits(tmp_path):
    async def scenario():
        rig = Rig(tmp_path)
        await rig.coordinator.resume(0, {})
        rig.runner.held = {0}
        rig.fleet.waiting = ["engine 1"]
        assert (await rig.take(1)).needs_weights
        await rig.coordinator.published(0, WeightVersion(0, 1, 1, "c"), ["engine 1"])
        rig.runner.release(0)
        assert numbers(await rig.take(1)) == [0, 1, 2, 3]

    run(scenario())


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_resumed_run_trains_the_same_groups_again_and_generates_none_that_was_finished(tmp_path, staleness):
    async def first():
        rig = Rig(tmp_path, staleness=staleness)
        await rig.coordinator.resume(0, {})
        steps = [numbers(await rig.train(step)) for step in (1, 2, 3)]
        rig.runner.held = {n for n in range(100) if n % 2}
        await rig.take(4, patience_s=0.2)
        rig.kill()
        return steps, rig.runner

    async def second(steps, before):
        rig = Rig(tmp_path, step=1, staleness=staleness)
        line = await rig.coordinator.resume(1, {})
        assert f"{2 * B} groups to train again" in line
        assert [numbers(await rig.train(step)) for step in (2, 3)] == steps[1:]
        seen = [number for step in steps for number in step]
        for step in (4, 5, 6):
            seen += numbers(await rig.train(step))
        assert len(set(seen)) == len(seen) == 6 * B
        finished_before = {name for name in before.begun if int(name.rsplit("/p", 1)[1]) not in before.held}
        assert not finished_before & set(rig.runner.begun), "finished groups are not generated again"
        started = {int(name.rsplit("/p", 1)[1]) for name in [*before.begun, *rig.runner.begun]}
        assert started - set(seen) <= {int(o.group_id.rsplit("/p", 1)[1]) for o in rig.coordinator._outstanding.values()}
        rig.audit()

    steps, before = run(first())
    run(second(steps, before))


def test_a_lower_bound_after_a_resume_drops_what_is_too_stale_for_it(tmp_path):
    async def first():
        rig = Rig(tmp_path, staleness=3)
        await rig.coordinator.resume(0, {})
        for step in (1, 2):
            await rig.train(step)
        rig.kill()

    async def second():
        rig = Rig(tmp_path, step=2, staleness=0)
        await rig.coordinator.resume(2, {})
        taken = await rig.train(3)
        assert taken.metrics["staleness/max"] == 0
        assert taken.metrics["flight/dropped_too_stale"] > 0
        rig.audit()

    run(first())
    run(second())


def test_evaluation_is_greedy_and_leaves_training_alone(tmp_path):
    async def scenario():
        rig = Rig(tmp_path)
        await rig.coordinator.resume(0, {})
        metrics = await rig.coordinator.evaluate(3)
        assert metrics["eval/prompts"] == 3
        assert rig.source.index == 0
        assert rig.ledger.next_seq == 0

    run(scenario())


# ---- a greedy answer beside each group -------------------------------------------------------------------------------------


def test_each_prompt_is_answered_greedily_beside_its_samples(tmp_path):
    async def scenario():
        rig = Rig(tmp_path, greedy={n: n / 10 for n in range(2 * B)})
        await rig.coordinator.resume(0, {})
        for step in (1, 2):
            taken = await rig.train(step)
            assert [group.baseline_reward for group in taken.groups] == [n / 10 for n in numbers(taken)]
            assert [len(group.trajectories) for group in taken.groups] == [SAMPLES] * B, "the answer is not trained"
            advantages = AlgorithmConfig(advantage="remax")
            samples = to_samples(taken.groups)
            compute_advantages(samples, advantages)
            expected = [reward - n / 10 for n in numbers(taken) for reward in (0.0, 1.0)]
            assert [float(s.advantages[s.loss_mask].mean()) for s in samples] == pytest.approx(expected)
        rig.audit()

    run(scenario())


def test_greedy_answers_survive_a_kill(tmp_path):
    async def first():
        rig = Rig(tmp_path, greedy={0: 0.25}, staleness=2)
        await rig.coordinator.resume(0, {})
        await rig.train(1)
        await rig.take(2)  # taken, and the process dies before it is trained
        await asyncio.sleep(0.05)
        rig.kill()

    async def second():
        rig = Rig(tmp_path, greedy=dict.fromkeys(range(60), -1.0), staleness=2)
        await rig.coordinator.resume(0, {})
        for step in (1, 2):
            taken = await rig.train(step)
            expected = [0.25 if n == 0 else 0.5 for n in numbers(taken)]
            assert [group.baseline_reward for group in taken.groups] == expected, "as the first process found them"
        assert not rig.runner.begun or min(int(g.rsplit("p", 1)[1]) for g in rig.runner.begun) >= 2 * B
        rig.audit()

    run(first())
    run(second())


def test_a_group_whose_greedy_answer_failed_is_replaced(tmp_path):
    async def scenario():
        rig = Rig(tmp_path, greedy={1: None})
        await rig.coordinator.resume(0, {})
        taken = await rig.train(1)
        assert numbers(taken) == [0, 2, 3, 4]
        assert taken.metrics["flight/dropped_environment_failed"] == 1
        rig.audit()

    run(scenario())


def test_equal_samples_have_a_signal_where_the_greedy_answer_differs(tmp_path):
    async def scenario():
        rig = Rig(tmp_path, greedy={0: 1.0, 1: 0.0}, dynamic=True)
        rig.runner.rewards = {0: (1.0, 1.0), 1: (1.0, 1.0)}
        await rig.coordinator.resume(0, {})
        assert numbers(await rig.train(1)) == [1, 2, 3, 4]

    run(scenario())


def test_what_a_greedy_answer_raises_ends_the_run_and_cancels_the_group(tmp_path):
    async def scenario():
        rig = Rig(tmp_path, greedy={2: EnvError("the greedy answer's environment failed")})
        rig.runner.held = {2}
        await rig.coordinator.resume(0, {})
        with pytest.raises(EnvError, match="the greedy answer's environment failed"):
            await rig.take(1)
        assert rig.runner.cancelled == ["1/2/p2"]

    run(scenario())


def test_a_greedy_answer_takes_a_slot_of_its_own(tmp_path):
    async def scenario():
        rig = Rig(tmp_path, greedy={}, staleness=4)
        rig.fleet.slots = 2 * (SAMPLES + 1)
        rig.runner.held = set(range(100))
        await rig.coordinator.resume(0, {})
        await rig.take(1, patience_s=1.0)
        # The greedy answers end at once, and free one slot per group: room for a third group, whose samples are held too.
        assert rig.runner.open == 3

    run(scenario())
