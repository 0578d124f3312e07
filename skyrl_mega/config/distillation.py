"""`skyrl-mega distill`: reinforcement learning's configuration, with a teacher's word as its objective."""

from __future__ import annotations

from dataclasses import replace

from skyrl_mega.config.schema import AlgorithmConfig, Config
from skyrl_mega.errors import ConfigError

#: What learns from a teacher: the advantage of the sampled tokens, the loss over its likeliest ones.
ADVANTAGE, TOPK_LOSS = "distill", "distill_topk"


def as_distillation(config: Config) -> Config:
    """The configuration whose algorithm learns from `teacher.path`; one that says how already stays as it is.

    With `teacher.topk` > 0 it is the divergence over the teacher's likeliest tokens (`policy_loss=distill_topk`, with no look at
    rewards), else its word on the tokens that were sampled (`advantage=distill`). Raises ConfigError without a teacher, and where
    another advantage or loss was chosen.
    """
    algorithm, default = config.algorithm, AlgorithmConfig()
    if not config.teacher.path:
        raise ConfigError(
            "Distillation learns from a teacher; `teacher.path` is empty. Set it to the directory of a model with the policy's"
            " vocabulary."
        )
    if algorithm.advantage == ADVANTAGE or algorithm.policy_loss == TOPK_LOSS:
        return config
    changed = {
        "algorithm.advantage": (algorithm.advantage, default.advantage),
        "algorithm.policy_loss": (algorithm.policy_loss, default.policy_loss),
    }
    if config.teacher.topk > 0:
        changed = {key: pair for key, pair in changed.items() if key == "algorithm.policy_loss"}
        algorithm = replace(algorithm, policy_loss=TOPK_LOSS)
    else:
        changed = {key: pair for key, pair in changed.items() if key == "algorithm.advantage"}
        algorithm = replace(algorithm, advantage=ADVANTAGE)
    for key, (given, usual) in changed.items():
        if given != usual:
            raise ConfigError(
                f"`skyrl-mega distill` sets `{key}` itself; it is {given}. Leave it out, or use `skyrl-mega train`."
            )
    return replace(config, algorithm=algorithm)
