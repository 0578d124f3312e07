"""Buckets hold whole fused groups and respect their limit."""

import pytest
import torch

from skyrl_mega.errors import WeightSyncError
from skyrl_mega.weights.plan import plan_buckets

GROUPS = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]


def stream(*names, numel=10):
    return [(name, torch.zeros(numel)) for name in names]  # 40 bytes each


def names_of(buckets):
    return [[name for name, _ in bucket] for bucket in buckets]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (10_000, [["q", "k", "v", "o", "gate", "up", "down"]]),
        (160, [["q", "k", "v", "o"], ["gate", "up", "down"]]),
        (159, [["q", "k", "v"], ["o", "gate", "up"], ["down"]]),
        (1, [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]),
    ],
)
def test_buckets_are_filled_in_order_up_to_the_limit(limit, expected):
    assert names_of(plan_buckets(stream("q", "k", "v", "o", "gate", "up", "down"), GROUPS, limit)) == expected


def test_a_group_interleaved_with_others_still_travels_whole():
    buckets = names_of(plan_buckets(stream("q", "gate", "k", "o", "v", "down", "up"), GROUPS, 100))
    assert buckets == [["o"], ["q", "k", "v"], ["down"], ["gate", "up"]]


def test_the_stream_is_not_read_ahead_of_the_bucket():
    read = []

    def observed():
        for name, tensor in stream("q", "k", "v", "o", "gate", "up", "down"):
            read.append(name)
            yield name, tensor

    next(plan_buckets(observed(), GROUPS, 130))
    assert read == ["q", "k", "v", "o"]


@pytest.mark.parametrize("names", [("q", "x"), ("q", "q"), ("o", "o")])
def test_unknown_and_repeated_names_are_errors(names):
    with pytest.raises(WeightSyncError, match=f"{names[-1]} is unknown or repeated"):
        list(plan_buckets(stream(*names), GROUPS, 100))


def test_a_stream_that_ends_inside_a_group_is_an_error():
    with pytest.raises(WeightSyncError, match="without 3 of 7 tensors, first k"):
        list(plan_buckets(stream("q", "k", "o", "gate", "up", "down"), [*GROUPS], 1000))
