"""Statistics over the samples of each prompt, without loops and without moving samples.

Shape letters: N samples, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Groups:
    """Samples by group: member_N int64 [N] numbers each sample's group 0 .. count - 1. Made by `of`."""

    member_N: torch.Tensor
    count: int

    @classmethod
    def of(cls, group_index_N: torch.Tensor) -> Groups:
        """From any integers [N], in any order."""
        groups, member_N = torch.unique(group_index_N, return_inverse=True)
        return cls(member_N, len(groups))

    def sum(self, values_N: torch.Tensor) -> torch.Tensor:
        """[G]"""
        return values_N.new_zeros(self.count).index_add(0, self.member_N, values_N)

    def sizes(self, like: torch.Tensor) -> torch.Tensor:
        """[G] in the dtype of `like`: how many samples each group has."""
        return self.sum(torch.ones_like(like))

    def mean(self, values_N: torch.Tensor) -> torch.Tensor:
        """[G]"""
        return self.sum(values_N) / self.sizes(values_N)

    def extremum(self, values_N: torch.Tensor, kind: str) -> torch.Tensor:
        """[G]; kind: amin or amax."""
        return values_N.new_zeros(self.count).scatter_reduce(0, self.member_N, values_N, kind, include_self=False)

    def spread(self, values_G: torch.Tensor) -> torch.Tensor:
        """[N]: each sample's group's value."""
        return values_G[self.member_N]

    def centred(self, values_N: torch.Tensor) -> torch.Tensor:
        """[N]: each value less its group's mean; exactly 0 in groups whose values are all equal.

        The mean of equal numbers may differ from them in the last bit, and dividing by (almost only) eps would magnify that.
        """
        is_varied_G = self.extremum(values_N, "amax") > self.extremum(values_N, "amin")
        return torch.where(self.spread(is_varied_G), values_N - self.spread(self.mean(values_N)), 0.0)

    def std(self, values_N: torch.Tensor) -> torch.Tensor:
        """[G]: the unbiased standard deviation (divisor n - 1); 0 for a group of one."""
        squares_G = self.sum(self.centred(values_N).square())
        return (squares_G / (self.sizes(values_N) - 1).clamp(min=1)).sqrt()

    def normalized(self, values_N: torch.Tensor, *, by_std: bool, eps: float) -> torch.Tensor:
        """[N]: centred on the group's mean and, if `by_std`, divided by its standard deviation + eps. 0 where all are equal."""
        centred_N = self.centred(values_N)
        if not by_std:
            return centred_N
        return torch.where(centred_N != 0, centred_N / (self.spread(self.std(values_N)) + eps), 0.0)
