"""The LM head's kernels in Triton: statistics of logits tiles, gradients of logits tiles, and the products around them.

    statistics_partials    logits tile by tile -> (m, s, x, z[label]) per row and vocabulary split; may keep the logits
    merge_partials         the splits' statistics, merged in split order
    recomputed_gradients   logits tile again -> gradient of the logits, in the inputs' dtype
    kept_gradients         the same from logits that statistics_partials kept
    accumulate_product     out (+)= gradients @ weight, or gradients^T @ hidden, float32 sums
    column_sums            gradient of the bias

Nothing is added atomically: every output element belongs to one program, which sums in a fixed order.

Shape letters: N rows, U columns (vocabulary), H hidden size; a tile is [BLOCK_N, BLOCK_U] and walks H in steps of BLOCK_H.
Tensors are row-major and contiguous, their pointers 16-byte aligned. Offsets of a tile's corner are 64-bit, offsets inside a
tile 32-bit. Rows and columns past the end repeat the last one: they cost no mask in the loads and are dropped at the stores.

Buffers of gradients and of kept logits are padded to whole tiles (`stride` columns a row), and the padding of gradients is
written as zeros: the products that read them need no mask along the summed dimension. 64 divides every `stride`.

ALIGNED: H is divisible by 64, so that rows start aligned and no step along H is ragged.
"""

import triton
import triton.language as tl

from skyrl_mega_kernels.triton_jit import jit


@triton.jit
def _grouped(program, num_row_blocks, num_column_blocks, GROUP: tl.constexpr):
    """(row block, column block) of a program: GROUP row blocks share the columns they read while those are in the cache."""
    group = program // (GROUP * num_column_blocks)
    first_row_block = group * GROUP
    rows_in_group = tl.minimum(num_row_blocks - first_row_block, GROUP)
    within = program % (GROUP * num_column_blocks)
    return first_row_block + within % rows_in_group, within // rows_in_group


