"""Hugging Face as the oracle: float32 logits and gradients, one sequence at a time, and a weight converter of our own.

The converter shares no code with the library: it states the layout (q, k, v rows interleaved by KV group; gate
above up; experts one by one) in a few lines, so that a mistake in the library's mapping shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch


def load_oracle(path: Path):
    """The Hugging Face model in float32, in eval mode, with eager attention and experts."""
    from transformers import AutoModelForCausalLM

    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **eager).eval()


def make_sequences(lengths: Sequence[int], vocab_size: int, seed: int = 0) -> list[torch.Tensor]:
    """Random token ids, int64 [L] each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]


def make_micro_batch(sequences: Sequence[torch.Tensor]):
    """The sequences packed into a MicroBatch, with labels (next tokens), all trained."""
    from skyrl_mega.types import MicroBatch

    lengths = torch.tensor([s.numel() for s in sequences])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    labels = torch.cat([torch.cat([s[1:], s.new_zeros(1)]) for s in sequences])
    loss_mask = torch.ones_like(labels, dtype=torch.bool)
    loss_mask[cu_seqlens[1:].long() - 1] = False
    return MicroBatch(
        input_ids=torch.cat(list(sequences)),
        position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()]),
        labels=labels,
        cu_seqlens=cu_seqlens,
        max_seqlen=int(lengths.max()),
        loss_mask=loss_mask,
        rollout_logprobs=torch.zeros(labels.numel()),
        advantages=torch.zeros(labels.numel()),
        sample_index=torch.arange(len(sequences)),
        loss_tokens_per_sequence=(lengths - 1).float(),
    )


def policy_logits(hidden_TH: torch.Tensor, weight_VH: torch.Tensor, architecture) -> torch.Tensor:
    """The logits [T, V] of a policy's hidden states, capped where the architecture caps them."""
    logits, cap = hidden_TH @ weight_VH.t(), architecture.logits_softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def oracle_logits(oracle, sequences: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [T, V]: each sequence in a forward of its own, results end to end."""
    return torch.cat([oracle(s[None]).logits[0] for s in sequences])


def probe_loss(logits_TV: torch.Tensor, micro_batch) -> torch.Tensor:
    """A scalar that depends on every logit with unequal weights: sum of weighted log-probabilities of the labels."""
    logprobs = logits_TV.float().log_softmax(-1).gather(1, micro_batch.labels[:, None])[:, 0]
    weights = torch.linspace(0.5, 1.5, logprobs.numel())
    return -(logprobs * weights * micro_batch.loss_mask).sum()


def oracle_gradients(oracle, sequences: Sequence[torch.Tensor], micro_batch) -> dict[str, torch.Tensor]:
    """Gradients of `probe_loss` by Hugging Face parameter name."""
    oracle.zero_grad(set_to_none=True)
    probe_loss(oracle_logits(oracle, sequences), micro_batch).backward()
    return by_file_name({name: parameter.grad for name, parameter in oracle.named_parameters()}, oracle.config.model_type)


def by_file_name(tensors: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """Tensors under a Hugging Face model's own names, under the names of its files: transformers 5 fuses experts in memory."""
    files = {}
    for name, tensor in tensors.items():
        layer, fused, matrix = name.partition(".mlp.experts.")
        if not fused:
            files[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if family == "mixtral" else name] = tensor
            continue
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[matrix]
        for expert, one in enumerate(tensor):
            for part, rows in zip(parts, one.chunk(len(parts)), strict=True):
                files[_expert_file_name(layer, expert, part, family)] = rows
    return files


def _expert_file_name(layer: str, expert: int, part: str, family: str) -> str:
    if family == "mixtral":
        number = {"gate_proj": 1, "down_proj": 2, "up_proj": 3}[part]
        return f"{layer}.block_sparse_moe.experts.{expert}.w{number}.weight"
    return f"{layer}.mlp.experts.{expert}.{part}.weight"


def to_megatron(tensors: dict[str, torch.Tensor], name: str, architecture) -> torch.Tensor:
    """The full (unsplit) Megatron tensor of parameter `name`, from Hugging Face tensors (weights or gradients alike)."""
    if name == "embedding.word_embeddings.weight":
        return tensors["model.embed_tokens.weight"]
    if name == "output_layer.weight":
        return tensors["lm_head.weight"]
    if name == "decoder.final_layernorm.weight":
        return tensors["model.norm.weight"]
    number, part = name.removeprefix("decoder.layers.").split(".", 1)
    layer = f"model.layers.{number}."
    kind = part.rpartition(".")[2]
    if part.startswith("self_attention.linear_qkv.") and kind != "layer_norm_weight":
        rows = []
        heads_per_group = architecture.num_heads // architecture.num_kv_heads
        q, k, v = (tensors[f"{layer}self_attn.{x}_proj.{kind}"].split(architecture.head_dim) for x in "qkv")
        for group in range(architecture.num_kv_heads):
            rows += [*q[group * heads_per_group : (group + 1) * heads_per_group], k[group], v[group]]
        return torch.cat(rows)
    if part == "mlp.linear_fc1.weight":
        return torch.cat([tensors[f"{layer}mlp.gate_proj.weight"], tensors[f"{layer}mlp.up_proj.weight"]])
    if part == "mlp.shared_experts.linear_fc1.weight":
        shared = "shared_expert" if architecture.family == "qwen2_moe" else "shared_experts"
        return torch.cat([tensors[f"{layer}mlp.{shared}.{x}_proj.weight"] for x in ("gate", "up")])
    if part.startswith("mlp.experts.local_experts."):
        expert, matrix = int(part.split(".")[3]), part.split(".")[4]
        parts = ("gate_proj", "up_proj") if matrix == "linear_fc1" else ("down_proj",)
        names = [_expert_file_name(layer[:-1], expert, x, architecture.family) for x in parts]
        return torch.cat([tensors[x] for x in names])
    plain = {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
        "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
        "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
        "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
        "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
        "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
        "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
        "self_attn_bda.weight": "post_attention_layernorm.weight",
        "mlp_bda.weight": "post_feedforward_layernorm.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_feedforward_layernorm.weight"
        if architecture.post_norms
        else "post_attention_layernorm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.router.weight": "block_sparse_moe.gate.weight" if architecture.family == "mixtral" else "mlp.gate.weight",
        "mlp.shared_experts.linear_fc2.weight": "mlp.shared_expert.down_proj.weight"
        if architecture.family == "qwen2_moe"
        else "mlp.shared_experts.down_proj.weight",
        "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
    }
    return tensors[layer + plain[part]]
