"""Draws docs/images/losses.png: each policy loss and its gradient against the ratio, for a good and a bad token.

    python scripts/plot_losses.py [--output FILE]

Thin: the loss. Broad: its gradient with respect to the token's logprob (at ratio 1 it is -A: the policy gradient; where the loss
is -ratio A, they are the same line). One token that the old policy gave probability 0.3, A = +1 and A = -1; bounds are the
defaults, but for gspo's, which are too narrow to see.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from skyrl_mega.algorithms.policy_losses import POLICY_LOSSES, LossInputs
from skyrl_mega.algorithms.sequences import Sequences

OLD_PROBABILITY = 0.3
#: Name -> (options, what the panel's title adds).
PANELS: dict[str, tuple[dict[str, float], str]] = {
    "ppo_clip": ({}, ""),
    "dual_clip": ({}, ", cap 3"),
    "gspo": ({"clip_low": 0.3, "clip_high": 0.4}, " (bounds x 1000)"),
    "gmpo": ({}, ""),
    "cispo": ({"clip_high": 1.0}, ", bound 2"),
    "sapo": ({}, ""),
    "dppo_tv": ({}, ""),
    "dppo_kl": ({}, ""),
    "kl_cov": ({"coef": 0.5}, ", marked token, coef 0.5"),
    "importance_sampling": ({}, ""),
    "reinforce": ({}, " = gpg"),
    "cross_entropy": ({}, ""),
}
GOOD, BAD = "#1f77b4", "#d62728"


def curves(name: str, options: dict[str, float], advantage: float, ratios: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient) at each ratio; every ratio is a response of one token."""
    old = torch.full_like(ratios, OLD_PROBABILITY).log()
    logprobs = (old + ratios.log()).requires_grad_()
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        rollout_logprobs=old,
        advantages=torch.full_like(ratios, advantage),
        loss_mask=torch.ones_like(ratios, dtype=torch.bool),
        sequences=Sequences.packed(torch.arange(len(ratios) + 1)),
        marked=torch.ones_like(ratios, dtype=torch.bool),
    )
    loss, _ = POLICY_LOSSES.find(name).bind(options, "options")(inputs)
    return loss.detach(), torch.autograd.grad(loss.sum(), logprobs)[0]


def draw(output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 4, figsize=(14, 8.5), sharex=True, sharey=True)
    # Up to probability 1.
    ratios = torch.linspace(0.02, 1 / OLD_PROBABILITY - 0.01, 1200, dtype=torch.float64)
    for axis, (name, (options, note)) in zip(axes.flat, PANELS.items(), strict=True):
        for advantage, color in ((1.0, GOOD), (-1.0, BAD)):
            loss, gradient = curves(name, options, advantage, ratios)
            axis.plot(ratios, gradient, color=color, linewidth=5, alpha=0.3, label=f"gradient, A = {advantage:+.0f}")
            axis.plot(ratios, loss, color=color, linewidth=1.5, label=f"loss, A = {advantage:+.0f}")
        axis.axvline(1, color="grey", linewidth=0.6, linestyle=":")
        axis.axhline(0, color="grey", linewidth=0.6)
        axis.set_title(f"{name}{note}", fontsize=11)
        axis.set_ylim(-3.6, 3.6)
    for axis in axes[-1]:
        axis.set_xlabel("ratio")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    figure.suptitle("Policy losses and their gradients (d loss / d logprob) against the ratio", fontsize=13)
    figure.tight_layout(rect=(0, 0.04, 1, 0.99))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[1] / "docs/images/losses.png"
    parser.add_argument("--output", type=Path, default=default, metavar="FILE")
    draw(parser.parse_args().output)
