"""New weights into a loaded vLLM model, whole or not at all, whichever way the tensors came.

Runs in vLLM's workers. One version is `begin`, `load` any number of times, then `finish` or `abandon`. Why it looks the way
it does; each point is a way in which a swap silently breaks the model:

- On CPU vLLM repacks Linear weights when it loads them, so new values can only enter through its layerwise reload, which
  collects a layer's tensors, packs them when the layer is complete, and copies them over the old ones.
- The layerwise reload keeps what it was given of an incomplete layer (weights whose bias comes in the next bucket). Those
  tensors view a transport's buffer, which a later bucket overwrites, so they are copied out.
- A layer that gets only part of its fused tensors, or of its experts, would be packed with garbage in the rest. Such a
  version is refused before anything is finalised.
- On CPU vLLM packs the experts of a mixture only when it sets up their kernel, once; a reload would copy unpacked weights over
  packed ones. Their kernel is set up anew with each version.
- The layerwise reload leaves reference cycles that hold a whole version of the weights. They are collected at once: left to
  Python, a run's memory grew by a version at each sync for hundreds of steps.
- A tied LM head holds its own packed copy of the embedding on CPU, which no reload touches. It is repacked at the end.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

#: What vLLM's weight loaders raise for an unknown name, a wrong shape or a wrong count.
LOAD_ERRORS = (KeyError, ValueError, AssertionError, RuntimeError, AttributeError, TypeError, IndexError)


def _is_derived(model: torch.nn.Module, name: str) -> bool:
    """Whether an attention layer made the parameter once others were loaded: multi-latent attention, of kv_b_proj.

    vLLM makes it anew when a reload is finalised. What a layer was created with, it has noted for the reload.
    """
    path, _, own_name = name.rpartition(".")
    layer = model.get_submodule(path)
    created, _ = get_layerwise_info(layer).restore_metadata
    return is_deferred_attention_layer(layer) and own_name not in created


class ModelReload:
    """The swap of one model's weights.

    `overwritten`: layers may hold weights of a version that did not arrive whole; so it stays until one does.
    """

    def __init__(self, model: torch.nn.Module, model_config: Any, device: torch.device) -> None:
        self._model, self._model_config, self._device = model, model_config, device
        self._expert_kernels: list[tuple[UnquantizedFusedMoEMethod, Any]] = []
        # Taken while every layer has its own tensors; a tied head shares the embedding's and is listed once.
        self._parameter_names = {name for name, _ in model.named_parameters() if not _is_derived(model, name)}
        embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
        self._tied_heads = [
            head
            for head in embeddings
            if isinstance(head, ParallelLMHead) and any(other is not head and other.weight is head.weight for other in embeddings)
        ]
        self._loaded: set[str] = set()
        self.overwritten = False
        self.seconds = 0.0
        self._frozen = False

    def begin(self) -> None:
        """Makes the model ready to be loaded."""
        self._loaded = set()
        self.seconds = 0.0
        self._freeze_once()
        initialize_layerwise_reload(self._model)
        self._take_expert_kernels_away()

    def load(self, weights: Sequence[tuple[str, torch.Tensor]], *, lasting: bool) -> str:
        """Loads whole fused groups; returns "" or what vLLM had against them.

        `lasting`: the tensors stay as they are until the version has ended; otherwise what must be kept of them is copied.
        """
        started = time.perf_counter()
        self.overwritten = True
        try:
            with torch.no_grad():
                self._loaded |= self._model.load_weights(iter(weights))
        except LOAD_ERRORS as error:
            return f"vLLM's {type(self._model).__name__} could not load a bucket: {type(error).__name__}: {error}"
        if not lasting:
            self._copy_incomplete_layers_out({tensor.untyped_storage().data_ptr() for _, tensor in weights})
        self.seconds += time.perf_counter() - started
        return ""

    def _pending_layers(self) -> Iterator[tuple[torch.nn.Module, Any]]:
        """Layers that took some of their tensors and still wait for others."""
        for layer in self._model.modules():
            reload = get_layerwise_info(layer)
            if reload.can_load() and reload.loaded_weights:
                yield layer, reload

    def _copy_incomplete_layers_out(self, borrowed_storages: set[int]) -> None:
        for _, reload in self._pending_layers():
            for _, bound in reload.loaded_weights:
                for key, value in bound.arguments.items():
                    if key == "param" or not isinstance(value, torch.Tensor):
                        continue
                    if value.untyped_storage().data_ptr() in borrowed_storages:
                        bound.arguments[key] = value.clone()

    def what_is_missing(self) -> str:
        """Why the model is not whole, "" if it is.

        Vocabulary tensors may stay incomplete: their rows are padded to a multiple of 64 that no checkpoint fills.
        """
        partial = [type(layer).__name__ for layer, _ in self._pending_layers() if isinstance(layer, LinearBase | RoutedExperts)]
        if partial:
            return f"{len(partial)} layers got only part of a fused group ({', '.join(sorted(set(partial)))})"
        missing = sorted(self._parameter_names - self._loaded)
        if missing:
            return f"{len(missing)} of {len(self._parameter_names)} parameters did not arrive, first {missing[0]}"
        return ""

    def finish(self) -> None:
        """The model holds the new weights."""
        self._finalize()
        self._repack_tied_heads()
        self.overwritten = False

    def abandon(self) -> None:
        """Ends the version; layers that did not complete get their old tensors back."""
        for _, reload in self._pending_layers():
            reload.load_numel = 0  # "nothing loaded": finalising puts the old tensors back instead of packing half a layer
        self._finalize()
        if self.overwritten:
            self._repack_tied_heads()

    def _finalize(self) -> None:
        finalize_layerwise_reload(self._model, self._model_config)
        self._give_unused_expert_kernels_back()
        # The reload leaves cycles behind that hold a whole version of the weights, until Python happens to look for such.
        gc.collect()

    def _freeze_once(self) -> None:
        """Before the first version: later collections need not look through all that a process of the engine's own has loaded.

        They took 0.4 s each. In the trainer's process it is not ours to say what will never be garbage.
        """
        if not self._frozen and multiprocessing.parent_process() is not None:
            gc.collect()
            gc.freeze()
        self._frozen = True

    def _take_expert_kernels_away(self) -> None:
        """So that each layer of experts, once complete, packs its weights and sets its kernel up as at the first load."""
        if self._device.type != "cpu":
            return
        methods = [layer.quant_method for layer in self._model.modules() if isinstance(layer, RoutedExperts)]
        unquantized = [method for method in methods if isinstance(method, UnquantizedFusedMoEMethod)]
        self._expert_kernels = [(method, method.moe_kernel) for method in unquantized]
        for method in unquantized:
            method.moe_kernel = None

    def _give_unused_expert_kernels_back(self) -> None:
        """Layers of experts that did not complete serve their old weights with their old kernels."""
        for method, kernel in self._expert_kernels:
            method.moe_kernel = method.moe_kernel or kernel

    def _repack_tied_heads(self) -> None:
        if self._device.type == "cpu":
            for head in self._tied_heads:
                head.quant_method.process_weights_after_loading(head)
