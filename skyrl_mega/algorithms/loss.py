"""The objective of one micro-batch: policy loss + kl.coef x KL - entropy_coef x entropy, summed with global weights.

Sums of micro-batches and ranks add up to the average over the whole update. Statistics come in three kinds:

- `loss/*`: parts of the loss; their SUM over micro-batches and ranks is the number to report.
- `policy/*`, `mismatch/*`: averages over trained tokens. Their SUM is weighted like the loss, and samples that were left
  out of compute have no share in it: divide by the SUM of `weight/sum`, as `mean_stats` does.
- maxima: to be reduced with MAX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from skyrl_mega.algorithms.kl import KL_ESTIMATORS, k3
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES, LossInputs
from skyrl_mega.algorithms.registry import lookup
from skyrl_mega.config.schema import AlgorithmConfig
from skyrl_mega.errors import ConfigError
from skyrl_mega.types import Metrics

#: The weight of the tokens that were computed; below 1 where samples were left out.
WEIGHT_SUM = "weight/sum"


@dataclass(frozen=True)
class LossStats:
    """Detached scalars of one micro-batch: `sums` are reduced with SUM over micro-batches and ranks, `maxima` with MAX."""

    sums: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]


def policy_objective(config: AlgorithmConfig, inputs: LossInputs, weights_T: torch.Tensor) -> tuple[torch.Tensor, LossStats]:
    """(loss, statistics) of one micro-batch as weighted sums; the loss, a scalar, carries the gradient. No communication.

    weights_T float32 [T] from `reduction_weights`. `sums` holds loss/policy, loss/kl and loss/entropy with their
    coefficients applied, loss/total; policy/* of the policy loss, policy/entropy, policy/kl_ref where computed; mismatch/*
    between the engine's and the trainer's log-probabilities (rollout against old), and weight/sum.
    Raises ConfigError for a term that is switched on and whose input is missing, and for unknown names.
    """
    mask_T = inputs.loss_mask
    per_token_T, policy_stats = lookup(POLICY_LOSSES, config.policy_loss, "algorithm.policy_loss")(inputs, config)
    losses = {"policy": _weighted_sum(per_token_T, weights_T)}
    averages = {f"policy/{name}": value_T for name, value_T in policy_stats.items()}

    if config.kl.coef != 0:
        if inputs.ref_logprobs is None:
            raise ConfigError(f"algorithm.kl.coef ({config.kl.coef}) needs ref_logprobs; run the reference model or set it to 0.")
        estimator = lookup(KL_ESTIMATORS, config.kl.estimator, "algorithm.kl.estimator")
        kl_T = estimator(inputs.logprobs, inputs.ref_logprobs, mask_T)
        losses["kl"] = config.kl.coef * _weighted_sum(kl_T, weights_T)
        averages["policy/kl_ref"] = kl_T
    if inputs.entropy is not None:
        entropy_T = torch.where(mask_T, inputs.entropy, 0.0)
        averages["policy/entropy"] = entropy_T
        if config.entropy_coef != 0:
            losses["entropy"] = -config.entropy_coef * _weighted_sum(entropy_T, weights_T)
    elif config.entropy_coef != 0:
        raise ConfigError(f"algorithm.entropy_coef ({config.entropy_coef}) needs the entropy; compute it or set it to 0.")

    loss_sum = torch.stack(list(losses.values())).sum()
    with torch.no_grad():
        mismatch, mismatch_max = _mismatch(inputs)
        averages.update(mismatch)
        stats = {f"loss/{name}": value.detach() for name, value in losses.items()}
        stats["loss/total"] = loss_sum.detach()
        stats.update({name: _weighted_sum(value_T, weights_T) for name, value_T in averages.items()})
        stats[WEIGHT_SUM] = weights_T.sum()
    return loss_sum, LossStats(stats, mismatch_max)


def merge_stats(parts: Sequence[LossStats]) -> LossStats:
    """The statistics of parts of one micro-batch as those of the whole."""
    sums = {name: torch.stack([part.sums[name] for part in parts]).sum() for name in parts[0].sums}
    maxima = {name: torch.stack([part.maxima[name] for part in parts]).amax() for name in parts[0].maxima}
    return LossStats(sums, maxima)


def mean_stats(sums: Mapping[str, float]) -> Metrics:
    """Numbers to report from `LossStats.sums`, summed over all micro-batches and ranks.

    `loss/*` stay as they are; the others become averages over the tokens that were computed. `weight/sum` stays too.
    """
    weight = float(sums[WEIGHT_SUM])
    as_is = {name: float(value) for name, value in sums.items() if name.startswith("loss/") or name == WEIGHT_SUM}
    averages = {name: float(value) / weight if weight > 0 else 0.0 for name, value in sums.items() if name not in as_is}
    return {**as_is, **averages}


def _weighted_sum(value_T: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    return (value_T * weights_T).sum()


def _mismatch(inputs: LossInputs) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """How far the engine that sampled and the trainer that learns are apart, before any update of this step."""
    difference_T = torch.where(inputs.loss_mask, inputs.old_logprobs - inputs.rollout_logprobs, 0.0).abs()
    averages = {
        "mismatch/abs_logprob_diff_mean": difference_T,
        # k3 with the engine as the sampler: KL(rollout || old).
        "mismatch/kl": k3(inputs.rollout_logprobs, inputs.old_logprobs, inputs.loss_mask),
    }
    largest = difference_T.amax() if difference_T.numel() else difference_T.new_zeros(())
    return averages, {"mismatch/abs_logprob_diff_max": largest}
