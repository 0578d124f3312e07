"""Which kernel backend runs: by argument, by environment, or the best that can."""

from types import SimpleNamespace

import pytest
import torch

from skyrl_mega.errors import BackendUnavailableError, ConfigError
from skyrl_mega_kernels import backends
from skyrl_mega_kernels.backends import Operator, backends_that_ran, from_environment

CPU = torch.device("cpu")


@pytest.fixture
def operator(monkeypatch):
    """An operator whose cpu backend runs everything but float64, and whose triton backend never runs here."""
    monkeypatch.setattr(backends, "OPERATORS", {})
    monkeypatch.delenv("SKYRL_MEGA_KERNELS", raising=False)
    reasons = {
        "cpu": lambda device, dtype: "it has no float64" if dtype == torch.float64 else None,
        "triton": lambda device, dtype: "the tensors are on cpu",
        "reference": lambda device, dtype: None,
    }
    operator = Operator("probe", ("triton", "cpu", "reference"))
    modules = {name: SimpleNamespace(unavailable=reason) for name, reason in reasons.items()}
    monkeypatch.setattr(Operator, "module", lambda self, backend: modules[backend])
    return operator


def test_auto_takes_the_first_that_can_run_for_the_dtype(operator):
    assert operator.choose(CPU, torch.float32) == "cpu"
    assert operator.choose(CPU, torch.float64) == "reference"


def test_an_argument_comes_before_the_environment_and_the_environment_before_the_best(operator, monkeypatch):
    monkeypatch.setenv("SKYRL_MEGA_KERNELS", "reference")
    assert operator.choose(CPU, torch.float32) == "reference"
    assert operator.choose(CPU, torch.float32, "cpu") == "cpu"
    monkeypatch.setenv("SKYRL_MEGA_KERNELS", "other=reference")
    assert operator.choose(CPU, torch.float32) == "cpu"


def test_the_environment_may_speak_of_single_operators():
    environ = {"SKYRL_MEGA_KERNELS": "reference, probe = cpu"}
    assert from_environment("probe", environ) == "cpu"
    assert from_environment("other", environ) == "reference"
    assert from_environment("probe", {}) == "auto"


def test_what_was_asked_for_and_can_not_run_is_an_error(operator, monkeypatch):
    with pytest.raises(BackendUnavailableError, match=r"probe: backend triton .*the tensors are on cpu.*Able: cpu, reference"):
        operator.choose(CPU, torch.float32, "triton")
    with pytest.raises(BackendUnavailableError, match="no backend of that name; it has triton, cpu, reference"):
        operator.choose(CPU, torch.float32, "cuda")
    monkeypatch.setenv("SKYRL_MEGA_KERNELS", "cpu")
    with pytest.raises(BackendUnavailableError, match=r"environment variable SKYRL_MEGA_KERNELS.*no float64"):
        operator.choose(CPU, torch.float64)


def test_an_unknown_name_is_an_error_that_lists_the_known(operator, monkeypatch):
    monkeypatch.setenv("SKYRL_MEGA_KERNELS", "fast")
    with pytest.raises(ConfigError, match=r"`fast` .*auto, reference, cpu, triton, cuda"):
        operator.choose(CPU, torch.float32)


def test_what_ran_is_remembered(operator):
    assert backends_that_ran() == {}
    operator.select(CPU, torch.float32)
    operator.select(CPU, torch.float64)
    assert backends_that_ran() == {"probe": ("cpu", "reference")}
