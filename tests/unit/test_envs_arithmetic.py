"""The arithmetic environment: prompts, grading, and a held-out split that does not leak."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
from gymnasium.utils.env_checker import check_env

from skyrl_mega.envs.arithmetic import LEVELS, ArithmeticEnv, solve
from skyrl_mega.envs.registry import make_env
from skyrl_mega.errors import EnvError


def posed(operands: list[int], level: str = "two_digit_addition", **options):
    env = make_env("arithmetic", {"level": level, **options})
    observation, _ = env.reset(options={"payload": {"level": level, "operands": operands}})
    return env, observation


@pytest.mark.parametrize(
    ("level", "operands", "shots", "expected"),
    [
        ("two_digit_addition", [47, 35], 1, "31 + 4 = 35\n47 + 35 ="),
        ("two_digit_addition", [47, 35], 0, "47 + 35 ="),
        ("two_digit_addition", [47, 35], 2, "31 + 4 = 35\n52 + 29 = 81\n47 + 35 ="),
        ("two_digit_subtraction", [91, 17], 1, "31 - 4 = 27\n91 - 17 ="),
        ("multiplication", [6, 17], 1, "12 * 3 = 36\n6 * 17 ="),
        ("three_term_addition", [4, 20, 9], 1, "3 + 14 + 9 = 26\n4 + 20 + 9 ="),
    ],
)
def test_raw_prompt_shows_examples_and_leaves_the_question_open(level, operands, shots, expected):
    assert posed(operands, level, shots=shots)[1] == expected


def test_chat_prompt_is_one_user_message():
    _, observation = posed([47, 35], style="chat")
    assert observation == [{"role": "user", "content": "Calculate 47 + 35. Reply with only the number."}]


@pytest.mark.parametrize(("action", "reward"), [(" 82\n", 1.0), ("82", 1.0), (" 82.", 0.0), ("", 0.0), ("83", 0.0), ("082", 0.0)])
def test_raw_answer_must_be_exactly_the_number(action, reward):
    env, _ = posed([47, 35])
    assert env.step(action)[1:4] == (reward, True, False)


@pytest.mark.parametrize(
    ("action", "reward"), [("The sum of 47 and 35 is 82.", 1.0), ("82 is 47 + 35", 0.0), ("-82", 0.0), ("none", 0.0)]
)
def test_chat_answer_is_the_last_integer(action, reward):
    env, _ = posed([47, 35], style="chat")
    assert env.step(action)[1] == reward


@pytest.mark.parametrize("level", [*LEVELS, "mixed"])
def test_no_held_out_problem_is_trained_in_either_order(level):
    count = 4 if level == "one_digit_addition" else 150
    options = {"level": level}
    held_out = [ArithmeticEnv.generate_payload(i, 0, "eval", **options) for i in range(count)]
    trained = [ArithmeticEnv.generate_payload(i, seed, "train", **options) for seed in (0, 1) for i in range(2000)]
    eval_problems = {(p["level"], tuple(sorted(p["operands"]))) for p in held_out}
    train_problems = {(p["level"], tuple(sorted(p["operands"]))) for p in trained}
    assert len(eval_problems) == count, "evaluation problems repeat"
    assert not eval_problems & train_problems


def test_training_covers_most_of_what_is_not_held_out():
    trained = {tuple(ArithmeticEnv.generate_payload(i, 0, "train", level="multiplication")["operands"]) for i in range(8000)}
    assert 400 < len(trained) <= 29 * 29  # about 841 ordered pairs, 2/5 of the unordered ones held out


def test_worked_examples_are_in_no_split():
    shown = {tuple(sorted(example)) for example in LEVELS["two_digit_addition"].examples}
    for split, count in (("train", 4000), ("eval", 200)):
        drawn = {tuple(sorted(ArithmeticEnv.generate_payload(i, 0, split)["operands"])) for i in range(count)}
        assert not drawn & shown


def test_evaluation_set_is_the_same_for_every_seed_and_training_is_not():
    def draw(seed, split):
        return [ArithmeticEnv.generate_payload(i, seed, split) for i in range(20)]

    assert draw(0, "eval") == draw(7, "eval")
    assert draw(0, "train") == draw(0, "train")
    assert draw(0, "train") != draw(7, "train")


def test_payloads_do_not_depend_on_the_hash_seed_of_the_process():
    code = (
        "from skyrl_mega.envs.arithmetic import ArithmeticEnv as A;"
        "print([A.generate_payload(i, 3, s, level='mixed') for s in ('train', 'eval') for i in range(12)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    here = [ArithmeticEnv.generate_payload(i, 3, s, level="mixed") for s in ("train", "eval") for i in range(12)]
    assert outputs == {f"{here}\n"}


def test_a_level_too_small_for_the_evaluation_set_says_how_many_it_has():
    with pytest.raises(EnvError, match=r"one_digit_addition.* held-out problems, but number 129.*num_prompts"):
        ArithmeticEnv.generate_payload(128, 0, "eval", level="one_digit_addition")


def test_subtraction_is_never_negative_and_answers_are_exact():
    for i in range(300):
        operands = tuple(ArithmeticEnv.generate_payload(i, 0, "train", level="two_digit_subtraction")["operands"])
        assert solve("-", operands) == operands[0] - operands[1] >= 0
    assert solve("+", (1, 2, 3)) == 6
    assert solve("*", (6, 17)) == 102


@pytest.mark.parametrize("style", ["raw", "chat"])
def test_gymnasium_checker_passes_without_a_warning(style):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make_env("arithmetic", {"style": style}), skip_render_check=True)


def test_step_after_the_end_and_before_reset_is_an_error():
    env = make_env("arithmetic", {})
    with pytest.raises(EnvError, match="call reset first"):
        env.step("1")
    env.reset(seed=0)
    env.step("1")
    with pytest.raises(EnvError, match="call reset first"):
        env.step("1")


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"level": "two_digit_additon", "operands": [1, 2]}, "level must be one of"),
        ({"level": "two_digit_addition", "operands": [1]}, "must be 2 integers"),
        ({"level": "two_digit_addition", "operands": [1, "2"]}, "must be 2 integers"),
        ({}, "level must be one of"),
    ],
)
def test_a_bad_payload_is_refused(payload, message):
    with pytest.raises(EnvError, match=message):
        make_env("arithmetic", {}).reset(options={"payload": payload})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "two_digit_additoin"}, "did you mean 'two_digit_addition'"),
        ({"shots": 9}, "shots must be an integer from 0 to 3, but is 9"),
        ({"style": "xml"}, "style must be 'raw' or 'chat'"),
        ({"levl": "mixed"}, "has no option 'levl'; did you mean 'level'"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(EnvError, match=message):
        make_env("arithmetic", options)
