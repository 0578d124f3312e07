"""Log-probabilities of labels (and entropy) straight from hidden states and the LM head, without the [T, V] logits."""

from skyrl_mega_kernels.linear_logprobs.api import LogprobsOutput, linear_logprobs

__all__ = ["LogprobsOutput", "linear_logprobs"]
