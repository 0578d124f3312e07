"""Gemma 3's text models (arXiv:2503.19786): norms on all sides, norms on the heads of q and k, layers with and without a window.

`gemma3_text` is what a text model is saved as. Multimodal files (`gemma3`) are not read.
"""

from __future__ import annotations

import math
from typing import Any

from skyrl_mega.errors import ModelLoadError
from skyrl_mega.models.families.architecture import Architecture
from skyrl_mega.models.families.family import Family, off, one_of, read_decoder
from skyrl_mega.models.families.rope import read_rope
from skyrl_mega.models.families.weights import Weight, attention, dense_ffn, vector
from skyrl_mega.models.families.windows import FULL, SLIDING, windows_by_layer_type

GELU_TANH = one_of("hidden_activation", ("gelu_pytorch_tanh",), "only gelu_pytorch_tanh is built")


def _read(c: Any) -> Architecture:
    ropes = {kind: read_rope(c.rope_parameters[kind], c.head_dim, c.max_position_embeddings) for kind in (FULL, SLIDING)}
    if ropes[FULL].attention_factor != ropes[SLIDING].attention_factor:
        raise ModelLoadError(
            f"config.json of {c.model_type}: rope_parameters whose attention factors differ between {FULL} "
            f"({ropes[FULL].attention_factor:.4g}) and {SLIDING} ({ropes[SLIDING].attention_factor:.4g}) are not supported."
        )
    return read_decoder(
        c,
        rope=ropes[FULL],
        window_rope=ropes[SLIDING],
        windows=windows_by_layer_type(c),
        qkv_bias=bool(c.attention_bias),
        output_bias=bool(c.attention_bias),
        qk_norm=True,
        activation="gelu_tanh",
        unit_offset_norms=True,
        post_norms=True,
        embedding_scale=math.sqrt(c.hidden_size),
        attention_scale=c.query_pre_attn_scalar**-0.5,
    )


def sandwich_layer(a: Architecture, layer: int) -> list[Weight]:
    """A Gemma layer: norms before and after attention, and before and after the feed-forward."""
    return [
        *attention(a),
        vector("self_attn_bda.weight", "post_attention_layernorm.weight", a.hidden_size),
        *dense_ffn(a, norm="pre_feedforward_layernorm.weight"),
        vector("mlp_bda.weight", "post_feedforward_layernorm.weight", a.hidden_size),
    ]


GEMMA3_TEXT = Family(
    "gemma3_text",
    _read,
    rules=(
        GELU_TANH,
        # Hugging Face reads both settings and applies neither to Gemma 3's scores; vLLM caps the logits.
        off("attn_logit_softcapping", "Gemma 3 has no soft caps"),
        off("final_logit_softcapping", "a soft cap on the logits is not built"),
        off("use_bidirectional_attention", "only causal attention is built"),
    ),
    layer_weights=sandwich_layer,
)
