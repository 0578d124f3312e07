"""The layers of a policy: TransformerEngine's on CUDA where installed, else plain torch ones under the same parameter names.

TransformerEngine fuses the norm before a projection into the projection, and names the norm's parameter `layer_norm_weight`
there. The torch modules below do the same, so that checkpoints, weight mapping and export see one set of names on every
device. Layers with experts keep their norm for themselves in both, since router and experts read it alike.

Experts: TransformerEngine's grouped matmuls where it is installed, else Megatron's one MLP after the other. Their parameters
are named differently (`hf_io` knows), their checkpoints alike.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from skyrl_mega.models.attention import PackedAttention
from skyrl_mega.models.biased_router import BiasedRouter
from skyrl_mega.models.elementwise import GeGLU, SwiGLU, gelu_tanh, rms_norm
from skyrl_mega.models.families import Architecture
from skyrl_mega.models.latent_attention import LatentAttention, LatentAttentionSubmodules
from skyrl_mega.models.router import CountingRouter

#: By an Architecture's name of the activation: the function, and ours of a whole gated feed-forward.
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": gelu_tanh}
GATED = {"silu": SwiGLU, "gelu_tanh": GeGLU}


def transformer_engine_layers_available(device: torch.device) -> bool:
    """True on CUDA with transformer-engine installed: its fused layers are used there, torch ones elsewhere."""
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


class RMSNorm(torch.nn.Module):
    """RMS norm (arXiv:1910.07467) whose weight knows that its gradient is partial under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.weight = _norm_weight(config, hidden_size)
        self.eps = eps
        self.unit_offset = config.layernorm_zero_centered_gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)


class NormedResidual(RMSNorm):
    """What Megatron calls the bias-dropout-add after attention or feed-forward, for models that norm its input first."""

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        return self._add

    def _add(self, x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float) -> torch.Tensor:
        x, bias = x_with_bias
        return residual + super().forward(x if bias is None else x + bias)


class RotatedByLayer(SelfAttention):
    """Megatron's self-attention where layers with a window turn by other angles than those without.

    It gets both, [T, 1, 2, rotated numbers]: the angles of full attention first.
    """

    def __init__(self, *args: Any, layer_number: int, has_window: Sequence[bool], **kwargs: Any) -> None:
        super().__init__(*args, layer_number=layer_number, **kwargs)
        self.place = int(has_window[layer_number - 1])

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb[:, :, self.place : self.place + 1], **kwargs)


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMS norm, then a projection split by output columns over tensor ranks; parameters weight, bias, layer_norm_weight.

    Under sequence parallelism the norm runs on this rank's tokens, before the projection gathers them. Low-rank adapters
    (`lora.AdaptedBy`) take what the norm gives.
    """

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = _norm_weight(config, input_size)
        self.eps = config.layernorm_epsilon
        self.unit_offset = config.layernorm_zero_centered_gamma
        self.lora: Any = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed = rms_norm(x, self.layer_norm_weight, self.eps, unit_offset=self.unit_offset)
        output = super().forward(normed, *args, **kwargs)
        return output if self.lora is None else self.lora.add_to(output, normed)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        state.pop("_extra_state", None)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


def _norm_weight(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
    weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device))
    # Megatron's finalize_model_grads adds up the gradients of such parameters over tensor ranks.
    weight.sequence_parallel = config.sequence_parallel
    return weight


def block_spec(
    config: TransformerConfig, architecture: Architecture, device: torch.device, attention_backend: str, vp_stage: int
) -> TransformerBlockSubmodules:
    """The decoder's layers and its final norm, ours or TransformerEngine's, with our packed core attention in both."""
    final_norm = RMSNorm
    if transformer_engine_layers_available(device):
        from megatron.core.extensions.transformer_engine import TENorm

        final_norm = TENorm
    first = get_transformer_layer_offset(config, vp_stage)
    has_experts = layers_with_experts(config)[first : first + get_num_layers_to_build(config, vp_stage)]
    specs = {experts: _layer(config, architecture, device, attention_backend, experts) for experts in set(has_experts)}
    # A full TransformerBlockSubmodules: given a bare layer, Megatron would put its stock norm at the end.
    return TransformerBlockSubmodules(layer_specs=[specs[experts] for experts in has_experts], layer_norm=final_norm)


def layers_with_experts(config: TransformerConfig) -> list[bool]:
    """Which layers of the whole model have experts."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(config.moe_layer_freq, int):
        return [True] * config.num_layers
    return [bool(experts) for experts in config.moe_layer_freq]


