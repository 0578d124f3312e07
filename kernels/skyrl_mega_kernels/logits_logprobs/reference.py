"""The torch reference of `logits_logprobs`, and the contract that every backend fulfils.

Shape letters: N rows, U columns of this shard, C rows of one chunk, K top-k. z = logits / temperature, in float32 (float64 for
float64 logits). `columns_N` holds the label's column in this shard, -1 where another shard holds it, and -2 for a row that does
not count: its results are never used, and a backend may skip it. `floor_N`, where given, excludes the columns with z below it
except the label's own. A column of -inf has probability 0, whatever else.

Rows are computed a few at a time, so that the float32 copies of bfloat16 logits stay small beside the logits.
"""

from __future__ import annotations

import torch

from skyrl_mega_kernels.linear_logprobs.reference import apply_floor, grad_logits, reduce_logits, row_chunks, top_logits
from skyrl_mega_kernels.vocab_parallel import empty_statistics

#: Elements of a chunk in the softmax's dtype.
_CHUNK_ELEMENTS = 2**22


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: torch runs everywhere."""
    return None


def statistics(
    logits_NU: torch.Tensor,
    columns_N: torch.Tensor,
    floor_N: torch.Tensor | None,
    *,
    temperature: float,
    with_entropy: bool,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(packed_4N, topk_logits_NK, topk_columns_NK): max, sum exp(z - max), sum (z - max) exp(z - max) and z[label] of each row.

    The third stays 0 unless `with_entropy`, the fourth where the shard does not hold the label. Top-k, descending, the lower
    column first among equals, takes no notice of the floor; it is None unless `top_k` > 0, and padded with -inf and column -1.
    """
    packed_4N = empty_statistics(logits_NU, logits_NU.shape[0])
    for rows in row_chunks(logits_NU.shape[0], _chunk_rows(logits_NU)):
        logits_CU = _tempered(logits_NU[rows], temperature)
        apply_floor(logits_CU, columns_N[rows], None if floor_N is None else floor_N[rows])
        reduce_logits(logits_CU, columns_N[rows], with_entropy, True, out_4C=packed_4N[:, rows])
    return (packed_4N, *(top_logits_by_chunks(logits_NU, temperature, top_k) if top_k else (None, None)))


def top_logits_by_chunks(logits_NU: torch.Tensor, temperature: float, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest tempered logits of each row [N, K], descending, and their columns; -inf and -1 beyond the columns there are."""
    chunks = []
    for rows in row_chunks(logits_NU.shape[0], _chunk_rows(logits_NU)):
        # NaN compares with nothing: it comes last, as a column of probability 0 does.
        logits_CU = _tempered(logits_NU[rows], temperature).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
        chunks.append(top_logits(logits_CU, top_k))
    values, columns = zip(*chunks, strict=True)
    return torch.cat(values), torch.cat(columns)


def gradients(
    logits_NU: torch.Tensor,
    columns_N: torch.Tensor,
    floor_N: torch.Tensor | None,
    lse_N: torch.Tensor,
    coefficients_3N: torch.Tensor,
    *,
    temperature: float,
    out_NU: torch.Tensor,
) -> None:
    """Fills `out_NU` (it may be `logits_NU` itself) with the gradient of the raw logits, for coefficients (a, b, c):

    (p_j (a + b (z_j - lse)) + c [j == label]) / temperature with p_j = exp(z_j - lse), and 0 for excluded columns.
    """
    for rows in row_chunks(logits_NU.shape[0], _chunk_rows(logits_NU)):
        logits_CU = _tempered(logits_NU[rows], temperature)
        apply_floor(logits_CU, columns_N[rows], None if floor_N is None else floor_N[rows])
        grad_CU = grad_logits(logits_CU, columns_N[rows], lse_N[rows], coefficients_3N[:, rows], True)
        out_NU[rows] = grad_CU.div_(temperature)


def _chunk_rows(logits_NU: torch.Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // max(1, logits_NU.shape[1]))


def _tempered(logits_CU: torch.Tensor, temperature: float) -> torch.Tensor:
    """A copy in the softmax's dtype, divided by the temperature."""
    return logits_CU.to(torch.promote_types(logits_CU.dtype, torch.float32), copy=True).div_(temperature)
