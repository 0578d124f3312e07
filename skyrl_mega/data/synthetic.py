"""Training samples without a task: what the layouts are compared on, and the tests."""

from __future__ import annotations

import torch

from skyrl_mega.types import TrainSample


def random_samples(num_groups: int, group_size: int, *, vocab: int = 261, seed: int = 0, max_len: int = 24) -> list[TrainSample]:
    """Groups that share a random prompt, with responses of random length, rollout logprobs and token-aligned random advantages.

    Token ids lie in 5..vocab - 1; prompts and responses each have at most `max_len` / 2 tokens. The same `seed` gives the same
    samples on every rank.
    """
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    samples: list[TrainSample] = []
    for group in range(num_groups):
        prompt = torch.randint(5, vocab, (integer(2, max_len // 2),), generator=generator)
        for _ in range(group_size):
            response = torch.randint(5, vocab, (integer(1, max_len // 2),), generator=generator)
            token_ids = torch.cat([prompt, response])
            loss_mask = torch.zeros(len(token_ids), dtype=torch.bool)
            loss_mask[len(prompt) :] = True
            advantage = float(torch.randn((), generator=generator))
            samples.append(
                TrainSample(
                    sample_index=len(samples),
                    group_index=group,
                    group_id=f"g{group}",
                    token_ids=token_ids,
                    loss_mask=loss_mask,
                    rollout_logprobs=-5.0 * torch.rand(len(token_ids), generator=generator) * loss_mask,
                    reward=advantage,
                    advantages=advantage * loss_mask.float(),
                )
            )
    return samples
