"""Devices, and the one place that knows a machine without CUDA.

Megatron-Core's arithmetic runs on any device, but some of its lines ask `torch.cuda` where they mean "the device of this rank".
`install_megatron_cpu_shim` answers those lines on a machine without CUDA, so that Megatron's own schedules, DDP and optimizer run
there unmodified, over gloo. Where CUDA exists it does nothing at all.

**How.** Inside the loaded `megatron.core.*` modules the global name `torch` is rebound to a proxy: a module object that
answers the names listed below itself and passes every other attribute on to the real torch. Nothing outside Megatron's
namespace sees it. Patching torch itself instead would break other libraries in the process: `torch.utils._device` caches the
tensor factories it finds, and Hugging Face's meta-device loading goes through that cache, so wrapped factories left models
with unfilled weights.

**What the proxy answers, and which lines ask** (megatron-core 0.16.1; `tests/unit/test_device_shim.py` lists them module by
module):

====================================== =================================================================================
`torch.cuda.current_device`            `device=torch.cuda.current_device()` of gradient buffers, activations, p2p receive
                                       buffers, rotary frequencies: the CPU device instead of an index
factories with `device="cuda"`         zeros, ones, empty, full, tensor, arange and the `_like` forms: token counts of the
                                       schedules, norms and found-inf flags of the optimizer; also `pin_memory=True` is dropped
`torch.cuda.manual_seed`, `get_rng_state`, `set_rng_state`
                                       Megatron's RNG tracker: the CPU generator is this machine's device generator
`torch.cuda.Stream`, `Event`, `stream`, `current_stream`, `default_stream`
                                       overlapped reductions name streams; a CPU has one, so they do nothing
`torch.cuda.synchronize`               before timing and after p2p: CPU work is finished when the call returns
====================================== =================================================================================

Two collectives of `megatron.core.distributed.param_and_grad_buffer`, `dist_reduce_scatter_func` and `dist_all_gather_func`, do
nothing in a group of one: NCCL knows that there is nothing to do, gloo copies the whole gradient buffer twice.

Two functions of `megatron.core.tensor_parallel.random` are replaced whole, `_get_cuda_rng_state` and `_set_cuda_rng_state`: the
first goes to `torch.cuda.random` by import, the second defers its work through `torch.cuda._lazy_call`, which on a machine
without CUDA never runs (a forked RNG state would silently not be restored).

Two names of mixture-of-experts modules are mended: `token_dispatcher.maybe_move_tensor_to_cpu` turns split sizes into host
numbers only where the tensor is on a GPU (`all_to_all_single` takes numbers), and `moe_utils.te_general_gemm` is looked up
without being defined where TransformerEngine is missing.

**Two Tensor methods** can't be reached through a module's globals and are replaced on `torch.Tensor`: `type`, because the
optimizer sorts parameters by comparing `param.type()` with `"torch.cuda.FloatTensor"` and the like, and `cuda`, because a few
lines move a tensor to the device of the rank that way. Both look at their caller: unless it is a `megatron.core` module they
do what torch does.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from skyrl_mega.errors import BackendUnavailableError

CPU = torch.device("cpu")

#: Imported before the proxy is put in place: what model, optimizer, schedules and checkpoints use. A module that is imported
#: later still holds the real torch; calling `install_megatron_cpu_shim` again covers it.
MEGATRON_MODULES = (
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.dist_checkpointing.serialization",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.moe.moe_layer",
)

#: Packages whose modules see the proxy.
_SHIMMED = ("megatron.core",)

FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "tensor",
    "zeros",
    "zeros_like",
)


@dataclass(frozen=True)
class ShimReport:
    """What `install_megatron_cpu_shim` did: "inert" where CUDA exists, else the modules whose `torch` is the proxy now."""

    status: Literal["installed", "inert"]
    modules: tuple[str, ...] = ()


def resolve_device(name: str) -> torch.device:
    """The device of this process for "auto", "cpu" or "cuda"; on CUDA the card of LOCAL_RANK (0 without torchrun).

    Raises BackendUnavailableError where CUDA is asked for and torch sees none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise BackendUnavailableError(f"`trainer.device` must be auto, cpu or cuda, not {name!r}.")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        built = torch.version.cuda or "no CUDA"
        raise BackendUnavailableError(
            f"`trainer.device` is cuda, but torch {torch.__version__} (built with {built}) sees no CUDA device; "
            "install a CUDA build of torch and check nvidia-smi, or set trainer.device=cpu."
        )
    if name == "cpu" or not available:
        return CPU
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f"LOCAL_RANK is {index}, but this host has {torch.cuda.device_count()} CUDA devices; "
            "start at most one rank per device."
        )
    return torch.device("cuda", index)


