"""One version to many engines: whole or not at all for each, and nobody's failure is another's."""

import re
import threading

import pytest
import torch

from helpers.weight_fleet import ReceivingEngine, TensorSource, fleet, random_tensors, same
from skyrl_mega.errors import WeightSyncError
from skyrl_mega.rollout.transport import encode, gloo_group
from skyrl_mega.weights.fleet_sink import FleetSink
from skyrl_mega.weights.publish import publish

BUCKET_BYTES = 25_000  # two tensors of random_tensors
TRANSPORTS = ("shm", "gloo")


def push(sink, tensors, version):
    return publish(TensorSource(tensors), sink, version, torch.bfloat16, bucket_bytes=BUCKET_BYTES)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_worker_of_every_engine_receives_every_version(transport, delta, tmp_path):
    engines = [ReceivingEngine("a", num_workers=2), ReceivingEngine("b")]
    first, second = random_tensors(1), random_tensors(2)
    with fleet(engines, transport, delta=delta, directory=tmp_path) as sink:
        published = push(sink, first, 1)
        push(sink, second, 2)
    for engine in engines:
        assert same(engine.served[1], first)
        assert same(engine.served[2], second)
    assert published.failed == {}
    assert published.num_tensors == len(first)
    assert published.size_bytes == sum(2 * tensor.numel() for tensor in first.values())
    phases = {"gather", "start", "pack", "checksum", "wait", "load", "load_unhidden", "finish", "total", "worker_checksum"}
    assert phases <= published.seconds.keys()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("fault", ["dies_at", "hangs_at", "damages"])
@pytest.mark.parametrize("bucket", [0, 2, 3])
def test_one_engine_that_fails_is_left_out_and_the_others_serve_the_version(transport, fault, bucket, tmp_path):
    engines = [ReceivingEngine("a"), ReceivingEngine("b", **{fault: bucket}), ReceivingEngine("c")]
    tensors = random_tensors(1)
    with fleet(engines, transport, timeout_s=2.0, directory=tmp_path) as sink:
        published = push(sink, tensors, 1)
        assert list(published.failed) == ["b"]
        words = {"dies_at": "b is dead|b died", "hangs_at": "within 2 s", "damages": "checksum of layer"}
        assert re.search(words[fault], published.failed["b"])
        assert same(engines[0].served[1], tensors)
        assert same(engines[2].served[1], tensors)
        assert engines[1].served == {}

        # Its place is taken by a new engine; the next version reaches all three.
        engines[1].released.set()
        engines[1] = ReceivingEngine("b")
        assert push(sink, random_tensors(2), 2).failed == {}
        assert all(same(engine.served[2], random_tensors(2)) for engine in engines)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_when_no_engine_is_left_it_is_an_error_with_every_reason(transport, tmp_path):
    engines = [ReceivingEngine("a", dies_at=1), ReceivingEngine("b", damages=0)]
    with fleet(engines, transport, timeout_s=3.0, directory=tmp_path) as sink:
        with pytest.raises(WeightSyncError, match=r"no engine received weight version 1: .*a died.*checksum of layer"):
            push(sink, random_tensors(1), 1)
        assert engines[1].calls[-1] == "abandon"
        engines[0] = ReceivingEngine("a")
        assert push(sink, random_tensors(2), 2).failed == {}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_abandoned_version_leaves_the_sink_able_to_push_the_next(transport, tmp_path):
    class Breaks(TensorSource):
        def iter_weights(self, dtype):
            for index, item in enumerate(self.tensors.items()):
                if index == 6:
                    raise ValueError("the gather failed")
                yield item

    engines = [ReceivingEngine("a"), ReceivingEngine("b")]
    with fleet(engines, transport, delta=True, directory=tmp_path) as sink:
        push(sink, random_tensors(1), 1)
        with pytest.raises(ValueError, match="the gather failed"):
            publish(Breaks(random_tensors(2)), sink, 2, torch.bfloat16, bucket_bytes=BUCKET_BYTES)
        assert [engine.calls[-1] for engine in engines] == ["abandon", "abandon"]
        assert push(sink, random_tensors(3), 3).failed == {}
    assert all(same(engine.served[3], random_tensors(3)) and 2 not in engine.served for engine in engines)


def test_a_fleet_that_grows_and_shrinks_is_reached_whole(tmp_path):
    a, b = ReceivingEngine("a"), ReceivingEngine("b")
    engines = [a]
    with fleet(engines, "gloo", directory=tmp_path) as sink:
        push(sink, random_tensors(1), 1)
        engines.append(b)
        push(sink, random_tensors(2), 2)
        engines.remove(a)
        push(sink, random_tensors(3), 3)
        engines.append(a)
    assert sorted(a.served) == [1, 2]
    assert sorted(b.served) == [2, 3]
    a.close()


def test_the_next_bucket_is_packed_while_the_last_is_loaded_and_not_the_one_after(tmp_path):
    """Two buffers: the third `put` waits for the first bucket to be loaded."""
    engine = ReceivingEngine("a", hangs_at=0)
    tensors = random_tensors(1)
    with fleet([engine], "shm", directory=tmp_path) as sink:
        sink.start(1, [(name,) for name in tensors])
        items = list(tensors.items())
        sink.put(items[:2])
        sink.put(items[2:4])
        third = threading.Thread(target=sink.put, args=(items[4:],))
        third.start()
        third.join(timeout=0.3)
        assert third.is_alive()
        engine.released.set()
        third.join(timeout=10)
        assert not third.is_alive()
        assert sink.finish().failed == {}
    assert same(engine.served[1], tensors)


def test_versions_by_two_transports_in_turn_do_not_take_each_others_messages(tmp_path):
    engine = ReceivingEngine("a")
    with fleet([engine], "gloo") as by_gloo, fleet([], "shm", directory=tmp_path) as other:
        by_shm = FleetSink(lambda: [engine], other._transport, timeout_s=20.0)
        for version in range(1, 7):
            push(by_gloo if version % 2 else by_shm, random_tensors(version), version)
    assert all(same(engine.served[version], random_tensors(version)) for version in range(1, 7))


def test_a_bucket_of_more_pieces_than_a_header_places_arrives_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(encode, "LENT_BYTES", 1)  # every tensor a piece of its own
    monkeypatch.setattr(gloo_group, "MAX_PIECES", 2)
    engine, tensors = ReceivingEngine("a", num_workers=2), random_tensors(1)
    with fleet([engine], "gloo", directory=tmp_path) as sink:
        publish(TensorSource(tensors), sink, 1, torch.bfloat16, bucket_bytes=5 * BUCKET_BYTES // 2)
    assert same(engine.served[1], tensors)


def test_two_engines_of_one_name_are_refused(tmp_path):
    engines = [ReceivingEngine("a"), ReceivingEngine("a")]
    with fleet(engines, "shm", directory=tmp_path) as sink, pytest.raises(WeightSyncError, match="a name of its own"):
        push(sink, random_tensors(1), 1)


def test_an_engine_whose_workers_do_not_all_report_is_left_out(tmp_path):
    class HalfReporting(ReceivingEngine):
        def report(self):
            return self._call("report", lambda w: {"error": "", **w.totals(), **w.state(), "num_workers": 2})

    with fleet([HalfReporting("a"), ReceivingEngine("b")], "shm", directory=tmp_path) as sink:
        assert push(sink, random_tensors(1), 1).failed == {"a": "it refused weight version 1: 1 of its 2 workers reported"}
