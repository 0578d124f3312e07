"""The trainer's end of the shared-memory weight transport into a vLLM engine: a `WeightSink`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_mega.errors import WeightSyncError
from skyrl_mega.rollout.transport.checksum import ChecksumEntry, joint_checksum
from skyrl_mega.rollout.transport.shm import ShmBucketWriter
from skyrl_mega.types import WeightVersion

if TYPE_CHECKING:
    import torch

    from skyrl_mega.rollout.vllm_engine import VLLMEngine


class ShmWeightSink:
    """Publishes weight versions to one engine, all or nothing. Made by `VLLMEngine.weight_sink`; used by rank 0 only.

    While a version is on its way the engine refuses to serve. `finish` makes the new version visible, or raises. `abort`
    brings the old version back where no layer had been overwritten yet; otherwise the engine goes on refusing until a
    whole version arrived.
    """

    def __init__(self, engine: VLLMEngine, directory: Path | None = None) -> None:
        self._engine = engine
        self._writer = ShmBucketWriter(directory)
        self._version: int | None = None

    def start(self, version: int, groups: Sequence[tuple[str, ...]]) -> None:
        """Begins `version`. `groups` are all the names it will bring, as `WeightSource.fused_groups` lists them.

        Raises WeightSyncError if another version is on its way.
        """
        if self._version is not None:
            raise WeightSyncError(f"version {self._version} must be finished or aborted before version {version} starts.")
        self._group_of = {name: group for group in groups for name in group}
        self._waiting = set(self._group_of)
        self._entries: list[ChecksumEntry] = []
        self._size_bytes = 0
        self._seconds = {"start": 0.0, "write": 0.0, "checksum": 0.0, "load": 0.0, "finish": 0.0}
        self._writer.reset_timers()
        started = time.perf_counter()
        self._engine._begin_weight_update(version)
        self._version = version
        self._seconds["start"] = time.perf_counter() - started

    def put(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Sends a bucket of whole fused groups.

        Raises WeightSyncError if a group is split, or a name is unknown or repeated; nothing of the bucket is sent then.
        """
        if self._version is None:
            raise WeightSyncError("a bucket needs a version on its way: call start first.")
        tensors = list(tensors)
        names = [name for name, _ in tensors]
        self._check_whole_groups(names)
        layout = self._writer.write(tensors)
        self._seconds["write"], self._seconds["checksum"] = self._writer.write_s, self._writer.checksum_s
        self._entries += [slot.checksum_entry for slot in layout.slots]
        self._size_bytes += sum(slot.size_bytes for slot in layout.slots)
        self._waiting.difference_update(names)
        started = time.perf_counter()
        self._engine._send_bucket(layout.to_plain())
        self._seconds["load"] += time.perf_counter() - started

    def _check_whole_groups(self, names: list[str]) -> None:
        unexpected = [name for name in names if name not in self._waiting]
        if unexpected or len(set(names)) != len(names):
            raise WeightSyncError(
                f"every tensor of a version must be announced in start and sent once; unknown or repeated: {unexpected or names}."
            )
        present = set(names)
        for name in names:
            absent = [other for other in self._group_of[name] if other not in present]
            if absent:
                raise WeightSyncError(
                    f"fused tensors must travel in one bucket: {name} came without {', '.join(absent)}. "
                    "The engine would mix two versions in one matrix."
                )

    def finish(self) -> WeightVersion:
        """Makes the version visible, after the engine confirmed count, bytes and joint checksum of what it received.

        Raises WeightSyncError if anything is missing or differs; call `abort` then.
        """
        if self._version is None:
            raise WeightSyncError("finish needs a version on its way: call start first.")
        if self._waiting:
            raise WeightSyncError(
                f"version {self._version} is incomplete: {len(self._waiting)} of {len(self._group_of)} tensors were not sent, "
                f"first {min(self._waiting)}."
            )
        started = time.perf_counter()
        checksum = joint_checksum(self._entries)
        expected = {"num_tensors": len(self._entries), "size_bytes": self._size_bytes, "checksum": checksum}
        self._engine._commit_weight_update(self._version, expected)
        self._seconds["finish"] = time.perf_counter() - started
        version, self._version = self._version, None
        return WeightVersion(version, len(self._entries), self._size_bytes, checksum, dict(self._seconds))

    def abort(self) -> None:
        """Gives up the version on its way, if there is one."""
        if self._version is None:
            return
        self._version = None
        self._engine._abandon_weight_update()

    def close(self) -> None:
        """Removes the shared-memory file."""
        self._writer.close()