@triton.jit
def _divisible(size, ALIGNED: tl.constexpr):
    """`size`, in a form that tells the compiler that 64 divides it."""
    if ALIGNED:
        return (size // 64) * 64
    else:
        return size


@triton.jit
def _corner(pointer, row, column, stride):
    """Pointer to [row, column] of a matrix whose rows start aligned; column is a multiple of a tile's width."""
    return tl.multiple_of(pointer + tl.cast(row, tl.int64) * stride + column, 16)


@triton.jit
def _rows_from(pointer, row, stride, ALIGNED: tl.constexpr):
    start = pointer + tl.cast(row, tl.int64) * stride
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def _logits_tile(
    hidden,
    weight,
    bias,
    row_start,
    column_start,
    N,
    U,
    H,
    has_bias,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tempered logits (hidden . weight + bias) * scale of one tile, float32 [BLOCK_N, BLOCK_U]."""
    rows = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - row_start)
    columns = tl.minimum(tl.arange(0, BLOCK_U), U - 1 - column_start)
    steps = tl.arange(0, BLOCK_H)
    hidden_tile = _rows_from(hidden, row_start, H, ALIGNED) + (rows[:, None] * H + steps[None, :])
    weight_tile = _rows_from(weight, column_start, H, ALIGNED) + (columns[None, :] * H + steps[:, None])
    logits = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
    for h in range(0, H, BLOCK_H):
        if ALIGNED:
            left = tl.load(hidden_tile)
            right = tl.load(weight_tile)
        else:
            left = tl.load(hidden_tile, mask=steps[None, :] < H - h, other=0.0)
            right = tl.load(weight_tile, mask=steps[:, None] < H - h, other=0.0)
        logits = tl.dot(left, right, logits, input_precision=PRECISION)
        hidden_tile += BLOCK_H
        weight_tile += BLOCK_H
    bias_tile = tl.load(bias + column_start + columns, mask=(columns >= 0) & has_bias, other=0.0).to(tl.float32)
    return (logits + bias_tile[None, :]) * scale


@triton.jit
def _tanh(x):
    """tanh by exp; near 0, where 1 - exp(-2 |x|) has lost the digits of the result, an odd polynomial of least relative error."""
    size = tl.abs(x)
    square = x * x
    p = ((-5.7049827e-3 * square + 2.0639082e-2) * square - 5.3739715e-2) * square + 1.3331442e-1
    small = (p * square - 3.3333281e-1) * square * x + x
    e = tl.exp(-2.0 * size)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def _capped(logits, cap):
    """cap tanh(z / cap) where cap > 0, else the logits as they are."""
    if cap > 0:
        logits = cap * _tanh(logits * (1.0 / cap))
    return logits


@triton.jit
def _included(logits, columns, label, floor, U):
    """Columns that count: real ones with logit >= floor, and the label's own; a logit of -inf has no share in any case."""
    above = (logits >= floor[:, None]) & (logits > -float("inf"))
    return (columns < U)[None, :] & (above | (columns[None, :] == label[:, None]))


@triton.jit
def _gradient_tile(logits, columns, label, floor, lse, a, b, c, U, cap):
    """dz = p (a + b (z - lse)) + c [label], 0 where a column is excluded; cap > 0: of the logit before it was capped."""
    included = _included(logits, columns, label, floor, U) & (logits > -float("inf"))
    logprobs = tl.where(included, logits - lse[:, None], 0.0)
    probs = tl.where(included, tl.exp(logprobs), 0.0)
    at_label = tl.where(columns[None, :] == label[:, None], c[:, None], 0.0)
    gradient = probs * (a[:, None] + b[:, None] * logprobs) + at_label
    if cap > 0:
        tanh = logits * (1.0 / cap)
        gradient = gradient * (1.0 - tanh * tanh)
    return gradient


@jit
def statistics_partials(
    hidden,
    weight,
    bias,
    label_columns,
    floors,
    partials,
    kept,
    N,
    U,
    H,
    columns_per_split,
    num_splits,
    kept_stride,
    kept_plane,
    has_bias,
    has_floor,
    scale,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partials[split, :, row] = (m, s, x, z[label]) over one split of the vocabulary, by online softmax over its tiles.

    Per tile the sums are taken against the new maximum and the running ones rescaled, so that x never cancels:
    s = s' e + sum exp(z - m), x = (x' + (m' - m) s') e + sum (z - m) exp(z - m), e = exp(m' - m).

    KEEP: the tile's logits also go to `kept`, [rows, kept_stride] padded to whole tiles. KEEP=1: float32. KEEP=2: as two
    planes of 16 bits, the upper halves of the float32 at `kept` and the lower ones at `kept + kept_plane`: a bfloat16
    gradient can then replace the upper half in place, element for element, and is a dense matrix of its own.
    """
    H = _divisible(H, ALIGNED)
    kept_stride = _divisible(kept_stride, True)
    row_block, split = _grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_splits, GROUP)
    row_start = row_block * BLOCK_N
    rows = row_start + tl.arange(0, BLOCK_N)
    label = tl.load(label_columns + rows, mask=rows < N, other=-1).to(tl.int32)
    floor = tl.load(floors + rows, mask=(rows < N) & has_floor, other=-float("inf"))

    m = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    s = tl.zeros((BLOCK_N,), tl.float32)
    x = tl.zeros((BLOCK_N,), tl.float32)
    label_logit = tl.zeros((BLOCK_N,), tl.float32)
    split_start = split * columns_per_split
    for column_start in range(split_start, tl.minimum(split_start + columns_per_split, U), BLOCK_U):
        logits = _logits_tile(
            hidden, weight, bias, row_start, column_start, N, U, H, has_bias, scale, BLOCK_N, BLOCK_U, BLOCK_H, ALIGNED, PRECISION
        )
        logits = _capped(logits, cap)
        columns = column_start + tl.arange(0, BLOCK_U)
        if KEEP != 0:
            tile = tl.arange(0, BLOCK_N)[:, None] * kept_stride + tl.arange(0, BLOCK_U)[None, :]
            if KEEP == 1:
                tl.store(_corner(kept, row_start, column_start, kept_stride) + tile, logits)
            else:
                bits = logits.to(tl.int32, bitcast=True)
                tl.store(_corner(kept, row_start, column_start, kept_stride) + tile, (bits >> 16).to(tl.int16))
                tl.store(_corner(kept + kept_plane, row_start, column_start, kept_stride) + tile, bits.to(tl.int16))

        label_logit += tl.sum(tl.where(columns[None, :] == label[:, None], logits, 0.0), 1)
        logits = tl.where(_included(logits, columns, label, floor, U), logits, -float("inf"))
        new_m = tl.maximum(m, tl.max(logits, 1))
        # Where nothing has been included yet, m is -inf: shift by 0, so that no -inf - -inf makes a NaN.
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        moved = tl.where(m == -float("inf"), 0.0, m - shift)
        rescale = tl.exp(moved)
        logits = logits - shift[:, None]
        exps = tl.exp(logits)
        x = (x + moved * s) * rescale + tl.sum(tl.where(exps > 0.0, logits * exps, 0.0), 1)
        s = s * rescale + tl.sum(exps, 1)
        m = new_m

    out = partials + tl.cast(split, tl.int64) * 4 * N + rows
    inside = rows < N
    tl.store(out, m, mask=inside)
    tl.store(out + N, s, mask=inside)
    tl.store(out + 2 * N, x, mask=inside)
    tl.store(out + 3 * N, label_logit, mask=inside)


@jit
def merge_partials(partials, packed, N, num_splits, with_entropy, BLOCK: tl.constexpr):
    """packed[:, row] = the statistics over all splits; each row alone and in split order, whatever N is."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    m = tl.full((BLOCK,), -float("inf"), tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    x = tl.zeros((BLOCK,), tl.float32)
    label_logit = tl.zeros((BLOCK,), tl.float32)
    for split in range(num_splits):
        at = partials + tl.cast(split, tl.int64) * 4 * N + rows
        split_m = tl.load(at, mask=inside, other=-float("inf"))
        split_s = tl.load(at + N, mask=inside, other=0.0)
        split_x = tl.load(at + 2 * N, mask=inside, other=0.0)
        label_logit += tl.load(at + 3 * N, mask=inside, other=0.0)
        new_m = tl.maximum(m, split_m)
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        moved = tl.where(m == -float("inf"), 0.0, m - shift)
        split_moved = tl.where(split_m == -float("inf"), 0.0, split_m - shift)
        x = (x + moved * s) * tl.exp(moved) + (split_x + split_moved * split_s) * tl.exp(split_moved)
        s = s * tl.exp(moved) + split_s * tl.exp(split_moved)
        m = new_m
    tl.store(packed + rows, m, mask=inside)
    tl.store(packed + N + rows, s, mask=inside)
    tl.store(packed + 2 * N + rows, tl.where(with_entropy, x, 0.0), mask=inside)
    tl.store(packed + 3 * N + rows, label_logit, mask=inside)


@jit
def recomputed_gradients(
    hidden,
    weight,
    bias,
    label_columns,
    floors,
    lses,
    coefficients,
    gradients,
    N,
    U,
    H,
    coefficient_stride,
    slice_start,
    stride,
    has_bias,
    has_floor,
    scale,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gradients[row, column - slice_start] = d / d (hidden . weight) for one slice of `stride` columns, zeros in the padding."""
    H = _divisible(H, ALIGNED)
    stride = _divisible(stride, True)
    row_block, column_block = _grouped(tl.program_id(0), tl.cdiv(N, BLOCK_N), stride // BLOCK_U, GROUP)
    row_start = row_block * BLOCK_N
    within = column_block * BLOCK_U
    # A block of padding only computes some earlier column, and writes zeros.
    column_start = tl.minimum(slice_start + within, U - 1)
    logits = _logits_tile(
        hidden, weight, bias, row_start, column_start, N, U, H, has_bias, scale, BLOCK_N, BLOCK_U, BLOCK_H, ALIGNED, PRECISION
    )
    logits = _capped(logits, cap)
    rows = row_start + tl.arange(0, BLOCK_N)
    columns = slice_start + within + tl.arange(0, BLOCK_U)
    inside = rows < N
    label = tl.load(label_columns + rows, mask=inside, other=-1).to(tl.int32)
    floor = tl.load(floors + rows, mask=inside & has_floor, other=-float("inf"))
    lse = tl.load(lses + rows, mask=inside, other=float("inf"))
    a = tl.load(coefficients + rows, mask=inside, other=0.0)
    b = tl.load(coefficients + coefficient_stride + rows, mask=inside, other=0.0)
    c = tl.load(coefficients + 2 * coefficient_stride + rows, mask=inside, other=0.0)
    gradient = _gradient_tile(logits, columns, label, floor, lse, a, b, c, U, cap) * scale
    gradient = tl.where(inside[:, None], gradient, 0.0)
    tile = tl.arange(0, BLOCK_N)[:, None] * stride + tl.arange(0, BLOCK_U)[None, :]
    tl.store(_corner(gradients, row_start, within, stride) + tile, gradient.to(gradients.dtype.element_ty))


@jit
def kept_gradients(
    label_columns,
    floors,
    lses,
    coefficients,
    kept,
    gradients,
    N,
    U,
    coefficient_stride,
    stride,
    plane,
    has_floor,
    scale,
    cap,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Gradients from kept logits, over them: `gradients` is `kept` (KEEP=1), or its plane of upper halves (KEEP=2)."""
    stride = _divisible(stride, True)
    row_start = tl.program_id(0) * BLOCK_N
    column_start = tl.program_id(1) * BLOCK_U
    tile = tl.arange(0, BLOCK_N)[:, None] * stride + tl.arange(0, BLOCK_U)[None, :]
    if KEEP == 1:
        logits = tl.load(_corner(kept, row_start, column_start, stride) + tile)
    else:
        high = tl.load(_corner(kept, row_start, column_start, stride) + tile).to(tl.int32)
        low = tl.load(_corner(kept + plane, row_start, column_start, stride) + tile).to(tl.int32)
        logits = ((high << 16) | (low & 0xFFFF)).to(tl.float32, bitcast=True)
    rows = row_start + tl.arange(0, BLOCK_N)
    columns = column_start + tl.arange(0, BLOCK_U)
    inside = rows < N
    label = tl.load(label_columns + rows, mask=inside, other=-1).to(tl.int32)
    floor = tl.load(floors + rows, mask=inside & has_floor, other=-float("inf"))
    lse = tl.load(lses + rows, mask=inside, other=float("inf"))
    a = tl.load(coefficients + rows, mask=inside, other=0.0)
    b = tl.load(coefficients + coefficient_stride + rows, mask=inside, other=0.0)
    c = tl.load(coefficients + 2 * coefficient_stride + rows, mask=inside, other=0.0)
    gradient = _gradient_tile(logits, columns, label, floor, lse, a, b, c, U, cap) * scale
    gradient = tl.where(inside[:, None] & (columns < U)[None, :], gradient, 0.0)
    tl.store(_corner(gradients, row_start, column_start, stride) + tile, gradient.to(gradients.dtype.element_ty))


@jit
def accumulate_product(
    left,
    right,
    out,
    M,
    K,
    H,
    left_stride,
    accumulate,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[M, H] (+)= left @ right[K, H] in float32; TRANSPOSED: `left` is stored [K, M], else [M, K].

    `left` is padded to whole tiles with zeros along K. The running sum starts from `out` itself, so that a sum split over
    several calls gives the bits of one call over all of K, wherever the splits lie (at multiples of BLOCK_K).
    """
    H = _divisible(H, ALIGNED)
    left_stride = _divisible(left_stride, True)
    row_block, column_block = _grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(H, BLOCK_H), GROUP)
    row_start = row_block * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_H + tl.arange(0, BLOCK_H)
    steps = tl.arange(0, BLOCK_K)
    out_tile = _rows_from(out, row_start, H, ALIGNED) + (rows[:, None] * H + columns[None, :])
    inside = (row_start + rows < M)[:, None] & (columns < H)[None, :]
    total = tl.load(out_tile, mask=inside & accumulate, other=0.0).to(tl.float32)
    for k in range(0, K, BLOCK_K):
        if TRANSPOSED:
            left_tile = _corner(left, k, row_start, left_stride) + (steps[None, :] * left_stride + rows[:, None])
        else:
            left_tile = _corner(left, row_start, k, left_stride) + (rows[:, None] * left_stride + steps[None, :])
        right_rows = tl.minimum(steps, K - 1 - k)
        right_tile = _rows_from(right, k, H, ALIGNED) + (right_rows[:, None] * H + columns[None, :])
        total = tl.dot(
            tl.load(left_tile),
            tl.load(right_tile, mask=(columns < H)[None, :], other=0.0),
            total,
            input_precision=PRECISION,
        )
    tl.store(out_tile, total.to(out.dtype.element_ty), mask=inside)


@jit
def column_sums(
    gradients,
    out,
    num_columns,
    num_rows,
    stride,
    accumulate,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """out[column] (+)= sum of gradients[:, column] over `num_rows` rows padded with zeros."""
    stride = _divisible(stride, True)
    column_start = tl.program_id(0) * BLOCK_U
    columns = column_start + tl.arange(0, BLOCK_U)
    inside = columns < num_columns
    tile = tl.arange(0, BLOCK_N)[:, None] * stride + tl.arange(0, BLOCK_U)[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_U), tl.float32)
    for row in range(0, num_rows, BLOCK_N):
        sums += tl.load(_corner(gradients, row, column_start, stride) + tile).to(tl.float32)
    before = tl.load(out + columns, mask=inside & accumulate, other=0.0)
    tl.store(out + columns, before + tl.sum(sums, 0), mask=inside)
