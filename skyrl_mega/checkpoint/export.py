"""A checkpoint of a run, written as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_mega.checkpoint import store
from skyrl_mega.errors import CheckpointError

if TYPE_CHECKING:
    from skyrl_mega.config.schema import Config


def export_run(run_dir: str, checkpoint: str, output: str) -> Path:
    """Writes `checkpoint` (latest, best, a step or a path) of `run_dir` to the directory `output`; needs no GPU and no engine.

    The layout is the caller's (one process: whole model), not the one that trained. Raises CheckpointError if the run or the
    checkpoint is not there or damaged, or if `output` exists.
    """
    from skyrl_mega.config.load import load_saved

    saved = Path(run_dir) / "config.yaml"
    if not saved.is_file():
        raise CheckpointError(f"{run_dir} is not a run directory: it has no config.yaml")
    path = store.find_checkpoint(run_dir, checkpoint)
    if Path(output).exists():
        raise CheckpointError(f"{output} exists; name a directory that does not")
    config, is_reward_model = _to_build(load_saved(saved))

    import torch

    from skyrl_mega.checkpoint.state import load_model
    from skyrl_mega.config.schema import ParallelConfig
    from skyrl_mega.models.build import PolicyModel
    from skyrl_mega.models.hf_io import save_hf
    from skyrl_mega.models.lora_weights import build_to_load, make_exporter
    from skyrl_mega.models.value import ValueModel
    from skyrl_mega.parallel.device import resolve_device
    from skyrl_mega.parallel.topology import init_topology

    topology = init_topology(ParallelConfig(), resolve_device("cpu"), seed=config.trainer.seed)
    try:
        chunks = build_to_load(config, topology, ValueModel if is_reward_model else PolicyModel)
        load_model(path, chunks)
        save_hf(make_exporter(chunks, topology), config.model.path, output, getattr(torch, config.model.dtype))
    finally:
        topology.destroy()
    return Path(output)


def _to_build(config: Any) -> tuple[Config, bool]:
    """(what building the run's model reads, whether it gives scores), whichever command the run is of."""
    from skyrl_mega.config.offline import training_config
    from skyrl_mega.config.offline_schema import OfflineConfig, RMConfig

    return (training_config(config) if isinstance(config, OfflineConfig) else config), isinstance(config, RMConfig)
