"""A cluster's layout is cut to few ranks without losing an axis, nor a combination of axes that fits."""

import itertools

import pytest

from skyrl_mega.config.schema import ParallelConfig
from skyrl_mega.launch.layout_plan import small_layouts


def axes(layout) -> frozenset[str]:
    sizes = {"data": layout.data, **{name: getattr(layout.parallel, name) for name in ("tensor", "pipeline", "context")}}
    assert set(sizes.values()) <= {1, 2}
    return frozenset(name for name, size in sizes.items() if size == 2)


def test_every_split_axis_is_split_in_two_where_that_fits():
    parallel = ParallelConfig(tensor=8, pipeline=4, virtual_pipeline=6, sequence_parallel=True)
    [small] = small_layouts(parallel, 16, 8)
    assert (small.parallel.tensor, small.parallel.pipeline, small.parallel.virtual_pipeline, small.data) == (2, 2, 2, 2)
    assert small.parallel.sequence_parallel
    assert small.ranks == 8
    assert str(small) == "TP2+SP x PP2 x VPP2 x DP2+distopt"


@pytest.mark.parametrize(("max_ranks", "at_once"), [(2, 1), (4, 2), (8, 3), (16, 4)])
def test_the_parts_cover_every_combination_that_fits_once(max_ranks, at_once):
    parallel = ParallelConfig(tensor=4, pipeline=4, context=4, sequence_parallel=True)
    parts = [axes(layout) for layout in small_layouts(parallel, 4, max_ranks)]
    every = {frozenset(chosen) for chosen in itertools.combinations(("tensor", "pipeline", "context", "data"), at_once)}
    assert set(parts) == every
    assert len(parts) == len(every)


def test_what_an_axis_brings_along_goes_with_it():
    parallel = ParallelConfig(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True)
    for layout in small_layouts(parallel, 1, 2):
        assert layout.parallel.sequence_parallel == (layout.parallel.tensor == 2)
        assert (layout.parallel.virtual_pipeline == 2) == (layout.parallel.pipeline == 2)


def test_nothing_split_needs_no_check():
    assert small_layouts(ParallelConfig(), 1, 8) == []


def test_one_rank_can_check_nothing():
    with pytest.raises(ValueError, match="at least 2"):
        small_layouts(ParallelConfig(tensor=2), 1, 1)
