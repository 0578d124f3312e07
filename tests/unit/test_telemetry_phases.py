"""Phase seconds and the Chrome trace."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from skyrl_mega.telemetry.phases import PhaseTimer


def test_seconds_add_up_over_repeats_and_outer_phases_include_inner_ones():
    timer = PhaseTimer()
    with timer.phase("train"):
        for _ in range(2):
            with timer.phase("forward"):
                time.sleep(0.02)
    metrics = timer.metrics()
    assert list(metrics) == ["time/forward_s", "time/train_s", "cpu_time/forward_s", "cpu_time/train_s"]
    assert 0.04 <= metrics["time/forward_s"] <= metrics["time/train_s"]


def test_cpu_seconds_count_work_and_not_waiting():
    timer = PhaseTimer()
    with timer.phase("wait"):
        time.sleep(0.2)
    with timer.phase("work"):
        start = time.process_time()
        while time.process_time() - start < 0.05:
            pass
    metrics = timer.metrics()
    assert metrics["time/wait_s"] >= 0.2
    assert metrics["cpu_time/wait_s"] < 0.8 * metrics["time/wait_s"]  # other threads of the process may work meanwhile
    assert metrics["cpu_time/work_s"] >= 0.05


def test_a_new_step_starts_at_zero_and_a_phase_that_raises_is_counted():
    timer = PhaseTimer()
    with timer.phase("a"):
        pass
    timer.start_step(2)
    with pytest.raises(KeyError), timer.phase("b"):
        raise KeyError("x")
    assert list(timer.metrics()) == ["time/b_s", "cpu_time/b_s"]


def test_a_closed_trace_is_json_with_one_complete_event_per_phase(tmp_path):
    timer = PhaseTimer(tmp_path / "trace.json", rank=3)
    timer.start_step(7)
    with timer.phase("outer"), timer.phase('in"ner'):
        time.sleep(0.01)
    timer.close()
    timer.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    inner, outer = [event for event in events if event["ph"] == "X"]
    assert (inner["name"], outer["name"]) == ('in"ner', "outer")
    assert inner["pid"] == 3
    assert inner["args"]["step"] == 7
    assert inner["dur"] >= 10_000
    # Nested on the timeline (to the microsecond rounding), in wall-clock time.
    assert outer["ts"] <= inner["ts"] + 100
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 100
    assert abs(inner["ts"] / 1e6 - time.time()) < 60


def test_the_trace_of_a_killed_process_lacks_only_its_bracket_and_is_continued(tmp_path):
    path = tmp_path / "trace.json"
    program = """
import os, signal, sys
from skyrl_mega.telemetry.phases import PhaseTimer
timer = PhaseTimer(sys.argv[1])
for _ in range(3):
    with timer.phase("before"):
        pass
os.kill(os.getpid(), signal.SIGKILL)
"""
    finished = subprocess.run([sys.executable, "-c", program, str(path)], timeout=60)
    assert finished.returncode == -signal.SIGKILL
    assert len(json.loads(path.read_text() + "]")) == 4
    with path.open("a") as file:
        file.write(',\n{"name": "torn", "ph"')
    timer = PhaseTimer(path)
    with timer.phase("after"):
        pass
    timer.close()
    names = [event["name"] for event in json.loads(path.read_text())]
    assert names == ["process_name", "before", "before", "before", "after"]
    assert os.listdir(tmp_path) == ["trace.json"]
