"""The Triton backend of `linear_logprobs`: the logits exist as tiles in registers, their gradients as one slice in memory.

Forward. A program computes the logits of a block of rows over one split of the vocabulary, tile by tile, and keeps the running
statistics (m, s, x, z[label]); a second kernel merges the splits in order. The splits depend on U alone.

Backward. The vocabulary is walked in slices as wide as the workspace allows. One kernel recomputes a slice's logits and writes
their gradients in the inputs' dtype; two products add them up, grad_hidden += gradients @ weight[slice] and
grad_weight[slice] = gradients^T @ hidden, in float32. A product's running sum starts from what is already in its output, so
that the sum over all slices is, to the bit, one sum over the whole vocabulary in steps of a fixed number of columns: how wide
the slices are, and so how many rows there are, leaves no trace in grad_hidden.

Batch invariance follows: no tile size, split or order of summation of a row's results depends on N. The products are this
package's own kernel and not torch.mm for that reason, since a library picks its algorithm by the shape; and because it takes
float32 outputs, adds to them, and runs in the interpreter as it does on the GPU.

Chunks (`linear_policy_loss`). The forward kernel also stores the logits; see `statistics_partials` for how. Their gradients
replace them, and the fourth product, the recomputation, is saved.

float32 inputs: their products run as three TF32 products on NVIDIA, as float32 ones on AMD.

Shape letters: N rows, C rows of a chunk, H hidden, U this rank's valid columns, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from skyrl_mega_kernels.logits_logprobs import triton as logits_logprobs
from skyrl_mega_kernels.triton_targets import Chip, chip_of, unavailable

__all__ = [
    "BATCH_INVARIANT",
    "chunk_gradients",
    "chunk_statistics",
    "gradients",
    "statistics",
    "unavailable",
    "workspace_size",
]

BATCH_INVARIANT = True
#: Gradients of logits are held in a matrix of at most this many bytes; its rows are at most ROWS_AT_A_TIME.
WORKSPACE_BYTES = 256 << 20
ROWS_AT_A_TIME = 32768
MAX_VOCABULARY_SPLITS = 64
#: Buffers are padded to this many rows and columns: no tile is larger, and every tile's size divides it.
PADDING = 128
MERGE_ROWS = 128
MERGE_WARPS = 4


@dataclass(frozen=True)
class Tile:
    """A kernel's output block, its step along the summed dimension, and how it is scheduled."""

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int

    def num_programs(self, num_rows: int, num_columns: int) -> int:
        return _ceil_div(num_rows, self.rows) * _ceil_div(num_columns, self.columns)


def tile_for(chip: Chip, dtype: torch.dtype, *, aligned: bool, keep: int = 0) -> Tile:
    """The one tile of the kernels with a dot on `chip`; nothing is tuned at run time.

    Autotuning would run kernels that add to their output several times over it. The larger tile is the better one as long as
    it leaves no spill, which is what the ahead-of-time tests check for every answer of this function.
    """
    stages = {"sm_80": 3, "gfx942": 2}.get(chip.name, 4)
    if dtype == torch.float32:
        unaligned = Tile(32, 64, 32, 4, 2) if chip.name == "sm_80" else Tile(64, 64, 32, 8, 2)
        return Tile(64, 64, 32, 4, min(stages, 3)) if aligned else unaligned
    if not aligned:
        return Tile(64, 64, 64, 8, 2)
    return Tile(64 if keep else 128, 128, 64, 8, stages)


KEPT_TILE = Tile(16, 128, 0, 4, 1)
#: A block of rows whose gradients are written is at least this high: the sums read whole blocks.
SUMS_TILE = Tile(32, 64, 0, 4, 2)


