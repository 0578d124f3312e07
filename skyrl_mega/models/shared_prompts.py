"""Attention over a pack in which responses share their prompt: each segment attends to its trunk, then causally to itself.

The keys and values of a branch are its trunk's rows and its own, gathered into one padded row, so the trunk's gradient is the
sum over its branches by the gather's own backward. Only keys and values are repeated; every other layer sees each prompt
token once. Exact: the same numbers as one whole sequence per sample.

Shape letters: T packed tokens, B segments of one bucket, L their padded length, P the padded length of their trunks,
M = P + L, H query heads, K key/value heads, G = H / K, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

#: A bucket takes segments whose lengths (own and trunk) are at most SLACK_FACTOR x its first + SLACK_TOKENS.
SLACK_FACTOR, SLACK_TOKENS = 1.25, 8
#: Up to this many keys a CPU bucket runs as batched matmuls; see `models.attention`.
SHORT_KEYS = 192


@dataclass(frozen=True)
class SharedBucket:
    """Segments padded to one shape. query_rows [B * L] and key_rows [B * M] name the packed row of each slot (padding repeats
    one); mask bool [B, L, M] says which keys a query sees, and every query sees at least one."""

    num_segments: int
    query_rows: torch.Tensor
    key_rows: torch.Tensor
    mask_BLM: torch.Tensor


@dataclass
class SharedPromptLayout:
    """Buckets of a pack, made once per forward pass. cu_seqlens int32 [S+1]; prefix_segments int64 [S] (see MicroBatch)."""

    cu_seqlens: torch.Tensor
    prefix_segments: torch.Tensor

    @cached_property
    def buckets(self) -> list[SharedBucket]:
        bounds = self.cu_seqlens.tolist()
        # The model may have padded the pack by one more segment than the micro-batch has.
        prefixes = self.prefix_segments.tolist() + [-1] * (len(bounds) - 1 - self.prefix_segments.numel())
        segments = []
        for index, prefix in enumerate(prefixes):
            trunk = (bounds[prefix], bounds[prefix + 1]) if prefix >= 0 else (bounds[index], bounds[index])
            segments.append((trunk[1] - trunk[0], bounds[index + 1] - bounds[index], trunk[0], bounds[index]))
        groups: list[list[tuple[int, int, int, int]]] = []
        for segment in sorted(segment for segment in segments if segment[1] > 0):
            if not groups or not _fits(groups[-1], segment):
                groups.append([])
            groups[-1].append(segment)
        return [_make_bucket(group, self.cu_seqlens.device) for group in groups]

    @cached_property
    def slots(self) -> torch.Tensor:
        """int64 [T]: the query slot, over all buckets end to end, that computes each packed row."""
        rows = torch.cat([bucket.query_rows for bucket in self.buckets])
        slots = torch.empty(int(self.cu_seqlens[-1]), dtype=torch.int64, device=rows.device)
        # Padding slots repeat the last row of their segment and stand to the right of it: written backwards, the first wins.
        slots[rows.flip(0)] = torch.arange(rows.numel() - 1, -1, -1, device=rows.device)
        return slots


def _fits(group: list[tuple[int, int, int, int]], segment: tuple[int, int, int, int]) -> bool:
    trunk, length = group[0][0], min(member[1] for member in group)
    longest = max(segment[1], *(member[1] for member in group))
    shortest = min(segment[1], length)
    return segment[0] <= trunk * SLACK_FACTOR + SLACK_TOKENS and longest <= shortest * SLACK_FACTOR + SLACK_TOKENS


def _make_bucket(group: list[tuple[int, int, int, int]], device: torch.device) -> SharedBucket:
    trunks_B, lengths_B, trunk_starts_B, starts_B = (torch.tensor(column)[:, None] for column in zip(*group, strict=True))
    longest_trunk, longest = int(trunks_B.max()), int(lengths_B.max())
    in_trunk, in_segment = torch.arange(longest_trunk)[None], torch.arange(longest)[None]
    own_rows = starts_B + torch.minimum(in_segment, lengths_B - 1)
    trunk_rows = trunk_starts_B + torch.minimum(in_trunk, (trunks_B - 1).clamp(min=0))
    sees_trunk = (in_trunk < trunks_B)[:, None, :].expand(-1, longest, -1)
    sees_own = (in_segment[:, None, :] <= in_segment[:, :, None]).expand(len(group), -1, -1)
    return SharedBucket(
        num_segments=len(group),
        query_rows=own_rows.flatten().to(device),
        key_rows=torch.cat([trunk_rows, own_rows], dim=1).flatten().to(device),
        mask_BLM=torch.cat([sees_trunk, sees_own], dim=2).to(device),
    )


def shared_prompt_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SharedPromptLayout, scale: float
) -> torch.Tensor:
    """[T, H, D], [T, K, D], [T, K, D] -> [T, H, D]; any device and dtype, differentiable."""
    parts = []
    for bucket in layout.buckets:
        q = query.index_select(0, bucket.query_rows).unflatten(0, (bucket.num_segments, -1))
        k, v = (x.index_select(0, bucket.key_rows).unflatten(0, (bucket.num_segments, -1)) for x in (key, value))
        if q.device.type == "cpu" and k.size(1) <= SHORT_KEYS:
            out_BLHD = _matmul_attention(q, k, v, bucket.mask_BLM, scale)
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out_BHLD = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bucket.mask_BLM[:, None], scale=scale, enable_gqa=q.size(1) != k.size(1)
            )
            out_BLHD = out_BHLD.transpose(1, 2)
        parts.append(out_BLHD.flatten(0, 1))
    return torch.cat(parts).index_select(0, layout.slots)


def _matmul_attention(
    q_BLHD: torch.Tensor, k_BMKD: torch.Tensor, v_BMKD: torch.Tensor, mask_BLM: torch.Tensor, scale: float
) -> torch.Tensor:
    """Masked attention as two batched matmuls, scores and softmax in float32; -> [B, L, H, D].

    The G query heads that share a key/value head are stacked, so that keys and values are not repeated over heads.
    """
    B, L, H, D = q_BLHD.shape
    M, K = k_BMKD.shape[1:3]
    G = H // K
    q = q_BLHD.view(B, L, K, G, D).permute(0, 2, 3, 1, 4).reshape(B * K, G * L, D)
    k, v = (x.transpose(1, 2).reshape(B * K, M, D) for x in (k_BMKD, v_BMKD))
    scores = torch.bmm(q.float(), k.float().transpose(1, 2)).view(B, K, G, L, M) * scale
    weights = scores.masked_fill(~mask_BLM[:, None, None], float("-inf")).softmax(-1).to(v.dtype)
    out = torch.bmm(weights.view(B * K, G * L, M), v)
    return out.view(B, K, G, L, D).permute(0, 3, 1, 2, 4).reshape(B, L, H, D)
