"""The command line: what it answers at once, what it hands on, and how it fails."""

from __future__ import annotations

import signal
import sys
import types
from subprocess import run
from typing import Any

import pytest
import yaml

from helpers.model_dir import write_model_dir
from skyrl_mega.errors import CheckpointError, NumericsError
from skyrl_mega.launch import cli

HEAVY = ("torch", "vllm", "megatron", "ray", "transformers", "hydra", "omegaconf", "rich")


class Calls(list[tuple[Any, ...]]):
    """What the command line called, in order; `failure` is raised instead where it is set."""

    failure: BaseException | None = None

    def record(self, *call: Any) -> None:
        self.append(call)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def calls(monkeypatch) -> Calls:
    """Stands in for the modules behind the commands: the command line is tested for what it hands them, not for what they do."""
    calls = Calls()

    def module(name: str, **functions: Any) -> None:
        stand_in = types.ModuleType(name)
        vars(stand_in).update(functions)
        monkeypatch.setitem(sys.modules, name, stand_in)

    module(
        "skyrl_mega.orchestration.assemble",
        run_training=lambda config: calls.record("train", config),
        run_evaluation=lambda config, *, checkpoint, output: calls.record("eval", config, checkpoint),
    )
    module("skyrl_mega.checkpoint.export", export_run=lambda *arguments: calls.record("export", *arguments))
    module("skyrl_mega.launch.replay", run_replay=lambda *arguments, **options: calls.record("replay", *arguments, options) or 1)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.fixture
def overrides(tmp_path) -> list[str]:
    return [f"model.path={write_model_dir(tmp_path / 'model')}", "recipe=tiny", f"trainer.run_dir={tmp_path / 'run'}"]


def python(*arguments: str, code: str = "", **environment: str):
    import os

    command = [sys.executable, *(["-c", code] if code else []), *arguments]
    return run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False)


