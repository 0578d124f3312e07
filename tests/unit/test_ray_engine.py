"""What of Ray engines and their cluster can be said without starting either."""

from __future__ import annotations

import asyncio
import dataclasses
import fcntl
import os
import pickle
import signal
import socket

import pytest

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import BackendUnavailableError, DeadlineError, EngineDiedError, RolloutError, WeightSyncError
from skyrl_mega.rollout import ray_cluster

ray = pytest.importorskip("ray")

from skyrl_mega.rollout.ray_engine import (  # noqa: E402
    CONTROL_CALLS,
    CallOrder,
    RayEngine,
    RayEngineFactory,
    RayReceiver,
    translated,
)


def factory(device="cpu", **settings):
    rollout = RolloutConfig(**{"max_num_seqs": 32} | settings)
    return RayEngineFactory(rollout, "/model", seed=0, threads=1, device=device, node_id="a" * 56)


def test_calls_that_overtake_each_other_are_let_in_by_number():
    async def scenario():
        order, seen = CallOrder(), []

        async def call(sender, number):
            async with order.turn(sender, number):
                await asyncio.sleep(0.001)
                seen.append((sender, number))
                if number == 1:
                    raise ValueError("a call that fails lets the next in")

        numbers = [3, 0, 2, 1, 4]
        await asyncio.gather(*(call(sender, n) for n in numbers for sender in "ab"), return_exceptions=True)
        return seen

    seen = asyncio.run(scenario())
    assert [n for sender, n in seen if sender == "a"] == [n for sender, n in seen if sender == "b"] == [0, 1, 2, 3, 4]


def test_an_engine_on_cpu_claims_nothing_and_answers_controls_while_it_is_full():
    options = factory().options({"A": "b"})
    assert (options["num_cpus"], options["num_gpus"], options["max_restarts"]) == (0, 0, 0)
    assert options["max_concurrency"] == 32 + CONTROL_CALLS
    assert options["runtime_env"] == {"env_vars": {"A": "b"}}


def test_a_disaggregated_engine_claims_its_gpus_and_a_colocated_one_its_trainers_machine():
    apart = factory("cuda", colocated=False, engine_tensor=4, engine_pipeline=2).options({})
    assert apart["num_gpus"] == 8
    together = factory("cuda", colocated=True, engine_tensor=4).options({})
    assert together["num_gpus"] == 0
    assert together["scheduling_strategy"].node_id == "a" * 56
    assert together["scheduling_strategy"].soft is False


def test_a_receiver_in_another_process_is_a_sender_of_its_own():
    receiver = RayReceiver("actor", "e0")
    copy = pickle.loads(pickle.dumps(receiver))
    assert copy.name == "e0"
    assert copy._sender != receiver._sender


def test_errors_of_an_actor_arrive_as_they_were_raised_and_its_death_as_a_dead_engine():
    def raised(cause):
        return ray.exceptions.RayTaskError("f", "traceback", cause)

    assert isinstance(translated(raised(WeightSyncError("refused")), "e0"), WeightSyncError)
    assert isinstance(translated(raised(EngineDiedError("core")), "e0"), EngineDiedError)
    assert type(translated(raised(KeyError("x")), "e0")) is RolloutError
    gone = translated(ray.exceptions.ActorDiedError(), "e0")
    assert isinstance(gone, EngineDiedError)
    assert "actor of engine e0 is gone" in str(gone)
    assert isinstance(translated(ray.exceptions.ActorUnavailableError("net", None), "e0"), EngineDiedError)
    assert isinstance(RayEngine("actor", "e0").receiver(), RayReceiver)


def test_actors_find_this_code_and_get_their_own_thread_count(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environment = ray_cluster.actor_environment({"OMP_NUM_THREADS": "3"})
    root, other = environment["PYTHONPATH"].split(os.pathsep)
    assert os.path.isdir(os.path.join(root, "skyrl_mega"))
    assert other == "/somewhere"
    assert environment["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense"])
