"""Every transition, and none that would lose or double a group; what a resumed run gets back; who may write."""

import json
import os
import subprocess
import sys
import threading

import pytest

from helpers.ledger import finish_all, finished, issue, open_ledger, prompts, train_step
from skyrl_mega.data.ledger import Ledger
from skyrl_mega.data.ledger_reader import LedgerReader
from skyrl_mega.errors import DataError, LedgerError
from skyrl_mega.types import WeightVersion


@pytest.fixture
def ledger(tmp_path):
    with open_ledger(tmp_path) as opened:
        yield opened


def ids(groups):
    return [group.group_id for group in groups]


def test_a_group_goes_from_prompt_to_training(ledger):
    a, b, c = issue(ledger, 3)
    finish_all(ledger, [b, a])
    assert ledger.load([a, b]) == [finished(a), finished(b)]
    ledger.take(1, [b, a], 0)
    assert (ledger.counts().taken, ledger.counts().in_flight) == (2, 1)
    ledger.trained(1, WeightVersion(1, 3, 3000, "sum"))
    ledger.drop([c], "environment")
    counts = ledger.counts()
    assert (counts.issued, counts.in_flight, counts.finished, counts.taken, counts.trained, counts.dropped) == (3, 0, 0, 0, 2, 1)
    assert counts.dropped_by_reason == {"environment": 1}
    assert ledger.audit().findings == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ledger: ledger.finish(finished("g9")), "knows no such group; issue it first"),
        (lambda ledger: ledger.finish(finished("g1")), "'g1' can't finish: it is finished, and must be issued"),
        (lambda ledger: ledger.finish(finished("g0", samples=3)), "with 2 samples; it finishes .* and 3"),
        (lambda ledger: ledger.drop(["g2"], "late"), r"it is trained by step 1, and must be issued or finished"),
        (lambda ledger: ledger.drop(["g5"], "again"), r"it is dropped \(late\)"),
        (lambda ledger: ledger.drop(["g0"], " "), "a drop needs a reason"),
        (lambda ledger: ledger.drop(["g0", "g0"], "x"), "twice in one call"),
        (lambda ledger: ledger.drop(["g0"], "x", discarded_tokens={"g1": 3}), "discarded_tokens names"),
        (lambda ledger: ledger.take(2, ["g1", "g0"], 1), "'g0' can't be taken by step 2: it is issued"),
        (lambda ledger: ledger.take(2, ["g1", "g2"], 1), "'g2' can't be taken by step 2: it is trained by step 1"),
        (lambda ledger: ledger.take(2, ["g1", "g1"], 1), "twice"),
        (lambda ledger: ledger.take(2, ["g1"], 1), r"takes 2 groups \(trainer.prompts_per_step\); got 1"),
        (lambda ledger: ledger.take(3, ["g1", "g4"], 1), "2 is next, got 3"),
        (lambda ledger: ledger.take(1, ["g1", "g4"], 1), "2 is next, got 1"),
        (lambda ledger: ledger.take(2, ["g1", "g4"], 3), r"staleness 3 is outside 0\.\.2 \(trainer.max_staleness\)"),
        (lambda ledger: ledger.take(2, ["g1", "g4"], -1), r"staleness -1 is outside"),
        (lambda ledger: ledger.trained(2), "no step is taken"),
        (lambda ledger: ledger.trained(1), "step 1 can't be trained"),
        (lambda ledger: ledger.issue(prompts(4, 2), policy_version=0, source_state={}), "group 'g4' is issued twice"),
        (lambda ledger: ledger.issue([prompts(8, 1)[0]] * 2, policy_version=0, source_state={}), "group 'g8' is issued twice"),
        (lambda ledger: ledger.issue(prompts(8, 1), policy_version=0, source_state={"x": float("nan")}), "plain JSON values"),
        (lambda ledger: ledger.weight_version(WeightVersion(0, 1, 1, "s"), 0), "1 is published, got 0"),
        (lambda ledger: ledger.checkpointed(2, 1), "a checkpoint is of a trained step"),
        (lambda ledger: ledger.checkpointed(1, 2), "the oldest kept no newer"),
        (lambda ledger: ledger.load(["g0"]), "is issued and has none"),
        (lambda ledger: ledger.load(["g9"]), "is unknown"),
    ],
)
def test_a_transition_that_would_lose_or_double_a_group_is_refused_and_changes_nothing(ledger, call, message):
    issue(ledger, 6)
    finish_all(ledger, ["g1", "g2", "g3", "g4"])
    train_step(ledger, 1, ["g2", "g3"])
    ledger.drop(["g5"], "late")
    before = ledger.counts(), ledger.next_seq
    with pytest.raises(LedgerError, match=message):
        call(ledger)
    assert (ledger.counts(), ledger.next_seq) == before
    assert ledger.audit().findings == []


