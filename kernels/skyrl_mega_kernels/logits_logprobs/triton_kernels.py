"""Statistics, top-k and gradients from given logits, in Triton: one read of the logits each.

One program per row reads the row in blocks. The running maximum is one number, found block by block; the running sums are
kept per lane, rescaled when the maximum moves and added up at the end: one exponential per logit, one reduction per block,
and sums of a few dozen terms instead of one long one.

A row whose label is -2 does not count: it is neither read nor written to.

ALIGNED: rows start 16-byte aligned, and 16 divides U, so that a mask never cuts a vector.
"""

import triton
import triton.language as tl

from skyrl_mega_kernels.triton_jit import jit

LOWEST_KEY = tl.constexpr(-(2**63))


@triton.jit
def _divisible(size, ALIGNED: tl.constexpr):
    """`size`, in a form that tells the compiler that 16 divides it."""
    if ALIGNED:
        return (size // 16) * 16
    else:
        return size


@triton.jit
def _row(pointer, row, stride, ALIGNED: tl.constexpr):
    start = pointer + tl.cast(row, tl.int64) * stride
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def _top_k_keys(logits, columns, inside):
    """int64 keys that sort as (logit, then lower column first); the float's bits become an ordered integer."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(inside, (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64), LOWEST_KEY)


@jit
def statistics_rows(
    logits,
    label_columns,
    floors,
    packed,
    top_logits,
    top_columns,
    N,
    U,
    row_stride,
    k,
    has_floor,
    with_entropy,
    scale,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """packed[:, row] = (m, s, x, z[label]); with TOP_K (a power of two, at least k) also the row's k largest z and their columns.

    The k largest so far are kept sorted. A block is merged only if its largest beats the last of them, which after the first
    few blocks of a row is rare.
    """
    U = _divisible(U, ALIGNED)
    row = tl.program_id(0)
    start = _row(logits, row, row_stride, ALIGNED)
    label = tl.load(label_columns + row).to(tl.int32)
    floor = tl.load(floors + row, mask=has_floor, other=-float("inf"))
    m = -float("inf")
    sums = tl.zeros((BLOCK,), tl.float32)
    shifted = tl.zeros((BLOCK,), tl.float32)
    at_label = tl.zeros((BLOCK,), tl.float32)
    if TOP_K > 0:
        best = tl.full((TOP_K,), LOWEST_KEY, tl.int64)
    for block in range(0, tl.where(label == -2, 0, U), BLOCK):
        columns = block + tl.arange(0, BLOCK)
        inside = columns < U
        z = tl.load(start + columns, mask=inside, other=-float("inf")).to(tl.float32) * scale
        is_label = columns == label
        at_label += tl.where(is_label, z, 0.0)
        if TOP_K > 0:
            keys = _top_k_keys(z, columns, inside)
            if tl.max(keys, 0) > tl.min(best, 0):
                # Two sorted lists, one of them turned round: the larger of each pair are the k largest of both, up then down.
                best = tl.bitonic_merge(tl.maximum(best, tl.flip(tl.topk(keys, TOP_K), 0)), descending=True)
        z = tl.where(inside & ((z >= floor) | is_label), z, -float("inf"))
        new_m = tl.maximum(m, tl.max(z, 0))
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        moved = tl.where(m == -float("inf"), 0.0, m - shift)
        rescale = tl.exp(moved)
        z = z - shift
        exps = tl.exp(z)
        shifted = (shifted + moved * sums) * rescale + tl.where(exps > 0.0, z * exps, 0.0)
        sums = sums * rescale + exps
        m = new_m
    out = packed + row
    tl.store(out, m)
    tl.store(out + N, tl.sum(sums, 0))
    tl.store(out + 2 * N, tl.where(with_entropy, tl.sum(shifted, 0), 0.0))
    tl.store(out + 3 * N, tl.sum(at_label, 0))
    if TOP_K > 0:
        ranks = tl.arange(0, TOP_K)
        ordered = (best >> 32).to(tl.int32)
        value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        column = 0x7FFFFFFF - (best & 0xFFFFFFFF)
        found = best != LOWEST_KEY
        at = row.to(tl.int64) * k + ranks
        tl.store(top_logits + at, tl.where(found, value, -float("inf")), mask=ranks < k)
        tl.store(top_columns + at, tl.where(found, column, -1), mask=ranks < k)


@jit
def gradient_rows(
    logits,
    label_columns,
    floors,
    lses,
    coefficients,
    out,
    U,
    row_stride,
    out_stride,
    coefficient_stride,
    has_floor,
    scale,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """out[row, block] = (p (a + b (z - lse)) + c [label]) / temperature, 0 for excluded columns; `out` may be `logits`."""
    U = _divisible(U, ALIGNED)
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(label_columns + row).to(tl.int32)
    inside = columns < tl.where(label == -2, 0, U)
    z = tl.load(_row(logits, row, row_stride, ALIGNED) + columns, mask=inside, other=-float("inf")).to(tl.float32) * scale
    floor = tl.load(floors + row, mask=has_floor, other=-float("inf"))
    lse = tl.load(lses + row)
    a = tl.load(coefficients + row)
    b = tl.load(coefficients + coefficient_stride + row)
    c = tl.load(coefficients + 2 * coefficient_stride + row)
    is_label = columns == label
    included = ((z >= floor) | is_label) & (z > -float("inf"))
    logprobs = tl.where(included, z - lse, 0.0)
    probs = tl.where(included, tl.exp(logprobs), 0.0)
    gradient = (probs * (a + b * logprobs) + tl.where(is_label, c, 0.0)) * scale
    tl.store(_row(out, row, out_stride, ALIGNED) + columns, gradient.to(out.dtype.element_ty), mask=inside)
