"""What a Hugging Face model directory holds, read from its JSON files alone: no torch, no transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOE_FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral")
FAMILIES = ("llama", "qwen2", "qwen3", *MOE_FAMILIES)


@dataclass(frozen=True)
class ExpertFiles:
    """The experts of a mixture. `shared_ffn_size` is 0 without a shared one; `dense_layers` counts the layers without experts."""

    count: int
    ffn_size: int
    shared_ffn_size: int
    dense_layers: int


@dataclass(frozen=True)
class ModelFiles:
    """The numbers of `config.json` that settings are checked against. `sliding_window` is None where attention is full.

    `experts` is None in a dense model; with it, `ffn_size` is that of the layers without experts.
    """

    path: Path
    family: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    sliding_window: int | None
    has_chat_template: bool
    experts: ExpertFiles | None = None

    def kv_cache_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token keeps in the cache of the whole model."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


def inspect_model(path: Path) -> tuple[ModelFiles | None, list[str]]:
    """The model in directory `path` and the problems with it; None where `config.json` can't be used."""
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing is there"
        return None, [
            f"`model.path` must be the directory of a Hugging Face model; got `{path}` ({what}). Give the directory of a"
            " downloaded model, or make one with `python scripts/prepare_smollm2.py`."
        ]
    problems = [*_weight_problems(path), *_tokenizer_problems(path)]
    config_path = path / "config.json"
    if not config_path.is_file():
        problems.insert(0, f"`model.path` must hold config.json; `{path}` does not. Give a whole Hugging Face model directory.")
        return None, problems
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        problems.insert(0, f"`{config_path}` must be JSON; {error}. Copy the model directory again.")
        return None, problems
    files, config_problems = _read_shape(path, config)
    return files, [*config_problems, *problems]


def _read_shape(path: Path, config: Any) -> tuple[ModelFiles | None, list[str]]:
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        return None, [
            f"The model's family must be one of {', '.join(FAMILIES)} (model_type in config.json); `{path}` is `{family}`. Choose"
            " a model of these families."
        ]
    names: tuple[str, ...] = (
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    )
    if family in MOE_FAMILIES:
        # transformers 5 renamed num_experts; files of either spelling are about.
        experts_key = "num_experts" if "num_experts" in config else "num_local_experts"
        names = (*names, experts_key, *_EXPERT_SIZES[family])
    absent = [name for name in names if not isinstance(config.get(name), int)]
    if absent:
        return None, [
            f"`{path / 'config.json'}` must give {', '.join(absent)} as integers; it does not. Copy the model directory again."
        ]
    problems = []
    if config.get("quantization_config"):
        problems.append(
            f"The policy's weights must be plain floating point; `{path}` is quantised (quantization_config in config.json). Give"
            " the original weights."
        )
    num_heads = config["num_attention_heads"]
    files = ModelFiles(
        path=path,
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_size=config["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        sliding_window=config.get("sliding_window") if config.get("use_sliding_window") else None,
        has_chat_template=_has_chat_template(path),
        experts=_read_experts(config, config[experts_key]) if family in MOE_FAMILIES else None,
    )
    return files, problems


#: The keys of each family's expert FFN size and, where there is one, its shared expert's.
_EXPERT_SIZES = {
    "mixtral": ("intermediate_size",),
    "qwen3_moe": ("moe_intermediate_size",),
    "qwen2_moe": ("moe_intermediate_size", "shared_expert_intermediate_size"),
}


def _read_experts(config: dict[str, Any], count: int) -> ExpertFiles:
    sizes = [config[key] for key in _EXPERT_SIZES[config["model_type"]]]
    dense_layers = 0
    if config["model_type"] != "mixtral":
        dense, every = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
        dense_layers = sum(layer in dense or (layer + 1) % every != 0 for layer in range(config["num_hidden_layers"]))
    return ExpertFiles(count, sizes[0], sizes[1] if len(sizes) > 1 else 0, dense_layers)


def _weight_problems(path: Path) -> list[str]:
    index_path = path / "model.safetensors.index.json"
    if index_path.is_file():
        try:
            shards = sorted(set(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            return [
                f"`{index_path}` must map tensors to files (weight_map); it can't be read ({error}). Copy the model directory"
                " again."
            ]
        absent = [shard for shard in shards if not (path / shard).is_file()]
        if absent:
            return [
                f"Every weight file named in `{index_path.name}` must be there; {len(absent)} of {len(shards)} are not, first "
                f"`{absent[0]}`. Finish the download of `{path}`."
            ]
        return []
    if any(path.glob("*.safetensors")):
        return []
    others = sorted(file.name for pattern in ("*.bin", "*.gguf", "*.pt") for file in path.glob(pattern))
    found = f"only {', '.join(others[:3])}" if others else "no weight file"
    return [f"`model.path` must hold weights as *.safetensors; `{path}` has {found}. Convert them with save_pretrained."]


def _tokenizer_problems(path: Path) -> list[str]:
    is_complete = (
        (path / "tokenizer.json").is_file()
        or (path / "tokenizer.model").is_file()
        or ((path / "vocab.json").is_file() and (path / "merges.txt").is_file())
    )
    if is_complete:
        return []
    return [
        f"`model.path` must hold the tokenizer (tokenizer.json, tokenizer.model, or vocab.json with merges.txt); `{path}` has"
        " none. Copy the model's tokenizer files beside its weights."
    ]


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    tokenizer_config = path / "tokenizer_config.json"
    if not tokenizer_config.is_file():
        return False
    try:
        return bool(json.loads(tokenizer_config.read_text(encoding="utf-8")).get("chat_template"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
