"""Activations that wait in host memory for the backward pass.

What a layer's operators save for their backward is copied to (pinned) host memory as soon as it is saved, on a stream of its own,
so that the copies run beside the next operators; the backward pass copies each tensor back when it asks for it. Weights are saved
too, but stay where they are. Exact: the same bits come back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

#: Smaller tensors (statistics, indices) are not worth a transfer.
MIN_BYTES = 2**16


class _OnHost(NamedTuple):
    values: torch.Tensor
    device: torch.device
    copied: Any  # a CUDA event, or None


class ActivationOffload:
    """Wraps layers so that their activations are offloaded. `moved_bytes` counts what has gone to the host so far."""

    def __init__(self, device: torch.device, min_bytes: int = MIN_BYTES) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._min_bytes = min_bytes
        self._kept: set[int] = set()
        self.moved_bytes = 0

    def wrap(self, layers: Iterable[torch.nn.Module]) -> None:
        """Offloads what the forward passes of `layers` save from now on."""
        for layer in layers:
            layer.forward = self._offloading(layer, layer.forward)

    def _offloading(self, layer: torch.nn.Module, forward: Any) -> Any:
        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            # The gradient buffers move weights after the layer was built: ask for their place at each pass.
            self._kept = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
            with torch.autograd.graph.saved_tensors_hooks(self._to_host, self._to_device):
                return forward(*args, **kwargs)

        return call

    def _to_host(self, saved: torch.Tensor) -> torch.Tensor | _OnHost:
        if saved.nbytes < self._min_bytes or saved.untyped_storage().data_ptr() in self._kept:
            return saved
        self.moved_bytes += saved.nbytes
        if self._stream is None:
            return _OnHost(saved.clone(), saved.device, None)
        host = torch.empty(saved.shape, dtype=saved.dtype, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(saved.device))
        with torch.cuda.stream(self._stream):
            host.copy_(saved, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        # Its memory must not be given to another tensor before the copy has read it.
        saved.record_stream(self._stream)
        return _OnHost(host, saved.device, copied)

    def _to_device(self, packed: torch.Tensor | _OnHost) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if packed.copied is not None:
            packed.copied.synchronize()
        return packed.values.to(packed.device, non_blocking=True)
