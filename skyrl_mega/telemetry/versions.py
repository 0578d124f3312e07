"""What a result was obtained with: package versions, hardware, commit. Imports none of the packages it names."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "skyrl-mega",
    "torch",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "triton",
    "vllm",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "hydra-core",
    "gymnasium",
    "datasets",
    "ray",
    "reasoning-gym",
    "math-verify",
)


def collect_versions() -> dict[str, str]:
    """Versions of Python and of those packages that matter to a result and are installed, by name."""
    versions = {"python": platform.python_version()}
    installed = {dist.name.lower().replace("_", "-"): dist.version for dist in metadata.distributions() if dist.name}
    versions.update({name: installed[name] for name in PACKAGES if name in installed})
    # vLLM's CPU build goes by another distribution name.
    versions.update({name: version for name, version in installed.items() if name.startswith("vllm-")})
    return versions


def hardware() -> dict[str, Any]:
    """cpu (model name), cpu_cores usable by this process, memory_bytes, gpus (list of "name, memory"; empty without any)."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cpu_cores": cores,
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def git_commit(directory: str | Path | None = None) -> str | None:
    """Commit of the checkout that holds `directory` (None: this package), with "+changes" when files differ from it.

    None outside a checkout, for an installed package, or where git is absent.
    """
    if directory is None:
        directory = Path(__file__).resolve().parents[2]
        # An installed package may lie inside some other project's checkout, whose commit says nothing of us.
        if _output(["git", "-C", str(directory), "rev-parse", "--show-toplevel"]) != str(directory):
            return None
    commit = _output(["git", "-C", str(directory), "rev-parse", "HEAD"])
    if not commit:
        return None
    changed = _output(["git", "-C", str(directory), "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}+changes" if changed else commit


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    listing = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    return [line.strip() for line in (listing or "").splitlines() if line.strip()]


def _output(command: list[str]) -> str | None:
    """What `command` printed; None where the program is absent or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
