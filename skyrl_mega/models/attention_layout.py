"""Who attends to whom in a packed row: one description for plain packing, shared prompts and context parallelism.

A layout is a list of segments. A segment is a run of query rows; they see the rows of a trunk, then those right before the
segment's own in its sequence, and then, causally, the segment's own rows:

    keys        [ trunk rows ][ rows before ][ own rows ]
    query 0      x x x x x x    x x x x x      x
    query 1      x x x x x x    x x x x x      x x
    query 2      x x x x x x    x x x x x      x x x        (a causal mask aligned to the bottom right)

- plain packing: a segment is a sequence; it has neither trunk nor rows before;
- shared prompts: a branch has the prompt as its trunk (`data.clusters`);
- context parallelism: a segment is a chunk of a sequence, whose earlier chunks lie before it (`data.context_shards`). Queries are
  this rank's rows, and keys are the rows of all ranks, gathered; everything else is as above.

Layers with a sliding window see less of the same keys: a query those of the last `window` rows of the picture, its own among
them. The layout is the same for all layers, only the mask differs.

Two forms are made of it, once per forward pass, for all layers: buckets of padded segments (for batched matmuls and torch's
SDPA), and bounds of queries and keys end to end (for kernels that take sequences of unequal length).

Shape letters: T query rows, S segments, B segments of one bucket, L their padded length, P the padded length of what they see
before their own rows, M = P + L.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from skyrl_mega.types import ContextPart

#: Up to this many keys a CPU bucket runs as batched matmuls: measured faster in bfloat16 and equal in float32.
SHORT_KEYS = 192
#: A bucket takes segments up to SLACK_FACTOR x its shortest + SLACK_TOKENS, in length and in what they see before it: bounds
#: the padding without many small calls.
SLACK_FACTOR, SLACK_TOKENS = 1.15, 8


class Segment(NamedTuple):
    """`length` queries from row `query`. Key rows: trunk_length from `trunk`, `before` that end at `own`, `length` from `own`."""

    query: int
    length: int
    own: int
    before: int = 0
    trunk: int = 0
    trunk_length: int = 0

    @property
    def prefix_length(self) -> int:
        return self.trunk_length + self.before


@dataclass(frozen=True)
class Bucket:
    """Segments padded to one shape. `query_rows` [B * L] and `key_rows` [B * M] (int64) name the row in each slot.

    Padding repeats a row: queries on the right, keys where no query of the segment looks. `prefix_lengths` int64 [B] on CPU:
    how many of the first M - L keys each segment really sees before its own rows.
    """

    num_segments: int
    length: int
    num_keys: int
    query_rows: torch.Tensor
    key_rows: torch.Tensor
    short: bool
    prefix_lengths: torch.Tensor
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def has_prefixes(self) -> bool:
        return self.num_keys > self.length

    def mask(self, window: int | None = None) -> torch.Tensor | None:
        """Who sees whom in a layer of this window; None where the plain causal mask says it.

        For `short` buckets what is added to their scores, float32 [B, 1, 1, L, M], 0 or -inf; for others bool [B, 1, L, M],
        True where a query sees a key. B is 1 where all segments have the same. Made once for each window.
        """
        if not self.has_prefixes and (window is None or self.length <= window):
            return None
        if window not in self._masks:
            sees = self._sees(window)[:, None]
            mask = torch.zeros(sees.shape).masked_fill_(~sees, float("-inf"))[:, None] if self.short else sees
            self._masks[window] = mask.to(self.query_rows.device)
        return self._masks[window]

    def _sees(self, window: int | None) -> torch.Tensor:
        """bool [B, L, M] on CPU."""
        before_B11 = self.prefix_lengths[:, None, None]
        query_L1, own_L = torch.arange(self.length)[:, None], torch.arange(self.length)
        prefix_P = torch.arange(self.num_keys - self.length)
        sees_prefix = (prefix_P < before_B11).expand(-1, self.length, -1)
        sees_own = own_L <= query_L1
        if window is not None:
            sees_prefix = sees_prefix & (before_B11 + query_L1 - prefix_P < window)
            sees_own = sees_own & (query_L1 - own_L < window)
        if not self.has_prefixes:
            return sees_own[None]
        return torch.cat([sees_prefix, sees_own.expand(self.num_segments, -1, -1)], dim=2)


class Varlen(NamedTuple):
    """Bounds for varlen kernels, int32 on the device. `key_rows` int64: the keys of all segments end to end; None: all as is."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    key_rows: torch.Tensor | None


