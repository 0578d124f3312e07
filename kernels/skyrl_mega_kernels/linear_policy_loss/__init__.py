"""A token-separable loss straight from hidden states and the LM head: logits once, not twice."""

from skyrl_mega_kernels.linear_policy_loss.api import ChunkLoss, LinearPolicyLossOutput, linear_policy_loss

__all__ = ["ChunkLoss", "LinearPolicyLossOutput", "linear_policy_loss"]
