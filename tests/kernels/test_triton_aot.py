"""Every variant of the Triton kernels that can run, compiled for GPUs that are elsewhere; claims about the machine code.

No GPU takes part. The variants of one chip are compiled in a process of their own: kernels imported under
TRITON_INTERPRET=1 can't be compiled, and the compilers' memory is given back. Results are kept on disk for the session.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from skyrl_mega_kernels.triton_targets import CHIPS, Occupancy, occupancy

#: One chip of each maker in every run; the compilers need 80 to 100 s of a core for each of the others, so they are nightly.
EVERY_RUN = {"sm_90", "gfx942"}
CHIP_NAMES = pytest.mark.parametrize(
    "chip_name", [pytest.param(name, marks=[] if name in EVERY_RUN else pytest.mark.nightly) for name in CHIPS]
)
COMPILE = """
import dataclasses, json, sys
from skyrl_mega_kernels.triton_compile import inspect, variants
from skyrl_mega_kernels.triton_targets import CHIPS

print(json.dumps([dataclasses.asdict(inspect(variant)) for variant in variants(CHIPS[sys.argv[1]])]))
"""
#: At least so many warps of a kernel fit on a multiprocessor; the registers that this leaves to a lane are its budget.
WARPS_WANTED = {
    "statistics": 4,
    "gradients": 4,
    "grad_hidden": 4,
    "grad_weight": 4,
    "kept_gradients": 16,
    "column_sums": 16,
    "merge_partials": 16,
    "logits_statistics": 8,
    "logits_gradients": 16,
    "segmented_scan": 8,
    "policy_loss": 8,
    "loss_terms": 8,
}


@pytest.fixture(scope="session")
def inspections(tmp_path_factory):
    """chip name -> what was found in each of its variants; each chip is compiled at its first use."""
    folder = tmp_path_factory.mktemp("triton_aot")

    def of_chip(chip_name):
        kept = folder / f"{chip_name}.json"
        if not kept.exists():
            environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
            environment.pop("TRITON_INTERPRET", None)
            command = [sys.executable, "-c", COMPILE, chip_name]
            finished = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
            assert finished.returncode == 0, finished.stderr[-4000:]
            kept.write_text(finished.stdout)
        return json.loads(kept.read_text())

    return of_chip


def failing(found, claim):
    return [one["name"] for one in found if not claim(one)]


@CHIP_NAMES
def test_no_variant_spills_or_uses_a_stack(inspections, chip_name):
    assert failing(inspections(chip_name), lambda one: one["stack_bytes"] == 0 and one["spills"] == 0) == []


@CHIP_NAMES
def test_shared_memory_fits_the_chip(inspections, chip_name):
    limit = CHIPS[chip_name].shared_bytes
    assert failing(inspections(chip_name), lambda one: one["shared_bytes"] <= limit) == []


@CHIP_NAMES
def test_every_dot_runs_on_the_matrix_units_and_nothing_else_does(inspections, chip_name):
    assert failing(inspections(chip_name), lambda one: (one["matrix_instructions"] > 0) == one["has_dot"]) == []


@CHIP_NAMES
def test_registers_leave_room_for_the_warps_that_each_kernel_wants(inspections, chip_name):
    found = inspections(chip_name)
    assert {one["kernel"] for one in found} == set(WARPS_WANTED)
    assert failing(found, lambda one: one["warps_per_sm"] >= WARPS_WANTED[one["kernel"]]) == []


@CHIP_NAMES
def test_variants_have_names_of_their_own(inspections, chip_name):
    names = [one["name"] for one in inspections(chip_name)]
    assert len(set(names)) == len(names)


def test_occupancy_is_that_of_the_makers_tables():
    h100, mi300 = CHIPS["sm_90"], CHIPS["gfx942"]
    assert occupancy(h100, registers=32, shared_bytes=0, num_warps=4) == Occupancy(16, 64, "warps")
    assert occupancy(h100, registers=255, shared_bytes=0, num_warps=4) == Occupancy(2, 8, "registers")
    assert occupancy(h100, registers=128, shared_bytes=100 << 10, num_warps=8) == Occupancy(2, 16, "registers")
    assert occupancy(h100, registers=64, shared_bytes=100 << 10, num_warps=8) == Occupancy(2, 16, "shared memory")
    assert occupancy(mi300, registers=128, shared_bytes=16 << 10, num_warps=4) == Occupancy(4, 16, "registers")
