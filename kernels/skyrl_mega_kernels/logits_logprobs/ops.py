"""`logits_logprobs` as torch custom ops: what the dispatcher, autograd, fake tensors and `torch.compile` see.

Labels are checked and shards merged inside the ops, so that a backend only sees its own columns and a compiled graph goes through
without a break. Rows that do not count are not cut out, which would copy the logits: a backend may skip them (column -2), and
whatever it leaves there is replaced by zeros.
"""

from __future__ import annotations

import torch

from skyrl_mega_kernels.backends import Operator
from skyrl_mega_kernels.linear_logprobs.ops import fold_coefficients, softmax_dtype
from skyrl_mega_kernels.vocab_parallel import VocabShard, check_labels, empty_statistics, merge, outputs_like

OPERATOR = Operator("logits_logprobs", ("cpu", "cuda", "triton", "reference"))


@torch.library.custom_op("skyrl_mega::logits_logprobs", mutates_args=())
def logits_logprobs_op(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor | None,
    floor: torch.Tensor | None,
    temperature: float,
    vocab_start: int,
    vocab_size: int,
    tp_group: str,
    return_entropy: bool,
    top_k: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs [T], entropy [T] or [0], lse [T], topk_logprobs [T, K], topk_ids [T, K]); 0 and -1 in rows that do not count."""
    shard = VocabShard(vocab_start, vocab_size, tp_group)
    check_labels(labels if loss_mask is None else labels[loss_mask], vocab_size)
    num_tokens, num_valid = labels.shape[0], shard.num_valid(logits.shape[1])
    if num_tokens == 0 or num_valid == 0:
        statistics = (
            empty_statistics(logits, num_tokens),
            logits.new_full((num_tokens, top_k), -torch.inf, dtype=softmax_dtype(logits.dtype)) if top_k else None,
            labels.new_full((num_tokens, top_k), -1) if top_k else None,
        )
    else:
        statistics = OPERATOR.select(logits.device, logits.dtype, backend).statistics(
            _with_contiguous_rows(logits)[:, :num_valid],
            _columns(labels, loss_mask, shard, num_valid),
            None if floor is None else floor.contiguous(),
            temperature=temperature,
            with_entropy=return_entropy,
            top_k=top_k,
        )
    merged = merge(*statistics, shard, with_entropy=return_entropy)
    lse = _where_counting(merged.lse, loss_mask, 0.0)
    entropy = lse.new_empty(0) if merged.entropy is None else _where_counting(merged.entropy, loss_mask, 0.0)
    logprobs = _where_counting(merged.logprobs, loss_mask, 0.0)
    if merged.topk_logits is None or merged.topk_ids is None:
        return logprobs, entropy, lse, lse.new_empty(num_tokens, 0), labels.new_empty(num_tokens, 0)
    topk_logprobs = merged.topk_logits - merged.lse.unsqueeze(1)
    if floor is not None:
        topk_logprobs.masked_fill_(merged.topk_logits < floor.unsqueeze(1), -torch.inf)
    return (
        *(logprobs, entropy, lse),
        _where_counting(topk_logprobs, loss_mask, 0.0),
        _where_counting(merged.topk_ids, loss_mask, -1),
    )


@logits_logprobs_op.register_fake
def _(logits, labels, loss_mask, floor, temperature, vocab_start, vocab_size, tp_group, return_entropy, top_k, inplace, backend):
    return outputs_like(logits, labels, return_entropy, top_k)


@torch.library.custom_op("skyrl_mega::logits_logprobs_backward", mutates_args=())
def logits_logprobs_backward_op(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor | None,
    floor: torch.Tensor | None,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    temperature: float,
    vocab_start: int,
    vocab_size: int,
    backend: str,
) -> torch.Tensor:
    """The gradient of the logits, in their dtype, [T, V] contiguous."""
    grad = logits.new_empty(logits.shape)
    _write_gradients(logits, labels, loss_mask, floor, lse, coefficients, temperature, vocab_start, vocab_size, backend, out=grad)
    return grad


@logits_logprobs_backward_op.register_fake
def _(logits, labels, loss_mask, floor, lse, coefficients, temperature, vocab_start, vocab_size, backend):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("skyrl_mega::logits_logprobs_backward_", mutates_args=("logits",))
def logits_logprobs_backward_inplace_op(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor | None,
    floor: torch.Tensor | None,
    lse: torch.Tensor,
    coefficients: torch.Tensor,
    temperature: float,
    vocab_start: int,
    vocab_size: int,
    backend: str,
) -> None:
    """Puts the gradient of the logits in their place."""
    arguments = (logits, labels, loss_mask, floor, lse, coefficients, temperature, vocab_start, vocab_size, backend)
    _write_gradients(*arguments, out=logits)


def _write_gradients(
    logits, labels, loss_mask, floor, lse, coefficients, temperature, vocab_start, vocab_size, backend, *, out
) -> None:
    shard = VocabShard(vocab_start, vocab_size, "")
    num_valid = shard.num_valid(logits.shape[1])
    out[:, num_valid:].zero_()
    if logits.shape[0] == 0 or num_valid == 0:
        return
    with_rows = _with_contiguous_rows(logits)
    result = out if out.stride(1) == 1 else with_rows  # logits with strided rows, in place: through the copy
    OPERATOR.select(logits.device, logits.dtype, backend).gradients(
        with_rows[:, :num_valid],
        _columns(labels, loss_mask, shard, num_valid),
        None if floor is None else floor.contiguous(),
        lse.contiguous(),
        coefficients.contiguous(),
        temperature=temperature,
        out_NU=result[:, :num_valid],
    )
    if result is not out:
        out[:, :num_valid] = result[:, :num_valid]
    if loss_mask is not None:
        out.index_fill_(0, (~loss_mask).nonzero().squeeze(1), 0)


def _setup_context(ctx, inputs, output):
    logits, labels, loss_mask, floor, *ctx.settings = inputs
    _, entropy, lse, *_ = output
    ctx.save_for_backward(logits, labels, loss_mask, floor, lse, entropy)


def _backward(ctx, grad_logprobs, grad_entropy, grad_lse, _grad_topk, _grad_ids):
    logits, labels, loss_mask, floor, lse, entropy = ctx.saved_tensors
    temperature, vocab_start, vocab_size, _, return_entropy, _, inplace, backend = ctx.settings
    coefficients = fold_coefficients(grad_logprobs, grad_lse, grad_entropy if return_entropy else None, entropy)
    arguments = (logits, labels, loss_mask, floor, lse, coefficients, temperature, vocab_start, vocab_size, backend)
    if inplace:
        logits_logprobs_backward_inplace_op(*arguments)
        grad_logits = logits.detach()
    else:
        grad_logits = logits_logprobs_backward_op(*arguments)
    return (grad_logits, *[None] * 11)


torch.library.register_autograd("skyrl_mega::logits_logprobs", _backward, setup_context=_setup_context)


def _columns(labels: torch.Tensor, loss_mask: torch.Tensor | None, shard: VocabShard, num_valid: int) -> torch.Tensor:
    """Each label's column in this shard, -1 where another shard holds it, -2 in rows that do not count."""
    columns = shard.local_columns(labels, num_valid)
    return columns.contiguous() if loss_mask is None else torch.where(loss_mask, columns, -2)


def _with_contiguous_rows(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _where_counting(values: torch.Tensor, loss_mask: torch.Tensor | None, otherwise: float) -> torch.Tensor:
    if loss_mask is None:
        return values
    return torch.where(loss_mask if values.dim() == 1 else loss_mask.unsqueeze(1), values, otherwise)
