"""nccl and cuda_ipc as far as they go without a GPU: vLLM's real classes at both ends, over a stand-in for its communicator."""

from __future__ import annotations

import contextlib
import inspect
import queue
import threading
from concurrent.futures import Future
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from helpers.weight_fleet import TensorSource, random_tensors, same
from skyrl_mega.errors import BackendUnavailableError, WeightSyncError
from skyrl_mega.rollout.transport import native
from skyrl_mega.rollout.transport.checksum import device_checksum
from skyrl_mega.rollout.transport.native import FleetClient, NativeTransport, trainer_init_info
from skyrl_mega.rollout.transport.native_receiver import NativeReceiver, handles_from_plain, handles_to_plain
from skyrl_mega.rollout.transport.receiver import BucketReceiver
from skyrl_mega.weights.fleet_sink import FleetSink
from skyrl_mega.weights.publish import publish

pytest.importorskip("vllm")


class Wire:
    """In place of NCCL: what rank 0 broadcasts, every other rank finds in its queue."""

    def __init__(self):
        self.queues = {}

    def join(self, rank):
        wire = self

        class Communicator:
            def broadcast(self, tensor, src, stream=None):
                if rank == src:
                    for arriving in wire.queues.values():
                        arriving.put(tensor.clone())
                else:
                    tensor.copy_(wire.queues[rank].get(timeout=10))

            def destroy(self):
                wire.queues.pop(rank, None)

        if rank != 0:
            self.queues[rank] = queue.Queue()
        return Communicator()


@pytest.fixture
def wire(monkeypatch):
    """vLLM's nccl backend on CPU: streams do nothing, the communicator is a `Wire`. Packing and messages are vLLM's."""
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    wire = Wire()
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda _, count: [stream] * count)
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda init_info: wire.join(0))
    monkeypatch.setattr(
        nccl_engine, "worker_init_process_group", lambda init_info, parallel: wire.join(init_info.rank_offset + parallel.rank)
    )
    return wire


class NativeEngine:
    """Workers of one engine: real `NativeReceiver`s with a model that keeps what it is given. Each call runs in a thread."""

    def __init__(self, name, num_workers=1):
        from concurrent.futures import ThreadPoolExecutor

        self.name, self.served, self.endpoints, self.refuses = name, {}, [], False
        self._workers = [SimpleNamespace(native=None, accounts=BucketReceiver(), received={}) for _ in range(num_workers)]
        self._queue, self._threads = ThreadPoolExecutor(1), ThreadPoolExecutor(num_workers)

    def _call(self, on_worker) -> Future:
        return self._queue.submit(lambda: list(self._threads.map(on_worker, range(len(self._workers)), self._workers)))

    def connect(self, endpoint):
        self.endpoints.append(endpoint)

        def connect(rank, worker):
            parallel = SimpleNamespace(rank=rank, world_size=len(self._workers), data_parallel_index=0)
            vllm_config = SimpleNamespace(parallel_config=parallel, model_config=None)
            worker.native = NativeReceiver(endpoint, None, vllm_config, torch.device("cpu"), None)

        return self._call(connect)

    def begin(self, version):
        def begin(_, worker):
            worker.accounts.begin()
            worker.received = {}

        return self._call(begin)

    def load(self, bucket):
        def receive(_, worker):
            def load(weights):
                weights = [(name, tensor.clone()) for name, tensor in weights]
                worker.accounts.account(weights)
                worker.received |= dict(weights)

            worker.accounts.error = worker.native.receive({} if self.refuses else bucket, load)

        return self._call(receive)

    def report(self):
        def report(_, worker):
            state = worker.accounts.state()
            if worker.native is not None:
                state |= {"endpoint": worker.native.token, "transport_error": worker.native.error}
            return {"error": worker.accounts.error, **worker.accounts.totals(), **state}

        return self._call(report)

    def commit(self, version):
        return self._call(lambda _, worker: self.served.__setitem__(version, dict(worker.received)))

    def abandon(self):
        return self._call(lambda _, worker: worker.accounts.abandon())


def push(sink, tensors, version):
    return publish(TensorSource(tensors), sink, version, torch.bfloat16, bucket_bytes=25_000)


def test_versions_go_through_vllms_own_nccl_classes_to_every_worker(wire):
    engines = [NativeEngine("a", num_workers=2), NativeEngine("b")]
    sink = FleetSink(lambda: engines, NativeTransport("nccl", host="127.0.0.1", timeout_s=10.0), timeout_s=10.0)
    for version in (1, 2):
        published = push(sink, random_tensors(version), version)
        assert published.failed == {}
        assert all(same(engine.served[version], random_tensors(version)) for engine in engines)
    assert len(published.checksum) == 32
    # Rank 0 sends; the workers of the first engine are ranks 1 and 2, that of the second is rank 3. Joined once.
    assert sorted(wire.queues) == [1, 2, 3]
    assert [len(engine.endpoints) for engine in engines] == [1, 1]
    infos = [engine.endpoints[0]["init_info"] for engine in engines]
    assert [info["rank_offset"] for info in infos] == [1, 3]
    assert {info["world_size"] for info in infos} == {4}
    assert all(info["packed"] for info in infos)

    engines.append(NativeEngine("c"))
    assert push(sink, random_tensors(3), 3).failed == {}
    assert same(engines[2].served[3], random_tensors(3))
    assert engines[2].endpoints[0]["init_info"]["world_size"] == 5
    sink.close()


