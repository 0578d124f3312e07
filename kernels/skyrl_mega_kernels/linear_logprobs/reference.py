"""The torch reference of `linear_logprobs`: chunks of rows, recomputed in the backward pass.

The maths, per row, with logits z = hidden @ weight.T / temperature over the valid columns of all shards:

    m = max z          s = sum exp(z - m)          x = sum (z - m) exp(z - m)
    lse = m + log s    logprob = z[label] - lse    entropy = log s - x / s

Each tensor-parallel rank holds these for its own columns, relative to its own maximum m'. To a common maximum m they move by

    s = s' exp(m' - m)        x = (x' + (m' - m) s') exp(m' - m)

so one MAX all-reduce of m and one SUM of (s, x, z[label]) merge the shards, whatever the number of chunks. The running
maximum starts at -inf (a shard of padding has no columns at all): starting at 0 loses every row whose logits are all near
-100. The entropy is kept in shifted form because -sum p log p from raw logits cancels badly in float32.

With p = exp(z - lse), and g, e the incoming gradients of logprob and entropy:

    d logprob / d z_j = [j == label] - p_j        d entropy / d z_j = -p_j (z_j - lse + entropy)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class VocabShard:
    """Which global columns this rank's weight holds: `start` onwards; columns from `vocab_size` on are padding.

    `group` is None when one rank holds the whole vocabulary.
    """

    start: int
    vocab_size: int
    group: dist.ProcessGroup | None

    def num_valid(self, num_columns: int) -> int:
        """How many of this rank's `num_columns` columns are real vocabulary."""
        return min(max(self.vocab_size - self.start, 0), num_columns)

    def local_labels(self, labels_N: torch.Tensor, num_valid: int) -> torch.Tensor:
        """Column of each label in this rank's weight, -1 where another rank holds it."""
        local_N = labels_N - self.start
        return torch.where((local_N >= 0) & (local_N < num_valid), local_N, -1)


class ReferenceLinearLogprobs(torch.autograd.Function):
    """(hidden_NH, weight_VH, labels_N, temperature, shard, return_entropy, chunk_tokens) -> (logprobs_N, entropy_N | None)."""

    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, labels_N, temperature, shard, return_entropy, chunk_tokens):
        num_valid = shard.num_valid(weight_VH.shape[0])
        local_N = shard.local_labels(labels_N, num_valid)
        statistics = _local_statistics(hidden_NH, weight_VH[:num_valid], local_N, temperature, return_entropy, chunk_tokens)
        max_N, sum_N, shifted_N, label_logit_N = _merge_shards(*statistics, shard.group)

        log_sum_N = sum_N.log()
        lse_N = max_N + log_sum_N
        # Subtracting the maximum first keeps the difference exact where logits are large and close together.
        logprobs_N = (label_logit_N - max_N) - log_sum_N
        entropy_N = log_sum_N - shifted_N / sum_N if return_entropy else None
        ctx.save_for_backward(hidden_NH, weight_VH, local_N, lse_N, entropy_N)
        ctx.settings = (temperature, shard, chunk_tokens, num_valid)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs_N, grad_entropy_N):
        hidden_NH, weight_VH, local_N, lse_N, entropy_N = ctx.saved_tensors
        temperature, shard, chunk_tokens, num_valid = ctx.settings
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        weight_UH = weight_VH[:num_valid]
        # float32 also between ranks: a sum of shards in bfloat16 is a hundred times less exact.
        grad_hidden_NH = hidden_NH.new_zeros(hidden_NH.shape, dtype=lse_N.dtype) if needs_hidden else None
        grad_weight_VH = weight_VH.new_zeros(weight_VH.shape, dtype=lse_N.dtype) if needs_weight else None

        for rows in _chunks(hidden_NH.shape[0] if num_valid else 0, chunk_tokens):
            incoming = (
                (grad_logprobs_N[rows],) if entropy_N is None else (grad_logprobs_N[rows], entropy_N[rows], grad_entropy_N[rows])
            )
            grad_CU = _grad_logits(_logits(hidden_NH[rows], weight_UH, temperature), local_N[rows], lse_N[rows], *incoming)
            grad_CU = grad_CU.div_(temperature).to(hidden_NH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[rows] = (grad_CU @ weight_UH).to(lse_N.dtype)
            if grad_weight_VH is not None:
                grad_weight_VH[:num_valid] += grad_CU.t() @ hidden_NH[rows]
            del grad_CU

        if grad_hidden_NH is not None:
            if shard.group is not None and grad_hidden_NH.numel():
                dist.all_reduce(grad_hidden_NH, group=shard.group)
            grad_hidden_NH = grad_hidden_NH.to(hidden_NH.dtype)
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight_VH, None, None, None, None, None


def _chunks(num_rows: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, min(start + chunk_tokens, num_rows)) for start in range(0, num_rows, chunk_tokens)]


