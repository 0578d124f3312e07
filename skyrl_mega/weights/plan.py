"""Which tensors travel together: buckets of whole fused groups, none larger than need be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from skyrl_mega.errors import WeightSyncError

if TYPE_CHECKING:
    import torch

Bucket = list[tuple[str, "torch.Tensor"]]


def plan_buckets(
    weights: Iterable[tuple[str, torch.Tensor]], groups: Sequence[tuple[str, ...]], bucket_bytes: int
) -> Iterator[Bucket]:
    """Buckets of at most `bucket_bytes`, in the order of the stream; a group larger than that travels alone.

    Streams: at most one bucket and one group are held at a time, so the tensors must stay valid until the bucket was used.
    Groups need not be contiguous in the stream; a group joins a bucket when its last tensor has come.

    Raises WeightSyncError if the stream brings a name that no group lists or brings one twice, or ends inside a group.
    """
    group_of = {name: group for group in groups for name in group}
    open_groups: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}
    finished: set[tuple[str, ...]] = set()
    bucket: Bucket = []
    filled_bytes = 0
    for name, tensor in weights:
        group = group_of.get(name)
        if group is None or group in finished or name in open_groups.get(group, ()):
            raise WeightSyncError(
                f"the weight stream must bring each tensor of fused_groups() once; {name} is unknown or repeated."
            )
        open_groups.setdefault(group, {})[name] = tensor
        if len(open_groups[group]) < len(group):
            continue
        finished.add(group)
        members = open_groups.pop(group)
        group_bytes = sum(t.numel() * t.element_size() for t in members.values())
        if bucket and filled_bytes + group_bytes > bucket_bytes:
            yield bucket
            bucket, filled_bytes = [], 0
        bucket += [(member, members[member]) for member in group]
        filled_bytes += group_bytes
    absent = sorted(set(group_of) - {name for group in finished for name in group})
    if absent:
        raise WeightSyncError(f"the weight stream ended without {len(absent)} of {len(group_of)} tensors, first {absent[0]}.")
    if bucket:
        yield bucket
