"""What a family of models is to us: how its config is read, which settings are refused, and its table of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from skyrl_mega.errors import ModelLoadError
from skyrl_mega.models.families.architecture import Architecture
from skyrl_mega.models.families.rope import read_rope
from skyrl_mega.models.families.weights import Weight, llama_layer


@dataclass(frozen=True)
class Rule:
    """A setting that is refused unless `fine(its value)`; `why` says what is built instead. Absent settings are fine."""

    setting: str
    fine: Callable[[Any], bool]
    why: str


def off(setting: str, why: str) -> Rule:
    """Refuses a setting that is switched on."""
    return Rule(setting, lambda value: not value, why)


def one_of(setting: str, values: Sequence[Any], why: str) -> Rule:
    """Refuses any other value."""
    return Rule(setting, lambda value: value in values, why)


SILU = one_of("hidden_act", ("silu", "swish"), "only silu is built")
#: What no family may have.
COMMON_RULES = (
    off("attention_dropout", "training runs without dropout; set it to 0.0"),
    off("quantization_config", "export the model in bfloat16 or float32 first"),
    off("is_encoder_decoder", "only decoders are built"),
)


@dataclass(frozen=True)
class Family:
    """A family of models: what we make of its configs and files. `name` is Hugging Face's `model_type`.

    `read` gives the architecture of a Hugging Face config object (transformers'), once `rules` and COMMON_RULES have passed.
    `layer_weights(architecture, layer)` is the table of one layer, names relative to it; embedding, final norm and head are the
    same in all families.
    """

    name: str
    read: Callable[[Any], Architecture]
    rules: tuple[Rule, ...] = (SILU,)
    layer_weights: Callable[[Architecture, int], list[Weight]] = llama_layer

    def architecture(self, hf_config: Any) -> Architecture:
        """The architecture of a Hugging Face config object. Raises ModelLoadError for a setting that is not built."""
        for rule in (*self.rules, *COMMON_RULES):
            value = getattr(hf_config, rule.setting, None)
            if value is not None and not rule.fine(value):
                raise ModelLoadError(f"config.json of {self.name}: {rule.setting} = {value!r} is not supported: {rule.why}.")
        return self.read(hf_config)


def read_decoder(c: Any, **changes: Any) -> Architecture:
    """The architecture that the settings common to all decoders describe, with `changes`: other or further fields of it."""
    # Some config classes have no head_dim of their own, but their model code honours one that the file carries.
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    fields = dict(
        family=c.model_type,
        num_layers=c.num_hidden_layers,
        hidden_size=c.hidden_size,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        head_dim=head_dim,
        ffn_size=c.intermediate_size,
        vocab_size=c.vocab_size,
        max_positions=c.max_position_embeddings,
        norm_eps=c.rms_norm_eps,
        tied=bool(c.tie_word_embeddings),
    )
    if "rope" not in changes:
        fields["rope"] = read_rope(c.rope_parameters, head_dim, c.max_position_embeddings)
    return Architecture(**(fields | changes))
