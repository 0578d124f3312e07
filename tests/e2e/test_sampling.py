"""Every way to choose what is trained on, together, through the whole loop: its numbers are those of the groups in the ledger."""

from __future__ import annotations

import pytest

from helpers.runs import Run, write_home
from skyrl_mega.data.ledger_reader import LedgerReader, read_meta
from skyrl_mega.telemetry.metrics import read_metrics
from skyrl_mega.types import StopReason

STEPS, GROUPS, REPLAYS, LONGEST, CACHE = 5, 4, 2, 8, 4
SETTINGS = (
    f"trainer.max_steps={STEPS}",
    "trainer.max_staleness=1",
    "checkpoint.interval_steps=0",
    "data.limit=10",
    "sampling.curriculum=success",
    "sampling.dynamic=true",
    "sampling.max_resampled=0.25",
    "sampling.when_exhausted=train",
    "sampling.zero_variance=drop",
    "sampling.reward.scale=2",
    "sampling.reward.shift=0.5",
    "sampling.overlong.filter=true",
    f"sampling.overlong.penalty_tokens={CACHE}",
    "sampling.overlong.penalty=0.25",
    f"sampling.replay.share={REPLAYS / GROUPS}",
    "sampling.replay.max_age=2",
)


def shaped(trajectory) -> float:
    """By DAPO's equation 13, for one turn of at most LONGEST tokens."""
    [turn] = trajectory.turns
    excess = turn.end - turn.start - (LONGEST - CACHE)
    return 2.0 * trajectory.reward + 0.5 - 0.25 * max(0, excess) / CACHE


def test_a_runs_numbers_are_those_of_its_groups(tmp_path):
    run = Run(write_home(tmp_path / "home"), tmp_path / "run", *SETTINGS, light=True)
    try:
        assert run.wait(timeout_s=300) == 0, run.output[-6000:]
    finally:
        run.end()
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run")}
    with LedgerReader.open_read_only(tmp_path / "run" / "ledger.sqlite") as ledger:
        assert ledger.audit(metrics_steps=sorted(rows)).findings == []
        counts = ledger.counts()
        assert (counts.trained, counts.replayed) == (STEPS * GROUPS, (STEPS - 1) * REPLAYS)
        with ledger.file.snapshot() as db:
            query = "SELECT group_id FROM groups WHERE step = ? ORDER BY position"
            own = {step: ledger.load([name for (name,) in db.execute(query, (step,))]) for step in range(1, STEPS + 1)}
            query = "SELECT group_id FROM replays JOIN groups USING (seq) WHERE replays.step = ?"
            again = {step: ledger.load([name for (name,) in db.execute(query, (step,))]) for step in range(1, STEPS + 1)}
            state = read_meta(db, "prompt_source", {})
    left_out = 0.0
    for step, row in rows.items():
        if step == 0:
            continue
        played = [trajectory for group in own[step] for trajectory in group.trajectories]
        assert row["reward/mean"] == pytest.approx(sum(t.reward for t in played) / len(played))
        assert row["reward/shaped_mean"] == pytest.approx(sum(map(shaped, played)) / len(played))
        assert row["staleness/max"] <= 1
        assert row["sampling/replayed"] == len(again[step]) == (REPLAYS if step > 1 else 0)
        groups = own[step] + again[step]
        cut_off = [t.turns[-1].stop_reason is StopReason.LENGTH for group in groups for t in group.trajectories]
        assert row["sampling/overlong_filtered_share"] == pytest.approx(sum(cut_off) / len(cut_off))
        flat = [len({shaped(t) for t in group.trajectories}) == 1 for group in groups]
        assert row["sampling/zero_variance_dropped_share"] == pytest.approx(sum(flat) / len(flat))
        without_signal = sum(len({t.reward for t in group.trajectories}) == 1 for group in own[step])
        assert row["sampling/filled_without_signal"] == without_signal
        left_out += row.get("flight/dropped_no_learning_signal", 0.0)
    assert left_out <= counts.dropped_by_reason.get("no learning signal", 0) <= STEPS * GROUPS / 4 + 1
    assert rows[STEPS]["sampling/curriculum_tried"] == 1.0
    assert "success" in state
