"""Gemma 2 (arXiv:2408.00118): norms on all sides, soft caps on scores and logits, a window in every second layer."""

from __future__ import annotations

import math
from typing import Any

from skyrl_mega.models.families.architecture import Architecture
from skyrl_mega.models.families.family import Family, off, read_decoder
from skyrl_mega.models.families.gemma3 import GELU_TANH, sandwich_layer
from skyrl_mega.models.families.windows import windows_by_layer_type


def _read(c: Any) -> Architecture:
    return read_decoder(
        c,
        windows=windows_by_layer_type(c),
        qkv_bias=bool(c.attention_bias),
        output_bias=bool(c.attention_bias),
        activation="gelu_tanh",
        unit_offset_norms=True,
        post_norms=True,
        embedding_scale=math.sqrt(c.hidden_size),
        attention_scale=c.query_pre_attn_scalar**-0.5,
        attention_softcap=c.attn_logit_softcapping or None,
        logits_softcap=c.final_logit_softcapping or None,
    )


GEMMA2 = Family(
    "gemma2",
    _read,
    rules=(GELU_TANH, off("use_bidirectional_attention", "only causal attention is built")),
    layer_weights=sandwich_layer,
)
