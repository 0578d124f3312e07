"""vLLM's engine core as a process that can't outlive the one that started it.

vLLM runs its engine core in a child process. When the parent is killed with SIGKILL nothing tells the child, which would hold
its memory and GPUs for ever; so the child asks the kernel to be killed with it (PR_SET_PDEATHSIG), which works for a process
that hangs or is stopped, too. Workers of a tensor-parallel engine are the engine core's children, and vLLM ends them when the
core goes. The kernel's signal follows the *thread* that started the child, so engines are started by a thread that stays.

Only Linux has the signal; elsewhere an engine core whose parent is killed must be ended by hand.

A terminal's Ctrl-C reaches every process of the run at once, and so does the SIGTERM of most batch systems. Which of them end
when is the parent's decision, so an engine core and its workers hear of neither. Ignoring the signals would not do: vLLM
installs handlers of its own, and imports for seconds before that. They are blocked in the thread that starts the core, which
hands its signal mask down to whatever descends from it, from the first instruction on. (Ray does the same with Ctrl-C.) The
parent ends a core with SIGKILL, which nothing blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from skyrl_mega.rollout.signals import unheard

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """This process is killed when the thread that started it ends. Exits at once if its parent is gone already."""
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """The target of vLLM's child process: `EngineCoreProc.run_engine_core`, bound to the life of its parent."""
    die_with_parent()
    from vllm.v1.engine.core import EngineCoreProc

    EngineCoreProc.run_engine_core(*args, **kwargs)


def kill_engine_cores() -> None:
    """Ends the engine cores of this process that nobody has closed. Whoever waits for one to come up gets vLLM's error."""
    for child in multiprocessing.active_children():
        if child.name.startswith("EngineCore"):
            child.kill()


@contextlib.contextmanager
def bound_engine_cores() -> Iterator[None]:
    """Engine cores that vLLM starts inside the block die with the thread that runs it, and hear neither Ctrl-C nor SIGTERM."""
    from vllm.v1.engine.core import EngineCoreProc

    original = EngineCoreProc.__dict__["run_engine_core"]
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)
    try:
        with unheard():
            yield
    finally:
        EngineCoreProc.run_engine_core = original
