"""Which implementation of an operator runs: the one asked for, or the best that can; and a record of what ran.

Every operator lists its backends, best first. A backend is a module with `unavailable(device, dtype)`, which answers None where
it can run and otherwise the reason in words, and with the functions that the operator's `ops.py` calls.

    reference   torch; any device, any floating dtype, readable, the oracle's dtype float64 included
    cpu         C++ (`csrc/cpu`): vectorised and threaded; float32 and bfloat16 on CPU
    triton      NVIDIA and AMD GPUs; on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)
    cuda        CUDA C++ (`csrc/cuda`), where it beats Triton

An explicit choice (a `backend=` argument, the setting `model.kernels`) comes before the environment variable
SKYRL_MEGA_KERNELS, which comes before the best. The variable holds one name for all operators, or pairs:
`linear_logprobs=reference,segmented_gae=cpu`. What was asked for and can't run is an error; only `auto` looks further.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch

from skyrl_mega.errors import BackendUnavailableError, ConfigError

BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT = "SKYRL_MEGA_KERNELS"


@dataclass(frozen=True)
class Operator:
    """An operator and the backends it has, best first.

    Its modules lie in the folder of its name, unless it is made of another operator's: then `package` names that one.
    """

    name: str
    backends: tuple[str, ...]
    package: str = ""
    _ran: set[str] = field(default_factory=set, compare=False, repr=False)

    def __post_init__(self) -> None:
        OPERATORS[self.name] = self

    def module(self, backend: str) -> ModuleType:
        """The module that implements `backend`; it is imported at the first call."""
        return importlib.import_module(f"skyrl_mega_kernels.{self.package or self.name}.{backend}")

    def unavailable(self, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why `backend` can't run for tensors of this device and dtype; None where it can."""
        if backend not in self.backends:
            return f"{self.name} has no backend of that name; it has {', '.join(self.backends)}"
        return self.module(backend).unavailable(device, dtype)

    def choose(self, device: torch.device, dtype: torch.dtype, wanted: str = "auto") -> str:
        """The backend to run for tensors of this device and dtype.

        Raises BackendUnavailableError where a backend named by `wanted` or the environment can't run, ConfigError for a name
        that no operator has.
        """
        source = "the argument or setting"
        if wanted == "auto":
            wanted, source = from_environment(self.name), f"the environment variable {ENVIRONMENT}"
        if wanted == "auto":
            return next(name for name in self.backends if self.unavailable(name, device, dtype) is None)
        _check_name(wanted, source)
        reason = self.unavailable(wanted, device, dtype)
        if reason is not None:
            can = [name for name in self.backends if self.unavailable(name, device, dtype) is None]
            raise BackendUnavailableError(
                f"{self.name}: backend {wanted} ({source}) can't run on {device.type} tensors of {dtype}: {reason}. Able: "
                f"{', '.join(can)}; `auto` takes the first."
            )
        return wanted

    def select(self, device: torch.device, dtype: torch.dtype, wanted: str = "auto") -> ModuleType:
        """The module to call now; it is noted as having run."""
        backend = self.choose(device, dtype, wanted)
        self._ran.add(backend)
        return self.module(backend)


#: Every operator whose package has been imported, by name.
OPERATORS: dict[str, Operator] = {}


def from_environment(operator: str, environ: Mapping[str, str] | None = None) -> str:
    """What SKYRL_MEGA_KERNELS says about `operator`; "auto" where it says nothing."""
    text = (os.environ if environ is None else environ).get(ENVIRONMENT, "").strip()
    chosen = "auto"
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, has_name, backend = entry.rpartition("=")
        if not has_name or name.strip() == operator:
            chosen = backend.strip()
    return chosen


def backends_that_ran() -> dict[str, tuple[str, ...]]:
    """Operator -> the backends that have run in this process so far."""
    return {name: tuple(sorted(operator._ran)) for name, operator in sorted(OPERATORS.items()) if operator._ran}


def _check_name(wanted: str, source: str) -> None:
    if wanted not in BACKENDS:
        raise ConfigError(f"`{wanted}` ({source}) must be a kernel backend: auto, {', '.join(BACKENDS)}.")
