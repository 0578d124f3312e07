"""Two real engines in Ray actors behind one router: the same tokens as anywhere, through new weights, kills and hangs.

The tests share one fleet and follow each other in the order of the file: each leaves it as the next one needs it. Engine e0
computes its KV cache again after an update, e1 keeps it. Oracle: Hugging Face in float32, and the in-process engine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from helpers.loop_thread import LoopThread
from helpers.weight_fleet import BucketWriter
from helpers.weights_push import logprob_errors, perturbed, push
from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.types import GenerationRequest, SamplingParams

ROLLOUT = RolloutConfig(
    dtype="float32",
    max_model_len=512,
    max_num_seqs=64,
    health_interval_s=3.0,
    request_timeout_s=60.0,
    start_timeout_s=200.0,
    kv_cache_on_update="recompute",
)
PROMPT = [(7 * i) % 250 + 5 for i in range(100)]  # three full cache blocks and a bit


@pytest.fixture(scope="module")
def base_model(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def new_model(base_model):
    return perturbed(base_model, seed=3)


@pytest.fixture(scope="module")
def loop():
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def fleet(tiny_model_dir, loop):
    from skyrl_mega.rollout import ray_cluster
    from skyrl_mega.rollout.fleet import Fleet
    from skyrl_mega.rollout.ray_engine import RayEngineFactory

    cluster = ray_cluster.connect("local", timeout_s=120)
    keeping = dataclasses.replace(ROLLOUT, kv_cache_on_update="keep")
    factories = {
        name: RayEngineFactory(rollout, str(tiny_model_dir), seed=0, threads=1, device="cpu")
        for name, rollout in (("e0", ROLLOUT), ("e1", keeping))
    }
    fleet = Fleet(ROLLOUT, factories)
    loop.run(fleet.start(), timeout_s=300)
    yield fleet
    loop.run(fleet.close())
    cluster.close()


@pytest.fixture(scope="module")
def writer():
    writer = BucketWriter()
    yield writer
    writer.close()


def engine_named(fleet, name):
    return fleet._members[name].engine


def requests(count, num_tokens=48, length=20):
    generator = torch.Generator().manual_seed(count)
    prompts = torch.randint(5, 261, (count, length), generator=generator).tolist()
    return [
        GenerationRequest(f"r{i}", prompt, SamplingParams(max_new_tokens=num_tokens, seed=i)) for i, prompt in enumerate(prompts)
    ]


async def generate_on_each(engines, request):
    return await asyncio.gather(*(engine.generate(request) for engine in engines))


async def generate_all(fleet, requests):
    return await asyncio.gather(*(fleet.generate(request) for request in requests))


def wait_until(condition, timeout_s, what):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} within {timeout_s} s"
        time.sleep(0.1)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def states(fleet):
    return {name: status.state.value for name, status in fleet.status().items()}


def test_seeded_turns_are_those_of_the_in_process_engine(fleet, loop, engine):
    asked = requests(24)
    expected = engine.generate(asked)
    completions = loop.run(generate_all(fleet, asked))
    assert [c.request_id for c in completions] == [r.request_id for r in asked]
    for ours, theirs in zip(completions, expected, strict=True):
        assert list(ours.token_ids) == list(theirs.token_ids)
        assert (ours.text, ours.stop_reason, set(ours.policy_versions)) == (theirs.text, theirs.stop_reason, {0})
        torch.testing.assert_close(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), rtol=0, atol=1e-3)
    metrics = fleet.metrics()
    assert min(metrics["engine/e0/requests"], metrics["engine/e1/requests"]) >= 4


def test_weights_change_under_running_turns(fleet, loop, writer, base_model, new_model):
    """One long turn per engine, frozen in the middle: each token is of the weights whose version it carries."""
    engines = [engine_named(fleet, name) for name in ("e0", "e1")]
    long_turns = [
        GenerationRequest(f"long {i}", PROMPT, SamplingParams(max_new_tokens=400, seed=i, temperature=1.0)) for i in range(8)
    ]
    running = [loop.start(engine.generate(request)) for engine in engines for request in long_turns]
    # A short one that comes after them has ended: they have begun, and have most of their way before them.
    short = GenerationRequest("short", PROMPT, SamplingParams(max_new_tokens=4, seed=9))
    loop.run(generate_on_each(engines, short))
    push(writer, fleet.receivers(), new_model, version=1)
    served = loop.run(fleet.weights_arrived(1, ["e0", "e1"]))
    completions = [future.result(120) for future in running]

    assert served == ("e0", "e1")
    for name, turns in (("e0", completions[:8]), ("e1", completions[8:])):
        swapped = [c for c in turns if set(c.policy_versions) == {0, 1}]
        assert swapped, f"no turn of {name} was in flight during the update"
        for completion in swapped:
            versions = list(completion.policy_versions)
            assert versions == sorted(versions)
            split = versions.index(1)
            assert logprob_errors(base_model, PROMPT, completion)[:split].max() < 1e-3
            after = logprob_errors(new_model, PROMPT, completion)[split:].max()
            # Old keys and values show in the logprobs; recomputed ones do not.
            assert (after < 1e-3) == (name == "e0")
    for engine in engines:  # a new turn finds no prefix of the old weights, kept or not
        completion = loop.run(engine.generate(GenerationRequest("new", PROMPT, SamplingParams(max_new_tokens=12, seed=1))))
        assert set(completion.policy_versions) == {1}
        assert logprob_errors(new_model, PROMPT, completion).max() < 1e-3


def test_an_actor_killed_during_generate_loses_and_doubles_nothing(fleet, loop, new_model):
    victim = loop.run(engine_named(fleet, "e0").process_ids())
    asked = requests(40, num_tokens=200)
    running = loop.start(generate_all(fleet, asked))
    wait_until(lambda: fleet.router.loads()["e0"].in_flight > 8, 20, "e0 gets requests")
    os.kill(victim["actor"], signal.SIGKILL)
    completions = running.result(120)

    assert [c.request_id for c in completions] == [r.request_id for r in asked]
    for request, completion in zip(asked[:8], completions, strict=False):
        assert set(completion.policy_versions) == {1}
        assert logprob_errors(new_model, request.prompt_token_ids, completion).max() < 1e-3
    assert fleet.metrics()["fleet/retries"] >= 1
    wait_until(lambda: gone(victim["engine_core"]), 20, "the engine core dies with its actor")


def test_the_engine_that_replaces_it_serves_once_it_has_the_current_weights(fleet, loop, writer, new_model):
    wait_until(lambda: fleet.needs_weights() == ("e0",), 200, "e0 is up again, and stale")
    assert states(fleet) == {"e0": "stale", "e1": "serving"}
    push(writer, fleet.receivers(stale_only=True), new_model, version=1)
    assert loop.run(fleet.weights_arrived(1, ["e0"])) == ("e0", "e1")
    completion = loop.run(engine_named(fleet, "e0").generate(requests(1)[0]))
    assert set(completion.policy_versions) == {1}
    assert logprob_errors(new_model, requests(1)[0].prompt_token_ids, completion).max() < 1e-3


def test_an_engine_core_killed_during_generate_is_noticed_by_its_actor(fleet, loop):
    from skyrl_mega.errors import EngineDiedError

    engine = engine_named(fleet, "e0")
    victim = loop.run(engine.process_ids())
    running = loop.start(engine.generate(GenerationRequest("doomed", PROMPT, SamplingParams(max_new_tokens=400, seed=4))))
    time.sleep(0.05)
    receiver = engine.receiver()
    os.kill(victim["engine_core"], signal.SIGKILL)
    with pytest.raises(EngineDiedError, match="engine e0"):
        running.result(30)
    with pytest.raises(EngineDiedError, match="engine e0"):
        receiver.begin(2).result(30)
    wait_until(lambda: gone(victim["actor"]), 30, "the fleet kills the actor of a dead engine")


def test_a_hung_engine_is_ended_and_its_requests_are_answered(fleet, loop):
    """e1's core is stopped, which no exception reports; e0 is still starting and comes up without the current weights."""
    victim = loop.run(engine_named(fleet, "e1").process_ids())
    running = loop.start(generate_all(fleet, requests(6, num_tokens=100)))
    os.kill(victim["engine_core"], signal.SIGSTOP)
    wait_until(lambda: gone(victim["engine_core"]) and gone(victim["actor"]), 90, "the hung engine is killed, stopped as it is")
    assert "serving" not in states(fleet).values()
    assert fleet.status()["e1"].restarts <= 1
    running.cancel()
    wait_until(lambda: fleet.router.queue_depth == 0, 10, "cancelled requests leave the queue")


DRIVER = """
import os, sys, time, ray
from skyrl_mega.rollout import ray_cluster
cluster = ray_cluster.connect("local", timeout_s=120)

@ray.remote(num_cpus=0)
class Actor:
    def pid(self):
        return os.getpid()

actor = Actor.remote()
print("ACTOR", ray.get(actor.pid.remote()), cluster.session_dir, flush=True)
time.sleep(600)
"""


def test_a_killed_driver_takes_its_cluster_with_it():
    """All but two small agents of Ray's, which notice the end of their raylet after most of a minute."""
    from skyrl_mega.rollout.ray_cluster import remove_stale_sessions

    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    try:
        _, actor, session_dir = next(line for line in driver.stdout if line.startswith("ACTOR")).split()
        children = psutil.Process(driver.pid).children(recursive=True)
        pids = [child.pid for child in children if "Agent" not in " ".join(child.cmdline())]
    finally:
        driver.kill()
        driver.wait()
    assert int(actor) in pids
    assert len(pids) >= 4
    wait_until(lambda: all(gone(pid) for pid in pids), 30, f"all of {len(pids)} processes of a killed driver end")
    assert session_dir in map(str, remove_stale_sessions())
    assert not os.path.exists(session_dir)
