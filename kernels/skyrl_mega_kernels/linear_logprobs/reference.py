"""The torch reference of the LM-head operators: chunks of rows, recomputed in the backward pass.

Shape letters: N rows, C rows of one chunk, H hidden, U columns of this shard, K top-k. Logits are computed in the inputs' dtype
and everything after them in float32 (float64 for float64 inputs). The contract of these functions, which every backend fulfils,
is in `docs/kernels.md`; the maths of merging shards is in `vocab_parallel.py`.

The running maximum starts at -inf: starting at 0 loses every row whose logits are all near -100. The entropy is kept in
shifted form because -sum p log p from raw logits cancels badly in float32.
"""

from __future__ import annotations

import torch

from skyrl_mega_kernels.vocab_parallel import empty_statistics

#: torch's matmuls choose their blocking by the number of rows; `ops.pad_rows` keeps that number fixed where it matters.
BATCH_INVARIANT = False


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: torch runs everywhere."""
    return None


def statistics(
    hidden_NH: torch.Tensor,
    weight_UH: torch.Tensor,
    bias_U: torch.Tensor | None,
    columns_N: torch.Tensor,
    floor_N: torch.Tensor | None,
    *,
    temperature: float,
    with_entropy: bool,
    top_k: int,
    chunk_tokens: int,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(packed_4N, topk_logits_NK, topk_columns_NK): max, sum exp(z - max), sum (z - max) exp(z - max) and z[label] of each row.

    The sum with (z - max) stays 0 unless `with_entropy`; top-k is None unless `top_k` > 0, padded with -inf and column -1.
    """
    packed_4N = empty_statistics(hidden_NH, hidden_NH.shape[0])
    topk = (packed_4N.new_empty(hidden_NH.shape[0], top_k), columns_N.new_empty(columns_N.shape[0], top_k)) if top_k else None
    for rows in row_chunks(hidden_NH.shape[0], chunk_tokens):
        logits_CU = chunk_logits(hidden_NH[rows], weight_UH, bias_U, temperature, softcap)
        if topk is not None:
            topk[0][rows], topk[1][rows] = top_logits(logits_CU, top_k)
        apply_floor(logits_CU, columns_N[rows], None if floor_N is None else floor_N[rows])
        reduce_logits(logits_CU, columns_N[rows], with_entropy, floor_N is not None, out_4C=packed_4N[:, rows])
        del logits_CU  # else it would still be held while the next chunk's logits are made
    return (packed_4N, *(topk or (None, None)))


def gradients(
    hidden_NH: torch.Tensor,
    weight_UH: torch.Tensor,
    bias_U: torch.Tensor | None,
    columns_N: torch.Tensor,
    floor_N: torch.Tensor | None,
    lse_N: torch.Tensor,
    coefficients_3N: torch.Tensor,
    *,
    temperature: float,
    grad_hidden_NH: torch.Tensor | None,
    grad_weight_UH: torch.Tensor | None,
    grad_bias_U: torch.Tensor | None,
    accumulate: bool,
    chunk_tokens: int,
    softcap: float = 0.0,
) -> None:
    """Fills the wanted gradients; see `grad_logits` for the coefficients.

    grad_hidden is overwritten; grad_weight and grad_bias are added to with `accumulate`, else overwritten. A grad_weight in
    the weight's own 16-bit dtype is summed in float32 and rounded once.
    """
    summed_UH = grad_weight_UH
    if grad_weight_UH is not None and not accumulate:
        summed_UH = grad_weight_UH if grad_weight_UH.dtype == lse_N.dtype else grad_weight_UH.to(lse_N.dtype)
        summed_UH.zero_()
    if grad_bias_U is not None and not accumulate:
        grad_bias_U.zero_()
    for rows in row_chunks(hidden_NH.shape[0], chunk_tokens):
        logits_CU = chunk_logits(hidden_NH[rows], weight_UH, bias_U, temperature, softcap)
        slope_CU = cap_slope(logits_CU, temperature, softcap) if softcap else None
        apply_floor(logits_CU, columns_N[rows], None if floor_N is None else floor_N[rows])
        grad_CU = grad_logits(logits_CU, columns_N[rows], lse_N[rows], coefficients_3N[:, rows], floor_N is not None)
        grad_CU.div_(temperature)
        _accumulate_chunk(
            grad_CU if slope_CU is None else grad_CU.mul_(slope_CU),
            hidden_NH[rows],
            weight_UH,
            None if grad_hidden_NH is None else grad_hidden_NH[rows],
            summed_UH,
            grad_bias_U,
        )
        del logits_CU, grad_CU, slope_CU
    if grad_weight_UH is not None and summed_UH is not grad_weight_UH:
        grad_weight_UH.copy_(summed_UH)