@dataclass
class AttentionLayout:
    """The segments of a pack, and what attention makes of them; given to every attention layer of one forward pass.

    cu_seqlens int32 [S+1] on the model's device bounds the query rows of each segment (cu_seqlens[0] == 0, cu_seqlens[-1] == T).
    `prefix_segments` and `context` as in MicroBatch. Segments beyond those of `prefix_segments` are padding.
    """

    cu_seqlens: torch.Tensor
    max_seqlen: int
    prefix_segments: torch.Tensor | None = None
    context: ContextPart | None = None
    #: Read by Megatron's SelfAttention: anything but "thd" makes it treat the pack as one sequence, which is what we want.
    qkv_format: str = "packed"

    @property
    def is_plain(self) -> bool:
        """Whether every segment is a whole sequence that sees only itself: keys are then the query rows."""
        return self.prefix_segments is None and self.context is None

    @cached_property
    def segments(self) -> list[Segment]:
        """All segments but empty ones. Raises ValueError if `context` was made for other segments."""
        bounds = self.cu_seqlens.tolist()
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        if self.context is not None:
            part = self.context
            columns = (part.starts, part.before, part.trunk_starts, part.trunk_lengths)
            rows = zip(bounds[:-1], lengths, *(column.tolist() for column in columns), strict=True)
            segments = [Segment(*row) for row in rows]
        else:
            prefixes = [] if self.prefix_segments is None else self.prefix_segments.tolist()
            prefixes += [-1] * (len(lengths) - len(prefixes))
            trunks = [(bounds[prefix], lengths[prefix]) if prefix >= 0 else (0, 0) for prefix in prefixes]
            segments = [Segment(q, n, q, 0, *trunk) for q, n, trunk in zip(bounds[:-1], lengths, trunks, strict=True)]
        return [segment for segment in segments if segment.length > 0]

    # -- padded ---------------------------------------------------------------------------------------------------------

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The segments by similar shape, those that see less first."""
        return [self._bucket(group) for group in _group(self.segments)]

    @cached_property
    def is_one_batch(self) -> bool:
        """Whether the rows as they stand are the only bucket: sequences of equal length, no padding, no gathering."""
        if not self.is_plain or len(self.buckets) != 1:
            return False
        rows = self.rows
        return rows.numel() == int(self.cu_seqlens[-1]) and torch.equal(rows, torch.arange(rows.numel(), device=rows.device))

    @cached_property
    def rows(self) -> torch.Tensor:
        """int64: the query row in each slot of the buckets, end to end."""
        return torch.cat([bucket.query_rows for bucket in self.buckets])

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 [T]: the slot that computes each query row."""
        rows = self.rows
        slots = torch.empty(int(self.cu_seqlens[-1]), dtype=torch.int64, device=rows.device)
        # Padding slots repeat the last row of their segment and stand to the right of its own slot: written backwards, the
        # first slot of a row wins.
        slots[rows.flip(0)] = torch.arange(rows.numel() - 1, -1, -1, device=rows.device)
        return slots

    @cached_property
    def padding_slots(self) -> torch.Tensor:
        """int64: the slots that hold padding."""
        real = torch.zeros(self.rows.numel(), dtype=torch.bool, device=self.rows.device)
        real[self.slots] = True
        return (~real).nonzero().squeeze(1)

    @cached_property
    def key_rows(self) -> torch.Tensor:
        """int64: the row of the keys that fills each key slot of the buckets, end to end."""
        return torch.cat([bucket.key_rows for bucket in self.buckets])

    def _bucket(self, group: list[Segment]) -> Bucket:
        device = self.cu_seqlens.device
        query_B, lengths_B, own_B, before_B, trunk_B, trunk_lengths_B = torch.tensor(group)[:, :, None].unbind(1)
        longest, longest_prefix = int(lengths_B.max()), int((trunk_lengths_B + before_B).max())
        in_own_BL = torch.minimum(torch.arange(longest)[None], lengths_B - 1)
        in_prefix_P = torch.arange(longest_prefix)[None]
        num_keys = longest_prefix + longest
        short = device.type == "cpu" and num_keys <= SHORT_KEYS
        key_rows_BM = own_B + in_own_BL
        if longest_prefix:
            # The rows before end where the own ones begin; past them (padding that the mask hides) stands the first own row.
            in_before = torch.minimum(in_prefix_P - trunk_lengths_B, before_B)
            prefix_BP = torch.where(in_prefix_P < trunk_lengths_B, trunk_B + in_prefix_P, own_B - before_B + in_before)
            key_rows_BM = torch.cat([prefix_BP, key_rows_BM], dim=1)
        return Bucket(
            num_segments=len(group),
            length=longest,
            num_keys=num_keys,
            query_rows=(query_B + in_own_BL).flatten().to(device),
            key_rows=self._placed(key_rows_BM.flatten()),
            short=short,
            prefix_lengths=(trunk_lengths_B + before_B).squeeze(1),
        )

    def _placed(self, key_rows: torch.Tensor) -> torch.Tensor:
        """Where key rows lie among the keys that attention gets (all ranks' rows, where there are several), on the device."""
        return (key_rows if self.context is None else self.context.key_places[key_rows]).to(self.cu_seqlens.device)

    # -- end to end -----------------------------------------------------------------------------------------------------

    @cached_property
    def varlen(self) -> Varlen:
        """The segments for kernels that take queries and keys of unequal length, causal and aligned to the bottom right."""
        if self.is_plain:
            return Varlen(self.cu_seqlens, self.cu_seqlens, self.max_seqlen, self.max_seqlen, None)
        _, lengths_S, own_S, before_S, trunk_S, trunk_lengths_S = torch.tensor(self.segments).unbind(1)
        keys_S = trunk_lengths_S + before_S + lengths_S
        # Two runs of rows a segment, trunk and sequence: each slot's row is its number plus the offset of its run.
        runs = torch.stack([trunk_lengths_S, before_S + lengths_S], dim=1).flatten()
        starts = torch.stack([trunk_S, own_S - before_S], dim=1).flatten()
        rows = torch.arange(int(runs.sum())) + (starts - runs.cumsum(0) + runs).repeat_interleave(runs)
        return Varlen(self._bounds(lengths_S), self._bounds(keys_S), int(lengths_S.max()), int(keys_S.max()), self._placed(rows))

    def _bounds(self, lengths_S: torch.Tensor) -> torch.Tensor:
        return torch.cat([lengths_S.new_zeros(1), lengths_S.cumsum(0)]).to(self.cu_seqlens.device, torch.int32)


def _group(segments: list[Segment]) -> list[list[Segment]]:
    """Segments whose prefixes, and among them lengths, are alike enough to be padded to one shape."""
    groups = []
    for alike in _split(segments, "prefix_length"):
        groups += _split(alike, "length")
    return groups


def _split(segments: list[Segment], by: str) -> list[list[Segment]]:
    runs: list[list[Segment]] = []
    limit = -1.0
    for size, segment in sorted((getattr(segment, by), segment) for segment in segments):
        if size > limit:
            runs.append([])
            # Nothing before a segment means no mask and no gathered keys: worth a bucket of its own.
            limit = size * SLACK_FACTOR + SLACK_TOKENS if size else 0
        runs[-1].append(segment)
    return runs