def test_a_group_that_breaks_its_format_is_refused(ledger):
    issue(ledger, 1)
    with pytest.raises(DataError, match="sampled none"):
        ledger.finish(finished("g0", length=0))
    assert ledger.counts().in_flight == 1


def test_an_early_stop_is_counted_and_the_group_begun_again(ledger):
    [a] = issue(ledger, 1)
    ledger.early_stop([a], discarded_tokens={a: 40})
    ledger.early_stop([a])
    assert (ledger.counts().early_stops, ledger.counts().in_flight) == (2, 1)
    ledger.finish(finished(a))
    assert ledger.audit().findings == []


# ---- resuming -------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_takes_again_what_the_lost_steps_took(tmp_path):
    with open_ledger(tmp_path, max_staleness=3) as ledger:
        issue(ledger, 10)
        finish_all(ledger, [f"g{n}" for n in range(8)])
        train_step(ledger, 1, ["g1", "g0"])
        train_step(ledger, 2, ["g5", "g2"])
        ledger.take(3, ["g4", "g3"], 2)
    with open_ledger(tmp_path, max_staleness=3) as ledger:
        resumption = ledger.rollback(1)
        assert {step: ids(groups) for step, groups in resumption.replay.items()} == {2: ["g5", "g2"], 3: ["g4", "g3"]}
        assert ids(resumption.waiting) == ["g6", "g7"]
        assert resumption.unfinished == prompts(8, 2)
        assert (resumption.prompt_source, resumption.next_seq, resumption.rolled_back) == ({"index": 10}, 10, 4)
        assert ledger.load(["g5"]) == [finished("g5")]
        assert ledger.rollback(1).rolled_back == 0, "a second time changes nothing"
        with pytest.raises(LedgerError, match=r"must take again the 2 groups that it had, in their order \(g5, g2"):
            ledger.take(2, ["g6", "g7"], 1)
        with pytest.raises(LedgerError, match="in their order"):
            ledger.take(2, ["g2", "g5"], 1)
        train_step(ledger, 2, ["g5", "g2"])
        train_step(ledger, 3, ["g4", "g3"])
        train_step(ledger, 4, ["g6", "g7"])
        assert ledger.counts().trained == 8
        assert ledger.audit().findings == []


def test_a_coordinator_that_replaces_a_dead_one_undoes_nothing(tmp_path):
    with open_ledger(tmp_path) as ledger:
        issue(ledger, 9)
        finish_all(ledger, [f"g{n}" for n in range(7)])
        for step in (1, 2):
            train_step(ledger, step, [f"g{2 * step - 2}", f"g{2 * step - 1}"])
        ledger.rollback(1)
        train_step(ledger, 2, ["g2", "g3"])
        ledger.take(3, ["g5", "g4"], 2)
    with open_ledger(tmp_path) as ledger:
        found = ledger.resumption()
        assert (found.step, ids(found.taken[3]), found.replay, ids(found.waiting)) == (2, ["g5", "g4"], {}, ["g6"])
        assert (found.unfinished, found.next_seq, found.rolled_back) == (prompts(7, 2), 9, 0)
        assert ledger.load(ids(found.taken[3])) == [finished("g5"), finished("g4")]
        ledger.trained(3)  # the trainer had the groups all the time
        assert ledger.resumption().taken == {}
        assert ledger.audit().findings == []


def test_a_run_resumed_twice_still_repeats_every_step(tmp_path):
    with open_ledger(tmp_path) as ledger:
        finish_all(ledger, issue(ledger, 6))
        for step, groups in enumerate((["g0", "g1"], ["g2", "g3"], ["g4", "g5"]), start=1):
            train_step(ledger, step, groups)
    with open_ledger(tmp_path) as ledger:
        ledger.rollback(0)
        train_step(ledger, 1, ["g0", "g1"])
    with open_ledger(tmp_path) as ledger:
        replay = ledger.rollback(0).replay
        assert [ids(replay[step]) for step in (1, 2, 3)] == [["g0", "g1"], ["g2", "g3"], ["g4", "g5"]]
        assert ledger.audit().findings == []


