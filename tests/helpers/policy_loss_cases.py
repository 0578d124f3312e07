"""Cases of the fused policy losses and what they must give: sums and gradients of the torch definitions in float64.

Shape letters: T packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES, LossInputs
from skyrl_mega.algorithms.policy_losses.sums import PolicyLossSums
from skyrl_mega.algorithms.sequences import Sequences
from skyrl_mega_kernels.policy_loss import LOSSES

#: Options that put tokens of the random cases on both sides of every bound.
OPTIONS = {
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.28},
    "dual_clip": {"clip_low": 0.2, "clip_high": 0.28, "cap": 1.5},
    "gspo": {"clip_low": 0.05, "clip_high": 0.07},
    "gspo_token": {"clip_low": 0.05, "clip_high": 0.07},
    "gmpo": {"clip_low": 0.1, "clip_high": 0.15},
    "cispo": {"clip_low": 0.3, "clip_high": 0.4},
    "sapo": {"tau_positive": 1.0, "tau_negative": 1.5},
    "dppo_tv": {"delta_low": 0.1, "delta_high": 0.15, "cap": 1.5},
    "dppo_kl": {"delta_low": 0.02, "delta_high": 0.03, "cap": 1.5},
    "clip_cov": {"clip_low": 0.2, "clip_high": 0.28},
    "kl_cov": {"coef": 0.7},
    "reinforce": {},
    "gpg": {},
    "importance_sampling": {},
    "cross_entropy": {},
}


@dataclass(frozen=True)
class Case:
    """float32 inputs, and the weights of loss and statistics."""

    inputs: LossInputs
    weights_T: torch.Tensor
    loss_weights_T: torch.Tensor


@dataclass(frozen=True)
class Result:
    loss: torch.Tensor
    stats: dict[str, torch.Tensor]
    gradient_T: torch.Tensor


def random_case(lengths: list[int], seed: int = 0, spread: float = 0.5, device: str = "cpu") -> Case:
    """Sequences of these lengths, a third of the tokens masked, with NaN or an infinity in their places."""
    num_tokens = sum(lengths)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(5, num_tokens, generator=generator)
    chance = torch.rand(5, num_tokens, generator=generator)
    old = -noise[0].abs() - 0.05
    drift = (
        torch.randn(len(lengths), generator=generator).mul(spread / 5).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    )
    mask = chance[0] < 0.67
    hole = torch.where(chance[1] < 0.5, torch.nan, -torch.inf)

    def masked(values: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, values, hole).to(device)

    inputs = LossInputs(
        logprobs=masked((old + drift + spread * noise[1]).clamp(max=-0.01)),
        old_logprobs=masked(old),
        rollout_logprobs=masked((old + 0.2 * noise[2]).clamp(max=-0.01)),
        advantages=masked(torch.where(chance[2] < 0.05, 0.0, noise[3])),
        loss_mask=mask.to(device),
        marked=(chance[3] < 0.3).to(device),
        sequences=Sequences.packed(torch.tensor([0, *lengths]).cumsum(0).to(device)),
    )
    weights_T = torch.where(mask, (0.5 + chance[4]) / max(num_tokens, 1), 0.0).to(device)
    return Case(inputs, weights_T, weights_T * (0.5 + chance[1]).to(device))


def run(name: str, case: Case, backend: str, options: dict | None = None, scale: float = 1.0) -> Result:
    """The sums as the objective computes them with `kernels=backend`, and the gradient of scale x loss."""
    chosen = OPTIONS[name] if options is None else options
    sums = PolicyLossSums(POLICY_LOSSES.find(name), chosen, backend)
    leaf = case.inputs.logprobs.detach().clone().requires_grad_()
    loss, stats = sums(replace(case.inputs, logprobs=leaf), case.weights_T, case.loss_weights_T)
    (scale * loss).backward()
    return Result(loss.detach(), stats, leaf.grad)


def in_double(case: Case) -> Case:
    """The same numbers in float64."""
    names = ("logprobs", "old_logprobs", "rollout_logprobs", "advantages")
    inputs = replace(case.inputs, **{name: getattr(case.inputs, name).double() for name in names})
    return Case(inputs, case.weights_T.double(), case.loss_weights_T.double())


def assert_as_good_as_torch(name: str, case: Case, backend: str, options: dict | None = None) -> None:
    """Sums and gradient are at most twice as far from float64 as torch's own float32, or within 3e-6 of the terms' size."""
    ours, eager = run(name, case, backend, options), run(name, case, "reference", options)
    exact = run(name, in_double(case), "reference", options)
    assert set(ours.stats) == set(exact.stats) == set(LOSSES[name].stats)
    assert not ours.gradient_T[~case.inputs.loss_mask].any(), "masked tokens have no gradient"
    assert ours.loss.dtype == torch.float32
    sizes = exact.gradient_T.abs()
    allowed_T = 2 * (eager.gradient_T - exact.gradient_T).abs().amax() + 3e-6 * sizes
    assert ((ours.gradient_T - exact.gradient_T).abs() <= allowed_T + 1e-12).all(), f"{name}: the gradient"
    for key in ("loss", *exact.stats):
        mine, theirs, truth = (result.loss if key == "loss" else result.stats[key] for result in (ours, eager, exact))
        allowed = 2 * abs(float(theirs) - float(truth)) + 3e-6 * max(
            abs(float(truth)), float(sizes.sum()) if key == "loss" else 0
        )
        assert abs(float(mine) - float(truth)) <= allowed + 1e-12, f"{name}: {key} {float(mine)} is not {float(truth)}"
