"""From a cluster's layout to small ones that exercise the same code: every axis that is split stays split, in two."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from skyrl_mega.config.schema import ParallelConfig


@dataclass(frozen=True)
class SmallLayout:
    """A layout of few ranks. `data` is its data-parallel size."""

    parallel: ParallelConfig
    data: int

    @property
    def ranks(self) -> int:
        return self.parallel.tensor * self.parallel.pipeline * self.parallel.context * self.data

    @property
    def num_chunks(self) -> int:
        """Parts that the layers are cut into."""
        return self.parallel.pipeline * self.parallel.virtual_pipeline

    def __str__(self) -> str:
        p = self.parallel
        axes = [f"TP{p.tensor}" + ("+SP" if p.sequence_parallel else "")] if p.tensor > 1 else []
        axes += [f"PP{p.pipeline}"] if p.pipeline > 1 else []
        axes += [f"VPP{p.virtual_pipeline}"] if p.virtual_pipeline > 1 else []
        axes += [f"CP{p.context}"] if p.context > 1 else []
        axes += [f"EP{p.expert}"] if p.expert > 1 else []
        axes += [f"DP{self.data}" + ("+distopt" if p.distributed_optimizer else "")] if self.data > 1 else []
        return " x ".join(axes) or "one process"


def small_layouts(parallel: ParallelConfig, data: int, max_ranks: int) -> list[SmallLayout]:
    """The layout with every split axis cut to 2; where that takes more than `max_ranks`, the largest parts of it that fit.

    A part splits only some of the axes; the parts returned are those that no other one that fits contains, so that every
    combination of axes that `max_ranks` allows is covered. `data` is the data-parallel size of the whole layout. Raises
    ValueError for `max_ranks` < 2.
    """
    if max_ranks < 2:
        raise ValueError(f"max_ranks must be at least 2, but is {max_ranks}.")
    split = [axis for axis in ("tensor", "pipeline", "context") if getattr(parallel, axis) > 1] + (["data"] if data > 1 else [])
    fitting = [
        frozenset(axes)
        for count in range(len(split), 0, -1)
        for axes in itertools.combinations(split, count)
        if 2**count <= max_ranks
    ]
    largest = [axes for axes in fitting if not any(axes < other for other in fitting)]
    return [_cut(parallel, axes) for axes in largest]


def _cut(parallel: ParallelConfig, axes: frozenset[str]) -> SmallLayout:
    def size(axis: str) -> int:
        return 2 if axis in axes else 1

    small = replace(
        parallel,
        tensor=size("tensor"),
        pipeline=size("pipeline"),
        context=size("context"),
        # Experts are laid over the ranks of the other axes. gloo can't split a single one.
        expert=2 if parallel.expert > 1 and axes - {"pipeline"} else 1,
        expert_tensor=1,
        virtual_pipeline=min(parallel.virtual_pipeline, 2) if "pipeline" in axes else 1,
        sequence_parallel=parallel.sequence_parallel and "tensor" in axes,
    )
    return SmallLayout(small, size("data"))
