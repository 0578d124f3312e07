"""`skyrl-mega ledger`: the tables, the JSON and the exit code."""

import json
import sqlite3

import pytest

from helpers.ledger import finish_all, issue, open_ledger, train_step
from skyrl_mega.checkpoint import manifest, store
from skyrl_mega.launch import cli
from skyrl_mega.telemetry.metrics import MetricsLog
from skyrl_mega.types import TrainState, WeightVersion


@pytest.fixture
def run_dir(tmp_path):
    """Two steps trained, the second with a group of the first again; one group dropped, one begun again.

    Beside them metrics, and a checkpoint of the first.
    """
    with open_ledger(tmp_path, replay_max_age=1) as ledger:
        issue(ledger, 6)
        finish_all(ledger, ["g0", "g1", "g2", "g3"])
        train_step(ledger, 1, ["g0", "g1"])
        ledger.take(2, ["g2", "g3"], 1, replayed=["g1"])
        ledger.trained(2, WeightVersion(2, 3, 3000, "sum2"))
        ledger.drop(["g4"], "environment[0]")
        ledger.early_stop(["g5"])
    log = MetricsLog(tmp_path)
    for step in range(3):
        log.log({"reward/mean": 0.5}, step)
    log.close()
    temporary = store.begin(tmp_path, 1)
    (temporary / "tensors.bin").write_bytes(b"x")
    files = [manifest.FileRecord("tensors.bin", 1, manifest.checksum_of(temporary / "tensors.bin"))]
    store.commit(temporary, TrainState(1, 1, {}, 2, 1), {}, store.Retention(keep_last=2, keep_best=0), files=files, metrics={})
    return tmp_path


def tamper(run_dir, statement):
    with sqlite3.connect(run_dir / "ledger.sqlite") as connection:
        connection.execute(statement)
    connection.close()


def test_the_tables_show_counts_staleness_steps_versions_and_the_verdict(run_dir, capsys):
    assert cli.main(["ledger", str(run_dir)]) == 0
    text = capsys.readouterr().out
    for line in (
        "no process writes it; opened 1 times",
        "issued       6  all groups drawn from the prompt source",
        "trained      4  steps up to 2; 0 of them repeated",
        "replayed     1  times that a later step trained one of them again",
        "dropped      1  environment[0]: 1",
        "early stops  1  begun again each time",
        "0        2  ████",
        "2  trained   2 + 1        1       1.00      12         1  ",
        "sum2",
        "audit: all 14 checks hold",
    ):
        assert line in text, line


def test_the_json_has_the_same_and_the_exit_code_tells_the_verdict(run_dir, capsys):
    assert cli.main(["ledger", str(run_dir), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["counts"]["trained"], shown["staleness"], shown["audit"]["passed"]) == (4, {"0": 2, "1": 2}, True)
    tamper(run_dir, "UPDATE groups SET reason = '' WHERE state = 'dropped'")
    assert cli.main(["ledger", str(run_dir), "--json"]) == 1
    [finding] = json.loads(capsys.readouterr().out)["audit"]["findings"]
    assert finding == {"check": "No group was dropped without a reason", "problem": "group g4"}
    assert cli.main(["ledger", str(run_dir)]) == 1
    text = capsys.readouterr().out
    assert "audit: 1 of 14 checks do not hold\nNo group was dropped without a reason:\n  group g4\n" in text


def test_what_stands_beside_the_ledger_is_compared_with_it(run_dir, capsys):
    tamper(run_dir, "UPDATE groups SET state = 'finished', step = NULL, position = NULL WHERE seq = 0")
    assert cli.main(["ledger", str(run_dir)]) == 1
    assert "it counts 2 groups up to step 1, the ledger 1" in capsys.readouterr().out
    MetricsLog(run_dir).log({}, 9)
    assert cli.main(["ledger", str(run_dir)]) == 1
    assert "1 step is told and not trained: 9" in capsys.readouterr().out


def test_one_group_is_shown_with_its_life(run_dir, capsys):
    assert cli.main(["ledger", str(run_dir), "--group", "g2"]) == 0
    text = capsys.readouterr().out
    assert [kind for kind in ("issued", "finished", "taken", "trained") if kind in text] == [
        "issued",
        "finished",
        "taken",
        "trained",
    ]
    assert cli.main(["ledger", str(run_dir), "--group", "g4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["reason"], [event["kind"] for event in shown["events"]]) == (
        "dropped",
        "environment[0]",
        ["issued", "dropped"],
    )
    assert cli.main(["ledger", str(run_dir), "--group", "x"]) == 2
    assert "knows no group 'x'; the last one issued is 'g5'" in capsys.readouterr().err


def test_a_directory_without_a_ledger_is_explained(tmp_path, capsys):
    assert cli.main(["ledger", str(tmp_path)]) == 2
    assert "has no ledger.sqlite" in capsys.readouterr().err
