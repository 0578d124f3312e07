"""Weight buckets in shared-memory files: one writer (the trainer's rank 0), any number of readers (engine workers).

A carrier has a file per buffer, two of them, which hold payload bytes only. The files are reused for every version; they
grow to the largest bucket seen and their pages stay mapped, so that only the first push pays for them.

A reader must be done with a bucket before the writer writes to its file again: the fleet's sink, which waits until every
engine has loaded what lay there, gives that order.

Life and death of a file: its writer holds an exclusive `flock` on it. The kernel drops the lock when the process dies,
however it dies, so a file that can be locked belongs to nobody; every new writer removes such leftovers first. The lock
works across containers that share the directory, which process ids would not.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_mega.errors import BackendUnavailableError, WeightSyncError

if TYPE_CHECKING:
    from concurrent.futures import Future

    import torch

    from skyrl_mega.rollout.transport.encode import Written

MIN_FILE_BYTES = 4096
FILE_PREFIX = "skyrl-mega-weights-"


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


class ShmFile:
    """One file that this process creates, locks, maps, and removes in `close`."""

    def __init__(self, directory: Path) -> None:
        # Locked under a name no scan looks at, then renamed: a scan never sees it unlocked.
        self.path = directory / f"{FILE_PREFIX}{os.getpid()}-{secrets.token_hex(4)}.shm"
        newborn = directory / f".{self.path.name}.new"
        self._descriptor = os.open(newborn, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        newborn.rename(self.path)
        self._mapped: torch.Tensor | None = None

    def room(self, size_bytes: int) -> torch.Tensor:
        """The file's bytes (uint8), at least `size_bytes` of them. Raises WeightSyncError if the file system is full."""
        import torch

        if self._mapped is not None and self._mapped.numel() >= size_bytes:
            return self._mapped
        size_bytes = max(size_bytes, MIN_FILE_BYTES)
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
        self._mapped = torch.from_file(str(self.path), shared=True, size=size_bytes, dtype=torch.uint8)
        return self._mapped

    def close(self) -> None:
        """Removes the file. Safe to call twice; readers that have it mapped keep their mapping."""
        if self._descriptor < 0:
            return
        self._mapped = None
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1


class ShmCarrier:
    """The sender's half: nothing to join, nothing to send; an engine sees a bucket as soon as it knows the file."""

    name = "shm"
    needs_reports = False

    def __init__(self, directory: Path | None = None) -> None:
        """Raises BackendUnavailableError if `directory` is None and there is no /dev/shm."""
        directory = directory or default_directory()
        remove_stale_files(directory)
        self._files = [ShmFile(directory) for _ in range(2)]

    def attach(self, members: Any, reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Nothing to join."""

    def begin(self) -> None:
        """Nothing to prepare."""

    def room(self, sequence: int, size_bytes: int) -> torch.Tensor:
        """The buffer of bucket `sequence`: uint8, at least `size_bytes`. Raises WeightSyncError if there is no room."""
        return self._files[sequence % 2].room(size_bytes)

    def path(self, sequence: int) -> str:
        """Where an engine finds bucket `sequence`."""
        return str(self._files[sequence % 2].path)

    def transmit(self, sequence: int, written: Written) -> Future[None] | None:
        """None: the bytes are where the engines read them."""
        return None

    def recover(self, members: Any) -> bool:
        """False: the loss of an engine is no other engine's."""
        return False

    def finish(self) -> None:
        """Nothing is on its way."""

    def abandon(self) -> None:
        """Nothing to undo."""

    def close(self) -> None:
        """Removes the files."""
        for file in self._files:
            file.close()


class ShmReader:
    """Maps bucket files and hands out their bytes."""

    name = "shm"

    def __init__(self) -> None:
        self._mapped: dict[str, torch.Tensor] = {}

    def read(self, path: str, size_bytes: int) -> torch.Tensor:
        """The first `size_bytes` of the file, as a view that changes when the writer writes there again.

        Raises WeightSyncError if the file is gone or shorter than that.
        """
        import torch

        mapped = self._mapped.get(path)
        if mapped is None or mapped.numel() < size_bytes:
            try:
                file_bytes = os.stat(path).st_size
            except FileNotFoundError as error:
                raise WeightSyncError(f"the weight bucket {path} is gone: its writer has closed or died.") from error
            if file_bytes < size_bytes:
                raise WeightSyncError(f"the weight bucket {path} must hold {size_bytes} bytes, but has {file_bytes}.")
            self._forget_removed_files()
            mapped = self._mapped[path] = torch.from_file(path, shared=True, size=file_bytes, dtype=torch.uint8)
        return mapped[:size_bytes]

    def _forget_removed_files(self) -> None:
        """A mapping keeps the memory of a removed file: that of a trainer which was started again."""
        for path in [path for path in self._mapped if not os.path.exists(path)]:
            del self._mapped[path]

    def close(self) -> None:
        """Forgets the mappings; each goes when the last tensor that views it goes."""
        self._mapped.clear()
