"""The CUDA sources without a GPU: nvcc compiles them for every chip without a spilled register, g++ compiles their binding."""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
CHIPS = ("sm_80", "sm_90a", "sm_100a")
REGISTERS_PER_MULTIPROCESSOR = 65536
#: Threads per block and the blocks that must fit beside each other on a multiprocessor.
OCCUPANCY = {"segmented_scan": (256, 2), "logits_logprobs": (512, 1)}


def run(*command):
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-4000:] + finished.stdout[-2000:]
    return finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def nvcc():
    path = shutil.which("nvcc")
    if path is None:
        pytest.skip("there is no nvcc on this machine")
    return path


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    """(source, chip) -> (cubin, ptxas's report)."""
    folder = tmp_path_factory.mktemp("cubins")
    results = {}
    for source in sorted(SOURCES.glob("*.cu")):
        for chip in CHIPS:
            cubin = folder / f"{source.stem}.{chip}.cubin"
            flags = ("-std=c++20", "-O3", f"-arch={chip}", "-Xptxas", "-v,--warn-on-spills", "-Werror", "all-warnings")
            results[source.stem, chip] = (cubin, run(nvcc, *flags, "-cubin", source, "-o", cubin))
    return results


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("source", sorted(OCCUPANCY))
def test_kernels_compile_without_a_spill_and_fit_the_occupancy_they_are_written_for(compiled, source, chip):
    _, report = compiled[source, chip]
    stacks = [int(size) for size in re.findall(r"(\d+) bytes stack frame", report)]
    spills = [int(size) for size in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    threads, blocks = OCCUPANCY[source]
    assert registers
    assert len(stacks) == len(registers)
    assert not any(stacks + spills), report
    assert max(registers) * threads * blocks <= REGISTERS_PER_MULTIPROCESSOR


def test_every_source_has_an_occupancy_to_be_held_to():
    assert {path.stem for path in SOURCES.glob("*.cu")} == set(OCCUPANCY)


@pytest.mark.parametrize("chip", CHIPS)
def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(compiled, chip):
    triton = importlib.util.find_spec("triton")  # brings NVIDIA's tools along
    bundled = None if triton is None else str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    disassembler = shutil.which("cuobjdump") or (bundled and shutil.which("cuobjdump", path=bundled))
    if not disassembler:
        pytest.skip("there is no cuobjdump on this machine")
    code = run(disassembler, "-sass", compiled["logits_logprobs", chip][0])
    functions = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*\.{10,}|\Z)", code, flags=re.DOTALL))
    assert len(functions) == 18  # 3 dtypes x aligned or not x (entropy, no entropy, gradients)
    for name, body in functions.items():
        is_aligned = "ILb1E" in name
        assert bool(re.search(r"LDG\.E\.128", body)) == is_aligned, name
        assert bool(re.search(r"STG\.E\.128", body)) == (is_aligned and "gradient_rows" in name), name


def test_the_binding_compiles_against_the_stable_headers_of_a_torch_without_cuda(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ on this machine")
    include = Path(torch.__file__).parent / "include"
    python = sysconfig.get_paths()["include"]
    run(
        *(compiler, "-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-isystem", include, "-isystem", python),
        *("-c", SOURCES / "binding.cpp", "-o", tmp_path / "binding.o"),
    )


def test_the_launchers_that_the_binding_calls_are_the_ones_that_are_compiled():
    declared = set(re.findall(r"\bint (skyrl_mega_\w+)\(", (SOURCES / "launchers.h").read_text()))
    defined = {name for source in SOURCES.glob("*.cu") for name in re.findall(r'extern "C" int (\w+)\(', source.read_text())}
    called = set(re.findall(r"\b(skyrl_mega_\w+)\(", (SOURCES / "binding.cpp").read_text()))
    assert declared == defined == called & (declared | defined)
