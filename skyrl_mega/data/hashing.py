"""Hashes that are the same in every process and on every machine (Python's own `hash` is not)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def stable_hash(*parts: Any, bits: int = 64) -> int:
    """An integer below 2**bits (bits a multiple of 8) that depends on the parts' text only. BLAKE2b, RFC 7693."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=bits // 8).digest(), "big")


def canonical_json(value: Mapping[str, Any]) -> str:
    """One text for equal JSON values. Raises TypeError or ValueError for a value that JSON can't hold (NaN included)."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
