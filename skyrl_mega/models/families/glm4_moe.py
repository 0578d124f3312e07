"""GLM-4.5 and later: grouped-query attention of which half of each head is rotated, and DeepSeek-V3's routers."""

from __future__ import annotations

from typing import Any

from skyrl_mega.models.families.architecture import Architecture
from skyrl_mega.models.families.family import Family, read_decoder
from skyrl_mega.models.families.rope import read_rope
from skyrl_mega.models.families.sigmoid_router import RULES, feed_forward, read_experts
from skyrl_mega.models.families.weights import attention


def _read(c: Any) -> Architecture:
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return read_decoder(
        c,
        rope=read_rope(c.rope_parameters, head_dim, c.max_position_embeddings, may_be_partial=True),
        qkv_bias=bool(c.attention_bias),
        qk_norm=bool(c.use_qk_norm),
        experts=read_experts(c),
        num_extra_layers=c.num_nextn_predict_layers or 0,
    )


GLM4_MOE = Family("glm4_moe", _read, rules=RULES, layer_weights=lambda a, layer: attention(a) + feed_forward(a, layer))
