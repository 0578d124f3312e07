"""What the display prints, in a pipe and on a terminal."""

import io

import pytest

from skyrl_mega.telemetry import progress
from skyrl_mega.telemetry.progress import HEADER_EVERY, StepDisplay, StepRate

METRICS = {"reward/mean": 0.512, "loss/total": -0.0123, "mismatch/kl": 3.2e-4, "policy/entropy": 1.25, "time/train_s": 3.9}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_are_aligned_plain_and_one_per_step():
    stream = io.StringIO()
    with StepDisplay(200, file=stream) as display:
        display.step(0, {"eval/accuracy": 0.25})
        for step in (1, 2, 100):
            display.step(step, METRICS)
    header, *lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert {len(line) for line in lines} == {len(header)}
    assert "\x1b" not in stream.getvalue()
    for title, cell in {
        "reward": "0.512",
        "loss": "-0.0123",
        "kl": "3.2e-04",
        "entropy": "1.250",
        "train": "3.9s",
        "held-out": "-",
    }.items():
        end = header.index(title) + len(title)
        assert lines[1][:end].split()[-1] == cell, title
    assert lines[0].split()[:3] == ["0", "-", "0.250"]


def test_the_header_comes_again_after_a_screenful():
    stream = io.StringIO()
    display = StepDisplay(100, "lines", file=stream)
    for step in range(HEADER_EVERY + 1):
        display.step(step, METRICS)
    assert sum("reward" in line for line in stream.getvalue().splitlines()) == 2


def test_numbers_that_are_not_finite_are_shown_as_they_are():
    stream = io.StringIO()
    StepDisplay(5, file=stream).step(1, {"loss/total": float("nan"), "reward/mean": float("inf")})
    assert stream.getvalue().splitlines()[1].split()[1:4] == ["inf", "-", "nan"]


def test_a_slow_phase_is_announced_before_it_runs():
    stream = io.StringIO()
    display = StepDisplay(5, file=stream)
    with display.status("loading model [x]"):
        assert stream.getvalue() == "loading model [x] ...\n"
    assert stream.getvalue().splitlines()[1].startswith("loading model [x]: 0.")
    with display.phase("rollout"):
        pass
    assert "rollout" not in stream.getvalue()


def test_other_ranks_show_nothing():
    for mode in ("bar", "lines"):
        stream = Terminal()
        with StepDisplay(5, mode, enabled=False, file=stream) as display:
            with display.status("loading"), display.phase("x"):
                display.note("hello")
            display.step(1, METRICS)
        assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_a_resumed_run_counts_from_its_step(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with StepDisplay(40, start_step=30, file=stream) as display:
        with display.status("loading"):
            pass
        with display.phase("rollout"):
            pass
        display.step(31, METRICS)
    text = stream.getvalue()
    assert "✓" in text
    assert "30/40" in text
    assert "31/40" in text
    assert "0.512" in text
    assert "━" in text
    assert max(len(line) for line in text.splitlines()) < 1000


@pytest.mark.parametrize("start_step", [0, 50])
def test_time_left_is_the_pace_of_the_latest_steps_times_the_steps_left(start_step, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    rate = StepRate(start_step, start_step + 100, window=4)
    assert rate.remaining_s() is None
    clock[0] = 500.0  # the evaluation before the first step
    rate.update(start_step)
    assert rate.remaining_s() is None
    for step, seconds in enumerate([30, 30, 2, 2, 2, 2], start=1):
        clock[0] += seconds
        rate.update(start_step + step)
    assert rate.remaining_s() == pytest.approx(2.0 * 94)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.4, "59.4 s"), (61, "1:01"), (3599.6, "1:00:00"), (7325, "2:02:05")]
)
def test_durations_read_like_a_clock(seconds, text):
    assert progress._seconds(seconds) == text
