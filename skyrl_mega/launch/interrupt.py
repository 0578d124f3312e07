"""Ctrl-C and SIGTERM: the run ends as it would on an error, with everything closed, and says how to go on.

SIGTERM, which batch systems and torchrun send, is made an exception like Ctrl-C's: engines, Ray and shared memory are left in
order, a checkpoint that is being written is completed, and the exit codes are those of the shell (130 and 143). Only in the
process that has them: a rank other than the first ends at once on SIGTERM, so that nobody waits for it in a collective.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

#: What a shell makes of a process that a signal ended.
SIGINT_CODE, SIGTERM_CODE = 128 + signal.SIGINT, 128 + signal.SIGTERM
#: Seconds after a SIGTERM in which another one is the same.
DUPLICATE_S = 5.0


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated in the block, on the first rank. Used in the main thread.

    Another one within DUPLICATE_S does nothing: a batch system that reaches a process directly and through torchrun sends two.
    """
    if os.environ.get("RANK", "0") not in ("", "0"):
        yield
        return
    terminated_at = -math.inf

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated_at
        is_duplicate = time.monotonic() < terminated_at + DUPLICATE_S
        terminated_at = time.monotonic()
        if not is_duplicate:
            raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as stop:
        # `ray.get` makes a plain KeyboardInterrupt of any subclass of it.
        if terminated_at > -math.inf and not isinstance(stop, Terminated):
            raise Terminated(*stop.args) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def how_to_go_on(run_dir: Path) -> str:
    """What the same command will do after an interruption, by what is on disk."""
    from skyrl_mega.checkpoint.store import list_checkpoints, step_of
    from skyrl_mega.data.ledger_file import FILE_NAME

    complete = list_checkpoints(run_dir)
    rollouts = ", and what was sampled since is in its ledger" if (run_dir / FILE_NAME).is_file() else ""
    if complete:
        return f"the same command goes on after step {step_of(complete[-1])}, the newest checkpoint of {run_dir}{rollouts}."
    return f"{run_dir} has no checkpoint yet: the same command begins at step 1{rollouts}."
