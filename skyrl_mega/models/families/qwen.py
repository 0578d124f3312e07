"""Qwen's dense families. qwen2 (also Qwen2.5): Llama with biases on q, k and v. qwen3: norms on the heads of q and k instead.

With `use_sliding_window` some layers see a window: those that `layer_types` lists or, in older files, from `max_window_layers` on
(transformers makes the list of it).
"""

from __future__ import annotations

from skyrl_mega.models.families.family import SILU, Family, off, read_decoder
from skyrl_mega.models.families.windows import windows_by_layer_type

#: vLLM would leave the bias of the output projection out.
NO_BIAS = off("attention_bias", "vLLM serves this family without a bias on the attention output projection")

QWEN2 = Family("qwen2", lambda c: read_decoder(c, qkv_bias=True, windows=windows_by_layer_type(c)))
QWEN3 = Family("qwen3", lambda c: read_decoder(c, qk_norm=True, windows=windows_by_layer_type(c)), rules=(SILU, NO_BIAS))
