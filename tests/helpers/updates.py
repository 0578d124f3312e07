"""Updates of a tiny policy on random samples, and what came of them."""

from __future__ import annotations

import torch

from skyrl_mega.config.load import load_config
from skyrl_mega.config.schema import Config
from skyrl_mega.data.packing import balance_and_pack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.training.policy import Policy
from skyrl_mega.types import Metrics, TrainBatch


def update(policy: Policy, seed: int, *, num_groups: int = 4, pad_to_multiple: int = 1) -> Metrics:
    """One update on the samples of `seed`, which are the same in every layout."""
    return policy.train_step(packed(policy, seed, num_groups=num_groups, pad_to_multiple=pad_to_multiple))


def packed(policy: Policy, seed: int, *, num_groups: int = 4, pad_to_multiple: int = 1) -> TrainBatch:
    """This rank's share of those samples."""
    topology = policy.topology
    return balance_and_pack(
        random_samples(num_groups, 3, seed=seed),
        tokens_per_micro_batch=64,
        dp_rank=topology.dp_rank,
        dp_size=topology.dp_size,
        skip_zero_advantage=False,
        share_prompts=True,
        pad_to_multiple=pad_to_multiple,
    )


def clones(policy: Policy) -> dict[str, torch.Tensor]:
    """The policy's weights by their Hugging Face names, float32."""
    return {name: value.clone() for name, value in policy.iter_weights(torch.float32)}


def variant(config: Config, *overrides: str) -> Config:
    """The same model, run directory and precision with other settings."""
    base = ["recipe=tiny", f"model.path={config.model.path}", f"trainer.run_dir={config.trainer.run_dir}"]
    return load_config([*base, f"model.dtype={config.model.dtype}", f"rollout.dtype={config.rollout.dtype}", *overrides])
