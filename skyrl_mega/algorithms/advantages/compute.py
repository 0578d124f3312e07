"""From the samples of a step to their advantages and returns, by the estimator that `algorithm.advantage` names.

Shape letters: N samples, L tokens of one sample, T tokens of all samples end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from skyrl_mega.algorithms.advantages.inputs import ADVANTAGES, AdvantageInputs, Advantages
from skyrl_mega.algorithms.advantages.whitening import whitened
from skyrl_mega.algorithms.kl import KL_ESTIMATORS
from skyrl_mega.algorithms.registry import lookup
from skyrl_mega.config.schema import AlgorithmConfig
from skyrl_mega.errors import DataError, NumericsError
from skyrl_mega.types import Metrics, TrainSample


def needs(config: AlgorithmConfig) -> frozenset[str]:
    """What must be known of the samples before their advantages: values, old_logprobs, ref_logprobs, teacher_logprobs, greedy,
    components, states. Raises ConfigError for an unknown estimator."""
    wanted: frozenset[str] = ADVANTAGES.find(config.advantage).traits["needs"]
    return wanted | {"old_logprobs", "ref_logprobs"} if kl_is_in_reward(config) else wanted


def kl_is_in_reward(config: AlgorithmConfig) -> bool:
    """Whether the distance to the reference is taken from each token's reward."""
    return config.kl.coef != 0 and config.kl.place == "reward"


def estimator(config: AlgorithmConfig) -> Callable[[AdvantageInputs], Advantages]:
    """The estimator with its options. Raises ConfigError for an unknown one, or options that it does not have."""
    return ADVANTAGES.find(config.advantage).bind(config.advantage_options, "algorithm.advantage_options")


def compute_advantages(samples: Sequence[TrainSample], config: AlgorithmConfig, *, kl_coef: float | None = None) -> Metrics:
    """Fills `sample.advantages` (float32 [L], 0 where loss_mask is False) and, where the estimator has them, `sample.returns`.

    `samples` must be all samples of the step, with whole groups: statistics come from those that are passed. What `needs` says
    must be in them. `kl_coef` replaces `kl.coef` (an adaptive coefficient). Returns numbers to report. Every rank computes the
    same.
    Raises NumericsError for a reward that is not finite, DataError for something that is needed and missing.
    """
    if not samples:
        return {}
    inputs = _inputs(samples, config)
    metrics: Metrics = {}
    if kl_is_in_reward(config):
        inputs, metrics = _with_kl(inputs, config, config.kl.coef if kl_coef is None else kl_coef)
    result = estimator(config)(inputs)
    advantages_T = torch.where(inputs.loss_mask, result.advantages_T, 0.0)
    if config.normalize_advantages:
        advantages_T = whitened(advantages_T, inputs.loss_mask)
    lengths = [sample.num_tokens for sample in samples]
    for sample, advantages in zip(samples, advantages_T.float().split(lengths), strict=True):
        sample.advantages = advantages.clone()
    if result.returns_T is not None:
        for sample, returns in zip(samples, result.returns_T.float().split(lengths), strict=True):
            sample.returns = torch.where(sample.loss_mask, returns, 0.0)
    trained = advantages_T[inputs.loss_mask]
    return metrics | {"advantages/mean": float(trained.mean()), "advantages/std": float(trained.std(correction=0))}


def _inputs(samples: Sequence[TrainSample], config: AlgorithmConfig) -> AdvantageInputs:
    _require_finite(samples)
    wanted = needs(config)

    def joined(name: str) -> torch.Tensor | None:
        if name not in wanted:
            return None
        return torch.cat([_of(sample, name).double() for sample in samples])

    lengths = torch.tensor([sample.num_tokens for sample in samples])
    values_T = last_values_N = baselines_N = None
    if "values" in wanted:
        values_T = torch.cat([_of(sample, "values")[:-1].double() for sample in samples])
        last_values_N = torch.stack([_of(sample, "values")[-1].double() for sample in samples])
    if "greedy" in wanted:
        baselines_N = torch.tensor([float(_of(sample, "baseline_reward")) for sample in samples], dtype=torch.float64)
    return AdvantageInputs(
        group_index_N=torch.tensor([sample.group_index for sample in samples]),
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        loss_mask=torch.cat([sample.loss_mask for sample in samples]),
        token_rewards_T=torch.cat([_token_rewards(sample) for sample in samples]),
        turn_index_T=torch.cat([_turn_index(sample) for sample in samples]),
        truncated_N=torch.tensor([sample.truncated for sample in samples]),
        rollout_logprobs_T=torch.cat([sample.rollout_logprobs.double() for sample in samples]),
        values_T=values_T,
        last_values_N=last_values_N,
        old_logprobs_T=joined("old_logprobs"),
        ref_logprobs_T=joined("ref_logprobs"),
        teacher_logprobs_T=joined("teacher_logprobs"),
        baseline_rewards_N=baselines_N,
        state_T=_states(samples) if "states" in wanted else None,
        reward_components=_components(samples),
    )


