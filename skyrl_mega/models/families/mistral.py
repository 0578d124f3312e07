"""Mistral: Llama with an optional sliding window in every layer."""

from __future__ import annotations

from skyrl_mega.models.families.family import Family, read_decoder
from skyrl_mega.models.families.windows import window_of_every_layer

MISTRAL = Family("mistral", lambda c: read_decoder(c, windows=window_of_every_layer(c)))
