"""The compiled extension modules: `_C` (C++ for CPU) and `_C_cuda`; both optional, loaded once, at first use.

`load(name)` imports the module, whose ops register themselves with torch, and raises with the reason where that is impossible;
`why_absent(name)` gives the reason alone. `setup.py` leaves its own reason in `_build_report.json` when it builds nothing.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

from skyrl_mega.errors import BackendUnavailableError

EXTENSIONS = ("_C", "_C_cuda")
_REBUILD = "run `bash scripts/setup.sh`, or `pip install -e . --no-build-isolation --no-deps` with torch and a C++ compiler there"


def load(name: str) -> ModuleType:
    """The extension module. Raises BackendUnavailableError with the reason where it can't be loaded."""
    module, reason = _load(name)
    if module is None:
        raise BackendUnavailableError(f"{reason}; {_REBUILD}")
    return module


def why_absent(name: str) -> str | None:
    """Why the extension can't be used, in words; None where it can."""
    return _load(name)[1]


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    import torch

    if name == "_C_cuda" and not torch.cuda.is_available():
        return None, "torch sees no CUDA device"
    try:
        return importlib.import_module(f"skyrl_mega_kernels.{name}"), None
    except ModuleNotFoundError:
        return None, f"the extension {name} is not built ({_build_reason(name)})"
    except ImportError as error:  # built against another torch, say
        return None, f"the extension {name} can't be loaded: {' '.join(str(error).split())}"


def _build_reason(name: str) -> str:
    report = Path(__file__).with_name("_build_report.json")
    if not report.is_file():
        return "nothing was tried"
    return json.loads(report.read_text()).get(name, {}).get("why") or "no reason was recorded"
