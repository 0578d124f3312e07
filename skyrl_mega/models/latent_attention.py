"""Multi-latent attention (DeepSeek-V2, arXiv:2405.04434 section 2.1): keys and values of all heads grow out of one small latent.

    latent_R, k_rot_P = kv_down(x)          one latent of rank R, and one rotated key of P numbers for all heads
    k_nope_D, v_E     = kv_up(norm(latent)) for each head
    q_nope_D, q_rot_P = q_up(norm(q_down(x))), or of one projection where queries have no latent
    scores            = (q_nope . k_nope + rotate(q_rot) . rotate(k_rot)) * scale

Megatron has the same block; it rotates by the place in the row, not by each token's own position, and so knows no packs of ours.
Parameters have Megatron's (TransformerEngine's) names: the norm of a latent lies in the projection up.

Tensor parallelism splits the heads: the projections up and out. Every tensor rank computes the latents whole, of its own tokens
under sequence parallelism, where the gradients of the projections down are parts that Megatron adds up. The rotated key reaches
every rank's heads, so its gradient is added up over ranks on the way back.

Shape letters: T tokens of all tensor ranks, t this rank's (T without sequence parallelism), h this rank's heads, P rotated and
D other numbers of a key, E numbers of a value.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from skyrl_mega.models.families.architecture import Architecture

#: Hugging Face's code gives the norms of latents this constant, whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


@dataclass
class LatentAttentionSubmodules:
    """The classes of its parts: projections split by columns, with and without a norm before them, and by rows."""

    column_parallel: Any
    normed_column_parallel: Any
    row_parallel: Any
    core_attention: Any


class ReplicatedLinear(torch.nn.Module):
    """A projection that every tensor rank holds whole, without bias; low-rank adapters (`lora.AdaptedBy`) add to its output."""

    def __init__(self, config: TransformerConfig, input_size: int, output_size: int) -> None:
        super().__init__()
        device = torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        # Megatron's finalize_model_grads adds up the gradients of such parameters over tensor ranks.
        self.weight.sequence_parallel = config.sequence_parallel
        self.lora: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = F.linear(x, self.weight)
        return output if self.lora is None else self.lora.add_to((output, None), x)[0]


class LatentAttention(MegatronModule):
    """[t, 1, hidden] -> ([t, 1, hidden], None), over the pack whose AttentionLayout is `packed_seq_params`.

    *All tensor ranks*, and under context parallelism all context ranks: keys and values of all heads are gathered then.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LatentAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        *,
        architecture: Architecture,
    ) -> None:
        super().__init__(config=config)
        a, latent = architecture, architecture.latent
        assert latent is not None
        self.latent = latent
        self.attention_factor = a.rope.attention_factor
        self.tp_group = pg_collection.tp
        self.recomputes_core = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        latent_config = copy.copy(config)
        latent_config.layernorm_epsilon = LATENT_NORM_EPS
        query_size = a.num_heads * latent.key_dim
        if latent.query_rank is None:
            self.linear_q_proj = self._column_parallel(submodules.column_parallel, config, a.hidden_size, query_size)
        else:
            self.linear_q_down_proj = ReplicatedLinear(config, a.hidden_size, latent.query_rank)
            self.linear_q_up_proj = self._column_parallel(
                submodules.normed_column_parallel, latent_config, latent.query_rank, query_size
            )
        self.linear_kv_down_proj = ReplicatedLinear(config, a.hidden_size, latent.rank + latent.rotated_dim)
        self.linear_kv_up_proj = self._column_parallel(
            submodules.normed_column_parallel,
            latent_config,
            latent.rank,
            a.num_heads * (latent.plain_dim + latent.value_dim),
        )
        self.core_attention = submodules.core_attention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            softmax_scale=a.attention_scale,  # what yarn makes of cos and sin multiplies the rotated part alone
            k_channels=latent.key_dim,
            v_channels=latent.value_dim,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.linear_proj = build_module(
            submodules.row_parallel,
            a.num_heads * latent.value_dim,
            a.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
        )

    def _column_parallel(self, spec: Any, config: TransformerConfig, input_size: int, output_size: int) -> torch.nn.Module:
        return build_module(
            spec,
            input_size,
            output_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        rotary_pos_emb: torch.Tensor,
        packed_seq_params: Any,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`rotary_pos_emb` float32 [T, 1, 1, P]: the angle of each token and rotated pair, halves repeated."""
        latent = self.latent
        query_T1hX = self._queries(hidden_states)
        kv_t1R, k_rot_t1P = self.linear_kv_down_proj(hidden_states).split([latent.rank, latent.rotated_dim], dim=-1)
        kv_T1hX = self.linear_kv_up_proj(kv_t1R.contiguous())[0].unflatten(-1, (-1, latent.plain_dim + latent.value_dim))
        k_nope, value = kv_T1hX.split([latent.plain_dim, latent.value_dim], dim=-1)
        if self.config.sequence_parallel:
            k_rot_T1P = tensor_parallel.gather_from_sequence_parallel_region(k_rot_t1P, group=self.tp_group)
        else:
            k_rot_T1P = tensor_parallel.copy_to_tensor_model_parallel_region(k_rot_t1P, group=self.tp_group)
        q_nope, q_rot = query_T1hX.split([latent.plain_dim, latent.rotated_dim], dim=-1)
        query = torch.cat([q_nope, self._rotate(q_rot, rotary_pos_emb)], dim=-1)
        k_rot = self._rotate(k_rot_T1P[:, :, None], rotary_pos_emb).expand(-1, -1, k_nope.size(2), -1)
        key = torch.cat([k_nope, k_rot], dim=-1)
        return self.linear_proj(self._attend(query, key, value.contiguous(), packed_seq_params))

    def _queries(self, hidden_t1H: torch.Tensor) -> torch.Tensor:
        """[T, 1, h, D + P]."""
        if self.latent.query_rank is None:
            query = self.linear_q_proj(hidden_t1H)[0]
        else:
            query = self.linear_q_up_proj(self.linear_q_down_proj(hidden_t1H))[0]
        return query.unflatten(-1, (-1, self.latent.key_dim))

    def _rotate(self, x_T1hP: torch.Tensor, angles_T11P: torch.Tensor) -> torch.Tensor:
        """The rotated numbers; pairs are neighbours where the family interleaves them, else of the two halves.

        The result holds the pairs' first numbers, then their second ones: one order of both queries and keys, so scores are
        those of any other.
        """
        angles = angles_T11P.chunk(2, dim=-1)[0]
        cos, sin = ((f(angles) * self.attention_factor).to(x_T1hP.dtype) for f in (torch.cos, torch.sin))
        first, second = (x_T1hP[..., 0::2], x_T1hP[..., 1::2]) if self.latent.interleaved else x_T1hP.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Any) -> torch.Tensor:
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return self.core_attention(query, key, value, None, packed_seq_params=layout)

        if self.recomputes_core and self.training:
            return tensor_parallel.checkpoint(attend, False, query, key, value)
        return attend(query, key, value)
