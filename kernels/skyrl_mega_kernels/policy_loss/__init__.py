"""Policy losses as weighted sums, with their gradient and statistics, in one pass over the tokens."""

from skyrl_mega_kernels.policy_loss.api import PolicyLossTokens, policy_loss_sums
from skyrl_mega_kernels.policy_loss.table import LOSSES, Signature

__all__ = ["LOSSES", "PolicyLossTokens", "Signature", "policy_loss_sums"]
