"""What a ledger tells a person: how groups fared, how stale and how long they were, and one group's life."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyrl_mega.data.ledger_file import LedgerFile
from skyrl_mega.data.ledger_reader import Counts, count_groups, last_step, read_meta
from skyrl_mega.errors import LedgerError


@dataclass(frozen=True)
class Lengths:
    """Response tokens of the groups that fared alike. Means are per sample; None where no group of them finished.

    A fate that takes long responses more often than short ones shows as a mean or a longest above those of `trained`.
    """

    groups: int
    finished: int
    mean_response: float | None
    longest_response: int | None
    discarded_tokens: int


@dataclass(frozen=True)
class Step:
    """One step of the history that survives. `groups` and what follows are of first trainings; `replayed` are taken again."""

    step: int
    state: str
    groups: int
    policy_version: int
    attempts: int
    mean_staleness: float
    response_tokens: int
    replayed: int
    trained_at: float | None


@dataclass(frozen=True)
class Published:
    """A weight version that engines were given."""

    version: int
    step: int
    checksum: str
    num_tensors: int
    size_bytes: int
    at: float
    rolled_back: bool


@dataclass(frozen=True)
class Summary:
    """`staleness`: groups trained, by staleness. `steps` and `versions`: the last few, oldest first."""

    counts: Counts
    sessions: int
    prompts_per_step: int
    max_staleness: int
    last_taken_step: int
    last_trained_step: int
    checkpointed_step: int | None
    cleared_step: int
    steps_repeated: int
    staleness: Mapping[int, int]
    lengths: Mapping[str, Lengths]
    steps: Sequence[Step]
    versions: Sequence[Published]


@dataclass(frozen=True)
class Event:
    """One line of a group's life."""

    at: float
    kind: str
    step: int | None
    note: str


#: Which groups fared alike, in SQL. `begun again`: ended early once or more; they are in one of the others too.
_FATES = {
    "trained": "state = 'trained'",
    "taken": "state = 'taken'",
    "waiting": "state = 'finished'",
    "dropped": "state = 'dropped'",
    "begun again": "early_stops > 0",
}


def summarize(file: LedgerFile, *, last: int = 10) -> Summary:
    """The numbers of one state of the file; `last`: steps and versions listed."""
    with file.snapshot() as db:
        staleness = db.execute("SELECT staleness, count(*) FROM groups WHERE state = 'trained' GROUP BY staleness ORDER BY 1")
        [repeated] = db.execute("SELECT count(*) FROM steps WHERE attempts > 1").fetchone()
        return Summary(
            counts=count_groups(db),
            sessions=int(read_meta(db, "sessions", 0)),
            prompts_per_step=int(read_meta(db, "prompts_per_step", 0)),
            max_staleness=int(read_meta(db, "max_staleness", 0)),
            last_taken_step=last_step(db),
            last_trained_step=last_step(db, trained=True),
            checkpointed_step=read_meta(db, "checkpointed_step", None),
            cleared_step=int(read_meta(db, "cleared_step", 0)),
            steps_repeated=repeated,
            staleness=dict(staleness.fetchall()),
            lengths={fate: _lengths(db, condition) for fate, condition in _FATES.items()},
            steps=_steps(db, last),
            versions=_versions(db, last),
        )


def life(file: LedgerFile, group_id: str) -> tuple[dict[str, Any], list[Event]]:
    """(the group's row, its events in order). Raises LedgerError for a group that the ledger does not know."""
    with file.snapshot() as db:
        cursor = db.execute("SELECT * FROM groups WHERE group_id = ?", (group_id,))
        values = cursor.fetchone()
        if values is None:
            near = db.execute("SELECT group_id FROM groups ORDER BY seq DESC LIMIT 1").fetchone()
            example = f"; the last one issued is {near[0]!r}" if near else ""
            raise LedgerError(f"{file.path} knows no group {group_id!r}{example}.")
        row = {column[0]: value for column, value in zip(cursor.description, values, strict=True)}
        events = db.execute("SELECT at, kind, step, coalesce(note, '') FROM events WHERE seq = ? ORDER BY id", (row["seq"],))
        return row, [Event(*event) for event in events]


def _lengths(db: sqlite3.Connection, condition: str) -> Lengths:
    row = db.execute(
        "SELECT count(*), count(tokens), 1.0 * sum(response_tokens) / sum(num_samples) FILTER (WHERE tokens IS NOT NULL),"
        f" max(longest_response), coalesce(sum(discarded_tokens), 0) FROM groups WHERE {condition}"
    ).fetchone()
    return Lengths(*row)


def _steps(db: sqlite3.Connection, last: int) -> list[Step]:
    rows = db.execute(
        "SELECT s.step, s.state, s.num_groups, s.policy_version, s.attempts, coalesce(avg(g.staleness), 0),"
        " coalesce(sum(g.response_tokens), 0), (SELECT count(*) FROM replays r WHERE r.step = s.step), s.trained_at"
        " FROM steps s LEFT JOIN groups g ON g.step = s.step AND g.state = s.state"
        " WHERE s.state != 'rolled_back' GROUP BY s.step ORDER BY s.step DESC LIMIT ?",
        (last,),
    ).fetchall()
    return [Step(*row) for row in reversed(rows)]


def _versions(db: sqlite3.Connection, last: int) -> list[Published]:
    names = ("version", "step", "checksum", "num_tensors", "size_bytes", "at", "rolled_back")
    query = f"SELECT {', '.join(names)} FROM weight_versions ORDER BY id DESC LIMIT ?"
    found = [dict(zip(names, row, strict=True)) for row in db.execute(query, (last,))]
    return [Published(**{**row, "rolled_back": bool(row["rolled_back"])}) for row in reversed(found)]
