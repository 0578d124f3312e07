"""Engines that are killed or stopped by the operating system in the middle of a push; each is a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from helpers.weight_fleet import TensorSource, fleet, random_tensors
from skyrl_mega.errors import EngineDiedError
from skyrl_mega.rollout.transport.receiver import BucketReceiver
from skyrl_mega.weights.publish import publish

BUCKET_BYTES = 3_000_000  # two tensors, each large enough to be sent from where it lies


def serve(pipe):
    """A worker without a model: does what it is told; reports what it committed."""
    receiver, committed = BucketReceiver(), {}
    while (message := pipe.recv()) is not None:
        what, argument = message
        answer = None
        if what == "connect":
            receiver.connect(argument, 0)
        elif what == "begin":
            receiver.begin()
        elif what == "load":
            receiver.receive(argument)
            receiver.release(argument)
        elif what == "report":
            answer = [{"error": receiver.error, **receiver.totals(), **receiver.state()}]
        elif what == "commit":
            receiver.commit()
            committed[argument] = receiver.totals()["checksum"]
        elif what == "abandon":
            receiver.abandon()
        elif what == "committed":
            answer = committed
        pipe.send(answer)


class ProcessEngine:
    """`signal_at` (bucket number, signal): what happens to the process just before it is told of that bucket."""

    def __init__(self, name, signal_at=(-1, None)):
        self.name, self.signal_at, self._num_loads = name, signal_at, 0
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._calls = ThreadPoolExecutor(1)

    def ask(self, what, argument=None):
        def call():
            try:
                self._pipe.send((what, argument))
                return self._pipe.recv()
            except (EOFError, OSError) as error:
                raise EngineDiedError(f"{self.name} is gone") from error

        return self._calls.submit(call)

    def load(self, bucket):
        if self._num_loads == self.signal_at[0]:
            os.kill(self._process.pid, self.signal_at[1])
        self._num_loads += 1
        return self.ask("load", bucket)

    def connect(self, endpoint):
        return self.ask("connect", endpoint)

    def begin(self, version):
        return self.ask("begin", version)

    def report(self):
        return self.ask("report")

    def commit(self, version):
        return self.ask("commit", version)

    def abandon(self):
        return self.ask("abandon")

    class _Released:
        def set(self):
            pass

    released = _Released()

    def close(self):
        self._process.kill()
        self._process.join()
        self._calls.shutdown()


def up(*engines):
    """The engines, once their processes answer."""
    for engine in engines:
        engine.ask("committed").result(timeout=100)
    return list(engines)


LOSSES = [("gloo", signal.SIGKILL), ("gloo", signal.SIGSTOP), ("shm", signal.SIGKILL)]


@pytest.mark.parametrize(("transport", "how"), LOSSES, ids=["gloo, killed", "gloo, stopped", "shm, killed"])
def test_an_engine_process_that_is_lost_in_a_push_costs_the_others_nothing(transport, how, tmp_path):
    engines = up(ProcessEngine("a"), ProcessEngine("b", (2, how)), ProcessEngine("c"))
    tensors = random_tensors(1, num_tensors=8, numel=700_000)
    with fleet(engines, transport, timeout_s=6.0, directory=tmp_path) as sink:
        published = publish(TensorSource(tensors), sink, 1, None, bucket_bytes=BUCKET_BYTES)
        assert list(published.failed) == ["b"]
        assert all(engine.ask("committed").result(timeout=10)[1] == published.checksum for engine in engines[::2])
        engines[1].close()
        engines[1:2] = up(ProcessEngine("b"))
        again = publish(TensorSource(random_tensors(2)), sink, 2, None, bucket_bytes=BUCKET_BYTES)
        assert again.failed == {}
        assert all(engine.ask("committed").result(timeout=10)[2] == again.checksum for engine in engines)