# -- chunks whose logits are kept (linear_policy_loss) ----------------------------------------------------------------------


def workspace_size(num_rows: int, num_columns: int, dtype: torch.dtype) -> int:
    """Elements (float32, or float64 for float64 inputs) that hold the logits of one chunk between its two calls."""
    return num_rows * num_columns


def chunk_statistics(
    hidden_CH: torch.Tensor,
    weight_UH: torch.Tensor,
    bias_U: torch.Tensor | None,
    columns_C: torch.Tensor,
    floor_C: torch.Tensor | None,
    workspace: torch.Tensor,
    *,
    temperature: float,
    with_entropy: bool,
    softcap: float = 0.0,
) -> torch.Tensor:
    """packed_4C as `statistics` has it; the chunk's tempered logits stay in `workspace`."""
    logits_CU = workspace[: hidden_CH.shape[0] * weight_UH.shape[0]].view(hidden_CH.shape[0], weight_UH.shape[0])
    logits_CU.copy_(chunk_logits(hidden_CH, weight_UH, bias_U, temperature, softcap))
    apply_floor(logits_CU, columns_C, floor_C)
    packed_4C = empty_statistics(hidden_CH, hidden_CH.shape[0])
    reduce_logits(logits_CU.clone(), columns_C, with_entropy, floor_C is not None, out_4C=packed_4C)
    return packed_4C


def chunk_gradients(
    hidden_CH: torch.Tensor,
    weight_UH: torch.Tensor,
    columns_C: torch.Tensor,
    floor_C: torch.Tensor | None,
    lse_C: torch.Tensor,
    coefficients_3C: torch.Tensor,
    workspace: torch.Tensor,
    *,
    temperature: float,
    grad_hidden_CH: torch.Tensor | None,
    grad_weight_UH: torch.Tensor | None,
    grad_bias_U: torch.Tensor | None,
    softcap: float = 0.0,
) -> None:
    """As `gradients` with accumulate=True, from the logits that `chunk_statistics` left in `workspace`; destroys them."""
    logits_CU = workspace[: hidden_CH.shape[0] * weight_UH.shape[0]].view(hidden_CH.shape[0], weight_UH.shape[0])
    slope_CU = cap_slope(logits_CU, temperature, softcap) if softcap else None
    grad_CU = grad_logits(logits_CU, columns_C, lse_C, coefficients_3C, floor_C is not None).div_(temperature)
    if slope_CU is not None:
        grad_CU.mul_(slope_CU)
    _accumulate_chunk(grad_CU, hidden_CH, weight_UH, grad_hidden_CH, grad_weight_UH, grad_bias_U)


# -- pieces ---------------------------------------------------------------------------------------------------------------


def row_chunks(num_rows: int, chunk_tokens: int) -> list[slice]:
    """Slices of at most `chunk_tokens` rows."""
    return [slice(start, min(start + chunk_tokens, num_rows)) for start in range(0, num_rows, chunk_tokens)]


def chunk_logits(
    hidden_CH: torch.Tensor, weight_UH: torch.Tensor, bias_U: torch.Tensor | None, temperature: float, softcap: float = 0.0
) -> torch.Tensor:
    """Tempered logits of one chunk in the softmax's dtype; the matmul itself runs in the inputs' dtype."""
    logits_CU = hidden_CH @ weight_UH.t()
    logits_CU = logits_CU.to(torch.promote_types(logits_CU.dtype, torch.float32))
    if bias_U is not None:
        logits_CU += bias_U
    return cap_logits(logits_CU, softcap).div_(temperature)


