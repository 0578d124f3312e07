"""What families with DeepSeek-V3's router share: sigmoid scores, a bias of each expert, groups, shared experts without gate."""

from __future__ import annotations

from typing import Any

from skyrl_mega.errors import ModelLoadError
from skyrl_mega.models.families.architecture import Architecture, Experts
from skyrl_mega.models.families.experts import checked
from skyrl_mega.models.families.family import SILU, Rule
from skyrl_mega.models.families.weights import Weight, dense_ffn, expert_ffn, gated_ffn

RULES = (
    SILU,
    Rule("norm_topk_prob", bool, "sigmoid weights are always divided by their sum"),
    Rule("n_shared_experts", lambda count: count >= 1, "a layer without shared experts is not built"),
)


def read_experts(c: Any) -> Experts | None:
    """The experts of a config, None where every layer is dense. Raises ModelLoadError."""
    layers = tuple(layer >= c.first_k_dense_replace for layer in range(c.num_hidden_layers))
    if not any(layers):
        return None
    experts = Experts(
        count=c.num_local_experts,  # transformers' other name of n_routed_experts
        per_token=c.num_experts_per_tok,
        ffn_size=c.moe_intermediate_size,
        renormalised=True,
        shared_ffn_size=c.moe_intermediate_size * c.n_shared_experts,
        layers=layers,
        has_shared_gate=False,
        is_sigmoid=True,
        groups=c.n_group,
        groups_per_token=c.topk_group,
        scale=float(c.routed_scaling_factor),
    )
    _check_groups(experts, c.model_type)
    return checked(experts, c.model_type)


def _check_groups(e: Experts, family: str) -> None:
    if e.groups < 1 or e.count % e.groups or e.count // e.groups < 2 or not 1 <= e.groups_per_token <= e.groups:
        raise ModelLoadError(
            f"config.json of {family}: n_group ({e.groups}) must divide n_routed_experts ({e.count}) into groups of two or more, "
            f"and topk_group ({e.groups_per_token}) be between 1 and n_group; correct the file."
        )
    if e.per_token > e.groups_per_token * (e.count // e.groups):
        raise ModelLoadError(
            f"config.json of {family}: topk_group ({e.groups_per_token}) groups of {e.count // e.groups} experts must hold "
            f"num_experts_per_tok ({e.per_token}) of them; correct the file."
        )
    if e.groups_per_token < e.groups and e.per_token // e.groups_per_token != 2:
        raise ModelLoadError(
            f"config.json of {family}: num_experts_per_tok ({e.per_token}) with topk_group = {e.groups_per_token} of "
            f"{e.groups} groups is not supported: Megatron ranks groups by their {e.per_token // e.groups_per_token} best "
            "experts, the model's own code by two. Only twice as many experts as groups are built."
        )


def feed_forward(a: Architecture, layer: int) -> list[Weight]:
    """The feed-forward of one layer, with the norm before it."""
    if not a.has_experts(layer):
        return dense_ffn(a)
    assert a.experts is not None
    assert a.experts.shared_ffn_size is not None
    bias = Weight("mlp.router.expert_bias", {"mlp.gate.e_score_correction_bias": (a.experts.count,)}, is_float32=True)
    shared = gated_ffn("mlp.shared_experts.", "mlp.shared_experts.", a.hidden_size, a.experts.shared_ffn_size)
    return [*expert_ffn(a), bias, *shared]
