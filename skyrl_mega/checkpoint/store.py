"""Where checkpoints lie and which of them count.

    run_dir/checkpoints/step_000012/      a complete checkpoint (the rename that gave it this name was its last act)
    run_dir/checkpoints/step_000024.tmp/  one being written; worthless if its writer died

A directory is complete if and only if it has its final name, so a process killed at any moment leaves either the old set of
checkpoints or the new one. `latest` is a convenience for people; nothing reads it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import TrainState

STATE_FILE = "train_state.json"
_NAME = re.compile(r"step_(\d{6,})")


def checkpoints_dir(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    return checkpoints_dir(run_dir) / f"step_{step:06d}"


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return named_steps(checkpoints_dir(run_dir))


def named_steps(parent: Path) -> list[Path]:
    """The directories below `parent` that have the final name of a step, by step."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def find_checkpoint(run_dir: str | Path, which: str = "latest") -> Path:
    """The directory of a checkpoint: `latest`, a step number, a name or a path. Raises CheckpointError listing what there is."""
    existing = list_checkpoints(run_dir)
    if which == "latest" and existing:
        return existing[-1]
    for path in existing:
        if which in (path.name, str(step_of(path))) or Path(which) == path:
            return path
    if (Path(which) / STATE_FILE).is_file():
        return Path(which)
    names = ", ".join(path.name for path in existing) or "none"
    raise CheckpointError(f"{run_dir} has no checkpoint {which!r}; complete checkpoints there: {names}")


def begin(run_dir: str | Path, step: int) -> Path:
    """An empty directory to write the checkpoint of `step` into; leftovers of dead writers are removed. Rank 0 only."""
    parent = checkpoints_dir(run_dir)
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob("*.tmp"):
        shutil.rmtree(leftover)
    temporary = checkpoint_path(run_dir, step).with_suffix(".tmp")
    temporary.mkdir()
    return temporary


def commit(temporary: Path, state: TrainState, layout: dict[str, int], keep_last: int) -> Path:
    """Gives the checkpoint its final name, durably, then removes all but the newest `keep_last`. Rank 0 only."""
    text = json.dumps({"state": asdict(state), "layout": layout}, indent=2)
    (temporary / STATE_FILE).write_text(text + "\n", encoding="utf-8")
    final = give_final_name(temporary)
    pointer = final.parent / "latest.tmp_file"
    pointer.write_text(final.name + "\n", encoding="utf-8")
    os.replace(pointer, final.parent / "latest")
    for old in list_checkpoints(final.parent.parent)[:-keep_last]:
        shutil.rmtree(old)
    return final


def give_final_name(temporary: Path) -> Path:
    """Makes `NAME.tmp` and all it holds durable, then renames it to `NAME`, replacing a directory of that name."""
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    final = temporary.with_suffix("")
    if final.exists():
        # The same step saved again after a resume: the old one has to go first.
        shutil.rmtree(final)
    os.rename(temporary, final)
    _sync(final.parent)
    return final


def read_state(path: Path) -> tuple[TrainState, dict[str, int]]:
    """(state, layout) of a complete checkpoint. Raises CheckpointError if the file is absent or not ours."""
    try:
        content = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        return TrainState(**content["state"]), content["layout"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / STATE_FILE} can't be read ({error}); remove {path} to use an older checkpoint") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
