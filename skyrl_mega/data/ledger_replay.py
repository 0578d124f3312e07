"""Groups that are trained again: the ledger counts these times apart from first trainings, which stay exactly one a group.

A replay leaves its group as it is: trained, by the step that first took it. Its own row says which later step took it again.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from skyrl_mega.data.ledger_reader import add_events, read_meta
from skyrl_mega.errors import LedgerError


def replayable(db: sqlite3.Connection, step: int, max_age: int) -> list[str]:
    """Groups that `step` may take again: trained by the `max_age` steps before it, their trajectories kept; in training order."""
    rows = db.execute(
        "SELECT group_id FROM groups WHERE state = 'trained' AND step >= ? AND step < ? AND step > ? ORDER BY step, position",
        (step - max_age, step, content_cleared_step(db)),
    )
    return [group_id for (group_id,) in rows]


def add_replays(db: sqlite3.Connection, step: int, group_ids: Sequence[str], max_age: int) -> None:
    """Enters that `step` takes these groups again. Raises LedgerError for a group that it may not take, or twice."""
    allowed = set(replayable(db, step, max_age))
    for group_id in group_ids:
        if group_id not in allowed:
            raise LedgerError(
                f"group {group_id!r} can't be replayed by step {step}: it must have been trained by the {max_age} steps before "
                "(sampling.replay.max_age), and comes at most once in a step. Use Ledger.replayable."
            )
        allowed.remove(group_id)
    places = [db.execute("SELECT seq, ? - step FROM groups WHERE group_id = ?", (step, name)).fetchone() for name in group_ids]
    db.executemany("INSERT INTO replays (step, seq, age, max_age) VALUES (?, ?, ?, ?)", [(step, *p, max_age) for p in places])
    add_events(db, (seq for seq, _ in places), "replayed", step, "")


def undo_replays(db: sqlite3.Connection, to_step: int) -> None:
    """Takes back the replays of the steps after `to_step`: those steps choose theirs again when they are repeated."""
    undone = db.execute("SELECT step, seq FROM replays WHERE step > ? ORDER BY step, seq", (to_step,)).fetchall()
    for step, seq in undone:
        add_events(db, [seq], "replay_undone", step, "")
    db.execute("DELETE FROM replays WHERE step > ?", (to_step,))


def content_cleared_step(db: sqlite3.Connection) -> int:
    """The last step whose groups' trajectories were cleared."""
    return int(read_meta(db, "content_cleared_step", read_meta(db, "cleared_step", 0)))
