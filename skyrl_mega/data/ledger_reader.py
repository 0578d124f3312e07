"""What may be asked of a ledger, also beside the run that writes it; and the few words all its modules share."""

from __future__ import annotations

import enum
import json
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from skyrl_mega.data.ledger_file import LedgerFile
from skyrl_mega.data.trajectory_codec import decode_group
from skyrl_mega.errors import DataError, LedgerError
from skyrl_mega.types import TrainState, TrajectoryGroup

if TYPE_CHECKING:
    from skyrl_mega.data.ledger_audit import Audit


class GroupState(str, enum.Enum):
    """Where a group stands."""

    ISSUED = "issued"  #: drawn; being sampled, or waiting to be begun (again)
    FINISHED = "finished"  #: its trajectories are in the ledger
    TAKEN = "taken"  #: in the batch of a step that is not finished
    TRAINED = "trained"  #: in a finished step; final unless that step is rolled back
    DROPPED = "dropped"  #: never trained, for a reason; final


@dataclass(frozen=True)
class Counts:
    """Groups by state; `issued` counts them all. `early_stops` and `replayed` count times, of which a group may have several."""

    issued: int
    in_flight: int
    finished: int
    taken: int
    trained: int
    dropped: int
    early_stops: int
    replayed: int
    dropped_by_reason: Mapping[str, int]


class LedgerReader:
    """What may be asked of a ledger, also beside a running writer."""

    def __init__(self, file: LedgerFile) -> None:
        self.file = file

    @classmethod
    def open_read_only(cls, path: str | Path) -> LedgerReader:
        """Raises LedgerError if there is none, if it is damaged, or if another machine is writing it."""
        return LedgerReader(LedgerFile.open_to_read(path))

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def counts(self) -> Counts:
        with self.file.snapshot() as db:
            return count_groups(db)

    def load(self, group_ids: Sequence[str]) -> list[TrajectoryGroup]:
        """The trajectories of finished, taken or trained groups, in the order asked for.

        Raises LedgerError for a group that has none (unfinished, dropped, or cleared by `checkpointed`) or whose bytes are
        damaged.
        """
        groups = []
        with self.file.snapshot() as db:
            for group_id in group_ids:
                query = "SELECT state, trajectories FROM groups LEFT JOIN content USING (seq) WHERE group_id = ?"
                row = db.execute(query, (group_id,)).fetchone()
                if row is None or row[1] is None:
                    why = "is unknown" if row is None else f"is {row[0]} and has none"
                    raise LedgerError(f"the trajectories of group {group_id!r} were asked for, which {why} in {self.file.path}.")
                try:
                    groups.append(decode_group(row[1]))
                except DataError as error:
                    raise LedgerError(
                        f"group {group_id!r} in {self.file.path} is damaged: {error} `skyrl-mega ledger` lists every damaged "
                        "group; put back a copy of the file, or start a new trainer.run_dir."
                    ) from error
        return groups

    def audit(self, *, metrics_steps: Sequence[int] | None = None, checkpoint: TrainState | None = None) -> Audit:
        """Whether everything adds up; see `ledger_audit.audit`."""
        from skyrl_mega.data.ledger_audit import audit

        return audit(self.file, metrics_steps=metrics_steps, checkpoint=checkpoint)


# ---- parts of a transaction -----------------------------------------------------------------------------------------------


def count_groups(db: sqlite3.Connection) -> Counts:
    by_state = dict(db.execute("SELECT state, count(*) FROM groups GROUP BY state").fetchall())
    reasons = db.execute("SELECT reason, count(*) FROM groups WHERE state = 'dropped' GROUP BY reason ORDER BY 2 DESC, 1")
    return Counts(
        issued=sum(by_state.values()),
        in_flight=by_state.get("issued", 0),
        finished=by_state.get("finished", 0),
        taken=by_state.get("taken", 0),
        trained=by_state.get("trained", 0),
        dropped=by_state.get("dropped", 0),
        early_stops=int(read_meta(db, "early_stops", 0)),
        replayed=db.execute("SELECT count(*) FROM replays").fetchone()[0],
        dropped_by_reason=dict(reasons.fetchall()),
    )


def read_meta(db: sqlite3.Connection, name: str, default: Any) -> Any:
    row = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return default if row is None else json.loads(row[0])


def write_meta(db: sqlite3.Connection, name: str, value: Any) -> None:
    db.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, to_json(value)))


def next_seq(db: sqlite3.Connection) -> int:
    [largest] = db.execute("SELECT max(seq) FROM groups").fetchone()
    return 0 if largest is None else largest + 1


def last_step(db: sqlite3.Connection, *, trained: bool = False) -> int:
    """The newest step taken, or trained, in the history that survives; where there is none, the step that the ledger began at."""
    states = "('trained')" if trained else "('taken', 'trained')"
    [newest] = db.execute(f"SELECT max(step) FROM steps WHERE state IN {states}").fetchone()
    return int(read_meta(db, "base_step", 0)) if newest is None else newest


def add_events(db: sqlite3.Connection, seqs: Iterable[int], kind: str, step: int | None, note: str) -> None:
    now = time.time()
    rows = [(seq, kind, step, note or None, now) for seq in seqs]
    db.executemany("INSERT INTO events (seq, kind, step, note, at) VALUES (?, ?, ?, ?, ?)", rows)


def to_json(value: Any) -> str:
    try:
        return json.dumps(value if isinstance(value, (int, float, str)) else dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LedgerError(f"the ledger holds plain JSON values, and got {value!r}: {error}.") from error
