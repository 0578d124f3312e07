"""Files and overrides become one frozen configuration, wherever the process stands."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from skyrl_mega.config.build import config_from_dict
from skyrl_mega.config.files import config_directories, config_groups, option_file, option_values
from skyrl_mega.config.load import load_config, load_saved, save_resolved, to_yaml
from skyrl_mega.config.schema import Config, EnvConfig, ModelConfig, as_dict
from skyrl_mega.config.settings import all_settings
from skyrl_mega.errors import ConfigError

REQUIRED = ("model.path=some/model", "env.name=arithmetic")


def test_required_settings_alone_give_the_schema_defaults():
    config = load_config(REQUIRED)
    assert config == Config(model=ModelConfig(path="some/model"), env=EnvConfig(name="arithmetic"))


def test_quickstart_is_the_measured_recipe():
    config = load_config(["recipe=quickstart"])
    assert config.model.path == ".cache/models/SmolLM2-135M-Instruct"
    assert (config.model.dtype, config.rollout.dtype) == ("bfloat16", "bfloat16")
    assert (config.env.name, config.env.chat_template) == ("arithmetic", False)
    assert config.env.options == {"level": "two_digit_addition", "shots": 1}
    trainer, rollout, optimizer = config.trainer, config.rollout, config.optimizer
    assert (trainer.prompts_per_step, trainer.samples_per_prompt, trainer.updates_per_step) == (32, 8, 1)
    assert (trainer.tokens_per_micro_batch, trainer.run_dir) == (2048, "runs/quickstart")
    assert (rollout.max_new_tokens, rollout.max_model_len, rollout.max_num_seqs) == (6, 256, 256)
    assert (rollout.stop, rollout.temperature) == (("\n",), 1.0)
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2) == (3e-5, 0.9, 0.999)
    assert (optimizer.weight_decay, optimizer.clip_grad_norm) == (0.0, 1.0)
    assert (config.algorithm.policy_loss, config.algorithm.loss_options, config.algorithm.kl.coef) == ("ppo_clip", {}, 0.0)
    assert config.evaluation.num_prompts >= 128


def test_the_recipe_for_experts_is_gsm8k_with_the_engines_routing():
    needed = ["data.path=train.jsonl", "model.path=m"]
    moe, gsm8k = load_config(["recipe=moe", *needed]), load_config(["recipe=gsm8k", *needed])
    assert (moe.model.router_replay, gsm8k.model.router_replay) == ("rollout", "off")
    assert (moe.env, moe.rollout, moe.optimizer) == (gsm8k.env, gsm8k.rollout, gsm8k.optimizer)


def test_gsm8k_and_tiny_need_only_what_they_can_not_know():
    gsm8k = load_config(["recipe=gsm8k", "data.path=train.jsonl", "model.path=m"])
    assert (gsm8k.env.name, gsm8k.env.chat_template, gsm8k.data.source) == ("gsm8k", True, "jsonl")
    assert (gsm8k.rollout.max_new_tokens, gsm8k.rollout.max_model_len) == (256, 768)
    tiny = load_config(["recipe=tiny", "model.path=m"])
    assert (tiny.model.dtype, tiny.rollout.dtype) == ("float32", "float32")
    assert (tiny.trainer.prompts_per_step, tiny.trainer.samples_per_prompt, tiny.trainer.max_steps) == (4, 4, 3)
    with pytest.raises(ConfigError, match=r"`model\.path` is required"):
        load_config(["recipe=tiny"])


def test_command_line_wins_over_recipe_and_recipe_over_schema():
    assert load_config(["recipe=quickstart"]).optimizer.lr == 3e-5
    assert load_config(["recipe=quickstart", "optimizer.lr=2e-4"]).optimizer.lr == 2e-4
    assert load_config(["optimizer.lr=2e-4", "recipe=quickstart"]).optimizer.lr == 2e-4


def test_a_group_choice_replaces_the_one_a_recipe_made():
    config = load_config(["recipe=tiny", "model.path=m", "precision=bfloat16", "env=reasoning_gym"])
    assert (config.model.dtype, config.rollout.dtype) == ("bfloat16", "bfloat16")
    assert config.env == EnvConfig(name="reasoning_gym", options={"task": "chain_sum"})


def test_null_chooses_nothing():
    config = load_config(["recipe=tiny", "model.path=m", "precision=null", "env=null", "env.name=gsm8k"])
    assert (config.model.dtype, config.rollout.dtype) == ("bfloat16", "bfloat16")
    assert config.env == EnvConfig(name="gsm8k")
    assert load_config([*REQUIRED, "recipe=null"]) == load_config(REQUIRED)


def test_a_group_choice_that_the_recipe_would_change_is_refused():
    with pytest.raises(ConfigError, match=r"(?s)`trainer=smoke` sets `trainer\.max_steps` to 3, .* to \d+\..*Say which"):
        load_config(["recipe=quickstart", "trainer=smoke"])
    chosen = ["trainer.max_steps=3", "trainer.tokens_per_micro_batch=512"]
    assert load_config(["recipe=quickstart", "trainer=smoke", *chosen]).trainer.prompts_per_step == 4


def _every_option() -> list[tuple[str, str]]:
    return [(group, option) for group, options in config_groups(config_directories()).items() for option in options]


@pytest.mark.parametrize(("group", "option"), _every_option())
def test_every_shipped_option_loads_and_sets_what_its_file_says(group, option):
    directories = config_directories()
    config = as_dict(load_config([f"{group}={option}"], allow_missing=True))
    for key, value in option_values(group, option_file(group, option, directories)).items():
        found = config
        for name in key.split("."):
            found = found[name]
        assert found == value, key


def test_files_repeat_no_default():
    """Options that undo a recipe's choice are the exception: undoing is writing the default."""
    undoing = {("precision", name) for name in ("bfloat16", "fp8")} | {("parallel", name) for name in ("single", "dp2", "tp2_sp")}
    defaults = {setting.key: setting.default for setting in all_settings()}
    directories = config_directories()
    repeated = [
        f"{group}={option}: {key}"
        for group, option in _every_option()
        if (group, option) not in undoing
        for key, value in option_values(group, option_file(group, option, directories)).items()
        if defaults.get(key) == value
    ]
    assert repeated == []