def test_a_group_of_a_step_to_repeat_can_be_dropped_and_another_takes_its_place(tmp_path):
    with open_ledger(tmp_path) as ledger:
        finish_all(ledger, issue(ledger, 6))
        train_step(ledger, 1, ["g0", "g1"])
        train_step(ledger, 2, ["g2", "g3"])
        ledger.rollback(0)
        ledger.drop(["g0"], "damaged")
        with pytest.raises(LedgerError, match="'g2' belongs to step 2"):
            ledger.take(1, ["g1", "g2"], 0)
        ledger.take(1, ["g1", "g4"], 0)
        ledger.trained(1)
        assert ledger.audit().findings == []


def test_steps_to_repeat_keep_their_size_and_bound_when_the_settings_change(tmp_path):
    with open_ledger(tmp_path, max_staleness=2) as ledger:
        issue(ledger, 9)
        finish_all(ledger, [f"g{n}" for n in range(9)])
        for step in (1, 2, 3):
            train_step(ledger, step, [f"g{2 * step - 2}", f"g{2 * step - 1}"])
    with open_ledger(tmp_path, prompts_per_step=3, max_staleness=1) as ledger:
        ledger.rollback(2)
        ledger.take(3, ["g4", "g5"], 2)  # staleness 2, as it was allowed then
        ledger.trained(3)
        with pytest.raises(LedgerError, match=r"outside 0\.\.1"):
            ledger.take(4, ["g6", "g7", "g8"], 3)
        assert ledger.audit().findings == []


def test_what_no_resume_can_need_is_cleared(tmp_path):
    with open_ledger(tmp_path) as ledger:
        finish_all(ledger, issue(ledger, 6))
        for step in (1, 2, 3):
            train_step(ledger, step, [f"g{2 * step - 2}", f"g{2 * step - 1}"])
        ledger.checkpointed(3, oldest_kept_step=2)
        ledger.checkpointed(3, oldest_kept_step=1)  # an older one does not come back
        with pytest.raises(LedgerError, match="is trained and has none"):
            ledger.load(["g3"])
        assert ledger.load(["g4"]) == [finished("g4")]
        assert ledger.audit().findings == []
        with pytest.raises(LedgerError, match=r"checkpoint is of step 1, .* no longer holds what steps up to 2"):
            ledger.rollback(1)
        assert list(ledger.rollback(2).replay) == [3]


def test_a_ledger_behind_its_checkpoint_is_refused(tmp_path):
    with open_ledger(tmp_path) as ledger:
        finish_all(ledger, issue(ledger, 2))
        train_step(ledger, 1, ["g0", "g1"])
        with pytest.raises(LedgerError, match=r"the checkpoint is of step 4, .* knows trained steps up to 1"):
            ledger.rollback(4)


def test_a_new_ledger_may_begin_at_a_checkpoint_from_before_there_were_ledgers(tmp_path):
    with open_ledger(tmp_path) as ledger:
        assert ledger.rollback(50).prompt_source is None
        finish_all(ledger, issue(ledger, 2, version=50), version=50)
        ledger.take(51, ["g0", "g1"], 50)
        ledger.trained(51)
        assert ledger.audit(metrics_steps=range(52)).findings == []


def test_versions_that_a_rollback_undid_may_come_again(tmp_path):
    with open_ledger(tmp_path) as ledger:
        finish_all(ledger, issue(ledger, 4))
        train_step(ledger, 1, ["g0", "g1"])
        train_step(ledger, 2, ["g2", "g3"])
    with open_ledger(tmp_path) as ledger:
        ledger.rollback(1)
        ledger.weight_version(WeightVersion(1, 3, 3000, "sum1"), 1)
        ledger.take(2, ["g2", "g3"], 1)
        ledger.trained(2, WeightVersion(2, 3, 3000, "another"))
        assert ledger.audit().findings == []


# ---- groups trained again -------------------------------------------------------------------------------------------------


def three_steps(ledger) -> None:
    finish_all(ledger, issue(ledger, 10))
    for step in (1, 2, 3):
        train_step(ledger, step, [f"g{2 * step - 2}", f"g{2 * step - 1}"])


