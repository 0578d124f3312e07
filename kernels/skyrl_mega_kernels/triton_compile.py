"""Every variant of the Triton kernels that can run, compiled for chips that are elsewhere, and what the machine code shows.

`variants(chip)` lists them from the same tables that the launches use. `inspect(variant)` compiles one, without a GPU, and
reads registers, stack, shared memory and instructions out of the result. Kernels must not be interpreted: not in a process
with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import collections
import inspect as python_inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from skyrl_mega_kernels.linear_logprobs import triton as linear
from skyrl_mega_kernels.linear_logprobs import triton_kernels as linear_kernels
from skyrl_mega_kernels.logits_logprobs import triton as logits
from skyrl_mega_kernels.logits_logprobs import triton_kernels as logits_kernels
from skyrl_mega_kernels.loss_terms import triton as loss_terms
from skyrl_mega_kernels.loss_terms import triton_kernels as loss_terms_kernels
from skyrl_mega_kernels.policy_loss import triton as policy_loss
from skyrl_mega_kernels.policy_loss import triton_kernels as policy_loss_kernels
from skyrl_mega_kernels.segmented_gae import triton as scan
from skyrl_mega_kernels.segmented_gae import triton_kernels as scan_kernels
from skyrl_mega_kernels.triton_targets import DTYPES, Chip, occupancy

_TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
#: Types of the kernels' arguments by name; `*` stands for the inputs' dtype, and what is not listed is a 32-bit integer.
_ARGUMENTS = {
    **dict.fromkeys(("hidden", "weight", "bias", "logits", "gradients", "left", "right"), "**"),
    **dict.fromkeys(("floors", "partials", "packed", "lses", "coefficients", "top_logits", "decay", "values", "out"), "*fp32"),
    **dict.fromkeys(("logprobs", "denominators", "advantages", "weights", "loss_weights", "gradient", "sums"), "*fp32"),
    **dict.fromkeys(("trainer_logprobs", "rollout_logprobs", "ref_logprobs", "entropy"), "*fp32"),
    **dict.fromkeys(("logprobs_gradient", "entropy_gradient"), "*fp32"),
    **dict.fromkeys(("loss_mask", "marked"), "*u8"),
    **dict.fromkeys(("option_0", "option_1", "option_2", "kl_coef", "entropy_coef"), "fp32"),
    **dict.fromkeys(("label_columns", "top_columns", "cu_seqlens"), "*i64"),
    **dict.fromkeys(("has_bias", "has_floor", "with_entropy", "accumulate"), "u1"),
    **dict.fromkeys(("scale", "cap"), "fp32"),
}
_SASS_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled for one chip: its constexprs, schedule, and the dtype of its inputs."""

    kernel: str
    function: Any
    chip: Chip
    dtype: torch.dtype
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    types: Mapping[str, str]
    has_dot: bool

    @property
    def name(self) -> str:
        """For people, and unique within a chip."""
        settings = " ".join(f"{key}={value}" for key, value in self.constexprs.items())
        others = " ".join(f"{key}:{value}" for key, value in self.types.items())
        return " ".join(filter(None, (self.kernel, _TYPE_NAMES[self.dtype], settings, others)))


@dataclass(frozen=True)
class Inspection:
    """What the compiler made: per lane, per block, and the matrix instructions found. Spills count loads and stores."""

    name: str
    kernel: str
    chip: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    matrix_instruction: str
    matrix_instructions: int
    has_dot: bool
    blocks_per_sm: int
    warps_per_sm: int
    occupancy_limited_by: str


