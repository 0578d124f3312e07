"""Names in a configuration become functions: plain dicts, and one lookup that explains a miss."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from skyrl_mega.errors import ConfigError

Value = TypeVar("Value")


def lookup(registry: Mapping[str, Value], name: str, setting: str) -> Value:
    """The entry called `name`. Raises ConfigError naming `setting`, the nearest known name and all known names."""
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(name, registry, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{setting} ({name!r}) must be one of {', '.join(sorted(registry))}.{hint}")
