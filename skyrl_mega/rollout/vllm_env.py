"""The environment variables vLLM must find before it starts, and proof that it found them.

vLLM reads its settings from the environment: some at import, most when an engine starts, and an engine that runs in this
process freezes them all. So they are set here, in one place, before the import; when vLLM already holds other values,
that is an error and not a slow or hanging engine.

- `VLLM_ENABLE_V1_MULTIPROCESSING`: 0 runs the engine in this process, 1 in child processes.
- `OMP_NUM_THREADS`: threads of the engine's kernels (child processes read it when they start). Left free beside another
  busy process, decoding becomes a hundred times slower.
- `VLLM_CPU_OMP_THREADS_BIND=nobind`: do not pin threads to cores that the trainer uses as well.
- `VLLM_CPU_KVCACHE_SPACE`: the KV cache on CPU, whole GiB.
- `HF_HUB_OFFLINE`, `VLLM_NO_USAGE_STATS`, `VLLM_DO_NOT_TRACK`: models are local directories; nothing is sent anywhere.
- `VLLM_LOGGING_LEVEL`: errors only (its warnings are about things decided here), unless the user set it.
"""

from __future__ import annotations

import os
import sys

from skyrl_mega.errors import BackendUnavailableError


def engine_environment(*, device: str, in_process: bool, threads: int, kv_cache_gib: int) -> dict[str, str]:
    """The variables an engine needs. `device` is "cpu" or "cuda"."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }
    if device == "cpu":
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib)}
    return environment


def apply_environment(environment: dict[str, str]) -> None:
    """Sets the variables for this process and its children.

    Raises BackendUnavailableError if vLLM is already running here and has frozen other values.
    """
    os.environ.update(environment)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if "vllm" not in sys.modules:
        return

    from vllm import envs

    frozen = []
    for name, value in environment.items():
        if name in envs.environment_variables and getattr(envs, name) != envs.environment_variables[name]():
            frozen.append(f"{name} is {getattr(envs, name)!r} and must become {value}")
    if frozen:
        raise BackendUnavailableError(
            "vLLM already runs in this process and has frozen its settings: " + "; ".join(frozen) + ". "
            "Close that engine first, or start this one in a process of its own (rollout.placement=child_process)."
        )
