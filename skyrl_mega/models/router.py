"""The router of a mixture of experts: Megatron's, which also counts what it does and weighs its own losses by our rule.

Auxiliary loss (arXiv:2101.03961, equation 4): of one micro-batch's tokens in one layer, E * sum_i f_i P_i, with f_i the share of
the token-expert pairs that expert i got and P_i its mean probability; 1 when the load is even. Training adds, summed over layers,
the coefficient times the mean over the global batch's micro-batches, each weighted by its tokens. Megatron would instead count on
its final division by the number of loss tokens, which a loss that is normalised from the start does not make.

Z loss (ST-MoE, arXiv:2202.08906, equation 5): of one token in one layer, the square of log sum_i exp(logit_i). Training adds,
summed over layers, its coefficient times the mean over the global batch's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from skyrl_mega.models.router_replay import RouterChoice


@dataclass(frozen=True)
class RouterCounts:
    """What one layer's router did with this rank's tokens since it was asked last. `layer` counts from 0 in the whole model.

    tokens_E int64 [E]: tokens sent to each expert. The others are sums over `num_tokens` tokens: of the entropy of the router's
    distribution over all experts, of this rank's part of the auxiliary loss of each token's micro-batch, and of the z loss; how
    many were replayed (`router_replay`), and how many of those the router would have sent elsewhere.
    """

    layer: int
    tokens_E: torch.Tensor
    num_tokens: int
    entropy: float
    aux_loss: float
    z_loss: float
    replayed: int
    disagreed: int


class CountingRouter(TopKRouter):
    """Counts in passes that keep gradients, once each, also where activations are recomputed; in others it does nothing more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Tokens of the global batch, padding included; the router's losses are weighed by it. See `announce_batch`.
        self.batch_tokens = 0
        #: Megatron asks it which experts to take, and computes their weights from the logits.
        self.router_replay = self.choice = RouterChoice()
        self._reset()

    def _reset(self) -> None:
        self._tokens_E: torch.Tensor | int = 0
        self._num_tokens = 0
        self._entropy: torch.Tensor | float = 0.0
        self._aux_loss: torch.Tensor | float = 0.0
        self._z_loss: torch.Tensor | float = 0.0
        self._replayed: torch.Tensor | int = 0
        self._disagreed: torch.Tensor | int = 0

    @property
    def is_frozen(self) -> bool:
        return not self.weight.requires_grad

    @property
    def has_losses(self) -> bool:
        """Whether it adds losses of its own, which want the batch's token count."""
        return self.is_aux_loss_enabled() or bool(self.config.moe_z_loss_coeff)

    def forward(self, input: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, chosen experts) of each token, both [T, E]. `padding_mask` is no mask here, but what `choice` replays."""
        self.choice.replayed_TE = padding_mask
        return super().forward(input)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        probs, routing_map = super().routing(logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                flat = logits.detach().float().view(-1, self.config.num_moe_experts)
                log_sum, logp = flat.logsumexp(-1), self._log_distribution(flat)
                self._entropy = self._entropy - (logp.exp() * logp).sum()
                self._z_loss = self._z_loss + log_sum.square().sum()
                self._tokens_E = self._tokens_E + routing_map.sum(0)
                self._num_tokens += routing_map.size(0)
                self._replayed = self._replayed + self.choice.num_replayed
                self._disagreed = self._disagreed + self.choice.num_disagreed
        return probs, routing_map

    def _log_distribution(self, logits: torch.Tensor) -> torch.Tensor:
        """Logarithms of each token's probabilities of the experts: scores divided by their sum, where scores are sigmoids."""
        if self.score_function == "softmax":
            return logits.log_softmax(-1)
        return torch.nn.functional.logsigmoid(logits).log_softmax(-1)

    def attach_and_log_load_balancing_loss(
        self, activation: torch.Tensor, aux_loss_coeff: float, aux_loss: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Adds the gradient of `aux_loss`, which is this rank's part of the micro-batch's and has the coefficient in it."""
        num_tokens = activation.size(0)
        self._aux_loss = self._aux_loss + aux_loss.detach() / aux_loss_coeff * num_tokens * self.tp_cp_group.size()
        # The parts of the micro-batch's ranks add up to its loss, and num_tokens x ranks is its number of tokens.
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * (num_tokens * self.tp_cp_group.size() / self._announced()))

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Adds the gradient of the z loss of `logits` [T, E], where there is a coefficient and gradients are kept."""
        if not self.config.moe_z_loss_coeff or not (self.training and torch.is_grad_enabled()):
            return logits
        z_loss = logits.float().logsumexp(-1).square().sum()
        return MoEAuxLossAutoScaler.apply(logits, z_loss * (self.config.moe_z_loss_coeff / self._announced()))

    def _announced(self) -> int:
        if self.batch_tokens <= 0:
            raise RuntimeError("A router's losses need the batch's token count: call announce_batch before the passes.")
        return self.batch_tokens

    def take_counts(self) -> RouterCounts | None:
        """The counts, which start again from zero; None if no pass was made."""
        if self._num_tokens == 0:
            return None
        counts = RouterCounts(
            layer=self.layer_number - 1,
            tokens_E=self._tokens_E.cpu(),
            num_tokens=self._num_tokens,
            entropy=float(self._entropy),
            aux_loss=float(self._aux_loss),
            z_loss=float(self._z_loss),
            replayed=int(self._replayed),
            disagreed=int(self._disagreed),
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


def freeze_routers(chunks: Iterable[torch.nn.Module]) -> None:
    """Keeps the routers as they were loaded. Before gradient buffers and optimizer are made, which then leave them out."""
    for router in routers(chunks):
        router.requires_grad_(False)
