"""Where every rank of the job is, and an end for ranks that no exception can reach.

Each rank says in the job's store which phase it entered last, and a thread of it says every few seconds that it lives. So a
rank whose wait ran out can name the ranks that are missing, what they were doing, and since when.

The thread also ends its own process in the two cases where the main thread can't be counted on (it may hang inside NCCL, or
in code of an environment):

- another rank has given up and said so, and this one has not ended by itself some seconds later;
- this rank has made no progress for longer than the deadline allows any wait to last, plus some seconds for the ranks that wait
  for it to say so first. Progress is a new phase, a wait that begins or ends, a micro-batch. A phase may be exempt: loading a
  large model takes the time it takes.

All ranks use the store of `torch.distributed`; if that is gone, so is the rank (or agent) that held it, and the job with it.
Which rank is dead does not depend on clocks: it is one whose signs of life stop. Only the times in a message compare the clocks
of two hosts.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

#: Exit status of a rank that its watchdog ended (sysexits' EX_TEMPFAIL: try again).
EXIT_CODE = 75
#: Seconds between two signs of life; a rank is called dead where none comes during SILENT_BEATS of them.
BEAT_S = 2.0
SILENT_BEATS = 2.5
#: Seconds that ranks get to end by themselves once one has given up.
GRACE_S = 10.0
#: Ranks named in a message; of the others only the number is given.
MAX_NAMED = 8

_PREFIX, _GIVEN_UP = "skyrl_mega/rank/", "skyrl_mega/given_up"


class Watchdog:
    """One per rank of a world larger than one; see the module's docstring.

    `store` must be this rank's own connection. `end` ends the process (tests replace it).
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, timeout_s: float, end: Callable[[int], Any] = os._exit
    ) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self._store, self._end = store, end
        self._lock = threading.Lock()
        self._phase, self._step, self._since, self._beat = "start-up", 0, time.time(), 0
        self._progressed, self._has_deadline = time.monotonic(), False
        self._stop = threading.Event()
        self._say_where()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def step(self) -> int:
        """The step that this rank is in."""
        return self._step

    def enter(self, phase: str, step: int, *, has_deadline: bool = True) -> None:
        """Says that this rank is in `phase` of `step` from now on. Without `has_deadline` it may last without any progress."""
        self._phase, self._step, self._since = phase, step, time.time()
        self._has_deadline = has_deadline
        self.progress()
        self._say_where()

    def progress(self) -> None:
        """Says, to this rank's own thread, that it goes on."""
        self._progressed = time.monotonic()

    def give_up(self, message: str) -> None:
        """Tells every rank that this one ends, and why; the first message counts."""
        try:
            with self._lock:
                self._store.compare_set(_GIVEN_UP, "", message)
        except RuntimeError:
            pass  # the store is gone: its keeper has ended, and every rank finds that out by itself

    def missing(self) -> str:
        """The ranks that are dead, or not where this one is: one sentence. Takes some seconds, to see who still lives."""
        try:
            earlier = self._places()
            time.sleep(SILENT_BEATS * BEAT_S)
            places = self._places()
        except RuntimeError:
            return "The job's store does not answer: the process that keeps it (rank 0, or torchrun's agent) is gone."
        ranks = [rank for rank in range(self.world_size) if rank != self.rank]
        named = [text for text in (self._describe(rank, earlier[rank], places[rank]) for rank in ranks) if text]
        if not named:
            return f"All {self.world_size} ranks are alive and in this phase."
        more = f"; and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
        return f"Missing: {'; '.join(named[:MAX_NAMED])}{more}."

    def close(self) -> None:
        """Ends the thread. The process goes on."""
        self._stop.set()
        self._thread.join()

    def _places(self) -> list[dict[str, Any] | None]:
        """What every rank said last; None of a rank that never came (a plain read would wait for it)."""
        with self._lock:
            keys = [f"{_PREFIX}{rank}" for rank in range(self.world_size)]
            return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]

    def _describe(self, rank: int, earlier: dict[str, Any] | None, place: dict[str, Any] | None) -> str:
        if place is None:
            return f"rank {rank} never came"
        where, now = f"phase {place['phase']!r} of step {place['step']}", time.time()
        if earlier is not None and earlier["beat"] == place["beat"]:
            return f"rank {rank} (on {place['host']}) is dead: no sign of life for {now - place['alive']:.0f} s, last in {where}"
        if (place["phase"], place["step"]) != (self._phase, self._step):
            return f"rank {rank} (on {place['host']}) has been in {where} for {now - place['since']:.0f} s"
        return ""

    def _say_where(self) -> None:
        self._beat += 1
        place = {
            "phase": self._phase,
            "step": self._step,
            "since": self._since,
            "alive": time.time(),
            "beat": self._beat,
            "host": os.uname().nodename,
        }
        try:
            with self._lock:
                self._store.set(f"{_PREFIX}{self.rank}", json.dumps(place))
        except RuntimeError:
            pass  # as in give_up

    def _watch(self) -> None:
        given_up_at: float | None = None
        while not self._stop.wait(min(BEAT_S, self.timeout_s / 4)):
            self._say_where()
            if given_up_at is None and self._someone_gave_up():
                given_up_at = time.monotonic()
            if given_up_at is not None and time.monotonic() - given_up_at > GRACE_S:
                self._terminate(f"another rank has ended the job: {self._reason()}")
            elif self._has_deadline and time.monotonic() - self._progressed > self._longest_s():
                self._terminate(
                    f"it made no progress in phase {self._phase!r} of step {self._step} for longer than `parallel.timeout_s` "
                    f"({self.timeout_s:g} s). {self.missing()} Raise parallel.timeout_s if it is only slow."
                )

    def _longest_s(self) -> float:
        """How long this rank may go without progress: past the deadline, so that those who wait for it speak first."""
        return self.timeout_s + max(GRACE_S, 0.05 * self.timeout_s)

    def _someone_gave_up(self) -> bool:
        try:
            with self._lock:
                return bool(self._store.check([_GIVEN_UP]))
        except RuntimeError:
            return False

    def _reason(self) -> str:
        try:
            with self._lock:
                return self._store.get(_GIVEN_UP).decode()
        except RuntimeError:
            return "its message is lost"

    def _terminate(self, why: str) -> None:
        self.give_up(f"rank {self.rank}: {why}")
        print(f"[watchdog] rank {self.rank} is ended: {why}\n[watchdog] its threads were at:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        sys.stderr.flush()
        self._end(EXIT_CODE)
        self._stop.set()


def start_watchdog(rank: int, world_size: int, timeout_s: float) -> Watchdog:
    """The watchdog of this rank, over a connection of its own to the store of the joined world."""
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store().clone()
    store.set_timeout(timedelta(seconds=min(GRACE_S, timeout_s)))
    return Watchdog(store, rank, world_size, timeout_s)
