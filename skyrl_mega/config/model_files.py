"""What a Hugging Face model directory holds, read from its JSON files alone: no torch, no transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Those whose routers choose by sigmoid and a bias of each expert.
BIASED_FAMILIES = ("deepseek_v3", "glm4_moe")
MOE_FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral", *BIASED_FAMILIES)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", *MOE_FAMILIES)
#: Families near to these, and why they are not here.
NOT_BUILT = {
    "kimi_k2": "its layers are DeepSeek-V3's, but its config and tokenizer are code beside the weights, which is not run: set "
    "model_type to deepseek_v3 in config.json, take auto_map out of it, and save the tokenizer as tokenizer.json",
    "olmo2": "its norms of q and k go over all heads, which tensor ranks have parts of",
    "phi3": "its files hold q, k and v in one tensor, and gate and up in another",
    "gemma3": "it is a vision model; save its text model on its own (gemma3_text)",
}


@dataclass(frozen=True)
class ExpertFiles:
    """The experts of a mixture. `shared_ffn_size` is 0 without a shared one; `dense_layers` counts the layers without experts.

    `has_bias`: whether routers choose by score plus a bias of each expert.
    """

    count: int
    ffn_size: int
    shared_ffn_size: int
    dense_layers: int
    has_bias: bool = False


@dataclass(frozen=True)
class ModelFiles:
    """The numbers of `config.json` that settings are checked against.

    `unserved_window` is the window of a Qwen model some of whose layers have one: vLLM would leave it out or refuse the model.
    `experts` is None in a dense model; with it, `ffn_size` is that of the layers without experts. `latent_size` counts the
    numbers that multi-latent attention keeps of a token in each layer; 0 where keys and values of all heads are kept.
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
    unserved_window: int | None
    has_chat_template: bool
    experts: ExpertFiles | None = None
    latent_size: int = 0

    def kv_cache_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token keeps in the cache of the whole model."""
        return self.num_layers * (self.latent_size or 2 * self.num_kv_heads * self.head_dim) * element_bytes


def inspect_model(
    path: Path, setting: str = "model.path", *, needs_tokenizer: bool = True
) -> tuple[ModelFiles | None, list[str]]:
    """The model in directory `path`, given as `setting`, and the problems with it; None where `config.json` can't be used."""
    if not path.is_dir():
        what = "a file" if path.exists() else "nothing is there"
        return None, [
            f"`{setting}` must be the directory of a Hugging Face model; got `{path}` ({what}). Give the directory of a"
            " downloaded model, or make one with `python scripts/prepare_smollm2.py`."
        ]
    if remedy := _remedy_of_another_kind(path):
        return None, [f"`{setting}` must be the directory of a Hugging Face model; got {remedy} and set `{setting}` to that."]
    problems = [*_weight_problems(path, setting), *(_tokenizer_problems(path) if needs_tokenizer else ())]
    config_path = path / "config.json"
    if not config_path.is_file():
        problems.insert(0, f"`{setting}` must hold config.json; `{path}` does not. Give a whole Hugging Face model directory.")
        return None, problems
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        problems.insert(0, f"`{config_path}` must be JSON; {error}. Copy the model directory again.")
        return None, problems
    files, config_problems = _read_shape(path, config)
    return files, [*config_problems, *problems]


def _remedy_of_another_kind(path: Path) -> str:
    """What `path` is, and the command that makes a model directory of it, where it is a Megatron checkpoint or a run; else ""."""
    if (path / ".metadata").is_file():
        # One that lies outside of a run was written by `convert`, which puts the config beside it, or by another program.
        needs_model = not (path / "config.json").is_file() and path.absolute().parent.name != "checkpoints"
        model = " --model DIRECTORY_WITH_ITS_CONFIG" if needs_model else ""
        return f"`{path}`, a Megatron checkpoint. Run `skyrl-mega convert {path} MODEL_DIRECTORY{model}`"
    if (path / "checkpoints").is_dir() and (path / "config.yaml").is_file():
        return f"`{path}`, a run. Run `skyrl-mega export --run {path} --output MODEL_DIRECTORY`"
    return ""


