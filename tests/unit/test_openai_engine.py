"""An external vLLM server as an engine of the fleet; bodies and answers go through vLLM's own protocol classes."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from helpers.fake_server import VOCABULARY, FakeServer
from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import BackendUnavailableError, EngineDiedError, EngineStaleError, RolloutError, WeightSyncError
from skyrl_mega.rollout.fleet import Fleet
from skyrl_mega.rollout.openai_engine import ExternalEngineFactory, OpenAIEngine
from skyrl_mega.types import GenerationRequest, SamplingParams, StopReason

vllm = pytest.importorskip("vllm")


def connect(server, vocab_size=VOCABULARY, **settings):
    rollout = RolloutConfig(max_model_len=256, **settings)
    transport = httpx.ASGITransport(server)
    return OpenAIEngine.connect_to("ext", "http://server", rollout, vocab_size=vocab_size, transport=transport)


def request(num_tokens=5, first=0, **sampling):
    return GenerationRequest("r0", [first], SamplingParams(max_new_tokens=num_tokens, **sampling))


def run(scenario):
    async def bounded():
        async with asyncio.timeout(60):
            return await scenario()

    return asyncio.run(bounded())


def test_a_turn_goes_out_as_token_ids_and_comes_back_with_logprobs_versions_and_text():
    async def scenario():
        server = FakeServer()
        engine = await connect(server)
        completion = await engine.generate(request(4, temperature=0.7, top_p=0.9, top_k=5, stop=("END",), seed=11))
        return server, completion, await engine.policy_version()

    server, completion, version = run(scenario)
    assert (completion.token_ids, completion.logprobs, completion.text) == ([1, 2, 3, 4], [-0.5] * 4, "bcde")
    assert (completion.stop_reason, completion.policy_versions, version) == (StopReason.LENGTH, [0] * 4, 0)
    body = server.calls[-2][1]
    sent = vllm.entrypoints.scale_out.token_in_token_out.protocol.GenerateRequest.model_validate(body).sampling_params
    assert (sent.max_tokens, sent.temperature, sent.top_p, sent.top_k) == (4, 0.7, 0.9, 5)
    assert (sent.stop, sent.seed, sent.logprobs, sent.include_stop_str_in_output) == (["END"], 11, 0, True)


def test_scores_are_the_prompts_logprobs():
    async def scenario():
        return await (await connect(FakeServer())).score([[3, 5, 7], [9]])

    assert run(scenario) == [[0.0, -5.0, -7.0], [0.0]]


def test_a_weight_version_arrives_in_order_and_running_requests_see_both_versions():
    async def scenario():
        server = FakeServer()
        engine = await connect(server)
        running = asyncio.create_task(engine.generate(request(60)))
        while not server.running:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        server.calls.clear()
        await engine.begin(3)
        waiting = asyncio.create_task(engine.generate(request(2, first=9)))
        await engine.load({"path": "p"})
        reports = await engine.report()
        new_ones_sent = sum(path == "/inference/v1/generate" for path, _ in server.calls)
        await engine.commit(3)
        calls = [(path, body) for path, body in server.calls if path != "/inference/v1/generate"]
        return await running, await waiting, reports, new_ones_sent, calls, await engine.policy_version()

    running, waiting, reports, new_ones_sent, calls, version = run(scenario)
    assert sorted(set(running.policy_versions)) == [0, 3]
    assert len(running.token_ids) == 60
    assert waiting.policy_versions == [3, 3]
    assert new_ones_sent == 0
    assert reports == [{"error": "", "num_tensors": 3, "size_bytes": 12, "checksum": "c"}]
    assert version == 3
    assert calls == [
        ("/pause", {"mode": "keep", "clear_cache": "false"}),
        ("/collective_rpc", {"method": "start_weight_update", "kwargs": {}}),
        ("/collective_rpc", {"method": "update_weights", "kwargs": {"update_info": {"bucket": {"path": "p"}}}}),
        ("/collective_rpc", {"method": "weight_update_report", "kwargs": {}}),
        ("/collective_rpc", {"method": "finish_weight_update", "kwargs": {}}),
        ("/reset_prefix_cache", {"reset_running_requests": "true"}),
        ("/update_weight_version", {"new_version": "3"}),
        ("/resume", {}),
    ]


def test_kept_caches_are_salted_with_the_version():
    async def scenario():
        server = FakeServer()
        engine = await connect(server, kv_cache_on_update="keep")
        await engine.generate(request())
        await engine.begin(1)
        await engine.commit(1)
        await engine.generate(request())
        return server

    server = run(scenario)
    assert [body["cache_salt"] for path, body in server.calls if "generate" in path][1:] == ["weights 0", "weights 1"]
    assert "/reset_prefix_cache" not in [path for path, _ in server.calls]


@pytest.mark.parametrize("overwritten", [False, True])
def test_an_abandoned_version_leaves_the_old_one_or_a_mixture_that_serves_nothing(overwritten):
    async def scenario():
        server = FakeServer()
        engine = await connect(server)
        running = asyncio.create_task(engine.generate(request(40)))
        while not server.running:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        await engine.begin(1)
        server.overwritten = overwritten
        whole = await engine.abandon()
        if overwritten:
            with pytest.raises(EngineStaleError, match="version 1 arrived only in part"):
                await engine.generate(request())
            with pytest.raises(EngineStaleError):
                await engine.policy_version()
            await engine.begin(2)
            await engine.commit(2)
        return whole, (await running), await engine.generate(request())

    whole, running, after = run(scenario)
    assert whole is not overwritten
    assert running.stop_reason is (StopReason.ABORT if overwritten else StopReason.LENGTH)
    assert set(after.policy_versions) == ({2} if overwritten else {0})


def test_a_version_whose_sender_died_is_abandoned_by_the_next():
    async def scenario():
        server = FakeServer()
        engine = await connect(server)
        await engine.begin(1)
        await engine.begin(2)
        await engine.commit(2)
        return [body["method"] for path, body in server.calls if path == "/collective_rpc"], await engine.policy_version()

    methods, version = run(scenario)
    assert methods == ["start_weight_update", "abandon_weight_update", "start_weight_update", "finish_weight_update"]
    assert version == 2


def test_buckets_and_commits_need_a_version_on_its_way():
    async def scenario():
        engine = await connect(FakeServer())
        with pytest.raises(WeightSyncError, match="call begin first"):
            await engine.load({})
        await engine.begin(4)
        with pytest.raises(WeightSyncError, match=r"commit the version that began \(4\), not 5"):
            await engine.commit(5)

    run(scenario)


def test_a_worker_that_fails_is_told_from_a_server_that_died():
    async def scenario():
        server = FakeServer()
        engine = await connect(server)
        with pytest.raises(WeightSyncError, match="explode failed in a worker"):
            await engine._on_workers("explode")
        server.failing["/health"] = 503
        with pytest.raises(EngineDiedError, match="503"):
            await engine._on_workers("explode")

    run(scenario)


def test_a_cancelled_request_ends_on_the_server():
    async def scenario():
        server = FakeServer()
        engine = await connect(server)
        task = asyncio.create_task(engine.generate(request(10_000)))
        while len(server.running) < 2:  # the first was the check of the vocabulary
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return server.cancelled

    assert run(scenario) == ["ext-1"]


def test_an_interrupted_turn_comes_back_with_its_tokens():
    async def scenario():
        server = FakeServer()
        engine = await connect(server)
        idle = await engine.interrupt()
        task = asyncio.create_task(engine.generate(request(200)))
        while len(server.running) < 2:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        return idle, await engine.interrupt(), await task

    idle, interrupted, completion = run(scenario)
    assert (idle, interrupted) == (0, 1)
    assert completion.stop_reason is StopReason.ABORT
    assert 0 < len(completion.token_ids) < 200


def test_nan_weights_are_an_error():
    async def scenario():
        server = FakeServer()
        engine = await connect(server)
        server.nan = True
        await engine.generate(request())

    with pytest.raises(RolloutError, match="must come with a finite logprob"):
        run(scenario)


@pytest.mark.parametrize(
    ("server", "vocab_size", "match"),
    [
        ({"dev_mode": False}, VOCABULARY, "VLLM_SERVER_DEV_MODE=1"),
        ({"scale_out": False}, VOCABULARY, "--enable-scale-out"),
        ({"max_model_len": 128}, VOCABULARY, r"max_model_len \(256\) tokens, and allows 128"),
        ({}, VOCABULARY + 1, f"token id {VOCABULARY}, the last of the vocabulary.*out of vocabulary"),
    ],
)
def test_a_server_that_lacks_something_is_refused_by_name(server, vocab_size, match):
    async def scenario():
        await connect(FakeServer(**server), vocab_size)

    with pytest.raises(BackendUnavailableError, match=match):
        run(scenario)


def test_a_server_that_was_refused_once_is_still_trusted_later():
    async def scenario():
        server = FakeServer()
        with pytest.raises(BackendUnavailableError):
            await connect(server, VOCABULARY + 1)
        engine = await connect(server)
        return await engine.policy_version()

    assert run(scenario) == 0


def test_nobody_at_the_address_is_a_dead_engine():
    async def scenario():
        await OpenAIEngine.connect_to("ext", "http://127.0.0.1:9", RolloutConfig(), vocab_size=8)

    with pytest.raises(EngineDiedError, match=r"127\.0\.0\.1:9/v1/models is gone: ConnectError"):
        run(scenario)


def test_weights_of_another_run_are_not_trusted_and_its_half_push_is_ended():
    async def scenario():
        server = FakeServer(label="7")
        server.unpaused.clear()
        engine = await connect(server)
        with pytest.raises(EngineStaleError, match="labelled '7' already"):
            await engine.policy_version()
        await engine.begin(1)
        await engine.commit(1)
        return await engine.policy_version(), [body.get("method") for path, body in server.calls if path == "/collective_rpc"]

    version, methods = run(scenario)
    assert version == 1
    assert methods[0] == "abandon_weight_update"


def test_a_server_that_was_restarted_is_a_dead_engine_until_it_is_connected_again():
    async def scenario():
        server = FakeServer()
        rollout = RolloutConfig(max_model_len=256, health_interval_s=0.02)
        factory = ExternalEngineFactory(rollout, "http://server", VOCABULARY, httpx.ASGITransport(server))
        fleet = Fleet(rollout, {"ext": factory}, pause_s=0.01)
        await fleet.start()
        (receiver,) = fleet.receivers()
        await asyncio.gather(asyncio.wrap_future(receiver.begin(1)), asyncio.wrap_future(receiver.commit(1)))
        assert await fleet.weights_arrived(1, ["ext"]) == ("ext",)
        server.label = "default"  # a new process with the weights it was started with
        while not fleet.needs_weights():
            await asyncio.sleep(0.005)
        restarts = fleet.status()["ext"].restarts
        await fleet.close()
        return restarts

    assert run(scenario) == 1
