"""Qwen's mixtures of experts. qwen2_moe (also Qwen1.5-MoE) has a shared expert behind a sigmoid gate; qwen3_moe has none."""

from __future__ import annotations

from typing import Any

from skyrl_mega.models.families.architecture import Architecture, Experts
from skyrl_mega.models.families.experts import checked, sparse_layers
from skyrl_mega.models.families.family import SILU, Family, read_decoder
from skyrl_mega.models.families.qwen import NO_BIAS
from skyrl_mega.models.families.weights import Weight, attention, dense_ffn, expert_ffn, gated_ffn
from skyrl_mega.models.families.windows import window_of_every_layer, windows_by_layer_type


def _read_experts(c: Any, shared_ffn_size: int | None) -> Experts:
    experts = Experts(
        c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, bool(c.norm_topk_prob), shared_ffn_size, sparse_layers(c)
    )
    return checked(experts, c.model_type)


def _read_qwen2_moe(c: Any) -> Architecture:
    experts = _read_experts(c, c.shared_expert_intermediate_size)
    return read_decoder(c, qkv_bias=bool(c.qkv_bias), experts=experts, windows=windows_by_layer_type(c))


def _read_qwen3_moe(c: Any) -> Architecture:
    return read_decoder(c, qk_norm=True, experts=_read_experts(c, None), windows=window_of_every_layer(c))


def _qwen2_moe_layer(a: Architecture, layer: int) -> list[Weight]:
    if not a.has_experts(layer):
        return attention(a) + dense_ffn(a)
    assert a.experts is not None
    assert a.experts.shared_ffn_size is not None
    shared = gated_ffn("mlp.shared_experts.", "mlp.shared_expert.", a.hidden_size, a.experts.shared_ffn_size)
    gate = Weight("mlp.shared_experts.gate_weight", {"mlp.shared_expert_gate.weight": (1, a.hidden_size)})
    return [*attention(a), *expert_ffn(a), *shared, gate]


QWEN2_MOE = Family("qwen2_moe", _read_qwen2_moe, layer_weights=_qwen2_moe_layer)
QWEN3_MOE = Family(
    "qwen3_moe",
    _read_qwen3_moe,
    rules=(SILU, NO_BIAS),
)
