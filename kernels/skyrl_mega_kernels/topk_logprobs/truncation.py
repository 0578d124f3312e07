"""Where a top-k or top-p sampler cuts: the smallest logit that it keeps, per position.

A sampler that truncates draws from p renormalised over the tokens it kept. The trainer's ratio matches it only if the trainer
renormalises over the same tokens: `linear_logprobs(..., floor=truncation_floor(...))`. As samplers do it (vLLM among them):
first top-k keeps every token whose logit is at least the K-th largest, then top-p keeps, of what is left and renormalised, the
smallest set of likeliest tokens whose mass reaches p, always at least one.

The trainer's logits differ from the sampler's in their last bits, so near the cut the two may disagree about a token. A
sampled token that the trainer would cut is kept all the same (`floor` never excludes the label), and the floor lies a few
rounding errors below the cut, so that recomputing the logits elsewhere can't drop the token that defines it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from skyrl_mega_kernels.linear_logprobs.api import check_head, checked_softcap
from skyrl_mega_kernels.linear_logprobs.ops import counting_rows, softmax_dtype
from skyrl_mega_kernels.linear_logprobs.reference import cap_logits, row_chunks
from skyrl_mega_kernels.vocab_parallel import VocabShard

#: Relative to the cut's magnitude, in the softmax's dtype: some rounding errors of a long float32 dot product.
_SLACK = 1e-5
_COLUMNS_AT_ONCE = 8192


@torch.no_grad()
def truncation_floor(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    temperature: float = 1.0,
    bias: torch.Tensor | None = None,
    loss_mask: torch.Tensor | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 256,
    logit_softcap: float | None = None,
) -> torch.Tensor:
    """[T] float32 (float64 for float64 inputs): the lowest tempered logit that a truncated sampler keeps; -inf: all.

    `top_k` 0 and `top_p` 1.0 are off. Rows where loss_mask is False are not computed and hold -inf. At most `chunk_tokens` rows
    of logits are held, over the whole vocabulary: with a `tp_group` the shards' logits are gathered, since a nucleus may be
    as large as the vocabulary; every rank gets the same floors. Arguments and errors as in `linear_logprobs`. No gradient.
    """
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k ({top_k}) must be at least 0 (off) and top_p ({top_p}) in (0, 1], 1 being off.")
    labels = torch.zeros(hidden.shape[:1], dtype=torch.int64, device=hidden.device)
    shard = check_head(
        hidden, weight, labels, loss_mask, bias, None, temperature, vocab_start, vocab_size, tp_group, sequence_parallel=False
    )
    floor_T = hidden.new_full((hidden.shape[0],), -torch.inf, dtype=softmax_dtype(hidden.dtype))
    if top_k == 0 and top_p == 1:
        return floor_T
    rows, softcap = counting_rows(hidden, labels, loss_mask, None), checked_softcap(logit_softcap)
    floors = [
        cut_of(_whole_logits(rows.hidden[chunk], weight, bias, shard, temperature, softcap), top_k, top_p)
        for chunk in row_chunks(rows.hidden.shape[0], chunk_tokens)
    ]
    if not floors:
        return floor_T
    floor_N = torch.cat(floors)
    floor_N -= _SLACK * floor_N.abs().clamp(min=1.0)
    return floor_N if rows.index is None else floor_T.index_copy_(0, rows.index, floor_N)


def cut_of(logits_CV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The smallest kept logit of each row of [C, V] tempered logits, exactly."""
    if top_p == 1:
        return logits_CV.topk(min(top_k, logits_CV.shape[1]), dim=1).values[:, -1]
    sorted_CV = logits_CV.sort(dim=1, descending=True).values
    if 0 < top_k < sorted_CV.shape[1]:
        sorted_CV = sorted_CV.masked_fill(sorted_CV < sorted_CV[:, top_k - 1 : top_k], -torch.inf)
    mass_CV = sorted_CV.softmax(dim=1).cumsum(dim=1)
    # The first position at which the mass reaches p; rounding may keep the last sum just below it.
    last_C = (mass_CV < top_p).sum(dim=1).clamp(max=sorted_CV.shape[1] - 1)
    cut_C = sorted_CV.gather(1, last_C.unsqueeze(1)).squeeze(1)
    lowest_kept_C = sorted_CV.masked_fill(sorted_CV.isneginf(), torch.inf).amin(dim=1)
    return torch.maximum(cut_C, lowest_kept_C)


def _whole_logits(
    hidden_CH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    shard: VocabShard,
    temperature: float,
    softcap: float,
) -> torch.Tensor:
    """Tempered logits [C, vocab_size] of a chunk in the softmax's dtype, products exact and sums float32; one all-gather."""
    dtype = softmax_dtype(hidden_CH.dtype)
    logits_CV = hidden_CH.new_empty(hidden_CH.shape[0], weight_VH.shape[0], dtype=dtype)
    for start in range(0, weight_VH.shape[0], _COLUMNS_AT_ONCE):  # in blocks: no float32 copy of the whole weight
        block = slice(start, start + _COLUMNS_AT_ONCE)
        logits_CV[:, block] = hidden_CH.to(dtype) @ weight_VH[block].to(dtype).t()
    if bias_V is not None:
        logits_CV += bias_V
    cap_logits(logits_CV, softcap)
    logits_CV /= temperature
    group = shard.process_group
    if group is not None:
        gathered = logits_CV.new_empty((dist.get_world_size(group), *logits_CV.shape))
        dist.all_gather(list(gathered.unbind(0)), logits_CV, group=group)
        logits_CV = gathered.transpose(0, 1).flatten(1)
    return logits_CV[:, : shard.vocab_size]
