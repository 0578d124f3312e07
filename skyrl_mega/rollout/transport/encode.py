"""Tensors into the payload of a bucket: the sender's half of the encodings, beside `delta`'s.

An encoder is asked for an upper bound of a bucket's bytes, so that its carrier (file, buffer) can make room, and then writes
the bucket into that room, with a slot per tensor. It keeps the accounts of the version: what the engines must report, and
the seconds spent writing (`write_s`), of which `checksum_s` went to checksums.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from skyrl_mega.rollout.transport.checksum import ChecksumEntry, copy_with_checksum, joint_checksum, tensor_checksum
from skyrl_mega.rollout.transport.layout import TensorSlot, dtype_name, place

if TYPE_CHECKING:
    import torch

NamedTensors = Sequence[tuple[str, "torch.Tensor"]]

#: Tensors from this size on are not copied where the carrier can send them from where they lie.
LENT_BYTES = 2**20


@dataclass(frozen=True)
class Written:
    """A bucket's payload: `size_bytes` long, a slot per tensor, made of `pieces`, (offset, uint8 tensor on CPU).

    The checksum of a slot is "" until `sum_lent`, if its tensor is a piece of its own, uncopied.
    """

    size_bytes: int
    slots: tuple[TensorSlot, ...]
    pieces: tuple[tuple[int, torch.Tensor], ...]


class FullEncoder:
    """Every byte of every tensor."""

    needs_base = False

    def __init__(self, *, lends: bool = False) -> None:
        """`lends`: large tensors become pieces of their own, uncopied; they must stay as they are until the version ends."""
        self._lends = lends
        self.begin([])

    @property
    def encoding(self) -> str:
        return "full"

    def begin(self, bases: Sequence[str]) -> None:
        """Opens the accounts of a version. `bases`: what each engine keeps (`receiver.BucketReceiver.state`); not used here."""
        self._entries: list[ChecksumEntry] = []
        self._size_bytes = 0
        self.payload_bytes = 0
        self.write_s = 0.0
        self.checksum_s = 0.0

    def bound(self, tensors: NamedTensors) -> int:
        """Bytes that `write` may need."""
        return place([_size_bytes(tensor) for _, tensor in tensors])[1]

    def write(self, tensors: NamedTensors, buffer: torch.Tensor) -> Written:
        """Writes a bucket into `buffer` (uint8 on CPU, as long as `bound` says)."""
        import torch

        started = time.perf_counter()
        offsets, end = place([_size_bytes(tensor) for _, tensor in tensors])
        slots: list[TensorSlot] = []
        lent: list[tuple[int, torch.Tensor]] = []
        for (name, tensor), offset in zip(tensors, offsets, strict=True):
            size = _size_bytes(tensor)
            if self._lends and size >= LENT_BYTES and tensor.device.type == "cpu" and tensor.is_contiguous():
                checksum, checksum_s = "", 0.0
                lent.append((offset, tensor.detach().reshape(-1).view(torch.uint8)))
            else:
                checksum, checksum_s = copy_with_checksum(buffer[offset : offset + size], tensor)
            self.checksum_s += checksum_s
            slots.append(TensorSlot(name, dtype_name(tensor), tuple(tensor.shape), offset, size, size, checksum))
        self._account(slots, end, started)
        return Written(end, tuple(slots), tuple(_between(lent, buffer[:end])))

    def sum_lent(self, written: Written) -> Written:
        """`written` with the checksums that `write` left open; the bucket may be on its way meanwhile."""
        started = time.perf_counter()
        pieces = dict(written.pieces)
        slots = tuple(
            slot if slot.checksum else replace(slot, checksum=tensor_checksum(pieces[slot.offset])) for slot in written.slots
        )
        self._entries += [new.checksum_entry for new, old in zip(slots, written.slots, strict=True) if not old.checksum]
        spent = time.perf_counter() - started
        self.checksum_s += spent
        self.write_s += spent
        return replace(written, slots=slots)

    def _account(self, slots: list[TensorSlot], payload_bytes: int, started: float) -> None:
        self._entries += [slot.checksum_entry for slot in slots if slot.checksum]
        self._size_bytes += sum(slot.size_bytes for slot in slots)
        self.payload_bytes += payload_bytes
        self.write_s += time.perf_counter() - started

    def totals(self) -> dict[str, Any]:
        """What an engine that received everything reports: num_tensors, size_bytes, checksum."""
        return {
            "num_tensors": len(self._entries),
            "size_bytes": self._size_bytes,
            "checksum": joint_checksum(self._entries),
        }

    def committed(self) -> None:
        """At least one engine serves the version."""

    def abandoned(self) -> None:
        """No engine serves the version."""


def _between(lent: list[tuple[int, torch.Tensor]], buffer: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """The lent pieces and, from `buffer`, what lies before, between and after them."""
    at = 0
    for offset, piece in lent:
        if offset > at:
            yield at, buffer[at:offset]
        yield offset, piece
        at = place([offset + piece.numel()])[1]
    if buffer.numel() > at:
        yield at, buffer[at:]


def _size_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
