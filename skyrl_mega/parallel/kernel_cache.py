"""How many compiled matrix products torch keeps on CPU.

torch computes matrix products in bfloat16 on CPU by oneDNN, which makes a kernel for every shape it meets and keeps the 1024
used last. Packed lengths are hardly ever the same twice, so an update meets 12 new shapes of linear layers and 3 of attention
for each bucket of sequences, and each keeps 0.55 to 0.63 MB: tables of descriptors on the heap; the machine code is 0.03 MB of
it. A run grows by 9 to 20 MB an update, also by what these small blocks pin between the activations freed around them.

A shape of an earlier update hardly ever comes back. What must stay is what the layers of one forward and backward pass share:
a small cache is as fast as a large one (docs/lab_notes.md, 2026-11-23).

Two caches hold a kernel, and both must be small: oneDNN's own (one for the process, sized when first used, by
ONEDNN_PRIMITIVE_CACHE_CAPACITY) and that of torch's wrapper (one for each thread, sized at the thread's first product, by
LRU_CACHE_CAPACITY). vLLM links a copy of oneDNN of its own, whose cache all its layers share and which must stay large. It
reads the same variable when it first computes, which is after torch has: so the variable is put back.
"""

from __future__ import annotations

import os

import torch

#: More than the shapes of one micro-batch of short sequences (about 40) or of a sequence of 1300 tokens; about 80 MB.
KERNELS_KEPT = 128

_ONEDNN = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
#: The older spelling, which oneDNN reads too.
_DNNL = "DNNL_PRIMITIVE_CACHE_CAPACITY"
_TORCH = "LRU_CACHE_CAPACITY"


def keep_few_kernels(count: int = KERNELS_KEPT) -> None:
    """From now on torch keeps the kernels of `count` shapes of matrix products on CPU; about 0.6 MB each in bfloat16.

    Works before the process's first product of bfloat16 matrices; after it, it does nothing. Sizes that the environment sets
    stay. oneDNN in other libraries of the process (vLLM's) and in child processes keeps its own size; torch's wrapper in child
    processes takes this one.
    """
    os.environ.setdefault(_TORCH, str(count))
    if _ONEDNN in os.environ or _DNNL in os.environ:
        return
    os.environ[_ONEDNN] = str(count)
    try:
        # Smaller ones are not given to oneDNN.
        square = torch.zeros(64, 64, dtype=torch.bfloat16)
        torch.mm(square, square)
    finally:
        del os.environ[_ONEDNN]
