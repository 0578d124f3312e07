"""Peak resident memory of `linear_logprobs`, forward and backward, against a floor that is added up by hand.

The floor is what has to be there: inputs, gradients, the outputs and the workspace that the backend states. Measured in a fresh
process, beyond what is resident before the inputs exist.
"""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from skyrl_mega_kernels.linear_logprobs.ops import OPERATOR

HIDDEN, VOCAB, CHUNK_TOKENS = 576, 49152, 128
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark can be reset on Linux only")
#: Every large buffer gets a mapping of its own, which goes back to the system when it is freed.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}

PROBE = """
    import json, sys, torch
    from skyrl_mega_kernels.linear_logprobs import linear_logprobs

    def status(field):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

    settings = json.loads(sys.argv[1])
    dtype = getattr(torch, settings["dtype"])

    def make(*shape):  # row by row: no float32 copy of the whole, which would count
        tensor = torch.empty(shape, dtype=dtype)
        for row in tensor:
            row.normal_(std=shape[-1] ** -0.25)
        return tensor.requires_grad_()

    def step(num_tokens, vocab):
        hidden, weight = make(num_tokens, settings["hidden"]), make(vocab, settings["hidden"])
        labels = torch.randint(0, vocab, (num_tokens,))
        output = linear_logprobs(
            hidden, weight, labels, return_entropy=True, chunk_tokens=settings["chunk_tokens"], backend=settings["backend"]
        )
        (output.logprobs.sum() + output.entropy.sum()).backward()

    step(8, 256)  # loads the backend and whatever it compiles
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    step(settings["tokens"], settings["vocab"])
    print(status("VmHWM") - before)
"""


def peak_bytes(**settings) -> int:
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROBE), json.dumps(settings)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **ENVIRONMENT},
    )
    return int(output.stdout)


def floor_bytes(tokens: int, itemsize: int, workspace: int) -> int:
    """hidden, weight and their gradients; a float32 gradient of hidden if theirs is narrower; labels, ten numbers per token."""
    matrices = 2 * itemsize * HIDDEN * (tokens + VOCAB) + (4 * HIDDEN * tokens if itemsize == 2 else 0)
    return matrices + (8 + 4 * 10) * tokens + workspace


def reference_workspace_bytes(itemsize: int) -> int:
    """One chunk of float32 logits and of probabilities, one chunk's share of dW, and for 16-bit weights dW's float32 sum."""
    return CHUNK_TOKENS * VOCAB * (4 + 4) + VOCAB * HIDDEN * (itemsize + (4 if itemsize == 2 else 0))


def cpu_workspace_bytes(tokens: int, itemsize: int) -> int:
    """hidden in two other layouts, the gradients of a superblock of logits, and the float32 sum of d hidden in tiles."""
    superblock = 1152
    return 2 * itemsize * HIDDEN * tokens + superblock * itemsize * (tokens + HIDDEN) + 4 * HIDDEN * tokens


def assert_within_1_3_times_the_floor(tokens: int, dtype: str, backend: str, workspace: int) -> None:
    settings = dict(tokens=tokens, dtype=dtype, backend=backend, chunk_tokens=CHUNK_TOKENS)
    peak = peak_bytes(hidden=HIDDEN, vocab=VOCAB, **settings)
    floor = floor_bytes(tokens, getattr(torch, dtype).itemsize, workspace)
    assert peak <= 1.3 * floor, f"{settings}: peak {peak / 1e6:.0f} MB, floor {floor / 1e6:.0f} MB"


@linux_only
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_reference_stays_within_1_3_times_inputs_gradients_and_one_chunk(dtype):
    assert_within_1_3_times_the_floor(512, dtype, "reference", reference_workspace_bytes(getattr(torch, dtype).itemsize))


@linux_only
def test_cpu_backend_at_8192_tokens_stays_within_1_3_times_inputs_gradients_and_its_tiles():
    chosen = OPERATOR.choose(torch.device("cpu"), torch.bfloat16)
    if chosen != "cpu":
        pytest.skip(f"`auto` takes {chosen} here: {OPERATOR.unavailable('cpu', torch.device('cpu'), torch.bfloat16)}")
    # `auto`: what a trainer gets. The logits alone would be 1.6 GB in float32.
    assert_within_1_3_times_the_floor(8192, "bfloat16", "auto", cpu_workspace_bytes(8192, torch.bfloat16.itemsize))
