"""How this package's Triton kernels are made and run: one compiled variant per choice of constexprs, whatever the arguments.

Triton's own decorator compiles further variants behind the caller's back: for integers divisible by 16 or equal to 1, for
aligned pointers, on AMD for small tensors. Then no test can compile every variant that may run. Here every argument is
passed plainly, and a kernel that wants alignment says so with a constexpr and `tl.multiple_of`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable

import torch
import triton
import triton.language as tl


def jit(function: Callable) -> triton.runtime.JITFunction:
    """`triton.jit` without specialisation on argument values. The kernel's file must not postpone its annotations."""
    parameters = inspect.signature(function).parameters.values()
    plain = [parameter.name for parameter in parameters if parameter.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=plain)


def launch(
    kernel, grid: tuple[int, ...], device: torch.device, *arguments, num_warps: int, num_stages: int, **constexprs
) -> None:
    """Runs `kernel` on `device`, on its current stream; on CPU tensors under Triton's interpreter.

    Contraction of a * b + c into one rounding is asked for by name, since Triton's default for it changes between versions.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constexprs)
