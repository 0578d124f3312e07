"""Router replay: a training pass sends each token to the experts that another pass chose for it, weighed by the current router.

Two passes over the same tokens, by an engine and by a trainer, or by a policy before and after an update, differ in the last
bits of the router's logits. Where two experts are nearly tied that changes which one computes the token, and its logprobs by far
more than rounding does. Replay takes that part away: chosen are the experts of the other pass (those of the rollout engine: R3,
arXiv:2510.11370; those of the old-logprobs pass: arXiv:2507.18071), while their weights come from the router's own logits as
ever, so that its gradient flows. Tokens of which no routing is known (-1) are routed freely.

How a choice finds its router. The rows go through the model as an argument, under the name of Megatron's `padding_mask`: the one
input that a layer gives to its router, through every kind of activation recomputation, so that a pass that is made again in
backward, when other micro-batches were forwarded meanwhile, has its own rows. (Megatron's RouterReplay keeps a queue instead,
which the caller must switch between the forward and the backward of each micro-batch.) A hook of the layer cuts out its rows.

Shape letters: T tokens of this rank, E experts, K experts per token, L layers of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class RouterChoice:
    """Decides which experts a router takes: the interface of Megatron's `router_replay`, which computes the weights after it.

    `replayed_TE` (bool, or None): the experts of another pass; a row without any is free. `recorded`, where it is a list, gets
    every choice made, int64 [T, K]. `num_replayed` and `num_disagreed` speak of the last choice: tokens that were replayed, and
    those of them that the router would have sent to another set of experts.
    """

    def __init__(self) -> None:
        self.replayed_TE: torch.Tensor | None = None
        self.recorded: list[torch.Tensor] | None = None
        self.num_replayed: torch.Tensor | int = 0
        self.num_disagreed: torch.Tensor | int = 0

    def get_replay_topk(
        self, scores_TE: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, choose: Callable[..., Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, experts), both [T, K]. `choose` is the router's own choice by `scores_TE`."""
        scores_TK, experts_TK = choose(scores_TE, topk, num_groups=num_groups, group_topk=group_topk)
        self.num_replayed = self.num_disagreed = 0
        if self.replayed_TE is not None:
            own_TE = torch.zeros_like(self.replayed_TE).scatter_(1, experts_TK, True)
            is_replayed_T = self.replayed_TE.any(1)
            self.num_replayed = is_replayed_T.sum()
            self.num_disagreed = ((own_TE != self.replayed_TE).any(1) & is_replayed_T).sum()
            experts_TK = torch.where(is_replayed_T[:, None], self.replayed_TE.byte().topk(topk, dim=1).indices, experts_TK)
            scores_TK = scores_TE.gather(1, experts_TK)
        if self.recorded is not None:
            self.recorded.append(experts_TK)
        return scores_TK, experts_TK


def hand_rows_to_routers(model: torch.nn.Module) -> None:
    """Makes the model's layers with experts take [T, L, K] rows as their `padding_mask`, of which the router gets its layer's."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for module in model.modules():
        if isinstance(module, MoELayer):
            module.register_forward_pre_hook(partial(_cut_out, module.config.num_moe_experts), with_kwargs=True)


def _cut_out(num_experts: int, layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    rows_TLK = kwargs.get("padding_mask")
    if rows_TLK is None:
        return args, kwargs
    rows_TK = rows_TLK[:, layer.layer_number - 1].long()
    # One column more takes what is not known. Megatron turns a mask round before the router gets it: here it is [E, T].
    chosen_TE = torch.zeros(rows_TK.size(0), num_experts + 1, dtype=torch.bool, device=rows_TK.device)
    chosen_TE.scatter_(1, rows_TK.where(rows_TK >= 0, num_experts), True)
    return args, {**kwargs, "padding_mask": chosen_TE[:, :num_experts].t()}
