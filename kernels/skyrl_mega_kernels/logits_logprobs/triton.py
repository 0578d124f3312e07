"""The Triton backend of `logits_logprobs`: statistics, top-k and gradients from given logits, one read each.

A row's results depend on that row, U and the dtype alone. The blocks are the same on every chip.

Shape letters: N rows, U columns, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skyrl_mega_kernels import triton_targets
from skyrl_mega_kernels.logits_logprobs.reference import top_logits_by_chunks

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BATCH_INVARIANT = True
#: What `top_k` is rounded up to; each is a compiled variant.
TOP_K_SIZES = (16, 128)
NUM_STAGES = 1


@dataclass(frozen=True)
class RowBlock:
    """Columns that a program handles at a time, and its warps."""

    columns: int
    num_warps: int


STATISTICS = RowBlock(4096, 8)
STATISTICS_WITH_TOP_K = RowBlock(1024, 8)
GRADIENTS = RowBlock(2048, 8)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend can't run for tensors of this device and dtype; None where it can."""
    return triton_targets.unavailable(device, dtype, DTYPES)


def statistics(
    logits_NU: torch.Tensor,
    columns_N: torch.Tensor,
    floor_N: torch.Tensor | None,
    *,
    temperature: float,
    with_entropy: bool,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(packed_4N float32, topk_logits_NK, topk_columns_NK), of z = logits / temperature; the last two None unless top_k > 0.

    packed: m = max z, s = sum exp(z - m), x = sum (z - m) exp(z - m) (0 unless with_entropy), z at columns_N (0 where that is
    -1). Columns with z < floor do not count, except the label's own; top-k disregards floor. Rows may be strided.
    A top_k above 128 does not fit into registers: torch finds it, in reads of its own.
    """
    if top_k > TOP_K_SIZES[-1]:
        packed_4N, _, _ = statistics(logits_NU, columns_N, floor_N, temperature=temperature, with_entropy=with_entropy, top_k=0)
        return (packed_4N, *top_logits_by_chunks(logits_NU, temperature, top_k))
    from skyrl_mega_kernels.logits_logprobs import triton_kernels
    from skyrl_mega_kernels.triton_jit import launch

    num_rows, num_columns = logits_NU.shape
    size = _top_k_size(top_k)
    block = STATISTICS_WITH_TOP_K if top_k else STATISTICS
    packed_4N = torch.empty((4, num_rows), dtype=torch.float32, device=logits_NU.device)
    topk_logits_NK = packed_4N.new_empty((num_rows, top_k))
    topk_columns_NK = columns_N.new_empty((num_rows, top_k))
    launch(
        *(triton_kernels.statistics_rows, (num_rows,), logits_NU.device),
        *(logits_NU, columns_N, packed_4N if floor_N is None else floor_N, packed_4N, topk_logits_NK, topk_columns_NK),
        *(num_rows, num_columns, logits_NU.stride(0), top_k, floor_N is not None, with_entropy, 1.0 / temperature),
        num_warps=block.num_warps,
        num_stages=NUM_STAGES,
        BLOCK=block.columns,
        TOP_K=size,
        # With top-k the merging of blocks takes the time, not the loads.
        ALIGNED=_is_aligned(logits_NU) and not top_k,
    )
    return (packed_4N, topk_logits_NK, topk_columns_NK) if top_k else (packed_4N, None, None)


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
    """Writes d / d logits = (p (a + b (z - lse)) + c [column]) / temperature, 0 where excluded; out_NU may be logits_NU."""
    from skyrl_mega_kernels.logits_logprobs import triton_kernels
    from skyrl_mega_kernels.triton_jit import launch

    num_rows, num_columns = logits_NU.shape
    launch(
        *(triton_kernels.gradient_rows, (num_rows, -(-num_columns // GRADIENTS.columns)), logits_NU.device),
        *(logits_NU, columns_N, lse_N if floor_N is None else floor_N, lse_N, coefficients_3N, out_NU),
        *(num_columns, logits_NU.stride(0), out_NU.stride(0), coefficients_3N.stride(0)),
        *(floor_N is not None, 1.0 / temperature),
        num_warps=GRADIENTS.num_warps,
        num_stages=NUM_STAGES,
        BLOCK=GRADIENTS.columns,
        ALIGNED=_is_aligned(logits_NU) and _is_aligned(out_NU),
    )


def _top_k_size(top_k: int) -> int:
    """The compiled size that keeps `top_k` logits: the next of TOP_K_SIZES, or 0."""
    return next(size for size in TOP_K_SIZES if size >= top_k) if top_k else 0


def _is_aligned(matrix: torch.Tensor) -> bool:
    """Whether all rows start 16-byte aligned and no 16-column vector is cut by the end of a row."""
    row_bytes = matrix.stride(0) * matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and matrix.shape[1] % 16 == 0
