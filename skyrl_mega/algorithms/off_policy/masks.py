"""Stages that leave tokens or whole sequences out where policy and engine see them too differently: factors of 0 and 1.

Shape letter: T packed tokens of one micro-batch. A mask composes with a stage that weighs, and with `old_logprobs=rollout`. It
biases the gradient towards what both policies agree on, and bounds how wrong a single sample can be.
"""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.off_policy.stages import STAGES, StageInputs, check_bounds
from skyrl_mega.errors import ConfigError


@STAGES.register("token_mask")
def token_mask(inputs: StageInputs, *, low: float = 0.5, high: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where low <= w <= high, else 0, token by token: IcePop's band without its weight.

    Source: arXiv:2510.18855; verl's rejection `token_k1`, with the bounds of its presets.
    """
    check_bounds("token_mask", low=low, high=high)
    return _keep_between(inputs.log_ratio_at("token"), low, high)


@STAGES.register("sequence_mask", token_separable=False)
def sequence_mask(inputs: StageInputs, *, low: float = 0.5, high: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where low <= exp(sum of log w over the sequence) <= high, else 0, for all of its tokens.

    The product's spread grows with the length: on long sequences most are lost, whatever their quality (`geometric_mask` has no
    such bias). Source: Liu et al. 2025, "When Speed Kills Stability"; bounds of verl's `seq_sum_k1` and SkyRL's product mask.
    """
    check_bounds("sequence_mask", low=low, high=high)
    return _keep_between(inputs.log_ratio_at("sequence"), low, high)


@STAGES.register("geometric_mask", token_separable=False)
def geometric_mask(inputs: StageInputs, *, low: float = 0.99, high: float = 1.01) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where low <= exp(mean of log w over the sequence) <= high, else 0, for all of its tokens; fair to every length.

    Source: Liu & Li 2025, "When Speed Kills Stability" part 3 (geometric rejection); 0.99 and 1.01 as in SkyRL (verl's presets:
    0.999 and 1.001). The mean of log w is minus an estimate of KL(engine || policy) per token: the bounds say how stale is too
    stale, and a run whose policy moves 1% per token and version loses almost everything.
    """
    check_bounds("geometric_mask", low=low, high=high)
    return _keep_between(inputs.log_ratio_at("geometric"), low, high)


@STAGES.register("outlier_mask")
def outlier_mask(
    inputs: StageInputs, *, low: float = 1e-4, high: float = 100.0, level: str = "sequence"
) -> tuple[torch.Tensor, torch.Tensor]:
    """0 where any token of the sequence has w outside [low, high] (`level: token`: where the token has), else 1.

    One token that the policy would hardly ever sample says that what follows it comes from another world: a veto. Source: Liu et
    al. 2025, "When Speed Kills Stability" (token veto, 1e-4); both bounds as in SkyRL. Meant for accidents, not for staleness.
    """
    check_bounds("outlier_mask", low=low, high=high)
    kept_T, is_out_T = _keep_between(inputs.log_ratio_at("token"), low, high)
    if level == "token":
        return kept_T, is_out_T
    if level != "sequence":
        raise ConfigError(f"`level` of the off-policy stage outlier_mask must be token or sequence; got {level!r}.")
    vetoed_T = inputs.any_in_sequence(is_out_T)
    return (~vetoed_T).to(kept_T.dtype), vetoed_T


@STAGES.register("divergence_mask")
def divergence_mask(
    inputs: StageInputs, *, estimator: str = "k3", level: str = "mean", limit: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor]:
    """0 where an estimate of KL(engine || policy) exceeds `limit`, else 1: a trust region that holds for whole sequences.

    Per token k2 = (log w)^2 / 2 or k3 = w - 1 - log w, neither ever negative. `level`: `token` judges each by its own; `sum`,
    `mean` and `max` judge a sequence by all of its tokens. (Bounds of k1 = -log w are those of a ratio: token_mask,
    sequence_mask and geometric_mask.) Source: Trust Region Masking, arXiv:2512.23075 (`max`); estimators Schulman 2020; the limit
    is that of verl's preset for the mean of k3.
    """
    check_bounds("divergence_mask", high=limit, high_name="limit")
    log_ratio_T = inputs.log_ratio_T.double()
    if estimator == "k2":
        divergence_T = log_ratio_T.square() / 2
    elif estimator == "k3":
        divergence_T = log_ratio_T.expm1() - log_ratio_T
    else:
        raise ConfigError(f"`estimator` of the off-policy stage divergence_mask must be k2 or k3; got {estimator!r}.")
    if level == "token":
        is_out_T = divergence_T > limit
    elif level == "max":
        is_out_T = inputs.any_in_sequence(divergence_T > limit)
    elif level == "sum":
        is_out_T = inputs.whole_sequences.spread(inputs.whole_sequences.sum(divergence_T)) > limit
    elif level == "mean":
        is_out_T = inputs.whole_sequences.spread(inputs.whole_sequences.mean(divergence_T, inputs.loss_mask)) > limit
    else:
        raise ConfigError(f"`level` of the off-policy stage divergence_mask must be token, sum, mean or max; got {level!r}.")
    return (~is_out_T).to(inputs.log_ratio_T.dtype), is_out_T


def _keep_between(log_ratio_T: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    ratio_T = log_ratio_T.exp()
    is_out_T = (ratio_T < low) | (ratio_T > high)
    return (~is_out_T).to(log_ratio_T.dtype), is_out_T