def test_a_replay_is_counted_apart_and_leaves_its_group_trained_once(tmp_path):
    with open_ledger(tmp_path, max_staleness=9, replay_max_age=2) as ledger:
        three_steps(ledger)
        assert ledger.replayable(4) == ["g2", "g3", "g4", "g5"], "trained by steps 2 and 3"
        ledger.take(4, ["g6", "g7"], 3, replayed=["g4", "g2"])
        ledger.trained(4)
        ledger.take(5, ["g8", "g9"], 4, replayed=["g4"])
        assert (ledger.counts().trained, ledger.counts().taken, ledger.counts().replayed) == (8, 2, 3)
        assert ledger.audit().findings == []


@pytest.mark.parametrize(
    ("replayed", "message"),
    [
        (["g0"], r"'g0' can't be replayed by step 4: it must have been trained by the 2 steps before"),
        (["g2", "g2"], "'g2' can't be replayed by step 4: .* at most once in a step"),
        (["g6"], "'g6' can't be replayed"),
        (["g8"], "'g8' can't be replayed"),
        (["g77"], "'g77' can't be replayed"),
    ],
)
def test_a_replay_of_a_group_not_lately_trained_is_refused_with_its_step(tmp_path, replayed, message):
    with open_ledger(tmp_path, max_staleness=9, replay_max_age=2) as ledger:
        three_steps(ledger)
        before = ledger.counts()
        with pytest.raises(LedgerError, match=message):
            ledger.take(4, ["g6", "g7"], 3, replayed=replayed)
        assert ledger.counts() == before
        assert ledger.audit().findings == []


def test_steps_to_repeat_take_their_replays_back_and_may_choose_the_same(tmp_path):
    with open_ledger(tmp_path, max_staleness=9, replay_max_age=2) as ledger:
        three_steps(ledger)
        ledger.take(4, ["g6", "g7"], 3, replayed=["g4", "g2"])
        ledger.trained(4)
    with open_ledger(tmp_path, max_staleness=9, replay_max_age=2) as ledger:
        ledger.rollback(2)
        assert (ledger.counts().replayed, ledger.replayable(3)) == (0, ["g0", "g1", "g2", "g3"])
        assert ledger.audit().findings == []
        ledger.take(3, ["g4", "g5"], 2, replayed=["g0"])
        ledger.trained(3)
        assert ledger.replayable(4) == ["g2", "g3", "g4", "g5"]
        ledger.take(4, ["g6", "g7"], 3, replayed=["g4", "g2"])
        assert ledger.counts().replayed == 3
        assert ledger.audit().findings == []


def test_trajectories_are_kept_for_as_long_as_a_resumed_run_may_replay_them(tmp_path):
    with open_ledger(tmp_path, max_staleness=9, replay_max_age=2) as ledger:
        three_steps(ledger)
        ledger.checkpointed(3, oldest_kept_step=3)
        assert ledger.audit().findings == []
        with pytest.raises(LedgerError, match="'g1' were asked for, which is trained and has none"):
            ledger.load(["g1"])
    with open_ledger(tmp_path, max_staleness=9, replay_max_age=2) as ledger:
        ledger.rollback(3)
        kept = ledger.replayable(4)
        assert [group.group_id for group in ledger.load(kept)] == kept == ["g2", "g3", "g4", "g5"]
        with pytest.raises(LedgerError, match="no longer holds what steps up to 3"):
            ledger.rollback(2)


def test_replay_that_begins_in_a_resumed_run_takes_what_the_ledger_still_has(tmp_path):
    with open_ledger(tmp_path, max_staleness=9) as ledger:
        three_steps(ledger)
        ledger.checkpointed(3, oldest_kept_step=2)
    with open_ledger(tmp_path, max_staleness=9, replay_max_age=5) as ledger:
        ledger.rollback(3)
        assert ledger.replayable(4) == ["g4", "g5"]
        ledger.checkpointed(3, oldest_kept_step=3)
        assert ledger.replayable(4) == ["g4", "g5"]
        assert ledger.audit().findings == []


def test_a_ledger_of_the_schema_before_is_read_as_it_is_and_upgraded_by_its_next_writer(tmp_path):
    with open_ledger(tmp_path, max_staleness=9) as ledger:
        three_steps(ledger)
        with ledger.file.transaction() as db:
            db.execute("DROP TABLE replays")
            db.execute("PRAGMA user_version=1")
    content = (tmp_path / "ledger.sqlite").read_bytes()
    with LedgerReader.open_read_only(tmp_path / "ledger.sqlite") as reader:
        assert (reader.counts().trained, reader.counts().replayed, reader.audit().findings) == (6, 0, [])
    assert (tmp_path / "ledger.sqlite").read_bytes() == content
    with open_ledger(tmp_path, max_staleness=9, replay_max_age=2) as ledger:
        ledger.take(4, ["g6", "g7"], 3, replayed=["g4"])
        assert ledger.audit().findings == []


