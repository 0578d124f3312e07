"""The contract of `linear_policy_loss`: LM head and loss in one pass over chunks of tokens.

`linear_logprobs` must compute the logits twice, because the loss's gradient is known only after all of its forward pass: four
matmuls. A loss that is a sum over tokens, whose weights are known beforehand, needs only its own chunk: its ordinary function
runs on a leaf [C] of logprobs, its ordinary autograd gives the gradient there, and the chunk's logits, still in memory, become
the gradient of the logits in place: three matmuls, and no second copy of any loss formula.

The backends are those of `linear_logprobs` (its `chunk_statistics` and `chunk_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from skyrl_mega_kernels.backends import Operator
from skyrl_mega_kernels.linear_logprobs.api import check_head, checked_softcap
from skyrl_mega_kernels.linear_logprobs.ops import (
    Rows,
    counting_rows,
    fold_coefficients,
    gather_sequence,
    reduce_grad_hidden,
    softmax_dtype,
    weight_grad_buffer,
)
from skyrl_mega_kernels.linear_logprobs.reference import row_chunks
from skyrl_mega_kernels.vocab_parallel import VocabShard, check_labels, empty_statistics, merge

OPERATOR = Operator("linear_policy_loss", ("cpu", "triton", "reference"), package="linear_logprobs")

#: (index int64 [C] of the chunk's tokens in the pack, logprobs [C], entropy [C] or None) -> (scalar loss, whatever to collect).
ChunkLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, Any]]


class LinearPolicyLossOutput(NamedTuple):
    """`loss`: scalar, the sum of the chunks' losses; `collected`: what `loss_fn` returned beside each, in chunk order."""

    loss: torch.Tensor
    collected: list[Any]


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_fn: ChunkLoss,
    *,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    loss_mask: torch.Tensor | None = None,
    floor: torch.Tensor | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    return_entropy: bool = False,
    chunk_tokens: int = 1024,
    backend: str = "auto",
    logit_softcap: float | None = None,
) -> LinearPolicyLossOutput:
    """The sum of `loss_fn` over chunks of at most `chunk_tokens` tokens that count, differentiable in hidden, weight and bias.

    `loss_fn(index, logprobs, entropy)` gets the chunk's positions in the pack (int64 [C], ascending), its logprobs and (with
    `return_entropy`) entropies, float32 [C] leaves that want a gradient, and returns a scalar and anything to collect. The sum
    must not depend on where chunks end: every token's loss may look at that token only, and its weight must be known
    beforehand. A loss with a ratio of the whole sequence (GSPO) needs `linear_logprobs`. Without any token it is called once,
    with empty tensors. The other arguments are those of `linear_logprobs`; all ranks of `tp_group` call, and their `loss_fn`
    must agree.

    The gradients are computed in the forward pass (none under torch.no_grad()). Where the weight carries Megatron's
    `main_grad`, its gradient is added there at once: run backward on the returned loss itself, unscaled, exactly once;
    otherwise RuntimeError. Extra memory: logits of one chunk in float32, a float32 gradient of weight where there is no
    main_grad, and the gradient of hidden.

    Raises ValueError and BackendUnavailableError as `linear_logprobs` does. Compare arXiv:2410.10989, section 3.2.
    """
    shard = check_head(
        hidden, weight, labels, loss_mask, bias, floor, temperature, vocab_start, vocab_size, tp_group, sequence_parallel
    )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens ({chunk_tokens}) must be at least 1.")
    softcap = checked_softcap(logit_softcap)
    head = _Head(shard, float(temperature), sequence_parallel, return_entropy, chunk_tokens, backend, softcap)
    collected: list[Any] = []
    with_grad = torch.is_grad_enabled()
    loss = _LinearPolicyLoss.apply(hidden, weight, bias, labels, loss_mask, floor, head, loss_fn, with_grad, collected)
    return LinearPolicyLossOutput(loss, collected)


class _Head(NamedTuple):
    """The settings of one call."""

    shard: VocabShard
    temperature: float
    sequence_parallel: bool
    return_entropy: bool
    chunk_tokens: int
    backend: str
    logit_softcap: float


