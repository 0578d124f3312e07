"""Reading numbers and grading grade-school answers."""

from __future__ import annotations

from decimal import Decimal

import pytest

from skyrl_mega.envs.gsm8k import INSTRUCTION, GSM8KEnv, last_number, marked_number
from skyrl_mega.envs.registry import make_env
from skyrl_mega.errors import EnvError

ROW = {"question": "A shop sells 3 boxes at $400 each. What does it take?", "answer": "3*400 = <<3*400=1200>>1200\n#### 1,200"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", "7"),
        ("-7", "-7"),
        ("x = -3.", "-3"),
        ("$1,234.50", "1234.5"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("50%", "50"),
        (".5 litres", "0.5"),
        ("8-3", "3"),
        ("10,000,000", "10000000"),
        ("1,2", "2"),
        ("first 5 then 12 apples", "12"),
        ("**18**", "18"),
    ],
)
def test_numbers_are_read_as_people_write_them(text, value):
    assert last_number(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "none", "####", "#### ", "#### none\n5", "5"])
def test_no_marked_number_is_none(text):
    assert marked_number(text) is None


@pytest.mark.parametrize(
    ("action", "strict", "flexible"),
    [
        ("so 3*400.\n#### 1200", (1.0, 1.0), (1.0, 1.0)),
        ("#### $1,200.00", (1.0, 1.0), (1.0, 1.0)),
        ("#### 3 * 400 = 1200", (1.0, 1.0), (1.0, 1.0)),
        ("#### 1200\nNext question: 5 + 5", (1.0, 1.0), (1.0, 1.0)),
        ("#### 1200\n#### 7", (0.0, 1.0), (0.0, 1.0)),
        ("#### 7 (it is not 1201)", (0.0, 1.0), (0.0, 1.0)),
        ("The answer is 1200.", (0.0, 0.0), (1.0, 0.0)),
        ("I don't know", (0.0, 0.0), (0.0, 0.0)),
        ("#### unknown, perhaps\n1200", (0.0, 0.0), (1.0, 0.0)),
    ],
)
def test_grading_strict_and_flexible(action, strict, flexible):
    for grading, (accuracy, format_) in (("strict", strict), ("flexible", flexible)):
        env = make_env("gsm8k", {"grading": grading})
        env.reset(options={"payload": ROW})
        _, reward, terminated, _, report = env.step(action)
        assert (reward, terminated, report["metrics"]) == (accuracy, True, {"accuracy": accuracy, "format": format_})


def test_observation_is_the_question_and_the_instruction():
    observation, _ = make_env("gsm8k", {}).reset(options={"payload": ROW})
    assert observation == [{"role": "user", "content": f"{ROW['question']}\n\n{INSTRUCTION}"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "#### 1"}, "must have the text 'question'"),
        ({"question": "q", "answer": 5}, "must have the text 'answer', but has 5"),
        ({"question": "q", "answer": "it is 5"}, "must hold a number after '####'"),
    ],
)
def test_a_bad_row_is_refused(row, message):
    with pytest.raises(EnvError, match=message):
        GSM8KEnv.check_payload(row)


def test_a_question_with_another_solution_is_the_same_task():
    assert GSM8KEnv.payload_key(ROW) == GSM8KEnv.payload_key({**ROW, "answer": "#### 1200", "id": 7})
    assert GSM8KEnv.payload_key(ROW) != GSM8KEnv.payload_key({**ROW, "question": "another?"})


def test_without_a_row_there_is_nothing_to_pose():
    with pytest.raises(EnvError, match="can't generate prompts"):
        make_env("gsm8k", {}).reset(seed=0)
