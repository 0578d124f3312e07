"""The Triton backend of the segmented scan: one program per segment, a parallel scan per block of tokens."""

from __future__ import annotations

import torch

from skyrl_mega_kernels import triton_targets

BLOCK = 1024
NUM_WARPS = 4


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend can't run for tensors of this device and dtype; None where it can."""
    return triton_targets.unavailable(device, dtype, (torch.float32,))


def segmented_scan(decay_T: torch.Tensor, values_T: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """y_T with y_t = values_t + decay_t y_{t+1} inside each segment, 0 beyond its end. float32; cu_seqlens int64 [S + 1]."""
    from skyrl_mega_kernels.segmented_gae import triton_kernels
    from skyrl_mega_kernels.triton_jit import launch

    scan_T = torch.empty_like(values_T)
    num_segments = cu_seqlens.shape[0] - 1
    if num_segments and values_T.numel():
        arguments = (decay_T, values_T, cu_seqlens, scan_T)
        launch(
            *(triton_kernels.segmented_scan, (num_segments,), values_T.device, *arguments),
            num_warps=NUM_WARPS,
            num_stages=1,
            BLOCK=BLOCK,
        )
    return scan_T
