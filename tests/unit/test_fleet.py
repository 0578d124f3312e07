"""The fleet replaces what dies, and lets an engine serve only with the current weights."""

from __future__ import annotations

import asyncio
import time

import pytest

from helpers.fake_engine import FakeEngine
from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import RolloutError
from skyrl_mega.rollout.fleet import EngineState, Fleet
from skyrl_mega.types import GenerationRequest, SamplingParams


class Yard:
    """A factory of fake engines that remembers what it built."""

    def __init__(self, *, delay_s=0.0, tick_s=0.001):
        self.built: list[FakeEngine] = []
        self.delay_s, self.tick_s = delay_s, tick_s
        self.failures: list[Exception] = []
        self.cancelled = 0

    async def __call__(self, name):
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failures:
            raise self.failures.pop(0)
        self.built.append(FakeEngine(name, tick_s=self.tick_s))
        return self.built[-1]

    def now(self, name) -> FakeEngine:
        return [engine for engine in self.built if engine.name == name][-1]


def make_fleet(yard, names=("e0", "e1"), *, policy_version=0, begins_stale=False, **settings):
    settings = {"health_interval_s": 0.02, "request_timeout_s": 5.0, "start_timeout_s": 5.0, "max_num_seqs": 8} | settings
    rollout = RolloutConfig(**settings)
    factories = dict.fromkeys(names, yard)
    return Fleet(rollout, factories, policy_version=policy_version, begins_stale=begins_stale, pause_s=0.01)


def request(i, num_tokens=5, first=0):
    return GenerationRequest(f"r{i}", [first], SamplingParams(max_new_tokens=num_tokens))


def expected_tokens(num_tokens, first=0):
    return [(first + 1 + t) % 26 for t in range(num_tokens)]


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def states(fleet):
    return {name: status.state.value for name, status in fleet.status().items()}


def run(scenario):
    async def bounded():
        async with asyncio.timeout(20):
            return await scenario()

    return asyncio.run(bounded())


def test_engines_start_side_by_side_and_serve():
    async def scenario():
        yard = Yard(delay_s=0.1)
        fleet = make_fleet(yard, [f"e{i}" for i in range(8)])
        started = time.monotonic()
        await fleet.start()
        seconds = time.monotonic() - started
        completion = await fleet.generate(request(0))
        await fleet.close()
        return seconds, completion, yard

    seconds, completion, yard = run(scenario)
    assert seconds < 0.6  # one after the other would take 0.8
    assert completion.token_ids == expected_tokens(5)
    assert len(yard.built) == 8
    assert all(engine.closed and engine.killed for engine in yard.built)


def test_a_dead_engine_is_replaced_and_its_requests_are_answered_once():
    async def scenario():
        yard = Yard()
        fleet = make_fleet(yard)
        await fleet.start()
        victim = yard.now("e0")
        tasks = [asyncio.create_task(fleet.generate(request(i, 30, first=i), session=i)) for i in range(12)]
        await until(lambda: victim.running)
        victim.dead = "kill -9"
        completions = await asyncio.gather(*tasks)
        await until(lambda: states(fleet) == {"e0": "serving", "e1": "serving"})
        restarts, replaced = fleet.status()["e0"].restarts, yard.now("e0") is not victim
        await fleet.close()
        return completions, restarts, replaced, victim

    completions, restarts, replaced, victim = run(scenario)
    assert [list(c.token_ids) for c in completions] == [expected_tokens(30, first=i) for i in range(12)]
    assert (restarts, replaced, victim.killed) == (1, True, True)


def test_an_idle_engine_that_dies_is_found_by_the_health_check():
    async def scenario():
        yard = Yard()
        fleet = make_fleet(yard)
        await fleet.start()
        victim = yard.now("e0")
        victim.dead = "kill -9"
        await until(lambda: len(yard.built) == 3 and states(fleet)["e0"] == "serving")
        await fleet.close()
        return victim

    assert run(scenario).killed


def test_an_engine_that_does_not_answer_is_killed_after_three_checks():
    async def scenario():
        yard = Yard()
        fleet = make_fleet(yard)
        await fleet.start()
        victim = yard.now("e0")
        victim.hangs = True
        await until(lambda: victim.killed)
        why = fleet.status()["e0"].why
        await until(lambda: states(fleet)["e0"] == "serving")
        await fleet.close()
        return why

    why = run(scenario)
    assert "did not answer 3 health checks in a row, 0.02 s apart" in why


