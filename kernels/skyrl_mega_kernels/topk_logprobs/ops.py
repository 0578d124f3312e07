"""`topk_logprobs` and `logprobs_at` as one torch custom op.

logprob at token j is z_j - lse, so with incoming gradients g_k at tokens j_k the gradient of the logits is

    d z = -(sum_k g_k) p + sum_k g_k onehot(j_k)

The dense part is the backward pass of `linear_logprobs` (a = -sum_k g_k, b = c = 0) and runs on its backends; the sparse part
touches K rows of the weight per position and is added here, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from skyrl_mega_kernels.backends import Operator
from skyrl_mega_kernels.linear_logprobs.ops import (
    Rows,
    counting_rows,
    linear_logprobs_backward_op,
    merged_statistics,
    scatter_rows,
    softmax_dtype,
    weight_grad_buffer,
)
from skyrl_mega_kernels.linear_logprobs.reference import cap_logits, cap_slope, row_chunks
from skyrl_mega_kernels.vocab_parallel import VocabShard, sum_over_ranks

OPERATOR = Operator("topk_logprobs", ("cpu", "triton", "reference"), package="linear_logprobs")

#: Gathered rows of the weight held at once, float32.
_GATHER_BYTES = 64 * 2**20


@torch.library.custom_op("skyrl_mega::topk_logprobs", mutates_args=())
def topk_logprobs_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor | None,
    k: int,
    loss_mask: torch.Tensor | None,
    temperature: float,
    vocab_start: int,
    vocab_size: int,
    tp_group: str,
    chunk_tokens: int,
    backend: str,
    logit_softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs [T, K], ids [T, K], lse [T]); the K likeliest tokens, or those given."""
    shard = VocabShard(vocab_start, vocab_size, tp_group)
    num_tokens = hidden.shape[0]
    rows = _rows(hidden, loss_mask)
    ids_NK = None if ids is None else (ids if rows.index is None else ids.index_select(0, rows.index))
    if ids_NK is not None and bool(((ids_NK < -1) | (ids_NK >= vocab_size)).any()):
        raise ValueError(f"ids must lie in [0, {vocab_size}), or be -1 for none, wherever loss_mask is True.")
    module = OPERATOR.select(hidden.device, hidden.dtype, backend)
    merged = merged_statistics(
        *(module, rows, weight, bias, shard, temperature),
        *(False, k if ids is None else 0, chunk_tokens, False, logit_softcap),
    )
    if ids_NK is None:
        logits_NK, ids_NK = merged.topk_logits, merged.topk_ids
    else:
        logits_NK = _logits_at(rows.hidden, weight, bias, ids_NK, shard, temperature, logit_softcap)
    return (
        scatter_rows(logits_NK - merged.lse.unsqueeze(1), rows.index, num_tokens),
        scatter_rows(ids_NK + 1, rows.index, num_tokens) - 1,
        scatter_rows(merged.lse, rows.index, num_tokens),
    )


@topk_logprobs_op.register_fake
def _(hidden, weight, bias, ids, k, loss_mask, *settings):
    lse = hidden.new_empty(hidden.shape[0], dtype=softmax_dtype(hidden.dtype))
    return lse.new_empty(hidden.shape[0], k), lse.new_empty(hidden.shape[0], k, dtype=torch.int64), lse


@torch.library.custom_op("skyrl_mega::topk_sparse_backward", mutates_args=("grad_weight", "grad_bias"))
def topk_sparse_backward_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    grad_logits: torch.Tensor,
    loss_mask: torch.Tensor | None,
    vocab_start: int,
    vocab_size: int,
    tp_group: str,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
) -> torch.Tensor:
    """The sparse part: the gradient of hidden, summed over ranks, in float32; adds to grad_weight and grad_bias (float32).

    grad_logits [T, K]: with respect to the untempered logits at `ids` [T, K].
    """
    shard = VocabShard(vocab_start, vocab_size, tp_group)
    rows = _rows(hidden, loss_mask)
    if rows.index is not None:
        ids, grad_logits = ids.index_select(0, rows.index), grad_logits.index_select(0, rows.index)
    columns_NK = shard.local_columns(ids, shard.num_valid(weight.shape[0]))
    grad_NK = torch.where(columns_NK >= 0, grad_logits, 0.0)
    columns_NK = columns_NK.clamp(min=0)
    grad_hidden_NH = grad_logits.new_zeros(rows.hidden.shape)
    for chunk, weight_CKH in _gathered(weight, columns_NK):
        grad_hidden_NH[chunk] = torch.einsum("ck,ckh->ch", grad_NK[chunk], weight_CKH)
        if grad_weight is not None:
            products_CKH = grad_NK[chunk].unsqueeze(2) * rows.hidden[chunk].to(grad_NK.dtype).unsqueeze(1)
            grad_weight.index_add_(0, columns_NK[chunk].flatten(), products_CKH.flatten(0, 1).to(grad_weight.dtype))
    if grad_bias is not None:
        grad_bias.index_add_(0, columns_NK.flatten(), grad_NK.flatten().to(grad_bias.dtype))
    return scatter_rows(sum_over_ranks(grad_hidden_NH, shard), rows.index, hidden.shape[0])


