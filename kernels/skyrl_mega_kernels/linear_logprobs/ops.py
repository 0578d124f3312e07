"""`linear_logprobs` as torch custom ops: what the dispatcher, autograd, fake tensors and `torch.compile` see.

Rows are compacted, labels checked, shards merged and gradients summed over ranks here, so that a backend only ever sees N rows
that count and the U valid columns of its own shard. Everything that depends on the data's values happens inside the ops: a
compiled graph goes through them without a break.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist

from skyrl_mega_kernels.backends import Operator
from skyrl_mega_kernels.vocab_parallel import (
    MergedStatistics,
    VocabShard,
    check_labels,
    empty_statistics,
    merge,
    outputs_like,
    sum_over_ranks,
)

OPERATOR = Operator("linear_logprobs", ("cpu", "triton", "reference"))


class Rows(NamedTuple):
    """The rows that count: their hidden states [N, H], labels [N], floors [N], and where they stand (None: all rows)."""

    hidden: torch.Tensor
    labels: torch.Tensor
    floor: torch.Tensor | None
    index: torch.Tensor | None


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


# -- forward --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("skyrl_mega::linear_logprobs", mutates_args=())
def linear_logprobs_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    loss_mask: torch.Tensor | None,
    floor: torch.Tensor | None,
    temperature: float,
    vocab_start: int,
    vocab_size: int,
    tp_group: str,
    sequence_parallel: bool,
    return_entropy: bool,
    top_k: int,
    chunk_tokens: int,
    batch_invariant: bool,
    backend: str,
    logit_softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs [T], entropy [T] or [0], lse [T], topk_logprobs [T, K], topk_ids [T, K]); 0 and -1 in rows that do not count."""
    shard = VocabShard(vocab_start, vocab_size, tp_group)
    num_tokens = labels.shape[0]
    rows = counting_rows(gather_sequence(hidden, shard, num_tokens, sequence_parallel), labels, loss_mask, floor)
    check_labels(rows.labels, vocab_size)
    module = OPERATOR.select(hidden.device, hidden.dtype, backend)
    merged = merged_statistics(
        *(module, rows, weight, bias, shard, temperature),
        *(return_entropy, top_k, chunk_tokens, batch_invariant, logit_softcap),
    )

    logprobs = scatter_rows(merged.logprobs, rows.index, num_tokens)
    lse = scatter_rows(merged.lse, rows.index, num_tokens)
    entropy = lse.new_empty(0) if merged.entropy is None else scatter_rows(merged.entropy, rows.index, num_tokens)
    if merged.topk_logits is None or merged.topk_ids is None:
        return logprobs, entropy, lse, lse.new_empty(num_tokens, 0), labels.new_empty(num_tokens, 0)
    topk_logprobs = merged.topk_logits - merged.lse.unsqueeze(1)
    if rows.floor is not None:
        topk_logprobs.masked_fill_(merged.topk_logits < rows.floor.unsqueeze(1), -torch.inf)
    return (
        *(logprobs, entropy, lse),
        scatter_rows(topk_logprobs, rows.index, num_tokens),
        scatter_rows(merged.topk_ids + 1, rows.index, num_tokens) - 1,
    )


@linear_logprobs_op.register_fake
def _(hidden, weight, bias, labels, loss_mask, floor, temperature, vocab_start, vocab_size, tp_group, *settings):
    return outputs_like(hidden, labels, return_entropy=settings[1], top_k=settings[2])


def merged_statistics(
    module: ModuleType,
    rows: Rows,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shard: VocabShard,
    temperature: float,
    with_entropy: bool,
    top_k: int,
    chunk_tokens: int,
    batch_invariant: bool,
    logit_softcap: float,
) -> MergedStatistics:
    """Statistics of the counting rows over the whole vocabulary, by the backend `module`; collective over the shards' group."""
    num_valid, num_rows = shard.num_valid(weight.shape[0]), rows.labels.shape[0]
    if num_rows == 0 or num_valid == 0:
        packed_4N = empty_statistics(rows.hidden, num_rows)
        topk_logits_NK = packed_4N.new_full((num_rows, top_k), -torch.inf) if top_k else None
        topk_columns_NK = rows.labels.new_full((num_rows, top_k), -1) if top_k else None
    else:
        padded = pad_rows(rows, module, chunk_tokens if batch_invariant else 0)
        packed_4N, topk_logits_NK, topk_columns_NK = module.statistics(
            padded.hidden,
            weight[:num_valid],
            None if bias is None else bias[:num_valid],
            shard.local_columns(padded.labels, num_valid),
            padded.floor,
            temperature=temperature,
            with_entropy=with_entropy,
            top_k=top_k,
            chunk_tokens=chunk_tokens,
            softcap=logit_softcap,
        )
        packed_4N = packed_4N[:, :num_rows]
        if topk_logits_NK is not None and topk_columns_NK is not None:
            topk_logits_NK, topk_columns_NK = topk_logits_NK[:num_rows], topk_columns_NK[:num_rows]
    return merge(packed_4N, topk_logits_NK, topk_columns_NK, shard, with_entropy=with_entropy)


