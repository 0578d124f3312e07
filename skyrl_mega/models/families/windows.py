"""Which layers of a config see a sliding window, and how wide it is."""

from __future__ import annotations

from typing import Any

from skyrl_mega.errors import ModelLoadError

FULL, SLIDING = "full_attention", "sliding_attention"


def window_of_every_layer(c: Any) -> tuple[int | None, ...]:
    """For families where `sliding_window`, unless it is null, holds in every layer."""
    return () if c.sliding_window is None else (_checked(c),) * c.num_hidden_layers


def windows_by_layer_type(c: Any) -> tuple[int | None, ...]:
    """For families that list in `layer_types` which layers slide. Raises ModelLoadError."""
    if others := sorted(set(c.layer_types) - {FULL, SLIDING}):
        raise ModelLoadError(
            f"config.json of {c.model_type}: layer_types with {', '.join(others)} are not supported: only {FULL} and {SLIDING} "
            "are built."
        )
    if SLIDING not in c.layer_types:
        return ()
    return tuple(_checked(c) if kind == SLIDING else None for kind in c.layer_types)


def _checked(c: Any) -> int:
    if not isinstance(c.sliding_window, int) or c.sliding_window < 1:
        raise ModelLoadError(
            f"config.json of {c.model_type}: sliding_window = {c.sliding_window!r} must be a positive number of tokens where "
            "layers slide; correct the file."
        )
    return c.sliding_window
