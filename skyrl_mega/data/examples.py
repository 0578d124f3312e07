"""Rows of fixed data as tokens, and as the samples that packing takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from skyrl_mega.data.hashing import stable_hash
from skyrl_mega.types import TrainSample


@dataclass(frozen=True)
class TokenSequence:
    """token_ids int32 [L]; loss_mask bool [L]: which tokens are trained. Token 0 follows nothing, and is never one of them."""

    token_ids: torch.Tensor
    loss_mask: torch.Tensor

    @classmethod
    def of(cls, token_ids: Sequence[int], loss_mask: Sequence[bool]) -> TokenSequence:
        mask = torch.tensor(loss_mask, dtype=torch.bool)
        mask[:1] = False
        return cls(torch.tensor(token_ids, dtype=torch.int32), mask)

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.numel())

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True)
class Example:
    """One row: a sequence, or a pair of which the first is the better one. `place` is the file and line it came from.

    `target`: what the row says besides: a score, a label (1: good, 0: bad), the margin between a pair.
    """

    place: str
    sequences: tuple[TokenSequence, ...]
    target: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)


def samples_of(examples: Sequence[Example]) -> list[TrainSample]:
    """The examples' sequences as samples, one group per example, with advantages of 1 on what is trained.

    Sequences are numbered through: those of a batch of pairs have sample_index 2 i (better) and 2 i + 1.
    """
    samples: list[TrainSample] = []
    for group, example in enumerate(examples):
        for sequence in example.sequences:
            samples.append(
                TrainSample(
                    sample_index=len(samples),
                    group_index=group,
                    group_id=example.place,
                    token_ids=sequence.token_ids.long(),
                    loss_mask=sequence.loss_mask,
                    rollout_logprobs=torch.zeros(sequence.num_tokens),
                    reward=example.target,
                    advantages=sequence.loss_mask.float(),
                )
            )
    return samples


def fingerprint(examples: Sequence[Example]) -> str:
    """16 hexadecimal digits of everything that is trained on: tokens, masks and targets in their order."""
    hashed = hashlib.blake2b(digest_size=8)
    for example in examples:
        for sequence in example.sequences:
            hashed.update(stable_hash(sequence.num_tokens, example.target).to_bytes(8, "big"))
            hashed.update(sequence.token_ids.numpy().tobytes())
            hashed.update(sequence.loss_mask.numpy().tobytes())
    return hashed.hexdigest()
