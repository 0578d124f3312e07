"""Process groups, their deadlines and the small collectives, over gloo."""

from __future__ import annotations

import os
import time

import pytest

from helpers.spawn import run_ranks
from skyrl_mega.config.schema import ParallelConfig
from skyrl_mega.errors import ConfigError, DeadlineError


def _join(**settings):
    from skyrl_mega.parallel.device import resolve_device
    from skyrl_mega.parallel.topology import init_topology

    return init_topology(ParallelConfig(**settings), resolve_device("cpu"), seed=0)


def _places_and_collectives(rank):
    data = _join(tensor=1)
    places = [(data.rank, data.tp_rank, data.tp_size, data.dp_rank, data.dp_size)]
    got = data.broadcast_object({"tokens": [rank, 1, 2]}, "test")
    summed = data.all_reduce_metrics({"a": rank + 1.0, "b": 10.0})
    largest = data.all_reduce_metrics({"a": rank + 1.0}, op="max")
    mean = data.all_reduce_metrics({"a": rank + 1.0}, op="mean")
    data.barrier("test")
    data.destroy()
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    tensor = _join(tensor=2)
    places.append((tensor.rank, tensor.tp_rank, tensor.tp_size, tensor.dp_rank, tensor.dp_size))
    copies = tensor.all_reduce_metrics({"a": 3.0})
    tensor.destroy()
    return places, got, summed, largest, mean, copies


def test_two_ranks_find_their_places_and_reduce_metrics_over_data_parallel_ranks_only():
    results = run_ranks(_places_and_collectives, 2)
    assert [r[0] for r in results] == [[(0, 0, 1, 0, 2), (0, 0, 2, 0, 1)], [(1, 0, 1, 1, 2), (1, 1, 2, 0, 1)]]
    for _, got, summed, largest, mean, copies in results:
        assert got == {"tokens": [0, 1, 2]}
        assert summed == {"a": 3.0, "b": 20.0}
        assert largest == {"a": 2.0}
        assert mean == {"a": 1.5}
        assert copies == {"a": 3.0}, "tensor ranks hold copies: they must not be added up"


def _one_rank_is_late(rank):
    topology = _join(timeout_s=3.0)
    topology.barrier("warm-up")
    if rank == 1:
        time.sleep(6)
        return ""
    with pytest.raises(DeadlineError) as caught:
        topology.barrier("weight sync", step=7)
    return str(caught.value)


def test_a_barrier_past_its_deadline_names_phase_step_and_missing_rank():
    message = run_ranks(_one_rank_is_late, 2, timeout_s=60)[0]
    assert "'weight sync'" in message
    assert "step 7" in message
    assert "3 s" in message
    assert "Ranks 1 failed" in message


def _rank_0_never_sends(rank):
    topology = _join(timeout_s=3.0)
    topology.barrier("warm-up")
    if rank == 0:
        time.sleep(6)
        return ""
    with pytest.raises(DeadlineError) as caught:
        topology.broadcast_object(None, "rollout")
    return str(caught.value)


def test_a_broadcast_that_never_comes_names_its_phase_and_rank():
    message = run_ranks(_rank_0_never_sends, 2, timeout_s=60)[1]
    assert "Rank 1 of 2" in message
    assert "'rollout'" in message


def test_a_world_of_one_needs_no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    topology = _join()
    try:
        assert (topology.world_size, topology.rank, topology.is_main) == (1, 0, True)
        assert topology.broadcast_object("x", "test") == "x"
        assert topology.all_reduce_metrics({"a": 2.0}, op="mean") == {"a": 2.0}
        topology.barrier("test")
        with pytest.raises(ConfigError, match="exist already"):
            _join()
    finally:
        topology.destroy()


def test_sizes_that_do_not_divide_the_world_are_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=r"world size \(1\).*2 x 1 x 1 = 2"):
        _join(tensor=2)


def test_half_a_launcher_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"RANK.*torchrun"):
        _join()


def _fails_on_rank_1(rank):
    if rank == 1:
        raise ValueError("broken on purpose")
    return rank


def test_run_ranks_reports_the_traceback_of_the_rank_that_failed():
    with pytest.raises(AssertionError, match=r"(?s)1 of 2 ranks failed.*rank 1.*broken on purpose"):
        run_ranks(_fails_on_rank_1, 2)
