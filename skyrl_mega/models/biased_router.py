"""A router that chooses experts by score plus a bias of each expert, which balances their load without a loss.

DeepSeek-V3 (arXiv:2412.19437, equations 12 to 16): scores are sigmoids of the logits; the bias decides which experts a token gets
and never what they weigh. After each update the bias of an expert that got more than the mean of the global batch's tokens falls
by a fixed step, and that of one that got fewer rises by it (arXiv:2408.15664, algorithm 1). A step of 0 leaves the biases as they
were loaded.

The bias is a float32 buffer, `expert_bias`, whatever the model's dtype is: it is loaded, exported and checkpointed with the
weights, and no optimizer knows it. Megatron would move it while gradients are finished, before it is known whether the update is
made; so its own switch for that stays off.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from skyrl_mega.models.router import CountingRouter, routers


class BiasedRouter(CountingRouter):
    """CountingRouter with an `expert_bias`, float32 [E], the same on every rank that holds the layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.expert_bias  # Megatron's None
        self.register_buffer("expert_bias", torch.zeros(self.num_experts, dtype=torch.float32, device=self.weight.device))
        #: float64 [E]: how many tokens of the last global batch each expert got; None before there was one.
        self.batch_load_E: torch.Tensor | None = None

    @torch.no_grad()
    def move_bias(self, rate: float) -> None:
        """Moves each expert's bias by `rate` towards an even load, as `batch_load_E` says."""
        if self.batch_load_E is None:
            raise RuntimeError("Moving the experts' biases needs the global batch's load: call expert_load_metrics before.")
        missing_E = self.batch_load_E.mean() - self.batch_load_E
        self.expert_bias += rate * missing_E.sign().to(self.expert_bias)


def move_biases(chunks: Iterable[torch.nn.Module], rate: float) -> None:
    """Moves the biases of all routers that have one, after an update; nothing with a rate of 0."""
    if rate > 0:
        for router in routers(chunks):
            if isinstance(router, BiasedRouter):
                router.move_bias(rate)


def note_load(chunks: Iterable[torch.nn.Module], load_LE: torch.Tensor) -> None:
    """Tells the routers with a bias how many tokens of the global batch each expert of each layer got; float64 [L, E]."""
    for router in routers(chunks):
        if isinstance(router, BiasedRouter):
            router.batch_load_E = load_LE[router.layer_number - 1]
