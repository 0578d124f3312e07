"""The C++ backend of the LM-head operators (`csrc/cpu/linear_logprobs.cpp`), float32 and bfloat16.

Logits exist only as tiles of [192 columns, 64 rows] in a core's own cache. Sums are float32 and in a fixed order, whatever the
number of threads: every result is bitwise reproducible, and a row's statistics and gradient do not depend on the other rows.
The contract of these functions is in `docs/kernels.md`. `chunk_tokens` has no use here: no buffer grows with rows x columns.

AVX-512 (with bfloat16), AVX2 or portable loops are chosen when the program runs; SKYRL_MEGA_CPU_ISA=avx512|avx2|portable forces
one that the CPU has.
"""

from __future__ import annotations

import torch

from skyrl_mega_kernels import extension

#: Tiles and splits are fixed by H, U and the dtype.
BATCH_INVARIANT = True

_DTYPES = (torch.float32, torch.bfloat16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend can't run for tensors of this device and dtype; None where it can."""
    if device.type != "cpu":
        return "it computes on CPU tensors"
    if dtype not in _DTYPES:
        return f"it computes in torch.float32 and torch.bfloat16, not {dtype}"
    return extension.why_absent("_C")


def isa() -> str:
    """The instruction set whose loops run in this process: "avx512", "avx2" or "portable"."""
    extension.load("_C")
    return torch.ops.skyrl_mega_cpu.isa()


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
    extension.load("_C")
    packed_4N, topk_logits_NK, topk_columns_NK = torch.ops.skyrl_mega_cpu.linear_logprobs_statistics(
        hidden_NH, weight_UH, bias_U, columns_N, floor_N, temperature, softcap, with_entropy, top_k
    )
    return (packed_4N, topk_logits_NK, topk_columns_NK) if top_k else (packed_4N, None, None)


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
    """Fills the wanted gradients of sum over rows and columns of z's with d / d z_j = p_j (a + b (z_j - lse)) + c [j == label].

    p = exp(z - lse), and (a, b, c) are the rows of coefficients_3N. A grad_weight in bfloat16 is summed in float32 and
    rounded once.
    """
    extension.load("_C")
    torch.ops.skyrl_mega_cpu.linear_logprobs_gradients(
        *(hidden_NH, weight_UH, bias_U, columns_N, floor_N, lse_N, coefficients_3N, temperature, softcap),
        *(grad_hidden_NH, grad_weight_UH, grad_bias_U, accumulate),
    )


def workspace_size(num_rows: int, num_columns: int, dtype: torch.dtype) -> int:
    """float32 elements that hold the logits of one chunk between its two calls; whole tiles."""
    extension.load("_C")
    return torch.ops.skyrl_mega_cpu.linear_logprobs_workspace_size(num_rows, num_columns)


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
    """packed_4C as `statistics` has it; the chunk's logits stay in `workspace`."""
    extension.load("_C")
    return torch.ops.skyrl_mega_cpu.linear_logprobs_chunk_statistics(
        hidden_CH, weight_UH, bias_U, columns_C, floor_C, workspace, temperature, softcap, with_entropy
    )


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
    extension.load("_C")
    torch.ops.skyrl_mega_cpu.linear_logprobs_chunk_gradients(
        *(hidden_CH, weight_UH, columns_C, floor_C, lse_C, coefficients_3C, workspace, temperature, softcap),
        *(grad_hidden_CH, grad_weight_UH, grad_bias_U),
    )
