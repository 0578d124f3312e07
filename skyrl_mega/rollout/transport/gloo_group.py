"""The process group of sender and workers, and how a bucket crosses it: what both halves of gloo (`gloo`, `gloo_receiver`) share.

A bucket is one part or several; a part is a header, always of one size, and the pieces that it places. Since the header's size is
known beforehand, both ends post it, and all pieces of a part, without waiting for what goes before: gloo then moves one after
the other on its own threads, and no message waits for a thread of Python's to be woken. A header with END for its sequence ends
the version.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: In place of a bucket's sequence: no more buckets of this version.
END = -1
LOOPBACK = "127.0.0.1"
#: Of one header; it has 4 KiB with them. A bucket of more pieces travels in several parts.
MAX_PIECES = 254


@dataclass(frozen=True)
class PartHeader:
    """What comes next: pieces of bucket `sequence`, which has `size_bytes` in all; `places` are (offset, bytes) of each piece."""

    sequence: int
    size_bytes: int = 0
    is_last: bool = True
    places: tuple[tuple[int, int], ...] = ()

    def to_tensor(self) -> torch.Tensor:
        """int64 [2 + MAX_PIECES, 2]."""
        tensor = empty_header()
        rows = [(self.sequence, self.size_bytes), (len(self.places), int(self.is_last)), *self.places]
        tensor[: len(rows)] = tensor.new_tensor(rows)
        return tensor

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> PartHeader:
        """Inverse of `to_tensor`."""
        (sequence, size_bytes), (num_pieces, is_last) = tensor[:2].tolist()
        places = tuple((offset, size) for offset, size in tensor[2 : 2 + num_pieces].tolist())
        return cls(sequence, size_bytes, bool(is_last), places)


def empty_header() -> torch.Tensor:
    """Room for any header."""
    import torch

    return torch.zeros(2 + MAX_PIECES, 2, dtype=torch.int64)


def messages_of(sequence: int, size_bytes: int, pieces: Sequence[tuple[int, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """What is broadcast of a bucket, in order. `pieces`: (offset in the bucket, uint8 tensor)."""
    starts = range(0, max(1, len(pieces)), MAX_PIECES)
    for start in starts:
        part = pieces[start : start + MAX_PIECES]
        places = tuple((offset, piece.numel()) for offset, piece in part)
        yield PartHeader(sequence, size_bytes, start == starts[-1], places).to_tensor()
        yield from (piece for _, piece in part)


def join_group(store: Any, token: str, rank: int, world_size: int, *, host: str, timeout_s: float) -> Any:
    """The process group `token` of `world_size` ranks, once all have come. Raises RuntimeError after `timeout_s`.

    `host`: the sender's address; on the loopback device if it is that, else by the route to it.
    """
    import torch.distributed as dist
    from torch.distributed import ProcessGroupGloo

    options = ProcessGroupGloo._Options()
    options._devices = [ProcessGroupGloo.create_device(hostname=local_address(host))]
    options._timeout = timedelta(seconds=timeout_s)
    return ProcessGroupGloo(dist.PrefixStore(token, store), rank, world_size, options)


def local_address(towards: str) -> str:
    """This machine's own address on the way to `towards`; no packet is sent."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return probe.getsockname()[0]


def post_broadcast(group: Any, tensor: torch.Tensor) -> Any:
    """A broadcast from rank 0 of `group`, set off behind those before it. Its `wait` raises as `broadcast` does."""
    import torch.distributed as dist

    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([tensor], options)


def broadcast(group: Any, tensor: torch.Tensor) -> None:
    """From rank 0 of `group`; waits. Raises RuntimeError if a member is lost or the group's timeout passes."""
    post_broadcast(group, tensor).wait()


def room(buffers: list[torch.Tensor | None], sequence: int, size_bytes: int) -> torch.Tensor:
    """The first `size_bytes` (uint8) of the one of two `buffers` that bucket `sequence` uses; it grows where it must."""
    import torch

    buffer = buffers[sequence % 2]
    if buffer is None or buffer.numel() < size_bytes:
        buffer = buffers[sequence % 2] = torch.empty(size_bytes, dtype=torch.uint8)
    return buffer[:size_bytes]