def cap_logits(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap * tanh(logits / softcap) in place (arXiv:2408.00118 section 2); untouched where `softcap` is 0."""
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def cap_slope(tempered: torch.Tensor, temperature: float, softcap: float) -> torch.Tensor:
    """The cap's derivative, from logits that are capped and tempered; 0 where they are -inf."""
    return 1 - (tempered * (temperature / softcap)).clamp_(-1, 1).square_()


def apply_floor(logits_CU: torch.Tensor, columns_C: torch.Tensor, floor_C: torch.Tensor | None) -> None:
    """Sets the logits below the row's floor to -inf, in place, except the label's own."""
    if floor_C is not None:
        excluded_CU = logits_CU < floor_C.unsqueeze(1)
        held_C = columns_C >= 0
        own_C = columns_C.clamp(min=0).unsqueeze(1)
        excluded_CU.scatter_(1, own_C, excluded_CU.gather(1, own_C) & ~held_C.unsqueeze(1))
        logits_CU.masked_fill_(excluded_CU, -torch.inf)


def top_logits(logits_CU: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits of each row, descending, and their columns; the lower column first where they tie."""
    found = min(top_k, logits_CU.shape[1])
    # torch.topk leaves the order of ties open. The candidates, all columns at or above the K-th value, are put in order.
    kth_C1 = logits_CU.topk(found, dim=1).values[:, -1:]
    is_above_CU = logits_CU > kth_C1
    ties_wanted_C1 = found - is_above_CU.sum(1, keepdim=True)
    is_tie_CU = logits_CU == kth_C1
    chosen_CU = is_above_CU | (is_tie_CU & (is_tie_CU.cumsum(1) <= ties_wanted_C1))
    columns_CK = chosen_CU.nonzero()[:, 1].view(-1, found)
    values_CK = logits_CU.gather(1, columns_CK)
    order_CK = values_CK.argsort(dim=1, descending=True, stable=True)
    values_CK, columns_CK = values_CK.gather(1, order_CK), columns_CK.gather(1, order_CK)
    missing = top_k - found
    pad = torch.nn.functional.pad
    return pad(values_CK, (0, missing), value=-torch.inf), pad(columns_CK, (0, missing), value=-1)


def reduce_logits(
    logits_CU: torch.Tensor, columns_C: torch.Tensor, with_entropy: bool, has_excluded: bool, *, out_4C: torch.Tensor
) -> None:
    """Fills one chunk's statistics; overwrites `logits_CU`, where excluded columns hold -inf."""
    max_C, sum_C, shifted_C, label_logit_C = out_4C.unbind(0)
    at_label_C = logits_CU.gather(1, columns_C.clamp(min=0).unsqueeze(1)).squeeze(1)
    label_logit_C.copy_(torch.where(columns_C >= 0, at_label_C, 0.0))
    max_C.copy_(logits_CU.amax(dim=1))
    # A row whose columns here are all excluded keeps m = -inf and s = 0.
    logits_CU.sub_(torch.where(max_C.isneginf(), 0.0, max_C).unsqueeze(1))
    if with_entropy:
        exp_CU = logits_CU.exp()
        sum_C.copy_(exp_CU.sum(dim=1))
        shifted_C.copy_(exp_CU.mul_(_finite(logits_CU, has_excluded)).sum(dim=1))
    else:
        sum_C.copy_(logits_CU.exp_().sum(dim=1))


def grad_logits(
    logits_CU: torch.Tensor,
    columns_C: torch.Tensor,
    lse_C: torch.Tensor,
    coefficients_3C: torch.Tensor,
    has_excluded: bool,
) -> torch.Tensor:
    """Gradient with respect to the tempered logits of one chunk, p (a + b (z - lse)) + c [j == label]; overwrites `logits_CU`.

    p = exp(z - lse); (a, b, c) are the rows of `coefficients_3C`. Excluded columns hold -inf and get 0.
    """
    a_C, b_C, c_C = coefficients_3C.unbind(0)
    logprobs_CU = logits_CU.sub_(lse_C.unsqueeze(1))
    probs_CU = logprobs_CU.exp()
    slope_CU = _finite(logprobs_CU, has_excluded).mul_(b_C.unsqueeze(1)).add_(a_C.unsqueeze(1))
    grad_CU = slope_CU.mul_(probs_CU)
    held_C = columns_C >= 0
    return grad_CU.scatter_add_(1, columns_C.clamp(min=0).unsqueeze(1), torch.where(held_C, c_C, 0.0).unsqueeze(1))


def _finite(logits_CU: torch.Tensor, has_excluded: bool) -> torch.Tensor:
    """The same tensor with the -inf of excluded columns as 0: their probability is 0, and 0 * -inf would be NaN."""
    return logits_CU.masked_fill_(logits_CU.isneginf(), 0.0) if has_excluded else logits_CU


def _accumulate_chunk(grad_CU, hidden_CH, weight_UH, grad_hidden_CH, grad_weight_UH, grad_bias_U) -> None:
    """Adds one chunk's share to the gradients; `grad_CU` is with respect to the untempered logits."""
    if grad_bias_U is not None:
        grad_bias_U += grad_CU.sum(0)
    grad_CU = grad_CU.to(hidden_CH.dtype)
    if grad_hidden_CH is not None:
        grad_hidden_CH.copy_(grad_CU @ weight_UH)
    if grad_weight_UH is not None:
        grad_weight_UH += grad_CU.t() @ hidden_CH
