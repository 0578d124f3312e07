"""The Triton kernels against float64, in Triton's interpreter: numbers of the real kernels without a GPU.

A kernel is interpreted or compiled according to TRITON_INTERPRET at the time it is imported, so the claims
(`triton_interpreter_session.py`) run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")


def test_kernels_agree_with_float64_in_the_interpreter():
    session = Path(__file__).with_name("triton_interpreter_session.py")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(session)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=session.parents[2],
    )
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels")
def test_on_cpu_tensors_the_backend_says_what_it_needs():
    from skyrl_mega_kernels.linear_logprobs import triton as linear

    assert "TRITON_INTERPRET=1" in linear.unavailable(torch.device("cpu"), torch.bfloat16)
