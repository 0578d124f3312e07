"""Which weights of a model a `Trainable` trains, stores and publishes: all of them, or one adapter beside frozen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from skyrl_mega.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.models.hf_io import HFExporter
    from skyrl_mega.models.lora_weights import AdapterWeights
    from skyrl_mega.parallel.topology import Topology


class WholeModel:
    """Every weight of the model.

    `exporter` gives the whole model as it is now, `base_exporter` without the adapter; `adapter` is the adapter that is trained.
    """

    adapter: AdapterWeights | None = None

    def __init__(self, chunks: Sequence[PolicyModel], topology: Topology) -> None:
        from skyrl_mega.models.hf_io import HFExporter

        self._chunks = chunks
        self.exporter: HFExporter = HFExporter(chunks, topology)
        self.base_exporter = self.exporter

    def on(self) -> AbstractContextManager[None]:
        """Inside the block these weights are the ones that forward passes use and that want gradients."""
        return nullcontext()

    def off(self) -> AbstractContextManager[None]:
        """Inside the block the model is the one that training began with. ConfigError where that is gone."""
        raise ConfigError("a model that is trained whole has no base to go back to; set `lora.rank`, or load a second model.")

    def sharded_state(self, prefix: str) -> dict[str, Any]:
        """As a Megatron dist checkpoint holds them. *All ranks.*"""
        from skyrl_mega.models.build import sharded_state

        return sharded_state(self._chunks, prefix=prefix)

    def load_state(self, state: Mapping[str, Any], prefix: str) -> None:
        """Restores what `sharded_state` described, once it is loaded."""
        from skyrl_mega.models.build import load_state

        load_state(self._chunks, dict(state))


class OneAdapter(WholeModel):
    """The adapter `name` of those beside the model."""

    def __init__(self, chunks: Sequence[PolicyModel], topology: Topology, name: str) -> None:
        from skyrl_mega.models.lora_weights import AdapterWeights, MergedExporter

        super().__init__(chunks, topology)
        self._name, self._adapters = name, chunks[0].adapters
        self.adapter = AdapterWeights(self._adapters, name)
        self.exporter = MergedExporter(chunks, topology, weights=self.adapter)

    def on(self) -> AbstractContextManager[None]:
        return self._adapters.on(self._name)

    def off(self) -> AbstractContextManager[None]:
        return self._adapters.on(None)

    def sharded_state(self, prefix: str) -> dict[str, Any]:
        from skyrl_mega.models.lora_weights import sharded_state

        return sharded_state(self._adapters, self._name, prefix=prefix)

    def load_state(self, state: Mapping[str, Any], prefix: str) -> None:
        from skyrl_mega.models.lora_weights import load_state

        load_state(self._adapters, self._name, state, prefix=prefix)


def trained_weights(chunks: Sequence[PolicyModel], topology: Topology, adapter: str | None) -> WholeModel:
    """*All ranks.* `adapter`: see `Trainable`."""
    return WholeModel(chunks, topology) if adapter is None else OneAdapter(chunks, topology, adapter)
