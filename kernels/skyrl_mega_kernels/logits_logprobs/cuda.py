"""The CUDA C++ backend of `logits_logprobs` (`csrc/cuda/logits_logprobs.cu`): one read, one thread block per row."""

from __future__ import annotations

import torch

from skyrl_mega_kernels import extension
from skyrl_mega_kernels.logits_logprobs.reference import top_logits_by_chunks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend can't run for tensors of this device and dtype; None where it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it computes on tensors of an NVIDIA GPU"
    if dtype not in DTYPES:
        return f"it computes from logits in torch.float32, torch.bfloat16 and torch.float16, not {dtype}"
    return extension.why_absent("_C_cuda")


def statistics(
    logits_NU: torch.Tensor,
    columns_N: torch.Tensor,
    floor_N: torch.Tensor | None,
    *,
    temperature: float,
    with_entropy: bool,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(packed_4N, topk_logits_NK, topk_columns_NK); the contract is in `reference.py`. A row's bits depend on the row alone.

    Top-k is torch's, a few rows at a time: reads of its own.
    """
    extension.load("_C_cuda")
    packed_4N = torch.ops.skyrl_mega_cuda.logits_statistics(logits_NU, columns_N, floor_N, temperature, with_entropy)
    return (packed_4N, *(top_logits_by_chunks(logits_NU, temperature, top_k) if top_k else (None, None)))


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
    """Fills `out_NU`, which may be `logits_NU`; the contract is in `reference.py`."""
    extension.load("_C_cuda")
    torch.ops.skyrl_mega_cuda.logits_gradients(logits_NU, columns_N, floor_N, lse_N, coefficients_3N, temperature, out_NU)