def _logits(hidden_CH: torch.Tensor, weight_UH: torch.Tensor, temperature: float) -> torch.Tensor:
    """Tempered logits of one chunk in the softmax's dtype; the matmul itself runs in the inputs' dtype."""
    logits_CU = hidden_CH @ weight_UH.t()
    return logits_CU.to(torch.promote_types(logits_CU.dtype, torch.float32)).div_(temperature)


def _local_statistics(hidden_NH, weight_UH, local_N, temperature, return_entropy, chunk_tokens):
    """(m', s', x', z[label]) of every row over this rank's valid columns; x' stays 0 unless the entropy is wanted."""
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    statistics_4N = hidden_NH.new_zeros((4, hidden_NH.shape[0]), dtype=dtype)
    statistics_4N[0] = -torch.inf
    if weight_UH.shape[0] > 0:
        for rows in _chunks(hidden_NH.shape[0], chunk_tokens):
            logits_CU = _logits(hidden_NH[rows], weight_UH, temperature)
            _reduce_chunk(logits_CU, local_N[rows], return_entropy, out_4C=statistics_4N[:, rows])
            del logits_CU  # else it would still be held while the next chunk's logits are made
    return statistics_4N.unbind(0)


def _reduce_chunk(logits_CU, local_C, return_entropy, *, out_4C):
    """Fills one chunk's statistics; overwrites `logits_CU`."""
    max_C, sum_C, shifted_C, label_logit_C = out_4C.unbind(0)
    at_label_C = logits_CU.gather(1, local_C.clamp(min=0).unsqueeze(1)).squeeze(1)
    label_logit_C.copy_(torch.where(local_C >= 0, at_label_C, 0.0))
    max_C.copy_(logits_CU.amax(dim=1))
    logits_CU.sub_(max_C.unsqueeze(1))
    if return_entropy:
        exp_CU = logits_CU.exp()
        sum_C.copy_(exp_CU.sum(dim=1))
        shifted_C.copy_(exp_CU.mul_(logits_CU).sum(dim=1))
    else:
        sum_C.copy_(logits_CU.exp_().sum(dim=1))


def _merge_shards(local_max_N, sum_N, shifted_N, label_logit_N, group):
    """The statistics over all shards, equal on every rank: one MAX and one packed SUM all-reduce."""
    if group is None or local_max_N.numel() == 0:
        return local_max_N, sum_N, shifted_N, label_logit_N
    max_N = local_max_N.clone()
    dist.all_reduce(max_N, dist.ReduceOp.MAX, group=group)
    # A shard of padding only has m' = -inf and s' = 0: it contributes 0, not the NaN of -inf * 0.
    shift_N = torch.where(local_max_N.isneginf(), 0.0, local_max_N - max_N)
    scale_N = shift_N.exp()
    packed_3N = torch.stack([sum_N * scale_N, (shifted_N + shift_N * sum_N) * scale_N, label_logit_N])
    dist.all_reduce(packed_3N, group=group)
    return (max_N, *packed_3N.unbind(0))


def _grad_logits(logits_CU, local_C, lse_C, grad_logprobs_C, entropy_C=None, grad_entropy_C=None):
    """Gradient with respect to the tempered logits of one chunk; overwrites `logits_CU`."""
    logprobs_CU = logits_CU.sub_(lse_C.unsqueeze(1))
    probs_CU = logprobs_CU.exp()
    if entropy_C is None:
        grad_CU = probs_CU.mul_(-grad_logprobs_C.unsqueeze(1))
    else:
        slope_CU = logprobs_CU.add_(entropy_C.unsqueeze(1)).mul_(grad_entropy_C.unsqueeze(1))
        grad_CU = slope_CU.add_(grad_logprobs_C.unsqueeze(1)).mul_(probs_CU).neg_()
    held_C = local_C >= 0
    return grad_CU.scatter_add_(1, local_C.clamp(min=0).unsqueeze(1), torch.where(held_C, grad_logprobs_C, 0.0).unsqueeze(1))
