"""Sums over whole sequences of a pack, for losses and corrections that look at more than one token.

Shape letters: T packed tokens of this rank, S sequences of the whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def _as_it_is(values_S: torch.Tensor) -> torch.Tensor:
    return values_S


@dataclass(frozen=True)
class Sequences:
    """Which of `count` sequences each token belongs to: index_T int64 [T], -1 for padding.

    `all_reduce` adds the sums of the ranks that share the sequences (context parallelism), and must be differentiable: its
    backward adds the ranks' gradients, since every rank's loss looks at every rank's tokens. `cu_seqlens` int64 [S + 1] is there
    where each sequence's tokens are all here and lie side by side: for kernels that walk along them.
    """

    index_T: torch.Tensor
    count: int
    all_reduce: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
    cu_seqlens: torch.Tensor | None = None

    @classmethod
    def packed(cls, cu_seqlens: torch.Tensor) -> Sequences:
        """Those of a whole pack: cu_seqlens int [S + 1]."""
        lengths_S = cu_seqlens.diff().long()
        index_T = torch.repeat_interleave(torch.arange(len(lengths_S), device=cu_seqlens.device), lengths_S)
        return cls(index_T, len(lengths_S), cu_seqlens=cu_seqlens.long())

    def sum(self, values_T: torch.Tensor) -> torch.Tensor:
        """[S]: the sum over each sequence, on all ranks that share it. Differentiable; padding has no part in it."""
        is_real_T = self.index_T >= 0
        values_T = torch.where(is_real_T, values_T, 0.0)
        sums_S = values_T.new_zeros(self.count).index_add(0, self.index_T.clamp(min=0), values_T)
        return self.all_reduce(sums_S)

    def mean(self, values_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
        """[S]: the mean over each sequence's tokens where mask_T is True; 0 for a sequence without any."""
        counts_S = self.sum(mask_T.to(values_T.dtype)).detach()
        return self.sum(torch.where(mask_T, values_T, 0.0)) / counts_S.clamp(min=1)

    def spread(self, values_S: torch.Tensor) -> torch.Tensor:
        """[T]: each token's sequence's value; 0 for padding."""
        if self.count == 0:
            return values_S.new_zeros(self.index_T.shape)
        return torch.where(self.index_T >= 0, values_S[self.index_T.clamp(min=0)], 0.0)
