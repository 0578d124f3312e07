"""Advantages and discounted returns of packed sequences: one reverse scan over `cu_seqlens`."""

from skyrl_mega_kernels.segmented_gae.api import segmented_gae, segmented_returns, segmented_scan

__all__ = ["segmented_gae", "segmented_returns", "segmented_scan"]
