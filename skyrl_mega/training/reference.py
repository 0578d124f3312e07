"""The frozen reference model of the KL term: the policy's starting weights, forward passes only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skyrl_mega.training.policy import forward_logprobs
from skyrl_mega.types import TrainBatch

if TYPE_CHECKING:
    import torch

    from skyrl_mega.config.schema import Config
    from skyrl_mega.parallel.topology import Topology


class ReferenceModel:
    """A second copy of the model of `config.model.path`, in the policy's layout, without gradients. All ranks call."""

    def __init__(self, config: Config, topology: Topology) -> None:
        from skyrl_mega.models.build import build_model
        from skyrl_mega.models.hf_io import load_hf_weights

        self.config = config
        self.topology = topology
        self.chunks = build_model(config, topology)
        load_hf_weights(self.chunks, config.model.path, topology)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()

    def compute_logprobs(self, batch: TrainBatch) -> list[torch.Tensor]:
        """Log-probabilities of the labels at the rollout temperature: one float32 [T] on CPU per micro-batch."""
        return forward_logprobs(self.chunks, batch, self.config, self.topology)
