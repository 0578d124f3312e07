"""Which transport takes the weights to the engines, and the sender's half of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_mega.config.schema import RolloutConfig
from skyrl_mega.errors import BackendUnavailableError, ConfigError
from skyrl_mega.rollout.transport.delta import DeltaEncoder
from skyrl_mega.rollout.transport.encode import FullEncoder
from skyrl_mega.rollout.transport.gloo import GlooCarrier
from skyrl_mega.rollout.transport.gloo_group import LOOPBACK
from skyrl_mega.rollout.transport.host import HostTransport
from skyrl_mega.rollout.transport.shm import ShmCarrier

if TYPE_CHECKING:
    from skyrl_mega.rollout.transport.native import NativeTransport

HOST_TRANSPORTS = ("shm", "gloo")


def resolve_transport(rollout: RolloutConfig, *, device: str, in_process: bool, one_machine: bool, trainer_ranks: int) -> str:
    """shm, gloo, nccl or cuda_ipc: what `rollout.weight_transport` names or, for auto, the first of these that fits.

    - cuda_ipc: GPUs, engines on the GPU of the one trainer rank, in processes of their own;
    - nccl: GPUs, engines on others (`rollout.colocated` false);
    - shm: every engine on the sender's machine (`one_machine`);
    - gloo: else.

    `rollout.weight_delta` needs host memory: shm or gloo. Raises ConfigError or BackendUnavailableError where what was asked
    for can't work.
    """
    asked = rollout.weight_transport
    if asked == "auto":
        if device == "cuda" and not in_process and not rollout.weight_delta:
            if rollout.colocated and trainer_ranks == 1 and one_machine:
                return "cuda_ipc"
            if not rollout.colocated:
                return "nccl"
        return "shm" if one_machine else "gloo"
    if rollout.weight_delta and asked not in HOST_TRANSPORTS:
        raise ConfigError(
            f"rollout.weight_delta works over {' and '.join(HOST_TRANSPORTS)}, and rollout.weight_transport is {asked}; "
            "turn one of them off."
        )
    if asked == "shm" and not one_machine:
        raise ConfigError("rollout.weight_transport=shm reaches engines on the trainer's machine only; take gloo or nccl.")
    if asked not in HOST_TRANSPORTS and device != "cuda":
        raise BackendUnavailableError(
            f"rollout.weight_transport={asked} needs CUDA, and the device is {device}; take shm or gloo."
        )
    if asked not in HOST_TRANSPORTS and in_process:
        raise ConfigError(
            f"rollout.weight_transport={asked} joins processes, and the engine runs in the trainer's own; take shm, or "
            "rollout.placement=child_process."
        )
    if asked == "nccl" and rollout.colocated:
        raise ConfigError(
            "rollout.weight_transport=nccl can't join two processes on one GPU; set rollout.colocated=false, or take "
            "cuda_ipc or shm."
        )
    if asked == "cuda_ipc" and not (rollout.colocated and one_machine):
        raise ConfigError("rollout.weight_transport=cuda_ipc reaches engines on the trainer's own GPU (rollout.colocated=true).")
    return asked


def make_transport(
    name: str, *, delta: bool, timeout_s: float, host: str = LOOPBACK, directory: Path | None = None
) -> HostTransport | NativeTransport:
    """The sender's half of transport `name`, as `resolve_transport` gives it.

    `host`: this machine's address as the engines reach it (gloo, nccl). `directory` of the shared files; None: /dev/shm.
    `timeout_s` is the deadline of the sink's waits; a broken group is noticed in half of it, which leaves the sink the time to
    tell the engine that hangs from those that wait for it. Raises BackendUnavailableError.
    """
    if name not in HOST_TRANSPORTS:
        from skyrl_mega.rollout.transport.native import NativeTransport

        return NativeTransport(name, host=host, timeout_s=timeout_s)
    encoder = DeltaEncoder() if delta else FullEncoder(lends=name == "gloo")
    carrier = ShmCarrier(directory) if name == "shm" else GlooCarrier(host=host, timeout_s=timeout_s / 2)
    return HostTransport(carrier, encoder)
