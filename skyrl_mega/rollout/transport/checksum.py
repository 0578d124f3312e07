"""Checksums of tensors: 64 bits over the bytes of one, and one line that stands for a whole set.

On CPU it is XXH3, which reads memory as fast as it comes (tens of GiB/s on one core), so both ends of a transport can
afford it over every byte. `copy_with_checksum` takes it of each piece of a copy while the piece is still in the cache. On
a GPU, where the bytes never reach the host, it is a weighted sum modulo 2^64 of the 8-byte words, taken on the device: word
i counts odd weight times, a different one for each i, so that a changed word always shows, and swapped ones do.

Both are order-sensitive: shifted bytes and zeroed pages change them. The joint checksum hashes names, dtypes and shapes
along with the sums, so two tensors that swapped places change it too. It guards against accidents, not against an
adversary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import torch

#: (name, dtype name such as "bfloat16", shape, tensor checksum)
ChecksumEntry = tuple[str, str, tuple[int, ...], str]

#: Half of a core's second-level cache: what was just copied is still there when it is summed.
PIECE_BYTES = 512 * 1024
#: 8-byte words that are summed at once on a GPU: bounds the temporary memory to a few times 64 MiB.
DEVICE_WORDS = 8 * 2**20
#: 2^64 divided by the golden ratio, odd, as a signed number: multiples of it differ in high and low bits.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def tensor_checksum(tensor: torch.Tensor) -> str:
    """16 hex digits over the bytes of a contiguous tensor of any dtype, in memory order. Shape and dtype do not count.

    CPU and GPU sums of the same bytes differ: both ends of a transport see the same kind of device.
    """
    import torch

    values = tensor.detach().reshape(-1).view(torch.uint8)
    if values.device.type != "cpu":
        return device_checksum(values)
    return xxhash.xxh3_64_hexdigest(values.numpy().data)


def copy_with_checksum(target: torch.Tensor, tensor: torch.Tensor) -> tuple[str, float]:
    """Copies `tensor` (any device, any strides) to `target`, uint8 on CPU and as many bytes.

    Returns (`tensor_checksum(target)`, the seconds that took). The sum is of what was written, not of what was to be.
    """
    import numpy as np
    import torch

    tensor = tensor.detach()
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        started = time.perf_counter()
        return tensor_checksum(target), time.perf_counter() - started
    source, written = tensor.reshape(-1).view(torch.uint8).numpy(), target.numpy()
    digest, checksum_s = xxhash.xxh3_64(), 0.0
    for start in range(0, len(written), PIECE_BYTES):
        piece = written[start : start + PIECE_BYTES]
        np.copyto(piece, source[start : start + PIECE_BYTES])
        copied = time.perf_counter()
        digest.update(piece.data)
        checksum_s += time.perf_counter() - copied
    return digest.hexdigest(), checksum_s


def device_checksum(values: torch.Tensor) -> str:
    """16 hex digits over a uint8 tensor on any device, computed there; one number travels to the host."""
    import torch

    num_words = values.numel() // 8
    rest = torch.zeros(8, dtype=torch.uint8, device=values.device)
    rest[: values.numel() - 8 * num_words] = values[8 * num_words :]
    whole = values[: 8 * num_words]
    is_aligned = whole.data_ptr() % 8 == 0 and whole.storage_offset() % 8 == 0
    words = (whole if is_aligned else whole.clone()).view(torch.int64)
    total = rest.view(torch.int64)[0] * _signed(2 * num_words * GOLDEN + 1)
    for start in range(0, num_words, DEVICE_WORDS):
        part = words[start : start + DEVICE_WORDS]
        weights = torch.arange(start, start + part.numel(), dtype=torch.int64, device=values.device).mul_(GOLDEN).mul_(2).add_(1)
        total = total + weights.mul_(part).sum()
    return f"{(int(total) * GOLDEN + values.numel()) % 2**64:016x}"


def _signed(number: int) -> int:
    """`number` modulo 2^64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63


def joint_checksum(entries: Iterable[ChecksumEntry]) -> str:
    """32 hex digits over names, dtypes, shapes and checksums; the order of the entries does not count."""
    digest = xxhash.xxh3_128()
    for name, dtype, shape, checksum in sorted(entries):
        digest.update(json.dumps([name, dtype, list(shape), checksum]).encode() + b"\n")
    return digest.hexdigest()
