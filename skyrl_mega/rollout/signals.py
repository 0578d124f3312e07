"""Ctrl-C and SIGTERM held back while something runs that an exception out of nowhere would leave in pieces.

Python runs a signal's handler between any two instructions of the main thread. Inside an event loop the exception then ends
whichever task happened to run, and every task that awaits that one. Here the signal is noted, and takes effect where the block
ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

#: What ends a run: a terminal's Ctrl-C, and what batch systems send.
ENDING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def held_back(on_arrival: Callable[[], None] = lambda: None) -> Iterator[None]:
    """The first SIGINT or SIGTERM of the block calls `on_arrival`, and its handler when the block has ended, however it ends.

    A second Ctrl-C takes effect at once: whoever sends it does not want to wait. Only signals with a handler of Python are held
    back, and only in the main thread, which runs those; elsewhere nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in ENDING if callable(handler := signal.getsignal(number))}
    arrived: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        if arrived and number == signal.SIGINT:
            handlers[signal.SIGINT](number, frame)
        elif not arrived:
            arrived.append(signal.Signals(number))
            on_arrival()

    for number in handlers:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if arrived:
            handlers[arrived[0]](arrived[0], None)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Processes that this thread starts in the block, and their descendants, never hear SIGINT and SIGTERM.

    They inherit the thread's signal mask. This process hears the signals in its other threads.
    """
    # Multiprocessing's tracker unblocks both signals when it has started, which would be within the first child's start.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def run_until_complete(loop: asyncio.AbstractEventLoop, call: Coroutine[Any, Any, T], *, cancel: bool = True) -> T:
    """What `call` gives when `loop` has run it. Ctrl-C and SIGTERM cancel it, or wait for it (`cancel=False`).

    Either way the other tasks of the loop stay whole, so that the loop can be used again to close what lives in it.
    """
    task = loop.create_task(call)

    def end() -> None:
        if cancel:
            loop.call_soon_threadsafe(task.cancel)

    with held_back(end):
        return loop.run_until_complete(task)
