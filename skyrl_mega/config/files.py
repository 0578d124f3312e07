"""Which configuration files there are: directories, groups and their options, and what each file says about itself."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from skyrl_mega.errors import ConfigError

CONFIG_PACKAGE = "skyrl_mega_configs"


def config_package_dir() -> Path:
    """Where the configuration files that come with the package lie, installed or editable."""
    return Path(str(importlib.resources.files(CONFIG_PACKAGE)))


def config_directories(config_dir: Path | None = None) -> list[Path]:
    """The directories that are searched, first wins: the user's own, then the package's. Raises ConfigError."""
    if config_dir is None:
        return [config_package_dir()]
    if not Path(config_dir).is_dir():
        raise ConfigError(
            f"The configuration directory must be an existing directory; got `{config_dir}`. Create it, or leave --config-dir"
            " out."
        )
    return [Path(config_dir).resolve(), config_package_dir()]


def config_groups(directories: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """The options of every configuration group: `{"recipe": ("gsm8k", "quickstart", ...), ...}`."""
    groups: dict[str, set[str]] = {}
    for directory in directories:
        for file in directory.rglob("*.yaml"):
            group = file.parent.relative_to(directory).as_posix()
            if group != ".":
                groups.setdefault(group, set()).add(file.stem)
    return {group: tuple(sorted(groups[group])) for group in sorted(groups)}


def option_file(group: str, option: str, directories: Sequence[Path]) -> Path:
    """The file that `group=option` stands for."""
    return next(file for directory in directories if (file := directory / group / f"{option}.yaml").is_file())


def describe(file: Path) -> str:
    """The comment at the head of a configuration file, as one line."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def option_values(group: str, file: Path) -> dict[str, Any]:
    """Dotted key -> value of every setting a group's option file holds itself (not the groups it chooses in turn)."""
    is_global = "# @package _global_" in file.read_text(encoding="utf-8")
    prefix = "" if is_global else f"{group.replace('/', '.')}."
    content = OmegaConf.to_container(OmegaConf.load(file))
    if not isinstance(content, dict):
        return {}
    content.pop("defaults", None)
    return {f"{prefix}{key}": value for key, value in _leaves(content)}


def _leaves(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