# ---- one writer, many readers ---------------------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_the_first_is(tmp_path, monkeypatch):
    monkeypatch.setattr("skyrl_mega.data.ledger_file._LOCK_PATIENCE_S", 0.1)
    with open_ledger(tmp_path), pytest.raises(LedgerError, match="already open for writing in this process"):
        open_ledger(tmp_path)
    program = (
        "import sys, pathlib; from helpers.ledger import open_ledger\n"
        "ledger = open_ledger(pathlib.Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(LedgerError, match=rf"has one writer, and that is process {child.pid} on {os.uname().nodename}"):
            open_ledger(tmp_path)
        with LedgerReader.open_read_only(tmp_path / "ledger.sqlite") as reader:
            assert reader.audit().passed
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    open_ledger(tmp_path).close()  # the lock died with its process


def test_asking_who_writes_does_not_end_the_writers_lock(tmp_path):
    """POSIX drops a process's lock when it closes any descriptor of the file, so another name of the file is a trap."""
    real, other = tmp_path / "real", tmp_path / "other"
    real.mkdir()
    other.symlink_to(real)
    with open_ledger(real):
        LedgerReader.open_read_only(other / "ledger.sqlite").close()
        code = (
            "import fcntl, sys\nfile = open(sys.argv[1], 'r+')\n"
            "try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept BlockingIOError: print('held')"
        )
        done = subprocess.run([sys.executable, "-c", code, str(real / "ledger.sqlite.lock")], capture_output=True, text=True)
        assert done.stdout == "held\n"


def test_a_directory_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"can't be written: .* See that the disk has space"):
        open_ledger(tmp_path / "file")


def test_a_reader_on_another_machine_is_refused_while_the_run_writes(tmp_path, monkeypatch):
    owner = {"pid": 12, "host": "node7", "since": 0.0}
    open_ledger(tmp_path).close()
    monkeypatch.setattr("skyrl_mega.data.ledger_file.writer_of", lambda path: owner)
    with pytest.raises(LedgerError, match=r"is being written on node7 \(process 12\)"):
        LedgerReader.open_read_only(tmp_path / "ledger.sqlite")


def test_an_audit_sees_one_state_while_another_thread_writes(tmp_path):
    with open_ledger(tmp_path) as ledger:
        stop, audits = threading.Event(), []

        def watch():
            with LedgerReader.open_read_only(tmp_path / "ledger.sqlite") as reader:
                while not stop.is_set() or not audits:
                    audits.append(reader.audit().findings)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for step in range(1, 40):
                groups = issue(ledger, 2, version=step - 1)
                finish_all(ledger, groups, version=step - 1)
                train_step(ledger, step, groups)
        finally:
            stop.set()
            watcher.join(60)
        assert audits
        assert not any(audits)


def test_a_run_of_another_identity_is_refused(tmp_path):
    open_ledger(tmp_path, identity={"seed": 7, "task": "arithmetic"}).close()
    with pytest.raises(LedgerError, match=r"its seed is 7, here it is 8\. Go on with the settings of that run"):
        open_ledger(tmp_path, identity={"seed": 8, "task": "arithmetic"})
    open_ledger(tmp_path, identity={"seed": 7, "task": "arithmetic"}).close()


def test_a_ledger_that_is_not_there_or_is_no_ledger_is_named(tmp_path):
    with pytest.raises(LedgerError, match="there is no ledger at"):
        LedgerReader.open_read_only(tmp_path / "ledger.sqlite")
    import sqlite3

    with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
        connection.execute("CREATE TABLE other (x)")
    connection.close()
    with pytest.raises(LedgerError, match="no ledger of skyrl_mega"):
        open_ledger(tmp_path)
    Ledger.open(tmp_path / "fresh.sqlite", identity={}, prompts_per_step=1, max_staleness=0).close()
    with sqlite3.connect(tmp_path / "fresh.sqlite") as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(LedgerError, match="has schema 99, and this program reads 2"):
        LedgerReader.open_read_only(tmp_path / "fresh.sqlite")


def test_opening_or_reading_a_ledger_loads_nothing_heavy():
    code = (
        "import sys, skyrl_mega.data.ledger, skyrl_mega.data.ledger_audit, skyrl_mega.data.ledger_summary\n"
        "print(sorted({'torch', 'vllm', 'ray', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == []
