"""Where checkpoints lie and which of them count.

    run_dir/checkpoints/step_000012/          a complete checkpoint (the rename that gave it this name was its last act)
    run_dir/checkpoints/step_000024.tmp/      one being written; worthless if its writer died
    run_dir/checkpoints/step_000018.damaged/  one that was found damaged on resuming, and set aside
    run_dir/checkpoints/latest, best          one line each, the name of a checkpoint; replaced atomically

A directory is complete if and only if it has its final name, so a process killed at any moment leaves either the old set of
checkpoints or the new one. `latest` is a convenience for people, nothing reads it; `best` is what `skyrl-mega export` and
`eval` take by that name. What makes a checkpoint best is in its own train_state.json.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from skyrl_mega.checkpoint import manifest
from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import Metrics, TrainState

STATE_FILE = "train_state.json"
#: Written into train_state.json. 1 (or nothing): without a manifest.
FORMAT = 2
TEMPORARY, DAMAGED, REPLACED = ".tmp", ".damaged", ".replaced.tmp"
_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: the newest `keep_last`, and of all the `keep_best` best by the metric `metric`."""

    keep_last: int
    keep_best: int = 0
    metric: str = "eval/accuracy"
    better: Literal["higher", "lower"] = "higher"

    def best(self, checkpoints: Sequence[Path]) -> list[Path]:
        """The checkpoints that have the metric, best first; of equal ones the newer first."""
        values = [(read_metrics(path).get(self.metric, math.nan), path) for path in checkpoints]
        sign = 1.0 if self.better == "higher" else -1.0
        found = [(sign * value, step_of(path), path) for value, path in values if math.isfinite(value)]
        return [path for _, _, path in sorted(found, key=lambda one: one[:2], reverse=True)]

    def kept(self, checkpoints: Sequence[Path]) -> dict[Path, str]:
        """Why each checkpoint is kept (`latest`, `last 2`, `best`, `best 3`); those that are not, are absent."""
        reasons: dict[Path, list[str]] = {}
        for number, path in enumerate(self.best(checkpoints)[: self.keep_best]):
            reasons.setdefault(path, []).append("best" if number == 0 else f"best {number + 1}")
        for number, path in enumerate(reversed(checkpoints[-self.keep_last :])):
            reasons.setdefault(path, []).insert(0, "latest" if number == 0 else f"last {number + 1}")
        return {path: ", ".join(names) for path, names in reasons.items()}


# ---- names ----------------------------------------------------------------------------------------------------------------


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
    """The directory of a checkpoint: `latest`, `best`, a step number, a name or a path.

    Raises CheckpointError listing what there is.
    """
    existing = list_checkpoints(run_dir)
    if which == "latest" and existing:
        return existing[-1]
    wanted = _pointed_to(run_dir, "best") if which == "best" else which
    for path in existing:
        if wanted in (path.name, str(step_of(path))) or Path(wanted) == path:
            return path
    if which != "best" and (Path(which) / STATE_FILE).is_file():
        return Path(which)
    names = ", ".join(path.name for path in existing) or "none"
    remedy = ". None is marked as best: train with `checkpoint.keep_best=1`" if which == "best" else ""
    raise CheckpointError(f"{run_dir} has no checkpoint {which!r}; complete checkpoints there: {names}{remedy}")


# ---- writing (rank 0 only) ------------------------------------------------------------------------------------------------


def begin(run_dir: str | Path, step: int) -> Path:
    """An empty directory to write the checkpoint of `step` into; leftovers of dead writers are removed."""
    parent = checkpoints_dir(run_dir)
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    temporary = checkpoint_path(run_dir, step).with_suffix(TEMPORARY)
    temporary.mkdir()
    return temporary


def remove_leftovers(run_dir: str | Path) -> list[str]:
    """Removes what dead writers left behind; returns the names.

    A checkpoint that one of them was just replacing, and had not yet, gets its name back.
    """
    removed = []
    for leftover in sorted(checkpoints_dir(run_dir).glob(f"*{TEMPORARY}")):
        original = leftover.with_name(leftover.name.removesuffix(REPLACED))
        if leftover.name.endswith(REPLACED) and not original.exists():
            os.rename(leftover, original)
            continue
        shutil.rmtree(leftover)
        removed.append(leftover.name)
    return removed


