"""Log-probabilities at several tokens per position, and the truncation of a top-k or top-p sampler."""

from skyrl_mega_kernels.topk_logprobs.api import TopkLogprobsOutput, logprobs_at, topk_logprobs
from skyrl_mega_kernels.topk_logprobs.truncation import truncation_floor

__all__ = ["TopkLogprobsOutput", "logprobs_at", "topk_logprobs", "truncation_floor"]
