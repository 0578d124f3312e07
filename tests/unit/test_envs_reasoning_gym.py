"""The adapter for the reasoning-gym package: its oracle answers earn the reward, and its splits do not touch."""

from __future__ import annotations

import sys
import warnings

import pytest

reasoning_gym = pytest.importorskip("reasoning_gym")

from gymnasium.utils.env_checker import check_env  # noqa: E402

from skyrl_mega.envs.reasoning_gym import ReasoningGymEnv, _dataset  # noqa: E402
from skyrl_mega.envs.registry import make_env  # noqa: E402
from skyrl_mega.errors import EnvError, MissingDependencyError  # noqa: E402


def entry_of(payload, options="{}"):
    return _dataset(payload["task"], options, payload["dataset_seed"])[payload["item"]]


@pytest.mark.parametrize("task", ["chain_sum", "gcd", "spell_backward", "countdown"])
def test_the_oracle_answer_earns_the_reward_in_both_styles(task):
    payload = ReasoningGymEnv.generate_payload(5, 0, "train", task=task)
    entry = reasoning_gym.create_dataset(task, seed=payload["dataset_seed"], size=64)[payload["item"]]
    for style, action in (("raw", f" {entry['answer']}\n"), ("chat", f"Well. <answer>{entry['answer']}</answer>")):
        env = make_env("reasoning_gym", {"task": task, "style": style})
        observation, _ = env.reset(options={"payload": payload})
        assert entry["question"] in (observation if style == "raw" else observation[0]["content"])
        _, reward, terminated, _, report = env.step(action)
        assert (reward, terminated) == (1.0, True)
        assert report["metrics"] == {"accuracy": 1.0, "score": 1.0, "format": 1.0, "grader_error": 0.0}


def test_a_partial_score_of_a_wrong_answer_is_below_the_threshold():
    payload = ReasoningGymEnv.generate_payload(0, 0, "train", task="countdown")
    for threshold, expected in ((1.0, 0.0), (0.01, 0.05)):
        env = make_env("reasoning_gym", {"task": "countdown", "threshold": threshold})
        env.reset(options={"payload": payload})
        _, reward, _, _, report = env.step("<answer>1 + 1</answer>")
        assert report["metrics"]["score"] == 0.05
        assert reward == expected


def test_an_answer_without_tags_has_no_format():
    payload = ReasoningGymEnv.generate_payload(0, 0, "train", task="gcd")
    env = make_env("reasoning_gym", {"task": "gcd"})
    env.reset(options={"payload": payload})
    _, reward, _, _, report = env.step(entry_of(payload)["answer"])
    assert reward == 0.0
    assert report["metrics"]["format"] == 0.0


def test_a_scorer_that_can_not_parse_the_answer_scores_zero_and_says_so():
    payload = ReasoningGymEnv.generate_payload(0, 0, "train", task="prime_factorization")
    env = make_env("reasoning_gym", {"task": "prime_factorization", "style": "raw"})
    env.reset(options={"payload": payload})
    _, reward, terminated, _, report = env.step("two and three")
    assert (reward, terminated, report["metrics"]["grader_error"]) == (0.0, True, 1.0)


def test_evaluation_questions_are_distinct_and_never_trained():
    options = {"task": "gcd", "task_options": {"min_value": 1, "max_value": 60}}  # small, so that questions do repeat by chance
    canonical = '{"max_value": 60, "min_value": 1}'
    held_out = [ReasoningGymEnv.generate_payload(i, 0, "eval", **options) for i in range(64)]
    trained = [ReasoningGymEnv.generate_payload(i, seed, "train", **options) for seed in (0, 1) for i in range(1500)]
    eval_questions = {entry_of(p, canonical)["question"] for p in held_out}
    train_questions = {entry_of(p, canonical)["question"] for p in trained}
    assert len(eval_questions) == 64
    assert len(train_questions) > 500
    assert not eval_questions & train_questions
    assert not {p["dataset_seed"] for p in held_out} & {p["dataset_seed"] for p in trained}


def test_payloads_are_pure_functions_of_index_and_seed():
    late = ReasoningGymEnv.generate_payload(40, 3, "train", task="chain_sum")
    for i in range(40):
        ReasoningGymEnv.generate_payload(i, 3, "train", task="chain_sum")
    assert ReasoningGymEnv.generate_payload(40, 3, "train", task="chain_sum") == late
    assert ReasoningGymEnv.generate_payload(40, 4, "train", task="chain_sum") != late


def test_an_exhausted_task_says_how_many_questions_it_has():
    with pytest.raises(EnvError, match=r"'coin_flip' gave \d+ different held-out questions in \d+ tries, but 61 are wanted"):
        ReasoningGymEnv.generate_payload(60, 0, "eval", task="coin_flip")


@pytest.mark.parametrize("options", [{"style": "raw"}, {"task": "gcd"}])
def test_gymnasium_checker_passes_without_a_warning(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make_env("reasoning_gym", options), skip_render_check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "chain_sums"}, "did you mean 'chain_sum'"),
        ({"task_options": {"max_term": 3}}, "has no option 'max_term'; did you mean 'max_terms'"),
        ({"task_options": {"min_terms": 5, "max_terms": 2}}, "refuses the task_options"),
        ({"threshold": 0}, "threshold must be above 0"),
        ({"style": "x"}, "style must be 'chat' or 'raw'"),
        ({"thresold": 0.5}, "did you mean 'threshold'"),
    ],
)
def test_a_bad_option_is_refused(options, message):
    with pytest.raises(EnvError, match=message):
        make_env("reasoning_gym", options)


def test_a_payload_of_another_task_is_refused():
    payload = ReasoningGymEnv.generate_payload(0, 0, "train", task="gcd")
    with pytest.raises(EnvError, match="poses task 'chain_sum', but the payload is of 'gcd'"):
        make_env("reasoning_gym", {}).reset(options={"payload": payload})


def test_without_the_package_the_message_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'skyrl-mega\[envs\]'"):
        make_env("reasoning_gym", {})
