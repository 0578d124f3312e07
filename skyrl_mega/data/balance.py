"""Who computes which sequence: partitions of costs over ranks, and of lengths over bins.

Everything here is deterministic (ties are broken by index), because every rank computes the whole assignment by itself and
takes its own part.
"""

from __future__ import annotations

import bisect
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
    # A partial solution: its parts that hold anything, in falling order of their sums, each (sum, indices). Its heap key: minus
    # the spread between its largest and smallest part, then its age.
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for index, cost in enumerate(costs):
        heap.append((-cost if num_parts > 1 else 0.0, index, [(cost, [index])]))
    heapq.heapify(heap)
    age = len(costs)
    while len(heap) > 1:
        _, _, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        # Largest to smallest: part j of the first meets part num_parts - 1 - j of the second, and most of those are empty.
        overlap = range(num_parts - len(second), len(first))
        met = [_joined(first[j], second[num_parts - 1 - j]) for j in overlap]
        merged = first[: num_parts - len(second)] + met + second[: num_parts - len(first)]
        merged.sort(key=lambda part: (-part[0], part[1]))
        smallest = merged[-1][0] if len(merged) == num_parts else 0.0
        heapq.heappush(heap, (smallest - merged[0][0], age, merged))
        age += 1
    parts = [sorted(indices) for _, indices in heap[0][2]]
    return parts + [[] for _ in range(num_parts - len(parts))]


def _joined(a: tuple[float, list[int]], b: tuple[float, list[int]]) -> tuple[float, list[int]]:
    return a[0] + b[0], a[1] + b[1]


def even_out(parts: Sequence[Sequence[int]], costs: Sequence[float], *, until: float, most_swaps: int = 200) -> list[list[int]]:
    """The parts with single items moved or swapped until the largest sum is at most `until` means, or nothing helps.

    The largest differencing method merges without looking back; where parts hold few items of very different costs it leaves
    differences that one swap removes. Each step takes the fullest part, and the emptiest other one with which an exchange
    lowers the larger of the two sums; of the exchanges with it, the one that comes nearest to equal sums. Never worse than
    before.
    """
    members = [list(part) for part in parts]
    sums = [sum(costs[i] for i in part) for part in parts]
    target = until * sum(sums) / len(sums)
    for _ in range(most_swaps):
        fullest = max(range(len(sums)), key=lambda p: (sums[p], -p))
        if sums[fullest] <= target:
            break
        for other in sorted(range(len(sums)), key=lambda p: (sums[p], p)):
            exchange = _best_exchange(members[fullest], members[other], sums[fullest] - sums[other], costs)
            if exchange is not None:
                break
        else:
            break
        given, taken = exchange
        members[fullest].remove(given)
        members[other].append(given)
        moved = costs[given]
        if taken is not None:
            members[other].remove(taken)
            members[fullest].append(taken)
            moved -= costs[taken]
        sums[fullest] -= moved
        sums[other] += moved
    return [sorted(part) for part in members]


def _best_exchange(
    full: Sequence[int], other: Sequence[int], gap: float, costs: Sequence[float]
) -> tuple[int, int | None] | None:
    """(item of `full`, item of `other` or None) whose exchange moves nearest to half the gap; None if none lowers the maximum."""
    partners: list[tuple[float, int | None]] = [(0.0, None), *sorted((costs[i], i) for i in other)]
    partner_costs = [cost for cost, _ in partners]
    best: tuple[float, int, int | None] | None = None
    for given in full:
        place = bisect.bisect_left(partner_costs, costs[given] - gap / 2)
        for cost, taken in partners[max(place - 1, 0) : place + 1]:
            moved = costs[given] - cost
            # Moving 0 < m < gap lowers the larger sum; a sliver is left alone, so that rounding can't cycle.
            if 1e-6 * gap < moved < (1 - 1e-6) * gap and (best is None or abs(moved - gap / 2) < best[0]):
                best = abs(moved - gap / 2), given, taken
    return None if best is None else best[1:]


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
