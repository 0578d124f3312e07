"""Frozen models that give log-probabilities: the reference of the KL term, a teacher. Forward passes only."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from skyrl_mega.errors import ConfigError
from skyrl_mega.training.logprobs import head_topk
from skyrl_mega.training.parking import ParkedTensors, frozen_weights
from skyrl_mega.training.policy import Policy, forward_logprobs
from skyrl_mega.training.schedule import forward_per_token
from skyrl_mega.types import MicroBatch, TrainBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skyrl_mega.config.schema import Config
    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.parallel.topology import Topology


class BaseModel:
    """The base of a policy that trains an adapter: the same weights, with the adapter off. All ranks call."""

    def __init__(self, policy: Policy) -> None:
        """Raises ConfigError where the policy trains the whole model: its base is gone."""
        if policy.weights.adapter is None:
            raise ConfigError("a reference without weights of its own needs `lora.rank` > 0.")
        self._policy = policy

    def compute_logprobs(self, batch: TrainBatch) -> list[torch.Tensor]:
        """See `ReferenceModel.compute_logprobs`."""
        policy = self._policy
        with policy.weights.off():
            return forward_logprobs(policy.chunks, batch, policy.config, policy.topology)


def make_reference(config: Config, topology: Topology, policy: Policy) -> ReferenceModel | BaseModel | None:
    """What the KL term compares `policy` with; None without one. A second model is loaded only where all weights are trained."""
    if config.algorithm.kl.coef == 0.0:
        return None
    return BaseModel(policy) if config.lora.rank > 0 else ReferenceModel(config, topology)


class ReferenceModel:
    """The model of `path` (the policy's starting weights unless given), in the policy's layout, without gradients. All ranks
    call.

    A model of its own must have the policy's vocabulary.
    """

    def __init__(self, config: Config, topology: Topology, path: str = "") -> None:
        from skyrl_mega.models.build import build_model

        # Another model's routing is not its own: whatever comes with a batch, its routers choose for themselves.
        config = replace(config, model=replace(config.model, path=path or config.model.path, router_replay="off"))
        self.config = config
        self.topology = topology
        self.chunks = build_model(config, topology)
        self._parked: ParkedTensors | None = None
        self.load(config.model.path)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        if config.model.offload_frozen:
            self._parked = ParkedTensors(frozen_weights(self.chunks))

    def load(self, path: str) -> None:
        """Takes the weights of another directory, of a model of the same shape."""
        from skyrl_mega.models.hf_io import load_hf_weights

        with self._on_device(is_changed=True):
            load_hf_weights(self.chunks, path, self.topology)

    def _on_device(self, *, is_changed: bool = False) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._parked is None else self._parked.on_device(is_changed=is_changed)

    def compute_logprobs(self, batch: TrainBatch) -> list[torch.Tensor]:
        """Log-probabilities of the labels at the rollout temperature: one float32 [T] on CPU per micro-batch."""
        with self._on_device():
            return forward_logprobs(self.chunks, batch, self.config, self.topology)

    def compute_topk(self, batch: TrainBatch, k: int, *, vocab_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(ids int64 [T, K], log-probabilities float32 [T, K]) of its K likeliest tokens, on CPU, per micro-batch.

        Over the whole vocabulary at the rollout temperature, likeliest first. -1 and -inf where there are fewer, and for tokens
        that a policy of `vocab_size` does not know: -1 and 0 where loss_mask is False.
        """
        with self._on_device():
            return forward_topk(self.chunks, batch, self.config, self.topology, k, vocab_size=vocab_size)


def forward_topk(
    chunks: Sequence[PolicyModel], batch: TrainBatch, config: Config, topology: Topology, k: int, *, vocab_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """See `ReferenceModel.compute_topk`; of any model, without gradient. All ranks call."""

    def topk(hidden_TH: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        ids_TK, logprobs_TK = head_topk(hidden_TH, chunks[-1], micro_batch, config, topology, k)
        is_unknown_TK = ids_TK >= vocab_size
        ids_TK = ids_TK.masked_fill(is_unknown_TK, -1)
        # One tensor on its way through the ranks; float64 holds both exactly.
        logprobs_TK = logprobs_TK.masked_fill(is_unknown_TK, float("-inf"))
        return torch.stack([ids_TK.double(), logprobs_TK.double()], dim=-1)

    packed = forward_per_token(chunks, batch, config, topology, topk, phase="teacher")
    return [(pair_TK2[..., 0].long(), pair_TK2[..., 1].float()) for pair_TK2 in packed]
