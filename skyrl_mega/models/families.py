"""What a Hugging Face config means: the architecture in our words, its tensors and shapes, its rotary frequencies.

Supported families: llama, qwen2 (also Qwen2.5), qwen3, dense decoders with RMSNorm, rotary positions, grouped-query attention
and a SwiGLU feed-forward; and mixtures of experts of the same make, qwen2_moe (also Qwen1.5-MoE), qwen3_moe, mixtral. Every
setting of these families that changes the arithmetic is honoured or refused with ModelLoadError; none is ignored. Keys that
Hugging Face's own model code of the family does not read change nothing there and are not looked at here. (What belongs to
training is set by the run, not by the file: the routers' auxiliary loss is `model.moe_aux_loss_coef`.)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from skyrl_mega.errors import ModelLoadError

DENSE_FAMILIES = ("llama", "qwen2", "qwen3")
MOE_FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral")
FAMILIES = DENSE_FAMILIES + MOE_FAMILIES


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding. `kind`: default, linear (positions divided by `factor`), or llama3 (by wavelength).

    llama3: wavelengths above `original_positions / low_freq_factor` are stretched by `factor`, those below
    `original_positions / high_freq_factor` are left alone, and those between are interpolated.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class Experts:
    """The expert layers of a mixture of experts: `per_token` of `count` experts see each token, weighted by a softmax router.

    `renormalised`: the chosen experts' weights are divided by their sum. `shared_ffn_size` is the size of one more expert that
    sees every token, behind a sigmoid gate; None without one. `layers` says which layers have experts, the others are dense.
    """

    count: int
    per_token: int
    ffn_size: int
    renormalised: bool
    shared_ffn_size: int | None
    layers: tuple[bool, ...]


@dataclass(frozen=True)
class Architecture:
    """A decoder, as its Hugging Face config describes it. `ffn_size` is that of dense layers; `experts` is None without any."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    rope: Rope
    experts: Experts | None = None

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layer has an ordinary feed-forward."""
        return self.experts is None or not all(self.experts.layers)


def read_hf_config(path: str | Path) -> Any:
    """The Hugging Face config object of a local model directory of a supported family. Raises ModelLoadError."""
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        raise ModelLoadError(f"`model.path` ({path}) must be a local Hugging Face model directory; it has no config.json.")
    try:
        model_type = json.loads(config_file.read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise ModelLoadError(f"{config_file} is not valid JSON: {error}.") from error
    if model_type not in FAMILIES:
        raise ModelLoadError(
            f"{config_file}: model_type {model_type!r} is not supported; supported families: {', '.join(FAMILIES)}."
        )
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(path), local_files_only=True)


def read_architecture(path: str | Path) -> Architecture:
    """The architecture of the model in `path`. Raises ModelLoadError for a family or a setting that is not supported."""
    return architecture_of(read_hf_config(path))


def architecture_of(hf_config: Any) -> Architecture:
    """The architecture of a Hugging Face config object of a supported family. Raises ModelLoadError."""
    family = hf_config.model_type
    if family not in FAMILIES:
        raise ModelLoadError(f"model_type {family!r} is not supported; supported families: {', '.join(FAMILIES)}.")
    _refuse_what_is_not_built(hf_config)
    # Qwen2's config class has no head_dim of its own, but its model code honours one that the file carries.
    head_dim = hf_config.to_dict().get("head_dim") or hf_config.hidden_size // hf_config.num_attention_heads
    return Architecture(
        family=family,
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=head_dim,
        ffn_size=hf_config.intermediate_size,
        vocab_size=hf_config.vocab_size,
        max_positions=hf_config.max_position_embeddings,
        norm_eps=hf_config.rms_norm_eps,
        tied=bool(hf_config.tie_word_embeddings),
        qkv_bias=family == "qwen2" or (family == "qwen2_moe" and hf_config.qkv_bias),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        rope=_read_rope(hf_config.rope_parameters),
        experts=_read_experts(hf_config) if family in MOE_FAMILIES else None,
    )


def _read_experts(hf_config: Any) -> Experts:
    c, family = hf_config, hf_config.model_type
    if family == "mixtral":
        every_layer = (True,) * c.num_hidden_layers
        experts = Experts(c.num_local_experts, c.num_experts_per_tok, c.intermediate_size, True, None, every_layer)
    else:
        layers = tuple(
            layer not in c.mlp_only_layers and (layer + 1) % c.decoder_sparse_step == 0 for layer in range(c.num_hidden_layers)
        )
        shared = c.shared_expert_intermediate_size if family == "qwen2_moe" else None
        norm = bool(c.norm_topk_prob)
        experts = Experts(c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, norm, shared, layers)
    if not 1 <= experts.per_token <= experts.count:
        raise ModelLoadError(
            f"config.json of {family}: num_experts_per_tok ({experts.per_token}) must be between 1 and the number of experts "
            f"({experts.count}); correct the file."
        )
    if not any(experts.layers):
        raise ModelLoadError(
            f"config.json of {family}: decoder_sparse_step and mlp_only_layers leave no layer with experts; correct the file."
        )
    if experts.per_token == 1 and experts.renormalised:
        raise ModelLoadError(
            f"config.json of {family}: num_experts_per_tok = 1 with renormalised weights (norm_topk_prob; mixtral always) is not "
            "supported: every weight would be 1 and the router would never learn."
        )
    return experts


def _refuse_what_is_not_built(hf_config: Any) -> None:
    settings, family = hf_config.to_dict(), hf_config.model_type
    layer_types = set(settings.get("layer_types") or ["full_attention"])
    rules = (
        ("hidden_act", settings["hidden_act"] in ("silu", "swish"), "only silu is built"),
        ("attention_bias", not settings.get("attention_bias"), "a bias on the attention output projection is not built"),
        ("mlp_bias", not settings.get("mlp_bias"), "feed-forward biases are not built"),
        ("attention_dropout", not settings.get("attention_dropout"), "training runs without dropout; set it to 0.0"),
        ("sliding_window", family != "mixtral" or settings["sliding_window"] is None, "only full attention is built"),
        ("router_jitter_noise", not settings.get("router_jitter_noise"), "routers run without noise; set it to 0.0"),
        ("use_sliding_window", not settings.get("use_sliding_window"), "sliding-window attention is not built"),
        ("layer_types", layer_types == {"full_attention"}, "only full_attention layers are built"),
        ("quantization_config", not settings.get("quantization_config"), "export the model in bfloat16 or float32 first"),
        ("is_encoder_decoder", not settings.get("is_encoder_decoder"), "only decoders are built"),
    )
    for name, fine, why in rules:
        if not fine:
            raise ModelLoadError(f"config.json of {family}: {name} = {settings[name]!r} is not supported: {why}.")


def _read_rope(parameters: dict[str, Any]) -> Rope:
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ModelLoadError(f"config.json: rope_type {kind!r} is not supported; supported: default, linear, llama3.")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        factor = parameters["partial_rotary_factor"]
        raise ModelLoadError(f"config.json: partial_rotary_factor = {factor} is not supported: all of each head is rotated.")
    theta = float(parameters["rope_theta"])
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, float(parameters["factor"]))
    return Rope(
        theta,
        kind,
        float(parameters["factor"]),
        float(parameters["low_freq_factor"]),
        float(parameters["high_freq_factor"]),
        int(parameters["original_max_position_embeddings"]),
    )


def inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """Radians per position of each rotated pair, float32 [head_dim / 2] on CPU.

    arXiv:2104.09864 section 3.2; llama3 scaling as in Meta's Llama 3.1 reference code.
    """
    rope, dim = architecture.rope, architecture.head_dim
    inv_freq = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    if rope.kind == "default":
        return inv_freq
    if rope.kind == "linear":
        return inv_freq / rope.factor
    wavelength = 2 * math.pi / inv_freq
    longest, shortest = rope.original_positions / rope.low_freq_factor, rope.original_positions / rope.high_freq_factor
    share = (rope.original_positions / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - share) * inv_freq / rope.factor + share * inv_freq
    stretched = torch.where(wavelength > longest, inv_freq / rope.factor, inv_freq)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, stretched)


def hf_tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a Hugging Face checkpoint of this architecture holds (a tied lm_head is not one of them)."""
    a = architecture
    q_size, kv_size = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (a.hidden_size,),
        "post_attention_layernorm.weight": (a.hidden_size,),
        "self_attn.q_proj.weight": (q_size, a.hidden_size),
        "self_attn.k_proj.weight": (kv_size, a.hidden_size),
        "self_attn.v_proj.weight": (kv_size, a.hidden_size),
        "self_attn.o_proj.weight": (a.hidden_size, q_size),
    }
    if a.qkv_bias:
        layer |= {
            "self_attn.q_proj.bias": (q_size,),
            "self_attn.k_proj.bias": (kv_size,),
            "self_attn.v_proj.bias": (kv_size,),
        }
    if a.qk_norm:
        layer |= {"self_attn.q_norm.weight": (a.head_dim,), "self_attn.k_norm.weight": (a.head_dim,)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (a.vocab_size, a.hidden_size),
        "model.norm.weight": (a.hidden_size,),
    }
    dense = _swiglu_shapes("mlp.", a.hidden_size, a.ffn_size)
    sparse = _expert_layer_shapes(a) if a.experts else {}
    for number in range(a.num_layers):
        feed_forward = sparse if a.experts and a.experts.layers[number] else dense
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in (layer | feed_forward).items()}
    if not a.tied:
        shapes["lm_head.weight"] = (a.vocab_size, a.hidden_size)
    return shapes


