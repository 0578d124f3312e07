"""What one bucket of weights looks like on its way: plain values that any RPC carries, beside the bytes themselves.

A bucket is announced to every engine as a dict (`Bucket.to_plain`) and its bytes travel by another road: a shared file, a
broadcast. Each tensor has a slot: where its bytes begin in the payload, how many they are, and what they must sum to.

`encoding` says how to read the payload:

- "full": tensor bytes, each tensor at a multiple of 64;
- "kept": the same, and the receiver keeps a copy of them, for the differences that follow;
- "delta": differences to what the receiver keeps (`delta`); checksums are those of the tensors they make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skyrl_mega.rollout.transport.checksum import ChecksumEntry

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of a bucket. `dtype` is torch's name without "torch."; `size_bytes` are the tensor's.

    Its bytes in the payload begin at `offset`; they are `encoded_bytes` many.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    encoded_bytes: int
    checksum: str

    @property
    def checksum_entry(self) -> ChecksumEntry:
        return (self.name, self.dtype, self.shape, self.checksum)


@dataclass(frozen=True)
class Bucket:
    """The announcement of a bucket. `sequence` counts the buckets of a version from 0; `path` is empty without a file."""

    sequence: int
    transport: str
    encoding: str
    size_bytes: int
    slots: tuple[TensorSlot, ...]
    path: str = ""

    def to_plain(self) -> dict[str, Any]:
        """Nested dicts, lists, strings and ints, for RPC."""
        slots = [{**vars(slot), "shape": list(slot.shape)} for slot in self.slots]
        return {**vars(self), "slots": slots}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Bucket:
        """Inverse of `to_plain`."""
        slots = tuple(TensorSlot(**{**slot, "shape": tuple(slot["shape"])}) for slot in plain["slots"])
        return cls(**{**plain, "slots": slots})


def dtype_name(tensor: torch.Tensor) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(tensor.dtype).removeprefix("torch.")


def place(sizes_bytes: Sequence[int]) -> tuple[list[int], int]:
    """(offset of each, bytes of all) where every one begins at a multiple of ALIGNMENT."""
    offsets, end = [], 0
    for size in sizes_bytes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


def view_slot(payload: torch.Tensor, slot: TensorSlot) -> torch.Tensor:
    """The slot's tensor as a view of `payload`, uint8 with the tensor's own bytes at the slot's offset."""
    import torch

    values = payload[slot.offset : slot.offset + slot.size_bytes]
    return values.view(getattr(torch, slot.dtype)).view(slot.shape)
