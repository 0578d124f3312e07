"""Looking environments up by name, and the how-to page that tells users to write their own."""

from __future__ import annotations

import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from gymnasium.utils.env_checker import check_env

from skyrl_mega.data.prompts import GeneratorPromptSource
from skyrl_mega.envs.base import Reply, TextEnvBase
from skyrl_mega.envs.registry import get_env_class, make_env, register_env
from skyrl_mega.errors import EnvError
from skyrl_mega.protocols import TextEnv

HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "add_an_environment.md"


@pytest.mark.parametrize("name", ["arithmetic", "gsm8k", "reasoning_gym"])
def test_built_in_names_are_found_and_fit_the_protocol(name):
    env_class = get_env_class(name)
    assert issubclass(env_class, TextEnvBase)
    assert isinstance(make_env(name, {}), TextEnv)


def test_looking_up_the_registry_imports_no_environment_package():
    code = (
        "import sys; from skyrl_mega.envs.registry import get_env_class; assert 'skyrl_mega.envs.arithmetic' not in sys.modules;"
        "get_env_class('arithmetic');"
        "bad = {'torch', 'reasoning_gym', 'skyrl_mega.envs.gsm8k'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arithmetics", "did you mean 'arithmetic'"),
        ("zzz", "Known: arithmetic, gsm8k, reasoning_gym"),
        ("no_such_pkg.mod:Env", "no module 'no_such_pkg' can be imported.*PYTHONPATH"),
        ("skyrl_mega.envs.arithmetic:ArithmeticEvn", "did you mean 'ArithmeticEnv'"),
        ("skyrl_mega.envs.arithmetic:solve", "must be a class derived from"),
        ("skyrl_mega.envs.arithmetic:Level", "must be a class derived from"),
    ],
)
def test_an_unknown_name_is_an_error_that_helps(name, message):
    with pytest.raises(EnvError, match=message):
        get_env_class(name)


def test_a_missing_import_inside_the_users_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_env_module.py").write_text("import package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="package_that_is_not_there"):
        get_env_class("broken_env_module:Env")


def test_a_name_can_be_registered_once():
    class Echo(TextEnvBase):
        def __init__(self, *, reward: float) -> None:
            super().__init__()
            self.reward = reward

        def pose(self, payload):
            return payload["text"]

        def respond(self, action):
            return Reply(reward=self.reward)

    register_env("echo-for-test")(Echo)
    register_env("echo-for-test")(Echo)  # the same class again: a module imported twice
    assert make_env("echo-for-test", {"reward": 2}).reward == 2
    with pytest.raises(EnvError, match="is taken by"):
        register_env("echo-for-test")(TextEnvBase)
    with pytest.raises(EnvError, match=r"needs the option 'reward'; set env\.options\.reward"):
        make_env("echo-for-test", {})
    with pytest.raises(EnvError, match=r"can't generate prompts.*data\.source"):
        make_env("echo-for-test", {"reward": 1}).reset(seed=0)


def test_a_reply_that_goes_on_without_an_observation_is_an_error():
    class Silent(TextEnvBase):
        def pose(self, payload):
            return "say"

        def respond(self, action):
            return Reply(reward=0.0, terminated=False)

    env = Silent()
    env.reset(options={"payload": {}})
    with pytest.raises(EnvError, match="no observation for an episode that goes on"):
        env.step("x")


def test_reset_refuses_options_it_does_not_know():
    with pytest.raises(EnvError, match="'payload' alone"):
        make_env("arithmetic", {}).reset(options={"payloads": {}})


def test_the_howto_example_runs_as_written(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", HOWTO.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    module = types.ModuleType("howto_env")
    monkeypatch.setitem(sys.modules, "howto_env", module)
    exec(compile(blocks[0], str(HOWTO), "exec"), vars(module))
    env = make_env("howto_env:GuessEnv", {"high": 100})
    assert env.reset(options={"payload": {"secret": 42}})[0] == "I think of a number from 1 to 100. Your guess:"
    assert env.step(" 50\n") == ("\nLower. Your guess:", 0.0, False, False, {"metrics": {"accuracy": 0.0}})
    assert env.step("x")[0] == "\nThat is no number. Your guess:"
    assert env.step("42")[1:] == (1.0, True, False, {"metrics": {"accuracy": 1.0}})
    source = GeneratorPromptSource(type(env), {"high": 100}, seed=1)
    trained = {p.payload["secret"] for p in source.next(300)}
    assert not trained & {p.payload["secret"] for p in source.eval_prompts(50)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(blocks[1], str(HOWTO), "exec"), vars(module) | {"check_env": check_env})
