"""The audit finds whatever contradicts itself, and the summary counts what is there."""

import pytest

from helpers.ledger import finish_all, finished, issue, open_ledger, train_step
from skyrl_mega.data.ledger_summary import life, summarize
from skyrl_mega.errors import LedgerError
from skyrl_mega.types import TrainState, WeightVersion


@pytest.fixture
def ledger(tmp_path):
    """g0..g3 trained by steps 1 and 2, g4 finished, g5 dropped, g6 begun again, g7 in flight."""
    with open_ledger(tmp_path) as opened:
        issue(opened, 8)
        finish_all(opened, ["g0", "g1", "g2", "g3", "g4"])
        train_step(opened, 1, ["g0", "g1"])
        train_step(opened, 2, ["g3", "g2"])
        opened.drop(["g5"], "environment")
        opened.early_stop(["g6"], discarded_tokens={"g6": 12})
        assert opened.audit().findings == []
        yield opened


@pytest.mark.parametrize(
    ("tampering", "told"),
    [
        ("DELETE FROM groups WHERE seq = 7", "7 groups, the last is 6, and 8 were issued"),
        ("UPDATE groups SET state = 'finished', step = NULL WHERE seq = 0", "step 1 is trained with 1 of 2 groups"),
        ("UPDATE groups SET state = 'trained' WHERE seq = 4", "group g4 is trained by step None, which is unknown"),
        ("UPDATE groups SET state = 'trained' WHERE seq = 4", "group 4 is trained (step None, early stops 0), its events say"),
        ("INSERT INTO events (seq, kind, step, at) VALUES (0, 'trained', 2, 0)", "group 0 was trained when it was trained"),
        ("INSERT INTO events (seq, kind, at) VALUES (50, 'issued', 0)", "1 groups have events and no row, as 50"),
        ("UPDATE groups SET position = 7 WHERE seq = 2", "step 2 is trained with 2 of 2 groups in 2 places"),
        ("UPDATE steps SET num_groups = 3 WHERE step = 2", "step 2 is trained with 2 of 3 groups in 2 places"),
        ("UPDATE steps SET state = 'rolled_back' WHERE step = 1", "step 2 where 1 should be"),
        ("UPDATE steps SET state = 'taken' WHERE step = 1", "step 2 is trained and the one before it is not"),
        ("UPDATE groups SET staleness = 0 WHERE seq = 2", "g2 in step 2: staleness 0 recorded, 1 by its versions, 2 allowed"),
        ("UPDATE steps SET max_staleness = 0 WHERE step = 2", "g3 in step 2: staleness 1 recorded, 1 by its versions, 0 allowed"),
        ("DELETE FROM content WHERE seq = 4", "the trajectories of group g4 are missing"),
        ("INSERT INTO content VALUES (7, x'00')", "group g7 is issued and has trajectories"),
        ("UPDATE content SET trajectories = substr(trajectories, 1, 40) WHERE seq = 1", "group g1 are damaged: its checksum"),
        ("UPDATE groups SET payload = '{\"a' WHERE seq = 7", "the payload of group g7 is missing or no JSON"),
        ("UPDATE groups SET payload = NULL WHERE seq = 6", "the payload of group g6 is missing or no JSON"),
        ("UPDATE groups SET reason = '' WHERE seq = 5", "group g5"),
        ("UPDATE groups SET early_stops = 3 WHERE seq = 6", "the groups have 3, and 1 were made"),
        ("INSERT INTO weight_versions VALUES (9, 1, 1, 1, 'other', 3, 3, '{}', 0, 0)", "version 1 was published after 2"),
        ("INSERT INTO weight_versions VALUES (9, 2, 2, 1, 'other', 3, 3, '{}', 0, 0)", "version 2 was published as sum2 and as"),
    ],
)  # fmt: skip
def test_whatever_does_not_add_up_is_found(ledger, tampering, told):
    with ledger.file.transaction() as db:
        db.execute("PRAGMA foreign_keys=OFF")
        db.execute(tampering)
    problems = [finding.problem for finding in ledger.audit().findings]
    assert any(told in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("tampering", "told"),
    [
        (
            "UPDATE replays SET age = 2",
            "group g0 is trained by step 1 and replayed by step 2 (trained) at an age of 2, 3 allowed",
        ),
        ("UPDATE replays SET max_age = 0", "at an age of 1, 0 allowed"),
        ("UPDATE replays SET step = 9", "group g0 is trained by step 1 and replayed by step 9 (unknown) at an age of 1"),
        ("UPDATE replays SET seq = 4", "group g4 is finished by step None and replayed by step 2"),
        ("INSERT INTO replays VALUES (2, 1, 1, 3)", "group 1 has 1 replays by step 2, its events say 0"),
        ("DELETE FROM replays", "group 0 has 0 replays by step 2, its events say 1"),
        ("INSERT INTO events (seq, kind, step, at) VALUES (4, 'replayed', 2, 0)", "group 4 was replayed when it was finished"),
    ],
)
def test_replays_that_do_not_add_up_are_found(tmp_path, tampering, told):
    with open_ledger(tmp_path, replay_max_age=3) as ledger:
        issue(ledger, 5)
        finish_all(ledger, ["g0", "g1", "g2", "g3", "g4"])
        train_step(ledger, 1, ["g0", "g1"])
        ledger.take(2, ["g2", "g3"], 1, replayed=["g0"])
        ledger.trained(2)
        assert ledger.audit().findings == []
        assert [(step.step, step.replayed) for step in summarize(ledger.file).steps] == [(1, 0), (2, 1)]
        assert [event.kind for event in life(ledger.file, "g0")[1]] == ["issued", "finished", "taken", "trained", "replayed"]
        with ledger.file.transaction() as db:
            db.execute("PRAGMA foreign_keys=OFF")
            db.execute(tampering)
        problems = [finding.problem for finding in ledger.audit().findings]
        assert any(told in problem for problem in problems), problems


