"""One weight version to every engine of a fleet: each gets it whole or does not serve it.

A version is `start`, `put` per bucket, `finish`. Three things run beside each other: while the source gathers bucket k + 1,
the transport moves bucket k, and the engines load bucket k - 1. There are two buffers, so `put` waits until every engine has
loaded the bucket before the last one.

No engine waits for another longer than a deadline, and none spoils it for the rest: who dies, refuses or is late is left out,
with the reason, and the version goes on (`WeightVersion.failed`). What an engine received is compared with what was sent
before it may show the version: number of tensors, bytes, and a joint checksum over all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skyrl_mega.errors import WeightSyncError
from skyrl_mega.protocols import WeightReceiver
from skyrl_mega.types import WeightVersion
from skyrl_mega.weights.groups import AnnouncedGroups
from skyrl_mega.weights.members import Members
from skyrl_mega.weights.transport import WeightTransport

if TYPE_CHECKING:
    import torch


@dataclass
class _OnItsWay:
    """A bucket that was sent: what every engine makes of it, and the end of its journey if that is later."""

    leaving: Future[None] | None = None
    loads: list[dict[str, Future[None]]] = field(default_factory=list)
    started: float = 0.0
    loaded: float = 0.0

    def announce(self, members: Members, bucket: Mapping[str, Any]) -> list[Future[None]]:
        self.started = self.started or time.perf_counter()
        futures = {receiver.name: receiver.load(bucket) for receiver in members.receivers()}
        for future in futures.values():
            future.add_done_callback(self._note_time)
        self.loads.append(futures)
        return list(futures.values())

    def _note_time(self, _: Future[None]) -> None:
        self.loaded = time.perf_counter()


class FleetSink:
    """Publishes weight versions to engines. Implements `protocols.WeightSink`; used by one thread of one rank.

    While a version is on its way the engines refuse new requests. `finish` makes it visible. `abort` brings the old version
    back in each engine where no layer had been overwritten yet; the others go on refusing until a whole version arrived.
    """

    def __init__(
        self, receivers: Callable[[], Sequence[WeightReceiver]], transport: WeightTransport, *, timeout_s: float
    ) -> None:
        """`receivers()` are the engines to reach, asked anew for each version. `timeout_s` bounds every single wait.

        The sink owns the transport: `close` closes it.
        """
        self._receivers, self._transport, self._timeout_s = receivers, transport, timeout_s
        self._version: int | None = None

    def start(self, version: int, groups: Sequence[tuple[str, ...]]) -> None:
        """Begins `version` on every engine. `groups` are all the names it will bring, as `WeightSource.fused_groups` lists them.

        Raises WeightSyncError if another version is on its way, or no engine takes part.
        """
        if self._version is not None:
            raise WeightSyncError(f"version {self._version} must be finished or aborted before version {version} starts.")
        started = time.perf_counter()
        self._members = members = Members(self._receivers(), version, self._timeout_s)
        self._version = version
        self._groups = AnnouncedGroups(groups)
        self._on_their_way: dict[int, _OnItsWay] = {}
        self._next = 0
        self._last_loaded = 0.0
        self._seconds = dict.fromkeys(("start", "wait", "load", "load_unhidden", "finish"), 0.0)
        members.each(f"begin version {version}", lambda receiver: receiver.begin(version))
        members.require_some()
        self._transport.begin(members)
        self._seconds["start"] = time.perf_counter() - started

    def put(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Sends a bucket of whole fused groups, and does not wait until it is loaded.

        The tensors must stay as they are until `finish` or `abort`: they may be sent from where they lie.

        Raises WeightSyncError if a group is split, or a name is unknown or repeated (nothing of the bucket is sent then), or
        if no engine is left.
        """
        if self._version is None:
            raise WeightSyncError("a bucket needs a version on its way: call start first.")
        tensors = list(tensors)
        self._groups.take([name for name, _ in tensors])
        sequence, self._next = self._next, self._next + 1
        self._wait_for(sequence - 2)
        way = self._on_their_way[sequence] = _OnItsWay()
        way.leaving = self._transport.send(sequence, tensors, lambda bucket: self._announce(way, bucket))

    def _announce(self, way: _OnItsWay, bucket: Mapping[str, Any]) -> list[Future[None]]:
        started = time.perf_counter()
        futures = way.announce(self._members, bucket)
        self._seconds["load_unhidden"] += time.perf_counter() - started  # engines in this process load in the call
        return futures

    def _wait_for(self, sequence: int) -> None:
        """Until bucket `sequence` is used up by all members; a bucket that a lost member kept from others is sent again."""
        started = time.perf_counter()
        sent_again = False
        while (way := self._on_their_way.get(sequence)) is not None:
            members_before = len(self._members.names())
            deadline = time.monotonic() + self._timeout_s
            for loads in way.loads:
                self._members.settle(f"load bucket {sequence}", loads, deadline=deadline)
            broken = _what_broke(way.leaving, deadline)
            self._members.require_some()
            lost = len(self._members.names()) < members_before
            if not lost and broken and sent_again:
                raise WeightSyncError(f"bucket {sequence} could not be sent to {', '.join(self._members.names())}: {broken}.")
            if (lost or broken) and self._transport.recover(self._members):
                sent_again = True
                self._send_again()
                continue
            if broken:
                raise WeightSyncError(f"bucket {sequence} could not be sent: {broken}.")
            del self._on_their_way[sequence]
            self._seconds["load"] += max(0.0, way.loaded - max(way.started, self._last_loaded))
            self._last_loaded = way.loaded
        self._seconds["wait"] += time.perf_counter() - started

    def _send_again(self) -> None:
        for sequence in sorted(self._on_their_way):
            way = self._on_their_way[sequence] = _OnItsWay()
            way.leaving = self._transport.resend(sequence, lambda bucket, way=way: self._announce(way, bucket))

    def finish(self) -> WeightVersion:
        """Makes the version visible in every engine that confirmed number, bytes and joint checksum of what it received.

        Raises WeightSyncError if tensors are missing, or no engine serves the version; call `abort` then.
        """
        if self._version is None:
            raise WeightSyncError("finish needs a version on its way: call start first.")
        version, members = self._version, self._members
        self._groups.require_all(version)
        for sequence in sorted(self._on_their_way):
            self._wait_for(sequence)
        started = time.perf_counter()
        expected = dict(self._transport.finish())
        reports = members.each("report what it received", lambda receiver: receiver.report())
        for name, workers in reports.items():
            if reason := _refusal(workers, expected):
                members.drop(name, f"it refused weight version {version}: {reason}")
        members.require_some()
        members.each(f"show version {version}", lambda receiver: receiver.commit(version))
        members.require_some()
        self._transport.committed()
        members.dismiss(all_of_them=False)
        self._version = None
        self._seconds["finish"] = time.perf_counter() - started
        return WeightVersion(version, **expected, seconds=self._all_seconds(reports), failed=dict(members.failed))

    def _all_seconds(self, reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
        seconds = {**self._seconds, **self._transport.seconds}
        seconds["load_unhidden"] += seconds["wait"]
        # Of the slowest worker: how its share of `load` divides into receiving, checksums, and vLLM's own loading.
        own = [worker["seconds"] for workers in reports.values() for worker in workers if "seconds" in worker]
        for phase in own[0] if own else ():
            seconds[f"worker_{phase}"] = max(each[phase] for each in own)
        return seconds

    @property
    def payload_bytes(self) -> int:
        """Bytes that the last version took on the way, to each engine."""
        return self._transport.payload_bytes

    def abort(self) -> None:
        """Gives up the version on its way, if there is one."""
        if self._version is None:
            return
        self._version = None
        self._transport.abandoned()
        self._members.dismiss(all_of_them=True)

    def close(self) -> None:
        """Gives up what is on its way and closes the transport."""
        self.abort()
        self._transport.close()


def _what_broke(leaving: Future[None] | None, deadline: float) -> str:
    """Why a bucket did not leave by `deadline`, "" if it did."""
    if leaving is None:
        return ""
    try:
        leaving.result(timeout=max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        return "the transport's deadline has passed"
    except CancelledError:
        return "it was cancelled"
    except RuntimeError as error:
        return str(error)
    return ""


def _refusal(workers: Sequence[Mapping[str, Any]], expected: Mapping[str, Any]) -> str:
    """Why an engine must not show the version, by its workers' reports; "" if it may."""
    count = max((worker.get("num_workers", 1) for worker in workers), default=1)
    if len(workers) < count:
        return f"{len(workers)} of its {count} workers reported"
    for worker in workers:
        received = {key: worker[key] for key in expected}
        if worker["error"]:
            return str(worker["error"]).rstrip(".")
        if received != expected:
            return f"sent {dict(expected)}, received {received}"
    return ""
