"""The files of a Hugging Face model directory, as far as validation reads them: no weights, no torch, a millisecond."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "max_position_embeddings": 2048,
}


def write_model_dir(path: Path, *, chat_template: bool = True, **changes: Any) -> Path:
    """Writes config.json (CONFIG with `changes`; None leaves a key out), an empty weight file and a tokenizer; returns `path`."""
    path.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"")
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"} if chat_template else {}))
    return path
