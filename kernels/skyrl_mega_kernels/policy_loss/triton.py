"""The Triton backend of the policy losses: one program per block of tokens, or per sequence."""

from __future__ import annotations

import torch

from skyrl_mega_kernels import triton_targets
from skyrl_mega_kernels.policy_loss.table import LOSSES

BLOCK = 1024
NUM_WARPS = 8
#: Losses that are another's by another name.
_SAME = {"gpg": "reinforce"}
#: The formulas that are compiled, by whether they look at whole sequences.
COMPILED = {
    whole: [name for name, signature in LOSSES.items() if signature.whole_sequences == whole and name not in _SAME]
    for whole in (False, True)
}


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend can't run for tensors of this device and dtype; None where it can."""
    return triton_targets.unavailable(device, dtype, (torch.float32,))


def sums_and_gradient(
    name: str,
    logprobs_T: torch.Tensor,
    denominators_T: torch.Tensor,
    advantages_T: torch.Tensor,
    loss_mask_T: torch.Tensor,
    weights_T: torch.Tensor,
    loss_weights_T: torch.Tensor,
    marked_T: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    options: list[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(float64 [1 + K]: sums of the loss and its K statistics; float32 [T]: the gradient of the loss's sum)."""
    from skyrl_mega_kernels.policy_loss import triton_kernels
    from skyrl_mega_kernels.triton_jit import launch

    num_tokens, signature = logprobs_T.numel(), LOSSES[name]
    gradient_T = torch.empty_like(logprobs_T)
    mask_T = loss_mask_T.view(torch.uint8)
    tokens = (logprobs_T, denominators_T, advantages_T, mask_T, weights_T, loss_weights_T)
    programs = -(-num_tokens // BLOCK) if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sums_PS = logprobs_T.new_empty(programs, triton_kernels.NUM_SUMS.value)
    settings = dict(num_warps=NUM_WARPS, num_stages=1, LOSS=_SAME.get(name, name), BLOCK=BLOCK)
    if programs and num_tokens and cu_seqlens is not None:
        kernel = triton_kernels.sequence_policy_loss
        launch(kernel, (programs,), logprobs_T.device, *tokens, cu_seqlens, gradient_T, sums_PS, *options, **settings)
    elif programs and num_tokens:
        kernel = triton_kernels.token_policy_loss
        marks_T = mask_T if marked_T is None else marked_T.view(torch.uint8)
        values = (*options, *[0.0] * (3 - len(options)))
        launch(kernel, (programs,), logprobs_T.device, *tokens, marks_T, gradient_T, sums_PS, num_tokens, *values, **settings)
    else:
        sums_PS.zero_()
    return sums_PS.double().sum(0)[: 1 + len(signature.stats)], gradient_T
