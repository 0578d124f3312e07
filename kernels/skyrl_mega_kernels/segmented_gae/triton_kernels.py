"""The reverse linear recurrence over packed segments, in Triton.

y_t = v_t + d_t y_{t+1} is the composition of the maps y -> v_t + d_t y, and composition is associative: a block of the
segment is one parallel scan, and the blocks of a segment follow each other from its end with one carried number.
"""

import triton
import triton.language as tl

from skyrl_mega_kernels.triton_jit import jit


@triton.jit
def _compose(later_decay, later_value, decay, value):
    """The map of the later tokens, then that of this one."""
    return later_decay * decay, value + decay * later_value


@jit
def segmented_scan(decay, values, cu_seqlens, out, BLOCK: tl.constexpr):
    """out[t] = values[t] + decay[t] * out[t + 1] inside each segment, 0 beyond its end. One program per segment."""
    segment = tl.program_id(0)
    start = tl.load(cu_seqlens + segment).to(tl.int64)
    length = tl.load(cu_seqlens + segment + 1).to(tl.int64) - start
    within = tl.arange(0, BLOCK)
    carry = 0.0
    num_blocks = tl.cdiv(length, BLOCK)
    for reverse_index in range(num_blocks):
        position = (num_blocks - 1 - reverse_index) * BLOCK + within
        inside = position < length
        # Beyond the segment's end: y -> y, which hands the carry on.
        d = tl.load(decay + start + position, mask=inside, other=1.0)
        v = tl.load(values + start + position, mask=inside, other=0.0)
        product, total = tl.associative_scan((d, v), 0, _compose, reverse=True)
        y = total + product * carry
        tl.store(out + start + position, y, mask=inside)
        carry = tl.sum(tl.where(within == 0, y, 0.0), 0)
