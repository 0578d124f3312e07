"""The torch backend: the terms' own definitions, which the caller brings, weighted and summed."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: torch runs everywhere."""
    return None


def weighted_sums(
    values: Mapping[str, torch.Tensor], weights_T: torch.Tensor, kl_coef: float, entropy_coef: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """As `api.loss_terms`, from the values of each token."""
    sums = {name: (value_T * weights_T).sum() for name, value_T in values.items()} | {"weight": weights_T.sum()}
    loss = weights_T.new_zeros(())
    if "kl" in sums:
        loss = loss + kl_coef * sums["kl"]
    if "entropy" in sums and entropy_coef != 0:
        loss = loss - entropy_coef * sums["entropy"]
    distance_T = values["distance"]
    largest = distance_T.amax() if distance_T.numel() else distance_T.new_zeros(())
    return loss, {name: value.detach() for name, value in sums.items()}, largest
