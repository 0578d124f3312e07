"""KL to a reference, entropy, and how far engine and trainer are apart, as weighted sums with gradients, in one pass."""

from skyrl_mega_kernels.loss_terms.api import LossTermTokens, loss_terms
from skyrl_mega_kernels.loss_terms.table import ESTIMATORS, SUMS

__all__ = ["ESTIMATORS", "SUMS", "LossTermTokens", "loss_terms"]
