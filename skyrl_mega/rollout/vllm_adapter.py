"""New versions of a LoRA adapter into a loaded vLLM model, whole or not at all; the base weights are never touched.

Runs in vLLM's workers, in the place of `vllm_reload.ModelReload`, where the engine was started with room for an adapter. There is
one adapter, under one number, from the engine's start on (at first one that changes nothing): every request asks for it, so that
requests in flight go on with the next version like those of a whole model. vLLM itself would only load adapters from disk.

The adapter arrives under PEFT's names, with its scale in B.

On CPU vLLM's own products make a copy of A and of B for every token (SmolLM2, rank 32: minutes for what takes seconds). Where all
tokens have the one adapter, which is always but in warm-up runs, ours are two plain matrix products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from skyrl_mega.rollout.vllm_requests import ADAPTER_NUMBER

if TYPE_CHECKING:
    from vllm.config.lora import LoRAConfig

#: What vLLM raises for an unknown name or a wrong shape.
LOAD_ERRORS = (KeyError, ValueError, AssertionError, RuntimeError, AttributeError, TypeError, IndexError)


class AdapterReload:
    """The swap of one model's adapter; the interface of `ModelReload`.

    `overwritten` is False but for a swap that failed half way: until `finish` the old adapter is in its place.
    """

    def __init__(self, model: torch.nn.Module, config: LoRAConfig) -> None:
        self._model, self._config = model, config
        self._manager: Any = model.lora_manager
        self._known = set(self._manager.modules) | {one for together in self._manager.packed_modules.values() for one in together}
        self._arrived: dict[str, torch.Tensor] = {}
        self._next: LoRAModel | None = None
        self.overwritten = False
        self.seconds = 0.0
        for wrapper in self._manager.punica_wrapper_mapping.values():
            if isinstance(wrapper, PunicaWrapperCPU):
                wrapper.add_lora_linear = _products_of_one_adapter(wrapper, wrapper.add_lora_linear)
        # All zeros: it changes nothing.
        self._current = self._manager.create_dummy_lora(ADAPTER_NUMBER, 1, getattr(model, "embedding_modules", None))
        # At the end of every weight update vLLM drops all adapters, taking the base for a new one; here it is the old one.
        self._drop_all = self._manager.remove_all_adapters
        self._manager.remove_all_adapters = self._put_back
        self._put_back()

    def begin(self) -> None:
        """Forgets what arrived of another version."""
        self._arrived, self._next = {}, None
        self.seconds = 0.0

    def load(self, weights: Sequence[tuple[str, torch.Tensor]], *, lasting: bool) -> str:
        """Keeps A's and B's until the version is whole; returns "". `lasting` as in `ModelReload.load`."""
        started = time.perf_counter()
        for name, value in weights:
            self._arrived[name] = (
                value.detach() if lasting and value.device.type == "cpu" else value.detach().to("cpu", copy=True)
            )
        self.seconds += time.perf_counter() - started
        return ""

    def what_is_missing(self) -> str:
        """Why vLLM can't take what arrived, "" if it can."""
        started = time.perf_counter()
        try:
            made = self._make()
        except LOAD_ERRORS as error:
            return f"vLLM's {type(self._model).__name__} could not take the adapter: {type(error).__name__}: {error}"
        for name, one in made.loras.items():
            if one.lora_a is None or one.lora_b is None:
                return f"{name} came without its {'A' if one.lora_a is None else 'B'}"
        unknown = sorted(set(made.loras) - self._known)
        if unknown:
            model = type(self._model).__name__
            return f"vLLM's {model} has no projection {unknown[0]} ({len(unknown)} are unknown); set lora.sync=merged"
        self._next = made
        self.seconds += time.perf_counter() - started
        return ""

    def _make(self) -> LoRAModel:
        if not self._arrived:
            raise ValueError("no tensor of it arrived")
        rank = next(value for name, value in self._arrived.items() if ".lora_A." in name).shape[0]
        if rank > self._config.max_lora_rank:
            raise ValueError(f"its rank is {rank}, the engine has room for {self._config.max_lora_rank}")
        renamed = getattr(self._model, "hf_to_vllm_mapper", None)
        return LoRAModel.from_lora_tensors(
            ADAPTER_NUMBER,
            self._arrived,
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
            device="cpu",
            dtype=self._config.lora_dtype,
            weights_mapper=None if renamed is None else renamed.get_rename_mapper(),
        )

    def finish(self) -> None:
        """The model holds the new adapter."""
        if self._next is None:
            raise RuntimeError("an adapter must be found whole (weight_update_report) before it is finished")
        started = time.perf_counter()
        self.overwritten = True
        self._current = self._next
        self._put_back()
        self.overwritten = False
        self._arrived, self._next = {}, None
        self.seconds += time.perf_counter() - started

    def _put_back(self) -> None:
        """The adapter of the current version, and no other."""
        self._drop_all()
        self._manager.add_adapter(self._current)
        self._manager.activate_adapter(ADAPTER_NUMBER)

    def abandon(self) -> None:
        """Ends the version; the old adapter never left."""
        self._arrived, self._next = {}, None


def _products_of_one_adapter(wrapper: Any, otherwise: Callable[..., None]) -> Callable[..., None]:
    """What stands in for `wrapper.add_lora_linear` on CPU: y += B (A x) where every token has the adapter, else as before."""

    def add_lora_linear(
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Sequence[torch.Tensor],
        lora_b_stacked: Sequence[torch.Tensor],
        scale: float,
        output_slices: Sequence[int],
        **settings: Any,
    ) -> None:
        """y [T, outputs of all slices], changed in place; x [T, inputs]; A [1, 1, R, inputs] and B [1, 1, outputs, R] of each."""
        if bool((wrapper.token_lora_indices != 0).any()):
            otherwise(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **settings)
            return
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            y[:, start : start + width].add_(F.linear(F.linear(x, a[0, 0]), b[0, 0]), alpha=scale)
            start += width

    return add_lora_linear
