"""Tensors that lie in host memory except while they are used: optimizer state, and the weights of frozen models.

AdamW's moments, and the float32 masters of bfloat16 weights, are six times the size of the weights and are touched once per
update; a reference or a teacher is read once per step. Parked, they leave the device to activations, and to an engine on the
same card. The device's memory is freed by emptying the tensors' storage, so that every reference to them stays what it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer


class ParkedTensors:
    """Tensors in host memory (pinned beside CUDA) until `fetch`, and again after `park`. Each must fill its storage."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._host = [torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in self._tensors]
        self._sizes = [t.untyped_storage().nbytes() for t in self._tensors]
        self.is_parked = False
        self.park()

    @property
    def size_bytes(self) -> int:
        """What the device is spared."""
        return sum(self._sizes)

    def park(self, *, is_changed: bool = True) -> None:
        """Moves the tensors to the host; nothing where they are there already. Not `is_changed`: the host's copy is as good."""
        if self.is_parked:
            return
        if is_changed:
            for tensor, host in zip(self._tensors, self._host, strict=True):
                host.copy_(tensor, non_blocking=True)
        _wait(self._tensors)
        for tensor in self._tensors:
            tensor.untyped_storage().resize_(0)
        self.is_parked = True

    def fetch(self) -> None:
        """Moves the tensors to the device; nothing where they are there already."""
        if not self.is_parked:
            return
        for tensor, host, size in zip(self._tensors, self._host, self._sizes, strict=True):
            tensor.untyped_storage().resize_(size)
            tensor.copy_(host, non_blocking=True)
        _wait(self._tensors)
        self.is_parked = False

    @contextlib.contextmanager
    def on_device(self, *, is_changed: bool) -> Iterator[None]:
        """The tensors are there in the block, which changes them or does not."""
        self.fetch()
        try:
            yield
        finally:
            self.park(is_changed=is_changed)


def frozen_weights(chunks: Iterable[torch.nn.Module]) -> list[torch.Tensor]:
    """The weights of a model that is not trained, each once."""
    return list({id(weight): weight.detach() for chunk in chunks for weight in chunk.parameters()}.values())


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
