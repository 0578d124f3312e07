"""The contract of `linear_logprobs`, and the checks of its arguments.

Shape letters: T packed tokens, H hidden size, V this rank's columns of the vocabulary, K top-k.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from skyrl_mega_kernels.linear_logprobs.ops import linear_logprobs_op
from skyrl_mega_kernels.vocab_parallel import LogprobsOutput, VocabShard, asked_for, shard_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
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
    top_k: int = 0,
    chunk_tokens: int = 1024,
    batch_invariant: bool = False,
    backend: str = "auto",
    logit_softcap: float | None = None,
) -> LogprobsOutput:
    """Log-probabilities of `labels` under softmax((hidden @ weight.T + bias) / temperature), never holding the [T, V] logits.

    hidden [T, H] and weight [V, H] share a dtype (bfloat16, float16, float32, float64) and device, bias [V] too; labels int64 [T]
    are global token ids; loss_mask bool [T]. The softmax is float32 (float64 for float64 inputs). Rows where loss_mask is False
    cost nothing: they come out as exactly 0 and send no gradient back, and their label may be anything. Logprobs, entropy (of
    the tempered distribution) and lse are differentiable with respect to hidden, weight and bias.

    `floor` float32 [T] truncates each row's distribution: columns whose tempered logit is below it are as if they were not
    there, except the label's own (see `topk_logprobs.truncation_floor`). `top_k` > 0 also returns the K likeliest tokens.

    `weight` is this rank's shard of the vocabulary: global columns vocab_start .. vocab_start + V (None: equal shards in
    rank order). `vocab_size` counts the valid columns over all ranks (None: all of them); padding columns beyond it take no
    part. Collective over `tp_group`, when given, in forward (one all-gather) and backward (one all-reduce): every rank passes
    the same hidden, labels, masks and settings, and gets the same bits. Backward returns the complete gradient of `hidden`, so
    the caller must NOT reduce it again. With `sequence_parallel`, hidden is this rank's [ceil(T / ranks), H] rows, in rank
    order, and so is its gradient; the gather and the reduce-scatter happen here.

    The gradient of `weight` belongs to this rank's shard and is summed in float32. Where the parameter carries Megatron's
    float32 `main_grad` it is added there, and autograd gets none: call backward, not torch.autograd.grad, on such a parameter.

    `chunk_tokens` bounds the rows of logits that the reference backend holds at once. `batch_invariant`: a row's result has the
    same bits whatever else is in the batch (always so on cpu and triton; the reference computes whole chunks then).
    `backend`: auto, reference, cpu, triton; see `skyrl_mega_kernels.backends`.

    `logit_softcap`: logits z become logit_softcap * tanh(z / logit_softcap) before they are tempered (Gemma 2,
    arXiv:2408.00118, section 2).

    Raises ValueError for shapes, dtypes or settings that do not fit, and for a label outside [0, vocab_size) in a row that
    counts; BackendUnavailableError for a backend that can't run here.
    Method: online softmax merged across shards, arXiv:1805.02867; recomputing backward, arXiv:2411.09009.
    """
    shard = check_head(
        hidden, weight, labels, loss_mask, bias, floor, temperature, vocab_start, vocab_size, tp_group, sequence_parallel
    )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens ({chunk_tokens}) must be at least 1.")
    if top_k < 0:
        raise ValueError(f"top_k ({top_k}) must be 0 (none) or the number of tokens wanted.")
    outputs = linear_logprobs_op(
        *(hidden, weight, bias, labels, loss_mask, floor, float(temperature), shard.start, shard.vocab_size, shard.group),
        *(sequence_parallel, return_entropy, top_k, chunk_tokens, batch_invariant, backend, checked_softcap(logit_softcap)),
    )
    return asked_for(outputs, return_entropy, top_k)


def checked_softcap(logit_softcap: float | None) -> float:
    """The cap, 0.0 for none. Raises ValueError."""
    if logit_softcap is not None and logit_softcap <= 0:
        raise ValueError(f"logit_softcap ({logit_softcap}) must be positive, or None for none.")
    return float(logit_softcap or 0.0)


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    floor: torch.Tensor | None,
    temperature: float,
    vocab_start: int | None,
    vocab_size: int | None,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
) -> VocabShard:
    """The vocabulary shard of an LM-head call. Raises ValueError where its arguments do not fit together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [T, H] and weight [V, H]; got {tuple(hidden.shape)} and {tuple(weight.shape)}.")
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden and weight must share a floating dtype; got {hidden.dtype} and {weight.dtype}: cast one of them."
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias must be {weight.dtype} [{weight.shape[0]}]; got {bias.dtype} {tuple(bias.shape)}.")
    if temperature <= 0:
        raise ValueError(f"temperature ({temperature}) must be positive; greedy decoding has no log-probabilities to train on.")
    shard = shard_of(weight.shape[0], vocab_start, vocab_size, tp_group)
    num_tokens = hidden.shape[0]
    if sequence_parallel:
        if not shard.group:
            raise ValueError("sequence_parallel needs a tp_group of several ranks: hidden is one rank's rows of the sequence.")
        ranks = dist.get_world_size(tp_group)
        num_tokens = labels.shape[0]
        if labels.dim() != 1 or -(-num_tokens // ranks) != hidden.shape[0]:
            raise ValueError(
                f"with sequence_parallel hidden must hold ceil(T / ranks) rows; got {hidden.shape[0]} for labels "
                f"{tuple(labels.shape)} over {ranks} ranks."
            )
    check_per_token(num_tokens, labels, loss_mask, floor, hidden.dtype)
    return shard


def check_per_token(
    num_tokens: int, labels: torch.Tensor, loss_mask: torch.Tensor | None, floor: torch.Tensor | None, dtype: torch.dtype
) -> None:
    """Raises ValueError for labels, loss_mask or floor of the wrong shape or dtype."""
    if labels.shape != (num_tokens,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{num_tokens}]; got {labels.dtype} {tuple(labels.shape)}.")
    if loss_mask is not None and (loss_mask.shape != (num_tokens,) or loss_mask.dtype != torch.bool):
        raise ValueError(f"loss_mask must be bool [{num_tokens}]; got {loss_mask.dtype} {tuple(loss_mask.shape)}.")
    wanted = torch.promote_types(dtype, torch.float32)
    if floor is not None and (floor.shape != (num_tokens,) or floor.dtype != wanted):
        raise ValueError(f"floor must be {wanted} [{num_tokens}]; got {floor.dtype} {tuple(floor.shape)}.")
