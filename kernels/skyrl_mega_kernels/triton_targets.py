"""The GPUs that the Triton kernels are made for: which chip a device is, its limits, and why a device can't run them.

Importable without Triton and without a GPU: tests and `scripts/bench/kernel_report.py` compile for chips that are elsewhere.
Peaks and bandwidths are the makers' figures for dense work, of the product named; they are there to model times, nothing is
chosen by them.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Chip:
    """One target of compilation, and the limits that decide occupancy and the modelled times.

    `registers_per_lane` is what the lanes of one scheduler share (NVIDIA: a quarter of 64 Ki over 32 lanes, 512). A
    block may use `shared_bytes`; the blocks of a multiprocessor share `shared_bytes_per_sm`, and `reserved_shared_bytes` of it
    go to the system for each. float32 dots run as
    `float32_precision`: three TF32 products on NVIDIA, the float32 matrix instructions on AMD.
    """

    name: str
    product: str
    triton_backend: str
    triton_arch: int | str
    warp_size: int
    shared_bytes: int
    shared_bytes_per_sm: int
    reserved_shared_bytes: int
    schedulers_per_sm: int
    registers_per_lane: int
    register_granularity: int
    max_warps_per_scheduler: int
    max_blocks_per_sm: int
    matrix_instruction: str
    float32_precision: str
    bfloat16_tflops: float
    float32_tflops: float
    bandwidth_tb_s: float


_NVIDIA = dict(
    triton_backend="cuda",
    warp_size=32,
    schedulers_per_sm=4,
    registers_per_lane=512,
    register_granularity=8,
    max_warps_per_scheduler=16,
    max_blocks_per_sm=32,
    reserved_shared_bytes=1 << 10,
    float32_precision="tf32x3",
)

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            **_NVIDIA,
            name="sm_80",
            product="A100 SXM 80 GB",
            triton_arch=80,
            shared_bytes=99 << 10,  # 163 KiB on 8.0; 99 on the rest of 8.x, which is served by the same configurations
            shared_bytes_per_sm=164 << 10,
            matrix_instruction="HMMA",
            bfloat16_tflops=312.0,
            float32_tflops=156.0 / 3,
            bandwidth_tb_s=2.04,
        ),
        Chip(
            **_NVIDIA,
            name="sm_90",
            product="H100 SXM",
            triton_arch=90,
            shared_bytes=227 << 10,
            shared_bytes_per_sm=228 << 10,
            matrix_instruction="HGMMA",
            bfloat16_tflops=989.0,
            float32_tflops=494.5 / 3,
            bandwidth_tb_s=3.35,
        ),
        Chip(
            **_NVIDIA,
            name="sm_100",
            product="B200",
            triton_arch=100,
            shared_bytes=227 << 10,
            shared_bytes_per_sm=228 << 10,
            matrix_instruction="UTCHMMA",
            bfloat16_tflops=2250.0,
            float32_tflops=1125.0 / 3,
            bandwidth_tb_s=8.0,
        ),
        Chip(
            name="gfx942",
            product="MI300X",
            triton_backend="hip",
            triton_arch="gfx942",
            warp_size=64,
            shared_bytes=64 << 10,
            shared_bytes_per_sm=64 << 10,
            reserved_shared_bytes=0,
            schedulers_per_sm=4,
            registers_per_lane=512,
            register_granularity=8,
            max_warps_per_scheduler=8,
            max_blocks_per_sm=32,
            matrix_instruction="v_mfma",
            float32_precision="ieee",
            bfloat16_tflops=1307.0,
            float32_tflops=163.4,
            bandwidth_tb_s=5.3,
        ),
    )
}


@dataclass(frozen=True)
class Occupancy:
    """What fits on one multiprocessor at a time, and what stops more: registers, shared memory, warps or blocks."""

    blocks: int
    warps: int
    limited_by: str


def occupancy(chip: Chip, *, registers: int, shared_bytes: int, num_warps: int) -> Occupancy:
    """How many blocks of `num_warps` warps, `registers` a lane and `shared_bytes` a block a multiprocessor holds."""
    rounded = -(-max(registers, 1) // chip.register_granularity) * chip.register_granularity
    warps_by_registers = min(chip.registers_per_lane // rounded, chip.max_warps_per_scheduler) * chip.schedulers_per_sm
    limits = {
        "registers": warps_by_registers // num_warps,
        "shared memory": chip.shared_bytes_per_sm // max(shared_bytes + chip.reserved_shared_bytes, 1),
        "warps": chip.max_warps_per_scheduler * chip.schedulers_per_sm // num_warps,
        "blocks": chip.max_blocks_per_sm,
    }
    limited_by = min(limits, key=lambda name: (limits[name], list(limits).index(name)))
    if limits["warps"] == limits[limited_by]:
        limited_by = "warps"
    return Occupancy(limits[limited_by], limits[limited_by] * num_warps, limited_by)


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors; kernels read the variable when they are first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def chip_of(device: torch.device) -> Chip:
    """The chip whose configurations serve `device`. Raises ValueError with the reason where there is none."""
    reason = _no_chip(device)
    if reason is not None:
        raise ValueError(f"No Triton configuration serves {device}: {reason}.")
    return CHIPS[_chip_name(device)]


def unavailable(device: torch.device, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """Why the Triton kernels can't run for tensors of this device and dtype; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if dtype not in dtypes:
        return f"it computes in {', '.join(str(one) for one in dtypes)}, not {dtype}"
    return _no_chip(device)


def _no_chip(device: torch.device) -> str | None:
    if device.type == "cpu" and not is_interpreted():
        return "it computes on GPUs; on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1, set before the first use)"
    if device.type not in ("cpu", "cuda"):
        return f"it computes on NVIDIA and AMD GPUs, not on {device.type}"
    name = _chip_name(device)
    if name not in CHIPS:
        return f"its configurations are compiled and checked for {', '.join(CHIPS)}, and this device is {name}"
    return None


def _chip_name(device: torch.device) -> str:
    # The interpreter runs the configurations of one chip; any would do.
    return "sm_90" if device.type == "cpu" else _gpu_name(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _gpu_name(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    # Within a generation the instructions are the same; 12.x is compiled differently and has been checked by nobody.
    return {8: "sm_80", 10: "sm_100"}.get(properties.major, f"sm_{properties.major}{properties.minor}")
