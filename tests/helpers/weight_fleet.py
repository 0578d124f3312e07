"""Engines that are all transport and no model: `WeightReceiver`s over real `BucketReceiver`s, each in a thread of its own."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from skyrl_mega.errors import EngineDiedError
from skyrl_mega.rollout.transport.choose import make_transport
from skyrl_mega.rollout.transport.receiver import BucketReceiver
from skyrl_mega.weights.fleet_sink import FleetSink


class ReceivingEngine:
    """Keeps what it received and was told. `served` is {version: {name: tensor}} of what it committed.

    `dies_at`, `hangs_at`, `damages`: the number of the bucket (counted over all versions from 0) at which that happens.
    """

    def __init__(self, name, *, num_workers=1, dies_at=None, hangs_at=None, damages=None):
        self.name = name
        self.workers = [BucketReceiver() for _ in range(num_workers)]
        self.dies_at, self.hangs_at, self.damages = dies_at, hangs_at, damages
        self.calls, self.served, self.dead = [], {}, False
        self.released = threading.Event()
        self._num_loads = 0
        self._queue = ThreadPoolExecutor(1)
        self._threads = ThreadPoolExecutor(num_workers)

    def _call(self, what, on_worker) -> Future:
        def run():
            if self.dead:
                raise EngineDiedError(f"{self.name} is dead")
            self.calls.append(what)
            if what == "load":
                self._misbehave()
            return list(self._threads.map(on_worker, self.workers))

        return self._queue.submit(run)

    def _misbehave(self):
        number, self._num_loads = self._num_loads, self._num_loads + 1
        if number == self.hangs_at:
            self.released.wait(60)
        if number == self.dies_at:
            self.kill()
            raise EngineDiedError(f"{self.name} died")

    def kill(self):
        self.dead = True
        for worker in self.workers:
            worker.close()

    def connect(self, endpoint):
        ranks = {id(worker): rank for rank, worker in enumerate(self.workers)}
        return self._call("connect", lambda worker: worker.connect(endpoint, ranks[id(worker)]))

    def begin(self, version):
        self.received = {}
        return self._call("begin", lambda worker: worker.begin())

    def load(self, bucket):
        if self._num_loads == self.damages:
            bucket = {**bucket, "slots": [{**bucket["slots"][0], "checksum": "0" * 16}, *bucket["slots"][1:]]}

        def receive(worker):
            tensors = worker.receive(bucket)
            self.received |= {name: tensor.clone() for name, tensor in tensors}
            worker.release(bucket)

        return self._call("load", receive)

    def report(self):
        return self._call("report", lambda w: {"error": w.error, **w.totals(), **w.state(), "seconds": w.seconds})

    def commit(self, version):
        def commit(worker):
            worker.commit()
            self.served[version] = dict(self.received)

        return self._call("commit", commit)

    def abandon(self):
        return self._call("abandon", lambda worker: worker.abandon())

    def close(self):
        self.released.set()
        self._queue.shutdown()
        self._threads.shutdown()
        for worker in self.workers:
            worker.close()


class TensorSource:
    """Named tensors as a `WeightSource`; each is a group of its own."""

    def __init__(self, tensors):
        self.tensors = dict(tensors)

    def fused_groups(self):
        return [(name,) for name in self.tensors]

    def iter_weights(self, dtype):
        yield from self.tensors.items()


def random_tensors(seed, num_tensors=8, numel=5000, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{i}": torch.randn(numel + i, generator=generator).to(dtype) for i in range(num_tensors)}


@contextmanager
def fleet(engines, transport, *, delta=False, timeout_s=20.0, directory=None):
    """A sink over `engines` (a list that may change between versions)."""
    half = make_transport(transport, delta=delta, timeout_s=timeout_s, directory=directory)
    sink = FleetSink(lambda: list(engines), half, timeout_s=timeout_s)
    everyone = list(engines)
    try:
        yield sink
    finally:
        for engine in {*everyone, *engines}:
            engine.released.set()
        sink.close()
        for engine in {*everyone, *engines}:
            engine.close()


def one_engine_sink(engine, transport="shm", *, delta=False, timeout_s=60.0):
    """A sink over a real `VLLMEngine`."""
    half = make_transport(transport, delta=delta, timeout_s=timeout_s)
    return FleetSink(lambda: [engine.weight_receiver()], half, timeout_s=timeout_s)


class BucketWriter:
    """Writes whole versions of one bucket into shared memory, for tests that drive an engine's weight controls themselves."""

    def __init__(self):
        self._transport = make_transport("shm", delta=False, timeout_s=60.0)

    def write(self, named_tensors):
        """What `load` of an engine is given."""
        announced = []
        self._transport.begin(SimpleNamespace(names=list))
        self._transport.send(0, list(named_tensors), announced.append)
        return announced[0]

    def close(self):
        self._transport.close()


def same(received, sent):
    return received.keys() == sent.keys() and all(torch.equal(received[name], sent[name]) for name in sent)
