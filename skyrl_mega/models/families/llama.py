"""Llama 2 and 3, and all that is saved as `llama`: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

from typing import Any

from skyrl_mega.models.families.architecture import Architecture
from skyrl_mega.models.families.family import SILU, Family, off, read_decoder


def _read(c: Any) -> Architecture:
    return read_decoder(c, qkv_bias=bool(c.attention_bias), output_bias=bool(c.attention_bias))


LLAMA = Family("llama", _read, rules=(SILU, off("mlp_bias", "feed-forward biases are not built")))