@topk_sparse_backward_op.register_fake
def _(hidden, weight, ids, grad_logits, *settings):
    return grad_logits.new_empty(hidden.shape)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, _, _, loss_mask, *settings = inputs
    logprobs, ids, lse = output
    ctx.save_for_backward(hidden, weight, bias, loss_mask, ids, lse, logprobs)
    ctx.mark_non_differentiable(ids)
    ctx.settings = settings


def _backward(ctx, grad_logprobs, _grad_ids, grad_lse):
    hidden, weight, bias, loss_mask, ids, lse, logprobs = ctx.saved_tensors
    temperature, vocab_start, vocab_size, tp_group, chunk_tokens, backend, logit_softcap = ctx.settings
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_TK = torch.where(ids >= 0, grad_logprobs, 0.0)
    grad_weight, is_main = weight_grad_buffer(weight) if needs_weight else (None, False)
    if needs_weight and not is_main:
        grad_weight = weight.new_zeros(weight.shape, dtype=lse.dtype)
    grad_bias = lse.new_zeros(bias.shape) if needs_bias else None
    a_T = grad_lse - grad_TK.sum(1)
    coefficients = torch.stack([a_T, torch.zeros_like(a_T), torch.zeros_like(a_T)])
    no_labels = torch.full_like(ids[:, 0], -1) if ids.shape[1] else ids.new_zeros(ids.shape[0])
    place = (vocab_start, vocab_size, tp_group)
    dense = linear_logprobs_backward_op(
        *(hidden, weight, bias, no_labels, loss_mask, None, lse, coefficients, temperature, *place),
        *(False, needs_hidden, grad_weight, grad_bias, True, chunk_tokens, False, backend, logit_softcap),
    )
    grad_logits_TK = grad_TK / temperature
    if logit_softcap:
        grad_logits_TK *= cap_slope(logprobs + lse.unsqueeze(1), temperature, logit_softcap)
    sparse = topk_sparse_backward_op(hidden, weight, ids, grad_logits_TK, loss_mask, *place, grad_weight, grad_bias)
    return (
        (dense + sparse).to(hidden.dtype) if needs_hidden else None,
        None if is_main or grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
        *[None] * 10,
    )


torch.library.register_autograd("skyrl_mega::topk_logprobs", _backward, setup_context=_setup_context)


def _rows(hidden: torch.Tensor, loss_mask: torch.Tensor | None) -> Rows:
    """The counting rows, with no label in any shard."""
    no_labels = torch.full((hidden.shape[0],), -1, dtype=torch.int64, device=hidden.device)
    return counting_rows(hidden, no_labels, loss_mask, None)


def _gathered(weight: torch.Tensor, columns_NK: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows of a chunk, the weight's rows of its tokens [C, K, H] in the softmax's dtype), chunk by chunk."""
    per_row = columns_NK.shape[1] * weight.shape[1] * 4
    for chunk in row_chunks(columns_NK.shape[0], max(1, _GATHER_BYTES // max(per_row, 1))):
        yield chunk, weight[columns_NK[chunk]].to(softmax_dtype(weight.dtype))


def _logits_at(
    hidden_NH: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids_NK: torch.Tensor,
    shard: VocabShard,
    temperature: float,
    logit_softcap: float,
) -> torch.Tensor:
    """Tempered logits at the given tokens of the whole vocabulary, -inf where an id is -1; one all-reduce."""
    columns_NK = shard.local_columns(ids_NK, shard.num_valid(weight.shape[0]))
    held_NK, columns_NK = columns_NK >= 0, columns_NK.clamp(min=0)
    logits_NK = hidden_NH.new_zeros(ids_NK.shape, dtype=softmax_dtype(hidden_NH.dtype))
    for chunk, weight_CKH in _gathered(weight, columns_NK):
        logits_NK[chunk] = torch.einsum("ch,ckh->ck", hidden_NH[chunk].to(logits_NK.dtype), weight_CKH)
    if bias is not None:
        logits_NK += bias[columns_NK]
    logits_NK = sum_over_ranks(torch.where(held_NK, cap_logits(logits_NK, logit_softcap) / temperature, 0.0), shard)
    return logits_NK.masked_fill_(ids_NK < 0, -torch.inf)
