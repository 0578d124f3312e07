"""What the rollout side says of a step: staleness of its groups, and who waited for whom."""

import pytest

from skyrl_mega.orchestration import flight
from skyrl_mega.orchestration.flight import FlightStats, overlap_metrics
from skyrl_mega.types import StopReason, Trajectory, TrajectoryGroup, Turn


def group(name: str, *versions: int) -> TrajectoryGroup:
    mask = [0] + [1] * len(versions)
    turns = (Turn(1, len(mask), StopReason.STOP, 1.0),)
    trajectory = Trajectory([5] * len(mask), mask, [0.0] * len(mask), [-1, *versions], turns, 1.0, True, False)
    return TrajectoryGroup(name, name, (trajectory,))


def test_staleness_is_of_the_oldest_token_of_a_group():
    metrics = FlightStats().step([group("a", 3, 3), group("b", 1, 2, 3), group("c", 2, 2)], 3, wait_s=0.5, ready=4)
    assert metrics["staleness/mean"] == pytest.approx(1.0)
    assert metrics["staleness/max"] == 2
    assert [metrics[f"staleness/share_{n}"] for n in (0, 1, 2)] == pytest.approx([1 / 3] * 3)
    assert metrics["staleness/tokens_mean"] == pytest.approx((0 + 0 + 2 + 1 + 0 + 1 + 1) / 7)
    assert metrics["staleness/mixed_share"] == pytest.approx(1 / 3)
    assert (metrics["flight/wait_s"], metrics["flight/ready"]) == (0.5, 4)


def test_time_in_flight_counts_once_however_many_groups_fly(monkeypatch):
    now = iter([0.0, 1.0, 5.0, 8.0, 10.0, 13.0])
    monkeypatch.setattr(flight.time, "perf_counter", lambda: next(now))
    stats = FlightStats()  # 0
    stats.begin()  # 1
    stats.begin()
    stats.end()
    stats.end()  # 5
    stats.begin()  # 8
    first = stats.step([group("a", 0)], 0, wait_s=0.0, ready=0)  # 10
    assert (first["flight/busy_s"], first["flight/interval_s"], first["flight/in_flight"]) == (6.0, 10.0, 1.0)
    second = stats.step([group("b", 0)], 0, wait_s=0.0, ready=0)  # 13
    assert (second["flight/busy_s"], second["flight/interval_s"]) == (3.0, 3.0)


def test_counts_are_of_one_step():
    stats = FlightStats()
    stats.count("ended_early", 2)
    assert stats.step([group("a", 0)], 0, wait_s=0.0, ready=0)["flight/ended_early"] == 2
    assert "flight/ended_early" not in stats.step([group("b", 0)], 0, wait_s=0.0, ready=0)


def test_overlap_is_measured_against_the_longer_of_generation_and_training():
    row = {
        "time/step_s": 4.0,
        "time/rollout_s": 0.5,
        "time/train_s": 2.5,
        "time/pack_s": 0.5,
        "time/sync_s": 0.25,
        "flight/busy_s": 3.6,
        "flight/interval_s": 4.0,
    }
    metrics = overlap_metrics(row)
    assert metrics["overlap/efficiency"] == pytest.approx(0.9)
    assert metrics["overlap/train_share"] == pytest.approx(0.75)
    assert metrics["overlap/wait_share"] == pytest.approx(0.125)
    assert metrics["overlap/other_share"] == pytest.approx(0.0625)
