"""What Triton's interpreter gets wrong in bfloat16, which it stores as uint16: dots of bit patterns, and casts that truncate.

Import this before the first kernel runs, in a process with TRITON_INTERPRET=1.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot
_cast = interpreter.InterpreterBuilder.cast_impl


def _as_float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _dot_of_values(self, left, right, total, *settings):
    return _create_dot(self, _as_float32(left), _as_float32(right), total, *settings)


def _cast_to_nearest_even(self, source, target):
    if (source.dtype.scalar, target.scalar) == (tl.bfloat16, tl.float32):
        return _as_float32(source)
    if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
        return _cast(self, source, target)
    bits = np.ascontiguousarray(source.data).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(rounded, tl.bfloat16)


def apply() -> None:
    """Patches the interpreter of this process."""
    interpreter.InterpreterBuilder.create_dot = _dot_of_values
    interpreter.InterpreterBuilder.cast_impl = _cast_to_nearest_even
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(interpreter.InterpreterBuilder, name, _cast_to_nearest_even)
