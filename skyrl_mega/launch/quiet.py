"""Silences what other libraries say about themselves, so that a run's own lines can be read.

Only notes that nobody running a training job can act on: deprecations between libraries, and fused kernels that are absent
by choice. Our own warnings are not touched. `SKYRL_MEGA_VERBOSE=1` keeps everything.
"""

from __future__ import annotations

import logging
import os
import warnings

#: (category, module that the warning points at)
_NOTES = (
    (FutureWarning, r"torch\."),
    (FutureWarning, r"vllm\."),
    (UserWarning, r"megatron\.core\."),
    (FutureWarning, r"megatron\."),
    (DeprecationWarning, r"(torch|vllm|megatron|transformers)\."),
)


def quiet_libraries() -> None:
    """Call before anything heavy is imported."""
    if os.environ.get("SKYRL_MEGA_VERBOSE") == "1":
        return
    # torch's C++ side warns through its own log: vLLM's memory binding does, at every start.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Said at every start of a CPU engine, before vLLM has set up its log.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    for category, module in _NOTES:
        warnings.filterwarnings("ignore", category=category, module=module)
