"""Optimizer state that lies in host memory except while an update uses it.

AdamW's moments, and the float32 masters of bfloat16 weights, are six times the size of the weights and are touched once per
update. Parked, they leave the device to activations, and to an engine on the same card. The device's memory is freed by
emptying the tensors' storage, so that every reference to them stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


class ParkedState:
    """The state tensors of an optimizer, in host memory (pinned beside CUDA) until `fetch`, and again after `park`."""

    def __init__(self, optimizer: MegatronOptimizer, weights: Iterable[torch.nn.Parameter]) -> None:
        """`weights` are the model's: what shares memory with them, or with gradients, is not parked."""
        self._tensors = own_tensors(optimizer, weights)
        self._host = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in self._tensors]
        self._sizes = [t.untyped_storage().nbytes() for t in self._tensors]
        self.is_parked = False
        self.park()

    @property
    def size_bytes(self) -> int:
        """What the device is spared."""
        return sum(self._sizes)

    def park(self) -> None:
        """Moves the state to the host; nothing where it is there already."""
        if self.is_parked:
            return
        for tensor, host in zip(self._tensors, self._host, strict=True):
            host.copy_(tensor, non_blocking=True)
        _wait(self._tensors)
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(0)
        self.is_parked = True

    def fetch(self) -> None:
        """Moves the state to the device; nothing where it is there already."""
        if not self.is_parked:
            return
        for tensor, host, size in zip(self._tensors, self._host, self._sizes, strict=True):
            tensor.untyped_storage().resize_(size)
            tensor.copy_(host, non_blocking=True)
        _wait(self._tensors)
        self.is_parked = False


def own_tensors(optimizer: MegatronOptimizer, weights: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The optimizer's moments, and those of its masters that are no views of `weights` or of a buffer, each once."""
    found: dict[int, torch.Tensor] = {}
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        masters = [parameter.detach() for group in part.optimizer.param_groups for parameter in group["params"]]
        states = [value for state in part.optimizer.state.values() for value in state.values()]
        for tensor in [*masters, *states]:
            fills_its_storage = isinstance(tensor, torch.Tensor) and (
                tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            )
            if fills_its_storage and tensor.ndim > 0 and tensor.numel() > 0:
                found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    kept = {weight.untyped_storage().data_ptr() for weight in weights}
    return [tensor for place, tensor in found.items() if place not in kept]


def _wait(tensors: list[torch.Tensor]) -> None:
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.synchronize()
