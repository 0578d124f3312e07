"""Do the names and options of an algorithm exist? Asked before anything expensive is started."""

from __future__ import annotations

import torch

from skyrl_mega.algorithms.advantages import AdvantageInputs, estimator
from skyrl_mega.algorithms.loss import Objective
from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES, LossInputs
from skyrl_mega.algorithms.policy_losses.inputs import MarkInputs
from skyrl_mega.algorithms.policy_losses.marks import bind_marks
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega.config.schema import AlgorithmConfig


def check_algorithm(config: AlgorithmConfig) -> None:
    """Raises ConfigError for an unknown estimator, loss, stage or option, an option out of range, or a file of one's own that
    can't be imported.

    Built-in estimators and losses check the values of their options before anything else: they are tried on next to nothing.
    """
    advantages = estimator(config)
    if ":" not in config.advantage:
        advantages(_no_samples())
    Objective(config)
    _try_policy_loss(config)


def _no_samples() -> AdvantageInputs:
    none, nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    return AdvantageInputs(
        group_index_N=none,
        cu_seqlens=torch.zeros(1, dtype=torch.int64),
        loss_mask=none.bool(),
        token_rewards_T=nothing,
        turn_index_T=none,
        truncated_N=none.bool(),
        rollout_logprobs_T=nothing,
        values_T=nothing,
        last_values_N=nothing,
        old_logprobs_T=nothing,
        ref_logprobs_T=nothing,
        teacher_logprobs_T=nothing,
        baseline_rewards_N=nothing,
        state_T=none,
    )


def _try_policy_loss(config: AlgorithmConfig) -> None:
    """Calls a loss of ours on two tokens: the ranges of options are its own knowledge."""
    entry = POLICY_LOSSES.find(config.policy_loss)
    if ":" in config.policy_loss or entry.traits["needs"]:
        return
    zeros = torch.zeros(2)
    mark = bind_marks(config)
    marked = mark(MarkInputs(zeros.double(), zeros.double())) if mark is not None else None
    inputs = LossInputs(
        logprobs=zeros,
        old_logprobs=zeros,
        rollout_logprobs=zeros,
        advantages=zeros,
        loss_mask=torch.ones(2, dtype=torch.bool),
        sequences=Sequences.packed(torch.tensor([0, 2])),
        marked=marked,
    )
    entry.bind(config.loss_options, "algorithm.loss_options")(inputs)
