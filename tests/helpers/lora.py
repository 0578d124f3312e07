"""A policy that trains an adapter: its factors, its logits, and an adapter that is not zero."""

from __future__ import annotations

import torch

from skyrl_mega.models.build import forward_hidden, output_weight
from skyrl_mega.models.lora_weights import peft_names


def randomise(policy, seed: int = 1) -> None:
    """Gives every B of the policy's adapter random values, the same ones in every layout."""
    adapters = policy.chunks[0].adapters
    for number, one in enumerate(adapters.adapters(adapters.active)):
        generator = torch.Generator().manual_seed(seed + number)
        for b in one.B:
            b.data.copy_(0.1 * torch.randn(b.shape, generator=generator))


def logits_of(policy, micro_batch) -> torch.Tensor:
    return forward_hidden(policy.chunks[0], micro_batch) @ output_weight(policy.chunks[0]).t()


def factors(policy, *, gradients: bool = False) -> dict[str, torch.Tensor]:
    """A and B of the active adapter by PEFT's names, or their gradients."""
    found = {}
    adapters = policy.chunks[0].adapters
    for one in adapters.adapters(adapters.active):
        pick = (lambda p: p.main_grad) if gradients else (lambda p: p.detach())
        for number, projection in enumerate(one.projections):
            name_a, name_b = peft_names(projection)
            found[name_a] = pick(one.A)[number * one.rank : (number + 1) * one.rank].clone()
            found[name_b] = pick(one.B[number]).clone()
    return found
