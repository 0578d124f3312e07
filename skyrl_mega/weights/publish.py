"""One weight version from the policy to the engine, all or nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from skyrl_mega.protocols import WeightSink, WeightSource
from skyrl_mega.types import WeightVersion
from skyrl_mega.weights.plan import plan_buckets

if TYPE_CHECKING:
    import torch


class _TimedStream:
    """The source's stream, with the seconds spent waiting for it (gathering over ranks, converting to the dtype)."""

    def __init__(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._weights = weights
        self.seconds = 0.0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        started = time.perf_counter()
        try:
            return next(self._weights)
        finally:
            self.seconds += time.perf_counter() - started


def publish(
    source: WeightSource, sink: WeightSink | None, version: int, dtype: torch.dtype, *, bucket_bytes: int
) -> WeightVersion | None:
    """Proof that engines serve `version`, with the seconds of each phase; None on ranks without a sink.

    *All ranks* call it: gathering the weights is collective. The rank that owns the engines passes its sink, the others
    None. `bucket_bytes` bounds a bucket (`rollout.weight_bucket_mib`), of which two are in flight; whole fused groups travel
    together. The engines that were left out are in the result (`failed`).

    If every engine refuses, its sink is aborted and the source's stream is drained before the error is raised, so that no
    other rank is left waiting in a gather; the other ranks return normally. Raises WeightSyncError or RolloutError.
    """
    weights = _TimedStream(iter(source.iter_weights(dtype)))
    if sink is None:
        for _ in weights:
            pass
        return None

    started = time.perf_counter()
    published = None
    try:
        groups = source.fused_groups()
        sink.start(version, groups)
        for bucket in plan_buckets(weights, groups, bucket_bytes):
            sink.put(bucket)
        published = sink.finish()
    finally:
        if published is None:
            try:
                for _ in weights:
                    pass
            finally:
                sink.abort()
    seconds = {"gather": weights.seconds, **published.seconds, "total": time.perf_counter() - started}
    return dataclasses.replace(published, seconds=seconds)