def _read_shape(path: Path, config: Any) -> tuple[ModelFiles | None, list[str]]:
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        why = f" ({NOT_BUILT[str(family)]})" if str(family) in NOT_BUILT else ""
        return None, [
            f"The model's family must be one of {', '.join(FAMILIES)} (model_type in config.json); `{path}` is `{family}`{why}."
            " Choose a model of these families."
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
        if family in BIASED_FAMILIES:
            experts_key = "n_routed_experts"
        names = (*names, experts_key, *_EXPERT_SIZES[family])
    if family == "deepseek_v3":
        names = (*names, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    absent = [name for name in names if not isinstance(config.get(name), int)]
    if absent:
        return None, [
            f"`{path / 'config.json'}` must give {', '.join(absent)} as integers; it does not. Copy the model directory again."
        ]
    problems = []
    if config.get("quantization_config"):
        problems.append(
            f"Weights must be plain floating point; `{path}` is quantised (quantization_config in config.json). Give the original"
            " weights."
        )
    num_heads = config["num_attention_heads"]
    is_latent = family == "deepseek_v3"
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    files = ModelFiles(
        path=path,
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_size=config["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=num_heads if is_latent else config.get("num_key_value_heads") or num_heads,
        head_dim=config["qk_nope_head_dim"] + config["qk_rope_head_dim"] if is_latent else head_dim,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config["max_position_embeddings"],
        unserved_window=_unserved_window(config),
        has_chat_template=_has_chat_template(path),
        experts=_read_experts(config, config[experts_key]) if family in MOE_FAMILIES else None,
        latent_size=config["kv_lora_rank"] + config["qk_rope_head_dim"] if is_latent else 0,
    )
    return files, problems


def _unserved_window(config: dict[str, Any]) -> int | None:
    """The window, where it holds in some layers of a family whose layers vLLM treats alike (defaults as in transformers)."""
    family = config["model_type"]
    if family not in ("qwen2", "qwen3", "qwen2_moe") or not config.get("use_sliding_window"):
        return None
    layers, bound = range(config["num_hidden_layers"]), config.get("max_window_layers", 28)
    if types := config.get("layer_types"):
        slides = {kind == "sliding_attention" for kind in types}
    elif family == "qwen2_moe":
        slides = {layer % 2 == 0 and layer < bound for layer in layers}
    else:
        slides = {layer >= bound for layer in layers}
    return config.get("sliding_window", 4096) if slides == {True, False} else None


#: The keys of each family's expert FFN size and, where there is one, its shared expert's; what else says which layers have them.
_EXPERT_SIZES = {
    "mixtral": ("intermediate_size",),
    "qwen3_moe": ("moe_intermediate_size",),
    "qwen2_moe": ("moe_intermediate_size", "shared_expert_intermediate_size"),
    "deepseek_v3": ("moe_intermediate_size", "n_shared_experts", "first_k_dense_replace"),
    "glm4_moe": ("moe_intermediate_size", "n_shared_experts", "first_k_dense_replace"),
}


def _read_experts(config: dict[str, Any], count: int) -> ExpertFiles | None:
    if config["model_type"] in BIASED_FAMILIES:
        size, dense_layers = config["moe_intermediate_size"], config["first_k_dense_replace"]
        if dense_layers >= config["num_hidden_layers"]:
            return None
        return ExpertFiles(count, size, size * config["n_shared_experts"], dense_layers, has_bias=True)
    sizes = [config[key] for key in _EXPERT_SIZES[config["model_type"]]]
    dense_layers = 0
    if config["model_type"] != "mixtral":
        dense, every = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
        dense_layers = sum(layer in dense or (layer + 1) % every != 0 for layer in range(config["num_hidden_layers"]))
    return ExpertFiles(count, sizes[0], sizes[1] if len(sizes) > 1 else 0, dense_layers)


def _weight_problems(path: Path, setting: str) -> list[str]:
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
    return [f"`{setting}` must hold weights as *.safetensors; `{path}` has {found}. Convert them with save_pretrained."]


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
