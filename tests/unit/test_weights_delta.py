"""Differences of weights: exact for every dtype, small where little changed, refused where the base is another one."""

import pytest
import torch
import zstandard

from helpers.weight_fleet import ReceivingEngine, TensorSource, fleet, random_tensors, same
from skyrl_mega.errors import WeightSyncError
from skyrl_mega.rollout.transport.delta import (
    BLOCK_ELEMENTS,
    ENTRY_BYTES,
    SAME,
    SPARSE,
    XOR,
    ZSTD,
    apply_difference,
    encode_difference,
)
from skyrl_mega.weights.publish import publish


def changed(tensor, share, seed=0):
    """A copy in which `share` of the elements are others."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(tensor.shape, generator=generator) < share
    return torch.where(mask, torch.randn(tensor.shape, generator=generator).to(tensor.dtype), tensor)


def difference(current, base):
    return b"".join(encode_difference(current, base, zstandard.ZstdCompressor(level=1)))


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(3, 50_000), (1,), (), (0, 4)])
def test_a_difference_makes_the_new_tensor_of_the_old_one(dtype, share, shape):
    base = torch.randn(shape).mul(50).to(dtype)
    current = changed(base, share)
    patched = base.clone()
    apply_difference(patched, torch.frombuffer(bytearray(difference(current, base) + b"rest"), dtype=torch.uint8))
    assert torch.equal(bytes_of(patched), bytes_of(current))


def test_nan_and_signed_zero_survive():
    base = torch.tensor([0.0, 1.0, float("nan"), 2.0])
    current = torch.tensor([-0.0, float("nan"), float("nan"), float("inf")])
    patched = base.clone()
    apply_difference(patched, torch.frombuffer(bytearray(difference(current, base)), dtype=torch.uint8))
    assert torch.equal(bytes_of(patched), bytes_of(current))


def test_each_block_takes_its_smallest_form():
    base = torch.randn(4 * BLOCK_ELEMENTS)
    current = base.clone()
    current[BLOCK_ELEMENTS + 7] = 1.0
    current[2 * BLOCK_ELEMENTS : 3 * BLOCK_ELEMENTS] *= -1.0  # one and the same bit of every element
    random_bits = torch.randint(-(2**31), 2**31 - 1, (BLOCK_ELEMENTS,), dtype=torch.int32)
    current[3 * BLOCK_ELEMENTS :] = (current[3 * BLOCK_ELEMENTS :].view(torch.int32) ^ random_bits).view(torch.float32)
    table = difference(current, base)[: 4 * ENTRY_BYTES]
    kinds = [table[i * ENTRY_BYTES] for i in range(4)]
    sizes = [int.from_bytes(table[i * ENTRY_BYTES + 1 : (i + 1) * ENTRY_BYTES], "little") for i in range(4)]
    assert kinds == [SAME, SPARSE, ZSTD, XOR]
    assert sizes[:2] == [0, 6]
    assert sizes[2] < 1000
    assert sizes[3] == 4 * BLOCK_ELEMENTS


@pytest.mark.parametrize("damage", [lambda e: e[:-3], lambda e: b"\x09" + e[1:], lambda e: e[:40] + b"x" * 40 + e[80:]])
def test_a_damaged_difference_is_refused(damage):
    base = torch.randn(BLOCK_ELEMENTS)
    encoded = damage(difference(changed(base, 0.9), torch.zeros_like(base).copy_(base)))
    with pytest.raises(WeightSyncError, match="damaged"):
        apply_difference(base.clone(), torch.frombuffer(bytearray(encoded), dtype=torch.uint8)[:60])


def push(sink, tensors, version):
    return publish(TensorSource(tensors), sink, version, torch.bfloat16, bucket_bytes=25_000)


def test_only_what_changed_travels_and_a_new_engine_makes_the_push_a_full_one(tmp_path):
    engines = [ReceivingEngine("a")]
    first = random_tensors(1)
    second = {name: changed(tensor, 0.01) for name, tensor in first.items()}
    third = {name: changed(tensor, 0.01, seed=1) for name, tensor in second.items()}
    with fleet(engines, "shm", delta=True, directory=tmp_path) as sink:
        push(sink, first, 1)
        full = sink.payload_bytes
        push(sink, second, 2)
        assert sink.payload_bytes < 0.1 * full
        engines.append(ReceivingEngine("b"))
        push(sink, third, 3)
        assert sink.payload_bytes == full
        push(sink, first, 4)
        assert sink.payload_bytes < 0.2 * full
    for engine in engines:
        assert same(engine.served[3], third)
        assert same(engine.served[4], first)
    assert same(engines[0].served[2], second)


def test_after_an_abandoned_version_nobody_builds_on_it(tmp_path):
    engine = ReceivingEngine("a")
    first = random_tensors(1)
    with fleet([engine], "shm", delta=True, directory=tmp_path) as sink:
        push(sink, first, 1)
        full = sink.payload_bytes
        sink.start(2, [(name,) for name in first])
        name = next(iter(first))
        sink.put([(name, first[name] + 1)])
        sink.abort()
        push(sink, first, 3)
        assert sink.payload_bytes == full
    assert same(engine.served[3], first)


def test_a_receiver_whose_copy_was_damaged_refuses_and_gets_a_full_push_next(tmp_path):
    engine, whole = ReceivingEngine("a"), ReceivingEngine("b")
    first, second = random_tensors(1), random_tensors(2)
    with fleet([engine, whole], "shm", delta=True, directory=tmp_path) as sink:
        push(sink, first, 1)
        bytes_of(engine.workers[0]._base["layer3"])[17] ^= 1
        assert "checksum of layer3" in push(sink, second, 2).failed["a"]
        assert same(whole.served[2], second)
        assert push(sink, second, 3).failed == {}
    assert same(engine.served[3], second)


def test_a_tensor_of_another_shape_can_not_be_a_difference(tmp_path):
    with fleet([ReceivingEngine("a")], "shm", delta=True, directory=tmp_path) as sink:
        push(sink, random_tensors(1), 1)
        with pytest.raises(WeightSyncError, match=r"layer0 must .* the shape and dtype"):
            push(sink, random_tensors(1, numel=5001), 2)
        push(sink, random_tensors(1, numel=5001), 3)
