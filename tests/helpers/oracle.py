"""GRPO in float64 on a Hugging Face model: one row per sample, no packing, no Megatron, formulas written out.

The independent answer that the trainer's packed, sharded, float32 computation is compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class OracleStep:
    loss: float
    grad_norm: float
    parameters: dict[str, torch.Tensor]


def token_logprobs(model, token_ids: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(logprob of each token given those before it, entropy of its distribution), both [L-1] for tokens 1..L-1."""
    logits = model(token_ids[None]).logits[0, :-1] / temperature
    logp = logits.log_softmax(-1)
    chosen = logp.gather(1, token_ids[1:, None])[:, 0]
    return chosen, -(logp.exp() * logp).sum(-1)


def importance_weights(old: torch.Tensor, rollout: torch.Tensor, correction: str, low: float, cap: float) -> torch.Tensor:
    """What `algorithm.off_policy` multiplies each token's loss by, one token after the other in Python floats."""
    weights = []
    for before, sampled in zip(old.tolist(), rollout.tolist(), strict=True):
        weight = math.exp(before - sampled)
        if correction == "truncated_is":
            weight = min(weight, cap)
        elif weight > cap or (correction == "icepop" and weight < low):
            weight = 0.0
        weights.append(weight)
    return torch.tensor(weights, dtype=torch.float64)


def grpo_update(
    model,
    optimizer: torch.optim.Optimizer,
    samples,
    *,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    reduction: str = "token_mean",
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    old: list[torch.Tensor] | None = None,
    ref: list[torch.Tensor] | None = None,
    importance: list[torch.Tensor] | None = None,
    max_norm: float = 1.0,
    sequence_ratio: bool = False,
) -> OracleStep:
    """One update of `model` (float64) by `optimizer` on samples with token-aligned advantages; returns its numbers.

    `old` and `ref` are token-aligned logprobs [L] per sample; without `old` the ratio is one. `importance`: token-aligned weights
    of the clipped loss. `sequence_ratio`: the geometric mean of a response's ratios in their place (GSPO).
    """
    optimizer.zero_grad()
    total_tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    loss = torch.zeros((), dtype=torch.float64)
    for index, sample in enumerate(samples):
        logprobs, entropy = token_logprobs(model, sample.token_ids, temperature)
        mask = sample.loss_mask[1:]
        advantages = sample.advantages[1:].double()
        before = logprobs.detach() if old is None else old[index][1:].double()
        log_ratio = logprobs - before
        if sequence_ratio:
            log_ratio = (log_ratio[mask].sum() / mask.sum()).expand(len(mask))
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        per_token = -torch.minimum(ratio * advantages, clipped * advantages)
        if importance is not None:
            per_token = per_token * importance[index][1:].double()
        if kl_coef:
            difference = ref[index][1:].double() - logprobs
            per_token = per_token + kl_coef * (difference.exp() - difference - 1)
        per_token = per_token - entropy_coef * entropy
        summed = (per_token * mask).sum()
        loss = loss + (summed / total_tokens if reduction == "token_mean" else summed / mask.sum() / len(samples))
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return OracleStep(float(loss), float(grad_norm), {n: p.detach().clone() for n, p in model.named_parameters()})
