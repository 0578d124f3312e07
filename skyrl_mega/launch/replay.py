"""`skyrl-mega replay`: a recorded step computed again, as a table of differences."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from skyrl_mega.telemetry.versions import collect_versions

if TYPE_CHECKING:
    from skyrl_mega.orchestration.replay import Replay, UpdateReplay

#: Names of tensors shown before the rest is counted.
_FEW = 5


def run_replay(
    run_dir: Path,
    step: int,
    overrides: Sequence[str],
    *,
    tolerance: float | None = None,
    world_size: int = 1,
    shows: bool = True,
    output: TextIO | None = None,
) -> int:
    """Prints the comparison (where `shows`: on rank 0) and returns the exit code: 0 where the replay agrees with the record."""
    from skyrl_mega.orchestration.replay import replay_step

    replay = replay_step(run_dir, step, overrides, tolerance=tolerance, world_size=world_size)
    if shows:
        print("\n".join(render(replay)), file=output or sys.stdout, flush=True)
    return 0 if replay.agrees else 1


def render(replay: Replay) -> Iterator[str]:
    """The lines of the report."""
    record = replay.record
    place = record.surroundings
    yield f"step {record.step} of weight version {record.weight_version}: {replay.path}"
    layout = ", ".join(f"{name} {size}" for name, size in place["layout"].items())
    yield f"recorded on {place['world_size']} x {place['device']}, {layout}; replayed on {replay.layout}"
    before, now = place["versions"], collect_versions()
    changed = [f"{name} {before.get(name)} -> {now.get(name)}" for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        yield f"other versions: {', '.join(changed)}"
    for update in replay.updates:
        yield ""
        yield from _render_update(update)
    yield ""
    verdict = "agrees with the record" if replay.agrees else "differs from the record beyond the tolerance"
    yield f"The replay {verdict}."


def _render_update(update: UpdateReplay) -> Iterator[str]:
    header = ("recorded", "replayed", "difference", "tolerance")
    yield f"{f'update {update.number}':<32}" + "".join(f"{name:>14}" for name in header)
    for line in update.comparisons:
        mark = "" if line.agrees else "  <-- differs"
        yield f"{line.name:<32}{line.recorded:>14.6g}{line.replayed:>14.6g}{line.difference:>14.2e}{line.tolerance:>14.1e}{mark}"
    for when, error in (("recorded", update.recorded_error), ("replayed", update.replayed_error)):
        if error:
            yield f"{when}: {error}"
        elif update.recorded_error or update.replayed_error:
            yield f"{when}: the update went well"
    if (worst := update.worst) is not None:
        yield (
            f"worst token: sample {worst.sample_index} of group {worst.group_id}, position {worst.position} (token "
            f"{worst.token_id}): logprob {worst.recorded:.6g} recorded, {worst.replayed:.6g} replayed"
        )
    if (bad := update.non_finite) is not None:
        yield (
            f"first number that is not finite: {bad.what} {bad.value} in micro-batch {bad.micro_batch} of data-parallel rank "
            f"{bad.dp_rank}, sample {bad.sample_index} of group {bad.group_id}, position {bad.position} (token {bad.token_id})"
        )
    elif update.replayed_error:
        yield "every token's logprob and loss are finite"
    if update.bad_tensors:
        more = f" and {len(update.bad_tensors) - _FEW} more" if len(update.bad_tensors) > _FEW else ""
        yield f"not finite: {', '.join(update.bad_tensors[:_FEW])}{more}"
