"""The reward section: parsed into types, judged by its rules, and looked into before a run."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest
import yaml

from helpers.model_dir import write_model_dir
from helpers.rewards import JsonServer, chat_answer, reward_input, write_reward_model
from skyrl_mega.config.build import config_from_dict
from skyrl_mega.config.load import load_config, to_yaml
from skyrl_mega.config.reference import REFERENCE_PATH, reference
from skyrl_mega.config.schema import Config, FunctionTerm, JudgeTerm, ModelTerm, RewardConfig, as_dict
from skyrl_mega.config.validate import validate
from skyrl_mega.errors import ConfigError
from skyrl_mega.launch.checks import rewards
from skyrl_mega.rewards.check import check_rewards, find_problem
from skyrl_mega.rewards.extract import find_score
from skyrl_mega.rewards.function import FunctionReward
from skyrl_mega.rewards.judge import fill

JUDGE = {"name": "j", "kind": "judge", "url": "http://h/v1", "model": "m", "template": "Rate {response}"}
FUNCTION = {"name": "f", "kind": "function", "path": "os.path:join"}
MODEL = {"name": "m", "kind": "model", "path": "nowhere"}


def config_of(*terms, **reward) -> Config:
    return config_from_dict({"model": {"path": "x"}, "env": {"name": "x"}, "reward": {"terms": list(terms), **reward}})


def test_terms_become_frozen_classes_of_their_kind_and_go_through_yaml():
    config = config_of({**FUNCTION, "options": {"a": [1]}, "weight": 2}, MODEL, {**JUDGE, "concurrency": 3})
    function, model, judge = config.reward.terms
    assert (type(function), type(model), type(judge)) == (FunctionTerm, ModelTerm, JudgeTerm)
    assert (function.options, function.weight, model.output, judge.concurrency) == ({"a": [1]}, 2.0, -1, 3)
    assert config_from_dict(yaml.safe_load(to_yaml(config))) == config
    assert config_from_dict(as_dict(config)) == config


def test_terms_are_written_on_the_command_line_as_hydra_writes_lists_of_mappings():
    terms = "reward.terms=[{name:short,kind:function,path:'my_rewards.py:brevity',weight:0.1,options:{target:5}}]"
    config = load_config(["recipe=tiny", "model.path=x", terms, "reward.env_weight=0.5"])
    [term] = config.reward.terms
    assert term == FunctionTerm(name="short", weight=0.1, path="my_rewards.py:brevity", options={"target": 5})
    assert config.reward.env_weight == 0.5


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (3, ["`reward.terms[0]` must be a mapping; got 3"]),
        ({"name": "a"}, ["`reward.terms[0].kind` must be one of function, model, judge; got nothing"]),
        ({**FUNCTION, "kind": "functon"}, ["got 'functon'", "Did you mean `function`?"]),
        ({**FUNCTION, "wieght": 2}, ["`reward.terms[0].wieght` is not a setting of the kind function", "did you mean `weight`?"]),
        ({**FUNCTION, "url": "x"}, ["`reward.terms[0].url` is not a setting of the kind function", "It has: name, weight"]),
        ({**FUNCTION, "weight": "much"}, ["`reward.terms[0].weight` must be a number; got 'much'"]),
        ({**FUNCTION, "weight": float("inf")}, ["`reward.terms[0].weight` must be a number; got inf", "finite"]),
        ({**JUDGE, "on_error": "masked"}, ["must be one of raise, mask, default; got 'masked'", "on_error=mask"]),
        ({"name": "j", "kind": "judge"}, ["`reward.terms[0].url` is required", "0].model` is required", "template"]),
    ],
)
def test_a_malformed_term_is_explained(term, words):
    with pytest.raises(ConfigError) as caught:
        config_of(term)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ([FUNCTION, {**JUDGE, "name": "f"}], ["terms 0 and 1 are both named `f`"]),
        ([{**FUNCTION, "name": "env"}], ["term 0 is named 'env'"]),
        ([{**FUNCTION, "name": "a b"}], ["term 0 is named 'a b'"]),
        ([{**FUNCTION, "timeout_s": 0}], ["`timeout_s` of `f` is 0.0", "Give a number > 0"]),
        ([{**JUDGE, "retries": -1, "concurrency": 0}], ["`retries` of `j` is -1", "`concurrency` of `j` is 0"]),
        ([{**FUNCTION, "path": "join"}], ["that of `f` is `join`", "my_rewards.py:brevity"]),
        ([{**FUNCTION, "path": "my-module:f"}], ["that of `f` is `my-module:f`"]),
        ([{**JUDGE, "url": "h:80/v1"}], ["that of `j` is `h:80/v1`", "http://127.0.0.1:8000/v1"]),
        ([{**MODEL, "url": "ftp://h"}], ["that of `m` is `ftp://h`"]),
        ([{**JUDGE, "template": "Rate it"}], ["lacks {response}"]),
        ([{**JUDGE, "template": "{respone} {answer}"}], ["has {respone}. Did you mean {response}?", "has {answer}"]),
        ([{**JUDGE, "template": "{response} {reference}"}], ["has {reference} and `reference` is empty"]),
        ([{**JUDGE, "reference": "answer"}], ["`reference` of `j` is `answer`, unused"]),
        ([{**JUDGE, "min_score": 5, "max_score": 5}], ["those of `j` are 5 and 5"]),
        ([{**JUDGE, "pattern": r"score (\d+"}], ["that of `j` is `score (\\d+`: missing )"]),
        ([{**JUDGE, "pattern": r"\d+"}], ["with 0 groups"]),
        ([{**FUNCTION, "weight": 0}], ["must not all be 0"]),
    ],
)
def test_terms_that_can_not_work_are_explained(terms, words):
    with pytest.raises(ConfigError) as caught:
        validate(config_of(*terms, env_weight=0.0), check_files=False)
    assert [word for word in words if word not in str(caught.value)] == []


def test_terms_that_can_work_break_no_rule():
    judge = {**JUDGE, "template": 'Q: {prompt} A: {response} Gold: {reference}, as {"score": 3} {}', "reference": "answer"}
    terms = [{**FUNCTION, "weight": -0.5}, {**FUNCTION, "name": "g", "path": "dir/my.py:f"}, MODEL, judge]
    validate(config_of(*terms), check_files=False)
    validate(config_of({**MODEL, "device": "cuda"}), check_files=False)
    beside_a_fleet = config_from_dict({**as_dict(config_of({**MODEL, "device": "cuda"})), "rollout": {"num_engines": 2}})
    with pytest.raises(ConfigError, match="`m` is to be on cuda, and the coordinator is a Ray actor without GPUs"):
        validate(beside_a_fleet, check_files=False)


def test_what_does_not_exist_is_named_before_anything_is_imported(tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    causal, weightless = tmp_path / "causal", tmp_path / "weightless"
    write_model_dir(causal)
    write_model_dir(weightless, architectures=["LlamaForSequenceClassification"], max_position_embeddings=64)
    (weightless / "model.safetensors").unlink()
    terms = [
        {**FUNCTION, "path": f"{tmp_path}/gone.py:f"},
        {**FUNCTION, "name": "g", "path": "no_such_package.rewards:f"},
        {**MODEL, "name": "absent", "path": str(tmp_path / "gone")},
        {**MODEL, "name": "causal", "path": str(causal)},
        {**MODEL, "name": "weightless", "path": str(weightless)},
        {**JUDGE, "api_key_env": "JUDGE_KEY"},
    ]
    base = as_dict(config_of(*terms)) | {"trainer": {"run_dir": str(tmp_path / "run")}, "env": {"name": "arithmetic"}}
    policy = write_model_dir(tmp_path / "policy")
    with pytest.raises(ConfigError) as caught:
        validate(config_from_dict(base | {"model": {"path": str(policy)}}))
    words = [
        "gone.py` and no file is there",
        "no package `no_such_package` can be imported",
        "gone`, whose config.json can't be read",
        "of `causal` holds the architecture none, which has no score",
        "of `weightless` holds no weights",
        "`JUDGE_KEY` is not. Run `export JUDGE_KEY=...` first",
    ]
    assert [word for word in words if word not in str(caught.value)] == []
    (weightless / "model.safetensors").write_bytes(b"")
    base["reward"] = {"terms": [terms[4]]}
    [warning] = [w for w in validate(config_from_dict(base | {"model": {"path": str(policy)}})) if "`weightless`" in w]
    assert "knows 64 positions and trajectories have up to 1024" in warning


def test_every_setting_of_a_term_is_in_the_reference():
    text = reference()
    for kind, cls in (("function", FunctionTerm), ("model", ModelTerm), ("judge", JudgeTerm)):
        part = text.partition(f"`reward.terms` of `kind: {kind}`")[2]
        own = [name for name in cls.__annotations__ if name != "kind"]
        assert own
        assert all(f"\n- `{name}` (" in part for name in own)
    shared = text.partition("`reward.terms` of every kind")[2].partition("`reward.terms` of `kind")[0]
    assert shared.count("\n- `") == 6


# -- looked into -------------------------------------------------------------------------------------------------------------


def asgi(answer) -> httpx.ASGITransport:
    return httpx.ASGITransport(JsonServer(answer))


def test_functions_are_imported_and_bound_before_a_run(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def brevity(one, *, target=5): ...\n")
    good = {**FUNCTION, "path": f"{file}:brevity", "options": {"target": 3}}
    check_rewards(config_of(good))
    bad = [{**good, "name": "g", "options": {"tagret": 3}}, {**good, "name": "h", "path": f"{file}:lenght"}]
    with pytest.raises(ConfigError) as caught:
        check_rewards(config_of(good, *bad))
    assert all(word in str(caught.value) for word in ("2 problems", "Did you mean `target`?", "has no function 'lenght'"))


def test_a_judge_is_asked_for_one_token_before_a_run():
    [term] = config_of({**JUDGE, "retries": 9}).reward.terms
    server = JsonServer(lambda path, body: chat_answer("Yes"))
    assert find_problem(term, transport=httpx.ASGITransport(server)) == ""
    [(path, body)] = server.calls
    assert (path, body["max_tokens"], body["model"]) == ("/v1/chat/completions", 1, "m")
    problem = find_problem(term, transport=asgi(lambda path, body: (404, {"error": "no model m"})))
    assert "The server of reward `j` must answer" in problem
    assert "no model m" in problem


def test_a_served_model_must_have_the_outputs_of_its_directory(tmp_path):
    path = str(write_reward_model(tmp_path / "two", num_labels=2))
    [ambiguous] = config_of({**MODEL, "path": path}).reward.terms
    assert "must be one of the model's 2 outputs" in find_problem(ambiguous)
    [term] = config_of({**MODEL, "path": path, "output": 1, "url": "http://h"}).reward.terms
    assert find_problem(term, transport=asgi(lambda p, b: (200, {"data": [{"index": 0, "probs": [0.1, 0.2]}]}))) == ""
    other = find_problem(term, transport=asgi(lambda p, b: (200, {"data": [{"index": 0, "probs": [0.1]}]})))
    assert "serves a model with 1 outputs" in other
    [gone] = config_of({**MODEL, "path": str(tmp_path / "gone")}).reward.terms
    assert "must be a model's directory" in find_problem(gone)


def test_the_doctor_says_what_the_reward_is_and_what_is_wrong_with_it(tmp_path):
    assert (rewards(None, Config()).status, rewards(None, Config()).found) == ("ok", "1 env")
    (tmp_path / "mine.py").write_text("def brevity(one): ...\n")
    config = config_of({**FUNCTION, "name": "short", "path": f"{tmp_path}/mine.py:brevity", "weight": -0.1}, env_weight=0.5)
    assert rewards(None, config).found == "0.5 env + -0.1 short (function)"
    row = rewards(None, Config(reward=RewardConfig(terms=(FunctionTerm(name="f", path="os:no_such"),))))
    assert row.status == "fail"
    assert "1 env + 1 f (function); path of reward `f`=os:no_such: os has no function 'no_such'" in row.found


# -- the how-to ----------------------------------------------------------------------------------------------------------------


def test_the_example_of_the_how_to_loads_and_scores(tmp_path):
    text = (REFERENCE_PATH.parent / "howto" / "rewards.md").read_text(encoding="utf-8")
    recipe, code = (text.partition(f"```{language}\n")[2].partition("```")[0] for language in ("yaml", "python"))
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(recipe)
    (tmp_path / "my_rewards.py").write_text(code)
    config = load_config(["recipe=mine"], config_dir=tmp_path, allow_missing=True)
    function, judge = config.reward.terms
    assert find_score("Terse, yet clear. Score: 8", judge) == 0.8
    assert fill(judge, reward_input("42")).startswith("Question: 6 x 7 =\nAnswer: 42\nHow clear")
    function = replace(function, path=f"{tmp_path / 'my_rewards.py'}:brevity", options={"target_tokens": 2})
    ranked = replace(function, path=function.path.replace("brevity", "shortest_first"), options={}, batched=True)
    inputs = [reward_input("123"), reward_input("12")]

    async def score(term):
        return await FunctionReward(term).score(inputs)

    assert asyncio.run(score(function)) == [0.5, 1.0]
    assert asyncio.run(score(ranked)) == [0.0, 1.0]
