"""A small model with the shape of a large one: the same family, ratios and switches, random weights, milliseconds a pass.

For checking what depends on the architecture and the layout and not on the size: which heads share keys, whether embeddings
are tied, how the vocabulary divides, which layers have experts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from skyrl_mega.models.families import read_hf_config

#: Shorter than the sequences that are passed through it.
WINDOW = 6
HEAD_DIM, FFN, MAX_HEADS_PER_GROUP, MAX_EXPERTS = 16, 128, 4, 8


def _few_layer_types(types: list[str], num_layers: int) -> list[str]:
    """Types for fewer layers, of every kind that the large model has, in turns."""
    kinds = list(dict.fromkeys(types))
    return [kinds[layer % len(kinds)] for layer in range(num_layers)]


def write_scaled_down(source: str | Path, target: Path, *, num_layers: int, tensor: int, expert: int = 1, seed: int = 0) -> int:
    """Writes a scaled-down random model of the architecture in `source` to `target`; returns its vocabulary size.

    It has `num_layers` layers, and heads and experts enough for tensor- and expert-parallel sizes `tensor` and `expert`. The
    vocabulary is small and divides by the tensor size as badly as the large one. Raises ModelLoadError for `source`.
    """
    from transformers import AutoModelForCausalLM

    config = read_hf_config(source)
    per_group = min(config.num_attention_heads // config.num_key_value_heads, MAX_HEADS_PER_GROUP)
    kv_heads = max(2, tensor)
    sizes: dict[str, Any] = {
        "num_hidden_layers": num_layers,
        "hidden_size": kv_heads * per_group * HEAD_DIM,  # Hugging Face wants a multiple of the heads
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * per_group,
        "head_dim": HEAD_DIM,
        "intermediate_size": FFN,
        "vocab_size": 256 + config.vocab_size % tensor,
        "max_position_embeddings": 512,
        # Special tokens of the large vocabulary would lie outside the small one.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    experts = [name for name in ("num_experts", "num_local_experts") if getattr(config, name, 0)]
    if experts:
        few = math.lcm(max(4, expert), expert)
        sizes |= {name: min(few, MAX_EXPERTS * expert) for name in experts}
        sizes["num_experts_per_tok"] = min(config.num_experts_per_tok, few // 2)
        for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
            if getattr(config, name, None):
                sizes[name] = FFN // 2
    if getattr(config, "kv_lora_rank", None):
        sizes |= {"kv_lora_rank": 2 * HEAD_DIM, "qk_rope_head_dim": HEAD_DIM, "qk_nope_head_dim": HEAD_DIM}
        sizes |= {"v_head_dim": HEAD_DIM, "qk_head_dim": 2 * HEAD_DIM}
        if config.q_lora_rank is not None:
            sizes["q_lora_rank"] = 2 * HEAD_DIM
    if getattr(config, "first_k_dense_replace", 0):
        sizes["first_k_dense_replace"] = min(1, num_layers - 1)
    if getattr(config, "n_group", 1) > 1:
        # Groups of two experts; as many experts are chosen as are in the open ones.
        sizes["num_experts_per_tok"] = max(2, sizes["num_experts_per_tok"] // 2 * 2)
        sizes |= {"n_group": few // 2, "topk_group": sizes["num_experts_per_tok"] // 2}
    if getattr(config, "num_nextn_predict_layers", 0):
        sizes["num_nextn_predict_layers"] = 0
    if getattr(config, "mlp_only_layers", None):
        sizes["mlp_only_layers"] = [0]
    if getattr(config, "layer_types", None):
        sizes["layer_types"] = _few_layer_types(config.layer_types, num_layers)
    if getattr(config, "sliding_window", None):
        sizes["sliding_window"] = WINDOW
    for name, value in sizes.items():
        setattr(config, name, value)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Far from the symmetric start of training, so that a tensor in the wrong place shows.
            parameter.copy_(1.0 + 0.1 * noise if parameter.ndim == 1 else 0.08 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    model.config.dtype = torch.float32
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    return config.vocab_size
