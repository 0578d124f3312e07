"""metrics.jsonl survives kills and resumes; every line is standard JSON."""

import json
import os
import signal
import subprocess
import sys

import pytest

from skyrl_mega.errors import DataError
from skyrl_mega.telemetry.metrics import MetricsLog, read_metrics


def test_a_line_holds_step_time_and_every_number(tmp_path):
    log = MetricsLog(tmp_path / "run")
    log.log({"reward/mean": 0.5, "count": 3}, 1)
    rows = read_metrics(tmp_path / "run")
    assert rows == read_metrics(log.path)
    assert rows[0].pop("time") > 1.6e9
    assert rows == [{"step": 1, "reward/mean": 0.5, "count": 3}]


def test_a_line_can_be_read_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path)
    log.log({"a": 1.0}, 1)
    assert len(read_metrics(tmp_path)) == 1
    log.close()


def test_numbers_that_are_not_finite_become_null_and_are_listed(tmp_path):
    log = MetricsLog(tmp_path)
    log.log({"a": float("nan"), "b": 1.0, "c": float("-inf")}, 1)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(log.path.read_text(), parse_constant=refuse)
    assert row["a"] is None
    assert row["c"] is None
    assert row["nonfinite"] == ["a", "c"]


def test_tensors_and_numpy_scalars_are_numbers_and_text_is_not(tmp_path):
    import numpy as np
    import torch

    log = MetricsLog(tmp_path)
    log.log({"t": torch.tensor(0.5), "n": np.float32(0.25)}, 1)
    assert read_metrics(tmp_path)[0]["t"] == 0.5
    with pytest.raises(TypeError, match=r"metric 'x' must be a number; got 'high'"):
        log.log({"x": "high"}, 2)
    with pytest.raises(ValueError, match="prefix it"):
        log.log({"step": 1.0}, 2)
    assert len(read_metrics(tmp_path)) == 1


def test_a_torn_last_line_is_left_out_when_reading_and_dropped_when_reopening(tmp_path):
    log = MetricsLog(tmp_path)
    log.log({"a": 1.0}, 1)
    log.close()
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + b'{"step": 2, "ti')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    MetricsLog(tmp_path).log({"a": 2.0}, 2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2 must be a JSON object"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2 must be a JSON object with a step"):
        read_metrics(tmp_path)


def test_a_resumed_run_has_one_line_per_step(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(6):
        log.log({"a": float(step), "b": float("nan")}, step)
    log.close()
    # The checkpoint was written after step 3; steps 4 and 5 are trained again.
    resumed = MetricsLog(tmp_path)
    resumed.rewind(3)
    for step in (4, 5, 6):
        resumed.log({"a": float(10 * step)}, step)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["a"] for row in rows] == [0, 1, 2, 3, 40, 50, 60]
    assert rows[3]["nonfinite"] == ["b"]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_lines_of_a_killed_process_are_there(tmp_path):
    program = """
import os, signal, sys
from skyrl_mega.telemetry.metrics import MetricsLog
log = MetricsLog(sys.argv[1])
for step in range(50):
    log.log({"value": step / 3, "padding": 1e300}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    finished = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60)
    assert finished.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(50))
