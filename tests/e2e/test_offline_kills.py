"""Runs on fixed data whose ranks are killed with SIGKILL at any moment: the same command ends them as if nobody had.

The ranks are what torchrun would start, forked from a process that has imported Megatron already.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.offline import SETTINGS, lines, write_rows
from helpers.spawn import run_ranks, start_ranks
from helpers.tiny import write_tiny_model
from skyrl_mega.checkpoint import store
from skyrl_mega.launch.cli import main

ROWS = 40
#: Until a rank that lost its partner has ended: sign of life, its deadline, and what it says then.
ENDS_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    write_tiny_model(folder / "model", "llama", tied=True)
    for kind in ("sft", "dpo", "rm"):
        write_rows(folder / f"{kind}.jsonl", kind, ROWS)
    return folder


def command(home: Path, kind: str, run_dir: Path, max_steps: int, *overrides: str) -> list[str]:
    """The words of the command line: a checkpoint after every step, so that most moments are moments of a save."""
    return [
        *(kind, *SETTINGS, f"model.path={home / 'model'}", f"data.path={home / f'{kind}.jsonl'}"),
        *("data.eval_share=0.2", "evaluation.interval_steps=6", f"trainer.max_steps={max_steps}"),
        *("checkpoint.interval_steps=1", "checkpoint.asynchronous=true", f"trainer.run_dir={run_dir}", *overrides),
    ]


def start(rank: int, words: list[str]) -> int:
    return main(words)


def moments(run_dir: Path, draw: random.Random) -> dict[str, Callable[[float], None]]:
    """By the name of a moment to kill at, what waits for it; until `deadline` of time.monotonic()."""
    final = store.checkpoints_dir(run_dir)

    def newest() -> int:
        return max(map(store.step_of, store.list_checkpoints(run_dir)), default=0)

    def writing(since: float) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_mtime >= since for path in final.glob("*.tmp"))
        return False

    def saving(deadline: float) -> None:
        since = time.time()  # what an earlier kill has left does not count
        while not writing(since) and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0.0, 0.02))

    def after(steps: int, deadline: float) -> None:
        begun = newest()
        while newest() < begun + steps and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.1))

    def exporting(deadline: float) -> None:
        while not any(run_dir.glob(".hf.*")) and time.monotonic() < deadline:
            time.sleep(0.0002)

    return {
        "at the start": lambda deadline: time.sleep(draw.uniform(0.0, 1.5)),
        "saving": saving,
        "two steps later": lambda deadline: after(2, deadline),
        "exporting": exporting,
    }


def kill_at(moment: Callable[[float], None], words: list[str], *, ranks: int, victim: int) -> bool:
    """One life of the run; whether the victim was killed before it had ended. The other ranks end by themselves."""
    with tempfile.TemporaryDirectory(prefix="killed-") as folder:
        processes = start_ranks(start, ranks, folder, 100, words)
        moment(time.monotonic() + 30)
        was_alive = processes[victim].is_alive()
        if was_alive:
            os.kill(processes[victim].pid, signal.SIGKILL)
        for process in processes:
            process.join(ENDS_WITHIN_S)
            assert process.exitcode is not None, "a rank outlived its partner"
        print(*(path.read_text(errors="replace")[-1500:] for path in sorted(Path(folder).glob("*.[12]"))))
        return was_alive and processes[victim].exitcode == -signal.SIGKILL


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "hf" / "model.safetensors")


def numbers(run_dir: Path) -> list[dict]:
    """The metrics, without which kernels a process has used so far: each counts anew."""
    return [{name: value for name, value in row.items() if not name.startswith("kernels/")} for row in lines(run_dir)]


def check_same(run_dir: Path, whole: Path, max_steps: int) -> None:
    assert numbers(run_dir) == numbers(whole), "a step was lost, doubled, or made of other rows"
    first, second = weights(run_dir), weights(whole)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = [store.read_state(store.list_checkpoints(path)[-1])[0] for path in (run_dir, whole)]
    assert states[0].prompt_source == states[1].prompt_source
    assert states[0].num_trained_groups == states[1].num_trained_groups == max_steps * 6
    left = [path.name for path in [*run_dir.iterdir(), *store.checkpoints_dir(run_dir).iterdir()] if "tmp" in path.name]
    assert not left + [path.name for path in run_dir.iterdir() if path.name.startswith(".")]


LONG = ("at the start", *["saving", "two steps later"] * 4, "exporting")


@pytest.mark.parametrize(
    ("kind", "ranks", "victims", "plan"),
    [
        ("sft", 1, (0,), ("saving", "two steps later", "exporting")),
        ("dpo", 2, (1,), ("saving",)),
        pytest.param("sft", 1, (0,), LONG, marks=pytest.mark.nightly),  # a minute on two cores
        pytest.param("rm", 2, (0, 1), LONG[:4], marks=pytest.mark.nightly),  # a minute on two cores
    ],
)
def test_a_killed_run_ends_as_an_undisturbed_one(home, tmp_path, kind, ranks, victims, plan):
    overrides = ("parallel=dp2",) if ranks == 2 else ()
    max_steps, run_dir = max(12, 4 * len(plan)), tmp_path / "killed"
    assert run_ranks(start, ranks, command(home, kind, tmp_path / "whole", max_steps, *overrides)) == [0] * ranks
    assert len(lines(tmp_path / "whole")) == max_steps + 1
    words, waits = command(home, kind, run_dir, max_steps, *overrides), moments(run_dir, random.Random(5))
    killed = [kill_at(waits[name], words, ranks=ranks, victim=victims[number % len(victims)]) for number, name in enumerate(plan)]
    assert sum(killed) >= len(plan) - 1, "the run was over before it could be killed"
    assert run_ranks(start, ranks, words) == [0] * ranks
    check_same(run_dir, tmp_path / "whole", max_steps)
