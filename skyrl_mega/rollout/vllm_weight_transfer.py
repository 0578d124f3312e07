"""The engine's end of every weight transport, as a backend of vLLM's own weight-transfer interface.

Runs in vLLM's workers (this process or others). An engine is started with

    worker_extension_cls=WORKER_EXTENSION, weight_transfer_config=WeightTransferConfig(backend=BACKEND)

and `init_weight_transfer_engine({"init_info": {}})`, whatever the transport. Its owner passes on what a `WeightReceiver` is
told; `rpc` is collective_rpc of LLM or AsyncLLM, which calls a method of the worker by name:

    connect(endpoint)   rpc("connect_weight_transport", args=(endpoint,))
    begin(version)      start_weight_update()
    load(bucket)        update_weights({"update_info": {"bucket": bucket}})
    report()            rpc("weight_update_report"); at any time, not only at the end of a version
    commit(version)     finish_weight_update(), then reset the prefix cache, then update_weight_version(str(version))
    abandon()           rpc("abandon_weight_update"); True if no worker answers {"overwritten": True}

None of these raises because a transport failed or a bucket does not fit: an exception in a worker would reach the trainer as
text. `report` says it. What travels through host memory (shm, gloo, their differences) is taken by `BucketReceiver`; nccl and
cuda_ipc by vLLM's own engines, made when the trainer connects; either way the tensors go through `ModelReload` (or
`AdapterReload`), and are counted and summed before they are loaded.

What can't be undone is only what layers already took over; `abandon_weight_update` says so (`overwritten`), and the engine
then serves nothing until a whole version arrived.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from skyrl_mega.rollout.transport.native_receiver import NativeReceiver
from skyrl_mega.rollout.transport.receiver import BucketReceiver
from skyrl_mega.rollout.vllm_adapter import AdapterReload
from skyrl_mega.rollout.vllm_reload import ModelReload

BACKEND = "skyrl_mega"
WORKER_EXTENSION = "skyrl_mega.rollout.vllm_weight_transfer.WeightWorkerExtension"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing: transports are joined by `connect_weight_transport`, again whenever their members change."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """`bucket`: plain values that name the transport and what is in the bucket."""

    bucket: dict[str, Any]


class CheckedWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives, checks and loads one version after another. See the module's text."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._buckets = BucketReceiver()
        self._native: NativeReceiver | None = None
        # An engine with room for an adapter gets adapters, and nothing else.
        self._reload: ModelReload | AdapterReload
        if self.vllm_config.lora_config is not None:
            self._reload = AdapterReload(self.model, self.vllm_config.lora_config)
        else:
            self._reload = ModelReload(self.model, self.model_config, self.device)

    @property
    def _worker_rank(self) -> int:
        """Among the workers of this engine."""
        return self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank

    def connect(self, endpoint: Mapping[str, Any]) -> None:
        if NativeReceiver.serves(endpoint):
            self._close_native()
            self._native = NativeReceiver(endpoint, self.config, self.vllm_config, self.device, self.model)
        else:
            self._buckets.connect(endpoint, self._worker_rank)

    def start_weight_update(self) -> None:
        self._buckets.begin()
        self._reload.begin()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        bucket = update_info.bucket
        if NativeReceiver.serves(bucket):
            self._receive_native(bucket)
            return
        # Also when the version is refused already: a bucket that travels to all must be taken by all.
        weights = self._buckets.receive(bucket)
        if weights:
            self._buckets.error = self._reload.load(weights, lasting=self._buckets.lasting)
        self._buckets.release(bucket)

    def _receive_native(self, bucket: Mapping[str, Any]) -> None:
        if self._native is None:
            self._buckets.error = f"a bucket came by {bucket['transport']} before that transport was joined."
            return

        def load(weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
            weights = list(weights)
            if not self._buckets.error:
                self._buckets.account(weights)
                self._buckets.error = self._reload.load(weights, lasting=False)
            return {name for name, _ in weights}

        error = self._native.receive(bucket, load)
        self._buckets.error = self._buckets.error or error

    def report(self) -> dict[str, Any]:
        """What arrived and whether it is whole, and what the sender goes by; plain values, for RPC."""
        error = self._buckets.error or self._reload.what_is_missing()
        state = self._buckets.state()
        if self._native is not None:
            state |= {"endpoint": self._native.token, "transport_error": self._native.error}
        return {
            "error": error,
            **self._buckets.totals(),
            **state,
            "num_workers": self.parallel_config.world_size * self.parallel_config.data_parallel_size,
            "seconds": {**self._buckets.seconds, "load": self._reload.seconds},
        }

    def finish_weight_update(self) -> None:
        self._reload.finish()
        self._buckets.commit()

    def abandon(self) -> bool:
        """Whether some layer holds new weights now. Ends the session; layers that did not complete get their old tensors back."""
        self._reload.abandon()
        self._buckets.abandon()
        return self._reload.overwritten

    def _close_native(self) -> None:
        if self._native is not None:
            self._native.close()
            self._native = None

    def shutdown(self) -> None:
        self._close_native()
        self._buckets.close()


class WeightWorkerExtension:
    """Mixed into vLLM's worker: the calls that its weight-transfer interface lacks."""

    def connect_weight_transport(self, endpoint: dict[str, Any]) -> None:
        self.weight_transfer_engine.connect(endpoint)

    def weight_update_report(self) -> dict[str, Any]:
        return self.weight_transfer_engine.report()

    def abandon_weight_update(self) -> dict[str, bool]:
        overwritten = False
        if self._weight_update_active:
            with set_current_vllm_config(self.vllm_config):
                overwritten = self.weight_transfer_engine.abandon()
            self.weight_transfer_engine.reset_weight_update_target()
            self._weight_update_active = False
        return {"overwritten": overwritten}


#: The extension's name before it served transports other than shared memory.
ShmWorkerExtension = WeightWorkerExtension

if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, CheckedWeightTransferEngine)
