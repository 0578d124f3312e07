"""Requests are answered exactly once whatever becomes of the engines, and go where there is room."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest

from helpers.fake_engine import FakeEngine
from skyrl_mega.errors import DeadlineError, EngineDiedError, RolloutError
from skyrl_mega.rollout.continuation import PartialTurn
from skyrl_mega.rollout.engine_load import MIN_SAMPLES, EngineLoad, slowness
from skyrl_mega.rollout.router import Router
from skyrl_mega.types import Completion, GenerationRequest, SamplingParams, StopReason


def make_router(*engines, limit=4, timeout_s=5.0, attempts=3, no_engine_timeout_s=5.0, max_model_len=1000, on_failure=None):
    router = Router(
        limit=limit,
        timeout_s=timeout_s,
        attempts=attempts,
        no_engine_timeout_s=no_engine_timeout_s,
        max_model_len=max_model_len,
        on_failure=on_failure,
    )
    for engine in engines:
        router.add(engine)
    return router


def request(i, num_tokens=5, first=0, stop=(), seed=None):
    return GenerationRequest(f"r{i}", [first], SamplingParams(max_new_tokens=num_tokens, stop=stop, seed=seed))


def expected_tokens(num_tokens, first=0):
    return [(first + 1 + t) % 26 for t in range(num_tokens)]


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def test_requests_go_to_the_least_loaded_engine():
    async def run():
        engines = [FakeEngine(f"e{i}") for i in range(3)]
        router = make_router(*engines, limit=8)
        await asyncio.gather(*(router.generate(request(i, first=i % 26), session=i) for i in range(24)))
        return engines

    assert [len(engine.seen) for engine in asyncio.run(run())] == [8, 8, 8]


def test_an_engine_gets_no_more_than_its_limit_and_the_others_wait_in_order():
    async def run():
        engine = FakeEngine("e0", tick_s=0.002)
        router = make_router(engine, limit=2)
        tasks = [asyncio.create_task(router.generate(request(i))) for i in range(9)]
        await asyncio.sleep(0)
        depth = router.queue_depth
        await asyncio.gather(*tasks)
        return engine, depth, router.queue_depth

    engine, depth, left = asyncio.run(run())
    assert engine.most_running == 2
    assert (depth, left) == (7, 0)
    assert [seen.request_id for seen in engine.seen] == [f"r{i}" for i in range(9)]


def test_a_session_stays_on_its_engine_and_so_do_samples_of_one_prompt():
    async def run():
        engines = [FakeEngine(f"e{i}") for i in range(4)]
        router = make_router(*engines, limit=16)
        for turn in range(5):
            await asyncio.gather(*(router.generate(request(turn, first=turn + 1), session=f"s{s}") for s in range(4)))
        by_session = [len(engine.seen) for engine in engines]
        await asyncio.gather(*(router.generate(request(i, first=20)) for i in range(4)))
        return engines, by_session

    engines, by_session = asyncio.run(run())
    assert by_session == [5, 5, 5, 5]
    assert sorted(sum(seen.prompt_token_ids == [20] for seen in engine.seen) for engine in engines) == [0, 0, 0, 4]


def test_a_home_that_is_much_busier_is_left():
    async def run():
        engines = [FakeEngine(f"e{i}", tick_s=0.005) for i in range(2)]
        router = make_router(*engines, limit=16)
        await asyncio.gather(*(router.generate(request(i, first=7), session="one for all") for i in range(16)))
        return sorted(engine.most_running for engine in engines)

    fewer, more = asyncio.run(run())
    assert fewer >= 5
    assert more <= 11


def test_requests_of_a_dead_engine_are_answered_by_others_exactly_once():
    async def run():
        reported = []
        engines = [FakeEngine("e0"), FakeEngine("e1")]
        router = make_router(*engines, limit=8, on_failure=lambda engine, error: reported.append((engine.name, str(error))))
        tasks = [asyncio.create_task(router.generate(request(i, 20, first=i), session=i)) for i in range(12)]
        await until(lambda: engines[0].running and engines[1].running)
        engines[0].dead = "kill -9"
        return await asyncio.gather(*tasks), reported, router

    completions, reported, router = asyncio.run(run())
    assert [c.request_id for c in completions] == [f"r{i}" for i in range(12)]
    assert [list(c.token_ids) for c in completions] == [expected_tokens(20, first=i) for i in range(12)]
    assert reported == [("e0", "engine e0: kill -9")]
    assert router.serving == ("e1",)
    assert router.metrics()["fleet/retries"] == router.metrics()["engine/e0/failures"] == 6


def test_an_engine_that_misses_the_deadline_is_taken_for_hung():
    async def run():
        reported = []
        engines = [FakeEngine("e0"), FakeEngine("e1")]
        engines[0].hangs = True
        router = make_router(*engines, timeout_s=0.05, on_failure=lambda engine, error: reported.append(str(error)))
        completion = await router.generate(request(0))
        return completion, reported, engines[0].cancelled, router.serving

    completion, reported, cancelled, serving = asyncio.run(run())
    assert completion.token_ids == expected_tokens(5)
    assert len(reported) == 1
    assert "e0 did not finish request r0 within rollout.request_timeout_s (0.05 s)" in reported[0]
    assert cancelled == ["r0"]
    assert serving == ("e1",)


def test_a_request_that_engines_die_on_fails_after_the_attempts_and_names_them():
    async def run():
        engines = [FakeEngine(f"e{i}") for i in range(5)]
        for engine in engines:
            engine.dead = "out of memory"
        await make_router(*engines, attempts=3).generate(request(0))

    with pytest.raises(RolloutError, match=r"r0 was tried on 3 engines .*e\d: out of memory \| .*e\d: out of memory \| .*e\d"):
        asyncio.run(run())


def test_a_request_no_engine_can_answer_is_not_retried():
    class Refusing(FakeEngine):
        async def generate(self, request):
            self.seen.append(request)
            raise RolloutError("a prompt must have tokens")

    async def run():
        engines = [Refusing("e0"), Refusing("e1")]
        router = make_router(*engines)
        with pytest.raises(RolloutError, match="must have tokens"):
            await router.generate(request(0))
        return sum(len(engine.seen) for engine in engines), router.serving

    assert asyncio.run(run()) == (1, ("e0", "e1"))


def test_a_stale_engine_is_left_and_its_request_waits_without_counting_attempts():
    async def run():
        reported = []
        engine = FakeEngine("e0")
        router = make_router(engine, attempts=1, on_failure=lambda engine, error: reported.append(type(error).__name__))
        for _ in range(3):
            engine.stale = True
            task = asyncio.create_task(router.generate(request(0)))
            await until(lambda: not router.serving)
            engine.stale = False
            router.add(engine)
            assert (await task).token_ids == expected_tokens(5)
        return reported

    assert asyncio.run(run()) == ["EngineStaleError"] * 3


def test_an_interrupted_turn_goes_on_elsewhere_with_every_token_once():
    async def run():
        engines = [FakeEngine("e0", version=3), FakeEngine("e1", version=4)]
        router = make_router(engines[0])
        tasks = [asyncio.create_task(router.generate(request(i, 40, first=i, seed=7))) for i in range(4)]
        await until(lambda: len(engines[0].running) == 4)
        await asyncio.sleep(0.01)
        router.take_out("e0", "it is leaving")
        await engines[0].interrupt()
        router.add(engines[1])
        completions = await asyncio.gather(*tasks)
        return completions, engines, router.metrics()["fleet/continued"]

    completions, engines, continued = asyncio.run(run())
    assert continued == 4
    for i, completion in enumerate(completions):
        assert list(completion.token_ids) == expected_tokens(40, first=i)
        assert list(completion.logprobs) == [-float(t) for t in completion.token_ids]
        assert completion.text == "".join(chr(97 + t) for t in completion.token_ids)
        assert completion.stop_reason is StopReason.LENGTH
        versions = list(completion.policy_versions)
        assert versions == sorted(versions)
        assert set(versions) == {3, 4}
    for first, second in zip(engines[0].seen, engines[1].seen, strict=True):
        assert first.sampling.seed == 7 != second.sampling.seed
        assert len(second.prompt_token_ids) - 1 + second.sampling.max_new_tokens == 40


def test_a_cancelled_request_ends_in_its_engine_and_frees_its_place():
    async def run():
        engine = FakeEngine("e0", tick_s=0.01)
        router = make_router(engine, limit=1)
        running, waiting, last = (asyncio.create_task(router.generate(request(i, 3 if i == 2 else 1000))) for i in range(3))
        await until(lambda: engine.running)
        waiting.cancel()
        running.cancel()
        completion = await last
        await asyncio.gather(running, waiting, return_exceptions=True)
        return completion, engine, router

    completion, engine, router = asyncio.run(run())
    assert completion.request_id == "r2"
    assert engine.cancelled == ["r0"]
    assert [seen.request_id for seen in engine.seen] == ["r0", "r2"]
    assert router.loads()["e0"].in_flight == 0


def test_without_engines_requests_wait_until_one_comes():
    async def run():
        router = make_router()
        task = asyncio.create_task(router.generate(request(0)))
        await asyncio.sleep(0.01)
        router.add(FakeEngine("late"))
        return await task

    assert asyncio.run(run()).token_ids == expected_tokens(5)


def test_waiting_for_engines_ends_with_each_ones_reason():
    async def run():
        router = make_router(FakeEngine("e0"), FakeEngine("e1"), no_engine_timeout_s=0.05)
        router.take_out("e0", "dead: kill -9")
        router.take_out("e1", "stale: it waits for weight version 3")
        await router.generate(request(0))

    with pytest.raises(
        DeadlineError, match=r"none came within 0.05 s. e0: dead: kill -9; e1: stale: it waits for weight version 3"
    ):
        asyncio.run(run())


def test_a_fleet_that_was_given_up_fails_requests_at_once():
    async def run():
        router = make_router(FakeEngine("e0"))
        router.take_out("e0", "dead")
        waiting = asyncio.create_task(router.generate(request(0)))
        await asyncio.sleep(0.001)
        router.give_up("every engine was given up")
        with pytest.raises(RolloutError, match=r"every engine was given up\. e0: dead"):
            await waiting
        with pytest.raises(RolloutError, match="every engine was given up"):
            await router.generate(request(1))

    asyncio.run(run())


def test_a_straggler_is_reported_and_gets_fewer_requests():
    async def run():
        engines = [FakeEngine("fast", tick_s=0.001), FakeEngine("faster", tick_s=0.001), FakeEngine("slow", tick_s=0.02)]
        router = make_router(*engines, limit=8)
        await asyncio.gather(*(router.generate(request(i, first=i % 26), session=i) for i in range(600)))
        return [len(engine.seen) for engine in engines], router.metrics()["fleet/stragglers"]

    (fast, faster, slow), stragglers = asyncio.run(run())
    assert stragglers == 1
    assert slow < min(fast, faster) / 3


def test_slowness_needs_samples_and_a_clear_difference():
    slow = EngineLoad("slow", s_per_token=0.3, samples=MIN_SAMPLES)
    usual = EngineLoad("usual", s_per_token=0.1, samples=MIN_SAMPLES)
    assert slowness(slow, [slow, usual]) == pytest.approx(3.0)
    assert slowness(usual, [slow, usual]) == 1.0
    assert slowness(EngineLoad("new", s_per_token=0.9, samples=MIN_SAMPLES - 1), [slow, usual]) == 1.0
    assert slowness(slow, [slow]) == 1.0
    assert slowness(EngineLoad("a bit slow", s_per_token=0.2, samples=99), [usual]) == 1.0


def piece(text, reason):
    tokens = [ord(letter) for letter in text]
    return Completion("r", tokens, [-1.0] * len(tokens), text, reason, [0] * len(tokens))


def test_a_stop_string_across_two_pieces_ends_the_turn():
    turn = PartialTurn(GenerationRequest("r", [1], SamplingParams(max_new_tokens=20, stop=("END",))), max_model_len=100)
    assert turn.add(piece("abcE", StopReason.ABORT)) is None
    assert turn.next_request().sampling.max_new_tokens == 1
    assert turn.add(piece("N", StopReason.LENGTH)) is None
    assert turn.next_request().sampling.max_new_tokens == 1
    whole = turn.add(piece("D", StopReason.LENGTH))
    assert (whole.text, whole.stop_reason, len(whole.token_ids)) == ("abcEND", StopReason.STOP, 6)


def test_a_continued_turn_keeps_the_routing_of_the_piece_that_sampled_a_token():
    def routed(text, reason, *, before, layer):
        rows = np.full((before + len(text) - 1, 1, 2), layer, dtype=np.int16)
        return dataclasses.replace(piece(text, reason), routed_experts=rows)

    turn = PartialTurn(GenerationRequest("r", [1, 2], SamplingParams(max_new_tokens=20)), max_model_len=100)
    assert turn.add(routed("ab", StopReason.ABORT, before=2, layer=3)) is None
    assert turn.add(piece("", StopReason.ABORT)) is None  # ended before its first token: nothing is told
    whole = turn.add(routed("cd", StopReason.STOP, before=4, layer=4))
    # Of the four tokens the second piece was given, the first one computed all but the last.
    assert whole.routed_experts[:, 0, 0].tolist() == [3, 3, 3, 4, 4]


def test_a_stop_string_that_only_seemed_to_begin_costs_a_few_short_pieces():
    turn = PartialTurn(GenerationRequest("r", [1], SamplingParams(max_new_tokens=8, stop=("END",))), max_model_len=100)
    assert turn.add(piece("abE", StopReason.ABORT)) is None
    assert turn.add(piece("x", StopReason.LENGTH)) is None
    assert turn.next_request().sampling.max_new_tokens == 4
    assert turn.next_request().prompt_token_ids == [1, *map(ord, "abEx")]
    whole = turn.add(piece("yzEN", StopReason.LENGTH))
    assert (whole.text, whole.stop_reason) == ("abExyzEN", StopReason.LENGTH)


def test_a_continued_turn_ends_at_the_context_length():
    turn = PartialTurn(GenerationRequest("r", [1] * 7, SamplingParams(max_new_tokens=20, stop=("END",))), max_model_len=10)
    assert turn.add(piece("aE", StopReason.ABORT)) is None
    whole = turn.add(piece("x", StopReason.LENGTH))
    assert (whole.text, whole.stop_reason) == ("aEx", StopReason.LENGTH)


def test_a_turn_interrupted_before_its_first_token_is_the_same_request_again():
    original = request(0, seed=3)
    turn = PartialTurn(original, max_model_len=100)
    assert turn.add(piece("", StopReason.ABORT)) is None
    assert turn.next_request() is original


def test_a_turn_that_is_interrupted_for_ever_is_an_error():
    class Interrupting(FakeEngine):
        async def generate(self, request):
            return Completion(request.request_id, [], [], "", StopReason.ABORT, [])

    with pytest.raises(RolloutError, match="r0 was ended 4 times in a row without a new token"):
        asyncio.run(make_router_and_generate(Interrupting("e0")))


async def make_router_and_generate(engine):
    return await make_router(engine, attempts=3).generate(request(0))


def test_an_engine_is_drained_once_its_requests_ended():
    async def run():
        engine = FakeEngine("e0", tick_s=0.005)
        router = make_router(engine)
        task = asyncio.create_task(router.generate(request(0, 10)))
        await until(lambda: engine.running)
        router.take_out("e0", "leaving")
        early = await router.drained("e0", 0.001)
        late = await router.drained("e0", 5)
        return early, late, (await task).token_ids

    assert asyncio.run(run()) == (False, True, expected_tokens(10))


def test_a_second_engine_of_a_name_is_refused():
    async def run():
        router = make_router(FakeEngine("e0"))
        with pytest.raises(ValueError, match="e0 serves already"):
            router.add(FakeEngine("e0"))

    asyncio.run(run())


def test_scoring_is_retried_elsewhere_too():
    async def run():
        engines = [FakeEngine("e0"), FakeEngine("e1")]
        engines[0].dead = "gone"
        return await make_router(*engines).score([[1, 2], [3]])

    assert asyncio.run(run()) == [[0.0, 0.0], [0.0]]


def test_engine_died_is_what_a_fake_says():
    engine = FakeEngine("e0")
    engine.dead = "x"
    with pytest.raises(EngineDiedError):
        asyncio.run(engine.policy_version())
