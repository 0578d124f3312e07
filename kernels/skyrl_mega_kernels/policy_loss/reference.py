"""The torch backend: the loss's own definition, which the caller brings, weighted and summed.

The definitions are not here, because there is one of each, the readable one that users copy and change
(`skyrl_mega/algorithms/policy_losses`). The other backends are tested against it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: torch runs everywhere."""
    return None


def weighted_sums(
    per_token_loss_T: torch.Tensor, stats: Mapping[str, torch.Tensor], weights_T: torch.Tensor, loss_weights_T: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(the loss's sum by loss_weights, with its gradient; the statistics' sums by weights): scalars."""
    loss = (per_token_loss_T * loss_weights_T).sum()
    with torch.no_grad():
        return loss, {name: (value_T * weights_T).sum() for name, value_T in stats.items()}
