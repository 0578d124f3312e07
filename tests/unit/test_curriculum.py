"""A curriculum draws half-solved prompts most often, starves none, and goes on exactly where it stood."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_mega.config.schema import Config, DataConfig, EnvConfig, EvalConfig, SamplingConfig, TrainerConfig
from skyrl_mega.data.prompts import FiniteGeneratorSource, GeneratorPromptSource, RowPromptSource, make_prompt_source
from skyrl_mega.data.sampling.curriculum import FLOOR, CurriculumPromptSource, success_rate, weight
from skyrl_mega.envs.registry import get_env_class
from skyrl_mega.errors import DataError
from skyrl_mega.protocols import CurriculumSource, PromptSource
from skyrl_mega.types import StopReason, Trajectory, TrajectoryGroup, Turn


def curriculum(count=40, seed=0) -> CurriculumPromptSource:
    return CurriculumPromptSource(RowPromptSource([{"n": n} for n in range(count)], [], seed, "rows"), seed)


def played(prompt_id, *rewards, **metrics) -> TrajectoryGroup:
    turns = (Turn(1, 2, StopReason.STOP, 0.0),)
    episodes = (Trajectory([1, 2], [0, 1], [0.0, -1.0], [-1, 0], turns, r, True, False, metrics) for r in rewards)
    return TrajectoryGroup(f"g/{prompt_id}", prompt_id, tuple(episodes))


def test_it_is_a_prompt_source_that_learns_and_others_are_not():
    assert isinstance(curriculum(), PromptSource)
    assert isinstance(curriculum(), CurriculumSource)
    assert not isinstance(RowPromptSource([{"n": 0}], [], 0, "rows"), CurriculumSource)


@pytest.mark.parametrize(
    ("success", "expected"),
    [(None, 1.0), (0.5, 1.0), (0.25, 0.75), (0.75, 0.75), (0.9, 0.36), (0.0, FLOOR), (1.0, FLOOR), (0.99, FLOOR)],
)
def test_weights_peak_at_one_half_and_never_fall_below_the_floor(success, expected):
    assert weight(success) == pytest.approx(expected)


def test_success_is_accuracy_where_there_is_one_else_the_reward_within_0_and_1():
    assert success_rate(played("rows:0", 0.0, 1.0, 1.0, 1.0)) == 0.75
    assert success_rate(played("rows:0", -3.0, 0.5, 7.0)) == 0.5
    assert success_rate(played("rows:0", 9.0, 9.0, accuracy=0.25)) == 0.25


def test_an_estimate_begins_with_the_first_group_and_moves_half_way_with_each_next():
    source = curriculum()
    assert source.success("rows:3") is None
    for rewards, expected in (((1.0, 1.0), 1.0), ((0.0, 0.0), 0.5), ((0.0, 1.0), 0.5), ((0.0, 0.0), 0.25)):
        source.observe(played("rows:3", *rewards))
        assert source.success("rows:3") == pytest.approx(expected, abs=1 / 508)
    assert source.success("rows:4") is None


def test_the_first_epoch_has_every_prompt_once_in_the_rows_own_order():
    rows = RowPromptSource([{"n": n} for n in range(40)], [], 0, "rows")
    assert curriculum().next(40) == rows.next(40)


def test_draws_are_in_proportion_to_weights_and_no_prompt_starves():
    source = curriculum(3)
    for prompt_id, rewards in (("rows:0", (0.0, 1.0)), ("rows:1", (0.0, 0.0, 0.0, 1.0)), ("rows:2", (1.0, 1.0))):
        source.observe(played(prompt_id, *rewards))
    counts = Counter(prompt.prompt_id for prompt in source.next(3700))
    share = {name: count / 3700 for name, count in counts.items()}
    total = 1.0 + 0.75 + FLOOR
    assert share["rows:0"] == pytest.approx(1.0 / total, abs=0.02)
    assert share["rows:1"] == pytest.approx(0.75 / total, abs=0.02)
    assert share["rows:2"] == pytest.approx(FLOOR / total, abs=0.02)
    metrics = source.metrics()
    assert metrics["sampling/curriculum_tried"] == 1.0
    assert metrics["sampling/curriculum_success"] == pytest.approx((0.5 + 0.25 + 1.0) / 3, abs=0.01)
    assert metrics["sampling/curriculum_passed_over"] > 0
    assert source.metrics()["sampling/curriculum_passed_over"] == 0


def test_a_run_of_failures_still_draws():
    source = curriculum(2)
    for prompt_id in ("rows:0", "rows:1"):
        source.observe(played(prompt_id, 0.0, 0.0))
    assert len(source.next(50)) == 50


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 19), st.integers(0, 4)), max_size=12), st.integers(0, 12))
def test_a_resumed_curriculum_goes_on_as_the_one_that_was_killed(history, cut):
    def play(source, events):
        for count, number, correct in events:
            drawn.extend(prompt.prompt_id for prompt in source.next(count))
            source.observe(played(f"rows:{number}", *([1.0] * correct + [0.0] * (4 - correct))))

    drawn: list[str] = []
    whole = curriculum(20, seed=3)
    play(whole, history)
    expected, drawn = drawn, []
    first, second = curriculum(20, seed=3), curriculum(20, seed=3)
    play(first, history[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    play(second, history[cut:])
    assert drawn == expected
    assert second.state_dict() == whole.state_dict()


def test_the_order_in_which_groups_of_different_prompts_finish_changes_nothing():
    one, other = curriculum(), curriculum()
    groups = [played(f"rows:{n}", *([1.0] * (n % 5) + [0.0] * (4 - n % 5))) for n in range(40)]
    for source, order in ((one, groups), (other, groups[::-1])):
        for group in order:
            source.observe(group)
    assert one.next(100) == other.next(100)


def test_a_state_takes_about_a_byte_a_prompt():
    source = curriculum(20_000)
    assert len(json.dumps(source.state_dict())) < 1000
    for number in range(20_000):
        source.observe(played(f"rows:{number}", float(number % 3 == 0), float(number % 7 == 0), float(number % 11 == 0)))
    assert len(json.dumps(source.state_dict())) < 26_000


def test_a_curriculum_may_begin_in_a_resumed_run_and_end_in_one():
    rows = RowPromptSource([{"n": n} for n in range(40)], [], 0, "rows")
    rows.next(50)
    begun = curriculum()
    begun.load_state_dict(rows.state_dict())
    assert begun.next(5) == rows.next(5)
    begun.observe(played("rows:3", 1.0, 0.0))
    ended = RowPromptSource([{"n": n} for n in range(40)], [], 0, "rows")
    ended.load_state_dict(begun.state_dict())
    assert ended.next(3) == rows.next(3)


def test_a_state_of_other_data_or_a_damaged_one_is_refused():
    with pytest.raises(DataError, match="its fingerprint"):
        curriculum().load_state_dict(curriculum(41).state_dict())
    with pytest.raises(DataError, match="success rates of 41 prompts, and there are 40"):
        curriculum().load_state_dict({**curriculum().state_dict(), "success": curriculum(41).state_dict()["success"]})
    with pytest.raises(DataError, match="success rates of the curriculum are damaged"):
        curriculum().load_state_dict({**curriculum().state_dict(), "success": "not what it was"})


# ---- from the configuration -----------------------------------------------------------------------------------------------


def config(limit=0, curriculum="success") -> Config:
    return Config(
        env=EnvConfig(name="arithmetic", options={"level": "multiplication"}),
        data=DataConfig(limit=limit),
        evaluation=EvalConfig(num_prompts=10),
        sampling=SamplingConfig(curriculum=curriculum),
        trainer=TrainerConfig(seed=3),
    )


def test_a_generators_first_prompts_come_again_and_its_held_out_ones_stay_its_own():
    arithmetic = get_env_class("arithmetic")
    source = make_prompt_source(config(limit=30), arithmetic)
    assert isinstance(source, CurriculumPromptSource)
    endless = GeneratorPromptSource(arithmetic, {"level": "multiplication"}, 3)
    drawn = source.next(60)
    assert Counter(p.prompt_id for p in drawn) == {f"ArithmeticEnv[:30]:{n}": 2 for n in range(30)}
    assert {str(p.payload) for p in drawn} == {str(p.payload) for p in endless.next(30)}
    assert source.eval_prompts(10) == endless.eval_prompts(10)
    assert isinstance(make_prompt_source(config(limit=30, curriculum="none"), arithmetic), FiniteGeneratorSource)


def test_an_endless_generator_is_refused():
    with pytest.raises(DataError, match=r"generator of arithmetic never ends. Set data.limit .* or sampling.curriculum=none"):
        make_prompt_source(config(), get_env_class("arithmetic"))
