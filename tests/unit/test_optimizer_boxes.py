"""Runs of elements as boxes of a block, against numpy's own order."""

import math

import numpy as np
import pytest

from skyrl_mega.training.optimizer_state import boxes


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (4, 1, 3), (2, 2, 2, 2)])
def test_every_run_of_a_block_is_its_boxes_in_order_and_few(shape):
    size = math.prod(shape)
    block = np.arange(size).reshape(shape)
    for start in range(size + 1):
        for end in range(start, size + 1):
            parts = list(boxes(shape, start, end))
            cut = [block[tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))] for offset, sizes in parts]
            assert [int(value) for part in cut for value in part.ravel()] == list(range(start, end))
            assert len(parts) <= max(1, 2 * len(shape) - 1)
