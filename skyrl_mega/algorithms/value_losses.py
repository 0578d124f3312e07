"""Value losses, per token, and the objective of one micro-batch of the critic: their sum with global weights.

As for the policy (`loss.py`), a loss is scaled by the weights of the global batch and then only summed, so that sums of
micro-batches and ranks add up to the average over the whole update. The statistics are sums too: `critic_metrics` makes numbers
to report of them once they are added up.

Explained variance, 1 - Var(returns - values) / Var(returns), compares a critic with the best constant: 1 is perfect, 0 no better
than the mean return, below 0 worse. The variances are over all weighted tokens, from sums of first and second moments; float64,
since the difference of two large sums is taken.

Shape letter: T packed tokens of one micro-batch, label-aligned (see `skyrl_mega.types`): values_T[t] is that of the state in
which labels[t] is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from skyrl_mega.algorithms.registry import lookup
from skyrl_mega.config.schema import CriticConfig
from skyrl_mega.errors import DataError
from skyrl_mega.types import Metrics


@dataclass(frozen=True)
class ValueLossInputs:
    """What a value loss may look at; every tensor is [T], float32 (or float64), loss_mask bool.

    `values` carries gradients. `old_values` are those that advantages and returns were computed with, before this step's first
    update (None where nobody has them); `returns` are what the values shall become.
    """

    values: torch.Tensor
    returns: torch.Tensor
    loss_mask: torch.Tensor
    old_values: torch.Tensor | None = None


#: (error_T: values - returns, where loss_mask is True; inputs, config) -> (per_token_loss_T, is_clipped_T)
ValueLoss = Callable[[torch.Tensor, ValueLossInputs, CriticConfig], tuple[torch.Tensor, torch.Tensor]]


def value_objective(
    config: CriticConfig, inputs: ValueLossInputs, weights_T: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss, sums) of one micro-batch; the loss, a scalar, carries the gradient. No communication.

    weights_T float32 [T] from `reduction_weights`. `sums` are detached float64 scalars to be added up over micro-batches and
    ranks for `critic_metrics`. Raises DataError where `config.loss` needs old values and has none, ConfigError for an unknown
    loss.
    """
    error_T = torch.where(inputs.loss_mask, inputs.values - inputs.returns, 0.0)
    per_token_T, is_clipped_T = lookup(VALUE_LOSSES, config.loss, "critic.loss")(error_T, inputs, config)
    loss = (per_token_T * weights_T).sum()
    with torch.no_grad():
        weights = weights_T.double()
        returns, error = torch.where(inputs.loss_mask, inputs.returns, 0.0).double(), error_T.double()
        moments = {
            "loss": per_token_T.double(),
            "weight": torch.ones_like(weights),
            "clipped": is_clipped_T.double(),
            "value": returns + error,
            "return": returns,
            "return_square": returns.square(),
            "error": error,
            "error_square": error.square(),
        }
        sums = {name: (moment_T * weights).sum() for name, moment_T in moments.items()}
    return loss, sums


def critic_metrics(sums: Mapping[str, float]) -> Metrics:
    """Numbers to report from the sums of `value_objective`, added up over all micro-batches and ranks.

    `critic/loss` as it was minimised; `clip_fraction`, `value_mean`, `return_mean` and `error_rms` (of values against returns)
    are averages over the tokens that were computed. `critic/explained_variance` is left out where all returns are equal: nothing
    is there to explain.
    """
    weight = sums["weight"]
    metrics = {"critic/loss": sums["loss"]}
    if weight > 0:
        mean = {name: value / weight for name, value in sums.items()}
        metrics |= {
            "critic/clip_fraction": mean["clipped"],
            "critic/value_mean": mean["value"],
            "critic/return_mean": mean["return"],
            "critic/error_rms": mean["error_square"] ** 0.5,
        }
        return_variance = mean["return_square"] - mean["return"] ** 2
        # What rounding leaves of equal returns is no variance.
        if return_variance > 1e-12 * max(mean["return_square"], 1e-30):
            error_variance = max(mean["error_square"] - mean["error"] ** 2, 0.0)
            metrics["critic/explained_variance"] = 1.0 - error_variance / return_variance
    return metrics


def clipped_value_loss(
    values_T: torch.Tensor, old_values_T: torch.Tensor, returns_T: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(0.5 max((V - R)^2, (clip(V, old - clip, old + clip) - R)^2) per token, where the second is the larger).

    The gradient is 0 where the second is: the value has moved further than `clip` from the old one towards the return, and would
    move on.

    Source: PPO, arXiv:1707.06347, as in its authors' code (openai/baselines, ppo2/model.py); arXiv:2005.12729 section 3 names it.
    """
    moved_T = values_T - old_values_T
    # Within the bounds the value itself: old + (value - old) would differ from it in the last bit, and count as clipped.
    near_T = torch.where(moved_T.abs() <= clip, values_T, old_values_T + moved_T.clamp(-clip, clip))
    free_T, bound_T = (values_T - returns_T).square(), (near_T - returns_T).square()
    return 0.5 * torch.maximum(free_T, bound_T), (bound_T > free_T).detach()


def _clipped(error_T: torch.Tensor, inputs: ValueLossInputs, config: CriticConfig) -> tuple[torch.Tensor, torch.Tensor]:
    if inputs.old_values is None:
        raise DataError(
            "critic.loss=clipped keeps values near those before the step, and the micro-batch has none: compute them with "
            "`Critic.compute_values` first, or set critic.loss=mse."
        )
    # Around the return: then the masked entries of what is subtracted have no say.
    old_T = torch.where(inputs.loss_mask, inputs.old_values - inputs.returns, 0.0)
    return clipped_value_loss(error_T, old_T, torch.zeros_like(error_T), config.value_clip)


def _mse(error_T: torch.Tensor, inputs: ValueLossInputs, config: CriticConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """0.5 (V - R)^2."""
    return 0.5 * error_T.square(), torch.zeros_like(error_T, dtype=torch.bool)


def _huber(error_T: torch.Tensor, inputs: ValueLossInputs, config: CriticConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """0.5 (V - R)^2 up to an error of `critic.huber_delta`, linear beyond it (Huber 1964): an outlier pulls no harder."""
    delta = config.huber_delta
    size_T = error_T.abs()
    return torch.where(size_T <= delta, 0.5 * error_T.square(), delta * (size_T - 0.5 * delta)), (size_T > delta).detach()


#: `critic.loss` -> loss. "clipped" tokens of huber are those in the linear part.
VALUE_LOSSES: dict[str, ValueLoss] = {"clipped": _clipped, "mse": _mse, "huber": _huber}
