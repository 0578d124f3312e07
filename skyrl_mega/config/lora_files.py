"""The settings of a PEFT adapter directory, as far as they must agree with the `lora` section. Reads no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyrl_mega.config.schema import AdapterConfig
from skyrl_mega.errors import ModelLoadError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

#: Keys of adapter_config.json under which an adapter is more than A and B, with the values that mean it is not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
}


@dataclass(frozen=True)
class AdapterFiles:
    """What adapter_config.json says."""

    path: Path
    rank: int
    alpha: float
    use_rslora: bool

    def require(self, settings: AdapterConfig) -> None:
        """Raises ModelLoadError unless the `lora` section says the same."""
        stored = {"rank": self.rank, "alpha": self.alpha, "use_rslora": self.use_rslora}
        wrong = {key: value for key, value in stored.items() if getattr(settings, key) != value}
        if wrong:
            raise ModelLoadError(
                f"`lora.path` must be an adapter of the `lora` section's settings; {self.path} has "
                + ", ".join(f"{key} {value} where `lora.{key}` is {getattr(settings, key)}" for key, value in wrong.items())
                + f". Set {' '.join(f'lora.{key}={value}' for key, value in wrong.items())}."
            )


def read_adapter_config(path: Path) -> AdapterFiles:
    """The adapter's settings. Raises ModelLoadError where the directory is not a plain LoRA adapter's."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise ModelLoadError(f"`lora.path` must be a PEFT adapter directory; {path} has no {name}.")
    try:
        settings = json.loads((path / CONFIG_FILE).read_text())
    except ValueError as error:
        raise ModelLoadError(f"`lora.path`: {path / CONFIG_FILE} is not JSON: {error}.") from error
    for key, plain in _PLAIN.items():
        if settings.get(key) not in plain:
            raise ModelLoadError(
                f"`lora.path`: only plain LoRA adapters can be read; {path / CONFIG_FILE} has {key}: {settings.get(key)!r}."
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise ModelLoadError(f"`lora.path`: {path / CONFIG_FILE} must say r and lora_alpha; it has {rank!r} and {alpha!r}.")
    return AdapterFiles(path, rank, float(alpha), bool(settings.get("use_rslora", False)))