def commit(
    temporary: Path,
    state: TrainState,
    layout: Mapping[str, int],
    retention: Retention,
    *,
    files: list[manifest.FileRecord],
    metrics: Metrics,
) -> Path:
    """Gives the checkpoint its final name, durably, points `latest` and `best`, and removes what `retention` does not keep.

    files: those that were checksummed while they were written. metrics: the step's numbers, kept with it.
    """
    write_state(temporary, state, layout, metrics=metrics)
    manifest.write_manifest(temporary, files)
    final = give_final_name(temporary)
    run_dir = final.parent.parent
    _point(run_dir, "latest", final)
    existing = list_checkpoints(run_dir)
    best = retention.best(existing)
    if retention.keep_best and best:
        _point(run_dir, "best", best[0])
    kept = retention.kept(existing)
    for old in existing:
        if old != final and old not in kept:
            shutil.rmtree(old)
    return final


def write_state(directory: Path, state: TrainState, layout: Mapping[str, int], *, metrics: Metrics) -> None:
    """Writes the file that says what a checkpoint is of."""
    content = {"format": FORMAT, "state": asdict(state), "layout": dict(layout), "metrics": metrics}
    (directory / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def give_final_name(temporary: Path) -> Path:
    """Makes `NAME.tmp` and all it holds durable, then renames it to `NAME`, replacing a directory of that name."""
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    final = temporary.with_suffix("")
    replaced = temporary.with_suffix(REPLACED)
    if final.exists():
        # The same step saved again after a resume: the old one has to go first, and a rename is over at once.
        os.rename(final, replaced)
    os.rename(temporary, final)
    _sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return final


def set_aside(path: Path) -> Path:
    """Takes a damaged checkpoint out of the count without removing it; returns its new path."""
    aside = path.with_suffix(DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    os.rename(path, aside)
    return aside


def _point(run_dir: Path, name: str, target: Path) -> None:
    pointer = checkpoints_dir(run_dir) / f"{name}.tmp_file"
    pointer.write_text(target.name + "\n", encoding="utf-8")
    os.replace(pointer, checkpoints_dir(run_dir) / name)


def _pointed_to(run_dir: str | Path, name: str) -> str:
    try:
        return (checkpoints_dir(run_dir) / name).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading --------------------------------------------------------------------------------------------------------------


def read_state(path: Path) -> tuple[TrainState, dict[str, int]]:
    """(state, layout) of a complete checkpoint. Raises CheckpointError if the file is absent or not ours."""
    try:
        content = _read(path)
        return TrainState(**content["state"]), content["layout"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / STATE_FILE} can't be read ({error}); remove {path} to use an older checkpoint") from error


def read_metrics(path: Path) -> Metrics:
    """The numbers of the step that a checkpoint was saved after; {} if it has none or is damaged."""
    try:
        return _read(path).get("metrics", {})
    except (OSError, ValueError, AttributeError):
        return {}


def damage(path: Path, how: manifest.Verification, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint, a line each; [] if nothing. `share`: see `manifest.damage`."""
    try:
        read_state(path)
        has_manifest = _read(path).get("format", 1) >= FORMAT
    except CheckpointError:
        return [f"{STATE_FILE} is missing or can't be read"]
    if has_manifest or (path / manifest.MANIFEST_FILE).exists():
        return list(manifest.damage(path, how, share=share))
    # Saved before there were manifests: nothing but the presence of the index can be checked.
    return [f"{name} is missing" for name in (".metadata", "metadata.json", "common.pt") if not (path / name).is_file()]


def require_whole(path: Path, how: manifest.Verification = "sizes") -> None:
    """Raises CheckpointError that names what is wrong with the checkpoint."""
    problems = damage(path, how)
    if problems:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)}. Choose another one, or remove it.")


def size_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _read(path: Path) -> dict:
    return json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
