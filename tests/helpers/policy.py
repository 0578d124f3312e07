"""A Policy on a tiny model, in this process, with its process groups cleaned up afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from helpers.tiny import write_tiny_model
from skyrl_mega.config.load import load_config
from skyrl_mega.config.schema import Config
from skyrl_mega.parallel.topology import Topology, init_topology
from skyrl_mega.training.policy import Policy


def tiny_config(directory: Path, *overrides: str, family: str = "llama", tied: bool = True, **shape) -> Config:
    """A float32 configuration on a fresh random model under `directory`; `shape` goes into its Hugging Face config."""
    path = write_tiny_model(directory / "model", family, tied=tied, **shape)
    run_dir = f"trainer.run_dir={directory / 'run'}"
    return load_config(["recipe=tiny", f"model.path={path}", run_dir, *overrides])


@contextmanager
def make_policy(config: Config, *, topology: Topology | None = None) -> Iterator[Policy]:
    """A policy with the weights of `config.model.path`; joins a world (of one, without torchrun's environment) unless given."""
    with joined(config, topology) as place:
        yield Policy.from_hf(config, place)


@contextmanager
def joined(config: Config, topology: Topology | None = None) -> Iterator[Topology]:
    """`topology`, or a world of its own that is left at the end."""
    if topology is not None:
        yield topology
        return
    topology = init_topology(config.parallel, torch.device("cpu"), seed=config.trainer.seed)
    try:
        yield topology
    finally:
        topology.destroy()
