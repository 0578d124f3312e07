"""Ctrl-C and SIGTERM end a run as its end does: nothing is left behind, a line says how to go on, and the same command does.

A terminal sends SIGINT to every process of the run at once, and batch systems SIGTERM, so that is what the tests send.
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from helpers.run_check import check_run
from helpers.runs import Run, write_home

MAX_STEPS = 30
ON_RAY = ("rollout.placement=ray", "rollout.num_engines=2", "trainer.max_staleness=2")
IN_PROCESS = ("rollout.placement=in_process",)
IN_A_CHILD = ("rollout.placement=child_process",)
ENDS_WITH = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("interrupt"))


def start(home, run_dir, *overrides):
    """A run; on Ray with light engines, in and beside the trainer with vLLM."""
    settings = (f"trainer.max_steps={MAX_STEPS}", "checkpoint.interval_steps=3", *overrides)
    return Run(home, run_dir, *settings, light=overrides == ON_RAY, LIGHT_TICK_S="0.05")


def see_it_stop(run, number):
    """Sends the signal; the run ends in good order, with one line that says how to go on. Returns that line."""
    code, word = ENDS_WITH[number]
    os.killpg(run.process.pid, number)
    assert run.wait(timeout_s=120) == code, run.output[-6000:]
    assert "Traceback" not in run.output, run.output[-6000:]
    assert not run.left_behind(timeout_s=10)
    assert not run.leftovers()
    # vLLM's processes may have a last word about shared memory that they left to others.
    lines = [line for line in run.output.splitlines() if line.startswith(f"{word}; ")]
    assert len(lines) == 1, run.output[-3000:]
    return lines[0]


def interrupt(home, run_dir, *overrides, number, step):
    run = start(home, run_dir, *overrides)
    try:
        run.wait_for_step(step, timeout_s=400)
        return see_it_stop(run, number)
    finally:
        run.end()


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        pytest.param(IN_PROCESS, signal.SIGTERM, id="in_process-SIGTERM"),
        pytest.param(IN_A_CHILD, signal.SIGINT, id="child_process-SIGINT"),
        pytest.param(ON_RAY, signal.SIGINT, id="ray-SIGINT"),
        *(
            pytest.param(overrides, number, id=f"{name}-{number.name}", marks=pytest.mark.nightly)
            for name, overrides, number in (
                ("in_process", IN_PROCESS, signal.SIGINT),
                ("child_process", IN_A_CHILD, signal.SIGTERM),
                ("ray", ON_RAY, signal.SIGTERM),
            )
        ),
    ],
)
def test_a_run_is_interrupted_in_good_order(home, tmp_path, overrides, number):
    line = interrupt(home, tmp_path / "run", *overrides, number=number, step=1)
    assert line.endswith(" in its ledger.")


@pytest.mark.nightly  # three minutes on two cores: each run is started twice
@pytest.mark.parametrize(
    ("before", "after"),
    [(ON_RAY, ON_RAY), (IN_PROCESS, IN_PROCESS), (IN_A_CHILD, IN_PROCESS)],
    ids=["ray", "in_process", "from child_process to in_process"],
)
def test_an_interrupted_run_goes_on(home, tmp_path, before, after):
    """A synchronous run may go on in another placement."""
    run_dir = tmp_path / "run"
    line = interrupt(home, run_dir, *before, number=signal.SIGINT, step=8)
    assert "goes on after step " in line
    run = start(home, run_dir, *after)
    try:
        assert run.wait(timeout_s=400) == 0, run.output[-6000:]
        assert "resuming from" in run.output
    finally:
        run.end()
    check_run(run_dir, max_steps=MAX_STEPS, groups=4, samples=4)


@pytest.mark.nightly  # a minute on two cores
@pytest.mark.parametrize("number", list(ENDS_WITH), ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("overrides", "sign"),
    [(ON_RAY, "gcs"), (IN_PROCESS, "starting vLLM ..."), (IN_A_CHILD, "starting vLLM ...")],
    ids=["ray", "in_process", "child_process"],
)
def test_a_run_is_interrupted_while_it_starts(home, tmp_path, overrides, sign, number):
    """At any moment from the first process of Ray, or the start of vLLM, on. Some of the draws meet the first steps."""
    run = start(home, tmp_path / "run", *overrides)
    try:
        if sign == "gcs":
            run.wait_for_role(sign, timeout_s=240)
        else:
            run.wait_until(lambda: sign in run.output, 240, sign)
        time.sleep(random.Random(time.time_ns()).uniform(0.0, 9.0))
        see_it_stop(run, number)
    finally:
        run.end()
