"""Where engines run and how weights reach them, once `auto` is resolved. Needs no file and no machine."""

from __future__ import annotations

from typing import Literal

from skyrl_mega.config.schema import Config

Placement = Literal["in_process", "child_process", "ray"]


def needs_fleet(config: Config) -> list[str]:
    """The settings that only a fleet on Ray can serve, as `key=value`."""
    rollout = config.rollout
    asked = {
        "rollout.num_engines": rollout.num_engines if rollout.num_engines != 1 else None,
        "rollout.external_urls": list(rollout.external_urls) or None,
    }
    return [f"{key}={value}" for key, value in asked.items() if value is not None]


def needs_own_process(config: Config, world_size: int) -> list[str]:
    """Why the engine can't run inside the trainer's process, as `key=value`; [] if it can."""
    rollout = config.rollout
    asked = {
        "trainer.max_staleness": config.trainer.max_staleness or None,
        "rollout.engine_tensor": rollout.engine_tensor if rollout.engine_tensor > 1 else None,
        "rollout.engine_pipeline": rollout.engine_pipeline if rollout.engine_pipeline > 1 else None,
        "rollout.engine_data": rollout.engine_data if rollout.engine_data > 1 else None,
        "processes": world_size if world_size > 1 else None,
    }
    return [*(f"{key}={value}" for key, value in asked.items() if value is not None), *needs_fleet(config)]


def resolve_placement(config: Config, world_size: int) -> Placement:
    """`rollout.placement`, or for `auto` the first of in_process, child_process and ray that can serve the settings."""
    if config.rollout.placement != "auto":
        return config.rollout.placement
    if not needs_own_process(config, world_size):
        return "in_process"
    return "ray" if needs_fleet(config) or not config.rollout.colocated else "child_process"