def _layer(
    config: TransformerConfig, architecture: Architecture, device: torch.device, attention_backend: str, has_experts: bool
) -> ModuleSpec:
    a, num_experts = architecture, config.num_moe_experts if has_experts else None
    if transformer_engine_layers_available(device):
        layer = _transformer_engine_layer(config, num_experts)
    else:
        layer = _torch_layer(config, num_experts, a.activation)
    attention = layer.submodules.self_attention
    attention.submodules.core_attention = partial(
        PackedAttention, backend=attention_backend, windows=a.windows, softcap=a.attention_softcap
    )
    if a.window_rope is not None:
        attention.module = RotatedByLayer
        has_window = [a.window(number) is not None for number in range(a.num_layers)]
        attention.params = {**attention.params, "has_window": has_window}
    if a.output_bias:
        attention.submodules.linear_proj = _with_bias(attention.submodules.linear_proj)
    if a.post_norms:
        post_norm = ModuleSpec(NormedResidual, {"config": config, "hidden_size": a.hidden_size, "eps": a.norm_eps})
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = post_norm
    if a.latent is not None:
        _use_latent_attention(layer, a, device)
    if has_experts:
        assert architecture.experts is not None
        layer.submodules.mlp.submodules.router = BiasedRouter if architecture.experts.is_sigmoid else CountingRouter
    return layer


def _use_latent_attention(layer: ModuleSpec, architecture: Architecture, device: torch.device) -> None:
    """Puts multi-latent attention into a layer, and the norm before it, which two projections read."""
    core_attention = layer.submodules.self_attention.submodules.core_attention
    norm: Any = RMSNorm
    parts = LatentAttentionSubmodules(ColumnParallelLinear, LayerNormColumnParallelLinear, RowParallelLinear, core_attention)
    if transformer_engine_layers_available(device):
        from megatron.core.extensions import transformer_engine as te

        norm = te.TENorm
        parts = LatentAttentionSubmodules(
            te.TEColumnParallelLinear, te.TELayerNormColumnParallelLinear, te.TERowParallelLinear, core_attention
        )
    layer.submodules.input_layernorm = norm
    layer.submodules.self_attention = ModuleSpec(module=LatentAttention, params={"architecture": architecture}, submodules=parts)


def _with_bias(projection: type) -> type:
    """The same projection, built with a bias whatever Megatron asks for: its one switch is for feed-forwards too."""

    def __init__(self: Any, *args: Any, bias: bool, **kwargs: Any) -> None:
        projection.__init__(self, *args, bias=True, **kwargs)

    return type(f"{projection.__name__}WithBias", (projection,), {"__init__": __init__})


def _torch_layer(config: TransformerConfig, num_experts: int | None, activation: str) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(num_experts=num_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer = copy.deepcopy(spec)
    submodules = layer.submodules
    gated = GATED[activation]
    submodules.input_layernorm = IdentityOp
    submodules.sharded_state_dict_keys_map = {}
    submodules.self_attention.submodules.linear_qkv = LayerNormColumnParallelLinear
    if num_experts is None:
        submodules.pre_mlp_layernorm = IdentityOp
        submodules.mlp.submodules.linear_fc1 = LayerNormColumnParallelLinear
        submodules.mlp.submodules.activation_func = gated
    else:
        submodules.pre_mlp_layernorm = RMSNorm
        submodules.mlp.submodules.experts.submodules.activation_func = gated
        submodules.mlp.submodules.shared_experts.submodules.activation_func = gated
    if config.qk_layernorm:
        submodules.self_attention.submodules.q_layernorm = RMSNorm
        submodules.self_attention.submodules.k_layernorm = RMSNorm
    return layer


def _transformer_engine_layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts, moe_grouped_gemm=num_experts is not None, qk_layernorm=config.qk_layernorm
    )
    return copy.deepcopy(spec)