# ---- answers at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", ["", "train", "eval", "checkpoints", "ledger", "trace", "export", "convert", "replay", "doctor"]
)
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('heavy:', sorted(set({HEAVY!r}) & set(sys.modules))))\n"
        "from skyrl_mega.launch.cli import main\n"
        f"main({[*command.split(), '--help']!r})"
    )
    done = python(code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: skyrl-mega")
    assert done.stdout.rstrip().endswith("heavy: []")
    if command:
        assert "example" in done.stdout


@pytest.mark.parametrize("module", ["skyrl_mega", "skyrl_mega.train"])
def test_modules_can_be_run(module, tmp_path):
    done = python("-m", module, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: skyrl-mega" in done.stdout


def test_importing_the_entry_module_starts_nothing():
    """Checkpoint writers and engines spawn processes that import the entry module again."""
    done = python("recipe=nothing", code="import skyrl_mega.train, skyrl_mega.__main__; print('alive')")
    assert (done.returncode, done.stdout.strip()) == (0, "alive")


def test_the_entry_module_is_the_train_command():
    done = python("-m", "skyrl_mega.train", "recipe=quickstart", "--print-config")
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["trainer"]["run_dir"] == "runs/quickstart"


# ---- train ----------------------------------------------------------------------------------------------------------------


def test_train_hands_on_the_loaded_configuration(calls, overrides):
    assert cli.main(["train", *overrides, "trainer.seed=5"]) == 0
    [(command, config)] = calls
    assert (command, config.trainer.seed, config.model.dtype) == ("train", 5, "float32")


def test_overrides_may_stand_on_both_sides_of_options(calls, overrides, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "exp.yaml").write_text("defaults: [train, _self_]\ntrainer: {max_steps: 8}\n")
    arguments = [
        "train",
        "trainer.seed=1",
        "--config-dir",
        str(tmp_path / "own"),
        "--config-name=exp",
        *overrides,
        "trainer.seed=2",
    ]
    assert cli.main(arguments) == 0
    [(_, config)] = calls
    assert (config.trainer.seed, config.trainer.max_steps) == (2, 8)


def test_print_config_prints_every_setting_and_runs_nothing(calls, capsys):
    assert cli.main(["train", "recipe=tiny", "--print-config", "trainer.seed=7"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    assert (values["trainer"]["seed"], values["rollout"]["dtype"], values["model"]["path"]) == (7, "float32", "???")
    assert calls == []


def test_rules_are_checked_with_the_number_of_processes(calls, overrides, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main(["train", *overrides, "parallel=tp2"]) == 2
    assert "error: The number of processes must be divisible" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(["train", *overrides, "parallel=tp2"]) == 0
    assert len(calls) == 1


def test_warnings_are_printed_before_the_run(calls, overrides, capsys):
    assert cli.main(["train", *overrides, "rollout.top_k=5"]) == 0
    assert capsys.readouterr().err.startswith("warning: `rollout.top_p` = 1 and `rollout.top_k` = 0")
    assert len(calls) == 1


def test_only_rank_0_speaks_of_the_configuration(calls, overrides, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", *overrides, "rollout.top_k=5"]) == 0
        assert len(capsys.readouterr().err.splitlines()) == lines
        assert cli.main(["train", *overrides, "trainer.sed=5"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_failure_of_one_rank_is_told_by_that_rank(calls, overrides, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    calls.failure = NumericsError("the loss is NaN")
    assert cli.main(["train", *overrides]) == 2
    assert capsys.readouterr().err == "error on rank 1: the loss is NaN\n"


def test_a_world_size_that_is_no_number_is_explained(calls, overrides, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert cli.main(["train", *overrides]) == 2
    assert "WORLD_SIZE must be a whole number, as torchrun sets it; got `two`" in capsys.readouterr().err


# ---- failing --------------------------------------------------------------------------------------------------------------


def test_our_errors_are_messages_and_others_are_tracebacks(calls, overrides, capsys):
    calls.failure = CheckpointError("step_000012 is incomplete")
    assert cli.main(["train", *overrides]) == 2
    assert capsys.readouterr().err == "error: step_000012 is incomplete\n"
    with pytest.raises(CheckpointError):
        cli.main(["train", "--traceback", *overrides])
    calls.failure = ZeroDivisionError("a defect")
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", *overrides])


@pytest.mark.parametrize(("number", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_ends_with_the_code_of_a_shell_and_says_how_to_go_on(calls, overrides, capsys, monkeypatch, number, code, word):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore SIGINT
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(calls, "record", lambda *arguments: signal.raise_signal(getattr(signal, number)))
    assert cli.main(["train", *overrides]) == code
    assert signal.getsignal(signal.SIGTERM) is before
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{word}; ")
    assert line.endswith("run has no checkpoint yet: the same command begins at step 1.")


def test_another_rank_than_the_first_ends_at_once_when_it_is_terminated(monkeypatch):
    from skyrl_mega.launch.interrupt import terminable

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("RANK", "1")
    with terminable():
        assert signal.getsignal(signal.SIGTERM) is before


def test_after_an_interruption_a_run_says_from_which_checkpoint_it_goes_on(tmp_path):
    from skyrl_mega.launch.interrupt import how_to_go_on

    (tmp_path / "checkpoints" / "step_000006").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_000008.partial").mkdir()
    assert "goes on after step 6, " in how_to_go_on(tmp_path)
    (tmp_path / "ledger.sqlite").touch()
    assert how_to_go_on(tmp_path).endswith("and what was sampled since is in its ledger.")


def test_no_traceback_reaches_the_terminal():
    done = python("-m", "skyrl_mega.train", "trainer.max_stps=3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: 3 problems in the configuration:")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], ["train", "--nonsense"], ["export", "--run", "x"], ["export", "a=1", "--run", "x", "--output", "y"]],
)
def test_a_wrong_command_line_shows_the_usage(calls, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: skyrl-mega" in capsys.readouterr().err
    assert calls == []


# ---- eval and export ------------------------------------------------------------------------------------------------------


def test_eval_hands_on_checkpoint_and_number_of_prompts(calls, overrides):
    assert cli.main(["eval", *overrides]) == 0
    assert cli.main(["eval", *overrides, "--checkpoint", "latest", "--num-prompts", "64", "trainer.seed=3"]) == 0
    (_, first, none), (_, second, latest) = calls
    assert (none, first.evaluation.num_prompts) == (None, 8)
    assert (latest, second.evaluation.num_prompts, second.trainer.seed) == ("latest", 64, 3)


def test_eval_does_not_mind_a_used_run_directory(calls, overrides, tmp_path):
    (tmp_path / "run" / "checkpoints" / "step_000003").mkdir(parents=True)
    assert cli.main(["train", *overrides, "checkpoint.resume=never"]) == 2
    assert cli.main(["eval", *overrides, "checkpoint.resume=never", "--checkpoint", "latest"]) == 0


def test_eval_refuses_what_it_can_not_do(calls, overrides, monkeypatch, capsys):
    assert cli.main(["eval", *overrides, "--num-prompts", "0"]) == 2
    assert "`evaluation.num_prompts` is 0" in capsys.readouterr().err
    assert cli.main(["eval", *overrides, "--num-prompts", "-3"]) == 2
    assert "`evaluation.num_prompts` must be >= 0; got -3" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["eval", *overrides]) == 2
    assert "without torchrun" in capsys.readouterr().err
    assert calls == []


def test_export_hands_on_its_three_answers(calls, tmp_path, capsys):
    assert cli.main(["export", "--run", str(tmp_path), "--output", "out"]) == 0
    assert cli.main(["export", "--run", str(tmp_path), "--output", "out", "--checkpoint", "12"]) == 0
    assert calls == [("export", str(tmp_path), "latest", "out"), ("export", str(tmp_path), "12", "out")]
    assert "wrote out" in capsys.readouterr().out


def test_export_of_no_run_is_explained(calls, capsys):
    assert cli.main(["export", "--run", "nowhere", "--output", "out"]) == 2
    assert "must be the directory of a run; got `nowhere`" in capsys.readouterr().err


# ---- replay ---------------------------------------------------------------------------------------------------------------


def test_replay_hands_on_what_it_was_told_and_returns_the_verdict(calls, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["replay", str(tmp_path), "812", "parallel=tp2", "--tolerance", "1e-3", "precision=float32"]) == 1
    assert calls == [
        ("replay", tmp_path, 812, ["parallel=tp2", "precision=float32"], {"tolerance": 1e-3, "world_size": 2, "shows": False})
    ]


def test_replay_refuses_what_it_can_not_do(calls, tmp_path, capsys):
    assert cli.main(["replay", "nowhere", "812"]) == 2
    assert "must be the directory of a run; got `nowhere`" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path), "812", "--tolerance", "-1"]) == 2
    assert "`--tolerance` must be >= 0; got -1" in capsys.readouterr().err
    assert calls == []
