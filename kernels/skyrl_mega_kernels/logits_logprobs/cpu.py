"""The C++ backend of `logits_logprobs` (`csrc/cpu/logits_logprobs.cpp`): vectorised, one read, threaded over rows."""

from __future__ import annotations

import torch

from skyrl_mega_kernels import extension

DTYPES = (torch.float32, torch.bfloat16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend can't run for tensors of this device and dtype; None where it can."""
    if device.type != "cpu":
        return "it computes on CPU tensors"
    if dtype not in DTYPES:
        return f"it computes from logits in torch.float32 and torch.bfloat16, not {dtype}"
    return extension.why_absent("_C")


def statistics(
    logits_NU: torch.Tensor,
    columns_N: torch.Tensor,
    floor_N: torch.Tensor | None,
    *,
    temperature: float,
    with_entropy: bool,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(packed_4N, topk_logits_NK, topk_columns_NK); the contract is in `reference.py`. A row's bits depend on the row alone."""
    extension.load("_C")
    packed_4N, topk_logits_NK, topk_columns_NK = torch.ops.skyrl_mega_cpu.logits_statistics(
        logits_NU, columns_N, floor_N, temperature, with_entropy, top_k
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
    """Fills `out_NU`, which may be `logits_NU`; the contract is in `reference.py`."""
    extension.load("_C")
    torch.ops.skyrl_mega_cpu.logits_gradients(logits_NU, columns_N, floor_N, lse_N, coefficients_3N, temperature, out_NU)