def statistics(
    hidden_NH: torch.Tensor,
    weight_UH: torch.Tensor,
    bias_U: torch.Tensor | None,
    columns_N: torch.Tensor,
    floor_N: torch.Tensor | None,
    *,
    temperature: float,
    with_entropy: bool,
    top_k: int,
    chunk_tokens: int,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(packed_4N float32, topk_logits_NK, topk_columns_NK); the last two None unless top_k > 0.

    packed: m = max z, s = sum exp(z - m), x = sum (z - m) exp(z - m) (0 unless with_entropy), z at columns_N (0 where that is
    -1), over columns with z >= floor and the label's own. With top_k the logits of `chunk_tokens` rows at a time are written
    to memory and read once more; otherwise `chunk_tokens` means nothing here.
    """
    if not top_k:
        return _statistics(hidden_NH, weight_UH, bias_U, columns_N, floor_N, temperature, softcap, with_entropy), None, None
    num_rows, num_columns = hidden_NH.shape[0], weight_UH.shape[0]
    size = _padded(min(chunk_tokens, num_rows)) * _padded(num_columns)
    kept = torch.empty(size, dtype=torch.float32, device=hidden_NH.device)
    pieces = []
    for start in range(0, num_rows, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, num_rows))
        floor = None if floor_N is None else floor_N[rows]
        packed = _statistics(
            *(hidden_NH[rows], weight_UH, bias_U, columns_N[rows], floor, temperature, softcap, with_entropy), kept=kept, keep=1
        )
        logits = kept.view(-1, _padded(num_columns))[: rows.stop - start, :num_columns]
        _, values, columns = logits_logprobs.statistics(
            logits, columns_N[rows], None, temperature=1.0, with_entropy=False, top_k=top_k
        )
        pieces.append((packed, values, columns))
    packed, values, columns = zip(*pieces, strict=True)
    return torch.cat(packed, 1), torch.cat(values), torch.cat(columns)


def gradients(
    hidden_NH: torch.Tensor,
    weight_UH: torch.Tensor,
    bias_U: torch.Tensor | None,
    columns_N: torch.Tensor,
    floor_N: torch.Tensor | None,
    lse_N: torch.Tensor,
    coefficients_3N: torch.Tensor,
    *,
    temperature: float,
    grad_hidden_NH: torch.Tensor | None,
    grad_weight_UH: torch.Tensor | None,
    grad_bias_U: torch.Tensor | None,
    accumulate: bool,
    chunk_tokens: int,
    softcap: float = 0.0,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> None:
    """Fills the outputs that are not None from dz = p (a + b (z - lse)) + c [column], coefficients (a, b, c) per row.

    grad_hidden float32, overwritten; grad_weight and grad_bias added to if `accumulate` (float32 only), else overwritten.
    `workspace_bytes` bounds the matrix of dz, down to 128 columns of min(N, 32768) rows; `chunk_tokens` means nothing here.
    """
    from skyrl_mega_kernels.linear_logprobs import triton_kernels
    from skyrl_mega_kernels.triton_jit import launch

    if accumulate and grad_weight_UH is not None and grad_weight_UH.dtype != torch.float32:
        raise ValueError(f"grad_weight ({grad_weight_UH.dtype}) must be torch.float32 to accumulate: lower sums lose gradients.")
    hidden_NH, weight_UH = _aligned(hidden_NH), _aligned(weight_UH)
    (num_rows, hidden_size), num_columns = hidden_NH.shape, weight_UH.shape[0]
    chip, aligned = chip_of(hidden_NH.device), hidden_size % 64 == 0
    tile = tile_for(chip, hidden_NH.dtype, aligned=aligned)
    height = min(num_rows, ROWS_AT_A_TIME)
    width = _slice_width(height, num_columns, hidden_NH.element_size(), workspace_bytes)
    workspace = hidden_NH.new_empty(_padded(height) * width)
    for slice_start in range(0, num_columns, width):
        columns = slice(slice_start, min(slice_start + width, num_columns))
        # The sum over several blocks of rows is kept in float32, also where the result is not.
        weight_sum = None if grad_weight_UH is None else grad_weight_UH[columns]
        if weight_sum is not None and num_rows > height:
            weight_sum = weight_sum if weight_sum.dtype == torch.float32 else torch.empty_like(weight_sum, dtype=torch.float32)
        stride = _padded(columns.stop - columns.start)
        for start in range(0, num_rows, height):
            rows = slice(start, min(start + height, num_rows))
            block = rows.stop - start
            launch(
                *(triton_kernels.recomputed_gradients, (tile.num_programs(block, stride),), hidden_NH.device),
                *(hidden_NH[rows], weight_UH, weight_UH if bias_U is None else bias_U, columns_N[rows]),
                *(lse_N if floor_N is None else floor_N[rows], lse_N[rows], coefficients_3N[:, rows], workspace),
                *(block, num_columns, hidden_size, coefficients_3N.stride(0), slice_start, stride),
                *(bias_U is not None, floor_N is not None, 1.0 / temperature, softcap / temperature),
                **dot_settings(tile, chip, hidden_NH.dtype, aligned),
                BLOCK_N=tile.rows,
                BLOCK_U=tile.columns,
                BLOCK_H=tile.step,
            )
            _reduce(
                *(workspace, stride, hidden_NH[rows], weight_UH[columns]),
                grad_hidden=None if grad_hidden_NH is None else grad_hidden_NH[rows],
                grad_weight=weight_sum,
                grad_bias=None if grad_bias_U is None else grad_bias_U[columns],
                add_to_hidden=slice_start > 0,
                add_to_weight=accumulate or start > 0,
            )
        if grad_weight_UH is not None and weight_sum is not None and weight_sum.dtype != grad_weight_UH.dtype:
            grad_weight_UH[columns] = weight_sum


def workspace_size(num_rows: int, num_columns: int, dtype: torch.dtype) -> int:
    """float32 elements of the buffer that holds one chunk's logits between `chunk_statistics` and `chunk_gradients`."""
    return _padded(num_rows) * _padded(num_columns)


def chunk_statistics(
    hidden_CH: torch.Tensor,
    weight_UH: torch.Tensor,
    bias_U: torch.Tensor | None,
    columns_C: torch.Tensor,
    floor_C: torch.Tensor | None,
    workspace: torch.Tensor,
    *,
    temperature: float,
    with_entropy: bool,
    softcap: float = 0.0,
) -> torch.Tensor:
    """packed_4C as `statistics` gives it; leaves the chunk's exact float32 logits in `workspace`."""
    kept, keep = _kept_view(workspace, hidden_CH, weight_UH)
    return _statistics(
        *(hidden_CH, weight_UH, bias_U, columns_C, floor_C, temperature, softcap, with_entropy), kept=kept, keep=keep
    )


def chunk_gradients(
    hidden_CH: torch.Tensor,
    weight_UH: torch.Tensor,
    columns_C: torch.Tensor,
    floor_C: torch.Tensor | None,
    lse_C: torch.Tensor,
    coefficients_3C: torch.Tensor,
    workspace: torch.Tensor,
    *,
    temperature: float,
    grad_hidden_CH: torch.Tensor | None,
    grad_weight_UH: torch.Tensor | None,
    grad_bias_U: torch.Tensor | None,
    softcap: float = 0.0,
) -> None:
    """As `gradients`, from the logits in `workspace`, which it destroys. Adds to grad_weight and grad_bias (float32)."""
    from skyrl_mega_kernels.linear_logprobs import triton_kernels
    from skyrl_mega_kernels.triton_jit import launch

    hidden_CH, weight_UH = _aligned(hidden_CH), _aligned(weight_UH)
    kept, keep = _kept_view(workspace, hidden_CH, weight_UH)
    num_rows, stride = hidden_CH.shape[0], _padded(weight_UH.shape[0])
    dz = kept.view(hidden_CH.dtype)
    launch(
        *(triton_kernels.kept_gradients, (_padded(num_rows) // KEPT_TILE.rows, stride // KEPT_TILE.columns), kept.device),
        *(columns_C, lse_C if floor_C is None else floor_C, lse_C, coefficients_3C, kept, dz),
        *(num_rows, weight_UH.shape[0], coefficients_3C.stride(0), stride, _padded(num_rows) * stride),
        *(floor_C is not None, 1.0 / temperature, softcap / temperature),
        num_warps=KEPT_TILE.num_warps,
        num_stages=KEPT_TILE.num_stages,
        BLOCK_N=KEPT_TILE.rows,
        BLOCK_U=KEPT_TILE.columns,
        KEEP=keep,
    )
    _reduce(
        *(dz, stride, hidden_CH, weight_UH),
        grad_hidden=grad_hidden_CH,
        grad_weight=grad_weight_UH,
        grad_bias=grad_bias_U,
        add_to_hidden=False,
        add_to_weight=True,
    )


# -- launches ---------------------------------------------------------------------------------------------------------------


def _statistics(hidden, weight, bias, columns, floor, temperature, softcap, with_entropy, *, kept=None, keep=0) -> torch.Tensor:
    """packed [4, rows]; with `keep` the logits go to `kept`."""
    from skyrl_mega_kernels.linear_logprobs import triton_kernels
    from skyrl_mega_kernels.triton_jit import launch

    hidden, weight = _aligned(hidden), _aligned(weight)
    (num_rows, hidden_size), num_columns = hidden.shape, weight.shape[0]
    chip, aligned = chip_of(hidden.device), hidden_size % 64 == 0
    tile = tile_for(chip, hidden.dtype, aligned=aligned, keep=keep)
    columns_per_split = _ceil_div(_ceil_div(num_columns, tile.columns), MAX_VOCABULARY_SPLITS) * tile.columns
    num_splits = _ceil_div(num_columns, columns_per_split)
    partials = torch.empty((num_splits, 4, num_rows), dtype=torch.float32, device=hidden.device)
    packed = torch.empty((4, num_rows), dtype=torch.float32, device=hidden.device)
    stride = _padded(num_columns)
    launch(
        *(triton_kernels.statistics_partials, (_ceil_div(num_rows, tile.rows) * num_splits,), hidden.device),
        *(hidden, weight, weight if bias is None else bias, columns, partials if floor is None else floor, partials),
        *(partials if kept is None else kept, num_rows, num_columns, hidden_size, columns_per_split, num_splits),
        *(stride, _padded(num_rows) * stride, bias is not None, floor is not None, 1.0 / temperature, softcap / temperature),
        **dot_settings(tile, chip, hidden.dtype, aligned),
        BLOCK_N=tile.rows,
        BLOCK_U=tile.columns,
        BLOCK_H=tile.step,
        KEEP=keep,
    )
    launch(
        *(triton_kernels.merge_partials, (_ceil_div(num_rows, MERGE_ROWS),), hidden.device),
        *(partials, packed, num_rows, num_splits, with_entropy),
        num_warps=MERGE_WARPS,
        num_stages=1,
        BLOCK=MERGE_ROWS,
    )
    return packed


def _reduce(dz, stride, hidden, weight, *, grad_hidden, grad_weight, grad_bias, add_to_hidden, add_to_weight) -> None:
    """The sums of one block of gradients dz, [rows, stride] padded with zeros, over its columns and over its rows."""
    from skyrl_mega_kernels.linear_logprobs import triton_kernels
    from skyrl_mega_kernels.triton_jit import launch

    num_rows, num_columns = hidden.shape[0], weight.shape[0]
    if grad_hidden is not None:
        _product(dz, stride, weight, grad_hidden, num_rows, num_columns, add_to_hidden, transposed=False)
    if grad_weight is not None:
        _product(dz, stride, hidden, grad_weight, num_columns, num_rows, add_to_weight, transposed=True)
    if grad_bias is not None:
        launch(
            *(triton_kernels.column_sums, (_ceil_div(num_columns, SUMS_TILE.columns),), dz.device),
            *(dz, grad_bias, num_columns, num_rows, stride, add_to_weight),
            num_warps=SUMS_TILE.num_warps,
            num_stages=SUMS_TILE.num_stages,
            BLOCK_N=SUMS_TILE.rows,
            BLOCK_U=SUMS_TILE.columns,
        )


def _product(dz, stride, right, out, num_out_rows, summed, add: bool, *, transposed: bool) -> None:
    """out [num_out_rows, H] (+)= dz @ right, or dz^T @ right."""
    from skyrl_mega_kernels.linear_logprobs import triton_kernels
    from skyrl_mega_kernels.triton_jit import launch

    hidden_size = right.shape[1]
    chip, aligned = chip_of(dz.device), hidden_size % 64 == 0
    tile = tile_for(chip, right.dtype, aligned=aligned)
    launch(
        *(triton_kernels.accumulate_product, (tile.num_programs(num_out_rows, hidden_size),), dz.device),
        *(dz, right, out, num_out_rows, summed, hidden_size, stride, add),
        **dot_settings(tile, chip, right.dtype, aligned),
        BLOCK_M=tile.rows,
        BLOCK_H=tile.columns,
        BLOCK_K=tile.step,
        TRANSPOSED=transposed,
    )


def dot_settings(tile: Tile, chip: Chip, dtype: torch.dtype, aligned: bool) -> dict[str, Any]:
    """Schedule and constexprs that the kernels with a dot have in common."""
    precision = chip.float32_precision if dtype == torch.float32 else "ieee"
    return dict(num_warps=tile.num_warps, num_stages=tile.num_stages, GROUP=16, ALIGNED=aligned, PRECISION=precision)


def _kept_view(workspace: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the workspace as the kernels address it, how the logits lie in it); see `statistics_partials`."""
    needed = workspace_size(hidden.shape[0], weight.shape[0], hidden.dtype)
    if workspace.numel() < needed or workspace.dtype != torch.float32 or workspace.data_ptr() % 16:
        raise ValueError(
            f"workspace ({workspace.numel()} x {workspace.dtype}) must hold {needed} float32 elements, 16-byte aligned, for "
            f"{hidden.shape[0]} rows and {weight.shape[0]} columns; see workspace_size."
        )
    return (workspace, 1) if hidden.dtype == torch.float32 else (workspace.view(torch.int16), 2)


def _slice_width(num_rows: int, num_columns: int, element_size: int, workspace_bytes: int) -> int:
    columns = workspace_bytes // (_padded(num_rows) * element_size) // PADDING * PADDING
    return min(max(columns, PADDING), _padded(num_columns))


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or a copy where it starts off a 16-byte border: a view into a buffer may."""
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


def _padded(size: int) -> int:
    return _ceil_div(size, PADDING) * PADDING


def _ceil_div(size: int, part: int) -> int:
    return -(-size // part)