def test_an_engine_that_comes_up_late_is_stale_until_it_has_the_current_weights():
    async def scenario():
        yard = Yard()
        fleet = make_fleet(yard)
        await fleet.start()
        for engine in yard.built:
            engine.version = 1
        assert await fleet.weights_arrived(1, ["e0", "e1"]) == ("e0", "e1")

        yard.now("e0").dead = "kill -9"
        await until(lambda: fleet.needs_weights() == ("e0",))
        assert (await fleet.generate(request(0))).policy_versions == [1] * 5
        assert [receiver.name for receiver in fleet.receivers(stale_only=True)] == ["e0"]
        assert [receiver.name for receiver in fleet.receivers()] == ["e0", "e1"]
        await asyncio.sleep(0.05)  # health checks don't make it serve
        assert states(fleet)["e0"] == "stale"

        yard.now("e0").version = 1  # the trainer pushed
        served = await fleet.weights_arrived(1, ["e0"])
        await fleet.close()
        return served

    served = run(scenario)
    # e1 was not among those that received the version again, but it has it; it must not stop serving.
    assert served == ("e0", "e1")


def test_an_engine_left_out_of_a_push_is_stale():
    async def scenario():
        yard = Yard()
        fleet = make_fleet(yard)
        await fleet.start()
        yard.now("e1").version = 1
        served = await fleet.weights_arrived(1, ["e1"])
        needs, why = fleet.needs_weights(), fleet.status()["e0"].why
        await fleet.close()
        return served, needs, why

    served, needs, why = run(scenario)
    assert served == ("e1",)
    assert needs == ("e0",)
    assert why == "it has weight version 0 and waits for 1"


def test_an_engine_that_was_replaced_during_a_push_does_not_serve_the_version_its_name_received():
    async def scenario():
        yard = Yard()
        fleet = make_fleet(yard)
        await fleet.start()
        yard.now("e0").dead = "kill -9"
        await until(lambda: len(yard.built) == 3 and states(fleet)["e0"] == "serving")
        yard.now("e1").version = 1
        served = await fleet.weights_arrived(1, ["e0", "e1"])
        await fleet.close()
        return served

    assert run(scenario) == ("e1",)


def test_a_resumed_policy_finds_all_engines_stale():
    async def scenario():
        yard = Yard()
        fleet = make_fleet(yard, policy_version=7)
        await fleet.start()
        before = states(fleet)
        waiting = asyncio.create_task(fleet.generate(request(0)))
        for engine in yard.built:
            engine.version = 7
        await fleet.weights_arrived(7, fleet.needs_weights())
        versions = (await waiting).policy_versions
        await fleet.close()
        return before, versions

    assert run(scenario) == ({"e0": "stale", "e1": "stale"}, [7] * 5)


def test_an_engine_with_a_mixture_of_weights_is_stale_until_it_is_whole():
    async def scenario():
        yard = Yard()
        fleet = make_fleet(yard)
        await fleet.start()
        yard.now("e0").stale = True
        await until(lambda: fleet.needs_weights() == ("e0",))
        completion = await fleet.generate(request(0))
        yard.now("e0").stale = False
        await until(lambda: states(fleet)["e0"] == "serving")
        restarts = fleet.status()["e0"].restarts
        await fleet.close()
        return completion, restarts

    completion, restarts = run(scenario)
    assert completion.token_ids == expected_tokens(5)
    assert restarts == 0


def test_an_engine_that_keeps_failing_is_given_up_and_then_requests_fail_with_the_reasons():
    async def scenario():
        yard = Yard()
        fleet = make_fleet(yard, ["e0"], max_engine_restarts=2)
        await fleet.start()
        yard.failures = [RolloutError("no memory")] * 2
        waiting = asyncio.create_task(fleet.generate(request(0, 500)))
        await until(lambda: yard.now("e0").running)
        yard.now("e0").dead = "kill -9"
        with pytest.raises(RolloutError, match=r"every engine was given up. e0: dead: .*no memory; given up after 2 restarts"):
            await waiting
        status = fleet.status()["e0"]
        await fleet.close()
        return status

    status = run(scenario)
    assert (status.state, status.given_up, status.restarts) == (EngineState.DEAD, True, 2)


def test_a_fleet_of_which_nothing_comes_up_says_why_and_leaves_nothing():
    async def scenario():
        yard = Yard()
        yard.failures = [RolloutError("no model"), OSError("no such file")]
        fleet = make_fleet(yard)
        with pytest.raises(RolloutError, match=r"none of 2 rollout engines came up\. e0: .*no model; e1: .*no such file"):
            await fleet.start()
        return fleet.status()

    assert run(scenario) == {}


