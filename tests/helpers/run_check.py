"""What must hold of a run that has ended, however often it was interrupted: counted by the audit, and by a witness outside of it.

The witness is the environment of `helpers.runs`, which writes a line for every answer that it grades.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from skyrl_mega.checkpoint import store
from skyrl_mega.data.ledger_reader import LedgerReader
from skyrl_mega.telemetry.metrics import read_metrics


def check_run(run_dir: Path, *, max_steps: int, groups: int, samples: int, replays: int = 0) -> None:
    """By audit, rows and witness: every step trained once with all its groups, none finished twice, none dropped.

    `replays`: groups that every step but the first must have trained again.
    """
    steps = [row["step"] for row in read_metrics(run_dir)]
    assert steps == list(range(max_steps + 1))
    state = store.read_state(store.list_checkpoints(run_dir)[-1])[0]
    assert (state.step, state.num_trained_groups) == (max_steps, max_steps * groups)
    with LedgerReader.open_read_only(run_dir / "ledger.sqlite") as ledger:
        audit = ledger.audit(metrics_steps=steps, checkpoint=state)
        counts = ledger.counts()
    assert audit.passed, audit.findings
    assert counts.trained == max_steps * groups
    assert counts.dropped == counts.early_stops == 0
    assert counts.issued == counts.trained + counts.finished + counts.in_flight + counts.taken
    db = sqlite3.connect(f"file:{run_dir / 'ledger.sqlite'}?mode=ro", uri=True)
    trained = db.execute("SELECT step, count(*) FROM groups WHERE state = 'trained' GROUP BY step").fetchall()
    assert trained == [(step, groups) for step in range(1, max_steps + 1)]
    replayed = db.execute("SELECT step, count(*) FROM replays GROUP BY step").fetchall()
    assert replayed == [(step, replays) for step in range(2, max_steps + 1) if replays]
    finishes = db.execute("SELECT count(*) FROM events WHERE kind = 'finished' GROUP BY seq").fetchall()
    assert set(finishes) == {(1,)}, "a group was finished twice"
    finished_at = {int(p.split(":")[1]): at for p, at in db.execute("SELECT prompt_id, finished_at FROM groups")}
    witness = [json.loads(line) for line in (run_dir / "witness.jsonl").read_text().splitlines()]
    answers: dict[int, int] = {}
    for line in witness:
        answers[line["number"]] = answers.get(line["number"], 0) + 1
        at = finished_at[line["number"]]
        assert at is None or line["at"] <= at, f"prompt {line['number']} was sampled again after it had finished"
    assert all(answers[number] >= samples for number, at in finished_at.items() if at is not None)
