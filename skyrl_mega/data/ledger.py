"""The ledger: what became of every prompt group, so that each finished group is trained exactly once whatever is killed.

A group is issued (drawn from the prompt source, on its way through engines and environments), finished (its trajectories are in
the file), taken by a step, and trained; or it is dropped, with a reason. An early stop sends a group back to be begun again.

    issued --finish--> finished --take(step)--> taken --trained(step)--> trained
      |  ^-- early_stop ---|  ^--------------- rollback -----------------'
      '-------- drop ------'--> dropped(reason)

Two stores must agree after a crash: this file, and the newest checkpoint, which is older. What was trained after the checkpoint
is undone by that; `rollback` says so here. Those groups are finished again and keep their step and place: the resumed run takes
for each step the groups that the lost steps took, in their order, and `take` refuses others. Nothing that was finished is
generated again, and in the history that survives no group is trained twice. The prompt source is not rolled back: its state is
written in the transaction that issues its prompts, so a prompt that was drawn is in the ledger, and one that is not in it was
never drawn.

The order of calls in a step: `take`, the update, `trained`, and only then the checkpoint. `trained` waits for the disk, so the
ledger is never behind a checkpoint. `events` keeps every transition that was made, from which the audit recounts the rest.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from skyrl_mega.data.ledger_file import LedgerFile
from skyrl_mega.data.ledger_reader import (
    GroupState,
    LedgerReader,
    add_events,
    last_step,
    next_seq,
    read_meta,
    to_json,
    write_meta,
)
from skyrl_mega.data.ledger_replay import add_replays, content_cleared_step, replayable
from skyrl_mega.data.ledger_resume import Resumption, resumption, roll_back
from skyrl_mega.data.trajectory_codec import encode_group
from skyrl_mega.errors import LedgerError
from skyrl_mega.types import PromptGroup, TrajectoryGroup, WeightVersion


class Ledger(LedgerReader):
    """The ledger of the run that writes it. Every call is one transaction: done wholly, or refused with LedgerError.

    `prompts_per_step` and `max_staleness` hold from now on; steps taken before keep theirs. Trajectories are kept for
    `replay_max_age` steps after a resume could first need them: so long may a group be trained again.
    """

    def __init__(self, file: LedgerFile, *, prompts_per_step: int, max_staleness: int, replay_max_age: int = 0) -> None:
        super().__init__(file)
        self._prompts_per_step = prompts_per_step
        self._max_staleness = max_staleness
        self._replay_max_age = replay_max_age
        self._session = 0

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        identity: Mapping[str, Any],
        prompts_per_step: int,
        max_staleness: int,
        replay_max_age: int = 0,
    ) -> Ledger:
        """The run's ledger at `path`, made if there is none.

        `identity`: plain values that must not change during a run, such as its seed. Raises LedgerError if they differ from those
        the ledger began with, if another process writes it, if it is damaged, or if the disk is full.
        """
        file = LedgerFile.open_to_write(path)
        try:
            ledger = cls(file, prompts_per_step=prompts_per_step, max_staleness=max_staleness, replay_max_age=replay_max_age)
            ledger._begin_session(dict(identity))
            return ledger
        except BaseException:
            file.close()
            raise

    @property
    def next_seq(self) -> int:
        """The number of the next group that is issued; groups are numbered 0, 1, 2 ..."""
        with self.file.snapshot() as db:
            return next_seq(db)

    # -- transitions ----------------------------------------------------------------------------------------------------

    def issue(self, groups: Sequence[PromptGroup], *, policy_version: int, source_state: Mapping[str, Any]) -> int:
        """Enters new groups together with the state of the prompt source that gave them; returns the seq of the first."""
        now = time.time()
        with self.file.transaction() as db:
            first = next_seq(db)
            rows = [
                (seq, g.group_id, g.prompt.prompt_id, to_json(g.prompt.payload), g.num_samples, policy_version, now)
                for seq, g in enumerate(groups, start=first)
            ]
            try:
                db.executemany(
                    "INSERT INTO groups (seq, group_id, prompt_id, payload, num_samples, issued_version, issued_at, state) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, 'issued')",
                    rows,
                )
            except sqlite3.IntegrityError as error:
                twice = _first_known(db, groups)
                raise LedgerError(
                    f"group {twice!r} is issued twice; a group_id is unique in a run. Name groups by their seq ({first} is next)."
                ) from error
            write_meta(db, "next_seq", first + len(rows))
            write_meta(db, "prompt_source", dict(source_state))
            add_events(db, (row[0] for row in rows), "issued", None, f"version {policy_version}")
        return first

    def finish(self, group: TrajectoryGroup, *, source_state: Mapping[str, Any] | None = None) -> None:
        """Stores the trajectories of an issued group. Some of its samples may be missing (masked by policy), not all.

        `source_state`: of a prompt source that has taken note of the group, in the same transaction.
        """
        encoded = encode_group(group)
        with self.file.transaction() as db:
            [row] = self._rows(db, [group.group_id], (GroupState.ISSUED,), "finish")
            if group.prompt_id != row["prompt_id"] or len(group.trajectories) > row["num_samples"]:
                raise LedgerError(
                    f"group {group.group_id!r} was issued for prompt {row['prompt_id']!r} with {row['num_samples']} samples; it "
                    f"finishes with prompt {group.prompt_id!r} and {len(group.trajectories)}."
                )
            db.execute("INSERT INTO content (seq, trajectories) VALUES (?, ?)", (row["seq"], encoded.content))
            db.execute(
                "UPDATE groups SET state = 'finished', min_version = ?, max_version = ?, tokens = ?, response_tokens = ?, "
                "longest_response = ?, finished_at = ? WHERE seq = ?",
                (
                    *(encoded.min_policy_version, encoded.max_policy_version, encoded.tokens, encoded.response_tokens),
                    *(encoded.longest_response, time.time(), row["seq"]),
                ),
            )
            if source_state is not None:
                write_meta(db, "prompt_source", dict(source_state))
            add_events(db, [row["seq"]], "finished", None, f"versions {encoded.min_policy_version}..{encoded.max_policy_version}")

    def early_stop(self, group_ids: Sequence[str], *, discarded_tokens: Mapping[str, int] | None = None) -> None:
        """Counts that groups were ended and will be begun again; `discarded_tokens`: sampled in vain, by group.

        A finished group may be one: its step was full, and it would be too stale for the next.
        """
        with self.file.transaction() as db:
            rows = self._rows(db, group_ids, (GroupState.ISSUED, GroupState.FINISHED), "stop early")
            self._discard(db, rows, discarded_tokens, "state = 'issued', early_stops = early_stops + 1")
            db.executemany("DELETE FROM content WHERE seq = ?", [(row["seq"],) for row in rows])
            write_meta(db, "early_stops", int(read_meta(db, "early_stops", 0)) + len(rows))
            add_events(db, (row["seq"] for row in rows), "early_stopped", None, "")

    def drop(self, group_ids: Sequence[str], reason: str, *, discarded_tokens: Mapping[str, int] | None = None) -> None:
        """Gives up issued or finished groups for good; `reason` is counted, so keep it one of a few words."""
        if not reason.strip():
            raise LedgerError(f"a drop needs a reason; {len(group_ids)} groups have none. Say why, as in drop(ids, 'stale').")
        with self.file.transaction() as db:
            rows = self._rows(db, group_ids, (GroupState.ISSUED, GroupState.FINISHED), "drop")
            self._discard(db, rows, discarded_tokens, "state = 'dropped'")
            places = [(reason, row["seq"]) for row in rows]
            db.executemany("UPDATE groups SET reason = ?, step = NULL, position = NULL WHERE seq = ?", places)
            db.executemany("DELETE FROM content WHERE seq = ?", [(row["seq"],) for row in rows])
            add_events(db, (row["seq"] for row in rows), "dropped", None, reason)

    def replayable(self, step: int) -> list[str]:
        """Groups that `step` may train again, in the order in which they were trained; [] where no replay was asked for."""
        with self.file.snapshot() as db:
            return replayable(db, step, self._replay_max_age)

    def take(self, step: int, group_ids: Sequence[str], policy_version: int, *, replayed: Sequence[str] = ()) -> None:
        """Gives finished groups, in this order, to `step`, which trains weight version `policy_version`.

        `replayed`: groups that it trains again beside them; they are counted apart. Raises LedgerError unless it is the next
        step, has its full number of groups (those it had before, where it was rolled back), none of them is staler than allowed,
        and the replayed ones are among `replayable`.
        """
        with self.file.transaction() as db:
            last = last_step(db)
            if step != last + 1:
                raise LedgerError(f"steps are taken one after the other: {last + 1} is next, got {step}.")
            bound, num_groups = self._check_assignment(db, step, group_ids)
            rows = self._rows(db, group_ids, (GroupState.FINISHED,), f"be taken by step {step}")
            staleness = [policy_version - row["min_version"] for row in rows]
            for row, age in zip(rows, staleness, strict=True):
                if not 0 <= age <= bound:
                    raise LedgerError(
                        f"group {row['group_id']!r} was sampled by version {row['min_version']} and step {step} trains version "
                        f"{policy_version}: staleness {age} is outside 0..{bound} (trainer.max_staleness). Drop it."
                    )
            # Two rounds, as two groups of the step may change places.
            db.execute("UPDATE groups SET step = NULL, position = NULL WHERE step = ?", (step,))
            db.executemany(
                "UPDATE groups SET state = 'taken', step = ?, position = ?, staleness = ? WHERE seq = ?",
                [(step, place, age, row["seq"]) for place, (row, age) in enumerate(zip(rows, staleness, strict=True))],
            )
            db.execute(
                "INSERT INTO steps (step, state, num_groups, policy_version, max_staleness, taken_at)"
                " VALUES (?, 'taken', ?, ?, ?, ?) ON CONFLICT (step) DO UPDATE SET state = 'taken',"
                " policy_version = excluded.policy_version, taken_at = excluded.taken_at, trained_at = NULL,"
                " attempts = attempts + 1",
                (step, num_groups, policy_version, bound, time.time()),
            )
            add_events(db, (row["seq"] for row in rows), "taken", step, f"version {policy_version}")
            add_replays(db, step, replayed, self._replay_max_age)

    def trained(self, step: int, version: WeightVersion | None = None) -> None:
        """Says that `step` is trained, and published as `version` if given.

        It is on disk when the call returns: make it before the checkpoint of the step begins.
        """
        now = time.time()
        with self.file.transaction(synced=True) as db:
            row = db.execute("SELECT min(step) FROM steps WHERE state = 'taken'").fetchone()
            if row[0] != step:
                wanted = "no step is taken" if row[0] is None else f"step {row[0]} is the first that is taken and not trained"
                raise LedgerError(f"step {step} can't be trained: {wanted}.")
            rows = db.execute("SELECT seq FROM groups WHERE step = ? AND state = 'taken' ORDER BY position", (step,)).fetchall()
            db.execute("UPDATE groups SET state = 'trained', trained_at = ? WHERE step = ? AND state = 'taken'", (now, step))
            db.execute("UPDATE steps SET state = 'trained', trained_at = ? WHERE step = ?", (now, step))
            add_events(db, (seq for (seq,) in rows), "trained", step, "")
            if version is not None:
                self._add_version(db, version, step, now)

    def weight_version(self, version: WeightVersion, step: int) -> None:
        """Records a version that was published outside `trained`, as after a resume; `step`: the last step trained into it."""
        with self.file.transaction() as db:
            self._add_version(db, version, step, time.time())

    def checkpointed(self, step: int, oldest_kept_step: int) -> None:
        """Clears what no resume can need: payloads of groups trained by steps up to `oldest_kept_step`, and their trajectories
        once no step after that one may replay them.

        `oldest_kept_step`: the step of the oldest checkpoint that a run may resume from. `rollback` to before it is refused
        from now on.
        """
        with self.file.transaction() as db:
            if not oldest_kept_step <= step <= last_step(db, trained=True):
                raise LedgerError(
                    f"a checkpoint is of a trained step, and the oldest kept no newer: got step {step}, oldest kept "
                    f"{oldest_kept_step}, last trained {last_step(db, trained=True)}."
                )
            cleared = int(read_meta(db, "cleared_step", 0))
            if oldest_kept_step > cleared:
                old = "state = 'trained' AND step > ? AND step <= ?"
                db.execute(f"UPDATE groups SET payload = NULL WHERE {old}", (cleared, oldest_kept_step))
                content_cleared = content_cleared_step(db)
                content_clears = max(content_cleared, oldest_kept_step - self._replay_max_age)
                seqs = f"SELECT seq FROM groups WHERE {old}"
                db.execute(f"DELETE FROM content WHERE seq IN ({seqs})", (content_cleared, content_clears))
                write_meta(db, "content_cleared_step", content_clears)
                write_meta(db, "cleared_step", oldest_kept_step)
            write_meta(db, "checkpointed_step", step)

    def rollback(self, to_step: int) -> Resumption:
        """Undoes what was taken or trained after `to_step`, and says what a run resumed there begins with.

        Every resumed run calls it, with the step of its checkpoint (0: none); calling it twice changes nothing. Raises
        LedgerError if the trajectories of a step to repeat were cleared, or if the ledger is behind `to_step`.
        """
        return roll_back(self.file, to_step)

    def resumption(self) -> Resumption:
        """What a coordinator begins with that takes a dead one's place while the trainer lives: nothing is undone.

        A trainer that asks again for a step in `Resumption.taken`, since the answer was lost, gets those groups.
        """
        with self.file.snapshot() as db:
            return resumption(db, last_step(db, trained=True), 0)

    # -- parts of them --------------------------------------------------------------------------------------------------

    def _begin_session(self, identity: dict[str, Any]) -> None:
        identity = json.loads(to_json(identity))
        with self.file.transaction() as db:
            known = read_meta(db, "identity", identity)
            different = [name for name in {**known, **identity} if known.get(name) != identity.get(name)]
            if different:
                name = different[0]
                raise LedgerError(
                    f"{self.file.path} is the ledger of another run: its {name} is {known.get(name)!r}, here it is "
                    f"{identity.get(name)!r}. Go on with the settings of that run, or start a new trainer.run_dir."
                )
            self._session = int(read_meta(db, "sessions", 0)) + 1
            write_meta(db, "identity", identity)
            write_meta(db, "sessions", self._session)
            write_meta(db, "prompts_per_step", self._prompts_per_step)
            write_meta(db, "max_staleness", self._max_staleness)

    def _rows(
        self, db: sqlite3.Connection, group_ids: Sequence[str], allowed: tuple[GroupState, ...], verb: str
    ) -> list[dict[str, Any]]:
        """The groups' rows. Raises LedgerError for one that is unknown, named twice, or not in an `allowed` state."""
        names = ("seq", "group_id", "prompt_id", "num_samples", "state", "reason", "step", "min_version")
        query = f"SELECT {', '.join(names)} FROM groups WHERE group_id = ?"
        rows = []
        for group_id in group_ids:
            values = db.execute(query, (group_id,)).fetchone()
            if values is None:
                raise LedgerError(f"group {group_id!r} can't {verb}: {self.file.path} knows no such group; issue it first.")
            row = dict(zip(names, values, strict=True))
            if row["state"] not in {state.value for state in allowed}:
                step = f" by step {row['step']}" if row["state"] in ("taken", "trained") else ""
                reason = f" ({row['reason']})" if row["reason"] else ""
                raise LedgerError(
                    f"group {group_id!r} can't {verb}: it is {row['state']}{step}{reason}, and must be "
                    f"{' or '.join(state.value for state in allowed)}."
                )
            rows.append(row)
        if len(set(group_ids)) != len(group_ids):
            twice = next(group_id for group_id in group_ids if list(group_ids).count(group_id) > 1)
            raise LedgerError(f"group {twice!r} can't {verb} twice in one call.")
        return rows

    def _check_assignment(self, db: sqlite3.Connection, step: int, group_ids: Sequence[str]) -> tuple[int, int]:
        """(staleness bound, number of groups) of the step, once `group_ids` are the groups that it must or may take."""
        record = db.execute("SELECT num_groups, max_staleness FROM steps WHERE step = ?", (step,)).fetchone()
        num_groups, bound = record or (self._prompts_per_step, self._max_staleness)
        bound = max(bound, self._max_staleness)
        if len(group_ids) != num_groups:
            raise LedgerError(f"step {step} takes {num_groups} groups (trainer.prompts_per_step); got {len(group_ids)}.")
        before = [row[0] for row in db.execute("SELECT group_id FROM groups WHERE step = ? ORDER BY position", (step,))]
        if list(group_ids[: len(before)]) != before:
            raise LedgerError(
                f"step {step} was rolled back and must take again the {len(before)} groups that it had, in their order "
                f"({', '.join(before[:3])} ...); got {', '.join(group_ids[:3])} ... Use Resumption.replay."
            )
        for group_id in group_ids[len(before) :]:
            row = db.execute("SELECT step FROM groups WHERE group_id = ? AND state = 'finished'", (group_id,)).fetchone()
            if row is not None and row[0] is not None:
                raise LedgerError(f"group {group_id!r} belongs to step {row[0]}, which must take it again; step {step} can't.")
        return bound, num_groups

    def _discard(
        self, db: sqlite3.Connection, rows: Sequence[Mapping[str, Any]], tokens: Mapping[str, int] | None, change: str
    ) -> None:
        discarded = tokens or {}
        unknown = set(discarded) - {row["group_id"] for row in rows}
        if unknown:
            raise LedgerError(f"discarded_tokens names {sorted(unknown)[:3]}, which this call does not.")
        db.executemany(
            f"UPDATE groups SET {change}, discarded_tokens = discarded_tokens + ? WHERE seq = ?",
            [(discarded.get(row["group_id"], 0), row["seq"]) for row in rows],
        )

    def _add_version(self, db: sqlite3.Connection, version: WeightVersion, step: int, now: float) -> None:
        [newest] = db.execute("SELECT max(version) FROM weight_versions WHERE NOT rolled_back").fetchone()
        if newest is not None and version.version < newest:
            raise LedgerError(f"weight versions only grow: {newest} is published, got {version.version}. Roll back first.")
        db.execute(
            "INSERT INTO weight_versions (version, step, session, checksum, num_tensors, size_bytes, seconds, at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(version.version, step, self._session, version.checksum, version.num_tensors, version.size_bytes),
                *(to_json(version.seconds), now),
            ),
        )


def _first_known(db: sqlite3.Connection, groups: Sequence[PromptGroup]) -> str:
    seen: set[str] = set()
    for group in groups:
        if group.group_id in seen:
            return group.group_id
        seen.add(group.group_id)
    known = "SELECT 1 FROM groups WHERE group_id = ?"
    return next((g.group_id for g in groups if db.execute(known, (g.group_id,)).fetchone()), groups[0].group_id)
