"""Which checkpoint a run goes on from: the newest that is whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_mega.checkpoint import store
from skyrl_mega.errors import CheckpointError

if TYPE_CHECKING:
    from skyrl_mega.config.schema import CheckpointConfig
    from skyrl_mega.parallel.topology import Topology


def checkpoint_to_resume(
    run_dir: str, settings: CheckpointConfig, topology: Topology, *, warn: Callable[[str], None]
) -> Path | None:
    """The checkpoint to go on from, as `checkpoint.resume` says; None: begin anew. *All ranks*; they share the checking.

    Under `auto` a damaged checkpoint is set aside with a warning and the one before it is taken. Raises CheckpointError under
    `must` if the newest is damaged or there is none, and under `auto` if all of them are damaged: a run with a past never
    begins anew by itself.
    """
    if settings.resume == "never":
        return None
    if topology.rank == 0:
        removed = store.remove_leftovers(run_dir)
        if removed:
            warn(f"removed what an interrupted save left behind: {', '.join(removed)}")
    names = topology.broadcast_object(store.list_checkpoints(run_dir), phase="checkpoint/list")
    damaged: dict[Path, list[str]] = {}
    for path in reversed(names):
        problems = _damage(path, settings, topology)
        if not problems:
            _set_aside(damaged, path, topology, warn)
            return path
        if settings.resume == "must":
            raise CheckpointError(
                f"the newest checkpoint {path} is damaged: {'; '.join(problems)}. Say checkpoint.resume=auto to go on from the "
                "newest whole one."
            )
        damaged[path] = problems
    if damaged:
        listed = "; ".join(f"{path.name}: {', '.join(problems)}" for path, problems in damaged.items())
        raise CheckpointError(
            f"every checkpoint in {store.checkpoints_dir(run_dir)} is damaged ({listed}). Restore one from a copy, or begin anew "
            "in another trainer.run_dir."
        )
    return store.find_checkpoint(run_dir) if settings.resume == "must" else None


def _damage(path: Path, settings: CheckpointConfig, topology: Topology) -> list[str]:
    """What is wrong with a checkpoint, the same on all ranks; each has read its share of the files."""
    mine = store.damage(path, settings.verify, share=(topology.rank, topology.world_size))
    found = topology.gather_objects(mine, phase="checkpoint/verify")
    return sorted({problem for problems in found for problem in problems})


def _set_aside(damaged: dict[Path, list[str]], used: Path, topology: Topology, warn: Callable[[str], None]) -> None:
    for path, problems in damaged.items():
        if topology.rank == 0:
            aside = store.set_aside(path)
            what = f"checkpoint {path.name} is damaged ({'; '.join(problems)})"
            warn(f"warning: {what}; set aside as {aside.name}, using {used.name}")
    topology.barrier("checkpoint/set-aside")
