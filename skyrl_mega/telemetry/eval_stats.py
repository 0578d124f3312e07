"""What samples of held-out prompts say: pass@k, mean, majority vote, and how sure one can be of each.

P prompts, n samples of each. Every statistic is a mean over prompts of a number per prompt, so that its uncertainty is that of
drawing other prompts: samples of one prompt are not independent of each other. Where the numbers are all 0 or 1 the interval is
Wilson's (JASA 1927), which stays inside [0, 1] and has width even when all answers are right; elsewhere it is the bootstrap's
2.5th to 97.5th percentile over prompts drawn again with replacement (Efron 1979), by a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

#: Of the normal distribution, for 95%.
Z_95 = 1.959963984540054
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95% interval."""

    value: float
    low: float
    high: float
    method: Literal["wilson", "bootstrap"]


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The probability that at least one of k samples passes, unbiased, from more samples than k: arXiv:2107.03374, equation 1.

    1 - C(n - c, k) / C(n, k). Raises ValueError unless 1 <= k <= num_samples and 0 <= num_passed <= num_samples.
    """
    if not 1 <= k <= num_samples or not 0 <= num_passed <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, of which all may pass; got {num_passed} of {num_samples}.")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def ks_up_to(num_samples: int) -> list[int]:
    """The powers of two up to `num_samples`, and that number itself."""
    return sorted({2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples} | {num_samples})


def majority_score(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    """What the answer is worth that most of a prompt's samples gave (arXiv:2203.11171); a sample without an answer has no vote.

    The mean over answers that tie for most, each worth the mean score of its samples; 0.0 where no sample has an answer.
    """
    by_answer: dict[str, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            by_answer.setdefault(answer, []).append(score)
    if not by_answer:
        return 0.0
    most = max(len(votes) for votes in by_answer.values())
    winners = [sum(votes) / len(votes) for votes in by_answer.values() if len(votes) == most]
    return sum(winners) / len(winners)


def estimate(values_P: Sequence[float]) -> Estimate:
    """The mean of a number per prompt, with its interval; see the module's text. Raises ValueError for no prompt at all."""
    if not values_P:
        raise ValueError("a mean over prompts needs at least one prompt.")
    mean = math.fsum(values_P) / len(values_P)
    if set(values_P) <= {0.0, 1.0}:
        return Estimate(mean, *wilson(mean, len(values_P)), "wilson")
    return Estimate(mean, *bootstrap(values_P), "bootstrap")


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a probability, of which `share` of `count` trials succeeded."""
    spread = Z_95**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values_P: Sequence[float]) -> tuple[float, float]:
    """The percentile bootstrap's 95% interval of a mean; the same at every call."""
    values = np.asarray(values_P, dtype=np.float64)
    random = np.random.default_rng(0)
    means = [values[random.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
