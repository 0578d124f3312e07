"""Admission: the bound on staleness holds for every group, whatever the lengths, and the trainer is never starved by it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_mega.orchestration.admission import Admission

B = 4


def test_synchronous_training_begins_a_step_and_nothing_while_it_trains():
    rule = Admission(B, max_staleness=0, max_steps=10)
    assert rule.room(policy_version=3, next_version=3, outstanding=0) == B
    assert rule.room(policy_version=3, next_version=3, outstanding=3) == 1
    assert rule.room(policy_version=3, next_version=4, outstanding=0) == 0


def test_one_step_off_begins_the_next_step_while_one_is_trained():
    rule = Admission(B, max_staleness=1, max_steps=10)
    assert rule.room(policy_version=3, next_version=3, outstanding=0) == 2 * B
    assert rule.room(policy_version=3, next_version=4, outstanding=0) == B


def test_nothing_is_begun_that_no_step_will_train():
    rule = Admission(B, max_staleness=4, max_steps=10)
    assert rule.room(policy_version=8, next_version=8, outstanding=0) == 2 * B
    assert rule.room(policy_version=9, next_version=9, outstanding=B) == 0
    assert rule.room(policy_version=9, next_version=10, outstanding=0) == 0


def test_oversampling_adds_its_share_rounded_up():
    assert Admission(B, 0, 10, oversampling=0.3).room(0, 0, 0) == B + 2


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32), staleness=st.integers(0, 5), drop_share=st.sampled_from([0.0, 0.3]))
def test_no_group_exceeds_the_bound_and_every_step_is_full(seed, staleness, drop_share):
    """Random lengths and drops; the trainer waits for the groups that are due, and takes the others as they finish."""
    rng = random.Random(seed)
    max_steps = 12
    rule = Admission(B, staleness, max_steps)
    outstanding: dict[int, tuple[int, float]] = {}  # number -> (version it was begun at, when it finishes)
    numbers = iter(range(10**6))
    clock = 0.0

    def admit(version, next_version):
        for _ in range(rule.room(version, next_version, len(outstanding))):
            length = rng.expovariate(1.0) * (20 if rng.random() < 0.05 else 1)
            outstanding[next(numbers)] = (version, clock + length)

    def drop_finished(version, next_version):
        for number in [n for n, (_, end) in outstanding.items() if end <= clock]:
            if number not in checked and rng.random() < drop_share:
                del outstanding[number]
            checked.add(number)
        admit(version, next_version)

    checked: set[int] = set()
    for version in range(max_steps):
        admit(version, version)
        while True:
            drop_finished(version, version)
            ready = [n for n, (_, end) in outstanding.items() if end <= clock and n in checked]
            ready.sort(key=lambda n: (outstanding[n][0], n))
            deadlines = {n: rule.deadline(begun) for n, (begun, _) in outstanding.items()}
            if len(ready) >= B and rule.leaves_enough_time(version, [deadlines[n] for n in ready[:B]], list(deadlines.values())):
                break
            clock = min(end for n, (_, end) in outstanding.items() if n not in ready)
        for number in ready[:B]:
            assert 0 <= version - outstanding.pop(number)[0] <= staleness
        admit(version, version + 1)
        clock += rng.random() * 3
    assert not outstanding, "groups were begun that no step trains"


@pytest.mark.parametrize("staleness", [1, 3])
def test_engines_have_work_while_a_step_is_trained(staleness):
    rule = Admission(B, staleness, max_steps=100)
    assert rule.room(policy_version=7, next_version=8, outstanding=0) == staleness * B
