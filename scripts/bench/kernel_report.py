"""What the compilers made of the Triton kernels, per chip, and the times that a roofline model gives them.

Every variant that can run is compiled for every chip, without a GPU. Registers, shared memory, occupancy and matrix
instructions are read from the machine code. Bytes and floating-point operations are counted from the algorithm, for one head
of the size below, and the time is the larger of bytes / bandwidth and operations / peak rate, with the makers' figures: it is
MODELLED, NOT MEASURED, a bound from below that no run has confirmed.

    python scripts/bench/kernel_report.py --json docs/benchmarks/kernel_report.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_ROWS, HIDDEN, VOCAB, SEGMENTS, SEGMENT_TOKENS = 16384, 4096, 151936, 64, 2048
MODEL_NOTE = "modelled, not measured: max(bytes / bandwidth, operations / peak) with the makers' figures"


@dataclass(frozen=True)
class Work:
    """What one whole pass does: floating-point operations on the matrix units, and bytes to and from memory at least once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class ReportLine:
    """One variant on one chip: what was found in its machine code, and the model's time."""

    found: dict[str, Any]
    dtype: str
    flops: float
    bytes: float
    modelled_ms: float
    modelled_limit: str


def work_of(kernel: str, element_bytes: int, constexprs: dict[str, Any]) -> Work:
    """Operations and bytes of `kernel` over the whole head (or, for the scan and the policy losses, all segments)."""
    product = 2.0 * NUM_ROWS * HIDDEN * VOCAB
    hidden, weight, logits = NUM_ROWS * HIDDEN, VOCAB * HIDDEN, NUM_ROWS * VOCAB
    inputs = (hidden + weight) * element_bytes
    kept = 4.0 * logits if constexprs.get("KEEP") else 0.0
    slices = max(1, logits * element_bytes // (256 << 20))
    terms_bytes = 13.0 + 12.0 * bool(constexprs.get("KL")) + 8.0 * bool(constexprs.get("HAS_ENTROPY"))
    works = {
        "statistics": Work(product, inputs + kept),
        "merge_partials": Work(0, 64 * 4 * NUM_ROWS * 4),
        # hidden is read again for every slice, and grad_hidden read and written.
        "gradients": Work(product, weight * element_bytes + slices * hidden * element_bytes + logits * element_bytes),
        "kept_gradients": Work(0, 4.0 * logits + logits * element_bytes),
        "grad_hidden": Work(product, (logits + weight) * element_bytes + slices * hidden * 8.0),
        "grad_weight": Work(product, (logits + slices * hidden) * element_bytes + weight * 4.0),
        "column_sums": Work(0, logits * element_bytes),
        "logits_statistics": Work(0, logits * element_bytes),
        "logits_gradients": Work(0, 2.0 * logits * element_bytes),
        "segmented_scan": Work(0, 3.0 * 4 * SEGMENTS * SEGMENT_TOKENS),
        "policy_loss": Work(0, 21.0 * SEGMENTS * SEGMENT_TOKENS),
        "loss_terms": Work(0, terms_bytes * SEGMENTS * SEGMENT_TOKENS),
    }
    return works[kernel]


def report_lines(chip_names: list[str]) -> list[ReportLine]:
    """Compiles and models every variant of the chips."""
    from skyrl_mega_kernels.triton_compile import inspect, variants
    from skyrl_mega_kernels.triton_targets import CHIPS

    lines = []
    for chip_name in chip_names:
        chip = CHIPS[chip_name]
        for variant in variants(chip):
            print(f"{chip_name} {variant.name}", file=sys.stderr, flush=True)
            work = work_of(variant.kernel, variant.dtype.itemsize, dict(variant.constexprs))
            peak = (chip.bfloat16_tflops if variant.dtype.itemsize == 2 else chip.float32_tflops) * 1e12
            seconds = {"memory": work.bytes / (chip.bandwidth_tb_s * 1e12), "matrix units": work.flops / peak}
            limit = max(seconds, key=lambda name: seconds[name])
            lines.append(
                ReportLine(
                    found=dataclasses.asdict(inspect(variant)),
                    dtype=str(variant.dtype).removeprefix("torch."),
                    flops=work.flops,
                    bytes=work.bytes,
                    modelled_ms=1e3 * seconds[limit],
                    modelled_limit=limit,
                )
            )
    return lines


def print_table(lines: list[ReportLine]) -> None:
    """One row per variant on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{NUM_ROWS} rows x {HIDDEN} hidden x {VOCAB} vocabulary; times are {MODEL_NOTE}")
    for title in ("chip", "kernel", "dtype", "variant"):
        table.add_column(title)
    for title in ("registers", "shared KiB", "blocks/SM", "warps/SM", "matrix ops", "GB", "TFLOP", "modelled ms", "limit"):
        table.add_column(title, justify="right")
    for line in lines:
        found = line.found
        variant = " ".join(part for part in found["name"].split()[2:] if not part.startswith(("GROUP", "PRECISION")))
        matrix = f"{found['matrix_instructions']} {found['matrix_instruction']}" if found["has_dot"] else "-"
        table.add_row(
            *(found["chip"], found["kernel"], line.dtype, variant, str(found["registers"])),
            *(f"{found['shared_bytes'] / 1024:.1f}", str(found["blocks_per_sm"]), str(found["warps_per_sm"]), matrix),
            *(f"{line.bytes / 1e9:.2f}", f"{line.flops / 1e12:.1f}", f"{line.modelled_ms:.3f}", line.modelled_limit),
        )
    Console(width=None if sys.stdout.isatty() else 230).print(table)


def main() -> None:
    """The command line."""
    from skyrl_mega.telemetry.versions import collect_versions, git_commit
    from skyrl_mega_kernels.triton_targets import CHIPS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--chips", default=",".join(CHIPS), help="names separated by commas (default: all)")
    args = parser.parse_args()
    unknown = [name for name in args.chips.split(",") if name not in CHIPS]
    if unknown:
        parser.error(f"--chips {unknown[0]!r} must be among {', '.join(CHIPS)}")

    lines = report_lines(args.chips.split(","))
    print_table(lines)
    if args.json is not None:
        import triton

        report = {
            "times": MODEL_NOTE,
            "shape": {"rows": NUM_ROWS, "hidden": HIDDEN, "vocab": VOCAB, "segments": SEGMENTS, "segment_tokens": SEGMENT_TOKENS},
            "chips": {name: dataclasses.asdict(CHIPS[name]) for name in args.chips.split(",")},
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "versions": {**collect_versions(), "triton": triton.__version__},
            "commit": git_commit(),
            "variants": [dataclasses.asdict(line) for line in lines],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
