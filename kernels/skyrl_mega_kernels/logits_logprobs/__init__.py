"""Log-probabilities of labels, entropy and top-k from logits that exist already: one read, gradients in place if wanted."""

from skyrl_mega_kernels.logits_logprobs.api import LogprobsOutput, logits_logprobs

__all__ = ["LogprobsOutput", "logits_logprobs"]
