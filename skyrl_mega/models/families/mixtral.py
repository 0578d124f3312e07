"""Mixtral: Mistral with experts in every layer; its files keep them under names of their own."""

from __future__ import annotations

from typing import Any

from skyrl_mega.models.families.architecture import Architecture, Experts
from skyrl_mega.models.families.experts import checked
from skyrl_mega.models.families.family import SILU, Family, off, read_decoder
from skyrl_mega.models.families.weights import Weight, attention, expert_ffn
from skyrl_mega.models.families.windows import window_of_every_layer


def _read(c: Any) -> Architecture:
    every_layer = (True,) * c.num_hidden_layers
    experts = Experts(c.num_local_experts, c.num_experts_per_tok, c.intermediate_size, True, None, every_layer)
    return read_decoder(c, experts=checked(experts, c.model_type), windows=window_of_every_layer(c))


def _layer(a: Architecture, layer: int) -> list[Weight]:
    return attention(a) + expert_ffn(a, "block_sparse_moe.", names=("w1", "w3", "w2"))


MIXTRAL = Family(
    "mixtral",
    _read,
    rules=(
        SILU,
        off("router_jitter_noise", "routers run without noise; set it to 0.0"),
    ),
    layer_weights=_layer,
)
