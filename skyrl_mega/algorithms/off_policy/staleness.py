"""The stage that trusts a token less the older the weights that sampled it.

Shape letter: T packed tokens of one micro-batch.
"""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.off_policy.stages import STAGES, StageInputs
from skyrl_mega.errors import ConfigError


@STAGES.register("staleness_decay")
def staleness_decay(
    inputs: StageInputs, *, power: float = 0.5, free: float = 0.0, level: str = "token"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(1 + max(0, staleness - free))^-power: 1 for fresh tokens, falling with the versions since they were sampled.

    `free` versions cost nothing. `level: sequence` takes the mean over the sequence's tokens, so that a trajectory whose later
    tokens came from newer weights keeps one weight. It knows nothing of how much the policy moved: a rule of thumb beside the
    ratio, for lags of many versions. Source: the polynomial weight of FedAsync, arXiv:1903.03934 (power 0.5); a step divided by
    its staleness is power 1, arXiv:1511.05950.
    """
    if power < 0 or free < 0:
        raise ConfigError(f"`power` ({power}) and `free` ({free}) of the off-policy stage staleness_decay must be at least 0.")
    if level not in ("token", "sequence"):
        raise ConfigError(f"`level` of the off-policy stage staleness_decay must be token or sequence; got {level!r}.")
    if inputs.staleness is None:
        raise ConfigError(
            "the off-policy stage staleness_decay needs to know which weight version sampled each token, and these samples don't"
            " say (was the step recorded by an earlier release?); leave the stage out."
        )
    staleness_T = inputs.staleness
    if level == "sequence":
        staleness_T = inputs.whole_sequences.spread(inputs.whole_sequences.mean(staleness_T, inputs.loss_mask))
    factor_T = (1 + (staleness_T - free).clamp(min=0)).pow(-power)
    return factor_T, factor_T < 1
