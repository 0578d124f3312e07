"""Engines whose linear layers are 8-bit: what they are started with. The weights come by `weights/fp8.py`."""

from __future__ import annotations

from typing import Any


def fp8_arguments() -> dict[str, Any]:
    """Keyword arguments of vLLM for an engine that waits for 8-bit weights: those of the model's directory are not read.

    One scale per output channel of a weight, one per token of what it is multiplied with, taken as the token comes.
    """
    numbers = {"num_bits": 8, "type": "float", "symmetric": True}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": numbers | {"strategy": "channel", "dynamic": False},
                "input_activations": numbers | {"strategy": "token", "dynamic": True},
            }
        },
    }
    return {"hf_overrides": {"quantization_config": quantization}, "load_format": "dummy"}
