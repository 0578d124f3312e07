"""The router of a mixture of experts: Megatron's, which also counts what it does and weighs its auxiliary loss by our rule.

Auxiliary loss (arXiv:2101.03961, equation 4): of one micro-batch's tokens in one layer, E * sum_i f_i P_i, with f_i the share of
the token-expert pairs that expert i got and P_i its mean probability; 1 when the load is even. Training adds, summed over layers,
the coefficient times the mean over the global batch's micro-batches, each weighted by its tokens. Megatron would instead count on
its final division by the number of loss tokens, which a loss that is normalised from the start does not make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter


@dataclass(frozen=True)
class RouterCounts:
    """What one layer's router did with this rank's tokens since it was asked last. `layer` counts from 0 in the whole model.

    tokens_E int64 [E]: tokens sent to each expert. `entropy` and `aux_loss` are sums over `num_tokens` tokens: of the entropy
    of the router's distribution over all experts, and of this rank's part of the auxiliary loss of each token's micro-batch.
    """

    layer: int
    tokens_E: torch.Tensor
    num_tokens: int
    entropy: float
    aux_loss: float


class CountingRouter(TopKRouter):
    """Counts in passes that keep gradients, once each, also where activations are recomputed; in others it does nothing more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Tokens of the global batch, padding included; the auxiliary loss is weighed by it. See `announce_batch`.
        self.batch_tokens = 0
        self._reset()

    def _reset(self) -> None:
        self._tokens_E: torch.Tensor | int = 0
        self._num_tokens = 0
        self._entropy: torch.Tensor | float = 0.0
        self._aux_loss: torch.Tensor | float = 0.0

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        probs, routing_map = super().routing(logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                logp = logits.detach().float().log_softmax(-1)
                self._entropy = self._entropy - (logp.exp() * logp).sum()
                self._tokens_E = self._tokens_E + routing_map.sum(0)
                self._num_tokens += routing_map.size(0)
        return probs, routing_map

    def attach_and_log_load_balancing_loss(
        self, activation: torch.Tensor, aux_loss_coeff: float, aux_loss: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Adds the gradient of `aux_loss`, which is this rank's part of the micro-batch's and has the coefficient in it."""
        if self.batch_tokens <= 0:
            raise RuntimeError("The auxiliary loss needs the batch's token count: call announce_batch before the passes.")
        num_tokens = activation.size(0)
        self._aux_loss = self._aux_loss + aux_loss.detach() / aux_loss_coeff * num_tokens * self.tp_cp_group.size()
        # The parts of the micro-batch's ranks add up to its loss, and num_tokens x ranks is its number of tokens.
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * (num_tokens * self.tp_cp_group.size() / self.batch_tokens))

    def take_counts(self) -> RouterCounts | None:
        """The counts, which start again from zero; None if no pass was made."""
        if self._num_tokens == 0:
            return None
        counts = RouterCounts(
            self.layer_number - 1, self._tokens_E.cpu(), self._num_tokens, float(self._entropy), float(self._aux_loss)
        )
        self._reset()
        return counts


def routers(chunks: Iterable[torch.nn.Module]) -> Iterator[CountingRouter]:
    """The routers of a model's chunks, first layer first; none in a dense model."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, CountingRouter))


def announce_batch(chunks: Iterable[torch.nn.Module], num_tokens: int) -> None:
    """Tells the routers how many tokens the coming global batch has, padding included."""
    for router in routers(chunks):
        router.batch_tokens = num_tokens
