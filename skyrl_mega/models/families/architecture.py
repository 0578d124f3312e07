"""A decoder in our words: what a family's reader makes of a Hugging Face config, and all that the model is built from.

Every field changes the arithmetic or a shape. A family that needs one more adds it here, with the value that the others have as
its default, and the code that builds models honours it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from skyrl_mega.models.families.rope import Rope


@dataclass(frozen=True)
class Experts:
    """The expert layers of a mixture of experts: `per_token` of `count` experts see each token, weighted by a router's scores.

    `renormalised`: the chosen experts' weights are divided by their sum. `shared_ffn_size` is the size of one more expert that
    sees every token, behind a sigmoid gate if `has_shared_gate`; None without one. `layers` says which layers have experts, the
    others are dense.
    """

    count: int
    per_token: int
    ffn_size: int
    renormalised: bool
    shared_ffn_size: int | None
    layers: tuple[bool, ...]
    has_shared_gate: bool = True
    #: Scores are each logit's sigmoid instead of the softmax of all, and the choice goes by score plus the expert's bias.
    is_sigmoid: bool = False
    #: Experts are chosen among those of `groups_per_token` of the `groups` of neighbours, best first by their two best.
    groups: int = 1
    groups_per_token: int = 1
    #: What the chosen experts' weights are multiplied by in the end.
    scale: float = 1.0


@dataclass(frozen=True)
class Latent:
    """Multi-latent attention (see `models.latent_attention`): sizes of the latents and of the parts of a head.

    `query_rank` is None where queries are projected at once. Of a head's query and key, `plain_dim` numbers are as projected and
    `rotated_dim` carry the position, in pairs of neighbours if `interleaved`, else of halves.
    """

    query_rank: int | None
    rank: int
    plain_dim: int
    rotated_dim: int
    value_dim: int
    interleaved: bool

    @property
    def key_dim(self) -> int:
        """Size of a head's query and key."""
        return self.plain_dim + self.rotated_dim


@dataclass(frozen=True)
class Architecture:
    """A decoder, as its Hugging Face config describes it. `ffn_size` is that of dense layers; `experts` is None without any.

    `rope` rotates the layers with full attention, and those with a window too unless `window_rope` has frequencies of their own.
    """

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
    rope: Rope
    qkv_bias: bool = False
    output_bias: bool = False  #: of the attention's output projection
    qk_norm: bool = False
    experts: Experts | None = None
    #: For each layer how many tokens a query sees, its own among them; None for all. Empty: every layer sees all.
    windows: tuple[int | None, ...] = ()
    window_rope: Rope | None = None
    activation: str = "silu"  #: of the gated feed-forwards: silu, or gelu_tanh
    #: Norms multiply by 1 + weight, in float32.
    unit_offset_norms: bool = False
    #: Another norm after attention and after the feed-forward, before what they give is added.
    post_norms: bool = False
    #: Embeddings are multiplied by it, rounded to the model's dtype.
    embedding_scale: float = 1.0
    #: Scores are products of query and key times this; None: head_dim^-0.5.
    attention_scale: float | None = None
    attention_softcap: float | None = None  #: scores become cap * tanh(score / cap)
    logits_softcap: float | None = None  #: so do the LM head's logits
    latent: Latent | None = None
    #: Layers beyond `num_layers` in the files, which predict tokens further ahead: neither built nor exported.
    num_extra_layers: int = 0

    @property
    def rotary_head_dim(self) -> int:
        """Size of the part of a head that `rope` speaks of."""
        return self.head_dim if self.latent is None else self.latent.rotated_dim

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layer has an ordinary feed-forward."""
        return self.experts is None or not all(self.experts.layers)

    @property
    def softmax_scale(self) -> float:
        """What multiplies the product of a rotated query and key: what `rope` makes of cos and sin included."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale * self.rope.attention_factor**2

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, counted from 0, is an expert layer."""
        return self.experts is not None and self.experts.layers[layer]

    def window(self, layer: int) -> int | None:
        """How many tokens a query of this layer, counted from 0, sees; None for all."""
        return self.windows[layer] if self.windows else None


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """The vocabulary rounded up so that every tensor rank holds as many rows. The added rows are zero and belong to no token."""
    return math.ceil(vocab_size / tensor_parallel_size) * tensor_parallel_size
