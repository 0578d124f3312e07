"""The sender's half of nccl and cuda_ipc: vLLM's own trainer-side interface, bucket by bucket.

vLLM's `WeightTransferTrainerFactory` makes a trainer engine from an init info, a `WeightSource` and a client. Its
`send_weights` sends a whole source and drives start, update and finish through the client. Here the source is the bucket at
hand, start and finish are no-ops, and update announces the bucket to all engines of the fleet: so versions, whole groups,
accounts, deadlines and "all or nothing" stay with the fleet's sink, as for every transport. vLLM packs a bucket into pieces
and overlaps packing, broadcast and loading of these by itself.

Checksums are taken on the GPU at both ends (`device_checksum`); only one number per tensor reaches the host.

What differs from the transports through host memory: NCCL can't leave a broken group. If an engine dies or hangs in a
push, the version fails for all of them, and the thread that sends stays in NCCL until NCCL gives up. CUDA IPC reaches engines
on the sender's own GPU; with several trainer ranks each would have to lend its memory, which is not built.
"""

from __future__ import annotations

import queue
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from skyrl_mega.errors import BackendUnavailableError, WeightSyncError
from skyrl_mega.rollout.transport.checksum import ChecksumEntry, joint_checksum, tensor_checksum
from skyrl_mega.rollout.transport.layout import dtype_name
from skyrl_mega.rollout.transport.native_receiver import VLLM_BACKENDS, handles_to_plain

if TYPE_CHECKING:
    import torch

NamedTensors = Sequence[tuple[str, "torch.Tensor"]]
Announce = Callable[[dict[str, Any]], list["Future[None]"]]


class BucketSource:
    """vLLM's `WeightSource` over the bucket at hand."""

    def __init__(self) -> None:
        self.tensors: NamedTensors = ()

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors)


