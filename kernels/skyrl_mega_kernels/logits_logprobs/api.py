"""The contract of `logits_logprobs`, and the checks of its arguments.

Shape letters: T packed tokens, V this rank's columns of the vocabulary, K top-k.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from skyrl_mega_kernels.linear_logprobs.api import check_per_token
from skyrl_mega_kernels.logits_logprobs.ops import logits_logprobs_op
from skyrl_mega_kernels.vocab_parallel import LogprobsOutput, asked_for, shard_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def logits_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    loss_mask: torch.Tensor | None = None,
    floor: torch.Tensor | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
    return_entropy: bool = False,
    top_k: int = 0,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> LogprobsOutput:
    """Log-probabilities of `labels` under softmax(logits / temperature), from one read of the logits.

    logits [T, V] (bfloat16, float16, float32, float64; any row stride); labels int64 [T] are global token ids; loss_mask bool
    [T]. The softmax is float32 (float64 for float64 logits). Rows where loss_mask is False come out as exactly 0 and get a
    gradient of exactly 0, whatever their logits and label are. Logprobs, entropy (of the tempered distribution) and lse are
    differentiable. A logit of -inf is a column of probability 0.

    `floor` float32 [T] truncates each row's distribution: columns whose tempered logit is below it are as if they were not
    there, except the label's own. `top_k` > 0 also returns the K likeliest tokens (those below the floor as -inf).

    `logits` holds this rank's columns: global ids vocab_start .. vocab_start + V (None: equal shards in rank order).
    `vocab_size` counts the valid columns over all ranks (None: all of them); padding columns beyond it take no part. Collective
    over `tp_group`, when given, in forward only (one all-gather): every rank passes the same labels, masks and settings, and
    gets the same bits. Each rank's gradient is that of its own columns.

    `inplace_backward` writes the gradient (in the logits' dtype) over the logits, so that backward needs no memory. DANGER: after
    backward the tensor `logits`, and whatever shares its memory, holds gradients. Only pass it where nothing reads the logits
    after this call. Autograd notices and raises RuntimeError ("modified by an inplace operation") where another operation's
    backward needs them (tanh soft-capping, say) or where backward runs twice; plain reads by other code it can't notice. Not
    under torch.compile.

    Raises ValueError for shapes, dtypes or settings that do not fit, for a label outside [0, vocab_size) in a row that counts,
    and for inplace_backward on a leaf that requires grad or a view of one; BackendUnavailableError for a backend (auto,
    reference, cpu, triton, cuda) that can't run here.
    Method: online softmax merged across shards, arXiv:1805.02867.
    """
    if logits.dim() != 2 or logits.dtype not in DTYPES:
        raise ValueError(f"logits must be [T, V] of a floating dtype; got {logits.dtype} {tuple(logits.shape)}.")
    if temperature <= 0:
        raise ValueError(f"temperature ({temperature}) must be positive; greedy decoding has no log-probabilities to train on.")
    if top_k < 0:
        raise ValueError(f"top_k ({top_k}) must be 0 (none) or the number of tokens wanted.")
    check_per_token(logits.shape[0], labels, loss_mask, floor, logits.dtype)
    shard = shard_of(logits.shape[1], vocab_start, vocab_size, tp_group)
    if inplace_backward:
        _check_inplace(logits)
    outputs = logits_logprobs_op(
        *(logits, labels, loss_mask, floor, float(temperature), shard.start, shard.vocab_size, shard.group),
        *(return_entropy, top_k, inplace_backward, backend),
    )
    return asked_for(outputs, return_entropy, top_k)


def _check_inplace(logits: torch.Tensor) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("inplace_backward can't be compiled: the compiler plans the logits' memory itself. Leave it False.")
    owner = logits if logits._base is None else logits._base  # the tensor whose memory a view shows
    if logits.requires_grad and owner.requires_grad and owner.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            "inplace_backward would overwrite logits that are a leaf of the graph (a parameter or an input) or a view of one, "
            "with their own gradient; leave it False, or pass the output of an operation."
        )
    if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(f"inplace_backward needs logits of their own memory; these are expanded (strides {logits.stride()}).")