# -- backward -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("skyrl_mega::linear_logprobs_backward", mutates_args=("grad_weight", "grad_bias"))
def linear_logprobs_backward_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    loss_mask: torch.Tensor | None,
    floor: torch.Tensor | None,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    temperature: float,
    vocab_start: int,
    vocab_size: int,
    tp_group: str,
    sequence_parallel: bool,
    needs_hidden: bool,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
    accumulate: bool,
    chunk_tokens: int,
    batch_invariant: bool,
    backend: str,
    logit_softcap: float,
) -> torch.Tensor:
    """The gradient of `hidden` (an empty tensor unless it is needed); `grad_weight` and `grad_bias` are filled or added to.

    lse [T] and coefficients [3, T] as the backends' `gradients` takes them. The gradient of hidden is summed over ranks.
    """
    shard = VocabShard(vocab_start, vocab_size, tp_group)
    num_tokens = labels.shape[0]
    rows = counting_rows(gather_sequence(hidden, shard, num_tokens, sequence_parallel), labels, loss_mask, floor)
    num_valid, num_rows = shard.num_valid(weight.shape[0]), rows.labels.shape[0]
    # float32 also between ranks: a sum of shards in bfloat16 is a hundred times less exact.
    grad_hidden_NH = lse.new_zeros(rows.hidden.shape) if needs_hidden else None
    grad_weight_UH = None if grad_weight is None else grad_weight[:num_valid]
    grad_bias_U = None if grad_bias is None else grad_bias[:num_valid]
    if not accumulate:
        for whole, valid in ((grad_weight, num_valid), (grad_bias, num_valid)):
            if whole is not None:
                whole[valid if num_rows else 0 :].zero_()
    if num_rows and num_valid:
        module = OPERATOR.select(hidden.device, hidden.dtype, backend)
        padded = pad_rows(rows, module, chunk_tokens if batch_invariant else 0)
        extra = padded.labels.shape[0] - num_rows
        per_row = torch.cat([lse.unsqueeze(0), coefficients])
        per_row_4N = torch.nn.functional.pad(per_row if rows.index is None else per_row.index_select(1, rows.index), (0, extra))
        padded_grad_NH = grad_hidden_NH if not extra or grad_hidden_NH is None else lse.new_zeros(padded.hidden.shape)
        module.gradients(
            padded.hidden,
            weight[:num_valid],
            None if bias is None else bias[:num_valid],
            shard.local_columns(padded.labels, num_valid),
            padded.floor,
            per_row_4N[0],
            per_row_4N[1:],
            temperature=temperature,
            grad_hidden_NH=padded_grad_NH,
            grad_weight_UH=grad_weight_UH,
            grad_bias_U=grad_bias_U,
            accumulate=accumulate,
            chunk_tokens=chunk_tokens,
            softcap=logit_softcap,
        )
        if padded_grad_NH is not None:
            grad_hidden_NH = padded_grad_NH[:num_rows]
    if grad_hidden_NH is None:
        return hidden.new_empty(0)
    return reduce_grad_hidden(grad_hidden_NH, hidden, rows, shard, num_tokens, sequence_parallel)


@linear_logprobs_backward_op.register_fake
def _(hidden, weight, bias, labels, loss_mask, floor, lse, coefficients, *settings):
    needs_hidden = settings[5]
    return torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, labels, loss_mask, floor, *settings = inputs
    _, entropy, lse, *_ = output
    ctx.save_for_backward(hidden, weight, bias, labels, loss_mask, floor, lse, entropy)
    ctx.settings = settings


def _backward(ctx, grad_logprobs, grad_entropy, grad_lse, _grad_topk, _grad_ids):
    hidden, weight, bias, labels, loss_mask, floor, lse, entropy = ctx.saved_tensors
    temperature, vocab_start, vocab_size, tp_group, sequence_parallel, return_entropy, _, chunk, invariant, *last = ctx.settings
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_weight, accumulate = weight_grad_buffer(weight) if needs_weight else (None, False)
    grad_bias = None
    if needs_bias:
        grad_bias = lse.new_zeros(bias.shape)  # zeros: right whether it is added to or overwritten
    grad_hidden = linear_logprobs_backward_op(
        *(hidden, weight, bias, labels, loss_mask, floor, lse),
        fold_coefficients(grad_logprobs, grad_lse, grad_entropy if return_entropy else None, entropy),
        *(temperature, vocab_start, vocab_size, tp_group, sequence_parallel, needs_hidden),
        *(grad_weight, grad_bias, accumulate, chunk, invariant, *last),
    )
    return (
        grad_hidden if needs_hidden else None,
        None if accumulate else grad_weight,
        None if grad_bias is None else grad_bias.to(bias.dtype),
        *[None] * 14,
    )


