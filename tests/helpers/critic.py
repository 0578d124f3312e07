"""A Critic on a tiny model, batches with something to learn for it, and the same in float64 on a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from helpers.policy import joined
from skyrl_mega.config.schema import Config
from skyrl_mega.data.packing import balance_and_pack, pack_rows
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.parallel.topology import Topology
from skyrl_mega.training.critic import Critic
from skyrl_mega.training.schedule import packing_multiples
from skyrl_mega.types import TrainBatch, TrainSample


@contextmanager
def make_critic(config: Config, *, topology: Topology | None = None) -> Iterator[Critic]:
    """A critic with the weights of `critic.path` or `model.path`; joins a world (of one, without torchrun's) unless given."""
    with joined(config, topology) as place:
        yield Critic.from_hf(config, place)


def critic_rows(samples: Sequence[TrainSample], seed: int) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
    """(old values, returns) by sample_index, token-aligned float32 [L]: random, and different for every token."""
    generator = torch.Generator().manual_seed(seed)
    old = {s.sample_index: torch.randn(s.num_tokens, generator=generator) for s in samples}
    returns = {index: row + torch.randn(len(row), generator=generator) for index, row in old.items()}
    return old, returns


def critic_batch(
    config: Config, topology: Topology, seed: int, *, share_prompts: bool = True
) -> tuple[TrainBatch, list[TrainSample]]:
    """This rank's part of a batch with random values and returns, the same batch in every layout; and all its samples."""
    samples = random_samples(5, 3, seed=seed)
    batch = balance_and_pack(
        samples,
        tokens_per_micro_batch=64,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        skip_zero_advantage=False,
        share_prompts=share_prompts,
        **packing_multiples(config, topology),
    )
    old, returns = critic_rows(samples, seed)
    for name, rows in (("values", old), ("returns", returns)):
        for micro_batch, row_T in zip(batch.micro_batches, pack_rows(rows, batch), strict=True):
            setattr(micro_batch, name, row_T)
    return batch, samples


class CriticOracle:
    """A sequence classification model with one label, in float64, one sequence at a time."""

    def __init__(self, path: str | Path) -> None:
        from transformers import AutoModelForSequenceClassification

        self.model = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float64, num_labels=1, experts_implementation="eager"
        )

    def values(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[L]: the value after each token. (The class itself gives that of the last one only.)"""
        hidden = self.model.base_model(token_ids[None]).last_hidden_state[0]
        return self.model.score(hidden)[:, 0]

    def update(
        self, optimizer: torch.optim.Optimizer, samples: Sequence[TrainSample], seed: int, config: Config
    ) -> tuple[float, float]:
        """(loss, gradient norm before clipping) of one update on what `critic_batch` has of that seed."""
        old, returns = critic_rows(samples, seed)
        total = sum(s.num_loss_tokens for s in samples)
        settings = config.critic
        optimizer.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for sample in samples:
            # The state in which token t is sampled is that after token t - 1.
            value, mask = self.values(sample.token_ids)[:-1], sample.loss_mask[1:]
            before, target = old[sample.sample_index][1:].double(), returns[sample.sample_index][1:].double()
            if settings.loss == "clipped":
                near = torch.minimum(torch.maximum(value, before - settings.value_clip), before + settings.value_clip)
                per_token = 0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2)
            elif settings.loss == "mse":
                per_token = 0.5 * (value - target) ** 2
            else:
                per_token = torch.nn.functional.huber_loss(value, target, reduction="none", delta=settings.huber_delta)
            summed = (per_token * mask).sum()
            is_mean = config.algorithm.reduction == "token_mean"
            loss = loss + (summed / total if is_mean else summed / mask.sum() / len(samples))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.optimizer.clip_grad_norm)
        optimizer.step()
        return float(loss.detach()), float(norm)
