"""Package layout, and the compiled kernels: what this machine can build is built, the rest is left out with a reason.

Metadata and dependencies are in pyproject.toml. Two extension modules beside the Python files of `skyrl_mega_kernels`:

    _C        csrc/cpu, C++; needs torch at build time and a C++ compiler. One file serves all CPUs of the platform.
    _C_cuda   csrc/cuda; needs a torch built with CUDA, and nvcc

pip's build isolation hides torch: then both are left out and the install is pure Python. To build them, install torch first and
use `pip install -e . --no-build-isolation`. The environment variable SKYRL_MEGA_BUILD says what to try:

    auto (default)   both; what fails is left out
    cpu              only _C; it is left out if it fails
    none             neither
    required         both as far as this machine has the tools for them; a failure, or no _C, is an error

What became of each goes into `_build_report.json` beside the package's files, where `skyrl-mega doctor` reads it.
"""

import json
import os
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGE = "skyrl_mega_kernels"
MODES = ("auto", "cpu", "none", "required")
# GCC: -Wno-psabi, the kernels pass vectors only between inlined functions; -Wno-*uninitialized, its own AVX-512 headers.
# OpenMP's runtime is the one that torch has loaded: linking a second one would give each its own threads.
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fopenmp",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
#: The GPUs that CUDA C++ is built for where none is at hand (a container's build, a login node) and TORCH_CUDA_ARCH_LIST says
#: nothing; with one, torch builds for that one. The last as PTX too, for newer ones.
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def sources(folder: str, *suffixes: str) -> list[str]:
    """The files of csrc/`folder` with these suffixes, relative to the root, in a fixed order."""
    found = (path for path in (ROOT / "csrc" / folder).glob("*") if path.suffix in suffixes)
    return sorted(str(path.relative_to(ROOT)) for path in found)


def build_mode() -> str:
    """SKYRL_MEGA_BUILD, checked."""
    mode = os.environ.get("SKYRL_MEGA_BUILD") or "auto"
    if mode not in MODES:
        raise SystemExit(f"SKYRL_MEGA_BUILD ({mode}) must be one of {', '.join(MODES)}.")
    return mode


def why_skipped(name: str, mode: str) -> str | None:
    """Why this machine is not to build the extension `name`; None where it should be tried."""
    if mode == "none" or (mode == "cpu" and name == "_C_cuda"):
        return f"SKYRL_MEGA_BUILD is {mode}"
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return "torch can't be imported at build time; install it first and use pip's --no-build-isolation"
    if name == "_C":
        compiler = os.environ.get("CXX", "c++").split()[0]
        return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return f"there is no nvcc for CUDA {torch.version.cuda}; set CUDA_HOME"
    return None if sources("cuda", ".cu") else "csrc/cuda holds no sources"


def choose_architectures() -> None:
    """What CUDA C++ is built for: torch fails with an IndexError where it finds neither a list nor a GPU to ask."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)


def torch_extension(name: str) -> Extension:
    """The extension with torch's include and library paths."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    if name == "_C":
        return CppExtension(
            f"{PACKAGE}._C", sources("cpu", ".cpp"), depends=sources("cpu", ".h"), extra_compile_args={"cxx": CXX_FLAGS}
        )
    choose_architectures()
    flags = {"cxx": ["-O3", "-std=c++20"], "nvcc": ["-O3", "-std=c++20", "-Xptxas", "--warn-on-spills"]}
    headers = sources("cuda", ".h", ".cuh")
    return CUDAExtension(f"{PACKAGE}._C_cuda", sources("cuda", ".cu", ".cpp"), depends=headers, extra_compile_args=flags)


class BuildKernels(build_ext):
    """Builds each extension by a torch build command of its own, so that one's failure leaves the other alone."""

    def run(self) -> None:
        mode, report = build_mode(), {}
        built = []
        for extension in self.extensions:
            name = extension.name.rpartition(".")[2]
            why = why_skipped(name, mode)
            if why is None:
                why = self._try_build(name, mode)
                status = "built" if why is None else "failed"
            else:
                status = "skipped"
            if mode == "required" and name == "_C" and status == "skipped":
                raise SystemExit(f"{extension.name} is required (SKYRL_MEGA_BUILD), but {why}.")
            if status == "built":
                built.append(extension)
            report[name] = {"status": status, "why": why}
            print(f"{extension.name}: {status}" + (f" ({why})" if why else ""))
        self.extensions = built
        self._write_report(report)

    def _try_build(self, name: str, mode: str) -> str | None:
        """Why the extension could not be built; None where it was. With `required` a failure goes through."""
        from torch.utils.cpp_extension import BuildExtension

        declared = self.distribution.ext_modules
        try:
            self.distribution.ext_modules = [torch_extension(name)]
            command = BuildExtension(self.distribution)
            for option in ("inplace", "build_lib", "build_temp", "force", "debug", "editable_mode"):
                setattr(command, option, getattr(self, option))
            command.ensure_finalized()
            command.run()
        # Whatever goes wrong with a machine's compiler, linker or CUDA must not take the pure-Python install with it.
        except (Exception, SystemExit) as error:
            if mode == "required":
                raise
            for stale in self._package_folder().glob(f"{name}.*.so"):
                stale.unlink()  # built from other sources
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; the compiler's words: pip install -v"
        finally:
            self.distribution.ext_modules = declared
        return None

    def _package_folder(self) -> Path:
        return ROOT / "kernels" / PACKAGE if self.inplace or self.editable_mode else Path(self.build_lib) / PACKAGE

    def _write_report(self, report: dict[str, dict[str, str | None]]) -> None:
        folder = self._package_folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    setup(
        packages=[
            *find_packages(include=["skyrl_mega", "skyrl_mega.*"]),
            *find_packages("kernels"),
            "skyrl_mega_configs",
            *(f"skyrl_mega_configs.{name}" for name in find_packages("configs")),
        ],
        package_dir={
            "skyrl_mega": "skyrl_mega",
            "skyrl_mega_kernels": "kernels/skyrl_mega_kernels",
            "skyrl_mega_configs": "configs",
        },
        package_data={"skyrl_mega_configs": ["*.yaml", "*/*.yaml"], "skyrl_mega": ["py.typed"]},
        # Declared for setuptools' sake (a platform wheel, the sources in the sdist); how they are compiled is decided later.
        ext_modules=[
            Extension(f"{PACKAGE}._C", sources("cpu", ".cpp"), depends=sources("cpu", ".h"), optional=True),
            Extension(f"{PACKAGE}._C_cuda", sources("cuda", ".cu", ".cpp"), depends=sources("cuda", ".h", ".cuh"), optional=True),
        ],
        cmdclass={"build_ext": BuildKernels},
    )
