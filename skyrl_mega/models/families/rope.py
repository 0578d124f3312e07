"""Rotary position embedding: what a config says of it, and the frequencies that follow.

Kinds, as transformers names them:

- default: pair i of a head of D rotated numbers turns by theta^(-2i/D) radians a position (arXiv:2104.09864 section 3.2);
- linear: positions are divided by `factor` (arXiv:2306.15595);
- llama3: wavelengths above `original_positions / low_freq_factor` are stretched by `factor`, those below
  `original_positions / high_freq_factor` are left alone, and those between are interpolated (Meta's Llama 3.1 code);
- yarn (arXiv:2309.00071): pairs that turn less than `beta_slow` times in `original_positions` are stretched by `factor`, those
  that turn more than `beta_fast` times are left alone, a ramp lies between; cos and sin are multiplied by `attention_factor`;
- longrope (arXiv:2402.13753): each pair has a factor of its own. Up to `original_positions` tokens those are `short_factors`; a
  longer context changes them for all tokens, and so is refused when a model is built (`longest_exact`).

Refused: dynamic, whose frequencies follow the length of whatever is passed in, so that a sequence's logprobs would depend on
what it is computed with (and vLLM computes other ones).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from skyrl_mega.errors import ModelLoadError

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of `kind`; see the module. `rotary_share` of each head, its first numbers, is rotated.

    Scores are products of two rotated vectors: what multiplies cos and sin, `attention_factor`, multiplies scores twice.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    rotary_share: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncated: bool = True  #: yarn: the ramp begins and ends at whole pairs
    short_factors: tuple[float, ...] = ()

    def rotary_dim(self, head_dim: int) -> int:
        """How many numbers of each head are rotated."""
        return int(head_dim * self.rotary_share)

    @property
    def longest_exact(self) -> int | None:
        """The longest sequence whose frequencies are these; None for any."""
        return self.original_positions if self.kind == "longrope" else None


def read_rope(parameters: Mapping[str, Any], head_dim: int, max_positions: int, *, may_be_partial: bool = False) -> Rope:
    """The rotary embedding of a `rope_parameters` dictionary of transformers 5. Raises ModelLoadError.

    `may_be_partial`: whether the family's Hugging Face code knows heads of which only a part is rotated.
    """
    kind = parameters.get("rope_type", "default")
    if kind == "dynamic":
        raise ModelLoadError(
            "config.json: rope_type 'dynamic' is not supported: its frequencies follow the length of each batch, and vLLM's are "
            "others than Hugging Face's; use a model with yarn, linear or llama3 scaling."
        )
    if kind not in KINDS:
        raise ModelLoadError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(KINDS)}.")
    share = float(parameters.get("partial_rotary_factor", 1.0))
    if share != 1.0 and not may_be_partial:
        raise ModelLoadError(f"config.json: partial_rotary_factor = {share} is not supported: this family rotates whole heads.")
    if not 0 < share <= 1 or int(head_dim * share) % 2:
        raise ModelLoadError(
            f"config.json: partial_rotary_factor = {share} must rotate an even number of the {head_dim} numbers of a head."
        )
    common: dict[str, Any] = {"theta": float(parameters["rope_theta"]), "kind": kind, "rotary_share": share}
    original = int(parameters.get("original_max_position_embeddings") or max_positions)
    if kind == "linear":
        common["factor"] = float(parameters["factor"])
    elif kind == "llama3":
        common |= {name: float(parameters[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        common["original_positions"] = original
    elif kind == "yarn":
        common |= _read_yarn(parameters, max_positions)
    elif kind == "longrope":
        common |= _read_longrope(parameters, int(head_dim * share) // 2, max_positions)
    rope = Rope(**common)
    if share != 1.0 and rope.attention_factor != 1.0:
        raise ModelLoadError(
            f"config.json: rope_type {kind!r} with an attention factor of {rope.attention_factor:.4g} beside "
            f"partial_rotary_factor = {share} is not supported: only the rotated part of a head would be scaled."
        )
    return rope


def _read_yarn(parameters: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    original = int(parameters.get("original_max_position_embeddings") or max_positions)
    factor = parameters.get("factor")
    factor = float(factor) if factor is not None else max_positions / original
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = yarn_mscale(factor)
    return {
        "factor": factor,
        "original_positions": original,
        "attention_factor": float(attention_factor),
        "beta_fast": float(parameters.get("beta_fast") or 32),
        "beta_slow": float(parameters.get("beta_slow") or 1),
        "truncated": bool(parameters.get("truncate", True)),
    }


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """How much flatter attention is made for a context `factor` times as long (arXiv:2309.00071 equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _read_longrope(parameters: Mapping[str, Any], pairs: int, max_positions: int) -> dict[str, Any]:
    original = parameters.get("original_max_position_embeddings")
    if not original:
        raise ModelLoadError("config.json: rope_type 'longrope' needs original_max_position_embeddings; add it to the file.")
    factors = tuple(float(value) for value in parameters["short_factor"])
    if len(factors) != pairs:
        raise ModelLoadError(f"config.json: short_factor of longrope has {len(factors)} numbers and must have {pairs}.")
    # transformers: the context's growth is what the file says, or follows from the two maxima.
    factor = float(parameters.get("factor") or max_positions / original)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {"original_positions": int(original), "attention_factor": float(attention_factor), "short_factors": factors}


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians per position of each rotated pair, float32 [rotary_dim / 2] on CPU."""
    dim = rope.rotary_dim(head_dim)
    inv_freq = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, inv_freq)
    if rope.kind == "yarn":
        return _yarn(rope, inv_freq, dim)
    if rope.kind == "longrope":
        return inv_freq / torch.tensor(rope.short_factors)
    return inv_freq


def _llama3(rope: Rope, inv_freq: torch.Tensor) -> torch.Tensor:
    wavelength = 2 * math.pi / inv_freq
    longest, shortest = rope.original_positions / rope.low_freq_factor, rope.original_positions / rope.high_freq_factor
    share = (rope.original_positions / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - share) * inv_freq / rope.factor + share * inv_freq
    stretched = torch.where(wavelength > longest, inv_freq / rope.factor, inv_freq)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, stretched)


def _yarn(rope: Rope, inv_freq: torch.Tensor, dim: int) -> torch.Tensor:
    """arXiv:2309.00071 equations 17 to 20: left alone where the ramp is 0, stretched where it is 1."""

    def pair_that_turns(turns: float) -> float:
        return dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return inv_freq / rope.factor * ramp + inv_freq * (1 - ramp)