def test_a_bucket_that_vllm_refuses_leaves_the_engine_out(wire):
    engines = [NativeEngine("a"), NativeEngine("b")]
    sink = FleetSink(lambda: engines, NativeTransport("nccl", host="127.0.0.1", timeout_s=10.0), timeout_s=10.0)
    push(sink, random_tensors(1), 1)
    load = engines[1].load
    engines[1].load = lambda bucket: load({**bucket, "update_info": {**bucket["update_info"], "shapes": []}})
    failed = push(sink, random_tensors(2), 2).failed
    assert "could not receive a bucket" in failed["b"]
    assert same(engines[0].served[2], random_tensors(2))
    sink.close()


def test_a_hang_of_the_communicator_ends_at_the_deadline(wire):
    engines = [NativeEngine("a")]
    transport = NativeTransport("nccl", host="127.0.0.1", timeout_s=0.5)
    sink = FleetSink(lambda: engines, transport, timeout_s=5.0)
    push(sink, random_tensors(1), 1)
    hang = threading.Event()
    transport._trainer.send_weights = lambda: hang.wait(30)
    with pytest.raises(WeightSyncError, match=r"sending bucket 0 by nccl must be done in 0\.5 s"):
        push(sink, random_tensors(2), 2)
    assert push(sink, random_tensors(3), 3).failed == {}
    hang.set()
    sink.close()


def test_a_failure_of_any_kind_is_named_and_not_taken_for_a_hang(wire):
    engines = [NativeEngine("a")]
    transport = NativeTransport("nccl", host="127.0.0.1", timeout_s=30.0)
    sink = FleetSink(lambda: engines, transport, timeout_s=30.0)
    push(sink, random_tensors(1), 1)
    transport._trainer.send_weights = lambda: {}["lost"]
    with pytest.raises(WeightSyncError, match="KeyError: 'lost'"):
        push(sink, random_tensors(2), 2)
    sink.close()


def rebuild_arguments():
    """What torch's reduce_tensor gives for a CUDA tensor; the handles are random bytes."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    size, stride, handle = torch.Size((3, 5)), (5, 1), bytes(range(64))
    arguments = (torch.Tensor, size, stride, 0, torch.storage.TypedStorage, torch.bfloat16, 0, handle, 30, 0, False)
    arguments += (b"counter", 7, b"event", True)
    assert len(arguments) == len(inspect.signature(rebuild_cuda_tensor).parameters)
    return arguments


def test_cuda_ipc_handles_travel_as_plain_values():
    import json

    handles = {"GPU-1": rebuild_arguments()}
    assert handles_from_plain(json.loads(json.dumps(handles_to_plain(handles)))) == handles
    assert handles_from_plain(handles_to_plain([handles, handles])) == [handles, handles]
    with pytest.raises(ValueError, match="can't hold class"):
        handles_from_plain({"GPU-1": [{"class": "Popen"}]})


def test_a_cuda_ipc_update_reaches_vllms_engine_as_its_trainer_made_it(monkeypatch):
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo

    received = []
    monkeypatch.setattr(IPCWeightTransferEngine, "receive_weights", lambda self, update: received.append((self.packed, update)))
    engine = NativeEngine("a")
    members = SimpleNamespace(
        names=lambda: ["a"], each=lambda what, call: {"a": call(engine).result(timeout=10)}, receivers=lambda: [engine]
    )
    client = FleetClient("cuda_ipc", "token", members, {"a": [{}]}, timeout_s=10.0)
    info = trainer_init_info("cuda_ipc", "127.0.0.1", 2)
    client.init_weight_transfer_engine({"packed": info.packed})
    client.announce = lambda bucket: [engine.load(bucket)]
    sent = IPCWeightTransferUpdateInfo(
        names=["w"], dtype_names=["bfloat16"], shapes=[[3, 5]], ipc_handles={"GPU-1": rebuild_arguments()}, tensor_sizes=[30]
    )
    client.update_weights(asdict(sent))
    assert engine.endpoints[0] == {"transport": "cuda_ipc", "token": "token", "init_info": {"packed": True}}
    assert received == [(True, sent)]


def test_the_adapters_are_what_vllm_asks_for():
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient, WeightSource

    client = FleetClient("nccl", "token", SimpleNamespace(names=list), {}, timeout_s=1.0)
    assert isinstance(client, VLLMWeightSyncClient)
    source = native.BucketSource()
    source.tensors = list(random_tensors(1).items())
    assert [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in iter(source)
    ]
    assert {"metadata", "__iter__"} >= WeightSource.__abstractmethods__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["nccl", "cuda_ipc"])
def test_without_cuda_they_are_refused_by_name(name):
    with pytest.raises(BackendUnavailableError, match=f"weight_transport={name} needs CUDA"):
        NativeTransport(name, host="127.0.0.1", timeout_s=1.0)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1000, 70_001])
def test_the_device_checksum_changes_with_any_byte_and_with_their_order(size, monkeypatch):
    from skyrl_mega.rollout.transport import checksum

    values = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    whole = device_checksum(values)
    assert device_checksum(torch.cat([values.new_zeros(3), values])[3:]) == whole  # wherever it lies
    monkeypatch.setattr(checksum, "DEVICE_WORDS", 64)
    assert device_checksum(values) == whole
    seen = {whole, device_checksum(torch.cat([values, values.new_zeros(1)]))}
    for place in {0, size // 2, size - 1} if size else ():
        other = values.clone()
        other[place] ^= 1
        seen.add(device_checksum(other))
    if size > 100:
        seen.add(device_checksum(torch.cat([values[8:16], values[:8], values[16:]])))
        seen.add(device_checksum(values.roll(1)))
    assert len(seen) == 2 + (len({0, size // 2, size - 1}) if size else 0) + (2 if size > 100 else 0)
