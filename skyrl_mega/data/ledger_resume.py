"""The ledger set back to a checkpoint: what was trained after it is undone, and what a resumed run begins with is listed."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyrl_mega.data.ledger_file import LedgerFile
from skyrl_mega.data.ledger_reader import Counts, add_events, count_groups, last_step, next_seq, read_meta, write_meta
from skyrl_mega.data.ledger_replay import undo_replays
from skyrl_mega.errors import LedgerError
from skyrl_mega.types import Prompt, PromptGroup


@dataclass(frozen=True)
class FinishedGroup:
    """A group whose trajectories wait in the ledger; `LedgerReader.load` decodes them. `seq`: its place in order of admission."""

    seq: int
    group_id: str
    min_policy_version: int
    max_policy_version: int
    response_tokens: int


@dataclass(frozen=True)
class Resumption:
    """What a run that resumes at `step` begins with, or a coordinator that takes a dead one's place.

    `taken`: steps whose groups the trainer was given and has not trained; none after a rollback. `replay`: for each later step
    that was taken before, its groups in their order; it must take them again. `waiting`: finished groups that no step has, in
    order of admission. `unfinished`: groups to begin again, in order of admission. `prompt_source`: its newest state, None for a
    ledger that has issued nothing. `next_seq`: of the next group issued. `rolled_back`: groups that this rollback set back.

    A group that is begun while steps are repeated grows older with each of them: whoever admits groups by how many steps stand
    before them must count the steps of `replay` too.
    """

    step: int
    taken: Mapping[int, Sequence[FinishedGroup]]
    replay: Mapping[int, Sequence[FinishedGroup]]
    waiting: Sequence[FinishedGroup]
    unfinished: Sequence[PromptGroup]
    prompt_source: Mapping[str, Any] | None
    next_seq: int
    counts: Counts
    rolled_back: int


def roll_back(file: LedgerFile, to_step: int) -> Resumption:
    """See `Ledger.rollback`."""
    with file.transaction(synced=True) as db:
        _check(file, db, to_step)
        undo_replays(db, to_step)
        undone = db.execute(
            "SELECT seq, step FROM groups WHERE state IN ('taken', 'trained') AND step > ? ORDER BY step, position", (to_step,)
        ).fetchall()
        db.executemany(
            "UPDATE groups SET state = 'finished', staleness = NULL, trained_at = NULL WHERE seq = ?",
            [(seq,) for seq, _ in undone],
        )
        add_events(db, (seq for seq, _ in undone), "rolled_back", to_step, "")
        db.execute("UPDATE steps SET state = 'rolled_back', trained_at = NULL WHERE step > ?", (to_step,))
        db.execute("UPDATE weight_versions SET rolled_back = 1 WHERE step > ?", (to_step,))
        return resumption(db, to_step, len(undone))


def _check(file: LedgerFile, db: sqlite3.Connection, to_step: int) -> None:
    """Raises LedgerError where a run can't resume at `to_step` with this ledger."""
    if next_seq(db) == 0:
        write_meta(db, "base_step", to_step)  # the steps before were trained before there was a ledger
        return
    newest = last_step(db, trained=True)
    oldest = max(int(read_meta(db, "base_step", 0)), int(read_meta(db, "cleared_step", 0)))
    if to_step > newest:
        raise LedgerError(
            f"the checkpoint is of step {to_step}, and {file.path} knows trained steps up to {newest}: it is older "
            "than the checkpoint, or of another run. Put back the newest copy of it, or resume from a checkpoint of step "
            f"{newest} or before."
        )
    if to_step < oldest:
        raise LedgerError(
            f"the checkpoint is of step {to_step}, and {file.path} no longer holds what steps up to {oldest} were trained on: it "
            f"was cleared when a later checkpoint was complete. Resume from a checkpoint of step {oldest} or later, or start a "
            "new trainer.run_dir."
        )


def resumption(db: sqlite3.Connection, step: int, rolled_back: int) -> Resumption:
    """What stands in the ledger after `step`, for whoever goes on from there."""
    taken, finished = _by_step(db, "taken"), _by_step(db, "finished")
    waiting = finished.pop(None, [])
    issued = db.execute("SELECT group_id, prompt_id, payload, num_samples FROM groups WHERE state = 'issued' ORDER BY seq")
    return Resumption(
        step=step,
        taken={number: groups for number, groups in taken.items() if number is not None},
        replay={number: groups for number, groups in finished.items() if number is not None},
        waiting=waiting,
        unfinished=[
            PromptGroup(group_id, Prompt(prompt_id, json.loads(payload)), num_samples)
            for group_id, prompt_id, payload, num_samples in issued
        ],
        prompt_source=read_meta(db, "prompt_source", None),
        next_seq=next_seq(db),
        counts=count_groups(db),
        rolled_back=rolled_back,
    )


def _by_step(db: sqlite3.Connection, state: str) -> dict[int | None, list[FinishedGroup]]:
    """The groups in `state` by their step, in their places; those without one under None, in order of admission."""
    query = (
        "SELECT step, seq, group_id, min_version, max_version, response_tokens FROM groups WHERE state = ?"
        " ORDER BY step, position, seq"
    )
    rows = db.execute(query, (state,))
    groups: dict[int | None, list[FinishedGroup]] = {}
    for step, *values in rows:
        groups.setdefault(step, []).append(FinishedGroup(*values))
    return groups
