"""Names, files and options become functions, and what is wrong with them is said before anything runs."""

import pytest
import torch

from skyrl_mega.algorithms.advantages import ADVANTAGES
from skyrl_mega.algorithms.check import check_algorithm
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES
from skyrl_mega.algorithms.registry import Registry
from skyrl_mega.config.schema import AlgorithmConfig
from skyrl_mega.errors import ConfigError


@pytest.mark.parametrize("registry", [ADVANTAGES, POLICY_LOSSES], ids=["advantages", "losses"])
def test_every_name_is_found_where_the_registry_says(registry):
    for name in registry.built_in:
        entry = registry.find(name)
        assert entry.name == name
        assert entry.function.__doc__, f"{name} has no documentation"
        entry.bind({}, "options")


def test_a_function_of_a_file_of_ones_own_is_found_with_its_declared_traits(tmp_path):
    file = tmp_path / "mine_a.py"
    file.write_text(
        "from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES\n"
        "@POLICY_LOSSES.register('mine_a', token_separable=True)\n"
        "def declared(inputs, *, slope: float = 2.0):\n"
        "    return slope * inputs.logprobs, {}\n"
        "def plain(inputs):\n"
        "    return inputs.logprobs, {}\n"
    )
    declared = POLICY_LOSSES.find(f"{file}:declared")
    assert declared.traits["token_separable"]
    assert not POLICY_LOSSES.find(f"{file}:plain").traits["token_separable"]
    # One file is one module, whichever name asks for it.
    assert POLICY_LOSSES.find("mine_a").function is declared.function
    inputs = type("Inputs", (), {"logprobs": torch.ones(2)})
    assert declared.bind({"slope": 3}, "algorithm.loss_options")(inputs)[0].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantage": "grop"}, r"algorithm.advantage \('grop'\) must be one of .*my_file.py:function.*Did you mean 'grpo'"),
        ({"policy_loss": "nowhere.py:loss"}, r"algorithm.policy_loss: there is no file nowhere.py \(looked in "),
        ({"policy_loss": "no_such_module:loss"}, r"algorithm.policy_loss: no module 'no_such_module' can be imported"),
        ({"policy_loss": "math:sine"}, r"algorithm.policy_loss=math:sine: math has no function 'sine'"),
        ({"loss_options": {"clip_lo": 0.1}}, r"`algorithm.loss_options.clip_lo` is not an option.*Did you mean 'clip_low'"),
        ({"loss_options": {"clip_low": True}}, r"`algorithm.loss_options.clip_low` must be float; got True \(bool\)"),
        ({"advantage_options": {"eps": "small"}}, r"`algorithm.advantage_options.eps` must be float; got 'small'"),
        ({"advantage": "dr_grpo", "advantage_options": {"eps": 0.1}}, r"dr_grpo has no options"),
    ],
)
def test_what_does_not_exist_is_refused_before_the_run(change, message):
    with pytest.raises(ConfigError, match=message):
        check_algorithm(AlgorithmConfig(**change))


def test_an_import_that_fails_inside_the_users_module_shows_its_own_message(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        POLICY_LOSSES.find("needs_more:loss")


def test_a_name_belongs_to_one_function_and_traits_are_known():
    registry = Registry("x.y", {}, {"needs": frozenset()})
    registry.register("one")(test_every_name_is_found_where_the_registry_says)
    with pytest.raises(ConfigError, match=r"the name 'one' of x.y is taken by .*; choose another"):
        registry.register("one")(check_algorithm)
    with pytest.raises(ConfigError, match=r"\['need'\] can't be declared for x.y; traits: needs"):
        registry.register("two", need=1)
    registry.register("needy")(needy)
    with pytest.raises(ConfigError, match=r"needy needs `x.y.slope`; set it"):
        registry.find("needy").bind({}, "x.y")


def needy(inputs, *, slope: float):
    return slope
