"""What a recorder keeps: one line per step, over resumes, and never at the cost of an earlier run's lines."""

from dataclasses import replace

import pytest

from skyrl_mega.config.schema import Config, TelemetryConfig, TrainerConfig
from skyrl_mega.orchestration.recorder import Recorder
from skyrl_mega.telemetry.metrics import read_metrics


@pytest.fixture
def config(tmp_path):
    trainer = TrainerConfig(run_dir=str(tmp_path), max_steps=4)
    return replace(Config(), trainer=trainer, telemetry=TelemetryConfig(trackers=(), progress="lines"))


def record(config, steps, *, start_step=0, rank=0, **metrics):
    recorder = Recorder(config, rank=rank, start_step=start_step)
    for step in steps:
        with recorder.phase("rollout"):
            pass
        recorder.record(step, {"reward/mean": float(step), **metrics})
    recorder.close()


def test_a_resumed_run_has_each_step_once(config, tmp_path):
    record(config, [0, 1, 2, 3])
    record(config, [3, 4], start_step=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_new_run_in_a_used_directory_keeps_the_earlier_lines_under_another_name(config, tmp_path):
    record(config, [0, 1, 2])
    record(config, [0])
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]
    (kept,) = tmp_path.glob("metrics-*.jsonl")
    assert [row["step"] for row in read_metrics(kept)] == [0, 1, 2]


def test_only_rank_0_writes(config, tmp_path):
    record(config, [0, 1], rank=1)
    assert not list(tmp_path.iterdir())


def test_every_line_has_its_phases_and_the_last_step_is_drawn(config, tmp_path):
    record(config, [1, 4])
    assert all("time/rollout_s" in row and "time/step_s" in row for row in read_metrics(tmp_path))
    assert (tmp_path / "reward_curve.png").is_file()


def test_a_large_mismatch_between_engine_and_policy_is_said_once(config, capsys):
    record(config, [1, 2], **{"mismatch/abs_logprob_diff_mean": 0.9})
    assert capsys.readouterr().out.count("engine and policy logprobs differ by 0.900") == 1
