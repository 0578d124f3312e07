"""Killed anywhere, out of disk, or damaged: the ledger keeps every call that returned, and says what is wrong."""

import os
import random
import resource
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter

import pytest

from helpers.ledger import finish_all, finished, issue, open_ledger, prompts, train_step
from skyrl_mega.data.ledger_reader import LedgerReader
from skyrl_mega.data.sampling.replay import choose_replayed
from skyrl_mega.errors import LedgerError

KILLS = 30


def forked(work) -> int:
    """Runs `work` in a child process; its pid. The child never returns to the test."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001  (the exit code tells it)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def play(run_dir, calls_path, seed):
    """A run without end: resumes as a run does, and acknowledges every call that has returned with one line of `calls_path`."""
    rng = random.Random(seed)
    calls = os.open(calls_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def done(*words):
        os.write(calls, (" ".join(map(str, words)) + "\n").encode())

    ledger = open_ledger(run_dir, max_staleness=3, replay_max_age=3)
    with open(calls_path, encoding="utf-8") as file:
        checkpoint = max((int(line.split()[1]) for line in file if line.startswith("checkpointed")), default=0)
    resumption = ledger.rollback(checkpoint)
    step, replay = checkpoint, dict(resumption.replay)
    running = [group.group_id for group in resumption.unfinished]
    waiting = [group.group_id for group in resumption.waiting]
    while True:
        version = step
        if len(running) + len(waiting) < 6:
            first = ledger.next_seq
            ledger.issue(prompts(first, 3), policy_version=version, source_state={"index": first + 3})
            done("issued", first, first + 3)
            running += [f"g{n}" for n in range(first, first + 3)]
        # A group that is begun while lost steps are repeated would be stale before its turn comes.
        while running and not replay and (len(waiting) < 2 or rng.random() < 0.5):
            group_id = running.pop(rng.randrange(len(running)))
            choice = rng.random()
            if choice < 0.05:
                ledger.drop([group_id], "environment")
                done("dropped", group_id)
            elif choice < 0.15:
                ledger.early_stop([group_id], discarded_tokens={group_id: 5})
                running.append(group_id)
            else:
                ledger.finish(finished(group_id, version=version, length=rng.randrange(1, 40)))
                done("finished", group_id)
                waiting.append(group_id)
        if step + 1 in replay:
            taken = [group.group_id for group in replay.pop(step + 1)]
        elif len(waiting) >= 2:
            taken, waiting = waiting[:2], waiting[2:]
        else:
            continue
        step += 1
        replayed = choose_replayed(ledger.replayable(step), 2, updates=1, seed=0, step=step)
        assert len(ledger.load([*taken, *replayed])) == (4 if step > 1 else 2)
        train_step(ledger, step, taken, replayed=replayed)
        done("trained", step, *taken, *replayed)
        if step % 4 == 0:
            ledger.checkpointed(step, oldest_kept_step=step - 4)
            done("checkpointed", step)


def test_a_ledger_whose_making_was_cut_off_says_so_and_is_begun_by_the_next(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.touch()
    with pytest.raises(LedgerError, match="ended before its first entry"):
        LedgerReader.open_read_only(path)
    with open_ledger(tmp_path) as ledger:
        issue(ledger, 2)
        assert ledger.audit().findings == []


def num_lines(path) -> int:
    return path.read_text().count("\n") if path.is_file() else 0


def wait_for_lines(path, count) -> None:
    deadline = time.monotonic() + 60
    while num_lines(path) < count:
        assert time.monotonic() < deadline, f"fewer than {count} calls within 60 s"
        time.sleep(0.001)


def test_a_run_killed_at_random_moments_keeps_every_call_that_returned(tmp_path):
    rng = random.Random(1)
    calls_path = tmp_path / "calls"
    kills = Counter()
    for number in range(KILLS):
        pid = forked(lambda number=number: play(tmp_path, calls_path, number))
        # After so many more calls, however fast the machine is, and then at any moment of the next ones.
        wait_for_lines(calls_path, num_lines(calls_path) + rng.randrange(60) * (number > 2))
        time.sleep(rng.uniform(0.0, 0.01))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills[os.WTERMSIG(status)] += 1
        if num_lines(calls_path) > 0:  # else it was killed before its first entry
            with LedgerReader.open_read_only(tmp_path / "ledger.sqlite") as reader:
                assert reader.audit().findings == []
    assert kills == {signal.SIGKILL: KILLS}, "the run must be killed each time, not fail by itself"

    issued, checkpoint, ended, trained = 0, 0, {}, {}
    for line in calls_path.read_text().splitlines():
        kind, *words = line.split()
        if kind == "issued":
            assert int(words[0]) in (issued, issued + 3), "only the call that was cut off may be unacknowledged"
            issued = int(words[1])
        elif kind == "trained":
            step, groups = int(words[0]), words[1:]
            assert trained.setdefault(step, groups) == groups, "a repeated step trains, and replays, what it did before"
        elif kind == "checkpointed":
            checkpoint = int(words[0])
        else:
            assert words[0] not in ended, "nothing that was finished is generated again"
            ended[words[0]] = kind
    assert len(trained) > 100

    # Everything that returned is in the ledger; beyond it only the calls that were cut off, one a kill.
    with open_ledger(tmp_path, max_staleness=3, replay_max_age=3) as ledger:
        resumption = ledger.rollback(checkpoint)
        counts = resumption.counts
        assert ledger.audit().findings == []
        assert counts.issued - issued in (0, 3)
        assert resumption.prompt_source == {"index": counts.issued}
        assert counts.issued == counts.in_flight + counts.finished + counts.trained + counts.dropped
        with ledger.file.snapshot() as db:
            states = dict(db.execute("SELECT group_id, state FROM groups").fetchall())
            in_steps = db.execute("SELECT step, group_id FROM groups WHERE step IS NOT NULL ORDER BY step, position").fetchall()
        assert all((states[group_id] == "dropped") == (kind == "dropped") for group_id, kind in ended.items())
        assert all(states[group_id] != "issued" for group_id in ended)
        assert len({group_id for group_id, state in states.items() if state != "issued"} - ended.keys()) <= KILLS
        groups_of: dict[int, list[str]] = {}
        for step, group_id in in_steps:
            groups_of.setdefault(step, []).append(group_id)
        assert len(in_steps) == len({group_id for _, group_id in in_steps}), "no group is in two steps"
        assert list(groups_of) == list(range(1, len(groups_of) + 1)), "no step is missing"
        assert {step: groups for step, groups in groups_of.items() if step in trained} == {
            step: g[:2] for step, g in trained.items()
        }
        assert len(groups_of) - len(trained) <= 1
        assert list(resumption.replay) == list(range(checkpoint + 1, len(groups_of) + 1))
        assert counts.trained == 2 * checkpoint


# ---- disk full ------------------------------------------------------------------------------------------------------------


def limit_pages(ledger, *, extra):
    """SQLite answers growth beyond this as it answers a full disk."""
    with ledger.file.transaction() as db:
        [pages] = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count={pages + extra}")


def test_a_full_disk_is_named_and_the_ledger_stays_whole(tmp_path):
    with open_ledger(tmp_path) as ledger:
        groups = issue(ledger, 40)
        limit_pages(ledger, extra=4)
        with pytest.raises(LedgerError, match=r"the disk is full: .* Nothing of this call was written and the ledger is whole"):
            finish_all(ledger, groups, length=300)
        stored = len(groups) - ledger.counts().in_flight
        assert 0 < stored < 40
        assert ledger.counts().finished == stored
        assert ledger.audit().findings == []
        limit_pages(ledger, extra=1_000_000)
        finish_all(ledger, groups[stored:])  # there is space again: the same ledger goes on
        assert ledger.counts().finished == 40
        assert ledger.audit().findings == []


def test_a_write_that_the_system_refuses_is_named_and_the_ledger_stays_whole(tmp_path):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with open_ledger(tmp_path) as ledger:
            groups = issue(ledger, 30)
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
            try:
                for group_id in groups:
                    ledger.finish(finished(group_id, length=5000))
            except LedgerError as error:
                (tmp_path / "error").write_text(str(error))
            (tmp_path / "finished").write_text(str(ledger.counts().finished))

    _, status = os.waitpid(forked(work), 0)
    assert status == 0
    assert "can't be used: disk I/O error. Nothing of this call was written; see that the disk has space" in (
        (tmp_path / "error").read_text()
    )
    with open_ledger(tmp_path) as ledger:
        assert 0 < ledger.counts().finished == int((tmp_path / "finished").read_text()) < 30
        assert ledger.audit().findings == []


# ---- damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path):
    with open_ledger(tmp_path) as ledger:
        finish_all(ledger, issue(ledger, 50))
        train_step(ledger, 1, ["g0", "g1"])
    return tmp_path / "ledger.sqlite"


def test_a_file_that_is_no_database_is_named(filled):
    filled.write_bytes(b"not a database at all, but long enough" * 100)
    with pytest.raises(LedgerError, match=r"is damaged: file is not a database.*Put back a copy"):
        open_ledger(filled.parent)
    with pytest.raises(LedgerError, match=r"is damaged: file is not a database"):
        LedgerReader.open_read_only(filled)


def test_a_file_cut_short_is_named_and_not_changed(filled):
    content = filled.read_bytes()
    filled.write_bytes(content[: len(content) // 2])
    with pytest.raises(LedgerError, match=r"is damaged: .* Nothing was changed"):
        open_ledger(filled.parent)
    assert filled.read_bytes() == content[: len(content) // 2]


def test_damaged_trajectories_are_found_by_the_audit_and_refused_to_a_step(filled):
    connection = sqlite3.connect(filled)
    with connection:
        [(content,)] = connection.execute("SELECT trajectories FROM content WHERE seq = 5").fetchall()
    connection.close()
    file = filled.read_bytes()
    place = file.index(content) + 60
    filled.write_bytes(file[:place] + bytes([file[place] ^ 4]) + file[place + 1 :])
    with open_ledger(filled.parent) as ledger:
        [finding] = ledger.audit().findings
        assert "the trajectories of group g5 are damaged: its checksum is" in finding.problem
        with pytest.raises(LedgerError, match=r"group 'g5' in .* is damaged"):
            ledger.load(["g4", "g5"])
        ledger.drop(["g5"], "damaged")
        assert ledger.audit().findings == []
