"""DeepSeek-V3 and R1, and what is saved as such (Moonlight): multi-latent attention, experts with sigmoid routers."""

from __future__ import annotations

import math
from typing import Any

from skyrl_mega.models.families.architecture import Architecture, Latent
from skyrl_mega.models.families.family import Family, off, read_decoder
from skyrl_mega.models.families.rope import read_rope, yarn_mscale
from skyrl_mega.models.families.sigmoid_router import RULES, feed_forward, read_experts
from skyrl_mega.models.families.weights import Split, Weight, vector


def _read(c: Any) -> Architecture:
    latent = Latent(
        query_rank=c.q_lora_rank,
        rank=c.kv_lora_rank,
        plain_dim=c.qk_nope_head_dim,
        rotated_dim=c.qk_rope_head_dim,
        value_dim=c.v_head_dim,
        interleaved=bool(c.rope_interleave),
    )
    return read_decoder(
        c,
        head_dim=latent.key_dim,
        num_kv_heads=c.num_attention_heads,
        rope=read_rope(c.rope_parameters, latent.rotated_dim, c.max_position_embeddings),
        latent=latent,
        attention_scale=_attention_scale(c.rope_parameters, latent.key_dim),
        experts=read_experts(c),
        num_extra_layers=c.num_nextn_predict_layers or 0,
    )


def _attention_scale(rope_parameters: dict[str, Any], key_dim: int) -> float:
    """As DeepSeek's code has it: a longer context than trained for sharpens all of the scores, not only their rotated part."""
    all_dim = rope_parameters.get("mscale_all_dim", 0)
    is_scaled = rope_parameters.get("rope_type", "default") != "default" and all_dim
    mscale = yarn_mscale(rope_parameters["factor"], all_dim) if is_scaled else 1.0
    return mscale * mscale / math.sqrt(key_dim)


def _attention(a: Architecture) -> list[Weight]:
    latent, hidden, heads = a.latent, a.hidden_size, a.num_heads
    assert latent is not None
    table = [vector("input_layernorm.weight", "input_layernorm.weight", hidden)]
    queries = heads * latent.key_dim
    if latent.query_rank is None:
        table.append(Weight("self_attention.linear_q_proj.weight", {"self_attn.q_proj.weight": (queries, hidden)}, Split.ROWS))
    else:
        down, up = {"self_attn.q_a_proj.weight": (latent.query_rank, hidden)}, (queries, latent.query_rank)
        table += [
            Weight("self_attention.linear_q_down_proj.weight", down),
            vector("self_attention.linear_q_up_proj.layer_norm_weight", "self_attn.q_a_layernorm.weight", latent.query_rank),
            Weight("self_attention.linear_q_up_proj.weight", {"self_attn.q_b_proj.weight": up}, Split.ROWS),
        ]
    down = {"self_attn.kv_a_proj_with_mqa.weight": (latent.rank + latent.rotated_dim, hidden)}
    up = (heads * (latent.plain_dim + latent.value_dim), latent.rank)
    return [
        *table,
        Weight("self_attention.linear_kv_down_proj.weight", down),
        vector("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attn.kv_a_layernorm.weight", latent.rank),
        Weight("self_attention.linear_kv_up_proj.weight", {"self_attn.kv_b_proj.weight": up}, Split.ROWS),
        Weight(
            "self_attention.linear_proj.weight",
            {"self_attn.o_proj.weight": (hidden, heads * latent.value_dim)},
            Split.COLUMNS,
        ),
    ]


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    _read,
    rules=(
        *RULES,
        off("attention_bias", "biases of multi-latent attention are not built"),
    ),
    layer_weights=lambda a, layer: _attention(a) + feed_forward(a, layer),
)
