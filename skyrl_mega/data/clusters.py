"""The pieces that packing arranges: single samples, and groups of samples that share their prompt.

Within a sequence of L tokens, position t predicts token t + 1, so what was said of token t + 1 moves to position t; a
sample that stands alone keeps its last position, which has no label. A shared prompt becomes a trunk, and each response a
branch on it (see `data.packing` for the picture). The last prompt token stands at the head of every branch, because its
prediction differs by branch only in the label; the last response token predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from skyrl_mega.data.balance import sequence_cost
from skyrl_mega.types import TrainSample

#: Token of padding sequences: any id that every vocabulary has.
PADDING_TOKEN = 0


@dataclass(frozen=True)
class Segment:
    """A run of packed positions, label-aligned tensors [n]. `position` is that of its first token in the sample.

    `prefix` says which segment of the same cluster (later: of the same micro-batch) it attends to besides itself.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    sample_index: int
    position: int = 0
    prefix: int | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.numel())


@dataclass(frozen=True)
class Cluster:
    """Segments that must stay together: a trunk and its branches, or one sample alone."""

    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)

    def cost(self, attention_cost: float) -> float:
        """Estimated compute: that of each segment, branches attending to their trunk as well."""
        trunk = self.segments[0].num_tokens
        total = 0.0
        for segment in self.segments:
            n = segment.num_tokens
            # A branch computes n tokens, and attends like the last n positions of a sequence of trunk + n.
            whole = sequence_cost(trunk + n, attention_cost) - sequence_cost(trunk, attention_cost)
            total += sequence_cost(n, attention_cost) if segment.prefix is None else whole
        return total

    @staticmethod
    def of_one(sample: TrainSample) -> Cluster:
        """A sample alone: all of its tokens; its last position has no label."""
        ids = sample.token_ids.to(torch.int64)
        return Cluster((_labelled(sample, 0, torch.cat([ids[1:], ids.new_zeros(1)]), sample.num_tokens),))


def clusters(samples: Sequence[TrainSample], capacity: int) -> list[Cluster]:
    """The samples as clusters of at most `capacity` tokens: group members with the same prompt together, in order.

    The prompt of a sample is what stands before its first loss token. Where nothing is gained (a group of one, a prompt of
    one token) a sample stays alone.
    """
    families: dict[tuple, list[TrainSample]] = {}
    for sample in samples:
        prompt = sample.token_ids[: _prompt_length(sample)]
        families.setdefault((sample.group_index, tuple(prompt.tolist())), []).append(sample)
    result = []
    for (_, prompt), family in families.items():
        if len(prompt) < 2:
            result += [Cluster.of_one(sample) for sample in family]
            continue
        for members in _chunks(family, len(prompt), capacity):
            result.append(_shared(members, len(prompt)) if len(members) > 1 else Cluster.of_one(members[0]))
    return result


def _chunks(family: Sequence[TrainSample], prompt_length: int, capacity: int) -> list[list[TrainSample]]:
    """The members in as few runs as fit: trunk and branches of a run take at most `capacity` tokens."""
    runs: list[list[TrainSample]] = []
    room = 0
    for sample in family:
        needed = sample.num_tokens - prompt_length
        if not runs or needed > room:
            runs.append([])
            room = capacity - (prompt_length - 1)
        runs[-1].append(sample)
        room -= needed
    return runs


def _shared(members: Sequence[TrainSample], prompt_length: int) -> Cluster:
    trunk_ids = members[0].token_ids[: prompt_length - 1].to(torch.int64)
    branches = [
        _labelled(sample, prompt_length - 1, sample.token_ids[prompt_length:], sample.num_tokens - 1) for sample in members
    ]
    return Cluster((_unlabelled(trunk_ids), *branches))


def _prompt_length(sample: TrainSample) -> int:
    return int(sample.loss_mask.nonzero()[0])


def _labelled(sample: TrainSample, start: int, labels: torch.Tensor, end: int) -> Segment:
    """Positions start .. end - 1 of a sample; `labels` are the tokens after each of them (0 where there is none)."""
    assert sample.advantages is not None  # balance_and_pack has seen it
    missing = end - start - (sample.num_tokens - 1 - start)

    def after(values_L: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        spoken = values_L[start + 1 :].to(dtype)
        return torch.cat([spoken, spoken.new_zeros(missing)])

    return Segment(
        input_ids=sample.token_ids[start:end].to(torch.int64),
        labels=labels.to(torch.int64),
        loss_mask=after(sample.loss_mask, torch.bool),
        rollout_logprobs=after(sample.rollout_logprobs, torch.float32),
        advantages=after(torch.where(sample.loss_mask, sample.advantages.float(), 0.0), torch.float32),
        sample_index=sample.sample_index,
        position=start,
        prefix=0 if start else None,
    )


def _unlabelled(input_ids: torch.Tensor) -> Segment:
    zeros = torch.zeros(input_ids.shape)
    return Segment(input_ids, torch.zeros_like(input_ids), zeros.bool(), zeros, zeros, sample_index=-1)


def padding_segment(length: int) -> Segment:
    """A sequence that belongs to no sample and has no loss token."""
    return _unlabelled(torch.full((length,), PADDING_TOKEN, dtype=torch.int64))
