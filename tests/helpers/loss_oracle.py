"""Policy losses as their papers print them, one token after the other in Python floats: the independent answer.

`frozen` logprobs stand for what a paper puts under sg(...): finite differences move `logprobs` and leave them alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from skyrl_mega.algorithms.policy_losses import LossInputs
from skyrl_mega.algorithms.sequences import Sequences


@dataclass
class Response:
    """One sequence, a number (or truth) per token."""

    logprobs: list[float]
    old: list[float]
    rollout: list[float]
    advantages: list[float]
    mask: list[bool]
    marked: list[bool]
    frozen: list[float] = field(default_factory=list)

    def moved(self, token: int, step: float) -> Response:
        logprobs = list(self.logprobs)
        logprobs[token] += step
        return replace(self, logprobs=logprobs, frozen=self.frozen or list(self.logprobs))


def random_response(length: int, seed: int, *, spread: float = 0.5, advantage: float | None = None) -> Response:
    """A response whose ratios lie on both sides of every bound; `advantage`: one for all tokens."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(5, length, generator=generator, dtype=torch.float64)
    old = -noise[0].abs() - 0.05
    return Response(
        logprobs=torch.minimum(old + spread * noise[1], torch.tensor(-0.01, dtype=torch.float64)).tolist(),
        old=old.tolist(),
        rollout=torch.minimum(old + 0.2 * noise[2], torch.tensor(-0.01, dtype=torch.float64)).tolist(),
        advantages=noise[3].tolist() if advantage is None else [advantage] * length,
        mask=(noise[4] > -0.5).tolist(),
        marked=(torch.rand(length, generator=generator) < 0.3).tolist(),
    )


def as_inputs(responses: list[Response], *, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> LossInputs:
    """The responses packed, one after the other."""

    def joined(name: str, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.tensor([value for response in responses for value in getattr(response, name)], dtype=dtype)

    lengths = torch.tensor([0, *(len(response.logprobs) for response in responses)])
    return LossInputs(
        logprobs=joined("logprobs").requires_grad_(requires_grad),
        old_logprobs=joined("old"),
        rollout_logprobs=joined("rollout"),
        advantages=joined("advantages"),
        loss_mask=joined("mask", torch.bool),
        sequences=Sequences.packed(lengths.cumsum(0)),
        marked=joined("marked", torch.bool),
    )


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def token_losses(name: str, response: Response, options: dict) -> list[tuple[float, dict[str, float]]]:
    """(loss, statistics) of each token; (0, {}) where it is masked."""
    r = response
    frozen = r.frozen or r.logprobs
    tokens = [t for t, counts in enumerate(r.mask) if counts]
    length = max(len(tokens), 1)
    mean_log_ratio = sum(r.logprobs[t] - r.old[t] for t in tokens) / length
    frozen_mean_log_ratio = sum(frozen[t] - r.old[t] for t in tokens) / length
    gmpo = 0.0
    for t in tokens if name == "gmpo" else []:
        sign = (r.advantages[t] > 0) - (r.advantages[t] < 0)
        log_ratio = r.logprobs[t] - r.old[t]
        bounded = clip(log_ratio, -options["clip_low"], options["clip_high"])
        gmpo += sign * min(sign * log_ratio, sign * bounded) / length

    def of(t: int) -> tuple[float, dict[str, float]]:
        A, logprob = r.advantages[t], r.logprobs[t]
        anchor = r.rollout[t] if name.startswith("dppo") else r.old[t]
        ratio, sg_ratio = math.exp(logprob - anchor), math.exp(frozen[t] - anchor)
        stats = {"ratio": ratio, "approx_kl": ratio - 1 - math.log(ratio)}
        low, high = options.get("clip_low", 0.0), options.get("clip_high", 0.0)
        is_low, is_high = A < 0 and ratio < 1 - low, A > 0 and ratio > 1 + high
        ppo = -min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)
        match name:
            case "ppo_clip":
                loss = ppo
            case "dual_clip":
                loss = -max(min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), options["cap"] * A) if A < 0 else ppo
                stats["dual_clip_fraction"] = float(A < 0 and ratio > options["cap"])
            case "gspo" | "gspo_token":
                s = math.exp(mean_log_ratio)
                if name == "gspo_token":
                    s = math.exp(frozen_mean_log_ratio) * math.exp(logprob - frozen[t])
                loss = -min(s * A, clip(s, 1 - low, 1 + high) * A)
                stats["ratio"] = s
                is_low, is_high = A < 0 and s < 1 - low, A > 0 and s > 1 + high
            case "gmpo":
                loss = -A * math.exp(gmpo)
                stats["geometric_mean_ratio"] = math.exp(gmpo)
                is_low, is_high = A < 0 and math.log(ratio) < -low, A > 0 and math.log(ratio) > high
            case "cispo":
                loss = -clip(sg_ratio, 1 - low, 1 + high) * A * logprob
                is_low, is_high = ratio < 1 - low, ratio > 1 + high
            case "sapo":
                tau = options["tau_positive"] if A > 0 else options["tau_negative"]
                gate = sigmoid(tau * (ratio - 1))
                loss = -4 / tau * gate * A
                stats["gate_weight"] = 4 * gate * (1 - gate)
            case "dppo_tv" | "dppo_kl":
                p, q = math.exp(frozen[t]), math.exp(r.rollout[t])
                divergence = abs(p - q)
                if name == "dppo_kl":
                    divergence = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
                is_low = A < 0 and p < q and divergence > options["delta_low"]
                is_high = A > 0 and p > q and divergence > options["delta_high"]
                weight = 0.0 if is_low or is_high else min(sg_ratio, options["cap"])
                loss = -weight * A * (1 + logprob - frozen[t])
                stats["cap_fraction"] = float(ratio > options["cap"])
            case "clip_cov":
                loss = 0.0 if r.marked[t] else ppo
                stats["marked_fraction"] = float(r.marked[t])
            case "kl_cov":
                loss = -ratio * A + (options["coef"] * abs(math.log(ratio)) if r.marked[t] else 0.0)
                stats["marked_fraction"] = float(r.marked[t])
            case "reinforce" | "gpg":
                loss = -A * logprob
            case "importance_sampling":
                loss = -ratio * A
            case "cross_entropy":
                return -logprob, {}
        if name not in ("sapo", "kl_cov", "reinforce", "gpg", "importance_sampling"):
            stats |= {"clip_low_fraction": float(is_low), "clip_high_fraction": float(is_high)}
        return loss, stats

    return [of(t) if counts else (0.0, {}) for t, counts in enumerate(r.mask)]
