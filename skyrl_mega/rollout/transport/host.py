"""A sender through host memory: a carrier (shared files, gloo) and an encoding (full, differences), as one transport.

`attach`, then per version `begin` and `send` per bucket in order, then `finish`, and `committed` or `abandoned`. A bucket is
written once, whatever the number of engines, into one of two buffers; the fleet's sink sees to it that what lies there has
been used up. Not for several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skyrl_mega.rollout.transport.encode import FullEncoder, Written
from skyrl_mega.rollout.transport.gloo import GlooCarrier
from skyrl_mega.rollout.transport.layout import Bucket
from skyrl_mega.rollout.transport.shm import ShmCarrier

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch

Announce = Callable[[dict[str, Any]], None]


class HostTransport:
    """Implements `weights.transport.WeightTransport`."""

    def __init__(self, carrier: ShmCarrier | GlooCarrier, encoder: FullEncoder) -> None:
        self._carrier, self._encoder = carrier, encoder
        self._sent: dict[int, tuple[Bucket, Written]] = {}

    @property
    def name(self) -> str:
        return self._carrier.name

    def begin(self, members: Any) -> None:
        """Opens a version for `members`, all of which have begun it; joins them where the carrier needs that."""
        reports: Mapping[str, Sequence[Mapping[str, Any]]] = {}
        if self._carrier.needs_reports or self._encoder.needs_base:
            reports = members.each("report what they hold", lambda receiver: receiver.report())
            members.require_some()
        self._carrier.attach(members, reports)
        self._encoder.begin([worker["base"] for name in members.names() for worker in reports.get(name, ())])
        self._sent.clear()

    def send(self, sequence: int, tensors: Sequence[tuple[str, torch.Tensor]], announce: Announce) -> Future[None] | None:
        """Writes a bucket, sets it off, and calls `announce` with its plain form; a Future if its bytes leave later.

        Raises WeightSyncError if there is no room for it.
        """
        buffer = self._carrier.room(sequence, self._encoder.bound(tensors))
        written = self._encoder.write(tensors, buffer)
        # Set off first: what was lent is summed while it leaves, and an engine in this process receives inside `announce`.
        leaving = self._carrier.transmit(sequence, written)
        written = self._encoder.sum_lent(written)
        encoding, path = self._encoder.encoding, self._carrier.path(sequence)
        bucket = Bucket(sequence, self.name, encoding, written.size_bytes, written.slots, path)
        self._sent.pop(sequence - 2, None)
        self._sent[sequence] = (bucket, written)
        announce(bucket.to_plain())
        return leaving

    def resend(self, sequence: int, announce: Announce) -> Future[None] | None:
        """Sends one of the last two buckets again."""
        bucket, written = self._sent[sequence]
        leaving = self._carrier.transmit(sequence, written)
        announce(bucket.to_plain())
        return leaving

    def recover(self, members: Any) -> bool:
        """After a member was lost: True if the last two buckets must be sent again to the others."""
        return self._carrier.recover(members)

    def finish(self) -> dict[str, Any]:
        """The version is sent: what every engine must have received (num_tensors, size_bytes, checksum)."""
        self._carrier.finish()
        self._sent.clear()
        return self._encoder.totals()

    def committed(self) -> None:
        """Some engine serves the version."""
        self._encoder.committed()

    def abandoned(self) -> None:
        """The version is given up; no receiver waits for the rest of it."""
        self._encoder.abandoned()
        self._sent.clear()
        self._carrier.abandon()

    @property
    def seconds(self) -> dict[str, float]:
        """Of this version so far: `pack` (copying or encoding) and `checksum`."""
        checksum_s = self._encoder.checksum_s
        return {"pack": self._encoder.write_s - checksum_s, "checksum": checksum_s}

    @property
    def payload_bytes(self) -> int:
        """Bytes that travelled (to each engine)."""
        return self._encoder.payload_bytes

    def close(self) -> None:
        self._carrier.close()
