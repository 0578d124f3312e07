"""The contract of `policy_loss_sums`.

Shape letters: T packed tokens of one micro-batch, K a loss's statistics, S sequences.

A loss and its statistics are sums over tokens with weights that are known beforehand. So one pass can read a token's five
numbers, write the derivative of the loss by its logprob, and keep nothing else: 21 bytes a token, where torch's operators write
every step in between to memory and read it again in the backward pass. The gradient is thus computed in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from skyrl_mega_kernels.backends import Operator
from skyrl_mega_kernels.policy_loss import reference
from skyrl_mega_kernels.policy_loss.table import LOSSES

OPERATOR = Operator("policy_loss", ("cpu", "triton", "reference"))


class PolicyLossTokens(NamedTuple):
    """float32 [T] each, loss_mask and marked bool. `denominators`: logprobs of the policy that the ratio is to. cu_seqlens
    int64 [S + 1], from 0 to T, for losses over whole sequences; `marked` for those with marks."""

    logprobs: torch.Tensor
    denominators: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    marked: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None


Definition = Callable[[], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]


def policy_loss_sums(
    name: str,
    definition: Definition,
    tokens: PolicyLossTokens,
    weights_T: torch.Tensor,
    loss_weights_T: torch.Tensor,
    options: Mapping[str, float],
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(sum of loss x loss_weights, {statistic: sum of it x weights}): scalars; the first has a gradient by logprobs, once.

    `name` is one of `LOSSES`, with every option of its signature in `options`; their ranges are not checked here. `definition`
    gives the same loss and statistics per token, as torch computes them: what the reference backend sums up, with tokens and
    options bound by the caller. Masked tokens may hold anything, and have no part in sums nor gradient. The other backends sum
    in float32 over blocks and in float64 over these, in an order that doesn't depend on threads.

    Raises ValueError for a loss without kernels or tensors that don't fit; BackendUnavailableError for a backend (auto,
    reference, cpu, triton) that can't run here.
    """
    if name not in LOSSES:
        raise ValueError(f"policy loss {name!r} has no kernel; those of {', '.join(LOSSES)} have.")
    signature = LOSSES[name]
    module = OPERATOR.select(tokens.logprobs.device, tokens.logprobs.dtype, backend)
    if module is reference:
        per_token_T, stats_T = definition()
        return reference.weighted_sums(per_token_T, stats_T, weights_T, loss_weights_T)
    if (signature.marked and tokens.marked is None) or (signature.whole_sequences and tokens.cu_seqlens is None):
        raise ValueError(f"policy loss {name!r} needs {'marked' if signature.marked else 'cu_seqlens'}; pass it.")
    values = [float(options[option]) for option in signature.options]
    loss, stats = _PolicyLossSums.apply(tokens.logprobs, module, name, tokens, weights_T, loss_weights_T, values)
    return loss, dict(zip(signature.stats, stats.unbind(), strict=True))


class _PolicyLossSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, module, name, tokens, weights_T, loss_weights_T, options):
        same_weights = loss_weights_T is weights_T
        weights_T = flat(weights_T, logprobs.dtype)
        loss_weights_T = weights_T if same_weights else flat(loss_weights_T, logprobs.dtype)
        of_tokens = (flat(tensor, logprobs.dtype) for tensor in (logprobs, tokens.denominators, tokens.advantages))
        marked_T = tokens.marked
        cu_seqlens = tokens.cu_seqlens if LOSSES[name].whole_sequences else None
        sums, gradient_T = module.sums_and_gradient(
            *(name, *of_tokens, tokens.loss_mask.contiguous(), weights_T, loss_weights_T),
            None if marked_T is None else marked_T.contiguous(),
            None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(),
            options,
        )
        ctx.save_for_backward(gradient_T)
        sums = sums.to(logprobs.dtype)
        loss, stats = sums[0], sums[1:]
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        (gradient_T,) = ctx.saved_tensors
        # A plain loss.backward(), as in training, needs no pass over the gradient.
        if grad_loss.device.type == "cpu" and float(grad_loss) == 1.0:
            return gradient_T, *[None] * 6
        return gradient_T * grad_loss, *[None] * 6


def flat(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As kernels take it: detached, contiguous, of their dtype."""
    return tensor.detach().to(dtype).contiguous()