torch.library.register_autograd("skyrl_mega::linear_logprobs", _backward, setup_context=_setup_context)


def fold_coefficients(
    grad_logprobs: torch.Tensor, grad_lse: torch.Tensor | None, grad_entropy: torch.Tensor | None, entropy: torch.Tensor | None
) -> torch.Tensor:
    """[3, N] (a, b, c) with d loss / d z_j = p_j (a + b (z_j - lse)) + c [j == label].

    From d logprob / d z_j = [j == label] - p_j, d lse / d z_j = p_j, d entropy / d z_j = -p_j (z_j - lse + entropy).
    """
    a = -grad_logprobs if grad_lse is None else grad_lse - grad_logprobs
    if grad_entropy is None or entropy is None:
        return torch.stack([a, torch.zeros_like(a), grad_logprobs])
    return torch.stack([a - grad_entropy * entropy, -grad_entropy, grad_logprobs])


def weight_grad_buffer(weight: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(where the weight's gradient goes, whether to add to it).

    Megatron's `main_grad` (float32, beside the parameter) where the parameter has one: no gradient of the weight's own dtype
    is ever made or rounded, and autograd gets none. Else a new tensor, which is overwritten.
    """
    main_grad = getattr(weight, "main_grad", None)
    if isinstance(main_grad, torch.Tensor) and main_grad.dtype == torch.float32 and main_grad.shape == weight.shape:
        return main_grad, True
    return torch.empty_like(weight), False


# -- rows -----------------------------------------------------------------------------------------------------------------


def counting_rows(hidden: torch.Tensor, labels: torch.Tensor, loss_mask: torch.Tensor | None, floor: torch.Tensor | None) -> Rows:
    """The rows where loss_mask is True, contiguous."""
    if loss_mask is None:
        return Rows(hidden.contiguous(), labels.contiguous(), floor, None)
    index = loss_mask.nonzero().squeeze(1)
    return Rows(
        hidden.index_select(0, index),
        labels.index_select(0, index),
        None if floor is None else floor.index_select(0, index),
        index,
    )


def scatter_rows(values: torch.Tensor, index: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
    """[N, ...] back to [T, ...], 0 in rows that do not count."""
    return values if index is None else values.new_zeros((num_tokens, *values.shape[1:])).index_copy_(0, index, values)


def pad_rows(rows: Rows, module: ModuleType, multiple: int) -> Rows:
    """The rows followed by rows of zeros up to a multiple, for a backend whose bits depend on the number of rows at once."""
    extra = 0 if module.BATCH_INVARIANT or not multiple else -rows.labels.shape[0] % multiple
    if not extra:
        return rows
    pad = torch.nn.functional.pad
    return Rows(
        pad(rows.hidden, (0, 0, 0, extra)),
        pad(rows.labels, (0, extra)),
        None if rows.floor is None else pad(rows.floor, (0, extra)),
        rows.index,
    )


def gather_sequence(hidden: torch.Tensor, shard: VocabShard, num_tokens: int, sequence_parallel: bool) -> torch.Tensor:
    """All rows of a sequence-parallel input, in rank order; padding rows at the end are cut off."""
    if not sequence_parallel:
        return hidden
    group = shard.process_group
    gathered = hidden.new_empty((dist.get_world_size(group), *hidden.shape))
    dist.all_gather(list(gathered.unbind(0)), hidden.contiguous(), group=group)
    return gathered.flatten(0, 1)[:num_tokens]


def reduce_grad_hidden(
    grad_hidden_NH: torch.Tensor, hidden: torch.Tensor, rows: Rows, shard: VocabShard, num_tokens: int, sequence_parallel: bool
) -> torch.Tensor:
    """The rows' gradient, summed over ranks, in `hidden`'s place, layout and dtype; this rank's rows for sequence parallel."""
    if not sequence_parallel:
        return scatter_rows(sum_over_ranks(grad_hidden_NH, shard), rows.index, num_tokens).to(hidden.dtype)
    group = shard.process_group
    whole_TH = scatter_rows(grad_hidden_NH, rows.index, num_tokens)
    padded_TH = torch.nn.functional.pad(whole_TH, (0, 0, 0, hidden.shape[0] * dist.get_world_size(group) - num_tokens))
    mine = grad_hidden_NH.new_empty(hidden.shape)
    dist.reduce_scatter_tensor(mine, padded_TH.contiguous(), group=group)
    return mine.to(hidden.dtype)
