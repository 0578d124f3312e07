"""The families that are built, by the `model_type` of config.json, and what follows from a model's directory."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from skyrl_mega.config.model_files import NOT_BUILT
from skyrl_mega.errors import ModelLoadError
from skyrl_mega.models.families.architecture import Architecture
from skyrl_mega.models.families.deepseek_v3 import DEEPSEEK_V3
from skyrl_mega.models.families.family import Family
from skyrl_mega.models.families.gemma2 import GEMMA2
from skyrl_mega.models.families.gemma3 import GEMMA3_TEXT
from skyrl_mega.models.families.glm4_moe import GLM4_MOE
from skyrl_mega.models.families.llama import LLAMA
from skyrl_mega.models.families.mistral import MISTRAL
from skyrl_mega.models.families.mixtral import MIXTRAL
from skyrl_mega.models.families.qwen import QWEN2, QWEN3
from skyrl_mega.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from skyrl_mega.models.families.weights import Shape, Split, Weight, placed, vector

_ALL = (LLAMA, MISTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, MIXTRAL, GEMMA2, GEMMA3_TEXT, DEEPSEEK_V3, GLM4_MOE)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def family_of(model_type: str | None) -> Family:
    """The family of a `model_type`. Raises ModelLoadError."""
    if model_type not in FAMILIES:
        why = f" ({NOT_BUILT[model_type]})" if model_type in NOT_BUILT else ""
        raise ModelLoadError(f"model_type {model_type!r} is not supported{why}; supported families: {', '.join(FAMILIES)}.")
    return FAMILIES[model_type]


def read_hf_config(path: str | Path) -> Any:
    """The Hugging Face config object of a local model directory of a supported family. Raises ModelLoadError."""
    config_file = Path(path) / "config.json"
    if not config_file.is_file():
        raise ModelLoadError(f"`model.path` ({path}) must be a local Hugging Face model directory; it has no config.json.")
    try:
        model_type = json.loads(config_file.read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise ModelLoadError(f"{config_file} is not valid JSON: {error}.") from error
    family_of(model_type)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(path), local_files_only=True)


def read_architecture(path: str | Path) -> Architecture:
    """The architecture of the model in `path`. Raises ModelLoadError for a family or a setting that is not supported."""
    return architecture_of(read_hf_config(path))


def architecture_of(hf_config: Any) -> Architecture:
    """The architecture of a Hugging Face config object of a supported family. Raises ModelLoadError."""
    return family_of(hf_config.model_type).architecture(hf_config)


def body_weights(a: Architecture) -> list[Weight]:
    """The table of everything but the head, in the order of the model: embedding, layers, final norm."""
    family = FAMILIES[a.family]
    vocabulary = {EMBEDDING: (a.vocab_size, a.hidden_size)}
    embedding = Weight("embedding.word_embeddings.weight", vocabulary, Split.VOCABULARY)
    layers = (
        placed(family.layer_weights(a, layer), f"decoder.layers.{layer}.", f"model.layers.{layer}.")
        for layer in range(a.num_layers)
    )
    final_norm = vector("decoder.final_layernorm.weight", "model.norm.weight", a.hidden_size)
    return [embedding, *itertools.chain.from_iterable(layers), final_norm]


def model_weights(a: Architecture) -> list[Weight]:
    """The table of the whole model; a tied head is no weight of its own."""
    if a.tied:
        return body_weights(a)
    head = Weight("output_layer.weight", {LM_HEAD: (a.vocab_size, a.hidden_size)}, Split.VOCABULARY)
    return [*body_weights(a), head]


def hf_tensor_shapes(a: Architecture) -> dict[str, Shape]:
    """Name and shape of every tensor a Hugging Face checkpoint of this architecture holds (a tied lm_head is not one of them)."""
    return tensor_shapes(model_weights(a))


def tensor_shapes(table: list[Weight]) -> dict[str, Shape]:
    """Name and shape of every tensor of a table, in its order."""
    return {name: shape for weight in table for name, shape in weight.tensors.items()}
