"""How evenly the routers of a mixture of experts spread the tokens of an update: the first thing to look at in its training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from skyrl_mega.models.biased_router import note_load
from skyrl_mega.models.build import unwrap
from skyrl_mega.models.router import announce_batch, routers
from skyrl_mega.types import Metrics, MicroBatch

if TYPE_CHECKING:
    from skyrl_mega.parallel.topology import Topology


def announce_tokens(chunks: Sequence[torch.nn.Module], parts: Iterable[MicroBatch], topology: Topology) -> None:
    """Tells the routers how many tokens the global batch has, which their own losses are weighed by. *All ranks.*

    `parts` is what this context-parallel rank computes of its micro-batches. Nothing is done with it, and nothing sent, where
    routers have no losses.
    """
    if not any(router.has_losses for router in routers(chunks)):
        return
    # As the model pads them: to a multiple of the tensor ranks.
    padded = sum(-(-part.num_tokens // topology.tp_size) * topology.tp_size for part in parts)
    announce_batch(chunks, round(topology.all_reduce_metrics({"tokens": padded}, phase="tokens")["tokens"]))


def expert_load_metrics(chunks: Sequence[torch.nn.Module], topology: Topology) -> Metrics:
    """Numbers of the update just made, over all its tokens (padding too) and layers, the same on every rank. *All ranks.*

    Empty for a dense model. `chunks` are this rank's parts of the policy.

    - `moe/load_max_over_mean`: tokens of the busiest expert over the mean, averaged over layers; 1 is even, the number of experts
      divided by the experts per token the worst.
    - `moe/load_max_over_mean_worst_layer`: of the least even layer.
    - `moe/rank_load_max_over_mean`: the same of expert-parallel ranks, averaged over layers: what the slowest rank costs.
    - `moe/idle_experts`: share of the experts that got no token at all.
    - `moe/router_entropy`: nats, of the routers' distribution over all experts.
    - `moe/aux_loss`: load-balancing loss before its coefficient, summed over layers (1 a layer when even); 0 if it is off.
    - `moe/z_loss`: mean square of the logarithm of the router's summed exponentials, before its coefficient, summed over layers;
      also where it is not part of the loss.
    - `moe/frozen_routers`: share of the layers whose router is not trained.
    - `moe/replayed`: share of the pairs of token and layer whose experts were replayed; only with `model.router_replay`.
    - `moe/replay_disagreement`: share of those that the router would have sent to another set of experts.
    """
    experts = unwrap(chunks[0]).architecture.experts
    if experts is None:
        return {}
    num_layers, num_experts = len(experts.layers), experts.count
    # One row a layer: tokens of each expert, then sums over tokens. Each rank knows its stage's layers, its own tokens.
    rows = torch.zeros(num_layers, num_experts + 7, dtype=torch.float64)
    for router in routers(chunks):
        counts = router.take_counts()
        if counts is not None:
            rows[counts.layer, :num_experts] += counts.tokens_E
            sums = (counts.num_tokens, counts.entropy, counts.aux_loss, counts.z_loss, counts.replayed, counts.disagreed)
            rows[counts.layer, num_experts:] += torch.tensor([*sums, counts.num_tokens * router.is_frozen])
    rows = topology.sum_over_ranks(rows, "expert load")
    note_load(chunks, rows[:, :num_experts])
    rows = rows[rows[:, num_experts] > 0]
    load_LE = rows[:, :num_experts]
    num_tokens_L, entropy_L, aux_loss_L, z_loss_L, replayed_L, disagreed_L, frozen_L = rows[:, num_experts:].unbind(1)
    unevenness_L = load_LE.amax(1) / load_LE.mean(1)
    load_LR = load_LE.unflatten(1, (topology.ep_size, -1)).sum(2)
    replay = {
        "moe/replayed": float(replayed_L.sum() / num_tokens_L.sum()),
        "moe/replay_disagreement": float(disagreed_L.sum() / replayed_L.sum().clamp(min=1)),
    }
    return (replay if unwrap(chunks[0]).replays_routing else {}) | {
        "moe/load_max_over_mean": float(unevenness_L.mean()),
        "moe/load_max_over_mean_worst_layer": float(unevenness_L.max()),
        "moe/rank_load_max_over_mean": float((load_LR.amax(1) / load_LR.mean(1)).mean()),
        "moe/idle_experts": float((load_LE == 0).double().mean()),
        "moe/router_entropy": float((entropy_L / num_tokens_L).mean()),
        "moe/aux_loss": float((aux_loss_L / num_tokens_L).sum()),
        "moe/z_loss": float((z_loss_L / num_tokens_L).sum()),
        "moe/frozen_routers": float((frozen_L / num_tokens_L).mean()),
    }
