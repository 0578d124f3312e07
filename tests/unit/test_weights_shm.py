"""Buckets in a shared-memory file: what is written is read, and no file outlives its writer."""

import multiprocessing
import os

import pytest
import torch

from skyrl_mega.errors import WeightSyncError
from skyrl_mega.rollout.transport.checksum import tensor_checksum
from skyrl_mega.rollout.transport.shm import ALIGNMENT, BucketLayout, ShmBucketReader, ShmBucketWriter, remove_stale_files


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return [
        ("a", torch.randn(7, 3, generator=generator)),
        ("b", torch.randn(5, 5, generator=generator).to(torch.bfloat16)),
        ("c", torch.randn(4, 6, generator=generator).t()),
        ("d", torch.tensor(3.5)),
    ]


@pytest.fixture
def writer(tmp_path):
    writer = ShmBucketWriter(tmp_path)
    yield writer
    writer.close()


def test_a_bucket_is_read_as_it_was_written(writer):
    layout = BucketLayout.from_plain(writer.write(some_tensors()).to_plain())
    for (name, read), (written_name, written) in zip(ShmBucketReader().read(layout), some_tensors(), strict=True):
        assert name == written_name
        assert read.dtype == written.dtype
        assert torch.equal(read, written)
    assert all(slot.offset % ALIGNMENT == 0 for slot in layout.slots)
    assert [slot.checksum for slot in layout.slots] == [tensor_checksum(tensor) for _, tensor in some_tensors()]


def test_one_file_serves_growing_and_shrinking_buckets(writer):
    reader = ShmBucketReader()
    for numel in (10, 100_000, 1_000, 200_000):
        expected = torch.arange(numel, dtype=torch.float32)
        layout = writer.write([("t", expected)])
        ((_, read),) = reader.read(layout)
        assert torch.equal(read, expected)
        assert reader.is_view(read)
        assert not reader.is_view(read.clone())
    assert len(list(writer.path.parent.iterdir())) == 1


def test_a_reader_notices_a_file_that_is_gone_or_too_short(writer):
    layout = writer.write(some_tensors())
    short = BucketLayout(layout.path, 1 << 30, layout.slots)
    with pytest.raises(WeightSyncError, match=f"must hold {1 << 30} bytes"):
        list(ShmBucketReader().read(short))
    writer.close()
    with pytest.raises(WeightSyncError, match="is gone"):
        list(ShmBucketReader().read(layout))


def test_close_removes_the_file_and_may_be_called_twice(tmp_path):
    writer = ShmBucketWriter(tmp_path)
    writer.write(some_tensors())
    writer.close()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def write_and_die(directory):
    ShmBucketWriter(directory).write(some_tensors())
    os.kill(os.getpid(), 9)


def test_files_of_killed_writers_are_removed_and_those_of_live_ones_stay(tmp_path, writer):
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(tmp_path,))
    process.start()
    process.join()
    left_behind = [path for path in tmp_path.iterdir() if path != writer.path]
    assert len(left_behind) == 1
    second = ShmBucketWriter(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([writer.path, second.path])
    second.close()
    assert remove_stale_files(tmp_path) == []


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs /dev/shm, whose size is known to be limited")
def test_a_bucket_that_does_not_fit_is_an_error_that_names_the_remedy():
    size = os.statvfs("/dev/shm")
    too_many_bytes = 2 * size.f_blocks * size.f_frsize  # more than the whole: refused before a page is claimed
    writer = ShmBucketWriter()
    try:
        with pytest.raises(WeightSyncError, match=r"lower rollout\.weight_bucket_mib"):
            writer._reserve(too_many_bytes)
    finally:
        writer.close()