def test_loading_twice_gives_the_same_and_leaves_hydra_as_it_was():
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    first = load_config(["recipe=quickstart"])
    assert not GlobalHydra.instance().is_initialized()
    assert load_config(["recipe=quickstart"]) == first
    with hydra.initialize_config_module("skyrl_mega_configs", version_base="1.2"):
        outer = GlobalHydra.instance().hydra
        assert load_config(["recipe=quickstart"]) == first
        with pytest.raises(ConfigError):
            load_config(["~trainer.nothing"])
        assert GlobalHydra.instance().hydra is outer
        assert str(hydra.version.getbase()) == "1.2"


def test_loading_changes_no_directory_file_or_logging(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    load_config(["recipe=quickstart"])
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == (handlers, level)


def test_loading_works_from_any_directory(tmp_path):
    code = "from skyrl_mega.config.load import load_config; print(load_config(['recipe=quickstart']).trainer.run_dir)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "runs/quickstart"


def test_a_directory_of_ones_own_comes_first(tmp_path):
    own = tmp_path / "my configs, v=1"  # what would need quoting in an override
    (own / "recipe").mkdir(parents=True)
    (own / "recipe" / "mine.yaml").write_text("# @package _global_\noptimizer: {lr: 0.5}\n")
    (own / "exp.yaml").write_text("defaults: [train, _self_]\ntrainer: {max_steps: 7}\n")
    config = load_config([*REQUIRED, "recipe=mine"], config_dir=own)
    assert (config.optimizer.lr, config.trainer.max_steps) == (0.5, 100)
    config = load_config([*REQUIRED, "recipe=mine"], config_dir=own, config_name="exp")
    assert (config.optimizer.lr, config.trainer.max_steps) == (0.5, 7)
    assert load_config(["recipe=quickstart"], config_dir=own) == load_config(["recipe=quickstart"])
    (own / "recipe" / "quickstart.yaml").write_text("# @package _global_\ntrainer: {max_steps: 9}\n")
    assert load_config([*REQUIRED, "recipe=quickstart"], config_dir=own).trainer.max_steps == 9


def test_relative_config_dir_is_taken_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "exp.yaml").write_text("defaults: [train, _self_]\ntrainer: {seed: 5}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(REQUIRED, config_dir=Path("own"), config_name="exp").trainer.seed == 5


def test_sequences_become_tuples_and_options_stay_plain():
    config = load_config([*REQUIRED, "rollout.stop=[a,b]", "telemetry.trackers=[]", "env.options={x: [1, 2]}"])
    assert config.rollout.stop == ("a", "b")
    assert config.telemetry.trackers == ()
    assert config.env.options == {"x": [1, 2]}


def test_new_keys_are_allowed_in_free_mappings_only():
    assert load_config([*REQUIRED, "env.options.depth=3"]).env.options == {"depth": 3}
    with pytest.raises(ConfigError, match="not a setting"):
        load_config([*REQUIRED, "env.option.depth=3"])


def test_whole_floats_are_integers_and_integers_are_floats():
    config = load_config([*REQUIRED, "data.limit=1e3", "optimizer.lr=1", "trainer.max_steps=5.0"])
    assert (config.data.limit, config.optimizer.lr, config.trainer.max_steps) == (1000, 1.0, 5)
    assert (type(config.data.limit), type(config.optimizer.lr)) == (int, float)


def test_on_and_off_are_words_in_yaml_too(tmp_path):
    (tmp_path / "exp.yaml").write_text("defaults: [train, _self_]\ntrainer: {share_prompts: off}\n")
    config = load_config(REQUIRED, config_dir=tmp_path, config_name="exp")
    assert config.trainer.share_prompts == "off"
    save_resolved(config, tmp_path / "config.yaml")
    assert load_saved(tmp_path / "config.yaml") == config
    assert load_config([*REQUIRED, "trainer.share_prompts=on"]).trainer.share_prompts == "on"


def test_settings_may_refer_to_each_other_and_to_defaults():
    config = load_config(
        [
            *REQUIRED,
            "trainer.run_dir='runs/${env.name}-${trainer.seed}'",
            "trainer.prompts_per_step=${trainer.samples_per_prompt}",
        ]
    )
    assert (config.trainer.run_dir, config.trainer.prompts_per_step) == ("runs/arithmetic-0", 8)


def test_quoted_text_keeps_its_characters():
    config = load_config([*REQUIRED, "trainer.run_dir=\"a, b=[c] 'd'\"", 'data.path="007"'])
    assert (config.trainer.run_dir, config.data.path) == ("a, b=[c] 'd'", "007")


def test_configuration_is_frozen():
    config = load_config(REQUIRED)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.trainer.max_steps = 3  # pyright: ignore


def test_resolved_configuration_round_trips(tmp_path):
    overrides = [
        "recipe=quickstart",
        'rollout.stop=["${x}","é"]'.replace("${x}", "$x"),
        "optimizer.lr=1e-7",
        "env.options.note='???!'",
    ]
    config = load_config(overrides)
    path = tmp_path / "new" / "config.yaml"
    save_resolved(config, path)
    assert load_saved(path) == config
    assert config_from_dict(as_dict(config)) == config
    assert config_from_dict(yaml.safe_load(to_yaml(config))) == config
    assert os.listdir(path.parent) == ["config.yaml"]


def test_saving_replaces_the_old_file_or_leaves_it(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    first, second = load_config([*REQUIRED, "trainer.seed=1"]), load_config([*REQUIRED, "trainer.seed=2"])
    save_resolved(first, path)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            save_resolved(second, path)
    assert load_saved(path) == first
    assert os.listdir(tmp_path) == ["config.yaml"]
    save_resolved(second, path)
    assert load_saved(path) == second


def test_a_saved_run_from_before_a_setting_existed_takes_its_default():
    values = as_dict(load_config([*REQUIRED, "trainer.seed=3"]))
    del values["telemetry"], values["trainer"]["threads"]
    config = config_from_dict(values)
    assert (config.telemetry, config.trainer.threads, config.trainer.seed) == (Config().telemetry, 1, 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: [", "must be YAML"),
        ("- 1\n", "mapping of sections; got list"),
        ("trainer: {max_stepz: 3}\n", "trainer.max_steps"),
    ],
)
def test_a_damaged_saved_configuration_is_named(tmp_path, content, words):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_saved(path)
    assert words in str(caught.value)


def test_an_absent_saved_configuration_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml` must be a readable .*No such file"):
        load_saved(tmp_path / "config.yaml")


# ---- saved configurations -------------------------------------------------------------------------------------------------


def test_a_saved_configuration_is_changed_by_settings_and_groups(tmp_path):
    saved = load_config([*REQUIRED, "parallel=tp2_sp", "optimizer.lr=1e-3", "precision=float32"])
    save_resolved(saved, tmp_path / "config.yaml")
    changed = load_saved(tmp_path / "config.yaml", ["parallel=tp2", "precision=bfloat16", "algorithm.kl.coef=0.5"])
    assert (changed.parallel.tensor, changed.parallel.sequence_parallel) == (2, False)  # what tp2_sp set, tp2 undoes
    assert (changed.model.dtype, changed.rollout.dtype, changed.algorithm.kl.coef) == ("bfloat16", "bfloat16", 0.5)
    assert changed.optimizer == saved.optimizer
    assert load_saved(tmp_path / "config.yaml", []) == saved


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_stps=3", "did you mean `trainer.max_steps`"),
        ("model.path.name=x", "`model.path.name` is not a setting"),
        ("optimizer.lr=high", "`optimizer.lr` must be a number"),
        ("parallel=tp3", "`parallel` must be one of"),
        ("parallel=null", "`parallel` must be one of"),
        ("recipe=tiny", "changed setting by setting"),
        ("~trainer.seed", "changed setting by setting"),
    ],
)
def test_a_bad_change_of_a_saved_configuration_is_explained(tmp_path, override, words):
    save_resolved(load_config(REQUIRED), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=words):
        load_saved(tmp_path / "config.yaml", [override])
