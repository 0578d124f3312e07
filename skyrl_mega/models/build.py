"""A trainable policy: Megatron-Core's GPT model of a Hugging Face architecture, whose forward returns hidden states.

The loss never needs all the logits at once, so the model stops before the LM head: training computes log-probabilities from
`hidden_TH` and `output_weight(model)` in chunks. Shape letters: T packed tokens, H hidden size, V local vocabulary rows.

Gradients of hidden states. Every tensor rank gets the same [T, H] hidden states and must bring back the same, complete [T, H]
gradient (a vocabulary-parallel head therefore sums its gradient over `topology.tp_group`). The backward of the sequence-parallel
gather then takes this rank's rows of it, without another sum.

Vocabulary. Megatron splits the embedding evenly over tensor ranks, so the padded vocabulary is the next multiple of the tensor
size; no further padding is added. Padded rows are zero and belong to no token: `vocab_range` says which local rows are real.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from skyrl_mega.config.schema import Config
from skyrl_mega.data.routing import UNKNOWN_EXPERT
from skyrl_mega.errors import BackendUnavailableError, ConfigError, DataError
from skyrl_mega.models.activation_offload import ActivationOffload
from skyrl_mega.models.attention import choose_backend
from skyrl_mega.models.attention_layout import AttentionLayout
from skyrl_mega.models.families import Architecture, inverse_frequencies, padded_vocab_size, read_architecture
from skyrl_mega.models.layers import ACTIVATIONS, block_spec, transformer_engine_layers_available
from skyrl_mega.models.router import freeze_routers
from skyrl_mega.models.router_replay import hand_rows_to_routers
from skyrl_mega.parallel.device import install_megatron_cpu_shim
from skyrl_mega.parallel.topology import Topology
from skyrl_mega.types import ContextPart, MicroBatch

#: In the names of the parameters of routed experts, and of no other.
EXPERTS = ".mlp.experts."
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class PolicyModel(GPTModel):
    """Megatron-Core's GPTModel, or a chunk of its layers, over packed sequences; `forward` returns hidden states.

    `vocab_size` counts the real tokens, `padded_vocab_size` the rows over all tensor ranks. `implementation` says which layers
    and which attention run ("torch" or "transformer_engine"; "sdpa", "flash" or "transformer_engine").
    """

    #: Whether passes replay the routing that comes with a micro-batch; without, it is ignored.
    replays_routing = False
    #: Whether the last stage holds an LM head; `value.ValueModel` has another one in its place.
    has_lm_head = True
    #: `lora.Adapters`, where low-rank adapters lie beside the weights.
    adapters: Any = None

    def __init__(
        self, config: TransformerConfig, architecture: Architecture, topology: Topology, attention_backend: str, vp_stage: int
    ) -> None:
        device = topology.device
        last_chunk = (config.virtual_pipeline_model_parallel_size or 1) - 1
        padded = padded_vocab_size(architecture.vocab_size, config.tensor_model_parallel_size)
        super().__init__(
            config,
            block_spec(config, architecture, device, attention_backend, vp_stage),
            vocab_size=padded,
            max_sequence_length=architecture.max_positions,
            pre_process=topology.pp_rank == 0 and vp_stage == 0,
            post_process=topology.is_last_stage and vp_stage == last_chunk,
            vp_stage=vp_stage,
            # Megatron's rotary module knows fewer kinds than Hugging Face configs have; ours is three lines in `_rotary`.
            position_embedding_type="none",
            share_embeddings_and_output_weights=architecture.tied and self.has_lm_head,
            parallel_output=True,
        )
        self.architecture = architecture
        self.vocab_size = architecture.vocab_size
        self.padded_vocab_size = padded
        layers = "transformer_engine" if transformer_engine_layers_available(device) else "torch"
        self.implementation = {"layers": layers, "attention": attention_backend}
        ropes = [rope for rope in (architecture.rope, architecture.window_rope) if rope is not None]
        # A plain attribute: a buffer would follow the model into bfloat16, where positions above 256 lose their value.
        self._inv_freqs = [inverse_frequencies(rope, architecture.rotary_head_dim).to(device) for rope in ropes]
        # Rounded to the model's dtype, as Hugging Face rounds it.
        self._embedding_scale = torch.tensor(architecture.embedding_scale, dtype=config.params_dtype).item()

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: int,
        prefix_segments: torch.Tensor | None = None,
        context: ContextPart | None = None,
        routed_experts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm, [T, H] in the model's dtype, the same on every tensor rank.

        *All tensor and context ranks.* T are this context rank's tokens (with `context`, a multiple of the
        tensor ranks under sequence parallelism).

        A pipeline stage that is not the last gives what the next one takes, [T, 1, H] (this tensor rank's rows of it under
        sequence parallelism); a later stage takes it from Megatron's schedule. input_ids, position_ids int64 [T]; cu_seqlens
        int32 [S+1]; position_ids count from 0 in each sequence (a branch on a shared prompt goes on counting); prefix_segments
        int64 [S], context and routed_experts [T, layers, K] as in MicroBatch. Differentiable.
        """
        num_tokens = input_ids.size(0)
        if self.config.sequence_parallel:
            input_ids, position_ids, cu_seqlens = self._pad_to_tensor_ranks(input_ids, position_ids, cu_seqlens)
        # Megatron's layers hand this argument to their routers.
        routing = {} if routed_experts is None else {"padding_mask": self._my_routing(routed_experts, input_ids.size(0))}
        layout = AttentionLayout(cu_seqlens, max_seqlen, prefix_segments, context)
        # A later stage's block takes its input from the schedule, which has set it.
        hidden = self._embed(input_ids, position_ids) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self._rotary(position_ids),
            packed_seq_params=layout,
            **routing,
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.squeeze(1)[:num_tokens]

    def _embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids=input_ids[None], position_ids=position_ids[None])
        return hidden if self._embedding_scale == 1.0 else hidden * self._embedding_scale

    def _rotary(self, position_ids: torch.Tensor) -> torch.Tensor:
        """The angle of each token and each rotated pair, float32 [T, 1, R, rotated numbers], halves repeated as in Llama's code.

        R is 2, and the second for layers with a window, where these have angles of their own.
        """
        angles_TRD = torch.stack([torch.outer(position_ids.float(), inv_freq) for inv_freq in self._inv_freqs], dim=1)
        return torch.cat((angles_TRD, angles_TRD), dim=-1)[:, None]

    def _my_routing(self, rows_TLK: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """The rows of the tokens that this tensor rank's routers see, of `num_tokens` with the padding."""
        experts = self.architecture.experts
        shape = None if experts is None else (self.architecture.num_layers, experts.per_token)
        if rows_TLK.shape[1:] != shape:
            raise DataError(
                f"routed_experts is {tuple(rows_TLK.shape)}; it must be [tokens, layers, experts per token]: {shape}."
            )
        rows_TLK = F.pad(rows_TLK, (0, 0, 0, 0, 0, num_tokens - rows_TLK.size(0)), value=UNKNOWN_EXPERT)
        if not self.config.sequence_parallel:
            return rows_TLK
        tp = self.pg_collection.tp
        return rows_TLK.chunk(tp.size())[tp.rank()]

    def _pad_to_tensor_ranks(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cu_seqlens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Adds one sequence of zeros, cut off again at the end, where T doesn't divide by the tensor ranks."""
        missing = -input_ids.size(0) % self.config.tensor_model_parallel_size
        if not missing:
            return input_ids, position_ids, cu_seqlens
        input_ids = F.pad(input_ids, (0, missing))
        position_ids = torch.cat([position_ids, torch.arange(missing, device=position_ids.device)])
        return input_ids, position_ids, torch.cat([cu_seqlens, cu_seqlens[-1:] + missing])


def build_model(config: Config, topology: Topology, model_class: type[PolicyModel] = PolicyModel) -> list[PolicyModel]:
    """This rank's chunks of the model of `config.model.path`, first layers first, allocated and not yet filled. *All ranks.*

    One chunk, or `parallel.virtual_pipeline` of them; the head is in the last chunk of the last stage. `model_class` is
    PolicyModel, or ValueModel for a critic. Fill them with `hf_io.load_hf_weights` or a checkpoint. Raises ModelLoadError (the
    model is not supported), ConfigError (the layout does not fit it), BackendUnavailableError (the attention asked for can't run
    here).
    """
    install_megatron_cpu_shim()
    architecture = read_architecture(config.model.path)
    _check_positions(architecture, config.rollout.max_model_len)
    _check_layout(architecture, topology, config.parallel.virtual_pipeline)
    _check_transformer_engine(config, topology.device)
    dtype = DTYPES[config.model.dtype]
    softcap = architecture.attention_softcap is not None
    backend = choose_backend(config.model.attention, topology.device, dtype, softcap=softcap)
    layout = transformer_config(architecture, config, topology)
    chunks = [
        model_class(layout, architecture, topology, backend, vp_stage).to(topology.device)
        for vp_stage in range(config.parallel.virtual_pipeline)
    ]
    for chunk in chunks:
        chunk.replays_routing = config.model.router_replay != "off"
        hand_rows_to_routers(chunk)
    if config.model.freeze_router:
        freeze_routers(chunks)
    if config.model.offload_layers:
        offload = ActivationOffload(topology.device)
        for chunk in chunks:
            offload.wrap(chunk.decoder.layers[: config.model.offload_layers])
    for name, parameter in itertools.chain.from_iterable(chunk.named_parameters() for chunk in chunks):
        # Megatron's gradient norm counts a parameter once over tensor ranks by these attributes.
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        if EXPERTS in name:
            # Gradients are added up over the ranks that hold copies of this expert. Megatron says so only where experts are
            # sharded; saying it always is also right with whole experts beside split attention, and gives every layout the same
            # two optimizers, so that checkpoints fit. No other tensor rank's shard is a duplicate of this one.
            parameter.allreduce = False
            parameter.tensor_model_parallel = True
    return chunks


def transformer_config(architecture: Architecture, config: Config, topology: Topology) -> TransformerConfig:
    """Megatron's configuration of the architecture in this layout."""
    a, dtype = architecture, DTYPES[config.model.dtype]
    interleaved = config.parallel.virtual_pipeline if config.parallel.virtual_pipeline > 1 else None
    return TransformerConfig(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        num_attention_heads=a.num_heads,
        num_query_groups=a.num_kv_heads,
        kv_channels=a.head_dim,
        ffn_hidden_size=a.ffn_size,
        layernorm_epsilon=a.norm_eps,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=a.unit_offset_norms,
        gated_linear_unit=True,
        # Torch layers take theirs from the layer spec (see use_te_activation_func), and Megatron refuses here what it has no
        # name for.
        activation_func=ACTIVATIONS[a.activation] if transformer_engine_layers_available(topology.device) else F.silu,
        add_bias_linear=False,
        add_qkv_bias=a.qkv_bias,
        qk_layernorm=a.qk_norm,
        softmax_scale=a.softmax_scale,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        virtual_pipeline_model_parallel_size=interleaved,
        # With the batched exchange interleaved stages got wrong gradients, silently (seen over gloo).
        overlap_p2p_comm=interleaved is not None,
        batch_p2p_comm=interleaved is None,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        context_parallel_size=topology.cp_size,
        sequence_parallel=config.parallel.sequence_parallel and topology.tp_size > 1,
        # Micro-batches differ in their number of tokens: stages tell each other the shape before they send.
        variable_seq_lengths=topology.pp_size > 1,
        moe_token_dispatcher_type="alltoall",  # in dense models too: the default refuses variable lengths
        use_cpu_initialization=topology.device.type == "cpu",
        # Weights always come from a file; initialising is still switched on, because Megatron marks there how each is split.
        init_method=_leave_unfilled,
        output_layer_init_method=_leave_unfilled,
        embedding_init_method=_leave_unfilled,
        # Losses are sums over tokens divided by the global token count. DDP reads this when it is built: set later, gradients of
        # data-parallel ranks would be averaged on top.
        calculate_per_token_loss=True,
        # Fused kernels need CUDA extensions (apex, TransformerEngine) or torch.compile at the first call; torch runs without.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        # Megatron's name for "the layer spec says which module the activation is": ours are in `elementwise`.
        use_te_activation_func=not transformer_engine_layers_available(topology.device),
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],  # unused; Megatron's own default warns that it is deprecated
        tp_comm_overlap=config.parallel.overlap_tensor,
        **_memory_settings(config),
        **_expert_settings(architecture, config, topology),
    )


def _expert_settings(architecture: Architecture, config: Config, topology: Topology) -> dict[str, Any]:
    """What a mixture of experts adds to Megatron's configuration. No token is ever dropped."""
    experts = architecture.experts
    if experts is None:
        return {}
    every_layer = all(experts.layers)
    balanced = config.model.moe_aux_loss_coef > 0
    return dict(
        num_moe_experts=experts.count,
        moe_ffn_hidden_size=experts.ffn_size,
        moe_layer_freq=1 if every_layer else [int(has_experts) for has_experts in experts.layers],
        moe_router_topk=experts.per_token,
        # Softmax over all experts and then the choice; or the choice first, which renormalises the chosen ones.
        moe_router_pre_softmax=not experts.renormalised,
        moe_router_score_function="sigmoid" if experts.is_sigmoid else "softmax",
        moe_router_num_groups=experts.groups if experts.groups_per_token < experts.groups else None,
        moe_router_group_topk=experts.groups_per_token if experts.groups_per_token < experts.groups else None,
        moe_router_topk_scaling_factor=experts.scale if experts.scale != 1 else None,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss" if balanced else "none",
        moe_aux_loss_coeff=config.model.moe_aux_loss_coef,
        moe_z_loss_coeff=config.model.moe_z_loss_coef or None,
        moe_shared_expert_intermediate_size=experts.shared_ffn_size,
        moe_shared_expert_gate=experts.shared_ffn_size is not None and experts.has_shared_gate,
        moe_grouped_gemm=transformer_engine_layers_available(topology.device),
        expert_model_parallel_size=topology.ep_size,
        expert_tensor_parallel_size=topology.etp_size,
    )


def _memory_settings(config: Config) -> dict[str, Any]:
    """What Megatron calls activation recomputation and fp8."""
    model = config.model
    settings: dict[str, Any] = {}
    if model.recompute == "selective":
        settings |= {"recompute_granularity": "selective", "recompute_modules": list(model.recompute_modules)}
    elif model.recompute == "full":
        method, layers = ("block", model.recompute_layers) if model.recompute_layers else ("uniform", 1)
        settings |= {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}
    if model.fp8 != "off":
        # e4m3 has the finer steps; only the recipes with one scale for a whole tensor need e5m2's range for gradients.
        settings |= {"fp8": "hybrid" if model.fp8 in ("delayed", "tensorwise") else "e4m3", "fp8_recipe": model.fp8}
    return settings


def _check_transformer_engine(config: Config, device: torch.device) -> None:
    """Refuses what only TransformerEngine's layers can do where they don't run."""
    asked = {
        "model.fp8": config.model.fp8 != "off",
        "parallel.overlap_tensor": config.parallel.overlap_tensor,
    }
    names = [f"`{name}`" for name, is_asked in asked.items() if is_asked]
    if names and not transformer_engine_layers_available(device):
        raise BackendUnavailableError(
            f"{', '.join(names)} needs TransformerEngine's layers, and the device is {device.type} "
            f"{'without the package transformer-engine' if device.type == 'cuda' else ''}: install the extra "
            "(pip install 'skyrl-mega[te]') on a CUDA machine, or leave it out."
        )


def _leave_unfilled(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _check_positions(architecture: Architecture, max_model_len: int) -> None:
    """Refuses sequences so long that the rotary frequencies of the whole batch would be others."""
    longest = architecture.rope.longest_exact
    if longest is not None and max_model_len > longest:
        raise ConfigError(
            f"`rollout.max_model_len` ({max_model_len}) must not exceed the original positions ({longest}) of a model with "
            f"longrope: beyond them vLLM and Hugging Face rotate differently; set it to {longest} or less."
        )


def _check_layout(architecture: Architecture, topology: Topology, virtual_pipeline: int) -> None:
    chunks = topology.pp_size * virtual_pipeline
    if architecture.num_layers % chunks:
        raise ConfigError(
            f"`parallel.pipeline` x `parallel.virtual_pipeline` ({topology.pp_size} x {virtual_pipeline} = {chunks}) must divide "
            f"the model's layers ({architecture.num_layers})."
        )
    _check_expert_layout(architecture, topology)
    counts = {"attention heads": architecture.num_heads, "KV heads": architecture.num_kv_heads}
    if architecture.has_dense_layers:
        counts["feed-forward size"] = architecture.ffn_size
    if architecture.experts is not None and architecture.experts.shared_ffn_size is not None:
        counts["shared expert's feed-forward size"] = architecture.experts.shared_ffn_size
    for what, count in counts.items():
        if count % topology.tp_size:
            raise ConfigError(
                f"`parallel.tensor` ({topology.tp_size}) must divide the model's {what} ({count}); choose a divisor of {count}."
            )


def _check_expert_layout(architecture: Architecture, topology: Topology) -> None:
    experts, ep, etp = architecture.experts, topology.ep_size, topology.etp_size
    if experts is None:
        if ep > 1 or etp > 1:
            raise ConfigError(
                f"`parallel.expert` ({ep}) and `parallel.expert_tensor` ({etp}) must be 1: this {architecture.family} model has "
                "no experts."
            )
        return
    if experts.count % ep:
        raise ConfigError(
            f"`parallel.expert` ({ep}) must divide the model's experts ({experts.count}); choose a divisor of {experts.count}."
        )
    if experts.ffn_size % etp:
        raise ConfigError(
            f"`parallel.expert_tensor` ({etp}) must divide the experts' feed-forward size ({experts.ffn_size}); set it to 1."
        )


def sharded_state(chunks: Sequence[PolicyModel], *, prefix: str = "") -> dict[str, Any]:
    """The weights of this rank's chunks as a Megatron dist checkpoint holds them, independent of the layout. *All ranks.*

    There every name begins with `prefix`; the dictionaries that are returned go by the model's own names.
    """
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    state = {f"chunk{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    add_prefix_for_sharding(state, prefix)
    return state


def load_state(chunks: Sequence[PolicyModel], state: dict[str, Any]) -> None:
    """Restores what `sharded_state` described, once it is loaded."""
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"chunk{number}"], strict=True)


def unwrap(model: torch.nn.Module) -> PolicyModel:
    """The PolicyModel inside Megatron's wrappers (DDP)."""
    while not isinstance(model, PolicyModel):
        model = model.module
    return model


def forward_hidden(model: torch.nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """Hidden states [T, H] of a micro-batch, through `model` or its DDP wrapper; moves the inputs to the model's device.

    *All tensor and context ranks.* See `PolicyModel.forward`, also for what a pipeline stage before the last returns. The last
    stage of a ValueModel gives values instead.
    """
    device = next(model.parameters()).device
    routed_experts = micro_batch.routed_experts if unwrap(model).replays_routing else None
    return model(
        input_ids=micro_batch.input_ids.to(device),
        position_ids=micro_batch.position_ids.to(device),
        cu_seqlens=micro_batch.cu_seqlens.to(device),
        max_seqlen=micro_batch.max_seqlen,
        prefix_segments=micro_batch.prefix_segments,
        context=micro_batch.context,
        routed_experts=None if routed_experts is None else routed_experts.to(device),
    )


def output_weight(model: torch.nn.Module) -> torch.nn.Parameter:
    """The LM head's rows on this tensor rank, [V_local, H]: the embedding itself where the model ties them.

    `model` is the last chunk, on the last pipeline stage; with tied weights and several stages it is that stage's copy of the
    embedding.
    """
    policy = unwrap(model)
    if policy.share_embeddings_and_output_weights:
        return policy.shared_embedding_or_output_weight()
    return policy.output_layer.weight


def vocab_range(model: torch.nn.Module) -> tuple[int, int]:
    """(start, end_valid): this rank's head rows are the tokens start, start + 1, ...; rows from end_valid on are padding.

    `end_valid - start` is the number of real local rows (0 where the whole shard is padding).
    """
    policy = unwrap(model)
    rows = output_weight(model).size(0)
    start = policy.pg_collection.tp.rank() * rows
    return start, max(start, min(start + rows, policy.vocab_size))
