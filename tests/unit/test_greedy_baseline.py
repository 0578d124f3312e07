"""A greedy answer beside a group, by the real agent runner: the same task, requests of its own, and who is cancelled when."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

import pytest

from helpers.tiny import make_tokenizer
from skyrl_mega.agents.greedy_baseline import run_with_baseline
from skyrl_mega.agents.stats import rollout_metrics
from skyrl_mega.agents.turn_loop import AgentRunner
from skyrl_mega.config.schema import EnvConfig, RolloutConfig
from skyrl_mega.data.samples import to_samples
from skyrl_mega.envs.base import Reply, TextEnvBase
from skyrl_mega.errors import EnvError, RolloutError
from skyrl_mega.types import Completion, Prompt, PromptGroup, StopReason

TOKENIZER = make_tokenizer()


@dataclass
class Engine:
    """Says "a" greedily and "b" otherwise; refuses two requests of one name at a time."""

    requests: list = field(default_factory=list)
    in_flight: set = field(default_factory=set)
    cancelled: list = field(default_factory=list)
    hangs: bool = False
    fails_greedily: bool = False

    async def generate(self, request, *, session=None):
        assert request.request_id not in self.in_flight, "names of requests in flight are unique"
        assert request.request_id.startswith(f"{session}/")
        self.in_flight.add(request.request_id)
        self.requests.append(request)
        greedy = request.sampling.temperature == 0
        try:
            if greedy and self.fails_greedily:
                raise RolloutError("the engine failed greedily")
            await (asyncio.sleep(60) if self.hangs and not greedy else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        finally:
            self.in_flight.discard(request.request_id)
        text = "a" if greedy else "b"
        ids = TOKENIZER.encode(text, add_special_tokens=False)
        return Completion(request.request_id, ids, [-1.0] * len(ids), text, StopReason.STOP, [3] * len(ids))


class DrawnEnv(TextEnvBase):
    """Its task is drawn by the seed of the reset; "a" earns 0.75, "b" 0.25, in each of two turns."""

    drawn: list
    failing = False

    def pose(self, payload):
        self.left = 2
        number = int(self.np_random.integers(10**9))
        self.drawn.append(number)
        return f"{payload['text']} {number}:"

    def respond(self, action):
        if self.failing and action == "a":
            raise ValueError("it fails greedy answers")
        self.left -= 1
        return Reply(0.75 if action == "a" else 0.25, self.left == 0, observation=" again:")


def play(engine, *, samples=3, failing=False, on_sample=None, **env):
    drawn: list[int] = []

    def make():
        made = DrawnEnv()
        made.drawn, made.failing = drawn, failing
        return made

    async def run():
        settings = EnvConfig("x", max_turns=2, **{"retries": 0, **env})
        runner = AgentRunner(
            engine, TOKENIZER, make, rollout=RolloutConfig(max_new_tokens=4), env=settings, seed=5, sequential_envs=True
        )
        group = PromptGroup("1/0/p0", Prompt("p0", {"text": "task"}), samples)
        return await asyncio.wait_for(run_with_baseline(runner, group, on_sample=on_sample), 30)

    return asyncio.run(run()), drawn


def test_the_greedy_answer_is_to_the_same_task_and_is_no_sample():
    engine, ended = Engine(), itertools.count()
    group, drawn = play(engine, on_sample=lambda: next(ended))
    assert len(drawn) == 4
    assert len(set(drawn)) == 1, "one seed: the environment poses one task"
    assert group.baseline_reward == 1.5, "of both turns"
    assert [trajectory.reward for trajectory in group.trajectories] == [0.5] * 3
    assert next(ended) == 4
    assert [sample.baseline_reward for sample in to_samples([group])] == [1.5] * 3
    assert rollout_metrics([group])["reward/baseline_mean"] == 1.5
    greedy = [request for request in engine.requests if request.sampling.temperature == 0]
    assert [request.request_id for request in greedy] == ["1/0/p0/greedy/0/0", "1/0/p0/greedy/0/1"]
    assert {request.request_id for request in engine.requests if request not in greedy} == {
        f"1/0/p0/{sample}/{turn}" for sample in range(3) for turn in range(2)
    }


def test_a_greedy_answer_that_is_masked_leaves_the_group_without_a_baseline():
    group, _ = play(Engine(), failing=True, on_error="mask", retries=1)
    assert group.baseline_reward is None
    assert (len(group.trajectories), group.num_masked, group.num_retries) == (3, 0, 1)
    with pytest.raises(EnvError, match="it fails greedy answers"):
        play(Engine(), failing=True)


def test_a_failure_of_the_greedy_answer_cancels_the_samples():
    engine = Engine(hangs=True, fails_greedily=True)
    with pytest.raises(RolloutError, match="the engine failed greedily"):
        play(engine)
    assert sorted(engine.cancelled) == [f"1/0/p0/{sample}/0" for sample in range(3)]
    assert not engine.in_flight
