"""What the fleet's sink asks of a transport: the sender's half. The engines' half is behind their `WeightReceiver`s.

Implementations are in `rollout.transport` (`host` for shm and gloo, `native` for nccl and cuda_ipc), which this level may not
name; the composition root hands one over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from skyrl_mega.weights.members import Members

#: Passes a bucket's plain form on to every engine; the Futures are done when they have loaded it.
Announce = Callable[[dict[str, Any]], list["Future[None]"]]


class WeightTransport(Protocol):
    """Per version: `begin`, `send` per bucket in order, `finish`, then `committed` or `abandoned`. One thread.

    Two buckets may be on their way: the sink calls `send(k)` when bucket k - 2 is used up.
    """

    name: str

    def begin(self, members: Members) -> None:
        """Opens a version for `members`, all of which have begun it. Drops members that can't join; raises if none can."""
        ...

    def send(self, sequence: int, tensors: Sequence[tuple[str, torch.Tensor]], announce: Announce) -> Future[None] | None:
        """Sends bucket `sequence`, and calls `announce` with what the engines must know of it.

        The tensors must stay as they are until the version has ended: they may be sent from where they lie. A Future if the
        bytes go on leaving: it fails with RuntimeError if they could not. Raises WeightSyncError.
        """
        ...

    def resend(self, sequence: int, announce: Announce) -> Future[None] | None:
        """Sends one of the last two buckets again, as `send`."""
        ...

    def recover(self, members: Members) -> bool:
        """After a member was lost: whether the last two buckets must be sent again. Raises WeightSyncError if all is lost."""
        ...

    def finish(self) -> Mapping[str, Any]:
        """All is sent: what every worker must report (num_tensors, size_bytes, checksum)."""
        ...

    def committed(self) -> None:
        """Some engine serves the version."""
        ...

    def abandoned(self) -> None:
        """The version is given up; engines that wait for more of it are let go."""
        ...

    @property
    def seconds(self) -> Mapping[str, float]:
        """Of the version so far, by the transport's own phases: pack, checksum."""
        ...

    @property
    def payload_bytes(self) -> int:
        """Bytes that travelled in this version so far, to each engine."""
        ...

    def close(self) -> None:
        """Frees files, groups and threads."""
        ...
