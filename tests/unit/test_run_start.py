"""A run that starts at step 0 in a used directory: it goes on with the ledger there if its trajectories are its own."""

from dataclasses import replace

import pytest

from helpers.ledger import finished, issue, open_ledger
from skyrl_mega.config.load import save_resolved
from skyrl_mega.config.schema import Config
from skyrl_mega.data.ledger import Ledger
from skyrl_mega.errors import LedgerError
from skyrl_mega.orchestration.assemble import _set_aside_ledger, changed_settings


@pytest.fixture
def config(tmp_path):
    config = Config()
    config = replace(
        config,
        trainer=replace(config.trainer, run_dir=str(tmp_path)),
        model=replace(config.model, path="a-model"),
        env=replace(config.env, name="arithmetic"),
    )
    save_resolved(config, tmp_path / "config.yaml")
    return config


@pytest.fixture
def ledger(tmp_path):
    """The ledger of an earlier run that issued three groups and finished one."""
    ledger = open_ledger(tmp_path)
    issue(ledger, 3)
    ledger.finish(finished("g0"))
    ledger.close()


def counts(path):
    with Ledger.open(path, identity={"seed": 7}, prompts_per_step=2, max_staleness=2) as ledger:
        return ledger.counts()


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("trainer", {"max_steps": 7}),
        ("checkpoint", {"interval_steps": 3}),
        ("telemetry", {"trace": True}),
        ("evaluation", {"num_prompts": 5}),
        ("parallel", {"timeout_s": 11.0}),
    ],
)
def test_trajectories_stay_where_what_changed_says_nothing_of_them(config, ledger, tmp_path, section, change):
    config = replace(config, **{section: replace(getattr(config, section), **change)})
    changes = changed_settings(config, tmp_path)
    assert len(changes) == 1
    assert _set_aside_ledger(tmp_path, changes) == []
    assert counts(tmp_path / "ledger.sqlite").finished == 1


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("model", {"path": "another-model"}),
        ("env", {"options": {"level": "hard"}}),
        ("rollout", {"temperature": 0.5}),
        ("trainer", {"seed": 3}),
        ("trainer", {"samples_per_prompt": 2}),
    ],
)
def test_trajectories_of_other_settings_are_set_aside_whole(config, ledger, tmp_path, section, change):
    config = replace(config, **{section: replace(getattr(config, section), **change)})
    [line] = _set_aside_ledger(tmp_path, changed_settings(config, tmp_path))
    [kept] = tmp_path.glob("ledger-*.sqlite")
    assert str(kept) in line
    assert not list(tmp_path.glob("ledger.sqlite*[!k]"))  # the lock file may stay
    assert (counts(kept).issued, counts(kept).finished) == (3, 1)


def test_ledgers_set_aside_in_the_same_second_keep_their_own_names(config, tmp_path):
    config = replace(config, rollout=replace(config.rollout, temperature=0.5))
    for _ in range(3):
        open_ledger(tmp_path).close()
        assert len(_set_aside_ledger(tmp_path, changed_settings(config, tmp_path))) == 1
    assert len(list(tmp_path.glob("ledger-*.sqlite"))) == 3


def test_a_ledger_of_unknown_settings_is_set_aside(config, ledger, tmp_path):
    (tmp_path / "config.yaml").unlink()
    assert changed_settings(config, tmp_path) is None
    assert len(_set_aside_ledger(tmp_path, None)) == 1


def test_a_ledger_that_another_run_writes_is_not_taken_away(config, tmp_path):
    writer = open_ledger(tmp_path)
    with pytest.raises(LedgerError, match="already open for writing"):
        _set_aside_ledger(tmp_path, None)
    writer.close()
    assert (tmp_path / "ledger.sqlite").is_file()


def test_a_new_directory_has_nothing_to_set_aside(tmp_path):
    assert changed_settings(Config(), tmp_path) is None
    assert _set_aside_ledger(tmp_path, None) == []
