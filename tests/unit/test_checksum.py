"""Checksums catch what goes wrong in a transport, and nothing else."""

import pytest
import torch

from skyrl_mega.rollout.transport.checksum import joint_checksum, tensor_checksum


@pytest.fixture
def tensor():
    return torch.randn(64, 96, generator=torch.Generator().manual_seed(0))


def test_equal_bytes_have_equal_checksums_whatever_the_strides_were(tensor):
    assert tensor_checksum(tensor) == tensor_checksum(tensor.clone())
    assert tensor_checksum(tensor.t().contiguous().t()) == tensor_checksum(tensor)


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("position", [0, 12_345, 64 * 96 * 4 - 1])
def test_one_flipped_bit_changes_it(tensor, position, bit):
    flipped = tensor.clone()
    flipped.view(-1).view(torch.uint8)[position] ^= 1 << bit
    assert tensor_checksum(flipped) != tensor_checksum(tensor)


def test_shifted_bytes_zeroed_pages_and_swapped_rows_change_it(tensor):
    damaged = [
        tensor.view(-1).view(torch.uint8).roll(1),
        torch.where(torch.arange(64)[:, None] < 32, tensor, 0.0),
        tensor[torch.arange(63, -1, -1)],
    ]
    assert len({tensor_checksum(t) for t in [tensor, *damaged]}) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.uint8])
def test_any_dtype_and_shape_has_one(dtype):
    sums = [tensor_checksum(torch.ones(shape, dtype=dtype)) for shape in [(), (3,), (2, 2), (0,)]]
    assert len(set(sums)) == 4


def test_the_joint_checksum_knows_names_dtypes_and_shapes():
    a, b = ("a", "float32", (2, 3), "1" * 16), ("b", "float32", (2, 3), "2" * 16)
    whole = joint_checksum([a, b])
    assert whole == joint_checksum([b, a])
    others = [
        [("a", *b[1:]), ("b", *a[1:])],  # swapped tensors
        [a],
        [a, ("b", "bfloat16", (2, 3), "2" * 16)],
        [a, ("b", "float32", (3, 2), "2" * 16)],
        [a, ("c", *b[1:])],
    ]
    assert len({whole, *map(joint_checksum, others)}) == 6
