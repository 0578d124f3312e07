"""The contract of `loss_terms`.

Shape letters: T packed tokens of one micro-batch.

As in `policy_loss`, these are sums over tokens with weights known beforehand: one pass reads a token's numbers and writes the
gradients, where torch's operators write every step in between to memory. Without KL and entropy 13 bytes a token; 12 more with a
KL; 4 with the entropy, and 4 for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from skyrl_mega_kernels.backends import Operator
from skyrl_mega_kernels.loss_terms import reference
from skyrl_mega_kernels.loss_terms.table import ESTIMATORS, SUMS
from skyrl_mega_kernels.policy_loss.api import flat

OPERATOR = Operator("loss_terms", ("cpu", "triton", "reference"))


class LossTermTokens(NamedTuple):
    """float32 [T] each, loss_mask bool. `trainer_logprobs` and `rollout_logprobs` are compared with each other and have no
    gradient; logprobs (the policy's) and ref_logprobs go with a KL."""

    trainer_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    loss_mask: torch.Tensor
    logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


def loss_terms(
    definition: Callable[[], Mapping[str, torch.Tensor]],
    tokens: LossTermTokens,
    weights_T: torch.Tensor,
    *,
    kl: str | None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """(kl_coef x KL - entropy_coef x entropy, {name of `SUMS`: sum by weights}, the largest distance): scalars.

    The first has a gradient by logprobs and entropy, once; the others have none. `kl` is one of `ESTIMATORS`, or None: no KL.
    `distance` is |trainer - engine|, the `mismatch` sums estimate KL(engine || trainer). `definition` gives every sum but
    `weight` per token, as torch computes them: what the reference backend sums up. Masked tokens may hold anything, and have a
    part in nothing but `weight`, the sum of all weights. The other backends sum in float32 over blocks and in float64 over
    these, in an order that doesn't depend on threads.

    Raises ValueError for an estimator without kernels or tensors that don't fit; BackendUnavailableError for a backend (auto,
    reference, cpu, triton) that can't run here.
    """
    if kl is not None and kl not in ESTIMATORS:
        raise ValueError(f"the KL estimator {kl!r} has no kernel; those of {', '.join(ESTIMATORS)} have.")
    if kl is not None and (tokens.logprobs is None or tokens.ref_logprobs is None):
        raise ValueError(f"the KL estimator {kl!r} needs logprobs and ref_logprobs; pass them.")
    module = OPERATOR.select(tokens.trainer_logprobs.device, tokens.trainer_logprobs.dtype, backend)
    if module is reference:
        return reference.weighted_sums(definition(), weights_T, kl_coef, entropy_coef)
    logprobs = tokens.logprobs if kl is not None else None
    loss, sums = _LossTerms.apply(logprobs, tokens.entropy, module, tokens, weights_T, kl, kl_coef, entropy_coef)
    is_there = {"kl": kl is not None, "entropy": tokens.entropy is not None}
    *values, largest = sums.unbind()
    return loss, {name: value for name, value in zip(SUMS, values, strict=True) if is_there.get(name, True)}, largest


class _LossTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, entropy, module, tokens, weights_T, kl, kl_coef, entropy_coef):
        dtype = tokens.trainer_logprobs.dtype
        sums, logprobs_gradient_T, entropy_gradient_T = module.sums_and_gradients(
            *(flat(tokens.trainer_logprobs, dtype), flat(tokens.rollout_logprobs, dtype)),
            *(tokens.loss_mask.contiguous(), flat(weights_T, dtype), kl or ""),
            None if kl is None else flat(logprobs, dtype),
            None if kl is None else flat(tokens.ref_logprobs, dtype),
            None if entropy is None else flat(entropy, dtype),
            *(float(kl_coef), float(entropy_coef)),
        )
        ctx.save_for_backward(logprobs_gradient_T, entropy_gradient_T)
        ctx.has_kl, ctx.has_entropy = kl is not None, entropy is not None and entropy_coef != 0
        loss = (kl_coef * sums[0] - entropy_coef * sums[1]).to(dtype)
        sums = sums.to(dtype)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        gradients = ctx.saved_tensors
        # A plain loss.backward(), as in training, needs no pass over the gradients.
        if grad_loss.device.type != "cpu" or float(grad_loss) != 1.0:
            gradients = [gradient_T * grad_loss for gradient_T in gradients]
        there = (ctx.has_kl, ctx.has_entropy)
        return *(gradient_T if is_there else None for gradient_T, is_there in zip(gradients, there, strict=True)), *[None] * 6
