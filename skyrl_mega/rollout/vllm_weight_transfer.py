"""The engine's end of the shared-memory weight transport, as a backend of vLLM's own weight-transfer interface.

Runs in vLLM's workers (this process or child ones); vLLM imports it there because `ShmWorkerExtension` is the engine's
`worker_extension_cls`. The trainer's end is `vllm_weight_sink`. One version arrives as:

    start_weight_update -> update_weights (one per bucket) -> weight_update_report -> finish_weight_update

Why it looks the way it does; each point is a way in which a swap silently breaks the model:

- On CPU vLLM repacks Linear weights when it loads them, so new values can only enter through its layerwise reload, which
  collects a layer's tensors, packs them when the layer is complete, and copies them over the old ones.
- The layerwise reload keeps what it was given of an incomplete layer (weights whose bias comes in the next bucket). Those
  tensors view the shared buffer, which the next bucket overwrites, so they are copied out.
- A layer that gets only part of its fused tensors, or of its experts, would be packed with garbage in the rest. Such a
  version is refused before anything is finalised.
- On CPU vLLM packs the experts of a mixture only when it sets up their kernel, once; a reload would copy unpacked weights over
  packed ones. Their kernel is set up anew with each version.
- The layerwise reload leaves reference cycles that hold a whole version of the weights. They are collected at once: left to
  Python, a run's memory grew by a version at each sync for hundreds of steps.
- A tied LM head holds its own packed copy of the embedding on CPU, which no reload touches. It is repacked at the end.
- Checksums are recomputed over what arrived, before the first tensor of a bucket is loaded.

A refused version is reported and not raised: an exception in a child process would reach the trainer as text. What can't
be undone is only what layers already took over; `abandon_weight_update` says so (`overwritten`), and the engine then serves
nothing until a whole version arrived.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from skyrl_mega.errors import WeightSyncError
from skyrl_mega.rollout.transport.checksum import ChecksumEntry, joint_checksum, tensor_checksum
from skyrl_mega.rollout.transport.shm import BucketLayout, ShmBucketReader

BACKEND = "skyrl_mega_shm"

#: What vLLM's weight loaders raise for an unknown name, a wrong shape or a wrong count.
LOAD_ERRORS = (KeyError, ValueError, AssertionError, RuntimeError, AttributeError, TypeError, IndexError)


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: every bucket names its file."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """`bucket` is `BucketLayout.to_plain()`."""

    bucket: dict[str, Any]


@dataclass
class UpdateSession:
    """What one version brought so far. `error` is the first reason to refuse it, "" if none."""

    entries: list[ChecksumEntry] = field(default_factory=list)
    size_bytes: int = 0
    loaded_parameters: set[str] = field(default_factory=set)
    overwritten: bool = False
    error: str = ""


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Loads buckets from shared memory into the worker's model. See the module's text."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        self._reader = ShmBucketReader()
        self._session = UpdateSession()
        self._expert_kernels: list[tuple[UnquantizedFusedMoEMethod, Any]] = []
        # Taken while every layer has its own tensors; a tied head shares the embedding's and is listed once.
        self._parameter_names = {name for name, _ in self.model.named_parameters()}
        embeddings = [m for m in self.model.modules() if isinstance(m, VocabParallelEmbedding)]
        self._tied_heads = [
            head
            for head in embeddings
            if isinstance(head, ParallelLMHead) and any(other is not head and other.weight is head.weight for other in embeddings)
        ]

    def start_weight_update(self) -> None:
        self._session = UpdateSession()
        initialize_layerwise_reload(self.model)
        self._take_expert_kernels_away()

    def receive_weights(self, update_info: ShmUpdateInfo) -> None:
        session = self._session
        if session.error:
            return
        layout = BucketLayout.from_plain(update_info.bucket)
        try:
            weights = list(self._reader.read(layout))
        except WeightSyncError as error:
            session.error = str(error)
            return
        for (name, tensor), slot in zip(weights, layout.slots, strict=True):
            received = tensor_checksum(tensor)
            if received != slot.checksum:
                session.error = f"checksum of {name} must be {slot.checksum} as sent, but {received} arrived"
                return
            session.entries.append((name, slot.dtype, slot.shape, received))
            session.size_bytes += slot.size_bytes
        session.overwritten = True
        try:
            with torch.no_grad():
                session.loaded_parameters |= self.model.load_weights(iter(weights))
        except LOAD_ERRORS as error:
            session.error = f"vLLM's {type(self.model).__name__} could not load a bucket: {type(error).__name__}: {error}"
            return
        self._copy_incomplete_layers_out()

    def _pending_layers(self) -> Iterator[tuple[torch.nn.Module, Any]]:
        """Layers that took some of their tensors and still wait for others."""
        for layer in self.model.modules():
            reload = get_layerwise_info(layer)
            if reload.can_load() and reload.loaded_weights:
                yield layer, reload

    def _copy_incomplete_layers_out(self) -> None:
        for _, reload in self._pending_layers():
            for _, bound in reload.loaded_weights:
                for key, value in bound.arguments.items():
                    if key != "param" and isinstance(value, torch.Tensor) and self._reader.is_view(value):
                        bound.arguments[key] = value.clone()

    def report(self) -> dict[str, Any]:
        """What arrived and whether it is whole; plain values, for RPC.

        Vocabulary tensors may stay incomplete: their rows are padded to a multiple of 64 that no checkpoint fills.
        """
        session = self._session
        missing = sorted(self._parameter_names - session.loaded_parameters)
        partial = [type(layer).__name__ for layer, _ in self._pending_layers() if isinstance(layer, LinearBase | RoutedExperts)]
        if not session.error and partial:
            session.error = f"{len(partial)} layers got only part of a fused group ({', '.join(sorted(set(partial)))})"
        if not session.error and missing:
            session.error = f"{len(missing)} of {len(self._parameter_names)} parameters did not arrive, first {missing[0]}"
        return {
            "error": session.error,
            "num_tensors": len(session.entries),
            "size_bytes": session.size_bytes,
            "checksum": joint_checksum(session.entries),
        }

    def finish_weight_update(self) -> None:
        self._finalize()
        self._repack_tied_heads()

    def abandon(self) -> bool:
        """Whether some layer holds new weights now. Ends the session; layers that did not complete get their old tensors back."""
        for _, reload in self._pending_layers():
            reload.load_numel = 0  # "nothing loaded": finalising puts the old tensors back instead of packing half a layer
        self._finalize()
        if self._session.overwritten:
            self._repack_tied_heads()
        return self._session.overwritten

    def _finalize(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self._give_unused_expert_kernels_back()
        # The reload leaves cycles behind that hold a whole version of the weights, until Python happens to look for such.
        gc.collect()

    def _take_expert_kernels_away(self) -> None:
        """So that each layer of experts, once complete, packs its weights and sets its kernel up as at the first load."""
        if self.device.type != "cpu":
            return
        methods = [layer.quant_method for layer in self.model.modules() if isinstance(layer, RoutedExperts)]
        unquantized = [method for method in methods if isinstance(method, UnquantizedFusedMoEMethod)]
        self._expert_kernels = [(method, method.moe_kernel) for method in unquantized]
        for method in unquantized:
            method.moe_kernel = None

    def _give_unused_expert_kernels_back(self) -> None:
        """Layers of experts that did not complete serve their old weights with their old kernels."""
        for method, kernel in self._expert_kernels:
            method.moe_kernel = method.moe_kernel or kernel

    def _repack_tied_heads(self) -> None:
        if self.device.type == "cpu":
            for head in self._tied_heads:
                head.quant_method.process_weights_after_loading(head)

    def shutdown(self) -> None:
        self._reader.close()


class ShmWorkerExtension:
    """Mixed into vLLM's worker: the two calls that its weight-transfer interface lacks."""

    def weight_update_report(self) -> dict[str, Any]:
        return self.weight_transfer_engine.report()

    def abandon_weight_update(self) -> dict[str, bool]:
        with set_current_vllm_config(self.vllm_config):
            overwritten = self.weight_transfer_engine.abandon()
        self.weight_transfer_engine.reset_weight_update_target()
        self._weight_update_active = False
        return {"overwritten": overwritten}


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, ShmWeightTransferEngine)
