"""Publishing a version: what each rank does when all goes well, and when it does not."""

import pytest
import torch

from skyrl_mega.errors import WeightSyncError
from skyrl_mega.types import WeightVersion
from skyrl_mega.weights.publish import publish


class CountingSource:
    """Six tensors; `gathered` counts how far its (collective) stream was followed."""

    names = tuple(f"layer{i}" for i in range(6))

    def __init__(self):
        self.gathered = 0

    def fused_groups(self):
        return [(name,) for name in self.names]

    def iter_weights(self, dtype):
        for name in self.names:
            self.gathered += 1
            yield name, torch.zeros(4, dtype=dtype)


class RecordingSink:
    def __init__(self, *, fails_in=""):
        self.calls, self.fails_in = [], fails_in

    def _record(self, call, *what):
        self.calls.append((call, *what))
        if call == self.fails_in:
            raise WeightSyncError(f"{call} failed")

    def start(self, version, groups):
        self._record("start", version, len(groups))

    def put(self, tensors):
        self._record("put", [name for name, _ in tensors])

    def finish(self):
        self._record("finish")
        return WeightVersion(7, 6, 96, "c", {"write": 1.0})

    def abort(self):
        self.calls.append(("abort",))


def test_the_rank_with_a_sink_sends_whole_buckets_and_reports_phases():
    source, sink = CountingSource(), RecordingSink()
    published = publish(source, sink, 7, torch.float32, bucket_bytes=64)
    assert sink.calls == [("start", 7, 6), ("put", list(source.names[:4])), ("put", list(source.names[4:])), ("finish",)]
    assert published.version == 7
    assert published.seconds["write"] == 1.0
    assert published.seconds["total"] >= published.seconds["gather"] >= 0.0


def test_a_rank_without_a_sink_follows_the_whole_stream():
    source = CountingSource()
    assert publish(source, None, 7, torch.float32, bucket_bytes=64) is None
    assert source.gathered == 6


@pytest.mark.parametrize("fails_in", ["start", "put", "finish"])
def test_a_refusal_aborts_the_sink_and_drains_the_stream_before_it_is_raised(fails_in):
    source, sink = CountingSource(), RecordingSink(fails_in=fails_in)
    with pytest.raises(WeightSyncError, match=f"{fails_in} failed"):
        publish(source, sink, 7, torch.float32, bucket_bytes=16)
    assert source.gathered == 6
    assert sink.calls[-1] == ("abort",)


def test_an_error_of_the_source_aborts_the_sink():
    class BrokenSource(CountingSource):
        def iter_weights(self, dtype):
            yield "layer0", torch.zeros(4)
            raise ValueError("gather failed")

    sink = RecordingSink()
    with pytest.raises(ValueError, match="gather failed"):
        publish(BrokenSource(), sink, 7, torch.float32, bucket_bytes=16)
    assert sink.calls[-1] == ("abort",)
