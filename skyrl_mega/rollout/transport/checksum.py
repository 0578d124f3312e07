"""Checksums of tensors: 64 bits over the bytes of one, and one line that stands for a whole set.

XXH3 reads memory as fast as it comes (tens of GiB/s on one core), so both ends of a transport can afford to compute it
over every byte. It is order-sensitive: shifted bytes and zeroed pages change it. The joint checksum hashes names, dtypes
and shapes along with the sums, so two tensors that swapped places change it too. It guards against accidents, not
against an adversary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import torch

#: (name, dtype name such as "bfloat16", shape, tensor checksum)
ChecksumEntry = tuple[str, str, tuple[int, ...], str]


def tensor_checksum(tensor: torch.Tensor) -> str:
    """16 hex digits over the bytes of a contiguous CPU tensor of any dtype, in memory order. Shape and dtype do not count."""
    import torch

    return xxhash.xxh3_64_hexdigest(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


def joint_checksum(entries: Iterable[ChecksumEntry]) -> str:
    """32 hex digits over names, dtypes, shapes and checksums; the order of the entries does not count."""
    digest = xxhash.xxh3_128()
    for name, dtype, shape, checksum in sorted(entries):
        digest.update(json.dumps([name, dtype, list(shape), checksum]).encode() + b"\n")
    return digest.hexdigest()
