"""Advantages of mean 0 and variance 1 over all tokens, or all samples, of a step."""

from __future__ import annotations

import torch


def whitened(values: torch.Tensor, mask: torch.Tensor | None = None, *, eps: float = 1e-8) -> torch.Tensor:
    """(values - mean) / (std + eps) where mask is True, 0 elsewhere; exactly 0 where all values are equal. One dimension.

    The standard deviation is that of the population (divisor n), so that the variance is 1: these are all the values there are.
    """
    chosen = values if mask is None else values[mask]
    if chosen.numel() == 0 or bool(chosen.amax() == chosen.amin()):
        return torch.zeros_like(values)
    result = (values - chosen.mean()) / (chosen.std(correction=0) + eps)
    return result if mask is None else torch.where(mask, result, 0.0)