class FleetClient:
    """vLLM's `VLLMWeightSyncClient` over the receivers of a fleet."""

    def __init__(self, transport: str, token: str, members: Any, reports: Mapping[str, Sequence[Any]], timeout_s: float) -> None:
        self._transport, self._token, self._timeout_s = transport, token, timeout_s
        self._members, self._reports = members, reports
        self.announce: Announce | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connects every engine; where the init info has ranks, each engine's workers follow those of the one before."""
        offsets, rank = {}, init_info.get("rank_offset", 0)
        for name in self._members.names():
            offsets[name] = rank
            rank += len(self._reports[name])

        def connect(receiver: Any) -> Future[None]:
            own = {"rank_offset": offsets[receiver.name]} if "rank_offset" in init_info else {}
            endpoint = {"transport": self._transport, "token": self._token, "init_info": {**init_info, **own}}
            return receiver.connect(endpoint)

        self._members.each(f"join {self._transport}", connect)

    def start_weight_update(self) -> None:
        """The sink has begun the version."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Announces a part of the bucket, and waits until all engines have taken it or failed (the sink sees to these)."""
        assert self.announce is not None
        if update_info.get("ipc_handles") is not None:
            update_info = {**update_info, "ipc_handles": handles_to_plain(update_info["ipc_handles"])}
        wait(self.announce({"transport": self._transport, "update_info": update_info}), timeout=self._timeout_s)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The sink commits the version."""


class NativeTransport:
    """Implements `weights.transport.WeightTransport` over vLLM's nccl or ipc backend."""

    payload_bytes = 0

    def __init__(self, name: str, *, host: str, timeout_s: float) -> None:
        """`name`: nccl or cuda_ipc. `host`: this machine's address as the engines reach it.

        Raises BackendUnavailableError without CUDA, or for cuda_ipc with several trainer ranks.
        """
        import torch

        if not torch.cuda.is_available():
            raise BackendUnavailableError(
                f"rollout.weight_transport={name} needs CUDA, which this machine lacks; take shm, or gloo between machines."
            )
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if name == "cuda_ipc" and ranks > 1:
            raise BackendUnavailableError(
                f"rollout.weight_transport=cuda_ipc works with one trainer rank, and there are {ranks}; take shm, or nccl with "
                "rollout.colocated=false."
            )
        self.name, self._host, self._timeout_s = name, host, timeout_s
        self._source = BucketSource()
        self._client: FleetClient | None = None
        self._trainer: Any = None
        self._token = ""

    def begin(self, members: Any) -> None:
        """Opens a version for `members`; connects them anew if they are not those of the last one."""
        self._entries: list[ChecksumEntry] = []
        self._size_bytes = 0
        self.payload_bytes = 0
        self._checksum_s = 0.0
        self._send_s = 0.0
        reports = members.each("report what they hold", lambda receiver: receiver.report())
        members.require_some()
        workers = [worker for name in members.names() for worker in reports[name]]
        all_are_in = all(worker["endpoint"] == self._token for worker in workers)
        if self._trainer is not None and len(workers) == self._num_workers and all_are_in:
            return
        self._connect(members, reports, len(workers))
        for name, each in members.each("report whether they joined", lambda receiver: receiver.report()).items():
            lost = [worker["transport_error"] for worker in each if worker["endpoint"] != self._token]
            if lost:
                members.drop(name, f"it did not join {self.name}: {lost[0]}")
        members.require_some()
        if len(members.names()) != len(reports):
            self.close()
            raise WeightSyncError(
                f"not all engines joined {self.name}: {members.reasons()}; the next version tries without them."
            )

    def _connect(self, members: Any, reports: Mapping[str, Sequence[Any]], num_workers: int) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self.close()
        self._token, self._num_workers = secrets.token_hex(8), num_workers
        self._client = FleetClient(self.name, self._token, members, reports, self._timeout_s)
        init_info = trainer_init_info(self.name, self._host, 1 + num_workers)
        self._trainer = self._in_time(
            "joining",
            lambda: WeightTransferTrainerFactory.trainer_init(init_info, client=self._client, source=self._source),
        )

    def _in_time(self, doing: str, call: Callable[[], Any]) -> Any:
        """The result of `call` in a thread of its own: NCCL can't be interrupted, but it can be left behind."""
        outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                outcome.put((call(), None))
            except Exception as error:  # noqa: BLE001 (whatever it is, it is the cause to name: not a hang)
                outcome.put((None, error))

        threading.Thread(target=run, name=f"weights-{self.name}", daemon=True).start()
        try:
            result, error = outcome.get(timeout=self._timeout_s)
        except queue.Empty:
            self._trainer = self._client = None  # the thread still holds them
            raise WeightSyncError(
                f"{doing} {self.name} must be done in {self._timeout_s:g} s, and was not: an engine hangs."
            ) from None
        if error is not None:
            raise WeightSyncError(f"{doing} {self.name} failed: {type(error).__name__}: {error}.") from error
        return result

    def send(self, sequence: int, tensors: NamedTensors, announce: Announce) -> Future[None] | None:
        """Sends a bucket and waits until all engines have taken it. Raises WeightSyncError if the group breaks."""
        assert self._client is not None
        self._account(tensors)
        self._source.tensors, self._client.announce = tensors, announce
        # cuda_ipc lends a buffer to the engines: as large as the bucket, which then travels in one piece.
        self._trainer.packed_buffer_size_bytes = max(sum(tensor.numel() * tensor.element_size() for _, tensor in tensors), 1)
        self._in_time(f"sending bucket {sequence} by", self._trainer.send_weights)
        self._source.tensors = ()
        return None

    def _account(self, tensors: NamedTensors) -> None:
        for name, tensor in tensors:
            self._entries.append((name, dtype_name(tensor), tuple(tensor.shape), tensor_checksum(tensor.contiguous())))
            self._size_bytes += tensor.numel() * tensor.element_size()
        self.payload_bytes = self._size_bytes

    def resend(self, sequence: int, announce: Announce) -> Future[None] | None:
        raise WeightSyncError(f"{self.name} can't send a bucket again.")

    def recover(self, members: Any) -> bool:
        """False for cuda_ipc. Raises WeightSyncError for nccl, whose group is broken for all."""
        if self.name == "nccl":
            self._trainer = self._client = None
            raise WeightSyncError(f"the nccl group lost an engine: {members.reasons()}; nccl can't go on without it.")
        return False

    def finish(self) -> dict[str, Any]:
        """What every engine must have received (num_tensors, size_bytes, checksum)."""
        return {
            "num_tensors": len(self._entries),
            "size_bytes": self._size_bytes,
            "checksum": joint_checksum(self._entries),
        }

    def committed(self) -> None:
        """Nothing to keep."""

    def abandoned(self) -> None:
        """Nothing to undo: every bucket was taken or has failed."""

    @property
    def seconds(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Leaves the group."""
        trainer, self._trainer, self._client = self._trainer, None, None
        if trainer is not None:
            trainer.shutdown()


def trainer_init_info(name: str, host: str, world_size: int) -> Any:
    """vLLM's init info of the sender, rank 0."""
    if VLLM_BACKENDS[name] == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(packed=True, rank=0)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(master_address=host, master_port=free_port(host), world_size=world_size, packed=True, rank=0)


def free_port(host: str) -> int:
    """A port that was free a moment ago; NCCL's rendezvous opens it itself."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
