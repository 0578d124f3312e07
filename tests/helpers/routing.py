"""Routing of samples: chosen at random, and what a policy chooses by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from skyrl_mega.data.packing import unpack_routing
from skyrl_mega.models.router import routers
from skyrl_mega.training.policy import Policy
from skyrl_mega.training.routing import recorded_routing
from skyrl_mega.types import TrainBatch, TrainSample


def with_random_routing(
    samples: Sequence[TrainSample], *, num_layers: int, num_experts: int, per_token: int = 2, seed: int = 0
) -> list[TrainSample]:
    """The samples with experts drawn evenly for each token and layer; every fifth token, and the last, is routed freely."""
    generator = torch.Generator().manual_seed(seed)
    routed = []
    for sample in samples:
        draws = torch.rand(sample.num_tokens, num_layers, num_experts, generator=generator)
        rows = draws.topk(per_token, dim=-1).indices.to(torch.int16)
        rows[4::5] = -1
        rows[-1] = -1
        routed.append(dataclasses.replace(sample, routed_experts=rows))
    return routed


def own_routing(policy: Policy, batch: TrainBatch) -> dict[int, torch.Tensor]:
    """What the policy's routers choose for the samples of `batch`, by sample_index."""
    replays = [chunk.replays_routing for chunk in policy.chunks]
    with recorded_routing(policy.chunks, batch, policy.config, policy.topology):
        policy.compute_logprobs(batch)
    assert all(router.choice.recorded is None for router in routers(policy.chunks))
    assert replays == [chunk.replays_routing for chunk in policy.chunks]
    return unpack_routing(batch)
