"""`skyrl-mega verify-layout` says whether a layout computes what one process computes."""

import pytest

from helpers.tiny import write_tiny_model
from skyrl_mega.config.schema import ParallelConfig
from skyrl_mega.launch import verify_layout
from skyrl_mega.launch.cli import main
from skyrl_mega.launch.layout_plan import SmallLayout


@pytest.fixture
def arguments(tmp_path):
    model = write_tiny_model(tmp_path / "model", "qwen3", tied=False, vocab_size=273)
    return ["verify-layout", "recipe=tiny", f"model.path={model}", f"trainer.run_dir={tmp_path / 'run'}"]


def test_a_layout_of_many_ranks_is_checked_with_few(arguments, capsys):
    assert main([*arguments, "parallel=tp2_sp", "--world-size", "2"]) == 0
    said = capsys.readouterr().out
    assert "TP2+SP" in said
    assert "equal" in said


def test_a_difference_is_shown_and_ends_with_1(arguments, capsys, monkeypatch):
    run = verify_layout._run

    def run_wrongly(config, layout, *rest):
        result = run(config, SmallLayout(ParallelConfig(), 1), *rest)
        if layout.ranks > 1:
            result.metrics[1]["update/grad_norm"] *= 1.001
        return result

    monkeypatch.setattr(verify_layout, "_run", run_wrongly)
    assert main([*arguments, "--world-size", "2"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "gradient norm" in said
    assert said.count("differs") == 2  # the line and the verdict


def test_ranks_that_end_without_a_result_are_shown_with_their_log(arguments, capsys, monkeypatch):
    run = verify_layout._run
    monkeypatch.setattr(verify_layout, "_run", lambda c, layout, *rest: "the log" if layout.ranks > 1 else run(c, layout, *rest))
    assert main([*arguments, "--world-size", "2"]) == 1
    said = capsys.readouterr().out
    assert "the log" in said
    assert "no result" in said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--world-size", "3", "parallel=tp2"], "divisible"),
        (["--world-size", "2", "--max-ranks", "1"], "`--max-ranks` must be at least 2"),
        (["--world-size", "2", "--timeout", "0"], "`--timeout` must be above 0"),
    ],
)
def test_bad_arguments_are_errors_before_any_work(arguments, wrong, message, capsys):
    assert main([*arguments, *wrong]) == 2
    assert message in capsys.readouterr().err
