"""Ctrl-C and SIGTERM take effect where they can do no harm, and not at all in processes whose parent decides."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from skyrl_mega.errors import EngineDiedError
from skyrl_mega.launch.interrupt import Terminated, terminable
from skyrl_mega.orchestration.rollout_host import InlineHost, _bounded, _end_other_tasks
from skyrl_mega.rollout.ray_cluster import kept_handler
from skyrl_mega.rollout.signals import ENDING, held_back, run_until_complete, unheard


@pytest.fixture(autouse=True)
def handlers():
    """Those of a run in a terminal: a shell has what it runs in the background ignore SIGINT."""
    before = {number: signal.getsignal(number) for number in ENDING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with terminable():
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_takes_effect_where_the_block_ends(number, error):
    seen = []

    def work():
        with held_back(lambda: seen.append("told")):
            send(number)
            seen.append("went on")

    with pytest.raises(error):
        work()
    assert seen == ["told", "went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_takes_effect_where_the_block_fails():
    def work():
        with held_back():
            send(signal.SIGINT)
            raise ValueError("of the block")

    with pytest.raises(KeyboardInterrupt) as stop:
        work()
    assert isinstance(stop.value.__context__, ValueError)


def test_a_second_ctrl_c_does_not_wait_and_a_second_sigterm_does():
    passed = []

    def work():
        with held_back():
            send(signal.SIGTERM)
            send(signal.SIGTERM)
            passed.append("terminated twice")
            send(signal.SIGINT)
            passed.append("interrupted too")

    with pytest.raises(KeyboardInterrupt) as stop:
        work()
    assert passed == ["terminated twice"]
    assert isinstance(stop.value, Terminated), "what came first says how the run ended"


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_back(lambda: pytest.fail("nobody wants to hear of it")):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        send(signal.SIGINT)


def test_in_another_thread_nothing_is_held_back():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with held_back():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_ctrl_c_cancels_the_call_and_leaves_every_other_task_of_the_loop_whole(loop):
    async def busy():
        for turn in range(20):
            if turn == 5:
                send(signal.SIGINT)  # between two instructions of a task that has nothing to do with the call
            await asyncio.sleep(0)
        return "done"

    async def call():
        await asyncio.sleep(60)

    task = loop.create_task(busy())
    with pytest.raises(KeyboardInterrupt):
        run_until_complete(loop, call())
    assert loop.run_until_complete(task) == "done"


def test_ctrl_c_waits_for_a_call_that_must_not_be_cancelled(loop):
    ended = []

    async def call():
        send(signal.SIGINT)
        await asyncio.sleep(0.01)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        run_until_complete(loop, call(), cancel=False)
    assert ended == [True]


def test_a_coordinator_in_the_trainers_thread_is_closed_in_order_after_ctrl_c():
    closed = []

    class Coordinator:
        async def take(self, step):
            self.engine = asyncio.create_task(self.generate())
            await asyncio.Event().wait()

        async def generate(self):
            send(signal.SIGINT)
            await asyncio.sleep(60)

        async def close(self):
            closed.append((self.engine.done(), self.engine.cancelled()))
            self.engine.cancel()
            await asyncio.gather(self.engine, return_exceptions=True)
            closed.append((self.engine.done(), self.engine.cancelled()))

    async def make():
        return Coordinator()

    host = InlineHost(make)
    with pytest.raises(KeyboardInterrupt):
        host.call("take", 1, timeout_s=60)
    host.close()
    assert closed == [(False, False), (True, True)]


def test_a_process_that_is_started_unheard_hears_neither_signal_nor_do_its_children():
    child = "import os, sys; print('up', flush=True); sys.stdin.read(); print('ended by its parent')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with unheard():
        process = subprocess.Popen(
            [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
    try:
        assert process.stdout.readline() == "up\n"
        for number in ENDING:
            os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=30)
        assert (out, process.returncode) == ("ended by its parent\n", 0)
    finally:
        process.kill()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(ENDING)


TWO_GENERATIONS = """
import multiprocessing, signal
from skyrl_mega.rollout.signals import ENDING, unheard

def is_deaf():
    return set(ENDING) <= signal.pthread_sigmask(signal.SIG_BLOCK, [])

def tell(up, generation):
    if generation == 1:
        start(up, 2).join()
    up.send((generation, is_deaf()))

def start(up, generation):
    process = multiprocessing.get_context("spawn").Process(target=tell, args=(up, generation))
    process.start()
    return process

if __name__ == "__main__":
    down, up = multiprocessing.Pipe(duplex=False)
    with unheard():
        start(up, 1)
    print(down.recv(), down.recv(), (0, is_deaf()))
"""


def test_a_processs_first_use_of_multiprocessing_may_be_an_unheard_one(tmp_path):
    """The tracker that multiprocessing starts beside the first child unblocks the very signals."""
    script = tmp_path / "script.py"
    script.write_text(TWO_GENERATIONS)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "(2, True) (1, True) (0, False)\n", done.stderr


def test_no_library_takes_sigterm_over_where_our_handler_is_kept():
    ours = signal.getsignal(signal.SIGTERM)
    with kept_handler(signal.SIGTERM):
        assert signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1)) is ours
        assert signal.getsignal(signal.SIGTERM) is ours
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) is ours


def test_a_second_sigterm_does_not_break_off_the_end_that_the_first_began():
    ended = []

    def work():
        with terminable():
            try:
                send(signal.SIGTERM)
            finally:
                send(signal.SIGTERM)
                ended.append(True)

    with pytest.raises(Terminated):
        work()
    assert ended == [True]


def test_sigterm_is_told_from_ctrl_c_where_a_library_has_made_one_of_the_other():
    def work():
        with terminable():
            try:
                send(signal.SIGTERM)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("goes on after step 3") from None  # as `ray.get` does

    with pytest.raises(Terminated, match="goes on after step 3"):
        work()


def test_a_call_broken_off_by_ctrl_c_that_fails_afterwards_is_not_printed_as_an_error_that_was_missed():
    """The terminal's Ctrl-C reaches the engines too: what was asked of them fails while the run closes."""
    loop, complaints = asyncio.new_event_loop(), []
    loop.set_exception_handler(lambda _, context: complaints.append(context))

    async def ask(engine_died, asked):
        asked.set()
        try:
            await asyncio.sleep(60)
        finally:
            await engine_died.wait()
            raise EngineDiedError("engine 0 was closed.")

    async def break_off():
        engine_died, asked = asyncio.Event(), asyncio.Event()
        call = asyncio.ensure_future(_bounded(ask(engine_died, asked), "receivers", timeout_s=60))
        await asked.wait()
        call.cancel()
        await asyncio.wait([call])
        engine_died.set()
        await _end_other_tasks()
        return call.cancelled()

    try:
        assert loop.run_until_complete(break_off())
        gc.collect()  # asyncio complains of a task when that is freed
    finally:
        loop.close()
    assert complaints == []
