"""docs/configuration.md says what the code does."""

from __future__ import annotations

import pytest

from skyrl_mega.config.files import config_directories, config_groups, describe, option_file
from skyrl_mega.config.offline import OFFLINE_RULES
from skyrl_mega.config.offline_schema import OWN_SECTION
from skyrl_mega.config.ranges import RANGES, Range
from skyrl_mega.config.reference import REFERENCE_PATH, ROWS_TITLE, main, reference
from skyrl_mega.config.rules import ALL_COMBINATIONS, ALL_SURROUNDINGS
from skyrl_mega.config.settings import all_settings


def test_the_committed_reference_is_current():
    assert REFERENCE_PATH.read_text(encoding="utf-8") == reference(), "run `python -m skyrl_mega.config.reference --write`"


def test_every_setting_option_and_rule_is_in_the_reference():
    text = reference()
    rows = {line.split("`")[1]: line for line in text.partition(ROWS_TITLE)[0].splitlines() if line.startswith("| `")}
    assert list(rows) == [setting.key for setting in all_settings()]
    assert all(setting.doc.replace("|", "\\|") in rows[setting.key] for setting in all_settings())
    for group, options in config_groups(config_directories()).items():
        assert all(f"`{group}={option}`: " in text for option in options)
    assert all(f"- {rule.statement}." in text for rule in (*ALL_COMBINATIONS, *ALL_SURROUNDINGS))
    assert "- `samples_per_prompt`: trajectories sampled from each (the group)." in text


def test_settings_and_rules_of_training_on_fixed_data_are_in_the_reference():
    text = reference().partition(ROWS_TITLE)[2]
    for section, root in OWN_SECTION.items():
        for setting in all_settings(root):
            if setting.key.partition(".")[0] in ("data", "trainer", "evaluation", section):
                assert f"| `{setting.key}` |" in text, setting.key
    assert "- `weight` (a number; default `0.0`)" in text
    assert "| `trainer.max_steps` | an integer >= 0 |" in text
    assert all(f"- {statement}." in text for statement in OFFLINE_RULES.values())


def test_rows_name_choices_ranges_and_defaults():
    text = reference()
    assert "| `model.dtype` | `bfloat16`, `float32` | `bfloat16` |" in text
    assert "| `algorithm.entropy_coef` | a number >= 0 | `0.0` |" in text
    assert "| `rollout.top_p` | a number in (0, 1] | `1.0` |" in text
    assert "| `model.path` | a string | required |" in text
    assert "| `telemetry.trackers` | a list of strings | `[tensorboard]` |" in text
    assert '| `data.path` | a string | `""` |' in text


def test_check_fails_until_written(tmp_path, capsys):
    path = tmp_path / "configuration.md"
    assert main(["--check", "--path", str(path)]) == 1
    assert "--write" in capsys.readouterr().out
    assert main(["--write", "--path", str(path)]) == 0
    assert main(["--check", "--path", str(path)]) == 0
    path.write_text(path.read_text() + "x")
    assert main(["--check", "--path", str(path)]) == 1


def test_every_configuration_file_says_what_it_is():
    directories = config_directories()
    silent = [
        f"{group}={option}"
        for group, options in config_groups(directories).items()
        for option in options
        if not describe(option_file(group, option, directories))
    ]
    assert silent == []


def test_ranges_are_of_numeric_settings_and_hold_their_defaults():
    settings = {setting.key: setting for setting in all_settings()}
    assert RANGES.keys() <= settings.keys()
    assert all(settings[key].hint in (int, float) and settings[key].default in allowed for key, allowed in RANGES.items())
    assert {key for key, setting in settings.items() if setting.hint in (int, float)} == RANGES.keys()


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        (Range(0), [0, 1e9], [-1, -1e-9], ">= 0"),
        (Range(0, is_low_open=True), [1e-9], [0, -1], "> 0"),
        (Range(0, 1, is_high_open=True), [0, 0.999], [1, -0.1], "in [0, 1)"),
        (Range(0, 1, is_low_open=True), [1, 0.001], [0, 1.1], "in (0, 1]"),
    ],
)
def test_a_range_holds_its_closed_ends_only(interval, inside, outside, words):
    assert all(value in interval for value in inside)
    assert not any(value in interval for value in outside)
    assert str(interval) == words
