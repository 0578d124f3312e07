"""Puts the peers that scripts/setup.sh installed beside our environment at the end of the path.

They are the extra `peers` of pyproject.toml. By hand, without dependencies:

    pip install --no-deps --target DIRECTORY trl==1.16.0 verl==0.9.1 tensordict pyvers orjson codetiming
    PYTHONPATH=DIRECTORY pytest tests/peers

Tests are skipped where a peer is not installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(sys.prefix, "peers")))
