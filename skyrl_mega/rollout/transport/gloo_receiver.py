"""A worker's half of gloo: a thread that receives the next bucket while the last one is loaded. See `gloo` for the whole."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from skyrl_mega.rollout.transport.gloo_group import END, PartHeader, empty_header, join_group, post_broadcast, room

if TYPE_CHECKING:
    import torch

#: For a thread that has been told, or whose group is gone.
JOIN_S = 2.0


class GlooReceiver:
    """A worker's half. Its methods are called by the worker's thread; a thread of its own receives."""

    name = "gloo"

    def __init__(self) -> None:
        self.token = ""
        self.error = "it was never asked to"
        self._group: Any = None
        self._store: Any = None
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._receives = False
        self._thread: threading.Thread | None = None

    def connect(self, endpoint: Mapping[str, Any], rank: int) -> None:
        """Joins the group of `endpoint` as its rank `rank_offset` + `rank`. `token` and `error` say how that went."""
        import torch.distributed as dist

        self.leave("it joined another group")
        host, timeout_s = endpoint["host"], endpoint["timeout_s"]
        try:
            timeout = timedelta(seconds=timeout_s)
            self._store = dist.TCPStore(host, endpoint["port"], is_master=False, wait_for_workers=False, timeout=timeout)
            self._group = join_group(
                self._store,
                endpoint["token"],
                endpoint["rank_offset"] + rank,
                endpoint["world_size"],
                host=host,
                timeout_s=timeout_s,
            )
        except (RuntimeError, OSError) as error:
            self.error = f"{type(error).__name__}: {error}"
            return
        self.token, self.error, self._timeout_s = endpoint["token"], "", timeout_s

    def _start_receiving(self) -> None:
        """Raises RuntimeError if the thread of an earlier version still waits: two would take each other's messages."""
        if self._thread is not None:
            self._thread.join(timeout=JOIN_S)
            if self._thread.is_alive():
                raise RuntimeError("the version before did not come to its end")
        self._arrived: queue.SimpleQueue[tuple[int, torch.Tensor | str]] = queue.SimpleQueue()
        self._free = threading.Semaphore(2)
        self._thread = threading.Thread(
            target=self._receive,
            args=(self._group, self._arrived, self._free, self._buffers),
            name="weights-gloo",
            daemon=True,
        )
        self._thread.start()
        self._receives = True

    def _receive(
        self, group: Any, arrived: queue.SimpleQueue, free: threading.Semaphore, buffers: list[torch.Tensor | None]
    ) -> None:
        payload: torch.Tensor | None = None  # of a bucket that has not come to its last part
        try:
            header_tensor = empty_header()
            header_posted = post_broadcast(group, header_tensor)
            while True:
                header_posted.wait()
                header = PartHeader.from_tensor(header_tensor)
                if header.sequence == END:
                    return
                if payload is None:
                    if not free.acquire(timeout=2 * self._timeout_s):
                        raise RuntimeError("no bucket was taken for too long")
                    payload = room(buffers, header.sequence, header.size_bytes)
                posted = [post_broadcast(group, payload[offset : offset + size]) for offset, size in header.places]
                header_tensor = empty_header()
                header_posted = post_broadcast(group, header_tensor)
                for piece in posted:
                    piece.wait()
                if header.is_last:
                    arrived.put((header.sequence, payload))
                    payload = None
        except RuntimeError as error:
            arrived.put((END, str(error)))

    def take(self, sequence: int) -> torch.Tensor:
        """The payload of bucket `sequence`, a view that holds until `release`.

        Raises ConnectionError if the group broke before it came: it may come again, through another group.
        """
        if self._group is None:
            raise ConnectionError(self.error)
        try:
            if not self._receives:
                self._start_receiving()
            arrived, payload = self._arrived.get(timeout=2 * self._timeout_s)
        except (queue.Empty, RuntimeError) as error:
            arrived, payload = END, str(error) or "nothing came"
        if arrived != sequence or isinstance(payload, str):
            reason = payload if isinstance(payload, str) else f"bucket {arrived} came"
            self.leave(f"waiting for bucket {sequence}: {reason}")
            raise ConnectionError(self.error)
        return payload

    def release(self) -> None:
        """The payload taken last may be overwritten."""
        if self._group is not None:
            self._free.release()

    def end(self) -> None:
        """The version has come to its end, or another begins."""
        self._receives = False

    def leave(self, reason: str) -> None:
        """Leaves the group, if there is one; its receiving thread ends."""
        group, self._group, self.token, self.error = self._group, None, "", reason
        self._store, self._receives = None, False
        if group is not None:
            group.abort()
        if self._thread is not None:
            self._thread.join(timeout=JOIN_S)
            if self._thread.is_alive():
                self._buffers = [None, None]  # it may still write to the old ones
