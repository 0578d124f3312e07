"""What the families with experts share: reading which layers have them, and what no router may be."""

from __future__ import annotations

from typing import Any

from skyrl_mega.errors import ModelLoadError
from skyrl_mega.models.families.architecture import Experts


def sparse_layers(c: Any) -> tuple[bool, ...]:
    """Which layers have experts, by Qwen's two settings for it. Raises ModelLoadError where none has."""
    layers = tuple(
        layer not in c.mlp_only_layers and (layer + 1) % c.decoder_sparse_step == 0 for layer in range(c.num_hidden_layers)
    )
    if not any(layers):
        raise ModelLoadError(
            f"config.json of {c.model_type}: decoder_sparse_step and mlp_only_layers leave no layer with experts; correct the "
            "file."
        )
    return layers


def checked(experts: Experts, family: str) -> Experts:
    """The experts, if a router can choose among them and learn. Raises ModelLoadError."""
    if not 1 <= experts.per_token <= experts.count:
        raise ModelLoadError(
            f"config.json of {family}: num_experts_per_tok ({experts.per_token}) must be between 1 and the number of experts "
            f"({experts.count}); correct the file."
        )
    if experts.per_token == 1 and experts.renormalised:
        raise ModelLoadError(
            f"config.json of {family}: num_experts_per_tok = 1 with renormalised weights (norm_topk_prob; mixtral always) is not "
            "supported: every weight would be 1 and the router would never learn."
        )
    return experts