def set_threads(count: int) -> None:
    """Fixes the torch threads of this process. More than one helps only on idle cores: waiting threads stall small matmuls."""
    torch.set_num_threads(count)


def install_megatron_cpu_shim() -> ShimReport:
    """Makes Megatron-Core run on this machine if it has no CUDA; see the module's docstring for every name and why.

    Idempotent. Call it before building groups or models, and again after importing further Megatron modules.
    """
    if torch.cuda.is_available():
        return ShimReport("inert")
    with warnings.catch_warnings():
        # Each of them says on import that TransformerEngine or apex is missing: on this machine that is how it should be.
        warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
        for name in MEGATRON_MODULES:
            importlib.import_module(name)
    for name, module in list(sys.modules.items()):
        if name.startswith(_SHIMMED) and vars(module).get("torch") is torch:
            module.torch = _torch_proxy
    random = sys.modules["megatron.core.tensor_parallel.random"]
    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    sys.modules["megatron.core.transformer.moe.token_dispatcher"].maybe_move_tensor_to_cpu = _on_host
    vars(sys.modules["megatron.core.transformer.moe.moe_utils"]).setdefault("te_general_gemm", None)
    buffers = sys.modules["megatron.core.distributed.param_and_grad_buffer"]
    buffers.dist_reduce_scatter_func = _alone_is_done(torch.distributed.reduce_scatter_tensor)
    buffers.dist_all_gather_func = _alone_is_done(torch.distributed.all_gather_into_tensor)
    if torch.Tensor.type is not _tensor_type:
        torch.Tensor.type = _tensor_type
        torch.Tensor.cuda = _tensor_cuda
    return ShimReport("installed", tuple(sorted(_shimmed_modules())))


def _shimmed_modules() -> list[str]:
    return [
        name
        for name, module in list(sys.modules.items())
        if name.startswith(_SHIMMED) and vars(module).get("torch") is _torch_proxy
    ]


class _Proxy(types.ModuleType):
    """A module that answers `overrides` itself and passes every other attribute on to `real`."""

    def __init__(self, real: types.ModuleType, overrides: dict[str, Any]) -> None:
        super().__init__(real.__name__, real.__doc__)
        self.__dict__["_real"] = real
        self.__dict__.update(overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _NoStream:
    """Stands for a CUDA stream or event where there is one queue only: ordering and waiting are already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _NoStream:
        return self

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _TypeName(str):
    """A tensor's type name that equals its CUDA spelling too: "torch.FloatTensor" == "torch.cuda.FloatTensor"."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str.__eq__(self, other.replace("torch.cuda.", "torch."))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The factory, with `device="cuda"` meaning CPU and pinned memory (a CUDA notion) left out."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Megatron's `maybe_move_tensor_to_cpu` for tensors that lie there already."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _alone_is_done(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, left out in a group of one, where Megatron's views make its output the input itself."""

    def call(output: torch.Tensor, source: torch.Tensor, *args: Any, group: Any, async_op: bool = False, **kwargs: Any) -> Any:
        in_place = output.data_ptr() == source.data_ptr() and output.numel() == source.numel()
        # An asynchronous call must leave a handle behind that somebody waits for.
        if in_place and not async_op and torch.distributed.get_world_size(group) == 1:
            return None
        return collective(output, source, *args, group=group, async_op=async_op, **kwargs)

    return call


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _called_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.core")


_real_type = torch.Tensor.type
_real_cuda = torch.Tensor.cuda


def _tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or not _called_by_megatron():
        return _real_type(self, *args, **kwargs)
    return _TypeName(_real_type(self))


def _tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self if _called_by_megatron() else _real_cuda(self, *args, **kwargs)


_cuda_proxy = _Proxy(
    torch.cuda,
    {
        "current_device": lambda: CPU,
        "manual_seed": _manual_seed,
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "Stream": _NoStream,
        "Event": _NoStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: _NoStream(),
        "default_stream": lambda device=None: _NoStream(),
        "synchronize": lambda device=None: None,
    },
)
_torch_proxy = _Proxy(torch, {"cuda": _cuda_proxy, **{name: _on_cpu(getattr(torch, name)) for name in FACTORIES}})
