"""The Triton backend of the loss terms: one program per block of tokens."""

from __future__ import annotations

import torch

from skyrl_mega_kernels.loss_terms.table import ESTIMATORS, SUMS
from skyrl_mega_kernels.policy_loss.triton import BLOCK, NUM_WARPS, unavailable

__all__ = ["BLOCK", "COMPILED", "NUM_WARPS", "sums_and_gradients", "unavailable"]

#: (estimator or "", whether there is an entropy): the kernels that are compiled.
COMPILED = [(estimator, has_entropy) for estimator in ("", *ESTIMATORS) for has_entropy in (False, True)]


def sums_and_gradients(
    trainer_logprobs_T: torch.Tensor,
    rollout_logprobs_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    weights_T: torch.Tensor,
    estimator: str,
    logprobs_T: torch.Tensor | None,
    ref_logprobs_T: torch.Tensor | None,
    entropy_T: torch.Tensor | None,
    kl_coef: float,
    entropy_coef: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float64 [7]: SUMS and the largest distance; float32 [T]: gradients by logprobs and entropy, empty where there is none)."""
    from skyrl_mega_kernels.loss_terms import triton_kernels
    from skyrl_mega_kernels.triton_jit import launch

    num_tokens = trainer_logprobs_T.numel()
    programs = -(-num_tokens // BLOCK)
    nothing = trainer_logprobs_T.new_empty(0)
    logprobs_gradient_T = torch.empty_like(trainer_logprobs_T) if estimator else nothing
    entropy_gradient_T = nothing if entropy_T is None else torch.empty_like(trainer_logprobs_T)
    sums_PS = trainer_logprobs_T.new_empty(programs, triton_kernels.NUM_SUMS.value)
    if programs:
        unused = weights_T  # in the place of what this kernel neither reads nor writes
        launch(
            triton_kernels.loss_terms,
            (programs,),
            trainer_logprobs_T.device,
            *(trainer_logprobs_T, rollout_logprobs_T, loss_mask_T.view(torch.uint8), weights_T),
            *(unused if tensor is None else tensor for tensor in (logprobs_T, ref_logprobs_T, entropy_T)),
            logprobs_gradient_T if estimator else unused,
            unused if entropy_T is None else entropy_gradient_T,
            *(sums_PS, num_tokens, kl_coef, entropy_coef),
            **dict(num_warps=NUM_WARPS, num_stages=1, KL=estimator, HAS_ENTROPY=entropy_T is not None, BLOCK=BLOCK),
        )
    # amax keeps a NaN; so does the kernel's own maximum.
    largest = sums_PS[:, len(SUMS)].amax() if programs else sums_PS.new_zeros(())
    sums = torch.cat([sums_PS[:, : len(SUMS)].double().sum(0), largest.double().reshape(1)])
    return sums, logprobs_gradient_T, entropy_gradient_T
