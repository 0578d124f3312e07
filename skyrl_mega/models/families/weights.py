"""Which Hugging Face tensors each parameter of a Megatron model holds, and how: the vocabulary of the families' tables.

A table is a list of `Weight`s, one for each parameter of the whole model (all layers, all experts, unsplit). From it follow the
tensors that a checkpoint must hold, the order of an export, and what each rank reads and gives: there is no second list.

Names of parameters are Megatron's, those of experts as `mlp.experts.{expert}.linear_fc1.weight` (its modules and
TransformerEngine's grouped matmuls have each their own spelling; `models.weight_map` knows). The functions below give the parts
that most decoders share, relative to a layer: parameters under `decoder.layers.{layer}.`, tensors under `model.layers.{layer}.`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from skyrl_mega.models.families.architecture import Architecture

Shape = tuple[int, ...]


class Split(Enum):
    """How a parameter is cut over tensor ranks (over expert-tensor ranks, for experts)."""

    WHOLE = "every rank holds all of it"
    ROWS = "by rows, dimension 0, of each of its tensors"
    COLUMNS = "by columns, dimension 1"
    VOCABULARY = "by rows, after zero rows were added until the ranks divide them"


@dataclass(frozen=True)
class Weight:
    """A parameter of the whole Megatron model, and the Hugging Face tensors in it, with their shapes.

    Several tensors lie one below the other in it; with `groups`, each is cut into as many blocks of rows, and the first block
    of each comes first, then the second of each, and so on (q, k, v by key/value head).
    """

    parameter: str
    tensors: Mapping[str, Shape]
    split: Split = Split.WHOLE
    groups: int = 1
    #: The number of the expert that it belongs to, in the whole layer.
    expert: int | None = None
    #: Kept, loaded and compared in float32 whatever the model's dtype is.
    is_float32: bool = False


def placed(weights: Iterable[Weight], parameter_prefix: str, tensor_prefix: str) -> list[Weight]:
    """The weights with a prefix before the names of parameters, and another before those of tensors."""
    return [
        replace(
            weight,
            parameter=parameter_prefix + weight.parameter,
            tensors={tensor_prefix + name: shape for name, shape in weight.tensors.items()},
        )
        for weight in weights
    ]


def vector(parameter: str, name: str, size: int) -> Weight:
    """A norm's weight, or another vector that every rank holds."""
    return Weight(parameter, {name: (size,)})


def attention(a: Architecture) -> list[Weight]:
    """Grouped-query attention behind its norm, as Llama's files name it, with biases and q, k norms where `a` has them."""
    q, kv, hidden = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim, a.hidden_size
    rows = {"q": q, "k": kv, "v": kv}
    weights = {f"self_attn.{part}_proj.weight": (size, hidden) for part, size in rows.items()}
    table = [Weight("self_attention.linear_qkv.weight", weights, Split.ROWS, a.num_kv_heads)]
    if a.qkv_bias:
        biases = {f"self_attn.{part}_proj.bias": (size,) for part, size in rows.items()}
        table.append(Weight("self_attention.linear_qkv.bias", biases, Split.ROWS, a.num_kv_heads))
    table.append(vector("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", hidden))
    table.append(Weight("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, q)}, Split.COLUMNS))
    if a.output_bias:
        table.append(vector("self_attention.linear_proj.bias", "self_attn.o_proj.bias", hidden))
    if a.qk_norm:
        table.append(vector("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", a.head_dim))
        table.append(vector("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", a.head_dim))
    return table


#: What Llama's files call the three matrices of a gated feed-forward.
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def gated_ffn(
    parameter_prefix: str, tensor_prefix: str, hidden: int, ffn: int, names: tuple[str, str, str] = GATE_UP_DOWN
) -> list[Weight]:
    """A gated feed-forward: gate above up in `linear_fc1`, down in `linear_fc2`."""
    gate, up, down = (f"{name}.weight" for name in names)
    table = [
        Weight("linear_fc1.weight", {gate: (ffn, hidden), up: (ffn, hidden)}, Split.ROWS),
        Weight("linear_fc2.weight", {down: (hidden, ffn)}, Split.COLUMNS),
    ]
    return placed(table, parameter_prefix, tensor_prefix)


def dense_ffn(a: Architecture, norm: str = "post_attention_layernorm.weight") -> list[Weight]:
    """The feed-forward of a layer without experts, with the norm before it."""
    before = vector("mlp.linear_fc1.layer_norm_weight", norm, a.hidden_size)
    return [before, *gated_ffn("mlp.", "mlp.", a.hidden_size, a.ffn_size)]


def expert_ffn(a: Architecture, block: str = "mlp.", names: tuple[str, str, str] = GATE_UP_DOWN) -> list[Weight]:
    """A layer's norm, router and experts, which files hold one by one; `block` is their place in the files."""
    assert a.experts is not None
    table = [
        vector("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", a.hidden_size),
        Weight("mlp.router.weight", {f"{block}gate.weight": (a.experts.count, a.hidden_size)}),
    ]
    for number in range(a.experts.count):
        places = f"mlp.experts.{number}.", f"{block}experts.{number}."
        expert = gated_ffn(*places, a.hidden_size, a.experts.ffn_size, names)
        table += [replace(weight, expert=number) for weight in expert]
    return table


def llama_layer(a: Architecture, layer: int) -> list[Weight]:
    """A layer of a dense decoder as Llama's files name it, or with experts as Qwen's do."""
    return attention(a) + (expert_ffn(a) if a.has_experts(layer) else dense_ffn(a))