def variants(chip: Chip) -> Iterator[Variant]:
    """Every variant of every kernel that can be chosen on `chip`."""
    for dtype in DTYPES:
        for aligned in (True, False):
            yield from _dot_variants(chip, dtype, aligned)
        yield _plain(
            "kept_gradients",
            linear_kernels.kept_gradients,
            chip,
            dtype,
            linear.KEPT_TILE,
            dict(BLOCK_N=linear.KEPT_TILE.rows, BLOCK_U=linear.KEPT_TILE.columns, KEEP=_keep(dtype)),
            types={"kept": _kept_type(_keep(dtype))},
        )
        sums = dict(BLOCK_N=linear.SUMS_TILE.rows, BLOCK_U=linear.SUMS_TILE.columns)
        yield _plain("column_sums", linear_kernels.column_sums, chip, dtype, linear.SUMS_TILE, sums)
    merge_tile = linear.Tile(linear.MERGE_ROWS, 1, 0, linear.MERGE_WARPS, 1)
    merge = dict(BLOCK=linear.MERGE_ROWS)
    yield _plain("merge_partials", linear_kernels.merge_partials, chip, torch.float32, merge_tile, merge)
    yield from _logits_variants(chip)
    scan_tile = linear.Tile(1, scan.BLOCK, 0, scan.NUM_WARPS, 1)
    yield _plain("segmented_scan", scan_kernels.segmented_scan, chip, torch.float32, scan_tile, dict(BLOCK=scan.BLOCK))
    loss_tile = linear.Tile(1, policy_loss.BLOCK, 0, policy_loss.NUM_WARPS, 1)
    for whole, function in (
        (False, policy_loss_kernels.token_policy_loss),
        (True, policy_loss_kernels.sequence_policy_loss),
    ):
        for name in policy_loss.COMPILED[whole]:
            constexprs = dict(LOSS=name, BLOCK=policy_loss.BLOCK)
            yield _plain("policy_loss", function, chip, torch.float32, loss_tile, constexprs)
    for estimator, has_entropy in loss_terms.COMPILED:
        constexprs = dict(KL=estimator, HAS_ENTROPY=has_entropy, BLOCK=loss_terms.BLOCK)
        yield _plain("loss_terms", loss_terms_kernels.loss_terms, chip, torch.float32, loss_tile, constexprs)


def inspect(variant: Variant) -> Inspection:
    """Compiles one variant and reads its machine code."""
    chip = variant.chip
    signature = {
        name: "constexpr" if parameter.annotation is tl.constexpr else _argument_type(name, variant)
        for name, parameter in python_inspect.signature(variant.function.fn).parameters.items()
    }
    compiled = triton.compile(
        ASTSource(fn=variant.function, signature=signature, constexprs=dict(variant.constexprs)),
        target=GPUTarget(chip.triton_backend, chip.triton_arch, chip.warp_size),
        options=dict(num_warps=variant.num_warps, num_stages=variant.num_stages, enable_fp_fusion=True),
    )
    read = _read_amdgcn if chip.triton_backend == "hip" else _read_cubin
    found = read(compiled.asm, chip)
    fits = occupancy(chip, registers=found["registers"], shared_bytes=compiled.metadata.shared, num_warps=variant.num_warps)
    return Inspection(
        name=variant.name,
        kernel=variant.kernel,
        chip=chip.name,
        num_warps=variant.num_warps,
        num_stages=variant.num_stages,
        shared_bytes=compiled.metadata.shared,
        has_dot=variant.has_dot,
        matrix_instruction=chip.matrix_instruction,
        blocks_per_sm=fits.blocks,
        warps_per_sm=fits.warps,
        occupancy_limited_by=fits.limited_by,
        **found,
    )


