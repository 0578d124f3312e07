"""Updates whose loss or gradient is not finite: left out, counted and told; the run ends when too many come in a row.

One such update is usually one bad sample, or an overflow in it; the next batch is fine. Several in a row mean that the weights
themselves are damaged, and then it is better to stop where the last checkpoint still is good.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from skyrl_mega.errors import NonFiniteUpdateError
from skyrl_mega.types import Metrics

#: Steps of a run that are recorded because an update failed and nobody asked: each record holds the whole model.
MAX_RECORDED = 3

#: A line for every update that was not finite, where updates are made of rows: in the run directory of training on fixed data,
#: and in that of a warm-up.
BATCHES_FILE = "nonfinite_batches.jsonl"


class SkippedUpdates:
    """Makes updates, and leaves out those that are not finite. The same on every rank, as the error is.

    `limit`: `trainer.max_nonfinite_updates`.
    """

    def __init__(self, limit: int, note: Callable[[str], None]) -> None:
        self._limit, self._note = limit, note
        self._in_a_row: dict[str, int] = {}
        self._this_step: dict[str, int] = {}
        self._total = 0

    def attempt(self, model: str, update: Callable[[], Metrics]) -> Metrics:
        """The numbers of `update`; `{model}/skipped` = 1 where it was left out. `model`: "update" (the policy's), "critic" or
        "warmup".

        Raises NonFiniteUpdateError for one more in a row than `limit`.
        """
        self._this_step.setdefault(model, 0)
        try:
            metrics = update()
        except NonFiniteUpdateError as error:
            in_a_row = self._in_a_row.get(model, 0) + 1
            if in_a_row > self._limit:
                raise
            self._in_a_row[model] = in_a_row
            self._this_step[model] += 1
            self._total += 1
            of_limit = f"number {in_a_row} in a row of the {self._limit} that trainer.max_nonfinite_updates allows"
            self._note(f"warning: {error} The run goes on without it ({of_limit}).")
            return {f"{model}/skipped": 1.0}
        if not metrics.get(f"{model}/skipped"):
            self._in_a_row[model] = 0
        return metrics

    def left_out(self, model: str) -> int:
        """How many updates of `model` were left out since the last `take_metrics`."""
        return self._this_step.get(model, 0)

    def take_total(self) -> int:
        """How many were left out, of all models together, since the last call."""
        total, self._total = self._total, 0
        return total

    def take_metrics(self) -> Metrics:
        """`update/nonfinite_skipped` and `critic/nonfinite_skipped`: the updates left out since the last call."""
        metrics = {f"{model}/nonfinite_skipped": float(count) for model, count in self._this_step.items()}
        self._this_step.clear()
        return metrics


def record_batch(run_dir: Path, step: int, reason: str, places: Sequence[str]) -> None:
    """Appends to `BATCHES_FILE` what `step` was made of: file and line of each row. Rank 0 only.

    Lines of this step and later ones are of a run that was killed and repeats them: they go.
    """
    path = run_dir / BATCHES_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    kept.append(json.dumps({"step": step, "reason": reason, "rows": list(places)}))
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
