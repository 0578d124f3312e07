"""Weight buckets by broadcast over gloo, from the trainer's rank 0 to every worker of every engine: the sender's half.

One process group of its own, beside any other that sender and workers are in: rank 0 sends, the workers of the first engine
follow, then those of the second. A bucket crosses it in pieces (`gloo_group`): large tensors are sent from where they lie, the
others from a buffer. A thread at each end moves them (beside the gather of the next bucket, and beside the loading of the last
one), each with two buffers, so that all three overlap. The receiving thread runs from the first bucket of a version to its end.

A group lives as long as its members do. When an engine dies, gloo fails at every neighbour of it at once, and the group is
of no more use: those who are left form a new one, and the sender sends again what was on its way. A member that hangs
stops the others until the group's timeout. Which group a worker is in is named by a token, "" where its group failed; the
sender compares it before each version, so an engine that was replaced is noticed without anyone's saying so.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from skyrl_mega.errors import WeightSyncError
from skyrl_mega.rollout.transport.gloo_group import END, PartHeader, join_group, messages_of, post_broadcast, room

if TYPE_CHECKING:
    import torch

    from skyrl_mega.rollout.transport.encode import Written


class GlooCarrier:
    """The sender's half."""

    name = "gloo"
    needs_reports = True

    def __init__(self, *, host: str, timeout_s: float) -> None:
        """`host`: this machine's address as the engines reach it. `timeout_s`: of the rendezvous and of each broadcast."""
        self._host, self._timeout_s = host, timeout_s
        self._store: Any = None
        self._group: Any = None
        self._broken: Any = None
        self._token = ""
        self._buffers: list[torch.Tensor | None] = [None, None]
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="weights-gloo")

    def attach(self, members: Any, reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """One group of the sender and all workers of `members`: the one that is there if all are in it, else a new one.

        `reports` are what the members' workers say of themselves. A member that can't join is dropped, and the rest try again.
        """
        reports = dict(reports)
        while not self._all_are_in(members, reports):
            self._leave()
            members.require_some()
            asked = members.names()
            world_size = 1 + sum(len(reports[name]) for name in asked)
            store, token = self._open_store(), secrets.token_hex(8)
            joining = self._lane.submit(self._join, token, world_size, store)
            endpoint = {"transport": self.name, "host": self._host, "port": store.port, "token": token}
            endpoint |= {"world_size": world_size, "timeout_s": self._timeout_s}
            members.each("join the gloo group", self._connects(endpoint, self._rank_offsets(asked, reports)))
            reports = members.each("report which group they are in", lambda receiver: receiver.report())
            if members.names() != asked:
                continue  # the others could not join without the one that is gone; they try again
            outside = {name: self._outside(workers, token) for name, workers in reports.items()}
            for name, reason in outside.items():
                if reason:
                    members.drop(name, f"it did not join the gloo group at {self._host}: {reason}")
            members.require_some()
            try:
                group = joining.result(timeout=2 * self._timeout_s)
            except (RuntimeError, TimeoutError) as error:
                if any(outside.values()):
                    continue
                raise WeightSyncError(f"the gloo group of {world_size} ranks at {self._host} did not form: {error}.") from error
            self._group, self._token, self._store = group, token, store

    @staticmethod
    def _connects(endpoint: Mapping[str, Any], offsets: Mapping[str, int]) -> Callable[[Any], Future[None]]:
        return lambda receiver: receiver.connect({**endpoint, "rank_offset": offsets[receiver.name]})

    @staticmethod
    def _outside(workers: Sequence[Mapping[str, Any]], token: str) -> str:
        """Why an engine's workers are not in the group `token`; "" if all are."""
        return "; ".join(worker["transport_error"] for worker in workers if worker["endpoint"] != token)

    def _all_are_in(self, members: Any, reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
        tokens = [worker["endpoint"] for name in members.names() for worker in reports[name]]
        return self._group is not None and self._group.size() == 1 + len(tokens) and set(tokens) == {self._token}

    @staticmethod
    def _rank_offsets(names: Sequence[str], reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, int]:
        offsets, rank = {}, 1
        for name in names:
            offsets[name] = rank
            rank += len(reports[name])
        return offsets

    def _open_store(self) -> Any:
        import torch.distributed as dist

        return dist.TCPStore(self._host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self._timeout_s))

    def _join(self, token: str, world_size: int, store: Any) -> Any:
        return join_group(store, token, 0, world_size, host=self._host, timeout_s=self._timeout_s)

    def begin(self) -> None:
        """Nothing to prepare."""

    def room(self, sequence: int, size_bytes: int) -> torch.Tensor:
        """The buffer of bucket `sequence`: uint8, at least `size_bytes`."""
        return room(self._buffers, sequence, size_bytes)

    def path(self, sequence: int) -> str:
        """ "": there is no file."""
        return ""

    def transmit(self, sequence: int, written: Written) -> Future[None]:
        """Done when the bucket has left; fails with RuntimeError if the group is broken. In order, in a thread."""
        return self._lane.submit(self._send, self._group, list(messages_of(sequence, written.size_bytes, written.pieces)))

    def _send(self, group: Any, messages: Sequence[torch.Tensor]) -> None:
        """Nothing more goes to a group that failed: its members would take a message for the one that failed, and be ended."""
        if group is self._broken:
            raise RuntimeError("the gloo group broke before")
        try:
            for posted in [post_broadcast(group, message) for message in messages]:
                posted.wait()
        except RuntimeError:
            self._broken = group
            raise

    def recover(self, members: Any) -> bool:
        """After the loss of a member: a new group of the rest. True: what was on its way must be sent again."""
        self._leave()
        reports = members.each("report after the loss of an engine", lambda receiver: receiver.report())
        members.require_some()
        self.attach(members, reports)
        return True

    def finish(self) -> None:
        """Tells the receiving threads that the version has come to its end.

        Everything has arrived by then: a group that breaks here costs nothing but a new one for the next version.
        """
        try:
            self._lane.submit(self._send, self._group, [PartHeader(END).to_tensor()]).result(timeout=2 * self._timeout_s)
        except (RuntimeError, TimeoutError):
            self._leave()

    def abandon(self) -> None:
        """Leaves the group, so that no receiver goes on waiting for a bucket."""
        self._leave()

    def _leave(self) -> None:
        group, self._group, self._token = self._group, None, ""
        if group is not None:
            group.abort()
        self._store = None

    def close(self) -> None:
        """Leaves the group and ends the thread."""
        self._leave()
        self._lane.shutdown(wait=False, cancel_futures=True)
