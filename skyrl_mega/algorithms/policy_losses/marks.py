"""Marks some tokens of an update before it is packed, for losses that pick tokens by looking at the whole update."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence

import torch

from skyrl_mega.algorithms.policy_losses.inputs import POLICY_LOSSES, MarkInputs
from skyrl_mega.config.schema import AlgorithmConfig
from skyrl_mega.types import TrainSample


def bind_marks(config: AlgorithmConfig) -> Callable[[MarkInputs], torch.Tensor] | None:
    """The `marks` of the policy loss with its options, or None. Raises ConfigError for options that the loss does not have."""
    entry = POLICY_LOSSES.find(config.policy_loss)
    mark = entry.traits["marks"]
    if mark is None:
        return None
    entry.bind(config.loss_options, "algorithm.loss_options")
    defaults = {name: parameter.default for name, parameter in inspect.signature(entry.function).parameters.items()}
    wanted = [p.name for p in inspect.signature(mark).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return functools.partial(mark, **{name: config.loss_options.get(name, defaults[name]) for name in wanted})


def mark_tokens(samples: Sequence[TrainSample], config: AlgorithmConfig) -> None:
    """Fills `sample.marked` (float32 [L], 1 or 0) where the policy loss has `marks`; nothing else is changed.

    `samples` are all samples of one update, with advantages; every rank computes the same. Raises ConfigError for options out
    of range.
    """
    mark = bind_marks(config)
    if mark is None or not samples:
        return
    mask_T = torch.cat([sample.loss_mask for sample in samples])
    advantages = [sample.advantages for sample in samples if sample.advantages is not None]  # all: the packer insists
    inputs = MarkInputs(
        logprobs_N=torch.cat([sample.rollout_logprobs for sample in samples])[mask_T].double(),
        advantages_N=torch.cat(advantages)[mask_T].double(),
    )
    marked_T = torch.zeros(mask_T.shape)
    if mask_T.any():
        marked_T[mask_T] = mark(inputs).float()
    for sample, marked in zip(samples, marked_T.split([sample.num_tokens for sample in samples]), strict=True):
        sample.marked = marked.clone()
