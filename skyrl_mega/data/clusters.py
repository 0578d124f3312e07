"""The pieces that packing arranges: single samples, and groups of samples that share their prompt.

Within a sequence of L tokens, position t predicts token t + 1, so what was said of token t + 1 moves to position t; a
sample that stands alone keeps its last position, which has no label. A shared prompt becomes a trunk, and each response a
branch on it (see `data.packing` for the picture). The last prompt token stands at the head of every branch, because its
prediction differs by branch only in the label; the last response token predicts nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from skyrl_mega.data.balance import sequence_cost
from skyrl_mega.types import TrainSample

#: What a sample may bring along for each of its tokens, and a micro-batch then has for each of its labels.
OPTIONAL = ("staleness", "old_logprobs", "ref_logprobs", "values", "returns", "marked")

#: Token of padding sequences: any id that every vocabulary has.
PADDING_TOKEN = 0


@dataclass(frozen=True)
class Segment:
    """A run of packed positions, label-aligned tensors [n]. `position` is that of its first token in the sample.

    `prefix` says which segment of the same cluster (later: of the same micro-batch) it attends to besides itself. `optional`
    holds those of OPTIONAL that the sample has. `routed_experts` [n, layers, K] speaks of the input tokens, as in MicroBatch.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    sample_index: int
    position: int = 0
    prefix: int | None = None
    optional: Mapping[str, torch.Tensor] = field(default_factory=dict)
    routed_experts: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.numel())


@dataclass(frozen=True)
class Cluster:
    """Samples that are packed side by side: on one prompt of `prompt_length` tokens, or whole (prompt_length 0).

    Tokens and cost are plain arithmetic, so that every rank can arrange all clusters; tensors are made by `segments`.
    """

    samples: tuple[TrainSample, ...]
    prompt_length: int = 0

    @property
    def num_tokens(self) -> int:
        """Positions computed: the trunk once, and each branch."""
        trunk = max(self.prompt_length - 1, 0)
        return trunk + sum(sample.num_tokens - self.prompt_length for sample in self.samples)

    def cost(self, attention_cost: float) -> float:
        """Estimated compute: that of each segment, branches attending to their trunk as well."""
        trunk = sequence_cost(max(self.prompt_length - 1, 0), attention_cost)
        return trunk + sum(branch_cost(sample, self.prompt_length, attention_cost) for sample in self.samples)

    def segments(self) -> tuple[Segment, ...]:
        """A trunk and its branches, or whole samples: all of their tokens, of which the last has no label."""
        if self.prompt_length:
            return _shared(self.samples, self.prompt_length)
        return tuple(_whole(sample) for sample in self.samples)


def branch_cost(sample: TrainSample, prompt_length: int, attention_cost: float) -> float:
    """A branch of n tokens attends like the last n positions of a sequence of trunk + n; without a prompt, a whole sample."""
    trunk = max(prompt_length - 1, 0)
    whole = trunk + sample.num_tokens - prompt_length
    return sequence_cost(whole, attention_cost) - sequence_cost(trunk, attention_cost)


def families(samples: Sequence[TrainSample]) -> list[Cluster]:
    """The samples as the largest clusters there are: members of a group with the same prompt together, in order.

    The prompt of a sample is what stands before its first loss token. Where nothing is gained (a group of one, a prompt of
    one token) a sample stays alone.
    """
    members: dict[tuple, list[TrainSample]] = {}
    for sample in samples:
        prompt = sample.token_ids[: _prompt_length(sample)]
        members.setdefault((sample.group_index, tuple(prompt.tolist())), []).append(sample)
    result: list[Cluster] = []
    for (_, prompt), family in members.items():
        if len(prompt) < 2:
            result += [Cluster((sample,)) for sample in family]
        else:
            result.append(_cluster(family, len(prompt)))
    return result


