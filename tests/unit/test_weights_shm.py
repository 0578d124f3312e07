"""Shared-memory files of weight buckets: what is written is read, and no file outlives its writer."""

import multiprocessing
import os

import pytest
import torch

from skyrl_mega.errors import WeightSyncError
from skyrl_mega.rollout.transport.checksum import tensor_checksum
from skyrl_mega.rollout.transport.encode import FullEncoder
from skyrl_mega.rollout.transport.host import HostTransport
from skyrl_mega.rollout.transport.layout import ALIGNMENT, Bucket
from skyrl_mega.rollout.transport.receiver import BucketReceiver
from skyrl_mega.rollout.transport.shm import ShmCarrier, ShmFile, ShmReader, remove_stale_files


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return [
        ("a", torch.randn(7, 3, generator=generator)),
        ("b", torch.randn(5, 5, generator=generator).to(torch.bfloat16)),
        ("c", torch.randn(4, 6, generator=generator).t()),
        ("d", torch.tensor(3.5)),
        ("e", torch.empty(0, 4)),
        ("f", torch.randn(700_001, generator=generator)),
    ]


@pytest.fixture
def carrier(tmp_path):
    carrier = ShmCarrier(tmp_path)
    yield carrier
    carrier.close()


def announced(transport, sequence, tensors):
    buckets = []
    transport.send(sequence, tensors, buckets.append)
    return buckets[0]


def test_a_bucket_is_read_as_it_was_written(carrier):
    plain = announced(HostTransport(carrier, FullEncoder()), 0, some_tensors())
    receiver = BucketReceiver()
    receiver.begin()
    received = receiver.receive(plain)
    assert receiver.error == ""
    for (name, read), (written_name, written) in zip(received, some_tensors(), strict=True):
        assert name == written_name
        assert read.dtype == written.dtype
        assert torch.equal(read, written)
    slots = Bucket.from_plain(plain).slots
    assert all(slot.offset % ALIGNMENT == 0 for slot in slots)
    assert [slot.checksum for slot in slots] == [tensor_checksum(tensor.contiguous()) for _, tensor in some_tensors()]


def test_a_bucket_that_is_out_of_turn_is_refused_and_a_repeated_one_is_dropped(carrier):
    transport, receiver = HostTransport(carrier, FullEncoder()), BucketReceiver()
    receiver.begin()
    first, second = (announced(transport, sequence, some_tensors()) for sequence in (0, 1))
    assert len(receiver.receive(first)) == len(some_tensors())
    assert receiver.receive(first) == []
    assert receiver.error == ""
    assert receiver.receive({**second, "sequence": 2}) == []
    assert receiver.error == "bucket 2 came where bucket 1 was due."


def test_two_buckets_lie_in_two_files_that_grow_and_stay(carrier, tmp_path):
    reader = ShmReader()
    for sequence, size in enumerate((10, 100_000, 1_000, 200_000, 5)):
        carrier.room(sequence, size)[:size] = sequence
        assert torch.equal(reader.read(carrier.path(sequence), size), torch.full((size,), sequence, dtype=torch.uint8))
    assert reader.read(carrier.path(3), 200_000)[-1] == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_reader_notices_a_file_that_is_gone_or_too_short(carrier):
    carrier.room(0, 100)
    with pytest.raises(WeightSyncError, match=f"must hold {1 << 30} bytes"):
        ShmReader().read(carrier.path(0), 1 << 30)
    path = carrier.path(0)
    carrier.close()
    with pytest.raises(WeightSyncError, match="is gone"):
        ShmReader().read(path, 100)


def test_a_reader_lets_go_of_the_files_of_a_writer_that_is_gone(tmp_path, carrier):
    reader, before = ShmReader(), ShmCarrier(tmp_path)
    before.room(0, 100)
    reader.read(before.path(0), 100)
    before.close()
    carrier.room(0, 100)
    reader.read(carrier.path(0), 100)
    assert list(reader._mapped) == [carrier.path(0)]


def test_close_removes_the_files_and_may_be_called_twice(tmp_path):
    carrier = ShmCarrier(tmp_path)
    carrier.room(0, 100)
    carrier.close()
    carrier.close()
    assert list(tmp_path.iterdir()) == []


def write_and_die(directory):
    ShmCarrier(directory).room(0, 100)
    os.kill(os.getpid(), 9)


def test_files_of_killed_writers_are_removed_and_those_of_live_ones_stay(tmp_path, carrier):
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(tmp_path,))
    process.start()
    process.join()
    alive = {carrier.path(0), carrier.path(1)}
    assert len({str(path) for path in tmp_path.iterdir()} - alive) == 2
    second = ShmCarrier(tmp_path)
    assert {str(path) for path in tmp_path.iterdir()} == alive | {second.path(0), second.path(1)}
    second.close()
    assert remove_stale_files(tmp_path) == []


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs /dev/shm, whose size is known to be limited")
def test_a_bucket_that_does_not_fit_is_an_error_that_names_the_remedy(tmp_path):
    from pathlib import Path

    size = os.statvfs("/dev/shm")
    too_many_bytes = 2 * size.f_blocks * size.f_frsize  # more than the whole: refused before a page is claimed
    file = ShmFile(Path("/dev/shm"))
    try:
        with pytest.raises(WeightSyncError, match=r"lower rollout\.weight_bucket_mib"):
            file.room(too_many_bytes)
    finally:
        file.close()