def _of(sample: TrainSample, name: str) -> torch.Tensor:
    value = getattr(sample, name)
    if value is None:
        raise DataError(f"sample {sample.sample_index} of group {sample.group_id!r} has no {name}, which its advantages need.")
    return value


def _components(samples: Sequence[TrainSample]) -> dict[str, torch.Tensor]:
    """float64 [N] by name. Raises DataError where samples differ in what their rewards are mixed from."""
    first = samples[0]
    for sample in samples:
        if sample.reward_components.keys() != first.reward_components.keys():
            raise DataError(
                f"sample {sample.sample_index} of group {sample.group_id!r} has the reward components "
                f"{sorted(sample.reward_components)}, and sample {first.sample_index} of group {first.group_id!r} has "
                f"{sorted(first.reward_components)}; a step's samples must have the same."
            )
    return {
        name: torch.tensor([sample.reward_components[name] for sample in samples], dtype=torch.float64)
        for name in first.reward_components
    }


def _token_rewards(sample: TrainSample) -> torch.Tensor:
    """float64 [L]: every turn's reward at its last token. What `sample.reward` has beyond the turns' sum is the last turn's."""
    rewards_L = torch.zeros(sample.num_tokens, dtype=torch.float64)
    ends = [end for _, end, _ in sample.turns]
    for end, (_, _, reward) in zip(ends, sample.turns, strict=True):
        rewards_L[end - 1] += reward
    last = ends[-1] - 1 if ends else int(sample.loss_mask.nonzero()[-1])
    rewards_L[last] += sample.reward - sum(reward for _, _, reward in sample.turns)
    return rewards_L


def _turn_index(sample: TrainSample) -> torch.Tensor:
    index_L = torch.full((sample.num_tokens,), -1)
    for number, (start, end, _) in enumerate(sample.turns):
        index_L[start:end] = number
    return index_L if sample.turns else torch.where(sample.loss_mask, 0, -1)


def _states(samples: Sequence[TrainSample]) -> torch.Tensor:
    """int64 [T]: see `AdvantageInputs.state_T`. A turn's observation is what stands between it and the turn before."""
    numbers: dict[bytes, int] = {}
    rows = []
    for sample in samples:
        states_L = torch.full((sample.num_tokens,), -1)
        begin = 0
        for start, end, _ in sample.turns or [(int(sample.loss_mask.nonzero()[0]), sample.num_tokens, 0.0)]:
            observation = sample.token_ids[begin:start].numpy().tobytes()
            states_L[start:end] = numbers.setdefault(observation, len(numbers))
            begin = end
        rows.append(states_L)
    return torch.cat(rows)


def _with_kl(inputs: AdvantageInputs, config: AlgorithmConfig, coef: float) -> tuple[AdvantageInputs, Metrics]:
    """Each token's reward less coef x KL(old || reference) at that token, as in RLHF (arXiv:2203.02155 equation 2)."""
    assert inputs.old_logprobs_T is not None  # `needs` asked for both
    assert inputs.ref_logprobs_T is not None
    kl_estimator = lookup(KL_ESTIMATORS, config.kl.estimator, "algorithm.kl.estimator")
    kl_T = kl_estimator(inputs.old_logprobs_T, inputs.ref_logprobs_T, inputs.loss_mask)
    mean_kl = float(kl_T[inputs.loss_mask].mean())
    return replace(inputs, token_rewards_T=inputs.token_rewards_T - coef * kl_T), {"reward/kl": mean_kl}


def _require_finite(samples: Sequence[TrainSample]) -> None:
    rewards_N = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    bad = (~rewards_N.isfinite()).nonzero().flatten().tolist()
    if bad:
        first = samples[bad[0]]
        raise NumericsError(
            f"rewards must be finite; {len(bad)} of {len(samples)} are not, the first is {first.reward} "
            f"(group {first.group_id!r}, sample {first.sample_index}). Check the environment's reward."
        )
