"""Cases of the fused loss terms and what they must give: sums and gradients of the torch definitions in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from helpers.policy_loss_cases import Case, random_case
from skyrl_mega.algorithms.kl import KL_ESTIMATORS
from skyrl_mega.algorithms.terms import LossTerms
from skyrl_mega.config.schema import AlgorithmConfig, KLConfig

#: (estimator or None, entropy coefficient or None: no entropy). Every estimator, and every kind of entropy with and without.
KINDS = [(None, None), (None, 0.0), (None, 0.3), *((name, None) for name in KL_ESTIMATORS), ("k3", 0.0), ("k2", 0.3)]
KL_COEF = 0.7
NAMES = ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy")


@dataclass(frozen=True)
class Result:
    loss: torch.Tensor
    sums: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def terms_case(lengths: list[int], seed: int = 0, spread: float = 0.5, device: str = "cpu") -> Case:
    """As `random_case`, with a reference and an entropy, which hold NaN or an infinity where masked too."""
    case = random_case(lengths, seed, spread, device)
    inputs, generator = case.inputs, torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(2, inputs.logprobs.numel(), generator=generator).to(device)
    hole = torch.where(inputs.loss_mask, 0.0, inputs.logprobs)
    references = (inputs.logprobs + spread * noise[0]).clamp(max=-0.01)
    return Case(replace(inputs, ref_logprobs=references, entropy=noise[1].abs() + hole), case.weights_T, case.loss_weights_T)


def run_terms(kind, case: Case, backend: str, scale: float = 1.0) -> Result:
    """The terms as the objective computes them with `kernels=backend`, and the gradients of scale x loss."""
    estimator, entropy_coef = kind
    kl = KLConfig(coef=KL_COEF, estimator=estimator) if estimator else KLConfig(coef=0.0)
    terms = LossTerms(AlgorithmConfig(kl=kl, entropy_coef=entropy_coef or 0.0), backend)
    leaves = {name: getattr(case.inputs, name).detach().clone().requires_grad_() for name in ("logprobs", "entropy")}
    inputs = replace(case.inputs, logprobs=leaves["logprobs"], entropy=None if entropy_coef is None else leaves["entropy"])
    out = terms(inputs, inputs.old_logprobs, case.weights_T)
    if out.loss.requires_grad:
        (scale * out.loss).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return Result(out.loss.detach(), out.sums | out.maxima, gradients)


def terms_in_double(case: Case) -> Case:
    inputs = replace(case.inputs, **{name: getattr(case.inputs, name).double() for name in NAMES})
    return Case(inputs, case.weights_T.double(), case.loss_weights_T.double())


def assert_terms_as_good_as_torch(kind, case: Case, backend: str) -> None:
    """Sums and gradients are at most twice as far from float64 as torch's own float32, or within 3e-6 of the terms' size."""
    ours, eager = run_terms(kind, case, backend), run_terms(kind, case, "reference")
    exact = run_terms(kind, terms_in_double(case), "reference")
    expected = {name for name, is_there in (("logprobs", kind[0]), ("entropy", kind[1])) if is_there}
    assert set(ours.gradients) == set(exact.gradients) == expected
    for name, gradient_T in ours.gradients.items():
        assert not gradient_T[~case.inputs.loss_mask].any(), "masked tokens have no gradient"
        error_T, truth_T = (gradient_T - exact.gradients[name]).abs(), exact.gradients[name]
        allowed_T = 2 * (eager.gradients[name] - truth_T).abs().amax() + 3e-6 * truth_T.abs() if truth_T.numel() else 0.0
        assert (error_T <= allowed_T + 1e-12).all(), f"{kind}: the gradient by {name}"
    assert set(ours.sums) == set(eager.sums) == set(exact.sums)
    sizes = {name: abs(float(value)) for name, value in exact.sums.items()}
    sizes["mismatch/kl_k1"] = sizes["mismatch/abs_logprob_diff_mean"]  # a sum whose parts cancel
    if (kind[0] or "").startswith("k1"):
        sizes["policy/kl_ref"] = float(run_terms(("abs", None), terms_in_double(case), "reference").sums["policy/kl_ref"])
        sizes["loss/kl"] = KL_COEF * sizes["policy/kl_ref"]
    sizes["loss"] = sizes.get("loss/kl", 0.0) + sizes.get("loss/entropy", 0.0)
    for name, size in sizes.items():
        mine, theirs, truth = (float(r.loss if name == "loss" else r.sums[name]) for r in (ours, eager, exact))
        assert abs(mine - truth) <= 2 * abs(theirs - truth) + 3e-6 * size + 1e-12, f"{kind}: {name} {mine} is not {truth}"