class _Gradients(NamedTuple):
    """Where one call's gradients are summed; None: not wanted. `is_main` says that weight is Megatron's main_grad."""

    hidden_NH: torch.Tensor | None
    weight_VH: torch.Tensor | None
    bias_V: torch.Tensor | None
    is_main: bool


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, loss_mask, floor, head, loss_fn, with_grad, collected):
        shard, num_tokens = head.shard, labels.shape[0]
        rows = counting_rows(gather_sequence(hidden, shard, num_tokens, head.sequence_parallel), labels, loss_mask, floor)
        check_labels(rows.labels, shard.vocab_size)
        wanted = ctx.needs_input_grad[:3] if with_grad else (False, False, False)
        grads = _gradient_buffers(rows, weight, bias, wanted)
        loss = _run_chunks(rows, weight, bias, head, loss_fn, grads if any(wanted) else None, collected)

        grad_hidden = None
        if grads.hidden_NH is not None:
            grad_hidden = reduce_grad_hidden(grads.hidden_NH, hidden, rows, shard, num_tokens, head.sequence_parallel)
        grad_weight = None if grads.is_main or grads.weight_VH is None else grads.weight_VH.to(weight.dtype)
        grad_bias = None if grads.bias_V is None or bias is None else grads.bias_V.to(bias.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.is_main = grads.is_main
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        scale = float(grad_loss)
        if ctx.is_main and scale != 1.0:
            raise RuntimeError(
                f"the loss of linear_policy_loss was scaled by {scale} after its gradients had been added to the weight's "
                "main_grad; scale inside loss_fn, or use linear_logprobs."
            )
        scaled = [None if grad is None else grad if scale == 1.0 else grad * scale for grad in ctx.saved_tensors]
        return (*scaled, *[None] * 7)


def _gradient_buffers(rows: Rows, weight, bias, wanted: tuple[bool, bool, bool]) -> _Gradients:
    dtype = softmax_dtype(weight.dtype)
    needs_hidden, needs_weight, needs_bias = wanted
    weight_VH, is_main = weight_grad_buffer(weight) if needs_weight else (None, False)
    if needs_weight and not is_main:
        weight_VH = weight.new_zeros(weight.shape, dtype=dtype)
    return _Gradients(
        rows.hidden.new_zeros(rows.hidden.shape, dtype=dtype) if needs_hidden else None,
        weight_VH,
        bias.new_zeros(bias.shape, dtype=dtype) if needs_bias else None,
        is_main,
    )


def _run_chunks(
    rows: Rows, weight, bias, head: _Head, loss_fn: ChunkLoss, grads: _Gradients | None, collected: list[Any]
) -> torch.Tensor:
    """The summed loss; fills `grads` and `collected`."""
    shard, num_rows = head.shard, rows.labels.shape[0]
    index_N = torch.arange(num_rows, device=rows.labels.device) if rows.index is None else rows.index
    dtype = softmax_dtype(weight.dtype)
    num_valid = shard.num_valid(weight.shape[0])
    weight_UH, bias_U = weight[:num_valid], None if bias is None else bias[:num_valid]
    module = OPERATOR.select(weight.device, weight.dtype, head.backend)
    workspace = None
    if num_rows and num_valid:
        size = module.workspace_size(min(num_rows, head.chunk_tokens), num_valid, weight.dtype)
        workspace = weight.new_empty(size, dtype=dtype)

    loss = weight.new_zeros((), dtype=dtype)
    for chunk in row_chunks(num_rows, head.chunk_tokens) or [slice(0, 0)]:
        hidden_CH, floor_C = rows.hidden[chunk], None if rows.floor is None else rows.floor[chunk]
        columns_C = shard.local_columns(rows.labels[chunk], num_valid)
        if workspace is None:
            packed_4C = empty_statistics(hidden_CH, hidden_CH.shape[0])
        else:
            packed_4C = module.chunk_statistics(
                *(hidden_CH, weight_UH, bias_U, columns_C, floor_C, workspace),
                temperature=head.temperature,
                with_entropy=head.return_entropy,
                softcap=head.logit_softcap,
            )
        merged = merge(packed_4C, None, None, shard, with_entropy=head.return_entropy)
        chunk_loss, kept, coefficients_3C = _chunk_loss(loss_fn, index_N[chunk], merged.logprobs, merged.entropy)
        loss += chunk_loss
        collected.append(kept)
        if grads is not None and workspace is not None:
            module.chunk_gradients(
                *(hidden_CH, weight_UH, columns_C, floor_C, merged.lse, coefficients_3C, workspace),
                temperature=head.temperature,
                grad_hidden_CH=None if grads.hidden_NH is None else grads.hidden_NH[chunk],
                grad_weight_UH=None if grads.weight_VH is None else grads.weight_VH[:num_valid],
                grad_bias_U=None if grads.bias_V is None else grads.bias_V[:num_valid],
                softcap=head.logit_softcap,
            )
    return loss


def _chunk_loss(
    loss_fn: ChunkLoss, index_C: torch.Tensor, logprobs_C: torch.Tensor, entropy_C: torch.Tensor | None
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """(loss, collected, coefficients_3C) of one chunk, by the loss function's own autograd."""
    leaves = [leaf.detach().requires_grad_() for leaf in (logprobs_C, entropy_C) if leaf is not None]
    with torch.enable_grad():
        loss, kept = loss_fn(index_C, leaves[0], leaves[1] if entropy_C is not None else None)
    if loss.dim() != 0:
        raise ValueError(f"loss_fn must return a scalar loss; got shape {tuple(loss.shape)}: sum over the chunk's tokens.")
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    else:  # a loss that is constant here, of a chunk of zero advantages say
        grads = [torch.zeros_like(leaf) for leaf in leaves]
    return loss.detach(), kept, fold_coefficients(grads[0], None, grads[1] if entropy_C is not None else None, entropy_C)
