"""Training runs as a user starts them, and the processes that belong to them: to find, to kill, and to see gone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from helpers.tiny import write_tiny_model
from skyrl_mega.errors import DataError
from skyrl_mega.telemetry.metrics import read_metrics

#: Every episode leaves a line in WITNESS, whatever becomes of the process that played it.
ENVIRONMENT = '''
import json, os, time

from skyrl_mega.envs.base import Reply, TextEnvBase

class WitnessedEnv(TextEnvBase):
    """Reward 1 when the first character of the answer has an even code."""

    def __init__(self, level="", shots=0):
        """Takes and ignores the arithmetic options that recipe=tiny sets."""
        super().__init__()

    def pose(self, payload):
        self.number = payload["number"]
        return payload["text"]

    def respond(self, action):
        if path := os.environ.get("WITNESS"):
            line = json.dumps({"number": self.number, "at": time.time()}) + "\\n"
            with open(path, "ab", buffering=0) as file:
                file.write(line.encode())
        even = float(bool(action) and ord(action[0]) % 2 == 0)
        return Reply(reward=even, metrics={"accuracy": even})

    @classmethod
    def generate_payload(cls, index, seed, split, **options):
        return {"text": f"{split} {seed} number {index}: ", "number": index}
'''

#: What tells the processes of a run from each other, in their command lines.
ROLES = {
    "coordinator": ("ray::_CoordinatorActor",),
    "engine": ("ray::LightActor", "ray::EngineActor"),
    "core": ("helpers.light_core", "VLLM::EngineCore"),
    "gcs": ("ray/gcs/gcs_server",),
    "raylet": ("ray/raylet/raylet",),
}

TESTS = Path(__file__).parents[1]


def write_home(path: Path) -> Path:
    """A directory with a tiny model and the environment above."""
    path.mkdir(parents=True, exist_ok=True)
    write_tiny_model(path / "model", "llama", tied=True)
    (path / "witnessed_env.py").write_text(ENVIRONMENT)
    return path


class Run:
    """One start of the training command, in a session of its own; its output goes to a file."""

    def __init__(self, home: Path, run_dir: Path, *overrides: str, light: bool, **variables: str) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.log = run_dir / f"output-{len(list(run_dir.glob('output-*')))}.txt"
        command = [
            *(sys.executable, "-m", "helpers.light_train" if light else "skyrl_mega.train", "recipe=tiny"),
            *(f"model.path={home / 'model'}", "env.name=witnessed_env:WitnessedEnv", f"trainer.run_dir={run_dir}"),
            *("evaluation.num_prompts=0", "checkpoint.export_hf=false", "telemetry.trackers=[]"),
            *("algorithm.off_policy.stages=[{name: truncated_is}]", *overrides),
        ]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "RAY_", "RANK", "WORLD_SIZE"))}
        paths = {"PYTHONPATH": os.pathsep.join([str(home), str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=home,
                env=clean | paths | {"WITNESS": str(run_dir / "witness.jsonl")} | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_hear_interrupts,
            )
        self._seen: dict[int, psutil.Process] = {}
        self._sessions: set[Path] = set()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """The trainer and everything below it that lives now; all that were ever returned are remembered for `left_behind`."""
        try:
            root = psutil.Process(self.process.pid)
            found = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        for process in found:
            if process.pid not in self._seen:
                self._seen[process.pid] = process
                self._sessions |= {Path("/tmp") / name for name in re.findall(r"skyrl-ray-\w+", _command_line(process))}
        return found

    def of_role(self, role: str) -> list[psutil.Process]:
        """Those that play `role`, oldest first."""
        if role == "trainer":
            return [p for p in self.processes() if p.pid == self.process.pid]
        return [p for p in self.processes() if any(mark in _command_line(p) for mark in ROLES[role])]

    def wait_for_role(self, role: str, count: int = 1, *, timeout_s: float) -> list[psutil.Process]:
        self.wait_until(lambda: len(self.of_role(role)) >= count, timeout_s, f"{count} of {role}")
        return self.of_role(role)

    def wait_for_step(self, step: int, *, timeout_s: float) -> None:
        self.wait_until(lambda: last_step(self.run_dir) >= step, timeout_s, f"step {step}")

    def wait_until(self, condition, timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            self.processes()
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.output[-6000:]}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n{self.output[-6000:]}"
            time.sleep(0.05)

    def wait(self, *, timeout_s: float) -> int:
        """The exit code."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            self.processes()
            assert time.monotonic() < deadline, f"the run did not end within {timeout_s} s:\n{self.output[-6000:]}"
            time.sleep(0.1)
        return self.process.returncode

    def left_behind(self, *, timeout_s: float = 30.0, but_seekers: bool = False) -> list[str]:
        """The command lines of processes that still live `timeout_s` after the end of the trainer.

        `but_seekers`: without processes of Ray that look up to a minute for a head or a raylet that was killed, and then end: the
        agents beside a raylet, and workers that are just starting.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            alive = [p for p in self._seen.values() if _lives(p) and not (but_seekers and _seeks(p))]
            if not alive:
                return []
            time.sleep(0.2)
        return [f"{p.pid}: {_command_line(p)[:150]}" for p in alive]

    def leftovers(self) -> list[Path]:
        """Shared memory of the trainer and directories of its Ray cluster, which a run must not leave when it ends by itself."""
        return [*Path("/dev/shm").glob(f"*skyrl-mega-weights-{self.process.pid}-*"), *(d for d in self._sessions if d.exists())]

    def end(self) -> None:
        """Ends what is left, when a test has failed."""
        for process in [*self.processes(), *self._seen.values()]:
            if _lives(process):
                process.kill()
        self.process.wait()


def _hear_interrupts() -> None:
    """A shell has what it runs in the background ignore SIGINT, and so its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def kill(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return


def last_step(run_dir: Path) -> int:
    """The last step that metrics.jsonl has; -1 without any."""
    try:
        return max((row["step"] for row in read_metrics(run_dir)), default=-1)
    except (FileNotFoundError, IsADirectoryError, DataError):
        return -1


def _seeks(process: psutil.Process) -> bool:
    line = _command_line(process)
    return line.startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent")) or "ray/_private/workers/default_worker.py" in line


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""
