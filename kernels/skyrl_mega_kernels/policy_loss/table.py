"""The losses that have kernels: which options each takes and which statistics it gives, in the kernels' order."""

from __future__ import annotations

from dataclasses import dataclass

_RATIO = ("ratio", "approx_kl")
_CLIPPED = (*_RATIO, "clip_low_fraction", "clip_high_fraction")


@dataclass(frozen=True)
class Signature:
    """`denominators`: the policy that the ratio is to, by its name in the trainer's inputs. `whole_sequences`: it looks at more
    than one token, and needs cu_seqlens. `marked`: it needs marks."""

    options: tuple[str, ...]
    stats: tuple[str, ...]
    denominators: str = "old_logprobs"
    whole_sequences: bool = False
    marked: bool = False


_CLIP = ("clip_low", "clip_high")
_DPPO = Signature(("delta_low", "delta_high", "cap"), (*_CLIPPED, "cap_fraction"), denominators="rollout_logprobs")
# The sums of a sequence loss's first walk come before those of its second.
_GSPO = Signature(_CLIP, ("approx_kl", "ratio", "clip_low_fraction", "clip_high_fraction"), whole_sequences=True)

LOSSES: dict[str, Signature] = {
    "ppo_clip": Signature(_CLIP, _CLIPPED),
    "dual_clip": Signature((*_CLIP, "cap"), (*_CLIPPED, "dual_clip_fraction")),
    "cispo": Signature(_CLIP, _CLIPPED),
    "sapo": Signature(("tau_positive", "tau_negative"), (*_RATIO, "gate_weight")),
    "dppo_tv": _DPPO,
    "dppo_kl": _DPPO,
    "clip_cov": Signature(_CLIP, (*_CLIPPED, "marked_fraction"), marked=True),
    "kl_cov": Signature(("coef",), (*_RATIO, "marked_fraction", "marked_kl"), marked=True),
    "reinforce": Signature((), _RATIO),
    "gpg": Signature((), _RATIO),
    "importance_sampling": Signature((), _RATIO),
    "cross_entropy": Signature((), ()),
    "gspo": _GSPO,
    "gspo_token": _GSPO,
    "gmpo": Signature(_CLIP, (*_CLIPPED, "geometric_mean_ratio"), whole_sequences=True),
}
