"""What the kernels have: estimators of the KL, and sums in the kernels' order."""

from __future__ import annotations

#: KL estimators that have kernels.
ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+")
#: Sums by weights; `weight` is the plain sum of the weights.
SUMS = ("kl", "entropy", "distance", "mismatch_k3", "mismatch_k1", "weight")