def inseparable(samples: Sequence[TrainSample], *, share_prompts: bool) -> list[Cluster]:
    """One cluster for each group, whose samples meet in one loss (a pair, say), in order.

    What they share is everything up to where their tokens differ or a loss token comes; it is computed once where `share_prompts`
    and it is more than one token.
    """
    groups: dict[int, list[TrainSample]] = {}
    for sample in samples:
        groups.setdefault(sample.group_index, []).append(sample)
    clusters = []
    for members in groups.values():
        shared = _common_prefix(members) if share_prompts and len(members) > 1 else 0
        clusters.append(Cluster(tuple(members), shared if shared > 1 else 0))
    return clusters


def _common_prefix(members: Sequence[TrainSample]) -> int:
    length = min(_prompt_length(sample) for sample in members)
    first = members[0].token_ids[:length]
    for sample in members[1:]:
        differs = (sample.token_ids[:length] != first).nonzero()
        length = min(length, int(differs[0]) if len(differs) else length)
    return length


def split(family: Cluster, capacity: int, most_cost: float, attention_cost: float) -> list[Cluster]:
    """The family in runs, in order, of at most `capacity` tokens and, but for runs of one sample, at most `most_cost`."""
    prompt = family.prompt_length
    if family.num_tokens <= capacity and family.cost(attention_cost) <= most_cost:
        return [family]
    trunk_tokens, trunk_cost = max(prompt - 1, 0), sequence_cost(max(prompt - 1, 0), attention_cost)
    runs: list[list[TrainSample]] = []
    tokens, cost = 0, 0.0
    for sample in family.samples:
        more_tokens, more_cost = sample.num_tokens - prompt, branch_cost(sample, prompt, attention_cost)
        if not runs or tokens + more_tokens > capacity or cost + more_cost > most_cost:
            runs.append([])
            tokens, cost = trunk_tokens, trunk_cost
        runs[-1].append(sample)
        tokens, cost = tokens + more_tokens, cost + more_cost
    return [_cluster(run, prompt) for run in runs]


def _cluster(samples: Sequence[TrainSample], prompt_length: int) -> Cluster:
    return Cluster(tuple(samples), prompt_length if len(samples) > 1 else 0)


def _whole(sample: TrainSample) -> Segment:
    ids = sample.token_ids.to(torch.int64)
    return _labelled(sample, 0, torch.cat([ids[1:], ids.new_zeros(1)]), sample.num_tokens)


def _shared(members: Sequence[TrainSample], prompt_length: int) -> tuple[Segment, ...]:
    trunk_ids = members[0].token_ids[: prompt_length - 1].to(torch.int64)
    # The prompt is computed once, so by the routing of one sample: the first that has any. An engine that took the others'
    # prompts from its prefix cache gave the same to all; where it computed one again, that one's own is not used.
    routings = [sample.routed_experts for sample in members if sample.routed_experts is not None]
    trunk_routing = routings[0][: prompt_length - 1] if routings else None
    branches = [
        _labelled(sample, prompt_length - 1, sample.token_ids[prompt_length:], sample.num_tokens - 1) for sample in members
    ]
    return (replace(_unlabelled(trunk_ids), routed_experts=trunk_routing), *branches)


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
        optional={name: after(values_L, torch.float32) for name, values_L in _optional(sample).items()},
        routed_experts=None if sample.routed_experts is None else sample.routed_experts[start:end],
    )


def _optional(sample: TrainSample) -> dict[str, torch.Tensor]:
    """Token-aligned [L], 0 where loss_mask is False."""
    given = {name: getattr(sample, name) for name in OPTIONAL}
    return {
        # values has one entry more, of the state after the last token.
        name: torch.where(sample.loss_mask, values[: sample.num_tokens], 0.0)
        for name, values in given.items()
        if values is not None
    }


def _unlabelled(input_ids: torch.Tensor) -> Segment:
    zeros = torch.zeros(input_ids.shape)
    return Segment(input_ids, torch.zeros_like(input_ids), zeros.bool(), zeros, zeros, sample_index=-1)


def padding_segment(length: int) -> Segment:
    """A sequence that belongs to no sample and has no loss token."""
    return _unlabelled(torch.full((length,), PADDING_TOKEN, dtype=torch.int64))