def test_a_named_cluster_that_does_not_answer_is_an_error_and_none_is_started(address, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("must not start Ray"))
    with pytest.raises(BackendUnavailableError, match=f"no Ray cluster answers at {address}"):
        ray_cluster.connect(address, timeout_s=2)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(BackendUnavailableError, match=f"no Ray cluster answers at {address}"):
        ray_cluster.connect("auto", timeout_s=2)


def test_session_directories_of_dead_runs_are_removed_and_those_of_living_ones_stay(tmp_path):
    for name in ("dead", "alive", "newborn"):
        (tmp_path / f"{ray_cluster.SESSION_PREFIX}{name}").mkdir()
    dead, alive, newborn = (tmp_path / f"{ray_cluster.SESSION_PREFIX}{name}" for name in ("dead", "alive", "newborn"))
    (dead / ray_cluster.OWNER_FILE).touch()
    descriptor = os.open(alive / ray_cluster.OWNER_FILE, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert ray_cluster.remove_stale_sessions(tmp_path) == [dead]
    assert [path.name for path in sorted(tmp_path.iterdir())] == [alive.name, newborn.name]
    os.close(descriptor)


def test_settings_of_a_factory_travel():
    assert dataclasses.replace(pickle.loads(pickle.dumps(factory())), threads=2).threads == 2


def test_of_rays_account_of_a_death_the_sentences_that_say_why_remain():
    account = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: _CoordinatorActor\n\tpid: 14874\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
        "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) ..."
    )
    assert ray_cluster.cause_of_death(RuntimeError(account)) == (
        "The actor died unexpectedly before finishing this task. The actor is dead because its worker process has died."
    )
    assert ray_cluster.cause_of_death(RuntimeError("no sentence")) == "no sentence"


def test_a_head_that_was_started_here_and_does_not_answer_is_an_error_with_the_remedy(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        ray_cluster.RayCluster(address, tmp_path).require_head()
    with pytest.raises(BackendUnavailableError, match=rf"gcs_server, {address}\) died\. The same command resumes the run\."):
        ray_cluster.RayCluster(address, tmp_path).require_head()
    ray_cluster.RayCluster(address).require_head()  # another's: Ray itself decides how long it waits


def test_a_start_of_ray_that_fails_leaves_no_directory_and_the_handler_of_sigterm_as_it_was(monkeypatch, tmp_path):
    def take_over(**options):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RuntimeError("no port is free")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray_cluster, "SESSION_ROOT", tmp_path)
    monkeypatch.setattr(ray, "init", take_over)
    with pytest.raises(DeadlineError, match="no port is free"):
        ray_cluster.connect("local", timeout_s=0)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(tmp_path.iterdir())


def test_ctrl_c_waits_for_the_start_of_ray_and_leaves_nothing_of_it(monkeypatch, tmp_path):
    def start(**options):
        signal.raise_signal(signal.SIGINT)  # of this thread, which holds it off; another thread would hear of it at its leisure
        started.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    started = []
    monkeypatch.setattr(ray_cluster, "SESSION_ROOT", tmp_path)
    monkeypatch.setattr(ray, "init", start)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ray_cluster.connect("local", timeout_s=0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [signal.SIGTERM in mask for mask in started] == [True], "Ray's processes would hear a SIGTERM to the run's group"
    assert not list(tmp_path.iterdir())


def test_auto_joins_what_ray_start_runs_and_no_private_cluster_of_another_run(monkeypatch, tmp_path):
    """Ray's own "auto" joins any gcs_server in the list of processes: two runs on a machine, and one ends with the other."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("must not look for clusters"))
    monkeypatch.setattr(ray_cluster, "_start", lambda timeout_s: "a cluster of its own")
    monkeypatch.setattr(ray_cluster, "_join", lambda address, timeout_s: f"joined {address}")
    assert ray_cluster.connect("auto", timeout_s=1) == "a cluster of its own"
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        assert ray_cluster.connect("auto", timeout_s=1) == f"joined {address}"
        assert ray_cluster.connect("local", timeout_s=1) == "a cluster of its own"
    assert ray_cluster.connect("auto", timeout_s=1) == "a cluster of its own", "the cluster of that file is gone"
