"""Saves checkpoints beside the training: the step pays for a copy in host memory, a thread writes it.

    every rank's thread    writes the rank's file, makes it durable, leaves a mark
    rank 0's thread        then waits for the marks of all ranks, writes the index, and commits: one rename
    every rank, each step  one small message to all (`poll`): writing, written, failed

The commit needs no rank to be anywhere in particular, so it is not delayed by a long step, and an error in the training does not
prevent it. The messages make all ranks learn at the same point between two steps that a save is complete, or that it failed:
then all raise the same CheckpointError. At most one save is in flight. A thread, not a process: a fork of a program with many
threads is not safe, a spawned process would need a second copy of the state, and a thread leaves nothing behind when its
process is killed. It holds the interpreter for a few milliseconds per hundred tensors; copying, checksums and writing do not.

Without `asynchronous` the same bytes are written in place, from the tensors themselves, and no copy is made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_mega.checkpoint import store
from skyrl_mega.errors import CheckpointError
from skyrl_mega.types import Metrics, TrainState

if TYPE_CHECKING:
    from skyrl_mega.checkpoint.pieces import HostCopy, Piece
    from skyrl_mega.checkpoint.state import Checkpointed
    from skyrl_mega.parallel.topology import Topology

WRITING, WRITTEN, COMMITTED = "writing", "written", "committed"
#: How long rank 0 waits for the other ranks' files once the training has failed: they may be dead.
GRACE_S = 30.0
_POLL_S = 0.05
#: A wait longer than this is told.
_PATIENCE_S = 5.0


@dataclass
class _Save:
    """One save in flight. `status` and `error` are written by the thread, read by the training."""

    directory: Path
    state: TrainState
    metrics: Metrics
    stall_s: float = 0.0
    write_s: float = 0.0
    size_bytes: int = 0
    status: str = WRITING
    error: str = ""
    began: float = field(default_factory=time.monotonic)
    #: Tells rank 0's thread to wait for nobody after this moment (of time.monotonic).
    give_up_at: float = float("inf")
    thread: threading.Thread | None = None


class Checkpointer:
    """Saves the checkpoints of one run. All methods but `close` are called by all ranks.

    `note` shows a person a line. `timeout_s` bounds every wait for a save in flight.
    """

    def __init__(
        self,
        run_dir: str,
        topology: Topology,
        retention: store.Retention,
        *,
        asynchronous: bool,
        timeout_s: float = 1800.0,
        note: Callable[[str], None] = print,
    ) -> None:
        self._run_dir = run_dir
        self._topology = topology
        self._retention = retention
        self._asynchronous = asynchronous
        self._timeout_s = timeout_s
        self._note = note
        self._in_flight: _Save | None = None
        self._unreported: Metrics = {}
        self._host_copy: HostCopy | None = None

    def save(
        self, policy: Checkpointed, state: TrainState, metrics: Metrics | None = None, *, critic: Checkpointed | None = None
    ) -> Path:
        """Begins the checkpoint of `state.step`, or, where saves are not asynchronous, writes it; returns its final path.

        A save in flight is waited for. When this returns, policy and critic may change. `metrics`: the step's numbers, kept with
        the checkpoint (`keep_best` goes by one). Raises CheckpointError if this save or the one before it failed.
        """
        from skyrl_mega.checkpoint.pieces import HostCopy, pieces_to_write
        from skyrl_mega.checkpoint.state import critic_state, sharded_state

        began = time.monotonic()
        self._unreported = self.finish()
        save = _Save(self._begin(state.step), state, dict(metrics or {}))
        pieces = pieces_to_write(sharded_state(policy, self._topology))
        if critic is not None:
            with critic.topology.in_force():
                pieces += pieces_to_write(critic_state(critic))
        self._in_flight = save
        if self._asynchronous:
            self._host_copy = self._host_copy or HostCopy()
            pieces = self._host_copy.of(pieces)
            save.thread = threading.Thread(target=self._write, args=(save, pieces), name=f"checkpoint-{state.step}", daemon=True)
            save.stall_s = time.monotonic() - began
            save.thread.start()
        else:
            self._topology.enter("checkpoint/write", state.step, has_deadline=False)
            self._write(save, pieces)
            save.stall_s = time.monotonic() - began
            self._unreported = self.finish()
        return store.checkpoint_path(self._run_dir, state.step)

    def poll(self) -> Metrics:
        """What a save cost, once, when it is complete; {} while it is being written and when there is none.

        Numbers of this rank: `checkpoint/stall_s` (the training stood still), `write_s` (all in all), `bytes` (its file) and
        `host_copy_bytes`. Raises CheckpointError, on all ranks, if any rank failed to write.
        """
        save, unreported, self._unreported = self._in_flight, self._unreported, {}
        if save is None:
            return unreported
        answers = self._topology.gather_objects((save.status, save.error), phase="checkpoint/poll", step=save.state.step)
        is_committed = answers[0][0] == COMMITTED
        failures = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        if failures and not is_committed:
            save.give_up_at = 0.0
            self._in_flight = None
            raise CheckpointError(
                f"the checkpoint of step {save.state.step} could not be written ({'; '.join(failures)}). The one before it is "
                f"whole and will be continued. Make room in {save.directory.parent}, or see to its file system, and start again."
            )
        if not is_committed:
            return unreported
        self._in_flight = None
        return {
            "checkpoint/step": float(save.state.step),
            "checkpoint/stall_s": save.stall_s,
            "checkpoint/write_s": save.write_s,
            "checkpoint/bytes": float(save.size_bytes),
            "checkpoint/host_copy_bytes": float(self._host_copy.size_bytes if self._host_copy is not None else 0),
        }

    def finish(self) -> Metrics:
        """Waits until no save is in flight; what it cost ({} if there was none). Raises CheckpointError, also at the deadline."""
        began, told = time.monotonic(), False
        while self._in_flight is not None:
            save, waited = self._in_flight, time.monotonic() - began
            # Each round is a phase of its own to the watchdog: this wait has its own deadline, `timeout_s`.
            self._topology.enter("checkpoint/wait", save.state.step)
            if save.thread is not None:
                save.thread.join(timeout=1.0)
            cost = self.poll()
            if self._in_flight is None:
                return cost
            if waited > _PATIENCE_S and not told:
                self._note(f"waiting for the checkpoint of step {save.state.step} to be written")
                told = True
            # One clock decides for all: a rank that gave up by its own would leave the others waiting.
            if self._topology.broadcast_object(waited > self._timeout_s, phase="checkpoint/wait", step=save.state.step):
                save.error = save.error or f"{save.status} after `checkpoint.timeout_s` ({self._timeout_s:g} s)"
                self.poll()
        return {}

    def close(self) -> None:
        """Lets a save in flight complete when the training has failed; needs no other rank to come, and raises nothing.

        Waits for this rank's file; on rank 0 also for those of the others, `GRACE_S` at most. In a job of several ranks the
        watchdog may cut this short, at the cost of this save.
        """
        save = self._in_flight
        if save is None or save.thread is None:
            return
        self._in_flight = None
        if save.thread.is_alive():
            self._note(f"completing the checkpoint of step {save.state.step}")
        save.give_up_at = time.monotonic() + GRACE_S
        save.thread.join(timeout=self._timeout_s)
        if save.error or save.thread.is_alive():
            self._note(f"the checkpoint of step {save.state.step} was not completed ({save.error or 'still writing'})")

    def _begin(self, step: int) -> Path:
        """The directory to write into, made by rank 0. Raises CheckpointError, on all ranks, where it can't be made."""
        made: Path | OSError | None = None
        if self._topology.rank == 0:
            try:
                made = store.begin(self._run_dir, step)
            except OSError as error:
                made = error
        made = self._topology.broadcast_object(made, phase="checkpoint/begin", step=step)
        if isinstance(made, OSError):
            raise CheckpointError(f"the checkpoint of step {step} can't be begun: {made}. Make room, or see to the permissions.")
        return made

    def _write(self, save: _Save, pieces: list[Piece]) -> None:
        """Writes this rank's file and, on rank 0, commits. Runs in the thread; what goes wrong is kept for `poll`."""
        from skyrl_mega.checkpoint.files import mark_failed, write_part

        rank = self._topology.rank
        try:
            save.size_bytes = write_part(save.directory, rank, pieces).file.size_bytes
            save.status = WRITTEN
            if rank == 0:
                self._wait_for_parts(save)
                self._commit(save)
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to; poll raises it on all ranks
            save.error = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            mark_failed(save.directory, rank)
        save.write_s = time.monotonic() - save.began
        if rank == 0 and not save.error:
            save.status = COMMITTED

    def _wait_for_parts(self, save: _Save) -> None:
        from skyrl_mega.checkpoint.files import has_failed, part_file

        missing = set(range(self._topology.world_size))
        deadline = save.began + self._timeout_s
        while missing := {rank for rank in missing if not part_file(save.directory, rank).exists()}:
            ranks = ", ".join(map(str, sorted(missing)))
            if any(has_failed(save.directory, rank) for rank in missing):
                raise CheckpointError(f"the files of rank {ranks} are not complete")
            if time.monotonic() > min(deadline, save.give_up_at):
                raise CheckpointError(f"no file came from rank {ranks} within {time.monotonic() - save.began:.0f} s")
            time.sleep(_POLL_S)

    def _commit(self, save: _Save) -> None:
        from skyrl_mega.checkpoint.files import write_index
        from skyrl_mega.checkpoint.state import layout

        files = write_index(save.directory, self._topology.world_size)
        store.commit(save.directory, save.state, layout(self._topology), self._retention, files=files, metrics=save.metrics)
