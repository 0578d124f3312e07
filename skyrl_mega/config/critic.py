"""What a critic's settings come to: the run's, with its own model, optimizer and layout in the places of the policy's."""

from __future__ import annotations

from dataclasses import replace

from skyrl_mega.config.schema import Config, ParallelConfig

#: Sizes that the critic may have otherwise than the policy.
SIZES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")


def critic_config(config: Config) -> Config:
    """The run's configuration with the critic's directory, optimizer and layout in the places of the policy's."""
    path = config.critic.path or config.model.path
    # Its routers are its own, and choose for themselves.
    model = replace(config.model, path=path, router_replay="off")
    return replace(config, model=model, optimizer=config.critic.optimizer, parallel=critic_parallel(config))


def critic_parallel(config: Config) -> ParallelConfig:
    """The critic's layout; equal to `config.parallel` where `critic.parallel` changes nothing."""
    policy, own = config.parallel, config.critic.parallel
    sizes = {name: getattr(own, name) or getattr(policy, name) for name in SIZES}
    if own.sequence_parallel != "auto":
        sequence_parallel = own.sequence_parallel == "on"
    elif sizes["tensor"] == policy.tensor:
        sequence_parallel = policy.sequence_parallel
    else:
        sequence_parallel = sizes["tensor"] > 1
    return replace(
        policy, **sizes, sequence_parallel=sequence_parallel, overlap_tensor=policy.overlap_tensor and sequence_parallel
    )
