"""Who computes which sequence: partitions of costs over ranks, and of lengths over bins.

Everything here is deterministic (ties are broken by index), because every rank computes the whole assignment by itself and
takes its own part.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

#: Quadratic over linear cost of a token in a causal transformer: attention adds 2·h·s FLOPs per token and layer to the
#: 24·h² of the matrix products, so b/a = 1 / (12·h); this is h = 1024.
ATTENTION_COST = 1.0 / (12 * 1024)


def sequence_cost(num_tokens: int, attention_cost: float = ATTENTION_COST) -> float:
    """Estimated cost s + attention_cost · s² of one sequence, in units of one token's matrix products."""
    return num_tokens + attention_cost * num_tokens * num_tokens


def karmarkar_karp(costs: Sequence[float], num_parts: int) -> list[list[int]]:
    """Indices of `costs` in `num_parts` lists whose sums are nearly equal; each list is sorted, some may be empty.

    The largest differencing method (Karmarkar and Karp 1982) for k parts: keep partial solutions in a heap by the spread
    between their largest and smallest part; merge the two widest, largest part of one to smallest of the other.
    O(n (log n + k log k)).
    """
    if num_parts < 1:
        raise ValueError(f"num_parts must be at least 1, but is {num_parts}.")
    if not costs:
        return [[] for _ in range(num_parts)]
    # A partial solution: parts in falling order of their sums, each (sum, indices). Its heap key: -spread, then its age.
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for index, cost in enumerate(costs):
        parts: list[tuple[float, list[int]]] = [(cost, [index])] + [(0.0, []) for _ in range(num_parts - 1)]
        heap.append((-(parts[0][0] - parts[-1][0]), index, parts))
    heapq.heapify(heap)
    age = len(costs)
    while len(heap) > 1:
        _, _, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        merged = [(a + b, left + right) for (a, left), (b, right) in zip(first, reversed(second), strict=True)]
        merged.sort(key=lambda part: (-part[0], part[1]))
        heapq.heappush(heap, (-(merged[0][0] - merged[-1][0]), age, merged))
        age += 1
    return [sorted(indices) for _, indices in heap[0][2]]


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in as few bins as first-fit decreasing finds, each of sum at most `capacity`.

    At most 11/9 of the fewest possible plus 6/9 (Dósa 2007). Raises ValueError if one length exceeds the capacity.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > capacity:
            raise ValueError(f"length {lengths[index]} of item {index} exceeds the capacity {capacity}.")
        slot = next((b for b, free in enumerate(room) if free >= lengths[index]), None)
        if slot is None:
            bins.append([])
            room.append(capacity)
            slot = len(bins) - 1
        bins[slot].append(index)
        room[slot] -= lengths[index]
    return bins


def even_bins(lengths: Sequence[int], num_bins: int, capacity: int) -> list[list[int]] | None:
    """Indices in exactly `num_bins` bins of nearly equal sums, or None if that greedy order overflows `capacity`.

    Longest first, each to the emptiest bin (Graham 1969). Bins are empty only where there are fewer lengths than bins.
    """
    heap = [(0, b) for b in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        total, slot = heapq.heappop(heap)
        if total + lengths[index] > capacity:
            return None
        bins[slot].append(index)
        heapq.heappush(heap, (total + lengths[index], slot))
    return bins