def test_many_contradictions_of_one_kind_are_counted(ledger):
    with ledger.file.transaction() as db:
        db.execute("UPDATE groups SET reason = 'none'")
    findings = [f.problem for f in ledger.audit().findings if f.check == "No group was dropped without a reason"]
    assert len(findings) == 6
    assert findings[-1] == "and 2 more"


@pytest.mark.parametrize(
    ("metrics_steps", "problem"),
    [
        ([0, 1, 2], None),
        ([0, 1], None),  # killed between the ledger and the line
        ([0, 1, 2, 3], None),  # or the other way round
        ([0, 2], "1 step is trained and without a line: 1"),
        ([0, 1, 2, 3, 4], "1 step is told and not trained: 4"),
    ],
)
def test_metrics_must_tell_of_the_trained_steps(ledger, metrics_steps, problem):
    assert [f.problem for f in ledger.audit(metrics_steps=metrics_steps).findings] == ([problem] if problem else [])


@pytest.mark.parametrize(
    ("step", "num_trained", "problem"),
    [
        (2, 4, None),
        (1, 2, None),
        (1, 3, "it counts 3 groups up to step 1, the ledger 2"),
        (3, 4, "it is of step 3, and the last trained step is 2"),
    ],
)
def test_the_checkpoint_must_have_counted_the_same_groups(ledger, step, num_trained, problem):
    state = TrainState(step, step, {}, num_trained_groups=num_trained, num_optimizer_steps=step)
    assert [f.problem for f in ledger.audit(checkpoint=state).findings] == ([problem] if problem else [])


def test_the_summary_counts_staleness_lengths_and_steps(ledger):
    ledger.finish(finished("g6", length=9))
    ledger.weight_version(WeightVersion(2, 3, 3000, "sum2"), 2)
    ledger.rollback(1)
    summary = summarize(ledger.file)
    assert (summary.counts.trained, summary.counts.finished, summary.counts.early_stops) == (2, 4, 1)
    assert (summary.last_trained_step, summary.last_taken_step, summary.steps_repeated) == (1, 1, 0)
    assert summary.staleness == {0: 2}
    trained, again, dropped = (summary.lengths[fate] for fate in ("trained", "begun again", "dropped"))
    assert (trained.groups, trained.mean_response, trained.longest_response) == (2, 3.0, 3)
    assert (again.groups, again.mean_response, again.longest_response, again.discarded_tokens) == (1, 9.0, 9, 12)
    assert (dropped.groups, dropped.finished, dropped.mean_response) == (1, 0, None)
    assert [(step.step, step.state, step.groups, step.response_tokens) for step in summary.steps] == [(1, "trained", 2, 12)]
    assert [(v.version, v.rolled_back) for v in summary.versions] == [(1, False), (2, True), (2, True)]


def test_a_group_has_a_life(ledger):
    ledger.rollback(1)
    row, events = life(ledger.file, "g2")
    assert (row["state"], row["step"], row["prompt_id"]) == ("finished", 2, "p2")
    assert [(event.kind, event.step) for event in events] == [
        ("issued", None),
        ("finished", None),
        ("taken", 2),
        ("trained", 2),
        ("rolled_back", 1),
    ]
    with pytest.raises(LedgerError, match="knows no group 'g99'; the last one issued is 'g7'"):
        life(ledger.file, "g99")