def test_an_engine_that_fails_its_first_start_is_tried_again_beside_the_others():
    async def scenario():
        yard = Yard()
        yard.failures = [RolloutError("port in use")]
        fleet = make_fleet(yard)
        await fleet.start()
        await until(lambda: states(fleet) == {"e0": "serving", "e1": "serving"})
        restarts = sum(status.restarts for status in fleet.status().values())
        await fleet.close()
        return restarts

    assert run(scenario) == 1


def test_an_engine_that_takes_too_long_to_start_is_cancelled_and_named():
    async def scenario():
        yard = Yard(delay_s=60)
        fleet = make_fleet(yard, ["e0"], start_timeout_s=0.05)
        with pytest.raises(RolloutError, match=r"e0: it must be up within rollout.start_timeout_s \(0.05 s\) and was not"):
            await fleet.start()
        return yard

    assert run(scenario).cancelled >= 1


def test_an_error_nobody_foresaw_is_named_and_nobody_waits_for_ever():
    async def scenario():
        yard = Yard()
        yard.failures = [ZeroDivisionError("a bug")] * 2
        fleet = make_fleet(yard)
        with pytest.raises(RolloutError, match="ZeroDivisionError: a bug"):
            await fleet.start()

    run(scenario)


def test_engines_are_added_and_removed_while_requests_run():
    async def scenario():
        yard = Yard(tick_s=0.003)
        fleet = make_fleet(yard, ["e0"])
        await fleet.start()
        tasks = [asyncio.create_task(fleet.generate(request(i, 60, first=i), session=i)) for i in range(12)]
        await until(lambda: len(yard.now("e0").running) == 8)
        await fleet.add_engine("e1", yard)
        await until(lambda: yard.now("e1").running)
        with pytest.raises(ValueError, match="has an engine named e1"):
            await fleet.add_engine("e1", yard)
        await fleet.remove_engine("e0", drain_timeout_s=0.01)
        completions = await asyncio.gather(*tasks)
        left, continued = states(fleet), fleet.metrics()["fleet/continued"]
        await fleet.close()
        return completions, left, continued, yard

    completions, left, continued, yard = run(scenario)
    assert [list(c.token_ids) for c in completions] == [expected_tokens(60, first=i) for i in range(12)]
    assert left == {"e1": "serving"}
    assert continued == 8
    assert yard.built[0].closed


def test_removing_an_engine_lets_its_requests_finish_where_there_is_time():
    async def scenario():
        yard = Yard()
        fleet = make_fleet(yard)
        await fleet.start()
        tasks = [asyncio.create_task(fleet.generate(request(i, 20), session=i)) for i in range(8)]
        await until(lambda: yard.now("e0").running)
        await fleet.remove_engine("e0", drain_timeout_s=5)
        await asyncio.gather(*tasks)
        continued = fleet.metrics()["fleet/continued"]
        await fleet.close()
        return continued

    assert run(scenario) == 0


def test_closing_twice_and_during_a_start_is_safe():
    async def scenario():
        yard = Yard(delay_s=60)
        fleet = make_fleet(yard)
        starting = asyncio.create_task(fleet.start())
        await asyncio.sleep(0.01)
        await fleet.close()
        await fleet.close()
        with pytest.raises(RolloutError, match="closed before its engines came up"):
            await starting
        return yard

    assert run(scenario).cancelled == 2


def test_after_a_warm_up_version_0_has_to_be_pushed_to_every_engine_that_comes_up():
    async def scenario():
        yard = Yard()
        fleet = make_fleet(yard, begins_stale=True)
        await fleet.start()
        seen = [states(fleet)]
        fleet.receivers()
        await fleet.weights_arrived(0, ["e0", "e1"])
        seen.append(states(fleet))
        yard.now("e1").dead = "kill -9"
        await until(lambda: len(yard.built) == 3 and fleet.status()["e1"].state is EngineState.STALE)
        seen.append(states(fleet))
        # The version it reports is the right one, and the weights are not: only a push makes it serve.
        await asyncio.sleep(0.1)
        seen.append(states(fleet))
        fleet.receivers(stale_only=True)
        await fleet.weights_arrived(0, ["e1"])
        seen.append(states(fleet))
        await fleet.close()
        return seen

    stale, serving = {"e0": "stale", "e1": "stale"}, {"e0": "serving", "e1": "serving"}
    half = {"e0": "serving", "e1": "stale"}
    assert run(scenario) == [stale, serving, half, half, serving]
