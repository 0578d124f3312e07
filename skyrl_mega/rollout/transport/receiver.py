"""The worker's half of the transports that go through host memory: from the announcement of a bucket to checked tensors.

Runs in vLLM's workers, and needs nothing of vLLM. A version is `begin`, `receive` per bucket in order, then `commit` or
`abandon`. After a bucket was announced a second time (the group it came by had broken) it is received again, and dropped
if it had arrived.

Checksums of the first bucket are compared before anything of it is loaded: a version that is refused there has overwritten
nothing, and the old one can serve on. Those of the others are taken in a thread while their bucket is loaded, and compared in
`release`; a version with one that is wrong is never shown either.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from skyrl_mega.errors import WeightSyncError
from skyrl_mega.rollout.transport.checksum import ChecksumEntry, joint_checksum, tensor_checksum
from skyrl_mega.rollout.transport.delta import NO_BASE, apply_difference
from skyrl_mega.rollout.transport.gloo_receiver import GlooReceiver
from skyrl_mega.rollout.transport.layout import Bucket, dtype_name, view_slot
from skyrl_mega.rollout.transport.shm import ShmReader

if TYPE_CHECKING:
    import torch

NamedTensors = list[tuple[str, "torch.Tensor"]]


class BucketReceiver:
    """One worker's end. `error` is the first reason to refuse the version, "" if none."""

    def __init__(self) -> None:
        self._files = ShmReader()
        self._gloo = GlooReceiver()
        self._base: dict[str, torch.Tensor] = {}
        self._base_name = NO_BASE
        self._summing = ThreadPoolExecutor(1, thread_name_prefix="weights-checksum")
        self._check_beside: Future[None] | None = None
        self.begin_accounts()

    def begin_accounts(self) -> None:
        """Forgets what arrived."""
        self._settle()
        self.entries: list[ChecksumEntry] = []
        self.size_bytes = 0
        self.error = ""
        self.lasting = False
        self._next = 0
        self._keeps = False
        self.seconds = {"receive": 0.0, "checksum": 0.0, "checksum_wait": 0.0}

    def connect(self, endpoint: Mapping[str, Any], rank: int) -> None:
        """Joins the transport of `endpoint`, as the `rank`-th worker of its engine; `state` says how that went."""
        if endpoint.get("transport") == GlooReceiver.name:
            self._gloo.connect(endpoint, rank)

    def state(self) -> dict[str, Any]:
        """What the sender goes by: the group joined and the last error of it, the base of differences, buckets received."""
        return {
            "endpoint": self._gloo.token,
            "transport_error": self._gloo.error,
            "base": self._base_name,
            "num_buckets": self._next,
        }

    def totals(self) -> dict[str, Any]:
        """What arrived: num_tensors, size_bytes, checksum."""
        checksum = joint_checksum(self.entries)
        return {"num_tensors": len(self.entries), "size_bytes": self.size_bytes, "checksum": checksum}

    def begin(self) -> None:
        """A version is coming."""
        self.begin_accounts()
        self._gloo.end()

    def receive(self, plain: Mapping[str, Any]) -> NamedTensors:
        """The bucket's tensors; [] if it is refused (`error`) or is to come again.

        They hold until `release`, which says whether their checksums were right; longer, until the next version, if `lasting`.
        """
        started = time.perf_counter()
        bucket = Bucket.from_plain(plain)
        try:
            payload = self._payload(bucket)
            if self.error or bucket.sequence < self._next:
                return []
            if bucket.sequence > self._next:
                raise WeightSyncError(f"bucket {bucket.sequence} came where bucket {self._next} was due.")
            tensors = [(slot.name, self._decode(bucket, slot, payload)) for slot in bucket.slots]
            self.seconds["receive"] += time.perf_counter() - started
            if bucket.sequence == 0:
                self._check(bucket, tensors)
                self.seconds["checksum_wait"] = self.seconds["checksum"]
            else:
                self._check_beside = self._summing.submit(self._check, bucket, tensors)
        except ConnectionError:
            return []  # it comes again, by another group; if it does not, what arrived falls short
        except WeightSyncError as error:
            self.error = str(error)
            return []
        self._next += 1
        self.lasting = bucket.encoding != "full"
        return tensors

    def _payload(self, bucket: Bucket) -> torch.Tensor:
        if bucket.transport == ShmReader.name:
            return self._files.read(bucket.path, bucket.size_bytes)
        if bucket.transport == GlooReceiver.name:
            return self._gloo.take(bucket.sequence)
        raise WeightSyncError(f"buckets travel by {ShmReader.name} or {GlooReceiver.name}, not by {bucket.transport!r}.")

    def _decode(self, bucket: Bucket, slot: Any, payload: torch.Tensor) -> torch.Tensor:
        if bucket.encoding == "full":
            return view_slot(payload, slot)
        self._keeps, self._base_name = True, NO_BASE  # a mixture until the version is committed
        if bucket.encoding == "kept":
            arrived = view_slot(payload, slot)
            kept = self._base.get(slot.name)
            if kept is None or kept.shape != arrived.shape or kept.dtype != arrived.dtype:
                kept = self._base[slot.name] = arrived.clone()
                return kept
            return kept.copy_(arrived)
        if slot.name not in self._base:
            raise WeightSyncError(f"a difference of {slot.name} came, but this engine keeps no earlier version of it.")
        apply_difference(self._base[slot.name], payload[slot.offset : slot.offset + slot.encoded_bytes])
        return self._base[slot.name]

    def _check(self, bucket: Bucket, tensors: NamedTensors) -> None:
        started = time.perf_counter()
        for (name, tensor), slot in zip(tensors, bucket.slots, strict=True):
            received = self._account_one(name, tensor)
            if received != slot.checksum:
                raise WeightSyncError(f"checksum of {name} must be {slot.checksum} as sent, but {received} arrived")
        self.seconds["checksum"] += time.perf_counter() - started

    def _settle(self) -> None:
        """Waits for the check that runs beside the loading, and keeps what it found."""
        check, self._check_beside = self._check_beside, None
        if check is None:
            return
        started = time.perf_counter()
        try:
            check.result()
        except WeightSyncError as error:
            self.error = self.error or str(error)
        self.seconds["checksum_wait"] += time.perf_counter() - started

    def account(self, tensors: NamedTensors) -> None:
        """Counts and sums what came by another road."""
        started = time.perf_counter()
        for name, tensor in tensors:
            self._account_one(name, tensor)
        self.seconds["checksum"] += time.perf_counter() - started

    def _account_one(self, name: str, tensor: torch.Tensor) -> str:
        checksum = tensor_checksum(tensor)
        self.entries.append((name, dtype_name(tensor), tuple(tensor.shape), checksum))
        self.size_bytes += tensor.numel() * tensor.element_size()
        return checksum

    def release(self, plain: Mapping[str, Any]) -> None:
        """What `receive` returned for this bucket is used up, its memory may be written again; `error` knows its checksums."""
        self._settle()
        if plain["transport"] == GlooReceiver.name:
            self._gloo.release()

    def commit(self) -> None:
        """The version serves: differences may build on it."""
        self._gloo.end()
        self._base_name = joint_checksum(self.entries) if self._keeps else NO_BASE
        if not self._keeps:
            self._base.clear()

    def abandon(self) -> None:
        """The version is given up."""
        self._gloo.end()
        self._gloo.leave("a version was abandoned")
        self._base_name = NO_BASE

    def close(self) -> None:
        """Leaves the group and unmaps the files."""
        self._settle()
        self._summing.shutdown()
        self._gloo.leave("the engine was closed")
        self._files.close()
        self._base.clear()
