"""Reward functions: found by name, checked before a run, called with deadlines, and whatever they do is no crash."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from helpers.rewards import reward_input
from skyrl_mega.config.schema import FunctionTerm
from skyrl_mega.errors import ConfigError, DeadlineError, RewardError
from skyrl_mega.rewards import threads as reward_threads
from skyrl_mega.rewards.function import FunctionReward

# -- two functions as users write them ------------------------------------------------------------------------------------


def brevity(one, *, target_tokens=4):
    """1 at `target_tokens` sampled tokens or fewer, falling to 0 at twice as many."""
    return min(1.0, max(0.0, 2.0 - one.num_response_tokens / target_tokens))


async def rank_by_length(group):
    """From 0 for the longest response of a group to 1 for the shortest."""
    await asyncio.sleep(0)
    order = sorted(range(len(group)), key=lambda index: -len(group[index].response))
    return [order.index(index) / max(1, len(group) - 1) for index in range(len(group))]


# -- what else functions do -------------------------------------------------------------------------------------------------

calls: list[str] = []
hanging = threading.Event()


class CountsCalls:
    async def __call__(self, one):
        return len(one.response)


counts_calls = CountsCalls()
not_a_function = 3


def fails_first(one):
    calls.append(one.response)
    if calls.count(one.response) < 3:
        raise OSError("the sandbox is gone")
    return np.float32(0.5)


def gives(one):
    return {"nan": float("nan"), "text": "0.5", "none": None, "true": True, "list": [1.0, 2.0]}[one.response]


def stops(one):
    return next(iter(()))


def exits(one):
    raise SystemExit(3)


def hangs(one):
    hanging.wait(20)
    return 1.0


async def sleeps(one):
    await asyncio.sleep(20)


def too_few(group):
    return [1.0]


def holds_one_back(group):
    return [None if one.response == "x" else 1.0 for one in group]


def waits_for_others(one):
    barrier.wait(20)
    return 1.0


barrier = threading.Barrier(4)


def score(name, *inputs, sequential=False, **settings):
    term = FunctionTerm(name="f", path=f"{__name__}:{name}", **settings)

    async def run():
        return await FunctionReward(term, sequential=sequential).score(inputs)

    return asyncio.run(run())


@pytest.mark.parametrize("sequential", [True, False])
def test_a_function_scores_one_trajectory_with_the_terms_options(sequential):
    inputs = [reward_input("12"), reward_input("123456"), reward_input("1" * 9)]
    assert score("brevity", *inputs, sequential=sequential) == [1.0, 0.5, 0.0]
    assert score("brevity", *inputs, options={"target_tokens": 6}, sequential=sequential) == [1.0, 1.0, 0.5]


def test_a_batched_function_scores_a_group_and_may_be_asynchronous():
    inputs = [reward_input("longest"), reward_input("x"), reward_input("long")]
    assert score("rank_by_length", *inputs, batched=True) == [0.0, 1.0, 0.5]
    assert score("counts_calls", *inputs) == [7.0, 1.0, 4.0]


def test_a_function_may_be_in_a_file_that_is_in_no_package(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "import dataclasses\n@dataclasses.dataclass\nclass Weights:\n    a: float = 2.0\n"
        "def words(one, *, weight=Weights().a):\n    return weight * len(one.response.split())\n"
    )

    async def run():
        term = FunctionTerm(name="f", path=f"{file}:words")
        return await FunctionReward(term).score([reward_input("to be or"), reward_input("")])

    assert asyncio.run(run()) == [6.0, 0.0]


def test_plain_functions_run_side_by_side():
    assert score("waits_for_others", *[reward_input(sample=n) for n in range(4)]) == [1.0] * 4


def test_a_function_that_fails_is_tried_again_and_then_reported_with_its_place():
    calls.clear()
    assert score("fails_first", reward_input("a"), retries=2) == [0.5]
    [error] = score("fails_first", reward_input("b", sample=3), retries=1)
    assert isinstance(error, RewardError)
    assert str(error) == "reward `f` failed for group 'g', sample 3: OSError: the sandbox is gone"
    assert calls == ["a"] * 3 + ["b"] * 2


def test_only_finite_numbers_are_scores():
    outcomes = score("gives", *map(reward_input, ("true", "nan", "text", "none", "list")))
    assert outcomes[0] == 1.0
    assert all(isinstance(outcome, RewardError) for outcome in outcomes[1:])
    assert "must give a finite number, but for group 'g', sample 0 it gave '0.5'" in str(outcomes[2])


@pytest.mark.parametrize("name", ["stops", "exits"])
def test_exceptions_that_end_generators_or_processes_are_failures_like_others(name):
    [outcome] = score(name, reward_input())
    assert isinstance(outcome, RewardError)
    assert {"stops": "StopIteration", "exits": "SystemExit(3)"}[name] in str(outcome)


def test_a_batched_function_must_give_one_score_for_each_input():
    inputs = [reward_input("x"), reward_input("y")]
    outcomes = score("too_few", *inputs, batched=True)
    assert ["it gave 1 scores for 2 inputs" in str(outcome) for outcome in outcomes] == [True, True]
    held_back, one = score("holds_one_back", *inputs, batched=True)
    assert isinstance(held_back, RewardError)
    assert one == 1.0


@pytest.mark.parametrize(("name", "sequential"), [("hangs", True), ("hangs", False), ("sleeps", False)])
def test_a_function_that_hangs_runs_out_of_time(name, sequential):
    try:
        [error] = score(name, reward_input(), timeout_s=0.05, sequential=sequential)
        assert "TimeoutError: no answer within 0.05 s" in str(error)
    finally:
        hanging.set()
        hanging.clear()


def test_too_many_hanging_functions_end_the_run(monkeypatch):
    monkeypatch.setattr(reward_threads, "MAX_LOST_THREADS", 2)
    try:
        with pytest.raises(DeadlineError, match=r"3 calls of reward `f` hang beyond timeout_s \(0.05 s\)"):
            score("hangs", *[reward_input(sample=n) for n in range(3)], timeout_s=0.05)
    finally:
        hanging.set()
        hanging.clear()


def test_the_event_loop_goes_on_while_a_plain_function_runs():
    async def run():
        reward = FunctionReward(FunctionTerm(name="f", path=f"{__name__}:hangs"))
        task = asyncio.create_task(reward.score([reward_input()]))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not task.done()
        hanging.set()
        return await task

    try:
        assert asyncio.run(run()) == [1.0]
    finally:
        hanging.clear()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("brevitty", {}, r"has no function 'brevitty'. Did you mean 'brevity'\?"),
        ("not_a_function", {}, "has no function 'not_a_function'"),
        ("brevity", {"target_token": 3}, "unexpected keyword argument 'target_token'.*Did you mean `target_tokens`?"),
        ("waits_for_others", {"one": 3}, "multiple values for argument 'one'.*Its options: none"),
        ("test_plain_functions_run_side_by_side", {}, "must take one RewardInput"),
    ],
)
def test_a_function_that_can_not_be_called_is_refused_before_the_run(name, options, message):
    with pytest.raises(ConfigError, match=message):
        FunctionReward(FunctionTerm(name="f", path=f"{__name__}:{name}", options=options))


def test_a_module_that_can_not_be_imported_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"path of reward `f`: no module 'no_such_module' .*PYTHONPATH"):
        FunctionReward(FunctionTerm(name="f", path="no_such_module:f"))
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(ConfigError, match=r"broken.py:f` raised SyntaxError"):
        FunctionReward(FunctionTerm(name="f", path=f"{tmp_path / 'broken.py'}:f"))
    (tmp_path / "broken.py").write_text("def f(one): return 1.0\n")
    FunctionReward(FunctionTerm(name="f", path=f"{tmp_path / 'broken.py'}:f"))
