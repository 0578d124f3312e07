"""Weight buckets in a shared-memory file: one writer (the trainer's rank 0), any number of readers (engine workers).

The file holds tensor bytes only, each tensor at an offset that is a multiple of 64. What lies where travels beside it as
a `BucketLayout` (plain lists and numbers, so that any RPC carries it). One file is reused for every bucket of every
version; it grows to the largest bucket seen and its pages stay mapped, so that only the first push pays for them.

A reader must be done with a bucket before the writer starts the next: the caller's RPC, which returns when the bucket is
loaded, gives that order.

Life and death of the file: the writer holds an exclusive `flock` on it. The kernel drops the lock when the process dies,
however it dies, so a file that can be locked belongs to nobody; every new writer removes such leftovers first. The lock
works across containers that share the directory, which process ids would not.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_mega.errors import BackendUnavailableError, WeightSyncError
from skyrl_mega.rollout.transport.checksum import ChecksumEntry, tensor_checksum

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
FILE_PREFIX = "skyrl-mega-weights-"


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies in the file, and what its bytes must sum to. `dtype` is torch's name without "torch."."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int
    checksum: str

    @property
    def checksum_entry(self) -> ChecksumEntry:
        return (self.name, self.dtype, self.shape, self.checksum)


@dataclass(frozen=True)
class BucketLayout:
    """One bucket: the file, how many of its bytes are in use, and a slot per tensor."""

    path: str
    size_bytes: int
    slots: tuple[TensorSlot, ...]

    def to_plain(self) -> dict[str, Any]:
        """Nested dicts, lists, strings and ints, for RPC."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> BucketLayout:
        """Inverse of `to_plain`, also after a trip that turned tuples into lists."""
        slots = tuple(TensorSlot(**{**slot, "shape": tuple(slot["shape"])}) for slot in plain["slots"])
        return cls(path=plain["path"], size_bytes=plain["size_bytes"], slots=slots)


def default_directory() -> Path:
    """/dev/shm. Raises BackendUnavailableError where the system has none (name a directory instead)."""
    directory = Path("/dev/shm")
    if not directory.is_dir():
        raise BackendUnavailableError(
            f"shared-memory weight buckets need /dev/shm, which this {sys.platform} machine lacks; pass a directory."
        )
    return directory


def remove_stale_files(directory: Path) -> list[Path]:
    """Removes bucket files whose writer is gone (crashed or killed); returns them. Files of live writers stay."""
    removed = []
    for path in sorted(directory.glob(f"{FILE_PREFIX}*.shm")):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except (FileNotFoundError, PermissionError):
            continue  # another writer was quicker, or it is another user's file
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path)
        except BlockingIOError:
            pass  # its writer is alive
        finally:
            os.close(descriptor)
    return removed


class ShmBucketWriter:
    """Writes buckets into one file that it creates, locks, and removes in `close`.

    `write_s` and `checksum_s` add up the seconds of all writes since `reset_timers`.
    """

    def __init__(self, directory: Path | None = None) -> None:
        """Raises BackendUnavailableError if `directory` is None and there is no /dev/shm."""
        directory = directory or default_directory()
        remove_stale_files(directory)
        # Locked under a name no scan looks at, then renamed: a scan never sees it unlocked.
        token = secrets.token_hex(4)
        self.path = directory / f"{FILE_PREFIX}{os.getpid()}-{token}.shm"
        newborn = directory / f".{self.path.name}.new"
        self._descriptor = os.open(newborn, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        newborn.rename(self.path)
        self._capacity_bytes = 0
        self._bytes: torch.Tensor | None = None
        self.reset_timers()

    def reset_timers(self) -> None:
        self.write_s = 0.0
        self.checksum_s = 0.0

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> BucketLayout:
        """The layout of a bucket that now holds copies of `tensors` (any device, any strides).

        Raises WeightSyncError if the file system has no room for it.
        """
        import torch

        tensors = list(tensors)
        offsets, size_bytes = [], 0
        for _, tensor in tensors:
            offsets.append(size_bytes)
            size_bytes += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        self._reserve(size_bytes)

        slots = []
        for (name, tensor), offset in zip(tensors, offsets, strict=True):
            started = time.perf_counter()
            num_bytes = tensor.numel() * tensor.element_size()
            with torch.no_grad():
                copy = self._bytes[offset : offset + num_bytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            written = time.perf_counter()
            dtype = str(tensor.dtype).removeprefix("torch.")
            slots.append(TensorSlot(name, dtype, tuple(tensor.shape), offset, num_bytes, tensor_checksum(copy)))
            self.write_s += written - started
            self.checksum_s += time.perf_counter() - written
        return BucketLayout(path=str(self.path), size_bytes=size_bytes, slots=tuple(slots))

    def _reserve(self, size_bytes: int) -> None:
        import torch

        if size_bytes <= self._capacity_bytes and self._bytes is not None:
            return
        size_bytes = max(size_bytes, ALIGNMENT)
        started = time.perf_counter()
        try:
            if sys.platform == "linux":
                # Claims the pages now: writing past a full tmpfs later would kill the process with SIGBUS.
                os.posix_fallocate(self._descriptor, 0, size_bytes)
            else:
                os.ftruncate(self._descriptor, size_bytes)
        except OSError as error:
            raise WeightSyncError(
                f"a weight bucket of {size_bytes} bytes must fit in {self.path.parent}, which refused it ({error.strerror}); "
                "lower rollout.weight_bucket_mib, or enlarge the shared memory (containers: --shm-size)."
            ) from error
        self._bytes = torch.from_file(str(self.path), shared=True, size=size_bytes, dtype=torch.uint8)
        self._capacity_bytes = size_bytes
        self.write_s += time.perf_counter() - started

    def close(self) -> None:
        """Removes the file. Safe to call twice; readers that have it mapped keep their mapping."""
        if self._descriptor < 0:
            return
        self._bytes = None
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1


class ShmBucketReader:
    """Maps bucket files and hands out tensors that view them."""

    def __init__(self) -> None:
        self._path = ""
        self._bytes: torch.Tensor | None = None

    def read(self, layout: BucketLayout) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) per slot. The tensors are views: they change when the writer writes its next bucket.

        Raises WeightSyncError if the file is gone or shorter than the layout says.
        """
        import torch

        self._map(layout)
        for slot in layout.slots:
            view = self._bytes[slot.offset : slot.offset + slot.size_bytes]
            yield slot.name, view.view(getattr(torch, slot.dtype)).view(slot.shape)

    def _map(self, layout: BucketLayout) -> None:
        import torch

        if self._path == layout.path and self._bytes is not None and self._bytes.numel() >= layout.size_bytes:
            return
        try:
            file_bytes = os.stat(layout.path).st_size
        except FileNotFoundError as error:
            raise WeightSyncError(f"the weight bucket {layout.path} is gone: its writer has closed or died.") from error
        if file_bytes < layout.size_bytes:
            raise WeightSyncError(f"the weight bucket {layout.path} must hold {layout.size_bytes} bytes, but has {file_bytes}.")
        self._bytes = torch.from_file(layout.path, shared=True, size=file_bytes, dtype=torch.uint8)
        self._path = layout.path

    def is_view(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` lies in the mapped file, and so changes with the next bucket."""
        return self._bytes is not None and tensor.untyped_storage().data_ptr() == self._bytes.untyped_storage().data_ptr()

    def close(self) -> None:
        """Forgets the mapping; it goes when the last tensor that views it goes."""
        self._bytes, self._path = None, ""
