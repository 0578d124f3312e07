"""Packs for attention tests: micro-batches of given lengths, and attention over them written out densely in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skyrl_mega.types import MicroBatch


def make_pack(lengths: Sequence[int], prefixes: Sequence[int] | None = None, *, seed: int = 0) -> MicroBatch:
    """A micro-batch of sequences of these lengths; `prefixes` as MicroBatch.prefix_segments. Every value is random."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    positions = []
    for index, length in enumerate(lengths):
        prefix = -1 if prefixes is None else prefixes[index]
        positions.append(torch.arange(length) + (lengths[prefix] if prefix >= 0 else 0))
    return MicroBatch(
        input_ids=torch.randint(0, 200, (total,), generator=generator),
        position_ids=torch.cat(positions),
        labels=torch.randint(0, 200, (total,), generator=generator),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        loss_mask=torch.rand(total, generator=generator) < 0.7,
        rollout_logprobs=-torch.rand(total, generator=generator),
        advantages=torch.randn(total, generator=generator),
        sample_index=torch.arange(len(lengths)),
        loss_tokens_per_sequence=torch.randint(1, 50, (len(lengths),), generator=generator).float(),
        prefix_segments=None if prefixes is None else torch.tensor(prefixes),
        old_logprobs=-torch.rand(total, generator=generator),
    )


def random_qkv(
    num_tokens: int,
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 16,
    *,
    value_dim: int | None = None,
    dtype=torch.float32,
    seed: int = 0,
) -> list:
    """[query, key, value]: [T, H, D], [T, K, D] and [T, K, E], where E is D unless `value_dim` is given."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, dim), (kv_heads, dim), (kv_heads, value_dim or dim)
    return [torch.randn(num_tokens, h, d, generator=generator).to(dtype) for h, d in shapes]


def visible(pack: MicroBatch, window: int | None = None) -> torch.Tensor:
    """bool [T, T]: whether token i sees token j: one of its own sequence that is not later, or one of its trunk's.

    With `window` only if j's position is less than `window` before i's.
    """
    lengths = pack.cu_seqlens.diff().long()
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    prefixes = torch.full((len(lengths),), -1) if pack.prefix_segments is None else pack.prefix_segments
    own = sequence[:, None] == sequence[None, :]
    sees = (own & torch.ones_like(own).tril()) | (prefixes[sequence][:, None] == sequence[None, :])
    if window is not None:
        sees &= pack.position_ids[:, None] - pack.position_ids[None, :] < window
    return sees


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor, scale: float, softcap: float | None = None
) -> torch.Tensor:
    """Masked softmax in float64 over all pairs, keys and values repeated per query head; [T, H, E]."""
    repeats = q.size(1) // k.size(1)
    q, k, v = q.double(), k.double().repeat_interleave(repeats, 1), v.double().repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~sees, float("-inf")).softmax(-1), v)


def with_gradients(attend, qkv: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """[output, gradients of query, key and value] of a loss that weighs every output differently."""
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv)
    out = attend(q, k, v)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    (out.double() * weights).sum().backward()
    return [out.detach(), q.grad, k.grad, v.grad]
