"""The trajectory buffer: order, exactly once, bounded age."""

import pytest

from skyrl_mega.errors import RolloutError
from skyrl_mega.orchestration.buffer import TrajectoryBuffer
from skyrl_mega.types import StopReason, Trajectory, TrajectoryGroup, Turn


def group(name: str, version: int) -> TrajectoryGroup:
    trajectory = Trajectory(
        token_ids=[5, 6],
        loss_mask=[0, 1],
        rollout_logprobs=[0.0, -1.0],
        policy_versions=[-1, version],
        turns=(Turn(1, 2, StopReason.STOP, 1.0),),
        reward=1.0,
        terminated=True,
        truncated=False,
    )
    return TrajectoryGroup(name, name, (trajectory,))


def test_groups_leave_in_the_order_they_came_and_only_once():
    buffer = TrajectoryBuffer(max_staleness=0)
    buffer.put([group("a", 3), group("b", 3), group("c", 3)])
    assert [g.group_id for g in buffer.take(2, 3)] == ["a", "b"]
    assert [g.group_id for g in buffer.take(1, 3)] == ["c"]
    assert len(buffer) == 0


def test_taking_more_than_is_finished_is_an_error_with_both_numbers():
    buffer = TrajectoryBuffer(max_staleness=0)
    buffer.put([group("a", 0)])
    with pytest.raises(RolloutError, match=r"takes 2 groups, but only 1"):
        buffer.take(2, 0)


@pytest.mark.parametrize(("sampled", "current", "allowed"), [(0, 1, 0), (0, 3, 2), (4, 3, 2)])
def test_a_group_outside_the_staleness_bound_is_refused(sampled, current, allowed):
    buffer = TrajectoryBuffer(max_staleness=allowed)
    buffer.put([group("old", sampled)])
    with pytest.raises(RolloutError, match=f"staleness {current - sampled}"):
        buffer.take(1, current)


def test_a_group_at_the_staleness_bound_is_taken():
    buffer = TrajectoryBuffer(max_staleness=2)
    buffer.put([group("old", 1)])
    assert buffer.take(1, 3)[0].min_policy_version == 1
