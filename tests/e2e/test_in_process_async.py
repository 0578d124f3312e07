"""The in-process engine behind an event loop: the same turns as ever, one by one, under weights that change."""

from __future__ import annotations

import asyncio

import pytest
import torch

from helpers.weight_fleet import BucketWriter
from helpers.weights_push import logprob_errors, perturbed
from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import RolloutError
from skyrl_mega.types import GenerationRequest, SamplingParams, StopReason

PROMPT = [(7 * i) % 250 + 5 for i in range(100)]  # three full cache blocks and a bit


@pytest.fixture(scope="module")
def base_model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture
def writer():
    writer = BucketWriter()
    yield writer
    writer.close()


def wrapped(engine, **settings):
    from skyrl_mega.rollout.in_process_async import InProcessAsyncEngine

    return InProcessAsyncEngine(engine, RolloutConfig(dtype="float32", max_model_len=256, max_num_seqs=64, **settings))


async def push(engine, writer, model, version):
    await engine.begin(version)
    bucket = writer.write((name, parameter.detach()) for name, parameter in model.named_parameters())
    await engine.load(bucket)
    assert [report["error"] for report in await engine.report()] == [""]
    await engine.commit(version)


def requests(count, num_tokens=24, prompt=None):
    return [
        GenerationRequest(f"r{i}", prompt or [i + 5, 7, 9, 11], SamplingParams(max_new_tokens=num_tokens, seed=i))
        for i in range(count)
    ]


def test_seeded_turns_are_those_of_the_synchronous_engine_and_finish_one_by_one(engine):
    expected = engine.generate(requests(12))
    finished = []

    async def scenario():
        facade = wrapped(engine)

        async def one(i, request):
            await asyncio.sleep(0.003 * i)  # joins while others run
            completion = await facade.generate(request)
            finished.append(i)
            return completion

        short = GenerationRequest("short", [50, 51], SamplingParams(max_new_tokens=1, seed=0))
        *completions, _ = await asyncio.gather(*(one(i, r) for i, r in enumerate([*requests(12), short])))
        return completions, await facade.score([PROMPT, [9]]), facade.num_running

    completions, scores, running = asyncio.run(scenario())
    assert [c.token_ids for c in completions] == [c.token_ids for c in expected]
    assert finished.index(12) < 12  # the short one, which came last, did not wait for all
    torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(engine.score([PROMPT])[0]), rtol=0, atol=1e-4)
    assert scores[1] == [0.0]
    assert running == 0


def test_a_turn_that_comes_just_as_the_last_one_ends_is_served(engine):
    """As from a queue in front of a full engine: the next turn is asked for by whoever waited for the last one."""

    async def scenario():
        facade = wrapped(engine)
        first, second = requests(2, num_tokens=4)
        running = asyncio.create_task(facade.generate(first))

        async def next_in_line():
            await running
            return await facade.generate(second)

        async with asyncio.timeout(60):
            return await asyncio.create_task(next_in_line())

    assert asyncio.run(scenario()).request_id == "r1"


def test_cancelled_and_interrupted_turns_leave_the_engine(engine):
    async def scenario():
        facade = wrapped(engine)
        tasks = [asyncio.create_task(facade.generate(request)) for request in requests(4, num_tokens=200, prompt=PROMPT)]
        while facade.num_running < 4:
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        interrupted = await facade.interrupt()
        return interrupted, await asyncio.gather(*tasks[1:]), engine._llm.llm_engine.has_unfinished_requests()

    interrupted, completions, unfinished = asyncio.run(scenario())
    assert interrupted == 3
    assert not unfinished
    for completion in completions:
        assert completion.stop_reason in (StopReason.ABORT, StopReason.STOP)
        assert len(completion.token_ids) == len(completion.logprobs) == len(completion.policy_versions) < 156


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_weights_change_under_running_turns(engine, base_model, writer, mode):
    """Each token has the logprob of the weights whose version it carries; with keep, up to the old keys and values."""
    changed = perturbed(base_model, seed=3)

    async def scenario():
        facade = wrapped(engine, kv_cache_on_update=mode)
        old = await facade.policy_version()
        tasks = [asyncio.create_task(facade.generate(request)) for request in requests(6, num_tokens=120, prompt=PROMPT)]
        while facade.num_running < 6:
            await asyncio.sleep(0)
        for _ in range(30):
            await asyncio.sleep(0)
        await facade.begin(old + 1)
        late = asyncio.create_task(facade.generate(GenerationRequest("late", PROMPT, SamplingParams(max_new_tokens=8, seed=1))))
        await asyncio.sleep(0.05)
        assert not late.done()
        bucket = writer.write((name, parameter.detach()) for name, parameter in changed.named_parameters())
        await facade.load(bucket)
        await facade.report()
        await facade.commit(old + 1)
        completions, late = await asyncio.gather(*tasks), await late
        await push(facade, writer, base_model, old + 2)
        return old, completions, late

    old, completions, late = asyncio.run(scenario())
    assert set(late.policy_versions) == {old + 1}
    assert logprob_errors(changed, PROMPT, late).max() < 1e-3
    swapped = [c for c in completions if len(set(c.policy_versions)) == 2]
    assert len(swapped) >= 3  # others met an end-of-sequence token before
    for completion in swapped:
        split = list(completion.policy_versions).index(old + 1)
        assert list(completion.policy_versions) == [old] * split + [old + 1] * (len(completion.token_ids) - split)
        assert logprob_errors(base_model, PROMPT, completion)[:split].max() < 1e-3
        after = logprob_errors(changed, PROMPT, completion)[split:]
        assert (after.max() < 1e-3) == (mode == "recompute")


def test_a_version_given_up_half_way_serves_nothing_until_a_whole_one_came(engine, base_model, writer):
    async def scenario():
        facade = wrapped(engine)
        version = await facade.policy_version() + 1
        running = asyncio.create_task(facade.generate(requests(1, num_tokens=150, prompt=PROMPT)[0]))
        while not facade.num_running:
            await asyncio.sleep(0)
        await facade.begin(version)
        norm = writer.write([("model.norm.weight", base_model.model.norm.weight.detach())])
        await facade.load(norm)
        whole = await facade.abandon()
        with pytest.raises(RolloutError, match=f"weight version {version} arrived only in part"):
            await facade.generate(requests(1)[0])
        interrupted = await running
        await push(facade, writer, base_model, version + 1)
        return whole, interrupted, await facade.generate(requests(1, prompt=PROMPT)[0])

    whole, interrupted, after = asyncio.run(scenario())
    assert not whole
    assert interrupted.stop_reason is StopReason.ABORT
    assert logprob_errors(base_model, PROMPT, after).max() < 1e-3
