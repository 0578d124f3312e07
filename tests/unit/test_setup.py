"""setup.py: what is built, what is left out, and the reason it leaves behind. No compiler runs here."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup_module(monkeypatch):
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("SKYRL_MEGA_BUILD", raising=False)
    return module


def run_build(setup_module, folder):
    """Runs the build command for a build into `folder`; returns its report."""
    distribution = Distribution(
        {"ext_modules": [setup_module.Extension(f"skyrl_mega_kernels.{name}", []) for name in ("_C", "_C_cuda")]}
    )
    command = setup_module.BuildKernels(distribution)
    command.build_lib, command.build_temp = str(folder), str(folder / "temp")
    command.ensure_finalized()
    command.run()
    assert len(distribution.ext_modules) == 2
    return json.loads((folder / "skyrl_mega_kernels/_build_report.json").read_text())


def test_every_source_of_the_cpu_extension_is_found(setup_module):
    assert "csrc/cpu/module.cpp" in setup_module.sources("cpu", ".cpp")
    assert "csrc/cpu/vector.h" in setup_module.sources("cpu", ".h")


def test_nothing_is_built_where_the_environment_says_none(setup_module, tmp_path, monkeypatch):
    monkeypatch.setenv("SKYRL_MEGA_BUILD", "none")
    report = run_build(setup_module, tmp_path)
    assert report["_C"] == report["_C_cuda"] == {"status": "skipped", "why": "SKYRL_MEGA_BUILD is none"}


def test_without_torch_the_install_is_pure_python_and_says_what_to_do(setup_module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    report = run_build(setup_module, tmp_path)
    assert report["_C"]["status"] == report["_C_cuda"]["status"] == "skipped"
    assert "--no-build-isolation" in report["_C"]["why"]


def test_a_compiler_that_fails_is_reported_and_does_not_fail_the_install(setup_module, tmp_path, monkeypatch):
    def fail(name):
        raise RuntimeError("Error compiling objects\nfor extension")

    monkeypatch.setattr(setup_module, "torch_extension", fail)
    monkeypatch.setattr(setup_module, "why_skipped", lambda name, mode: None if name == "_C" else "no CUDA")
    stale = tmp_path / "skyrl_mega_kernels" / "_C.cpython-311-x86_64-linux-gnu.so"
    stale.parent.mkdir()
    stale.touch()
    report = run_build(setup_module, tmp_path)
    assert report["_C"]["status"] == "failed"
    assert report["_C"]["why"].startswith("RuntimeError: Error compiling objects for extension;")
    assert report["_C_cuda"] == {"status": "skipped", "why": "no CUDA"}
    assert not stale.exists(), "an extension built from other sources must not stay"

    monkeypatch.setenv("SKYRL_MEGA_BUILD", "required")
    with pytest.raises(RuntimeError, match="Error compiling objects"):
        run_build(setup_module, tmp_path)


@pytest.mark.parametrize(
    ("has_gpu", "asked", "built"),
    [(False, None, "8.0;9.0;10.0+PTX"), (False, "8.6", "8.6"), (True, None, None), (True, "9.0", "9.0")],
)
def test_cuda_sources_are_built_for_common_gpus_where_there_is_none_to_ask(setup_module, monkeypatch, has_gpu, asked, built):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked or "")
    if asked is None:
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    setup_module.choose_architectures()
    assert os.environ.get("TORCH_CUDA_ARCH_LIST") == built


def test_required_is_an_error_where_the_cpu_extension_cannot_be_tried(setup_module, tmp_path, monkeypatch):
    monkeypatch.setenv("SKYRL_MEGA_BUILD", "required")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match=r"_C is required \(SKYRL_MEGA_BUILD\), but there is no C\+\+ compiler"):
        run_build(setup_module, tmp_path)


def test_an_unknown_mode_is_an_error(setup_module, monkeypatch):
    monkeypatch.setenv("SKYRL_MEGA_BUILD", "yes")
    with pytest.raises(SystemExit, match=r"\(yes\) must be one of auto, cpu, none, required"):
        setup_module.build_mode()
