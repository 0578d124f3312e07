"""Families of models: what a Hugging Face config means, and which tensors its checkpoints hold.

One small file for each family (docs/models.md says how to add one), all listed in `registry`. Every setting of a family that
changes the arithmetic is honoured or refused with ModelLoadError; none is ignored. Keys that Hugging Face's own model code of
the family does not read change nothing there and are not looked at here. (What belongs to training is set by the run, not by
the file: the routers' auxiliary loss is `model.moe_aux_loss_coef`.)
"""

from skyrl_mega.models.families.architecture import Architecture, Experts, Latent, padded_vocab_size
from skyrl_mega.models.families.registry import (
    EMBEDDING,
    FAMILIES,
    LM_HEAD,
    architecture_of,
    body_weights,
    hf_tensor_shapes,
    model_weights,
    read_architecture,
    read_hf_config,
    tensor_shapes,
)
from skyrl_mega.models.families.rope import Rope, inverse_frequencies
from skyrl_mega.models.families.weights import Split, Weight

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "LM_HEAD",
    "Architecture",
    "Experts",
    "Latent",
    "Rope",
    "Split",
    "Weight",
    "architecture_of",
    "body_weights",
    "hf_tensor_shapes",
    "inverse_frequencies",
    "model_weights",
    "padded_vocab_size",
    "read_architecture",
    "read_hf_config",
    "tensor_shapes",
]
