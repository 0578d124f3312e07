"""Does the ledger add up? Each check is a sentence that must hold, and a function that yields what contradicts it.

The rows are counted against the events, which only ever grow: a group's row says what it is, its events how it came to that. All
checks but the first see one state of the file, also while a run writes it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from skyrl_mega.data.ledger_file import LedgerFile
from skyrl_mega.data.ledger_reader import last_step, read_meta
from skyrl_mega.data.ledger_replay import content_cleared_step
from skyrl_mega.data.trajectory_codec import check_encoded
from skyrl_mega.types import TrainState

#: Contradictions told of one check; the others are counted.
_MOST_TOLD = 5

#: What an event makes of a group in a state; every other pair is a contradiction.
_TRANSITIONS = {
    ("", "issued"): "issued",
    ("issued", "early_stopped"): "issued",
    ("finished", "early_stopped"): "issued",
    ("issued", "finished"): "finished",
    ("issued", "dropped"): "dropped",
    ("finished", "dropped"): "dropped",
    ("finished", "taken"): "taken",
    ("trained", "replayed"): "trained",
    ("trained", "replay_undone"): "trained",
    ("taken", "trained"): "trained",
    ("taken", "rolled_back"): "finished",
    ("trained", "rolled_back"): "finished",
}


@dataclass(frozen=True)
class Finding:
    """A sentence that does not hold, and what contradicts it."""

    check: str
    problem: str


@dataclass(frozen=True)
class Audit:
    """`checks`: the sentences that were checked. The ledger adds up where `findings` is empty."""

    checks: list[str]
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return not self.findings


@dataclass(frozen=True)
class _Facts:
    db: sqlite3.Connection
    base_step: int
    content_cleared_step: int
    last_trained: int
    metrics_steps: Sequence[int] | None
    checkpoint: TrainState | None


_Check = Callable[[_Facts], Iterator[str]]
_CHECKS: list[tuple[str, _Check]] = []


def _check(sentence: str) -> Callable[[_Check], _Check]:
    def register(function: _Check) -> _Check:
        _CHECKS.append((sentence, function))
        return function

    return register


def audit(file: LedgerFile, *, metrics_steps: Sequence[int] | None = None, checkpoint: TrainState | None = None) -> Audit:
    """Every check on the ledger, and on what is given of the run beside it; reads all of the file.

    `metrics_steps`: the steps that metrics.jsonl has; `checkpoint`: the state in the newest checkpoint. Read them first.
    """
    structure = "The file's structure is whole"
    findings = [Finding(structure, problem) for problem in file.damage()[:_MOST_TOLD]]
    checks = [structure]
    with file.snapshot() as db:
        facts = _Facts(
            db,
            base_step=int(read_meta(db, "base_step", 0)),
            content_cleared_step=content_cleared_step(db),
            last_trained=last_step(db, trained=True),
            metrics_steps=metrics_steps,
            checkpoint=checkpoint,
        )
        for sentence, function in _CHECKS:
            checks.append(sentence)
            problems = list(function(facts))
            findings += [Finding(sentence, problem) for problem in problems[:_MOST_TOLD]]
            if len(problems) > _MOST_TOLD:
                findings.append(Finding(sentence, f"and {len(problems) - _MOST_TOLD} more"))
    return Audit(checks, findings)


@_check("Groups are numbered 0, 1, 2 ... and are as many as were issued")
def _numbers(facts: _Facts) -> Iterator[str]:
    count, largest = facts.db.execute("SELECT count(*), coalesce(max(seq), -1) FROM groups").fetchone()
    recorded = int(read_meta(facts.db, "next_seq", 0))
    if not count == largest + 1 == recorded:
        yield f"{count} groups, the last is {largest}, and {recorded} were issued"


@_check("Every group's events lead to the state that its row has")
def _events(facts: _Facts) -> Iterator[str]:
    states: dict[int, tuple[str, int | None, int]] = {}  # seq -> state, step, early stops
    for seq, kind, step in facts.db.execute("SELECT seq, kind, step FROM events ORDER BY id"):
        state, old_step, stops = states.get(seq, ("", None, 0))
        new = _TRANSITIONS.get((state, kind))
        if new is None:
            yield f"group {seq} was {kind} when it was {state or 'not issued'}"
            continue
        states[seq] = new, step if kind == "taken" else old_step, stops + (kind == "early_stopped")
    for seq, *row in facts.db.execute("SELECT seq, state, step, early_stops FROM groups ORDER BY seq"):
        state, step, stops = states.pop(seq, ("", None, 0))
        if [state, None if state == "dropped" else step, stops] != row:
            yield f"group {seq} is {row[0]} (step {row[1]}, early stops {row[2]}), its events say {state} ({step}, {stops})"
    if states:
        yield f"{len(states)} groups have events and no row, as {min(states)}"


@_check("A taken or trained group is in a step of that state, and every such step has all its groups, each place once")
def _steps_are_full(facts: _Facts) -> Iterator[str]:
    query = (
        "SELECT s.step, s.state, s.num_groups, count(g.seq), count(DISTINCT g.position), coalesce(max(g.position), -1)"
        " FROM steps s LEFT JOIN groups g ON g.step = s.step AND g.state = s.state WHERE s.state != 'rolled_back' GROUP BY s.step"
    )
    for step, state, wanted, count, places, last_place in facts.db.execute(query):
        if not wanted == count == places == last_place + 1:
            yield f"step {step} is {state} with {count} of {wanted} groups in {places} places"
    query = (
        "SELECT g.group_id, g.state, g.step, s.state FROM groups g LEFT JOIN steps s USING (step)"
        " WHERE g.state IN ('taken', 'trained') AND s.state IS NOT g.state"
    )
    for group_id, state, step, step_state in facts.db.execute(query):
        yield f"group {group_id} is {state} by step {step}, which is {step_state or 'unknown'}"


@_check("Steps follow each other, and none is trained before the one before it")
def _steps_follow(facts: _Facts) -> Iterator[str]:
    expected, trained = facts.base_step + 1, True
    for step, state in facts.db.execute("SELECT step, state FROM steps WHERE state != 'rolled_back' ORDER BY step"):
        if step != expected:
            yield f"step {step} where {expected} should be"
        if state == "trained" and not trained:
            yield f"step {step} is trained and the one before it is not"
        expected, trained = step + 1, state == "trained"


@_check("No group was staler than its step allowed")
def _staleness(facts: _Facts) -> Iterator[str]:
    query = (
        "SELECT g.group_id, g.step, g.staleness, s.policy_version - g.min_version, s.max_staleness FROM groups g"
        " JOIN steps s USING (step) WHERE g.state IN ('taken', 'trained')"
        " AND (g.staleness IS NOT s.policy_version - g.min_version OR g.staleness NOT BETWEEN 0 AND s.max_staleness)"
    )
    for group_id, step, recorded, counted, bound in facts.db.execute(query):
        yield f"group {group_id} in step {step}: staleness {recorded} recorded, {counted} by its versions, {bound} allowed"


@_check("Every group that was, or may be, trained has its trajectories undamaged, and no other group has any")
def _content(facts: _Facts) -> Iterator[str]:
    needed = f"(state IN ('finished', 'taken') OR (state = 'trained' AND step > {facts.content_cleared_step}))"
    query = f"SELECT group_id FROM groups LEFT JOIN content USING (seq) WHERE {needed} AND content.seq IS NULL"
    for (group_id,) in facts.db.execute(query):
        yield f"the trajectories of group {group_id} are missing"
    query = f"SELECT content.seq, group_id, state, {needed}, trajectories FROM content LEFT JOIN groups USING (seq)"
    for seq, group_id, state, is_needed, content in facts.db.execute(query):
        if not is_needed:
            yield f"group {group_id or seq} is {state or 'unknown'} and has trajectories"
        elif problem := check_encoded(content):
            yield f"the trajectories of group {group_id} are damaged: {problem}"


@_check("Every group that may be begun again has its payload")
def _payloads(facts: _Facts) -> Iterator[str]:
    for (group_id,) in facts.db.execute("SELECT group_id FROM groups WHERE state = 'issued' AND NOT json_valid(payload)"):
        yield f"the payload of group {group_id} is missing or no JSON"


@_check("No group was dropped without a reason")
def _reasons(facts: _Facts) -> Iterator[str]:
    for (group_id,) in facts.db.execute("SELECT group_id FROM groups WHERE (state = 'dropped') != (reason != '')"):
        yield f"group {group_id}"


@_check("A group was replayed only by steps soon after the one that trained it, once by each, as its events say")
def _replays(facts: _Facts) -> Iterator[str]:
    query = (
        "SELECT g.group_id, g.state, g.step, r.step, s.state, r.age, r.max_age FROM replays r JOIN groups g USING (seq)"
        " LEFT JOIN steps s ON s.step = r.step WHERE g.state != 'trained' OR s.state NOT IN ('taken', 'trained')"
        " OR s.state IS NULL OR r.age IS NOT r.step - g.step OR r.age NOT BETWEEN 1 AND r.max_age"
    )
    for group_id, state, first, step, step_state, age, max_age in facts.db.execute(query):
        yield (
            f"group {group_id} is {state} by step {first} and replayed by step {step} ({step_state or 'unknown'}) at an age of "
            f"{age}, {max_age} allowed"
        )
    told: dict[tuple[int, int], int] = {}
    for seq, kind, step in facts.db.execute("SELECT seq, kind, step FROM events WHERE kind IN ('replayed', 'replay_undone')"):
        told[seq, step] = told.get((seq, step), 0) + (1 if kind == "replayed" else -1)
    recorded = dict.fromkeys(facts.db.execute("SELECT seq, step FROM replays"), 1)
    for seq, step in sorted(told.keys() | recorded.keys()):
        has, says = recorded.get((seq, step), 0), told.get((seq, step), 0)
        if has != says:
            yield f"group {seq} has {has} replays by step {step}, its events say {says}"


@_check("Early stops add up")
def _early_stops(facts: _Facts) -> Iterator[str]:
    [of_groups] = facts.db.execute("SELECT coalesce(sum(early_stops), 0) FROM groups").fetchone()
    recorded = int(read_meta(facts.db, "early_stops", 0))
    if of_groups != recorded:
        yield f"the groups have {of_groups}, and {recorded} were made"


@_check("Weight versions only grow, and within one session a version has one checksum")
def _versions(facts: _Facts) -> Iterator[str]:
    newest, checksums = -1, dict[tuple[int, int], str]()
    rows = facts.db.execute("SELECT version, session, checksum FROM weight_versions WHERE NOT rolled_back ORDER BY id")
    for version, session, checksum in rows:
        if version < newest:
            yield f"version {version} was published after {newest}"
        first = checksums.setdefault((session, version), checksum)
        if checksum != first:
            yield f"version {version} was published as {first} and as {checksum}"
        newest = max(newest, version)


@_check("metrics.jsonl has a line for every trained step, and none for another")
def _metrics(facts: _Facts) -> Iterator[str]:
    if facts.metrics_steps is None:
        return
    told = {step for step in facts.metrics_steps if step > facts.base_step}
    states = dict(facts.db.execute("SELECT step, state FROM steps").fetchall())
    # The line and the ledger are written one after the other: the last step may have only one of them.
    trained = {step for step, state in states.items() if state == "trained"}
    yield from _ranges("trained and without a line", trained - told - {facts.last_trained})
    known = trained | {step for step, state in states.items() if state == "rolled_back"} | {facts.last_trained + 1}
    yield from _ranges("told and not trained", told - known)


@_check("The newest checkpoint is of a trained step, and has counted the groups that were trained up to it")
def _checkpoint(facts: _Facts) -> Iterator[str]:
    state = facts.checkpoint
    if state is None or state.step < facts.base_step:
        return
    if state.step > facts.last_trained:
        yield f"it is of step {state.step}, and the last trained step is {facts.last_trained}"
    query = "SELECT count(*) FROM groups WHERE state = 'trained' AND step <= ?"
    [count] = facts.db.execute(query, (state.step,)).fetchone()
    if facts.base_step == 0 and count != state.num_trained_groups:
        yield f"it counts {state.num_trained_groups} groups up to step {state.step}, the ledger {count}"


def _ranges(what: str, steps: Iterable[int]) -> Iterator[str]:
    steps = sorted(steps)
    if steps:
        shown = ", ".join(map(str, steps[:8])) + (" ..." if len(steps) > 8 else "")
        yield f"{len(steps)} {'step is' if len(steps) == 1 else 'steps are'} {what}: {shown}"