def _dot_variants(chip: Chip, dtype: torch.dtype, aligned: bool) -> Iterator[Variant]:
    def variant(name: str, function, tile: linear.Tile, blocks: tuple[str, str, str], types=None, **constexprs):
        settings = linear.dot_settings(tile, chip, dtype, aligned)
        return Variant(
            kernel=name,
            function=function,
            chip=chip,
            dtype=dtype,
            num_warps=settings.pop("num_warps"),
            num_stages=settings.pop("num_stages"),
            constexprs=dict(zip(blocks, (tile.rows, tile.columns, tile.step), strict=True)) | settings | constexprs,
            types=types or {},
            has_dot=True,
        )

    logits_blocks = ("BLOCK_N", "BLOCK_U", "BLOCK_H")
    for keep in sorted({0, 1, _keep(dtype)}):
        tile = linear.tile_for(chip, dtype, aligned=aligned, keep=keep)
        types = {"kept": _kept_type(keep)}
        yield variant("statistics", linear_kernels.statistics_partials, tile, logits_blocks, types, KEEP=keep)
    tile = linear.tile_for(chip, dtype, aligned=aligned)
    yield variant("gradients", linear_kernels.recomputed_gradients, tile, logits_blocks)
    for transposed in (False, True):
        for out in dict.fromkeys(("fp32", _TYPE_NAMES[dtype]) if transposed else ("fp32",)):
            name, blocks = "grad_weight" if transposed else "grad_hidden", ("BLOCK_M", "BLOCK_H", "BLOCK_K")
            function = linear_kernels.accumulate_product
            yield variant(name, function, tile, blocks, {"out": f"*{out}"}, TRANSPOSED=transposed)


def _logits_variants(chip: Chip) -> Iterator[Variant]:
    for dtype in logits.DTYPES:
        own = {"out": f"*{_TYPE_NAMES[dtype]}"}
        for aligned in (True, False):
            for top_k in (0,) if aligned else (0, *logits.TOP_K_SIZES):
                block = logits.STATISTICS_WITH_TOP_K if top_k else logits.STATISTICS
                tile = linear.Tile(1, block.columns, 0, block.num_warps, logits.NUM_STAGES)
                constexprs = dict(BLOCK=block.columns, TOP_K=top_k, ALIGNED=aligned)
                yield _plain("logits_statistics", logits_kernels.statistics_rows, chip, dtype, tile, constexprs)
            block = logits.GRADIENTS
            tile = linear.Tile(1, block.columns, 0, block.num_warps, logits.NUM_STAGES)
            constexprs = dict(BLOCK=block.columns, ALIGNED=aligned)
            yield _plain("logits_gradients", logits_kernels.gradient_rows, chip, dtype, tile, constexprs, types=own)


def _plain(name, function, chip, dtype, tile: linear.Tile, constexprs, types=None) -> Variant:
    settings = dict(num_warps=tile.num_warps, num_stages=tile.num_stages, constexprs=constexprs, types=types or {})
    return Variant(kernel=name, function=function, chip=chip, dtype=dtype, has_dot=False, **settings)


def _keep(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.float32 else 2


def _kept_type(keep: int) -> str:
    return "*i16" if keep == 2 else "*fp32"


def _argument_type(name: str, variant: Variant) -> str:
    of_kind = variant.types.get(name) or _ARGUMENTS.get(name, "i32")
    return f"*{_TYPE_NAMES[variant.dtype]}" if of_kind == "**" else of_kind


def _read_cubin(asm: Mapping[str, Any], chip: Chip) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump's resource usage has changed its form: {text[-500:]!r}")
    registers, stack, local = map(int, found.groups())
    counts = collections.Counter(name.split(".")[0] for name in _SASS_INSTRUCTION.findall(text))
    return {
        "registers": registers,
        "stack_bytes": stack + local,
        "spills": counts["LDL"] + counts["STL"],
        "matrix_instructions": counts[chip.matrix_instruction],
    }


def _read_amdgcn(asm: Mapping[str, Any], chip: Chip) -> dict[str, int]:
    text = asm["amdgcn"]

    def field(name: str) -> int:
        found = re.findall(rf"\.{name}:\s+(\d+)", text)
        if not found:
            raise RuntimeError(f"the AMD assembly has no field .{name}")
        return int(found[-1])

    return {
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        # Scalar registers spill into lanes of vector registers, not to memory: they show up in those.
        "spills": field("vgpr_spill_count") + len(re.findall(r"\bscratch_(?:load|store)", text)),
        "matrix_instructions": text.count(chip.matrix_instruction),
    }