def _swiglu_shapes(
    prefix: str, hidden_size: int, ffn_size: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, tuple[int, ...]]:
    gate, up, down = (f"{prefix}{name}.weight" for name in names)
    return {gate: (ffn_size, hidden_size), up: (ffn_size, hidden_size), down: (hidden_size, ffn_size)}


def _expert_layer_shapes(a: Architecture) -> dict[str, tuple[int, ...]]:
    """The feed-forward of a layer with experts. transformers 5 fuses the experts in memory; the files keep one by one."""
    assert a.experts is not None
    is_mixtral = a.family == "mixtral"
    block = "block_sparse_moe." if is_mixtral else "mlp."
    names = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    shapes: dict[str, tuple[int, ...]] = {f"{block}gate.weight": (a.experts.count, a.hidden_size)}
    for expert in range(a.experts.count):
        shapes |= _swiglu_shapes(f"{block}experts.{expert}.", a.hidden_size, a.experts.ffn_size, names)
    if a.experts.shared_ffn_size is not None:
        shapes |= _swiglu_shapes("mlp.shared_expert.", a.hidden_size, a.experts.shared_ffn_size)
        shapes["mlp.shared_expert_gate.weight"] = (1, a.hidden_size)
    return shapes


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """The vocabulary rounded up so that every tensor rank holds as many rows. The added rows are zero and belong to no token."""
    return math.ceil(vocab_size / tensor_parallel_size) * tensor_parallel_size
