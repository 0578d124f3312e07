"""A run whose processes are killed at random moments, started again by the same command until it has ended: then all adds up.

Every process of it is a victim: the trainer, the coordinator, an engine's actor, an engine's core, Ray's head (gcs_server) and
node (raylet), both engines at once, and all of them together. The many kills strike light engines (`helpers.light_engine`): real
processes behind the real actors, fleet, router, transports and ledger, without vLLM's start-up of up to a minute. A few strike
vLLM.

What must hold at the end is counted by the audit, and by a witness outside of it: the environment, which writes a line for every
answer it grades. A process that dies leaves no child behind; a run that can't go on names what died and the remedy.
"""

from __future__ import annotations

import random
import time

import pytest

from helpers.run_check import check_run
from helpers.runs import Run, kill, last_step, write_home

GROUPS, SAMPLES, REPLAYS, STALENESS, INTERVAL = 4, 4, 2, 2, 3
SETTINGS = (
    "rollout.placement=ray",
    "rollout.num_engines=2",
    f"trainer.max_staleness={STALENESS}",
    f"checkpoint.interval_steps={INTERVAL}",
    f"sampling.replay.share={REPLAYS / GROUPS}",
    "rollout.health_interval_s=2",
    "rollout.max_engine_restarts=1000",
)
#: An early victim is killed within its life's first seconds: imports, Ray, engines.
EARLY_S = 25.0
#: Victims that the run survives, and those that end it; what it must say then.
SURVIVED = ("core", "engine", "engines")
ENDS_WITH = {
    "trainer": "",
    "all": "",
    "coordinator": "the rollout coordinator (a Ray actor) died during",
    "gcs": "the head of the run's Ray cluster",
    "raylet": "died",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("chaos"))


class Chaos:
    """Starts a run again and again, and kills `victims` in their order, one whenever `pace` more steps are done."""

    def __init__(self, home, run_dir, *, light: bool, max_steps: int, seed: int, start_timeout_s: float) -> None:
        self.home, self.run_dir, self.light, self.max_steps = home, run_dir, light, max_steps
        self.draw = random.Random(seed)
        self.start_timeout_s = start_timeout_s
        self.starts = 0
        self.kills: list[str] = []

    def play(self, victims: list[str], *, pace: int) -> None:
        victims = list(victims)
        lives = []
        while victims or not lives or not self._has_ended():
            overrides = (*SETTINGS, f"trainer.max_steps={self.max_steps}")
            run = Run(self.home, self.run_dir, *overrides, light=self.light, LIGHT_TICK_S="0.08")
            lives.append(run)
            try:
                self._one_life(run, victims, pace)
                left = run.left_behind(but_seekers=True)
                assert not left, f"processes outlived the run: {left}"
            except BaseException:
                run.end()
                raise
        left = [line for run in lives for line in run.left_behind(timeout_s=90)]
        for run in lives:
            run.end()
        assert not left, f"processes outlived the runs: {left}"
        self.starts = len(lives)

    def _has_ended(self) -> bool:
        return (self.run_dir / "summary.json").is_file()

    def _one_life(self, run: Run, victims: list[str], pace: int) -> None:
        """Until the run has ended, or was ended."""
        begins_at = last_step(self.run_dir)
        while victims:
            victim = victims.pop(0)
            if victim.startswith("early "):
                victim = victim.removeprefix("early ")
                time.sleep(self.draw.uniform(0.0, EARLY_S))
            else:
                begins_at = max(begins_at, last_step(self.run_dir)) if self.kills else begins_at
                run.wait_for_step(begins_at + pace, timeout_s=self.start_timeout_s + 60)
                time.sleep(self.draw.uniform(0.0, 0.6))
            self._strike(run, victim)
            if victim not in SURVIVED:
                self._see_it_end(run, victim)
                return
        code = run.wait(timeout_s=self.start_timeout_s + 120)
        assert code == 0, run.output[-6000:]
        assert not run.leftovers()

    def _strike(self, run: Run, victim: str) -> None:
        if victim == "all":
            targets = run.processes()
        else:
            role = "core" if victim == "engines" else victim
            targets = run.wait_for_role(role, 2 if victim == "engines" else 1, timeout_s=60)
            targets = targets if victim == "engines" else [self.draw.choice(targets)]
        for target in targets:
            kill(target)
        self.kills.append(victim)

    def _see_it_end(self, run: Run, victim: str) -> None:
        code = run.wait(timeout_s=240)
        assert code == (2 if ENDS_WITH[victim] else -9), f"{victim}: exit code {code}\n{run.output[-6000:]}"
        assert "Traceback" not in run.output, f"{victim}:\n{run.output[-6000:]}"
        if ENDS_WITH[victim]:
            [error] = [line for line in run.output.splitlines() if line.startswith("error: ")]
            assert ENDS_WITH[victim] in error
            assert error.endswith("The same command resumes the run.")
            assert not run.leftovers()


@pytest.mark.timeout(900)
def test_each_kind_of_death_loses_and_doubles_nothing(home, tmp_path):
    chaos = Chaos(home, tmp_path / "run", light=True, max_steps=60, seed=7, start_timeout_s=240)
    victims = ["core", "coordinator", "engine", "trainer", "gcs"]
    chaos.play(victims, pace=2)
    assert len(chaos.kills) == len(victims)
    check_run(chaos.run_dir, max_steps=chaos.max_steps, groups=GROUPS, samples=SAMPLES, replays=REPLAYS)


@pytest.mark.nightly  # ten minutes on two cores: a run is started eleven times
@pytest.mark.timeout(1800)
def test_twenty_kills_lose_and_double_nothing(home, tmp_path):
    chaos = Chaos(home, tmp_path / "run", light=True, max_steps=160, seed=20, start_timeout_s=240)
    fatal = ["trainer", "coordinator", "gcs", "raylet", "all", "trainer", "all"]
    mild = [*["core"] * 6, *["engine"] * 5, *["engines"] * 3]
    victims = ["early trainer", *chaos.draw.sample([*fatal, *mild], len(fatal) + len(mild))]
    chaos.play(victims, pace=2)
    assert len(chaos.kills) == len(victims) >= 20
    check_run(chaos.run_dir, max_steps=chaos.max_steps, groups=GROUPS, samples=SAMPLES, replays=REPLAYS)


@pytest.mark.nightly  # five minutes on two cores: vLLM comes up six times
@pytest.mark.timeout(1800)
def test_kills_with_vllm_lose_and_double_nothing(home, tmp_path):
    chaos = Chaos(home, tmp_path / "run", light=False, max_steps=40, seed=3, start_timeout_s=200)
    chaos.play(["core", "engine", "all"], pace=3)
    assert (len(chaos.kills), chaos.starts) == (3, 2)
    check_run(chaos.run_dir, max_steps=chaos.max_steps, groups=GROUPS, samples=SAMPLES, replays=REPLAYS)
