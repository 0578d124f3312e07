"""A configuration's policy loss as weighted sums over tokens: by the fused kernels where they have it, else as it is defined.

Shape letters: T packed tokens of one micro-batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from skyrl_mega.algorithms.policy_losses.inputs import LossInputs, PolicyLoss
from skyrl_mega.algorithms.registry import Entry
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega_kernels.policy_loss import LOSSES, PolicyLossTokens, policy_loss_sums
from skyrl_mega_kernels.policy_loss.reference import weighted_sums


class PolicyLossSums:
    """The loss of `entry` with `options`; `kernels` as the setting `model.kernels`.

    Kernels exist for built-in losses, and for whole sequences only where no other rank shares them. A function of the user's own,
    and what kernels don't have, is computed by torch, whatever `kernels` says. Raises ConfigError for options that the loss does
    not have or, with kernels, that are out of range.
    """

    def __init__(self, entry: Entry[PolicyLoss], options: Mapping[str, Any], kernels: str = "auto") -> None:
        self._definition = entry.bind(options, "algorithm.loss_options")
        self._name, self._kernels = entry.name, kernels
        self._signature = LOSSES.get(entry.name)
        if self._signature is not None:
            self._definition(_no_tokens())  # the ranges of options are its own knowledge
            defaults = {name: parameter.default for name, parameter in inspect.signature(entry.function).parameters.items()}
            self._options = {name: options.get(name, defaults[name]) for name in self._signature.options}

    def __call__(
        self, inputs: LossInputs, weights_T: torch.Tensor, loss_weights_T: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(sum of loss x loss_weights, with its gradient; {statistic: sum of it x weights}): scalars."""
        tokens = self._tokens(inputs)
        if tokens is None:
            per_token_T, stats = self._definition(inputs)
            return weighted_sums(per_token_T, stats, weights_T, loss_weights_T)
        define = functools.partial(self._definition, inputs)
        return policy_loss_sums(self._name, define, tokens, weights_T, loss_weights_T, self._options, backend=self._kernels)

    def _tokens(self, inputs: LossInputs) -> PolicyLossTokens | None:
        """What a kernel looks at; None where none has this loss of these tokens, or the definition is to say what is missing."""
        signature, cu_seqlens = self._signature, None
        if signature is None or (signature.marked and inputs.marked is None):
            return None
        if signature.whole_sequences:
            cu_seqlens = None if inputs.sequences is None else inputs.sequences.cu_seqlens
            if cu_seqlens is None:
                return None
        denominators_T = getattr(inputs, signature.denominators)
        marked_T = inputs.marked if signature.marked else None
        return PolicyLossTokens(inputs.logprobs, denominators_T, inputs.advantages, inputs.loss_mask, marked_T, cu_seqlens)


def _no_tokens() -> LossInputs:
    nothing = torch.zeros(0)
    return LossInputs(
        logprobs=nothing,
        old_logprobs=nothing,
        rollout_logprobs=nothing,
        advantages=nothing,
        loss_mask=nothing.bool(),
        sequences=Sequences.packed(torch.zeros(1, dtype=torch.int64)),
    )
