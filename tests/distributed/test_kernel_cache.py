"""What bfloat16 training on CPU keeps for shapes of matrix products that it has seen once.

Counted is what the heap holds (glibc's mallinfo2), not the resident memory: it is the same at every run.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack

import pytest

from helpers.spawn import run_ranks
from helpers.tiny import write_tiny_model
from skyrl_mega.config.load import load_config
from skyrl_mega.data.packing import balance_and_pack
from skyrl_mega.data.synthetic import random_samples
from skyrl_mega.orchestration.assemble import join_ranks
from skyrl_mega.parallel.kernel_cache import KERNELS_KEPT
from skyrl_mega.training.policy import Policy

#: Updates after which the heap is counted. Each brings 20 to 30 shapes: the first of them fill the cache.
FIRST, LAST = 10, 25


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def heap_bytes() -> int:
    """Bytes that this process has allocated and not freed."""
    count = ctypes.CDLL(None).mallinfo2
    count.restype = _Heap
    heap = count()
    return heap.uordblks + heap.hblkhd


def grown(rank: int, path: str, run_dir: str, environment: dict[str, str]) -> tuple[int, str | None]:
    """(bytes that updates FIRST .. LAST - 1 on ever new lengths left on the heap, oneDNN's variable after them)."""
    os.environ.update(environment)
    config = load_config(["recipe=tiny", f"model.path={path}", f"trainer.run_dir={run_dir}", "model.dtype=bfloat16"])
    with ExitStack() as stack:
        policy = Policy.from_hf(config, join_ranks(config, stack))
        before = 0
        for update in range(LAST):
            if update == FIRST:
                before = heap_bytes()
            samples = random_samples(3, 4, seed=update, max_len=60)
            batch = balance_and_pack(
                samples, tokens_per_micro_batch=2048, dp_rank=0, dp_size=1, skip_zero_advantage=False, share_prompts=True
            )
            policy.train_step(batch)
        return heap_bytes() - before, os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def test_updates_on_ever_new_lengths_do_not_grow_the_heap(tmp_path, monkeypatch):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    path = str(write_tiny_model(tmp_path / "model"))
    [(small, variable)] = run_ranks(grown, 1, path, str(tmp_path / "small"), {})
    assert variable is None, "vLLM's copy of oneDNN, which reads the variable later, must keep its size"

    # What the environment asks for stays, and shows what would be kept.
    asked = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
    [(large, variable)] = run_ranks(grown, 1, path, str(tmp_path / "large"), asked)
    assert variable == "1024"
    if large < 100e6:
        pytest.skip(f"torch does not give this CPU's bfloat16 products to oneDNN: {large / 1e6:.1f} MB with all kernels kept")
    assert small < 0.05 * large, f"{small / 1e6:.1f} MB with {KERNELS_KEPT} kernels kept, {large / 1e6:.1f} MB with all"
